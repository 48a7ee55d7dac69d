"""Before the first step: the run's directory, its settings, its model and text, and how long it will take.

With --minutes the settings are those that suit the machine, the time and the text (for_minutes has the rule). What
train.py --plan shows is in budget.py.
"""

import functools
import glob
import itertools
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, replace

import torch

import learn_cpu
from checkpoint import METRICS, gpt2_tokenizer, holds_run, load_model, load_state
from data import load_data
from distributed import ALONE
from graphs import record
from model import GPT, GPTConfig
from modern import Modern, ModernConfig
from optim import enough_for_c, lr_share, rows_on_cpu
from sharding import check_shard
from shards import holds_prepared, is_prepared
from tokenizer import OtherTokenizer, UnknownCharacters, load_tokenizer, tokenizer_hash
from utils import UserError, dtype_name, first_line, memory_of, pick_dtype, same_dice

# A modern model's defaults, where they are not those of TrainOptions.
MODERN = dict(learning_rate=4e-3, min_lr=0.0, warmup_iters=20, weight_decay=0.0, beta1=0.8, beta2=0.95)
MODERN_SHAPE = dict(ngram=5)  # of a new model; one of --init_from keeps its own
ONLY_MODERN = ("matrix_lr", "ngram", "ngram_decay")

# What fine-tuning (--init_from) has for a default in place of both: weights that know much should change little, and
# soon. The shape of the recipe is that of Radford et al. 2018 (GPT-1), 4.1; the rates were tried on texts of our own.
FINE_TUNING = dict(
    learning_rate=1e-4,  # a third of a new model's: larger steps lose more of what it knows than they add
    warmup_iters=20,  # AdamW's means begin empty, and a run of few steps has few to spare
    dropout=0.1,  # less than a new model's: it sees the text a few times only
    weight_decay=0.01,  # the weights have found their size; do not pull them to zero
)
FINE_TUNING_MODERN = dict(MODERN, learning_rate=4e-4, matrix_lr=2e-3, dropout=0.1)  # a tenth of a new model's rates
PASSES = 3  # times that fine-tuning reads the text, which is enough in most cases (Radford et al. 2018)
FINE_TUNING_STEPS = (50, 2000)  # but at least so many steps, and at most
STEP_TOKENS = 16_384  # tokens in a step, whatever the context: as many as a new model's 64 windows of 256
EVALUATIONS = 10  # in the whole of a fine-tuning

# Of a resumed run these may change; everything else would make it another run.
MAY_CHANGE = {"resume", "data", "out_dir", "max_iters", "minutes", "eval_interval", "eval_iters", "log_interval"}
MAY_CHANGE |= {"keep", "sample_interval", "device", "compile", "gradient_checkpointing", "fresh", "shard", "record"}


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def check_directory(options, lock):
    """Take the lock of a run that is in out_dir. Raises UserError where this one would overwrite or disturb it."""
    if not options.out_dir:
        raise UserError("--out_dir: is empty; name a directory")
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh: give one of the two")
    if not options.resume and holds_prepared(options.out_dir):
        raise UserError(f"--out_dir {options.out_dir}: holds a prepared text; name another directory")
    if not holds_run(options.out_dir):
        return
    try:
        lock.take(options.out_dir)
    except OSError as error:
        problem = f"--out_dir {options.out_dir}: cannot be written ({error.strerror})"
        raise UserError(f"{problem}; name another directory, or allow writing there") from None
    if not (options.resume or options.fresh):
        raise UserError(
            f"--out_dir {options.out_dir}: already holds a run; add --resume to go on with it, --fresh to move it "
            f"aside, or name another directory"
        )


def make_directory(options, lock):
    """Make and lock out_dir, moving an earlier run aside if --fresh asks for it.

    Raises UserError where it cannot be written, or another run has begun there.
    """
    out = os.path.normpath(options.out_dir)
    if os.path.islink(out):  # what it leads to is moved aside or made, and it goes on leading there
        out = os.path.realpath(out)
    if options.fresh and os.path.isdir(out) and os.path.samefile(out, os.getcwd()):
        raise UserError(f"--out_dir {options.out_dir}: --fresh cannot move the directory one is in; name another one")
    try:
        check_directory(options, lock)  # again: a run may have come since
        if holds_run(out) and options.fresh:
            if os.name == "nt":  # where a directory cannot be moved while a file in it is open
                lock.release()
            aside = next(f"{out}-{n}" for n in itertools.count(1) if not os.path.lexists(f"{out}-{n}"))
            os.rename(out, aside)
            print(f"moved the earlier run to {aside}")
        os.makedirs(out, exist_ok=True)
        lock.take(out)
        lock.keep()
        with open(os.path.join(out, METRICS), "a"):
            pass
    except OSError as error:
        raise UserError(f"--out_dir {out}: cannot be written ({error.strerror}); name another directory") from None


