"""What fits this machine: the settings for the time one has, how long a run will take, and what pays in that time."""

import math
import os
import time
from dataclasses import asdict

import torch

from utils import UserError


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


# ---------------------------------------------------------------------------------------------------------------------
# --minutes: the settings for the time one has


# What to train, by the work that the machine's matrix products can do in the time, in FLOP. The smallest model is the
# best one at first because it takes the most steps; each next size needs about five times the work to catch up.
SIZES = (
    (3e13, dict(n_layer=4, n_embd=128, n_head=4, block_size=64, batch_size=32)),
    (3e14, dict(n_layer=4, n_embd=192, n_head=3, block_size=128, batch_size=16)),
    (3e15, dict(n_layer=5, n_embd=256, n_head=4, block_size=256, batch_size=8)),
    (1e18, dict(n_layer=6, n_embd=384, n_head=6, block_size=256, batch_size=64)),
    (math.inf, dict(n_layer=12, n_embd=768, n_head=12, block_size=512, batch_size=64)),
)
STEPS_WITHOUT_END = 10**9  # max_iters where the clock ends the run


def for_minutes(minutes, tokens, device, dtype):
    """The options for a run of that many minutes on a text of so many training tokens. Returns (options, why).

    The rule: measure the machine's matrix products, multiply by the time, look the size up in SIZES. A run makes some
    40 % of that work, which says how many tokens it will see. From four times the text on, dropout keeps it from
    learning the text by heart: 0.05 at four times, and 0.05 more each time that doubles, up to 0.4.
    """
    peak = matmul_peak(device, dtype)
    work = peak * minutes * 60
    sizes = next(dict(sizes) for most, sizes in SIZES if work < most)
    while sizes["block_size"] > 8 and sizes["block_size"] * 8 > tokens:  # a very short text
        sizes["block_size"] //= 2
    weights = 12 * sizes["n_layer"] * sizes["n_embd"] ** 2
    epochs = 0.4 * work / (6 * weights) / tokens
    sizes["dropout"] = 0.0 if epochs < 4 else round(min(0.4, 0.05 * (math.log2(epochs) - 1)), 2)
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
    rows = max(1, min(len(x), 2048 // x.size(1)))
    with torch.random.fork_rng():
        for _ in range(3):  # the first runs warm up
            start = time.perf_counter()
            loss = learner.loss(x[:rows], y[:rows])
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    learner.worker.zero_grad(set_to_none=True)
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
    on_gpu = learner.device.type == "cuda"
    cost, gain = (60, 0.3) if on_gpu else (40, 0.1)  # seconds that compiling takes, share of the time that it saves
    if not forced and gain * seconds < cost:
        print(f"compile: no, this run would not earn back the {cost} s it takes (--compile forces it)")
        return
    print(f"compile: yes, about {cost} s before the first step ...")
    try:
        learner.compute = torch.compile(learner.worker)
        with torch.random.fork_rng():
            rows = learner.rows_at_once(x.size(1))
            learner.loss(x[:rows], y[:rows]).backward()
    except Exception as error:  # a missing compiler shows as many kinds of error, depending on the platform
        reason = (str(error).strip().splitlines() or [""])[0][:100]
        print(f"compile: there is no working compiler here, running uncompiled ({type(error).__name__}: {reason})")
        torch._dynamo.reset()
        learner.compute = learner.worker
    learner.worker.zero_grad(set_to_none=True)
