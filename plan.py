"""How long a run will take on this machine, and what pays in that time."""

import os
import time
from dataclasses import asdict

import torch

from utils import UserError, autocast


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


def rows_at_once(options, device):
    """How many of a step's windows go through the model together; the rest follows, and the gradients add up.

    On a GPU the batch_size that was asked for. On a CPU some 2,048 tokens: then what one operation writes is still in
    the cache when the next one reads it, which is a third faster than the whole batch of the default model at once.
    """
    if device.type != "cpu":
        return options.batch_size
    return min(options.batch_size, max(1, 2048 // options.block_size))


def seconds_per_step(model, batches, options, device, dtype):
    """Time a small forward and backward pass and scale it to one step. Leaves no trace: no gradients, same dice."""
    rows = max(1, min(options.batch_size, 1024 // options.block_size))
    x, y = (t[:rows] for t in batches.batch(0, device))
    with torch.random.fork_rng():
        for _ in range(3):  # the first runs warm up
            start = time.perf_counter()
            with autocast(device, dtype):
                _, loss = model(x, y)
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds * batches.batch_size / rows


def smaller_setting(options):
    """The setting to try where the chosen one takes too long: flags, and its work as a share of the chosen one's."""
    small = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, max_iters=2000)

    def work(o):
        updates = o["max_iters"] * o["batch_size"] * o.get("gradient_accumulation_steps", 1) * o["block_size"]
        return updates * o["n_layer"] * o["n_embd"] ** 2

    flags = " ".join(f"--{name} {value}" for name, value in small.items())
    return flags, work(small) / work(asdict(options))


def maybe_compile(model, batches, options, given, device, dtype, seconds):
    """torch.compile the model if that was asked for or will earn back its time. Says what it decided.

    Falls back to the model as it is, in one line, where there is no working compiler.
    """
    if not options.compile:
        return model
    cost = 60 if device.type == "cuda" else 40  # seconds, as measured
    if "compile" not in given and 0.1 * seconds < cost:
        print(f"compile: no, a run this short would not earn back the {cost} s it takes (--compile forces it)")
        return model
    print(f"compile: yes, about {cost} s before the first step ...")
    try:
        compiled = torch.compile(model)
        x, y = (t[: rows_at_once(options, device)] for t in batches.batch(0, device))  # the shape of every step
        with torch.random.fork_rng(), autocast(device, dtype):
            compiled(x, y)[1].backward()
        model.zero_grad(set_to_none=True)
        return compiled
    except Exception as error:  # a missing compiler shows as many kinds of error, depending on the platform
        reason = (str(error).strip().splitlines() or [""])[0][:100]
        print(f"compile: there is no working compiler here, running uncompiled ({type(error).__name__}: {reason})")
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        return model