# ---------------------------------------------------------------------------------------------------------------------
# Settings, model and text


def check_memory(options, vocab_size):
    """Raises UserError where the run cannot fit in this machine's memory, before it is filled up or takes forever.

    Counts what is certain: 16 bytes a parameter (weight, gradient, AdamW's two means, of which Muon has one), or the 4
    with which one is made that is then spread over processes; and a batch's tokens and logits.
    """
    o = options
    rows = o.ahead * vocab_size + o.block_size + (o.ngram_rows if o.ngram > 1 else 0)
    matrices = 12 * o.n_layer * o.n_embd**2
    parameters = matrices + rows * o.n_embd
    tokens = o.batch_size * o.block_size
    learned = 4 * parameters if o.shard else 16 * parameters - (4 * matrices if o.arch == "modern" else 0)
    needed = learned + 4 * tokens * o.ahead * vocab_size + 16 * tokens * o.gradient_accumulation_steps
    memory = memory_of(torch.device("cpu"))
    if torch.cuda.is_available():
        memory = max(memory or 0, memory_of(torch.device("cuda", 0)))
    if memory is not None and needed > memory:
        flags = ["batch_size", "gradient_accumulation_steps", "block_size"]
        if learned > memory:  # whatever the batch is
            flags = ["n_embd", "n_layer", *(["ngram_rows"] if o.ngram > 1 else [])]
        lower = " or ".join(f"--{name} ({getattr(o, name)})" for name in flags if getattr(o, name) > 1)
        raise UserError(
            f"these sizes need at least {needed / 2**30:,.0f} GiB of memory and this machine has {memory / 2**30:.0f}; "
            f"lower {lower}"
        )


def choose_settings(options, given, tokens, device, dtype, peak=None, processes=1, vocab_size=65):
    """Fill in what was not given, for a text of so many training tokens, and show it where it was chosen.

    A modern model has its own defaults, a fine-tuning too; with --minutes the sizes are those that suit the time. peak:
    the FLOP/s to choose them for, where it need not be measured. processes: a batch that is chosen has an equal number
    of windows for each. vocab_size: how many different tokens a new model will know.
    """
    chosen, why = {}, None
    if options.minutes is not None and options.init_from is None and "arch" not in given:
        chosen["arch"] = "modern" if hasattr(torch.optim, "Muon") else "gpt"
        options = replace(options, arch=chosen["arch"])
    check_arch(options, given)
    if options.init_from is not None:
        chosen, why = for_fine_tuning(options, given, tokens)
    elif options.minutes is not None:
        sizes, why = for_minutes(options.minutes, tokens, device, dtype, peak, options.arch)
        chosen.update(sizes)
        if options.arch == "modern":
            chosen = {**MODERN, **MODERN_SHAPE, **chosen}
        else:
            rate = sizes["learning_rate"]  # AdamW alone bears less, and larger models little (docs/speed.md)
            chosen.update(learning_rate=rate * 2 / 3 if rate > 0.01 else 2e-3, min_lr=0.0)
            chosen = {name: value for name, value in chosen.items() if name not in ONLY_MODERN}
    elif options.arch == "modern":
        read = options.max_iters * options.batch_size * options.gradient_accumulation_steps * options.block_size
        chosen = {**MODERN, **MODERN_SHAPE, "ngram_decay": ngram_decay(read / max(1, tokens))}
    if "n_head" in chosen:
        fit_heads(chosen, options, given)
    if "batch_size" in chosen:
        chosen["batch_size"] = math.ceil(chosen["batch_size"] / processes) * processes
    chosen = {name: value for name, value in chosen.items() if name not in given}
    options = replace(options, **chosen)
    if options.arch == "modern" and options.init_from is None and "ahead" not in given:
        chosen["ahead"] = tokens_ahead(options, vocab_size)
        options = replace(options, ahead=chosen["ahead"])
    if options.min_lr is not None and options.min_lr > options.learning_rate:
        raise UserError(
            f"--min_lr {options.min_lr:g}: is where the learning rate ends, and above --learning_rate "
            f"{options.learning_rate:g}, its highest; lower it"
        )
    for name in ("ngram_rows", "ngram_decay"):
        if name in given and options.ngram == 1:
            value = getattr(options, name)
            remedy = "leave it out" + (", or add --ngram 5" if chosen.get("ngram") == 1 else "")
            raise UserError(f"--{name} {value:g}: is for a modern model with --ngram above 1; {remedy}")
    if why is not None:
        if options.ngram == 1:
            chosen.pop("ngram_decay", None)
        shown = {name: value for name, value in chosen.items() if value != STEPS_WITHOUT_END}
        print(f"{why}:")
        print(
            " ".join(f"--{name} {value:g}" if name != "arch" else f"--{name} {value}" for name, value in shown.items())
        )
    return options


