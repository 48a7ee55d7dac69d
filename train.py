"""Train a GPT on a text file.

    python train.py --minutes 3                      # the best model for three minutes on this machine, into out/
    python train.py                                  # the default model on input.txt
    python train.py --data mytext.txt --n_layer 4 --n_head 4 --n_embd 128 --max_iters 2000
    python train.py --resume                         # go on where a run was stopped
    torchrun --nproc_per_node 8 train.py ...         # eight processes as one run (distributed.py)

It reads in the order in which a run happens: the options, the loop, the report. What comes before the first step is in
plan.py, and one step in optim.py.

Exercises:
- Train the small model of the README (4 layers of 128 channels) for 200 steps with --learning_rate 1e-4, 1e-3 and 1e-1,
  each in an --out_dir of its own, and lay the three pictures of the loss side by side. Which one is too small, and how
  does one see that the other is too large?
- Stop a run with Ctrl-C and go on with --resume: does metrics.jsonl show where it stopped?
"""

import utils  # first: it starts the clock and sets how PyTorch's threads wait  # noqa: F401

# isort: split
import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Optional

import torch
from tqdm import tqdm

from budget import check_activations, check_flags, show
from checkpoint import (
    METRICS,
    Lock,
    Saver,
    lock_owner,
    model_files,
    read_metrics,
    save_shards,
    save_state,
    saved_loss,
    snapshot,
    state_files,
    torchrun_job,
    write_model,
)
from data import validation_loss
from distributed import ALONE, job, launcher
from draft import Draft
from generate import generate
from modern import LONGEST
from optim import Learner, lr_share
from plan import (
    STEPS_WITHOUT_END,
    begin,
    check_directory,
    check_run,
    end_seconds,
    evaluation_batches,
    evaluation_seconds,
    make_directory,
    maybe_compile,
    resume,
    seconds_per_token,
    smaller_setting,
)
from sharding import copies, is_sharded, learned, shard, whole_weights
from tokenizer import prompt_tokens, tokenizer_hash, whole_characters
from utils import (
    STARTED,
    UserError,
    autocast,
    dtype_name,
    environment_number,
    is_out_of_memory,
    option,
    outlive_readers,
    parse_options,
    pick_dtype,
    random_states,
    restore_random_states,
    run_command,
    seconds_in_words,
    write_atomically,
)

MOST_SKIPPED = 20  # steps in a row: float16's scale of 2^16 may need 16 to come down to 1
TOGETHER = 0.5  # seconds in which two signals are one
SAVE_SECONDS = 60  # between two savings, where evaluations do not save more often
SAVE_SHARE = 0.01  # of the time, that these savings may take
PICTURE_SHARE = 0.05  # of the time, that pictures of the loss may take before the last one
FEW_STEPS = 20  # after which a model has hardly begun to learn
SAMPLE_SECONDS = 10  # for a sample at most


