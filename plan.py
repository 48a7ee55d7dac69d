"""Before the first step: the run's directory, its settings, its model and text, and how long it will take.

With --minutes the settings are those that suit the machine, the time and the text (for_minutes has the rule).
"""

import itertools
import math
import os
import time
from dataclasses import asdict, replace

import torch

from checkpoint import METRICS, gpt2_tokenizer, holds_run, load_model, load_state
from data import load_data, load_tokenizer
from model import GPT, GPTConfig
from modern import Modern, ModernConfig
from utils import UserError

# What a modern model has for a default in place of TrainOptions'.
MODERN = dict(learning_rate=4e-3, min_lr=0.0, warmup_iters=20, weight_decay=0.0, beta1=0.8, beta2=0.95)

# Of a resumed run these may change; everything else would make it another run.
MAY_CHANGE = {"resume", "data", "out_dir", "max_iters", "minutes", "eval_interval", "eval_iters", "log_interval"}
MAY_CHANGE |= {"sample_interval", "device", "compile", "gradient_checkpointing", "fresh"}


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def check_directory(options):
    """Raises UserError where out_dir holds a run that this one would overwrite."""
    if not options.out_dir:
        raise UserError("--out_dir: is empty; name a directory")
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh: give one of the two")
    if holds_run(options.out_dir) and not (options.resume or options.fresh):
        raise UserError(
            f"--out_dir {options.out_dir}: already holds a run; add --resume to go on with it, --fresh to move it "
            f"aside, or name another directory"
        )


def make_directory(options):
    """Make out_dir, moving an earlier run aside if --fresh asks for it. Raises UserError where it cannot be written."""
    out = os.path.normpath(options.out_dir)
    try:
        if holds_run(out) and not options.resume:
            aside = next(f"{out}-{n}" for n in itertools.count(1) if not os.path.exists(f"{out}-{n}"))
            os.rename(out, aside)
            print(f"moved the earlier run to {aside}")
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, METRICS), "a"):
            pass
    except OSError as error:
        raise UserError(f"--out_dir {out}: cannot be written ({error.strerror}); name another directory") from None


# ---------------------------------------------------------------------------------------------------------------------
# Settings, model and text


def check_memory(options, vocab_size):
    """Raises UserError where the run cannot fit in this machine's memory, before it is filled up or takes forever.

    Counts what is certain: 16 bytes a parameter (weight, gradient, AdamW's two means) and a batch's tokens and logits.
    """
    o = options
    parameters = 12 * o.n_layer * o.n_embd**2 + (vocab_size + o.block_size) * o.n_embd
    tokens = o.batch_size * o.block_size
    needed = 16 * parameters + 4 * tokens * vocab_size + 16 * tokens * o.gradient_accumulation_steps
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        memory = max(memory, torch.cuda.get_device_properties(0).total_memory)
    if needed > memory:
        raise UserError(
            f"these sizes need at least {needed / 2**30:,.0f} GiB of memory and this machine has {memory / 2**30:.0f}; "
            f"lower --batch_size, --n_embd or --n_layer"
        )


def choose_settings(options, given, data, device, dtype):
    """Fill in what was not given: a modern model's defaults and, with --minutes, the sizes that suit the time."""
    chosen = {}
    if options.minutes is not None:
        chosen["arch"] = "modern" if hasattr(torch.optim, "Muon") else "gpt"
        sizes, why = for_minutes(options.minutes, len(data.train), device, dtype)
        chosen.update(sizes)
    arch = options.arch if "arch" in given or options.minutes is None else chosen["arch"]
    if arch == "modern":
        chosen = {**MODERN, **chosen}
    elif options.minutes is not None:
        chosen.update(learning_rate=2e-3, min_lr=0.0)
        chosen.pop("matrix_lr", None)
    chosen = {name: value for name, value in chosen.items() if name not in given}
    if options.minutes is not None:
        shown = {name: value for name, value in chosen.items() if name != "max_iters"}
        print(f"{why}:")
        print(
            " ".join(f"--{name} {value:g}" if name != "arch" else f"--{name} {value}" for name, value in shown.items())
        )
    return replace(options, **chosen)