def tokens_ahead(options, vocab_size):
    """How many tokens a modern model foretells while it learns: 4, or fewer, so that foretelling the further ones takes
    no more than a tenth of the work of its layers, as it would where there are many different tokens."""
    return 1 + min(3, options.block_size - 1, int(0.1 * 12 * options.n_layer * options.n_embd / vocab_size))


def fit_heads(chosen, options, given):
    """Where one of n_embd and n_head was given, choose the other such that they make a model."""
    each = 2 if options.arch == "modern" else 1  # channels of a head are a multiple of this
    if "n_embd" in given and "n_head" not in given:
        possible = [n for n in range(1, options.n_embd // each + 1) if options.n_embd % (each * n) == 0]
        chosen["n_head"] = min(possible or [1], key=lambda n: abs(n - chosen["n_head"]))
    elif "n_head" in given and "n_embd" not in given:
        unit = each * options.n_head
        chosen["n_embd"] = max(1, round(chosen["n_embd"] / unit)) * unit


def check_arch(options, given):
    """Raises UserError for a flag that does nothing in a model of this architecture."""
    if "matrix_lr" in given and options.arch != "modern":
        flag, of = f"--matrix_lr {options.matrix_lr:g}", "modern"
    elif "ngram" in given and options.ngram > 1 and options.arch != "modern":
        flag, of = f"--ngram {options.ngram}", "modern"
    elif "ahead" in given and options.ahead > 1 and options.arch != "modern":
        flag, of = f"--ahead {options.ahead}", "modern"
    elif "bias" in given and options.bias and options.arch != "gpt":
        flag, of = "--bias", "gpt"
    else:
        return
    remedy = "leave it out" + (f", or add --arch {of}" if options.init_from is None else "")
    raise UserError(f"{flag}: is for --arch {of}, and this model is of --arch {options.arch}; {remedy}")


def for_fine_tuning(options, given, tokens):
    """What a run from the weights of --init_from has for defaults. Returns (options, why).

    options: with the sizes of the model. The steps are as many as read the text PASSES times.
    """
    chosen = dict(FINE_TUNING_MODERN if options.arch == "modern" else FINE_TUNING)
    chosen["batch_size"] = max(1, STEP_TOKENS // options.block_size)
    if options.ngram > 1:
        chosen["ngram_decay"] = 0.0
    batch_size = options.batch_size if "batch_size" in given else chosen["batch_size"]
    if options.minutes is not None:
        chosen.update(BY_THE_CLOCK, min_lr=0.0)
        return chosen, f"fine-tuning {options.init_from} on {tokens:,} tokens for {options.minutes:g} min"
    step_tokens = batch_size * options.gradient_accumulation_steps * options.block_size
    least, most = FINE_TUNING_STEPS
    chosen["max_iters"] = min(most, max(least, math.ceil(PASSES * tokens / step_tokens)))
    steps = options.max_iters if "max_iters" in given else chosen["max_iters"]
    chosen["eval_interval"] = max(1, steps // EVALUATIONS)
    return chosen, f"fine-tuning {options.init_from} on {tokens:,} tokens, {steps * step_tokens / tokens:.1f} times"


def make_config(options, vocab_size):
    """The shape of a new model. Raises UserError where the sizes make none."""
    sizes = {name: getattr(options, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    try:
        if options.arch == "modern":
            sizes.update((name, getattr(options, name)) for name in ("ngram", "ngram_rows", "ahead"))
            return ModernConfig(vocab_size=vocab_size, **sizes)
        return GPTConfig(vocab_size=vocab_size, bias=options.bias, **sizes)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def build_model(options, vocab_size):
    """A new model. Raises UserError where the sizes make none, or none that fits this machine."""
    config = make_config(options, vocab_size)
    check_memory(options, vocab_size)
    return Modern(config) if options.arch == "modern" else GPT(config)


def check_run(options, given, device, dtype, processes):
    """Raises UserError for what so many processes, or this device and number format, cannot do."""
    check_windows(options, processes)
    check_shard(options, given, device, dtype, processes)
    check_checkpointing(options, device)


def check_windows(options, processes):
    """Raises UserError where so many processes cannot share the windows of a step evenly."""
    windows = options.batch_size * options.gradient_accumulation_steps
    if windows % processes:
        raise UserError(
            f"--batch_size {options.batch_size}: {processes} processes cannot share the {windows} windows of a "
            f"step evenly; take a multiple of {processes}, or another number of processes"
        )


def check_checkpointing(options, device):
    """Raises UserError on an Apple GPU with dropout: computing again, PyTorch there drops others (its issue 127676)."""
    if options.gradient_checkpointing and options.dropout > 0 and device.type == "mps":
        raise UserError(
            f"--gradient_checkpointing: on an Apple GPU its gradients would be wrong with --dropout {options.dropout}; "
            f"add --dropout 0, or leave it out"
        )


def begin(options, given, device, dtype, processes=ALONE):
    """The model and text of a new run. Returns (options, model, data), the same for all processes."""
    if options.init_from is not None:
        options, model, data = begin_from(options, given, device, dtype, processes.world)
    else:
        peak = None
        if options.minutes is not None:
            peak = processes.sum(matmul_peak(device, dtype))  # all at once: they may share a machine
        data = load_together(options, processes)
        options, data = settle(options, given, device, dtype, peak, processes.world, data)
        model = build_model(options, data.tokenizer.vocab_size)
    check_text(options, data, processes)
    return options, model, data


def load_together(options, processes):
    """The text of a new run, with the tokenizer that the first process makes of it."""
    load = functools.partial(load_data, options.data, field=options.field)
    data = load(options.tokenizer) if processes.first else None
    tokenizer = processes.from_first(lambda: data.tokenizer)
    return data or load(tokenizer)


def check_text(options, data, processes):
    """Raises UserError in a process that has another text than the first one."""
    if processes.from_first(lambda: data.fingerprint) != data.fingerprint:
        raise UserError(f"--data {options.data}: is another text here than for process 0; give all machines the same")


def settle(options, given, device, dtype, peak=None, processes=1, data=None):
    """The settings and text of a new run. Returns (options, data).

    peak, processes: as for choose_settings. data: where it has been loaded.
    """
    data = data or load_data(options.data, options.tokenizer, options.field)
    V = data.tokenizer.vocab_size
    options = choose_settings(options, given, len(data.train), device, dtype, peak, processes, V)
    data.check_length(options.block_size)
    return options, data


def begin_from(options, given, device, dtype, processes=1):
    """The model and text of a run that starts from the weights of --init_from. Returns (options, model, data)."""
    if "tokenizer" in given:
        raise UserError(f"--tokenizer {options.tokenizer}: the model has its own; leave the flag out")
    block_size = options.block_size if "block_size" in given else None
    dropout = options.dropout if "dropout" in given else FINE_TUNING["dropout"]
    try:
        model, tokenizer = load_model(options.init_from, block_size, dropout)
    except UserError as error:
        raise error if str(error).startswith("--") else UserError(f"--init_from {error}") from None
    found = dict(asdict(model.config), arch="modern" if isinstance(model, Modern) else "gpt")
    for name in ("arch", "block_size", "n_layer", "n_head", "n_embd", "ngram", "ngram_rows", "ahead", "bias"):
        wanted = getattr(options, name)
        if name in given and name in found and wanted != found[name]:
            raise UserError(f"--{name} {wanted}: {options.init_from} has {found[name]}; leave the flag out")
    options = replace(options, **{name: value for name, value in found.items() if hasattr(options, name)})
    tokenizer = tokenizer or gpt2_tokenizer(model)
    try:
        data = load_data(options.data, tokenizer, options.field)
    except OtherTokenizer as error:
        raise UserError(
            f"--data {error.path}: was prepared with another tokenizer than that of the model in {options.init_from}; "
            f"prepare the text anew, with --tokenizer {options.init_from}"
        ) from None
    except UnknownCharacters as error:
        raise UserError(
            f"--data {options.data}: has the character(s) {error.names}, which the model in {options.init_from} does "
            f"not know; take them out of the text, or train a new model without --init_from"
        ) from None
    ours, theirs = data.tokenizer.vocab_size, model.config.vocab_size
    if ours > theirs or (tokenizer is None and ours != theirs):
        raise UserError(
            f"--init_from {options.init_from}: knows {theirs} tokens, but {options.data} has {ours}; give the text it "
            f"was trained on, or start without --init_from"
        )
    options = choose_settings(options, given, len(data.train), device, dtype, processes=processes)
    data.check_length(options.block_size)
    return options, model, data


def resume(options, given, device, processes=ALONE):
    """The settings, model and text of the run in out_dir. Returns (options, model, data, state).

    The first process reads the directory and tells the others, which may be on a machine that has no such directory.
    """
    state = processes.from_first(lambda: load_state(options.out_dir))
    begun = replace(type(options)(), **state["options"])
    for name in sorted(given - MAY_CHANGE):
        old, new = came_to(name, begun, device), getattr(options, name)
        if new != old and not (isinstance(old, float) and math.isclose(new, old)):
            how = "without it" if old is None else f"with {old}"
            raise UserError(
                f"--{name} {new}: this run began {how}, and changing it would make it another run; "
                f"leave the flag out, or start anew in another --out_dir"
            )
    own = {"resume", "fresh", "out_dir"}  # of this start, given or not: a directory may have been moved
    changed = {name: getattr(options, name) for name in (given & MAY_CHANGE) | own}
    options = replace(options, **{**state["options"], **changed})
    if "resume" in given:  # and not torchrun's next start of workers, one of which died as it said its last words
        check_what_is_left(options, given, state)
    tokenizer = processes.from_first(lambda: load_tokenizer(options.out_dir))
    if tokenizer is None or tokenizer_hash(tokenizer) != state.get("tokenizer", tokenizer_hash(tokenizer)):
        path = os.path.join(options.out_dir, "tokenizer.json")
        what = "is missing" if tokenizer is None else "is not the tokenizer this run began with"
        raise UserError(f"{path}: {what}; put that back, or start anew with --fresh")
    other_text = UserError(
        f"--data {options.data}: is not the text this run began with; put that back to go on, or train on with the new "
        f"one: --init_from {options.out_dir} --out_dir NEW"
    )
    elsewhere = not (options.data.startswith("hf:") or glob.has_magic(options.data) or os.path.exists(options.data))
    if elsewhere and "data" not in given:
        raise UserError(f"--data {options.data}: is where this run found its text; say where it is now with --data")
    try:
        data = load_data(options.data, tokenizer, options.field)
    except UnknownCharacters:
        raise other_text from None
    except OtherTokenizer as error:
        raise UserError(
            f"--data {error.path}: was prepared with another tokenizer than that of the run in {options.out_dir}; put "
            f"back what it began with"
        ) from None
    if data.fingerprint != state["fingerprint"]:
        raise other_text
    return options, build_model(options, state["config"]["vocab_size"]), data, state


def check_what_is_left(options, given, state):
    """Raises UserError where a run has come to its end, or further than to the one that was given now."""
    counters, began_with = state["counters"], state["options"]
    step, due = counters["step"], counters.get("due")  # due: it was stopped in an evaluation, maybe its last one
    if step > options.max_iters or (step == options.max_iters and not due):
        raise UserError(f"--resume: the run in {options.out_dir} has done its {step} steps; give a larger --max_iters")
    if options.minutes is None:
        return
    ended_by_the_clock = state["progress"] == 1 and step < began_with["max_iters"] and not due
    if ended_by_the_clock and options.minutes <= began_with["minutes"]:
        had = f"the run in {options.out_dir} has had its {options.minutes:g} minutes"
        raise UserError(f"--resume: {had}; give a larger --minutes")
    if "minutes" in given and 60 * options.minutes < counters["seconds"]:
        had = f"the run in {options.out_dir} has had {counters['seconds'] / 60:.2f}"
        raise UserError(f"--minutes {options.minutes:g}: {had}; give more, or leave it out")


def came_to(name, options, device):
    """The value of an option in a run; of one that was left out, what it came to, or None where it had no value."""
    value = getattr(options, name)
    if value is None and name == "dtype":
        return dtype_name(pick_dtype(None, device))
    if value is None and name == "min_lr":
        return options.learning_rate * lr_share(options.warmup_iters, 1.0, options)  # its last one
    if value is None and name == "tokenizer" and options.init_from is None and not is_prepared(options.data):
        return "chars"
    return value


# ---------------------------------------------------------------------------------------------------------------------
# --minutes: the settings for the time one has


# What to train, and the work in FLOP from which on: what the machine's matrix products can do in the time. The smallest
# model is the best one at first because it takes the most steps; each next size needs some work to catch up.
SIZES = (
    (0, dict(n_layer=2, n_embd=64, n_head=2, block_size=64, batch_size=32, matrix_lr=0.045, learning_rate=0.024)),
    (4e12, dict(n_layer=2, n_embd=96, n_head=2, block_size=128, batch_size=16, matrix_lr=0.045, learning_rate=0.024)),
    (8e12, dict(n_layer=3, n_embd=96, n_head=2, block_size=128, batch_size=16, matrix_lr=0.03, learning_rate=0.012)),
    (2e13, dict(n_layer=3, n_embd=128, n_head=2, block_size=256, batch_size=8, matrix_lr=0.03, learning_rate=0.012)),
    (5.5e13, dict(n_layer=4, n_embd=192, n_head=3, block_size=256, batch_size=8, matrix_lr=0.02, learning_rate=0.006)),
    (3e14, dict(n_layer=5, n_embd=256, n_head=4, block_size=256, batch_size=16, matrix_lr=0.02, learning_rate=0.006)),
    (3e15, dict(n_layer=6, n_embd=384, n_head=6, block_size=256, batch_size=64, matrix_lr=0.02, learning_rate=0.004)),
    (1e18, dict(n_layer=12, n_embd=768, n_head=12, block_size=512, batch_size=64, matrix_lr=0.02, learning_rate=0.004)),
)
SHARE = 0.4  # of that work a run really makes
SMALL_SHARE = 0.26  # the same of small models, but on a CUDA GPU: other things take more of their time
IN_C, SMALL_IN_C = 1.15, 1.35  # how much more of it a run makes that learn_cpu.c computes: as on a CPU so much faster
# A GPU is not kept busy by models as small as these. Measured on an H100, with recorded steps:
GPU_START = 7  # seconds until the first step
GPU_LAYER = 4e-4  # seconds that the operations of a layer take in a step, however little there is to do for each
STEPS_WITHOUT_END = 10**9
BY_THE_CLOCK = dict(max_iters=STEPS_WITHOUT_END, eval_interval=STEPS_WITHOUT_END)  # of a run of minutes


def for_minutes(minutes, tokens, device, dtype, peak=None, arch="modern"):
    """The options for a run of that many minutes on a text of so many training tokens. Returns (options, why).

    The rule: measure the machine's matrix products, multiply by the time, take the largest of SIZES for which that is
    enough. A run makes some 40 % of that work, of small models 26 %, which says how many tokens it will see. Where it
    would read the text more than five times, and the next size could take 1,500 steps, a CPU takes that: a larger model
    learns more from reading less often. The more often it reads the text, the sooner must a modern model's n-grams fade
    (ngram_decay), which know a text by heart soonest. It has none from 32 times on, of a text of 90,000 tokens and more
    from 60 times on. Dropout keeps the rest from it: 0.05 at eight times, each time that doubles 0.05 more, or without
    n-grams 0.1 more, up to 0.5; and none where that is less than 0.02.
    On a GPU a step takes longer than its products alone, and each size can do work of its own (possible_work). A CPU
    for which there is learn_cpu.c makes IN_C times as much of it, or SMALL_IN_C times.
    """
    peak = peak or matmul_peak(device, dtype)
    in_c = device.type == "cpu" and learn_cpu.usable(dtype)
    gains = [gain_in_c(sizes) if in_c else 1 for _, sizes in SIZES]
    works = [possible_work(sizes, minutes, peak * gain, device) for gain, (_, sizes) in zip(gains, SIZES)]
    chosen = max(i for i, (least, _) in enumerate(SIZES) if works[i] >= least)
    work, sizes = works[chosen], dict(SIZES[chosen][1])
    if device.type != "cuda" and chosen + 1 < len(SIZES) and times_read(sizes, work, tokens, device) > 5:
        larger = dict(SIZES[chosen + 1][1], batch_size=sizes["batch_size"])
        if times_read(larger, work, larger["batch_size"] * larger["block_size"], device) >= 1500:  # steps
            sizes = larger
    while sizes["block_size"] > 8 and sizes["block_size"] * 8 > tokens:  # a very short text
        sizes["block_size"] //= 2
    epochs = times_read(sizes, work, tokens, device)
    sizes["dropout"], sizes["ngram_decay"] = 0.0, ngram_decay(epochs)
    ngrams = arch == "modern" and epochs < min(60, max(32, tokens / 1500))  # more often, it was measured to harm
    if not ngrams:
        sizes["ngram"] = 1
    dropout = 0.05 + (0.05 if ngrams else 0.1) * math.log2(epochs / 8)
    if dropout >= 0.02:
        sizes["dropout"] = round(min(0.5, dropout), 2)
    sizes.update(BY_THE_CLOCK)
    more = f" x {gains[chosen]:g} in C" if gains[chosen] != 1 else ""
    why = f"{peak / 1e9:,.0f} GFLOP/s{more} x {minutes:g} min on {tokens:,} tokens, about {epochs:.1f} times the text"
    return sizes, why


def times_read(sizes, work, tokens, device):
    """How often a run reads so many tokens, with work (FLOP) for a model of such sizes."""
    share = SMALL_SHARE if device.type != "cuda" and is_small(sizes) else SHARE
    return share * work / step_work(sizes, tokens)


def gain_in_c(sizes):
    """How much more a run of these sizes makes with learn_cpu.c; 1 where a step has too few parts for all cores."""
    windows, T, cores = sizes["batch_size"], sizes["block_size"], torch.get_num_threads()
    parts = math.ceil(windows / rows_on_cpu(windows, windows, T, min(windows, cores)))
    return 1 if not enough_for_c(parts) else SMALL_IN_C if is_small(sizes) else IN_C


def is_small(sizes):
    """Do other things than matrix products take much of the time of a model of these sizes on a CPU?"""
    return sizes["n_embd"] < 192


def ngram_decay(epochs):
    """How fast n-gram vectors should shrink in a run that reads its text so many times (docs/speed.md).

    What one reading taught the vector of a rare run of tokens should have faded before the next reading comes to it.
    """
    return round(min(16.0, max(1.0, 0.8 * (epochs - 1))), 1)


def step_work(sizes, tokens):
    """The FLOP of the matrix products of so many tokens, forward and backward, in the layers of a model."""
    return 6 * 12 * sizes["n_layer"] * sizes["n_embd"] ** 2 * tokens


def possible_work(sizes, minutes, peak, device):
    """The FLOP of matrix products in a time, of which a run makes SHARE: on a GPU, those of a model of such sizes."""
    if device.type != "cuda":
        return peak * 60 * minutes
    work = step_work(sizes, sizes["batch_size"] * sizes["block_size"]) / SHARE
    a_step = GPU_LAYER * sizes["n_layer"] + 2 * work / peak
    return max(1, 60 * minutes - GPU_START) / a_step * work


def matmul_peak(device, dtype, size=None):
    """The speed of a product of two size x size matrices in FLOP/s: the best of several, in some tenths of a second.

    size: 8192 for a CUDA GPU, which is done with smaller ones before the CPU has noticed. Else 1024, and where those
    take less than 10 ms 2048, which many cores or fast ones need to be all busy.
    """
    if size is None and device.type != "cuda":
        peak = matmul_peak(device, dtype, 1024)
        return peak if 2 * 1024**3 / peak > 0.01 else max(peak, matmul_peak(device, dtype, 2048))
    size = size or 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (a @ b)[0, 0].item()  # the first one sets libraries up, which on a GPU may take longer than all others
    best, began = math.inf, time.perf_counter()
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > 0.2:
            break
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# How long a run will take, and whether compiling pays


SLOW_PASS = 2  # seconds


def seconds_per_token(learner, x, y):
    """Time a small forward and backward pass over some of x, y (B, T). Leaves no trace: no gradients, same dice."""
    threads = torch.get_num_threads() if learner.device.type == "cpu" else 1
    rows = min(len(x), learner.rows_at_once(x.size(1)) * threads)

    def a_pass():
        loss = learner.add_gradients(x[:rows], y[:rows])
        learner.forget_gradients()
        return (loss,)

    with same_dice(learner.device):
        for _ in range(3):  # the first runs warm up
            seconds = seconds_of(lambda: a_pass()[0])
            _, seconds = learner.processes.agree(seconds)  # a pass needs all processes: none may stop alone
            if seconds > SLOW_PASS and learner.device.type == "cpu":  # then it matters little
                break
        if learner.records:
            replay, [loss] = record(a_pass, learner.device)
            seconds = min(seconds_of(lambda: (replay(), loss)[1]) for _ in range(2))
    return seconds / (rows * x.size(1))


def seconds_of(work):
    """How long work() takes until its result, a tensor (), is there."""
    start = time.perf_counter()
    work().item()  # waits for the device
    return time.perf_counter() - start


EVALUATION_WORK = 0.4  # of a step's: a forward pass alone, without dropout
EVALUATION_SHARE = 0.05  # of a run of minutes, that an evaluation may take
EVALUATION_TOKENS = 20_000  # fewer would say too little


def evaluation_seconds(token_seconds, options, data):
    """How long an evaluation takes."""
    tokens = min(len(data.val), options.eval_iters * options.batch_size * options.block_size)
    return EVALUATION_WORK * token_seconds * tokens


def end_seconds(options, evaluation):
    """How long to leave for the end of a run of minutes: the last evaluation, a picture with the loading of matplotlib,
    a sample and a draft, which take 1.5 s."""
    return min(2.0 + 1.3 * evaluation, 30 * options.minutes)


def evaluation_batches(options, token_seconds, processes=1):
    """How many batches an evaluation reads in a run of minutes: eval_iters, or as many as fit into EVALUATION_SHARE of
    the time, but EVALUATION_TOKENS at least."""
    batch = options.batch_size * options.block_size
    fitting = EVALUATION_SHARE * 60 * options.minutes / (EVALUATION_WORK * token_seconds * batch / processes)
    return min(options.eval_iters, max(int(fitting), math.ceil(EVALUATION_TOKENS / batch)))


def smaller_setting(options, given=()):
    """The setting to try where the chosen one takes too long: flags, and its work as a share of the chosen one's.

    The flags are those that were given, with smaller sizes, in place of the run that has begun.
    """
    small = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, max_iters=2000)

    def work(o):
        updates = o["max_iters"] * o["batch_size"] * o.get("gradient_accumulation_steps", 1) * o["block_size"]
        return updates * o["n_layer"] * o["n_embd"] ** 2

    kept = {name: getattr(options, name) for name in sorted(set(given) - set(small) - {"fresh", "resume"})}
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in {**kept, **small}.items())
    return f"{flags} --fresh", work(small) / work(asdict(options))


def maybe_compile(learner, x, y, forced, seconds):
    """torch.compile the learner's model if that is forced or will earn back its time. Says what it decided.

    seconds: how long the run will take. Falls back to the model as it is, in one line, where no compiler works.
    """
    # On a GPU: seconds that compiling takes (10 to 18 on an H100's machine), share of the time that it saves (of a
    # modern model 0.45, of a GPT 0.09 at the default size and 0.31 at GPT-2's).
    cost, gain = 20, 0.4 if learner.options.arch == "modern" else 0.1
    if learner.device.type == "cpu":
        cost, gain = 40, 0.0  # parts of a batch side by side, which a compiled model cannot do, are as fast
    if not forced and gain * seconds <= cost:
        why = f"this run would not earn back the {cost} s it takes" if gain else "on a CPU it makes a step no faster"
        print(f"compile: no, {why} (--compile forces it)")
        return
    print(f"compile: yes, about {cost} s before the first step ...")
    try:
        learner.compute = learner.compiled()
        with same_dice(learner.device):
            rows = learner.rows_at_once(x.size(1))
            learner.add_gradients(x[:rows], y[:rows])
            learner.forget_gradients()
    except Exception as error:  # a missing compiler shows as many kinds of error, depending on the platform
        reason = first_line(error)[:100]
        print(f"compile: there is no working compiler here, running uncompiled ({type(error).__name__}: {reason})")
        if "torch._dynamo" in sys.modules:  # PyTorch loads it when it is first needed
            torch._dynamo.reset()
        learner.compute = learner.uncompiled
        learner.forget_gradients()