@dataclass
class TrainOptions:
    """Every flag of train.py: its type, its default and its line of help."""

    # what it reads and writes
    data: str = option("input.txt", "text to train on: a UTF-8 file, or any source that corpus.py and data.py list")
    tokenizer: Optional[str] = option(
        None, "chars (the default), bytes, bpe:N (as in bpe:4096), gpt2, or the path of a tokenizer.json"
    )
    field: str = option("text", "field of .jsonl files, or column of tables, with the text")
    out_dir: str = option("out", "directory for the model, its metrics and its loss curve")
    resume: bool = option(False, "go on with the run in out_dir, with the settings it began with")
    fresh: bool = option(
        False, "where out_dir holds an earlier run, move that aside (out-1, out-2, ...) and start anew"
    )
    init_from: Optional[str] = option(None, "start from these weights: a run's directory, a GPT-2 directory or name")
    # a plan in place of a run (budget.py)
    plan: bool = option(False, "train nothing; show what the run would take in memory, time and files")
    peak: Optional[str] = option(None, "the plan is for this GPU (t4, v100, 4090, a100, h100, h200) or FLOP/s")
    processes: Optional[int] = option(None, "the plan is for so many processes (default: as torchrun says)", at_least=1)
    vocab_size: Optional[int] = option(None, "the plan is for so many different tokens, and needs no text", at_least=1)
    # the one dial
    minutes: Optional[float] = option(
        None, "how long to train; chooses every setting not given (plan.py)", above=0, below=1_000_000
    )
    # model
    arch: str = option("gpt", "gpt (GPT-2 exactly) or modern (modern.py)", choices=("gpt", "modern"))
    n_layer: int = option(6, "transformer layers", at_least=1, below=10_000)
    n_head: int = option(6, "attention heads in each layer", at_least=1)
    n_embd: int = option(384, "channels (embedding dimension), a multiple of n_head; modern: of twice that", at_least=1)
    block_size: int = option(256, "context length in tokens", at_least=1)
    dropout: float = option(0.2, "share of activations switched off while training", at_least=0, below=1)
    ngram: int = option(
        1, "tokens in the longest run that has a vector of its own; modern: 5", at_least=1, below=LONGEST + 1
    )
    ngram_rows: int = option(16384, "modern: rows in the table of these vectors", at_least=1)
    ngram_decay: float = option(
        1.0, "modern: decay of these vectors, 0.8 a reading after the first, up to 16; fine-tuning: 0", at_least=0
    )
    ahead: int = option(
        1, "tokens that each position foretells while it learns; modern: 4, of many different ones fewer", at_least=1
    )
    bias: bool = option(True, "biases in the linear layers and LayerNorms, as in GPT-2; modern: none")
    # training
    batch_size: int = option(64, "windows of block_size tokens in each step", at_least=1)
    gradient_accumulation_steps: int = option(1, "batches to add up before each update of the weights", at_least=1)
    max_iters: int = option(10_000, "updates of the weights in the whole run", at_least=1)
    learning_rate: float = option(3e-4, "highest learning rate; modern: 4e-3", at_least=0)
    matrix_lr: float = option(0.02, "highest learning rate of Muon, for a modern model's matrices", at_least=0)
    min_lr: Optional[float] = option(
        None, "learning rate at the end (default: a tenth of learning_rate; modern: 0)", at_least=0
    )
    warmup_iters: int = option(100, "steps in which the learning rate climbs to its highest; modern: 20", at_least=0)
    weight_decay: float = option(0.1, "decay of the weight matrices; modern: 0", at_least=0)
    beta1: float = option(0.9, "AdamW's memory of the gradient; modern: 0.8", at_least=0, below=1)
    beta2: float = option(0.99, "AdamW's memory of the squared gradient; modern: 0.95", at_least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 switches clipping off", at_least=0)
    seed: int = option(1337, "for initial weights, batches and dropout", at_least=0)
    # reports
    eval_interval: int = option(
        500, "steps between evaluations, which save the run; in a run of minutes by the clock unless given", at_least=1
    )
    eval_iters: int = option(200, "most batches in an evaluation; a val split of fewer is read whole", at_least=1)
    log_interval: int = option(10, "steps between lines in metrics.jsonl", at_least=1)
    sample_interval: int = option(0, "steps between short samples printed while training; 0 for none", at_least=0)
    keep: int = option(2, "newest states to keep; where one is damaged, the one before is resumed", at_least=1)
    # system
    device: Optional[str] = option(None, "cpu, cuda, cuda:1 or mps (default: the first there is of cuda, mps, cpu)")
    dtype: Optional[str] = option(
        None,
        "float32, bfloat16 or float16 (default: bfloat16 if in hardware, else float16 on CUDA, else float32)",
        choices=("float32", "bfloat16", "float16"),
    )
    compile: bool = option(True, "compile the model; left to the default, only on a GPU where it earns back its time")
    record: bool = option(True, "on one NVIDIA GPU, record a step and replay it: its Python then runs only a few times")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    shard: bool = option(
        False, "spread weights, gradients and optimizer over torchrun's processes (PyTorch 2.6, CPU 2.8)"
    )


def main(argv):
    outlive_readers(sys.stdout)
    with job() as processes:
        options, given = parse_options(TrainOptions, argv, "Train a GPT on a text file.")
        with errors_in_words(options):
            return train(options, given, processes)


@contextlib.contextmanager
def errors_in_words(options):
    """Memory or a disk that is full: a UserError with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch = "--batch_size (--gradient_accumulation_steps makes up for it) or " if options.batch_size > 1 else ""
        add = "" if options.gradient_checkpointing else ", or add --gradient_checkpointing"
        raise UserError(f"out of memory; lower {batch}--block_size{add}") from None
    except OSError as error:  # a full disk, say; what was saved before is whole
        remedy = "go on with --resume" if state_files(options.out_dir) else "start anew with --fresh"
        problem = f"--out_dir {options.out_dir}: cannot be written ({error.strerror})"
        raise UserError(f"{problem}; make room there, then {remedy}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The run


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after this step. Used as a context.

    A second Ctrl-C or SIGTERM leaves at once, unless it comes with the first: timeout and others send one to a program
    and then one to its group.

    number: the signal on which all processes have agreed, None while there is none.

    Python handles signals only between its own instructions, so two that come while PyTorch computes count as one. So a
    thread counts them: for each signal, Python's C code at once writes a byte to a socket, which the thread reads.
    """

    def __init__(self, processes=ALONE):
        self.processes, self.came, self.number = processes, 0, None
        self.sockets = socket.socketpair()
        self.sockets[1].setblocking(False)  # as set_wakeup_fd wants it
        threading.Thread(target=self._leave_at_the_second, args=(self.sockets[0],), daemon=True).start()

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)  # the terminal was closed
        self.handlers = {number: signal.signal(number, self._handle) for number in numbers}
        signal.set_wakeup_fd(self.sockets[1].fileno())
        return self

    def __exit__(self, kind, *_):
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is not None:
            self.processes.ignore_torchrun()
        self.sockets[1].close()  # which ends the thread

    def _handle(self, number, frame):
        self.came = number

    def agree(self, *figures):
        """Ask all processes for a signal. Returns the figures of the first process, which decides for all."""
        came, *figures = self.processes.agree(*figures, signal=self.came)
        self.number = came or None
        return figures

    @staticmethod
    def _leave_at_the_second(signals):
        first = math.inf
        for [number] in iter(lambda: signals.recv(1), b""):
            if number in (signal.SIGINT, signal.SIGTERM):
                now = time.perf_counter()
                first = min(first, now)
                if now - first > TOGETHER:
                    os._exit(128 + number)

    def until(self, items):
        """Yields the items; raises Stopped as soon as the signal has come."""
        for item in items:
            self.agree()
            if self.number is not None:
                raise Stopped
            yield item