def build_model(options, vocab_size):
    """A new model. Raises UserError where the sizes make none, or none that fits this machine."""
    sizes = {name: getattr(options, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    try:
        if options.arch == "modern":
            config = ModernConfig(vocab_size=vocab_size, **sizes)
        else:
            config = GPTConfig(vocab_size=vocab_size, bias=options.bias, **sizes)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    check_memory(options, vocab_size)
    return Modern(config) if options.arch == "modern" else GPT(config)


def begin(options, given, device, dtype):
    """The model and text of a new run. Returns (options, model, data)."""
    if options.init_from is None:
        data = load_data(options.data)
        options = choose_settings(options, given, data, device, dtype)
        data.check_length(options.block_size)
        return options, build_model(options, data.tokenizer.vocab_size), data
    block_size = options.block_size if "block_size" in given else None
    model, tokenizer = load_model(options.init_from, block_size, options.dropout)
    found = dict(asdict(model.config), arch="modern" if isinstance(model, Modern) else "gpt")
    for name in ("arch", "block_size", "n_layer", "n_head", "n_embd", "bias"):
        wanted = getattr(options, name)
        if name in given and name in found and wanted != found[name]:
            raise UserError(f"--{name} {wanted}: {options.init_from} has {found[name]}; leave the flag out")
    found = {name: value for name, value in found.items() if hasattr(options, name) and name != "dropout"}
    tokenizer = tokenizer or gpt2_tokenizer(model)
    data = load_data(options.data, tokenizer)
    ours, theirs = data.tokenizer.vocab_size, model.config.vocab_size
    if ours > theirs or (tokenizer is None and ours != theirs):
        raise UserError(
            f"--init_from {options.init_from}: knows {theirs} tokens, but {options.data} has {ours}; give the text it "
            f"was trained on, or start without --init_from"
        )
    options = choose_settings(replace(options, **found), given | set(found) | {"dropout"}, data, device, dtype)
    return options, model, data


def resume(options, given):
    """The settings, model and text of the run in out_dir. Returns (options, model, data, state)."""
    state = load_state(options.out_dir)
    for name in sorted(given - MAY_CHANGE):
        old, new = state["options"][name], getattr(options, name)
        if new != old:
            raise UserError(
                f"--{name} {new}: this run began with {old}, and changing it would make it another run; "
                f"leave the flag out, or start anew in another --out_dir"
            )
    changed = {name: getattr(options, name) for name in given & MAY_CHANGE}
    options = replace(options, **{**state["options"], **changed})
    step, began_with = state["counters"]["step"], state["options"]
    if step >= options.max_iters:
        raise UserError(f"--resume: the run in {options.out_dir} has done its {step} steps; give a larger --max_iters")
    ended_by_the_clock = state["progress"] == 1 and step < began_with["max_iters"]
    if options.minutes is not None and ended_by_the_clock and options.minutes <= began_with["minutes"]:
        raise UserError(f"--resume: the run in {options.out_dir} has had its {options.minutes:g} minutes; give more")
    data = load_data(options.data, load_tokenizer(options.out_dir))
    if data.fingerprint != state["fingerprint"]:
        raise UserError(f"--data {options.data}: is not the text this run began with; put that back to go on")
    return options, build_model(options, state["config"]["vocab_size"]), data, state


# ---------------------------------------------------------------------------------------------------------------------
# --minutes: the settings for the time one has


# What to train, by the work that the machine's matrix products can do in the time, in FLOP. The smallest model is the
# best one at first because it takes the most steps; each next size needs about five times the work to catch up.
SIZES = (
    (3e13, dict(n_layer=4, n_embd=128, n_head=2, block_size=64, batch_size=32, matrix_lr=0.045, learning_rate=0.024)),
    (3e14, dict(n_layer=4, n_embd=192, n_head=3, block_size=256, batch_size=8, matrix_lr=0.02, learning_rate=0.006)),
    (3e15, dict(n_layer=5, n_embd=256, n_head=4, block_size=256, batch_size=16, matrix_lr=0.02, learning_rate=0.006)),
    (1e18, dict(n_layer=6, n_embd=384, n_head=6, block_size=256, batch_size=64, matrix_lr=0.02, learning_rate=0.004)),
    (math.inf, dict(n_layer=12, n_embd=768, n_head=12, block_size=512, batch_size=64)),
)
STEPS_WITHOUT_END = 10**9  # max_iters where the clock ends the run


def for_minutes(minutes, tokens, device, dtype):
    """The options for a run of that many minutes on a text of so many training tokens. Returns (options, why).

    The rule: measure the machine's matrix products, multiply by the time, look the size up in SIZES. A run makes some
    40 % of that work, which says how many tokens it will see. From eight times the text on, dropout keeps it from
    learning the text by heart: 0.05 at eight times, and 0.1 more each time that doubles, up to 0.5.
    """
    peak = matmul_peak(device, dtype)
    work = peak * minutes * 60
    sizes = next(dict(sizes) for most, sizes in SIZES if work < most)
    while sizes["block_size"] > 8 and sizes["block_size"] * 8 > tokens:  # a very short text
        sizes["block_size"] //= 2
    weights = 12 * sizes["n_layer"] * sizes["n_embd"] ** 2
    epochs = 0.4 * work / (6 * weights) / tokens
    sizes["dropout"] = 0.0 if epochs < 8 else round(min(0.5, 0.05 + 0.1 * math.log2(epochs / 8)), 2)
    sizes["max_iters"] = STEPS_WITHOUT_END
    why = f"{peak / 1e9:,.0f} GFLOP/s x {minutes:g} min on {tokens:,} tokens, about {epochs:.1f} times the text"
    return sizes, why


def matmul_peak(device, dtype, size=2048):
    """The speed of a product of two size x size matrices in FLOP/s: the best of several, in about a second at most."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = math.inf, time.perf_counter()
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > 1:
            break
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# How long a run will take, and whether compiling pays


def seconds_per_token(learner, x, y):
    """Time a small forward and backward pass over some of x, y (B, T). Leaves no trace: no gradients, same dice."""
    threads = torch.get_num_threads() if learner.device.type == "cpu" else 1
    rows = min(len(x), learner.rows_at_once(x.size(1)) * threads)
    with torch.random.fork_rng():
        for _ in range(3):  # the first runs warm up
            start = time.perf_counter()
            losses = [loss for loss, _ in learner.part_gradients(x[:rows], y[:rows])]
            losses[-1].item()  # waits for the device
            seconds = time.perf_counter() - start
    return seconds / (rows * x.size(1))


def smaller_setting(options):
    """The setting to try where the chosen one takes too long: flags, and its work as a share of the chosen one's."""
    small = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, max_iters=2000)

    def work(o):
        updates = o["max_iters"] * o["batch_size"] * o.get("gradient_accumulation_steps", 1) * o["block_size"]
        return updates * o["n_layer"] * o["n_embd"] ** 2

    flags = " ".join(f"--{name} {value}" for name, value in small.items())
    return flags, work(small) / work(asdict(options))


def maybe_compile(learner, x, y, forced, seconds):
    """torch.compile the learner's model if that is forced or will earn back its time. Says what it decided.

    seconds: how long the run will take. Falls back to the model as it is, in one line, where no compiler works.
    """
    cost, gain = 60, 0.3  # on a GPU: seconds that compiling takes, share of the time that it saves
    if learner.device.type == "cpu":
        cost, gain = 40, 0.0  # parts of a batch side by side, which a compiled model cannot do, are as fast
    if not forced and gain * seconds <= cost:
        print(f"compile: no, this run would not earn back the {cost} s it takes (--compile forces it)")
        return
    print(f"compile: yes, about {cost} s before the first step ...")
    try:
        learner.compute = torch.compile(learner.worker)
        with torch.random.fork_rng():
            rows = learner.rows_at_once(x.size(1))
            list(learner.part_gradients(x[:rows], y[:rows]))
    except Exception as error:  # a missing compiler shows as many kinds of error, depending on the platform
        reason = (str(error).strip().splitlines() or [""])[0][:100]
        print(f"compile: there is no working compiler here, running uncompiled ({type(error).__name__}: {reason})")
        torch._dynamo.reset()
        learner.compute = learner.worker