class Stopped(Exception):
    """A signal came in the middle of something that can be done again."""


class Run:
    """What changes while a model is trained, how it is measured, and how it is kept.

    saver: a checkpoint.Saver, which writes beside the training. processes: of which the first one writes.
    """

    def __init__(self, options, model, data, device, dtype, saver, processes=ALONE):
        self.options, self.model, self.data, self.device, self.dtype = options, model, data, device, dtype
        self.saver, self.processes = saver, processes
        self.learner = Learner(model, options, device, dtype, processes)
        self.step, self.tokens = 0, 0
        self.best = math.inf  # lowest val loss so far
        self.due = False  # is an evaluation due? Saved, so that a run stopped before it begins with it again
        self.eval_iters = options.eval_iters  # most batches in an evaluation
        self.compiled = None  # of a resumed run: whether it began compiled, which rounds otherwise
        self.earlier_seconds = 0.0  # of the processes before this one, where the run was resumed
        self.first_second = None  # when the first step began, in seconds of the run
        self.reserved = 0.0  # seconds to leave for the end: the last evaluation, the picture, the sample
        self.saved = self.seconds  # when the run was saved last, or began
        self.copying = 0.0  # seconds for which saving kept the training waiting
        self.drawn, self.drawing = self.seconds, 0.5  # when the loss was drawn last, or the run began; seconds it took
        self.path = os.path.join(options.out_dir, METRICS)

    @property
    def seconds(self):
        """How long the run has taken, from the start of the process on."""
        return self.earlier_seconds + time.perf_counter() - STARTED

    @property
    def left(self):
        """Seconds until the last step of a run of minutes."""
        return 60 * self.options.minutes - self.reserved - self.seconds

    def progress(self):
        """The share of the run that is done, 0 to 1: in steps or, with --minutes, in time."""
        done = self.step / self.options.max_iters
        if self.options.minutes is not None:
            taken = self.seconds - self.first_second
            done = max(done, taken / max(0.1, taken + self.left))
        return min(1.0, done)

    def state(self):
        """All that `restore` needs to go on exactly."""
        names = ("step", "tokens", "best", "seconds", "first_second", "due")
        return dict(
            options=asdict(self.options),
            config=asdict(self.model.config),
            fingerprint=self.data.fingerprint,
            tokenizer=tokenizer_hash(self.data.tokenizer),
            progress=self.progress(),
            counters={name: getattr(self, name) for name in names},
            compiled=self.learner.compute is not self.learner.uncompiled,
            random=self.processes.gather(random_states(self.device)),
            **self.learner.state_dict(),
        )

    def save(self, best=False):
        """Keep the newest state, from which --resume goes on, and the model where it is the best so far.

        Both are copied here and now, and written while the training goes on. Raises the error of the saving before.
        """
        start = time.perf_counter()
        self.saver.wait()
        best = best or self.best == math.inf  # before the first evaluation the newest weights are the best there are
        state, model, tensors = self.state(), None, None
        if self.learner.sharded:
            tensors = copies(learned(self.learner), self.processes)
            weights = whole_weights(self.model, self.processes) if best else None
        else:
            weights = self.model.state_dict() if best else None
        if self.processes.first:
            state = snapshot(state)
            model = snapshot(model_files(self.model, weights)) if best else None
        self.saver.start(lambda: self._write(state, model, tensors))
        self.saved, self.copying = self.seconds, time.perf_counter() - start

    def _write(self, state, model, tensors):
        """The weights first: should a crash leave them newer than the state, saved_loss knows.

        tensors: those of a sharded model, of which each process writes its own; all else is written by the first one.
        """
        if self.processes.first:
            self._write_first(state, model)
        if tensors is not None:
            save_shards(self.options.out_dir, tensors, state, self.options.keep, self.processes)
        elif self.processes.first:
            save_state(self.options.out_dir, state, self.options.keep)

    def _write_first(self, state, model):
        out, counters = self.options.out_dir, state["counters"]
        if model is not None:
            loss = counters["best"] if counters["best"] < math.inf else None
            write_model(out, *model, self.data.tokenizer, self.model.config.block_size, loss)
        with open(self.path, "rb+") as f:
            os.fsync(f.fileno())  # the lines up to this state are then as durable as it is

    def save_is_due(self):
        """Is it time to save the run, where no evaluation does?"""
        return self.seconds - self.saved > max(SAVE_SECONDS, (self.copying + self.saver.seconds) / SAVE_SHARE)

    def restore(self, state):
        """Go back to exactly where `save` was called; metrics logged after that are dropped."""
        self.learner.load_state_dict(state)
        counters = dict(state["counters"])
        self.earlier_seconds = counters.pop("seconds")
        vars(self).update(counters)
        self.compiled, self.saved, self.drawn = state.get("compiled"), self.seconds, self.seconds
        loss = self.processes.from_first(lambda: saved_loss(self.options.out_dir))
        self.best = self.best if loss is None else loss
        self.restore_dice(state["random"])
        if self.processes.first:
            self._drop_later_metrics()

    def restore_dice(self, random):
        """Go on with the random numbers where they stood, or, on another number of processes, with new ones."""
        random = [random] if isinstance(random, dict) else random  # a dict: before there were several processes
        if len(random) == self.processes.world:
            restore_random_states(random[self.processes.rank], self.device)
        else:
            torch.manual_seed(self.options.seed + 1_000_003 * (self.processes.rank + 1) + self.step)

    def _drop_later_metrics(self):
        metrics = read_metrics(self.path, say=True)
        lines = [json.dumps(m) + "\n" for m in metrics if m["step"] <= self.step]
        write_atomically(self.path, lambda path: write_lines(path, lines))

    def log(self, **figures):
        """Add a line to metrics.jsonl. JSON knows no infinity, which a gradient in float16 may reach: left out."""
        if not self.processes.first:
            return
        self.saver.check()
        figures = {name: figure for name, figure in figures.items() if math.isfinite(figure)}
        line = dict(step=self.step, seconds=round(self.seconds, 3), tokens=self.tokens, **figures)
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")

    def evaluate(self, wrap=iter):
        """Measure the val loss, keep the weights if they are the best so far, save, draw the loss if it is time.

        wrap: what the batches of the val split pass through; if it raises Stopped, the evaluation stays due.
        """
        o = self.options
        with autocast(self.device, torch.float32 if self.learner.sharded else self.dtype):
            loss = validation_loss(
                self.model, self.data.val, o.batch_size, self.eval_iters, self.device, wrap, self.processes
            )
        if not math.isfinite(loss):  # nothing worth keeping
            return loss
        self.due = False
        self.log(val_loss=loss, val_bits_per_byte=self.data.bits_per_byte(loss))
        best = loss < self.best
        self.best = min(loss, self.best)
        self.save(best)
        if self.processes.first and self.picture_is_due():
            self.draw()
        return loss

    def picture_is_due(self):
        """Is it time to draw the loss before the end? It takes as long as hundreds of steps of a tiny model."""
        return self.progress() < 1 and self.seconds - self.drawn > self.drawing / PICTURE_SHARE

    def draw(self):
        """Draw the loss curve."""
        import plots  # here, as matplotlib takes half a second to load: a run starts without it, others never need it

        start = self.seconds
        figure = plots.loss_curve(read_metrics(self.path))
        picture = os.path.join(self.options.out_dir, "loss.png")
        write_atomically(picture, lambda path: figure.savefig(path, format="png", dpi=120))
        self.drawn, self.drawing = self.seconds, self.seconds - start

    def diverged(self, what):
        """The error for numbers that are none."""
        kept = f"; what was saved is kept in {self.options.out_dir}" if state_files(self.options.out_dir) else ""
        return UserError(f"{what} at step {self.step}: the run has diverged; start anew, lower --learning_rate{kept}")


def write_lines(path, lines):
    with open(path, "w") as f:
        f.writelines(lines)


def claim_directory(options, lock, processes):
    """Take the lock of a run that is in out_dir, in the first process. Returns the options of the run, for all."""
    restarts = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    [restarts] = processes.agree(signal=restarts)  # the highest: one machine's workers may have had none

    def claim():
        ours = carry_on(options, restarts)
        check_directory(ours, lock)
        return ours

    return processes.from_first(claim)


def carry_on(options, restarts):
    """The options of workers that torchrun started again because one had died: those of going on by themselves.

    Their command line is that of the first start. They go on only where that start had come as far as training in
    out_dir; a run that was there before is still refused. Where only the last words are missing they say those.
    """
    if not restarts or lock_owner(options.out_dir).get("job") != torchrun_job():
        return options
    resume = bool(state_files(options.out_dir))
    return replace(options, resume=resume, fresh=not resume)  # it may have died before it was saved


def train(options, given, processes=ALONE):
    """Train as the options say. Returns the exit status: 0, or 128 + the number of a signal, with the run saved."""
    check_flags(options, given)
    if options.plan:
        return show(options, given)
    if importlib.util.find_spec("matplotlib") is None:  # now, and not when the first picture is drawn
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    with contextlib.ExitStack() as at_end:
        return train_until(at_end, options, given, processes)


def train_until(at_end, options, given, processes):
    """train, where at_end, a context, closes whatever must not stay open, however the run ends."""
    lock = at_end.enter_context(Lock())
    saver = at_end.enter_context(Saver(lock.check))
    options = claim_directory(options, lock, processes)
    device = processes.own_device(options.device)
    processes.begin(device)
    torch.manual_seed(options.seed)
    if options.resume:
        options, model, data, state = resume(options, given, device, processes)
        dtype = pick_dtype(options.dtype, device)
    else:
        dtype = pick_dtype(options.dtype, device)
        options, model, data = begin(options, given, device, dtype, processes)
    check_run(options, given, device, dtype, processes.world)
    check_activations(options, model.config, device, dtype, processes.world)
    batches = data.batches(options.batch_size * options.gradient_accumulation_steps, options.block_size, options.seed)
    model.gradient_checkpointing = options.gradient_checkpointing
    model.to(device).train()
    if processes.first:
        make_directory(options, lock)
    if options.shard and processes.world > 1:
        shard(model, device, dtype, processes)
    run = Run(options, model, data, device, dtype, saver, processes)
    if options.resume:
        run.restore(state)
    elif not processes.first:
        torch.manual_seed(options.seed + 1_000_003 * processes.rank)  # for dropout: to each its own
    print(
        f"{model.num_params() / 1e6:.2f} M parameters, {data.tokenizer.vocab_size} tokens in the vocabulary, "
        f"{len(data.train):,} to train on, {len(data.val):,} to validate; {device.type}, {dtype_name(dtype)}"
        + (f", {processes.world} processes" if processes.world > 1 else "")
        + (", computed in C" if run.learner.steps_in_c() else "")
    )
    evaluation = look_ahead(run, batches, given)

    stop = at_end.enter_context(StopSignal(processes))
    timed = options.minutes is not None
    total = max(1, round(60 * options.minutes)) if timed else options.max_iters

    def done():
        """How far the bar is: in seconds, of which a run may take a few too many, or in steps."""
        return min(total, round(run.seconds)) if timed else run.step

    bar = tqdm(  # closed before the last words, and before those of an error
        total=total,
        initial=done(),
        unit="step",
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s [{remaining} left{postfix}]" if timed else None,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,  # rarely where the output goes to a file
        smoothing=0 if timed else 0.3,  # a second takes a second
        disable=not processes.first,
    )
    at_end.callback(bar.close)

    def with_the_clock(batches):
        """The batches of an evaluation, in which the bar of a run with --minutes goes on."""
        for batch in stop.until(batches):
            bar.update(done() - bar.n)
            yield batch

    if run.first_second is None:
        run.first_second = run.seconds
    if options.init_from is not None and run.step == 0 and run.best == math.inf:
        run.due = True  # what the old weights make of the text: to see the gain
    [progress] = stop.agree(run.progress())
    if options.resume and progress == 1 and not run.due:
        if state["progress"] == 1 and "resume" in given:  # the clock had ended it
            raise UserError(
                f"--minutes {options.minutes:g}: the run has had {run.seconds / 60:.2f} min, and what is left is too "
                f"short for a step and the end of a run; give more"
            )
        run.due = state["progress"] < 1  # it was stopped, and its start took what time was left
    by_the_clock = timed and options.eval_interval == STEPS_WITHOUT_END
    pause = max(3.0, (60 * options.minutes) / 8, 25 * evaluation) if by_the_clock else None  # between evaluations
    last_seconds, last_tokens, last_evaluation = run.seconds, run.tokens, run.seconds
    skipped, _ = run.learner.skipped.tolist()
    # Even where the time is over before the first step, a run makes one and ends with an evaluation.
    while stop.number is None and (progress < 1 or run.due or run.best == math.inf or run.step == 0):
        if run.due:
            try:
                val = run.evaluate(with_the_clock)
            except Stopped:
                break
            if not math.isfinite(val):
                if run.step == 0:
                    weights = f"--init_from {options.init_from}"
                    raise UserError(f"{weights}: its val loss is {val}; its weights are of no use")
                raise run.diverged(f"the val loss is {val}")
            bar.write(f"step {run.step}: val loss {val:.4f}, {data.bits_per_byte(val):.3f} bits per byte")
            last_seconds, last_evaluation = run.seconds, run.seconds
            stop.agree()
            continue
        share = lr_share(run.step, progress, options)
        x, y = batches.batch(run.step, device, processes)
        loss, norm = run.learner.step(x, y, share)
        run.step, run.tokens = run.step + 1, run.tokens + x.numel() * processes.world
        bar.update(done() - bar.n)

        # The last evaluation ends the run: one shortly before it would take the time in which the rate goes to zero.
        long_ago = by_the_clock and min(run.seconds - last_evaluation, run.left) > pause
        progress, long_ago, save_is_due = stop.agree(run.progress(), long_ago, run.save_is_due())
        run.due = bool(long_ago) or run.step % options.eval_interval == 0 or progress == 1
        if run.step % options.log_interval == 0 or run.step == 1 or run.due or stop.number is not None:
            train_loss, skipped_before = loss.item(), skipped
            skipped, in_a_row = map(int, run.learner.skipped.tolist())
            if in_a_row >= MOST_SKIPPED:
                raise run.diverged(f"{in_a_row} steps in a row gave a loss or gradient that is no number, the last")
            if skipped > skipped_before:
                bar.write(f"step {run.step}: {skipped} steps skipped so far, their loss or gradient was no number")
            tokens_per_s = (run.tokens - last_tokens) / (run.seconds - last_seconds)
            figures = dict(train_loss=train_loss, lr=share * options.learning_rate, grad_norm=norm.item())
            if skipped:
                figures["skipped"] = skipped
            run.log(**figures, tokens_per_s=round(tokens_per_s))
            bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            last_seconds, last_tokens = run.seconds, run.tokens
        if options.sample_interval and run.step % options.sample_interval == 0:
            start = run.seconds
            bar.write(sample_text(model, data.tokenizer, 200, device) + "\n")
            last_seconds += run.seconds - start  # tokens_per_s is of the training alone
        if not run.due and save_is_due:
            run.save()
    bar.close()
    status = report(run, stop, finished=progress == 1 and not run.due)
    processes.agree()  # while signals are still caught: one that waited elsewhere would be ended by torchrun's
    return status


def look_ahead(run, batches, given):
    """Before the first step: say how long the run will take, and compile where that pays.

    Sets run.reserved and run.eval_iters; returns how many seconds an evaluation will take.
    """
    options = run.options
    x, y = batches.batch(run.step, run.device, run.processes)
    _, token_seconds = run.processes.agree(seconds_per_token(run.learner, x, y))
    if options.minutes is not None and "eval_iters" not in given:
        run.eval_iters = evaluation_batches(options, token_seconds, run.processes.world)
    tokens, val = run.eval_iters * options.batch_size * options.block_size, len(run.data.val)
    if tokens < val:
        print(f"An evaluation reads {tokens:,} of the {val:,} tokens to validate (--eval_iters {run.eval_iters}).")
    evaluation = evaluation_seconds(token_seconds, replace(options, eval_iters=run.eval_iters), run.data)
    evaluation /= run.processes.world
    if options.minutes is not None:
        run.reserved = end_seconds(options, evaluation)
        seconds = 60 * options.minutes - run.seconds
    else:
        seconds = token_seconds * x.numel() * (options.max_iters - run.step)
        if seconds > 3600:
            print(f"This run will take about {seconds_in_words(seconds)} on this machine.")
            flags, share = smaller_setting(options, given)
            new = options.init_from is None and not options.resume  # else the size is that of the weights
            if share < 1 and new and run.processes.world == 1:
                print(f"A smaller one, about {seconds_in_words(seconds * share)}: python train.py {flags}")
    compile, forced = options.compile, "compile" in given
    if run.compiled is not None and not forced:
        compile = forced = run.compiled
    _, seconds = run.processes.agree(seconds)
    if compile:
        maybe_compile(run.learner, x, y, forced, seconds)
    return evaluation


def sample_text(model, tokenizer, length, device):
    """A short text by the model, from an empty prompt. Of a slow model it is cut off after SAMPLE_SECONDS."""
    model.eval()
    idx = prompt_tokens(tokenizer, "").to(device)
    dice = torch.Generator(device).manual_seed(0)  # its own, so that a sample does not change the run
    ids, start = [], time.perf_counter()
    for token in generate(model, idx, length, temperature=0.8, top_k=40, generator=dice):
        ids.append(int(token))
        if time.perf_counter() - start > SAMPLE_SECONDS and not is_sharded(model):  # its processes must go on together
            break
    model.train()
    return whole_characters(tokenizer, tokenizer.decode(ids))


def report(run, stop, finished):
    """The last words of a run: what was reached, a sample, and what to type next. Returns the exit status."""
    out = run.options.out_dir
    named = shlex.quote(os.path.join(".", out) if out.startswith("-") else out)  # else it would be read as a flag
    stopped = stop.number is not None and not finished
    if stopped:
        run.save()
    run.saver.wait()
    if run.processes.first:
        run.draw()
    if stopped:
        program = launcher(run.processes.world)
        print(f"stopped after step {run.step} and saved; go on with: {program} train.py --out_dir {named} --resume")
        return 128 + stop.number
    if run.processes.first:
        Draft.from_tokens(run.data.train).save(out)  # sample.py is faster with it
    elif not run.learner.sharded:  # else its part of the weights is needed for the sample
        return 0
    print(f"best val loss {run.best:.4f} nats per token ({run.data.bits_per_byte(run.best):.3f} bits per byte)")
    print(f"a sample:\n{sample_text(run.model, run.data.tokenizer, 400, run.device)}\n")
    if run.options.minutes is not None and run.step < FEW_STEPS:
        print(f"Only {run.step} steps fitted into --minutes {run.options.minutes:g}; give it more for a better model.")
    model, picture = os.path.join(out, ""), os.path.join(out, "loss.png")
    print(f"model: {model}  loss curve: {picture}  write more: python sample.py --out_dir {named}")
    return 0


if __name__ == "__main__":
    run_command(main)
