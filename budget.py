"""What a run will take, for `python train.py --plan`: parameters, memory, work, time and files.

    python train.py --plan                                                     # on this machine: a step of it is timed
    python train.py --plan --peak h100 --processes 8 --vocab_size 50257 ...    # on GPUs that need not be at hand

Nothing is trained and nothing written. Parameters are counted on the model itself; memory is the sum of what each
operation keeps (the tests count that on the model too); time comes from a few parts of a step that are timed here, or
from the published speed of a GPU and the share of it that training reaches.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from typing import Optional

import torch

import learn_cpu
from draft import MOST_TOKENS
from graphs import WARM_UP
from model import GPT
from modern import Modern, ModernConfig
from optim import Learner, enough_for_c, has_copy, has_recording, rows_on_cpu
from plan import (
    begin_from,
    check_run,
    choose_settings,
    end_seconds,
    evaluation_seconds,
    make_config,
    matmul_peak,
    seconds_per_token,
    settle,
)
from utils import (
    STARTED,
    UserError,
    dtype_name,
    environment_number,
    first_line,
    memory_of,
    pick_device,
    pick_dtype,
    seconds_in_words,
)

# ---------------------------------------------------------------------------------------------------------------------
# Where the run is planned for


# FLOP/s of dense matrix products with sums in float32, the number format, and the bytes of memory of one GPU, as NVIDIA
# publishes them: the data sheets of T4, V100 SXM2, A100 SXM, H100 SXM and H200 SXM, the Ada white paper for RTX 4090.
GPUS = {
    "t4": (65e12, "float16", 16e9),
    "v100": (125e12, "float16", 32e9),
    "4090": (165e12, "bfloat16", 24e9),
    "a100": (312e12, "bfloat16", 80e9),
    "h100": (989e12, "bfloat16", 80e9),
    "h200": (989e12, "bfloat16", 141e9),
}
SHARE_OF_PEAK = 0.4  # what training reaches of it, assumed: PaLM's reached 0.46 (Chowdhery et al. 2022, section 4.1)
SPARE = 0.4  # of the activations: what the C library keeps beside them, in pieces too small for a use; measured
SPARE_RECOMPUTED = 2.5  # the same with gradient checkpointing, which takes and frees each layer's several times
DRAFT_BYTES = 90  # for each token that the draft counts at the end of a run, measured
CUDA_BYTES = 0.6e9  # what CUDA keeps for itself in each process, about
PICTURES = 36e6  # bytes of matplotlib, which is loaded when the loss is drawn for the first time, measured


@dataclass
class Place:
    """One of the processes of a run, and the device that it has."""

    name: str
    device: torch.device
    dtype: torch.dtype
    processes: int
    peak: float  # FLOP/s of the device's matrix products
    here: bool  # is it this machine, where a step can be timed?
    memory: Optional[float] = None  # bytes of the device's memory, where that is known
    shard: bool = False  # is the model spread over the processes (sharding.py)?
    resident: float = 0.0  # bytes that Python and PyTorch take here before anything was computed

    @property
    def item(self):
        """Bytes of a number in the format of the matrix products."""
        return 4 if self.dtype == torch.float32 else 2

    @property
    def copied(self):
        """Does a copy of the model in the number format of the products do the arithmetic, as a Learner has it?"""
        return has_copy(self.device, self.dtype, self.processes, self.shard)

    @property
    def stream(self):
        """Bytes of a number in the residual stream: float32 under autocast, which neither a copy nor a part has."""
        return self.item if self.copied or self.shard else 4

    @property
    def mask(self):
        """Bytes that dropout keeps for each number: the factor it had on a CPU (model.dropout), else yes or no."""
        return self.item if self.device.type == "cpu" else 1


def find_place(options, given):
    """The Place that the flags name. Raises UserError where they name none, or two."""
    processes = options.processes or environment_number("WORLD_SIZE", 1, at_least=1)
    shard = options.shard and processes > 1
    if options.peak is None:
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        name = f"this machine ({device.type}, {dtype_name(dtype)})"
        resident = resident_bytes()  # before the products, of which the C library keeps some megabytes, or not
        peak = matmul_peak(device, dtype)
        return Place(name, device, dtype, processes, peak, True, memory_of(device), shard, resident)
    if "device" in given:
        raise UserError(
            f"--device {options.device} and --peak {options.peak}: two places to plan for; give one of them"
        )
    if options.peak.lower() in GPUS:
        peak, dtype, memory = GPUS[options.peak.lower()]
        if options.dtype not in (None, dtype):
            raise UserError(
                f"--dtype {options.dtype}: of --peak {options.peak} the speed in {dtype} is known; give its FLOP/s in "
                f"{options.dtype} as --peak, such as 60e12"
            )
    else:
        try:
            peak, dtype, memory = float(options.peak), "bfloat16", None
        except ValueError:
            peak = 0.0
        if not 1e6 <= peak <= 1e21:
            raise UserError(f"--peak {options.peak}: wants one of {', '.join(GPUS)}, or FLOP/s such as 312e12")
    dtype = options.dtype or dtype
    name = f"{options.peak} ({peak / 1e12:,.0f} TFLOP/s, {dtype})"
    return Place(name, torch.device("cuda"), getattr(torch, dtype), processes, peak, False, memory, shard)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def empty_model(config):
    """A model that has shapes but no numbers, and takes no memory."""
    try:
        with torch.device("meta"):
            return Modern(config) if isinstance(config, ModernConfig) else GPT(config)
    except RuntimeError as error:  # more bytes than 64 bits can count
        raise UserError(
            f"--n_embd {config.n_embd} and {config.vocab_size} tokens: no memory is as large as that model; lower them "
            f"({first_line(error)[:60]})"
        ) from None


def parameters(model):
    """How many parameters each part of a model has: {part: number}. A table that reads and writes counts once."""
    counts = dict.fromkeys(("embeddings", "attention", "MLP", "norms and shifts", "head"), 0)
    for name, p in model.named_parameters():
        if ".attn." in name or ".mlp." in name:
            part = "attention" if ".attn." in name else "MLP"
        elif name in ("lm_head.weight", "ahead.weight"):
            part = "head"
        else:
            part = "embeddings" if p.dim() == 2 else "norms and shifts"
        counts[part] += p.numel()
    return counts


def weight_bytes(model):
    """(bytes of the float32 weights, bytes of the optimizers' memory): AdamW keeps two means a weight, Muon one."""
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) if isinstance(model, Modern) else 0
    return 4 * everything, 8 * everything - 4 * matrices


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def micro_batch(options, place):
    """(windows that go through the model together, how many such parts at the same time), as Learner has them."""
    windows = options.batch_size * options.gradient_accumulation_steps // place.processes
    if place.device.type != "cpu":
        return min(options.batch_size, windows), 1
    by_threads = place.processes == 1 or place.copied  # else PyTorch averages by itself
    cores = min(windows, torch.get_num_threads()) if by_threads and not options.gradient_checkpointing else 1
    rows = rows_on_cpu(windows, options.batch_size, options.block_size, cores)
    return rows, min(math.ceil(windows / rows), cores)


def layer_bytes(config, place):
    """What a layer keeps of each token for the backward pass, in bytes.

    A GPT, numbers for each channel: the residual stream as its two norms read it (2); queries, keys and values (3), the
    MLP's hidden layer before and after its bend (8), and what the other three matrices read (3). With dropout, what it
    let pass, twice. That is the 34 bytes of Korthikanti et al. 2022 (Reducing Activation Recomputation), section 4.1,
    with the stream in float32 under autocast. A modern model keeps the token before (1), turned queries and keys (2)
    and a copy of attention's result (1) as well; under autocast it norms queries and keys in float32 (2).

    Fused attention keeps no scores. Written out (model.attention) it keeps the softmax and, with dropout, two more; so
    it does on a CPU with dropout in any case, of which PyTorch's own has no other form.
    """
    C, item, dropped = config.n_embd, place.item, config.dropout > 0
    if isinstance(config, ModernConfig):
        channel = 17 * item + 3 * place.stream + (2 * 4 if place.stream != item else 0)
    else:
        channel = 14 * item + 2 * place.stream
    channel += 2 * place.mask if dropped else 0
    scores = 0
    on_cpu = place.device.type == "cpu" and (dropped or (item == 2 and config.block_size <= 1024))
    if on_cpu or place.device.type == "mps":
        scores = config.n_head * config.block_size * item * (3 if dropped else 1)
    return C * channel + scores


def in_c(config, place, checkpointing, at_once):
    """Does learn_cpu.c compute steps of which so many parts are computed at once, as a Learner has it?"""
    alone = place.processes == 1 or place.copied
    on_cpu = place.device.type == "cpu" and alone and not checkpointing
    return on_cpu and enough_for_c(at_once) and learn_cpu.fits(config, place.dtype)


def activation_bytes(config, tokens, place, checkpointing, at_once):
    """What the forward pass of so many tokens keeps for the backward pass, but for the logits, in bytes; where
    learn_cpu.c computes, all that it needs of memory. at_once: how many parts of a step are computed side by side."""
    if in_c(config, place, checkpointing, at_once):
        T = min(config.block_size, tokens)
        return sum(learn_cpu.needed_bytes(config, place.dtype, tokens // T, T))
    C, L, modern = config.n_embd, config.n_layer, isinstance(config, ModernConfig)
    ends = ((2 if modern else 1) * place.stream + place.item + (place.mask if config.dropout > 0 else 0)) * C
    ends += 8 * (config.ngram - 1) if modern else 0  # which row of the table each run of tokens has
    if checkpointing:  # the stream between the layers, and all of the one layer that is being computed again
        return tokens * (L * place.stream * C + layer_bytes(config, place) + ends)
    one_matrix = 3 * C * C * place.item if modern else 0  # queries', keys' and values' matrices put together
    return tokens * (L * layer_bytes(config, place) + ends) + L * one_matrix


def check_activations(options, config, device, dtype, processes=1):
    """Raises UserError where a step would keep more than the memory of a CPU's machine holds: the system would then end
    the run without a word. Counts what is certain, the forward passes that are computed at the same time."""
    place = Place("", device, dtype, processes, 0.0, True, memory_of(device), options.shard and processes > 1)

    def kept(checkpointing=options.gradient_checkpointing, **changes):
        rows, at_once = micro_batch(replace(options, gradient_checkpointing=checkpointing), place)
        changed, tokens = replace(config, **changes), rows * config.block_size
        return at_once * activation_bytes(changed, tokens, place, checkpointing, at_once)

    if device.type != "cpu" or place.memory is None or kept() <= place.memory:
        return
    ways = [(f"lower --n_layer ({config.n_layer})", dict(n_layer=1))]
    ways += [("add --gradient_checkpointing", dict(checkpointing=True)), ("add --dropout 0", dict(dropout=0.0))]
    enough = [words for words, change in ways if kept(**change) <= place.memory]
    raise UserError(
        f"a step would keep {kept() / 2**30:,.0f} GiB for its backward pass and this machine has "
        f"{place.memory / 2**30:.0f}; {' or '.join([*enough, f'lower --block_size ({config.block_size})'])}"
    )


def logit_bytes(config, tokens):
    """What the logits of so many tokens take at most, at the loss: three float32 copies, or with a soft cap four, or
    where further tokens are foretold two and three for each of those."""
    copies = max(4, 2 + 3 * (config.ahead - 1)) if isinstance(config, ModernConfig) else 3
    return 4 * copies * config.vocab_size * tokens


def evaluation_bytes(config, tokens, place):
    """What the forward pass of so many tokens takes at most where nothing is kept, in bytes: in a layer or the logits.

    A GPT's layer has the most in its MLP, a modern one's where it turns queries and keys, in float32; before them stand
    the vectors of each token's n-grams, and their sum.
    """
    C, item, modern = config.n_embd, place.item, isinstance(config, ModernConfig)
    layer = 14 * 4 + 3 * item if modern else 2 * 4 + 8 * item
    logits = 3 * 4 if modern else 2 * 4 + (item if item == 2 else 0)
    ngrams = 4 * (config.ngram + 1) * C if modern else 0
    return tokens * max(layer * C, ngrams, 2 * 4 * C + logits * config.vocab_size)


def gathered_bytes(model, item):
    """What a sharded model has whole at one time: a layer, the next one on its way, and what belongs to no layer."""
    layers = learn_cpu.blocks(model)
    layer = sum(p.numel() for p in layers[0].parameters())
    return item * (min(2, len(layers)) * layer + sum(p.numel() for p in model.parameters()) - len(layers) * layer)


def resident_bytes():
    """The memory that this process takes now, in bytes; 0 where the system does not tell."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # the first product loads more of PyTorch
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory(model, options, place, data):
    """What one process holds: three lists of (part, bytes, remark): at all times, in a step, in an evaluation.

    model: an empty one will do. data: None where no text is at hand.
    """
    config, item, on_cpu = model.config, place.item, place.device.type == "cpu"
    rows, at_once = micro_batch(options, place)
    weights, means = weight_bytes(model)
    products = weights * item // 4
    name, kept_by = dtype_name(place.dtype), "float32"
    if place.shard:
        gathered = gathered_bytes(model, item)
        weights, means, kept_by = (
            weights / place.processes,
            means / place.processes,
            f"float32, 1 of {place.processes} parts",
        )
    always = [
        ("Python and PyTorch", place.resident + PICTURES, "with matplotlib")
        if on_cpu
        else ("CUDA itself", CUDA_BYTES, "about"),
        ("weights", weights, kept_by),
        ("optimizer", means, "Muon, AdamW" if isinstance(model, Modern) else "AdamW: two means of each weight"),
    ]
    if item == 2 and not place.shard:
        always.append(("weights for the products", products, name))
    if place.shard:
        always.append(("weights gathered", gathered, f"{name}, of two layers and of all that is in none"))
    if data is not None:
        batch = options.batch_size * options.gradient_accumulation_steps * options.block_size
        always.append(("text and batch", data.nbytes + 3 * 8 * batch, f"{len(data.train) + len(data.val):,} tokens"))
    tokens, times = rows * config.block_size, f"{at_once} x " if at_once > 1 else ""
    kept = activation_bytes(config, tokens, place, options.gradient_checkpointing, at_once)
    activations = ("activations", at_once * kept, f"of {times}{tokens:,} tokens")
    step = [
        ("gradients", weights, kept_by),
        activations,
        ("logits", at_once * logit_bytes(config, tokens), f"{times}{tokens:,} x {config.vocab_size:,}"),
    ]
    by_c = in_c(config, place, options.gradient_checkpointing, at_once)
    if by_c:
        always.append(("weights laid out", 2 * item * model.num_params(embedding=False), "for learn_cpu.c"))
        step = [("gradients", at_once * weights, f"{times}float32"), activations]
    elif place.shard:
        step.insert(1, ("gradients not yet shared", gathered * 4 // item, "float32, of as many"))
    elif on_cpu or place.copied:
        step.insert(1, ("gradients of each part", at_once * products, f"{times}{name}"))
    if on_cpu and not by_c:
        spare = SPARE_RECOMPUTED if options.gradient_checkpointing else SPARE
        step.append(("freed but not given back", spare * at_once * kept, f"by the C library, about {spare:.0%}"))
    if on_cpu:
        always.append(("copies while saving", 2 * weights + means, "written beside the training"))
    if on_cpu and isinstance(model, Modern):
        step.append(("Muon's products", 3 * (2 * weights - means), "of the matrices"))
    tokens = options.batch_size * config.block_size
    evaluation = [("an evaluation", evaluation_bytes(config, tokens, place), f"of {tokens:,} tokens")]
    if place.copied:
        evaluation.append(("its weights", products, f"{name}, for autocast"))
    if on_cpu and data is not None:
        counted = min(len(data.train), MOST_TOKENS)
        if DRAFT_BYTES * counted > sum(size for _, size, _ in evaluation):
            evaluation = [("counts for draft.py", DRAFT_BYTES * counted, f"of {counted:,} tokens, at the end")]
    recorded = has_recording(options, place.device, place.processes) and not options.gradient_checkpointing
    if at_once > 1 or recorded or by_c:  # what other threads, a graph or C took they keep; this comes on top of it
        return always, step + evaluation, []
    return always, step, evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Work, time and files


def step_seconds(config, options, place, data):
    """(seconds of a step, seconds of an evaluation) on this machine, from some parts of a step that are timed."""
    model = (Modern if isinstance(config, ModernConfig) else GPT)(config).to(place.device).train()
    model.gradient_checkpointing = options.gradient_checkpointing
    learner = Learner(model, options, place.device, place.dtype)
    if place.processes > 1:
        learner.recorded = None  # nor is a step of theirs
    windows = options.batch_size * options.gradient_accumulation_steps
    x, y = data.batches(windows, options.block_size, options.seed).batch(0, place.device)
    token_seconds = seconds_per_token(learner, x, y)
    rows = min(len(x), learner.rows_at_once(x.size(1)) * torch.get_num_threads())
    update = math.inf  # of the weights, which each step has once
    for _ in range(WARM_UP + 3 if learner.records else 3):  # the first ones are not replayed
        start = time.perf_counter()
        learner.step(x[:rows], y[:rows], 0.0)[0].item()  # waits for the device
        update = min(update, time.perf_counter() - start - token_seconds * rows * x.size(1))
    together = 1 if place.device.type == "cpu" else place.processes  # on a CPU they share the cores that were timed
    token_seconds /= together
    return token_seconds * x.numel() + max(0.0, update), evaluation_seconds(token_seconds, options, data)


def files(model, keep, shard=False):
    """The large files that a run leaves in out_dir: [(name, bytes, remark)]. keep: how many states."""
    weights, means = weight_bytes(model)
    ending, state = "dcp/" if shard else "pt", weights + means
    further = model.ahead.weight.numel() if getattr(model, "ahead", None) is not None else 0  # not saved to write with
    return [
        ("model.safetensors", weights - 4 * further, "the best weights"),
        (f"state.{ending}", state, "the newest weights and the optimizer's means, for --resume"),
        (f"state-STEP.{ending}", (keep - 1) * state, f"{keep - 1} before it, of --keep {keep}: one more while saving"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def check_flags(options, given):
    """Raises UserError where flags of --plan stand alone or contradict others."""
    for name in ("peak", "processes", "vocab_size"):
        if name in given and not options.plan:
            raise UserError(f"--{name} {getattr(options, name)}: says what to plan for; add --plan, or leave it out")
    if options.plan and options.resume:
        raise UserError("--plan and --resume: a plan is of a run that has not begun; give one of the two")
    for name in ("data", "tokenizer", "field", "init_from", "minutes"):
        if options.vocab_size is not None and name in given:
            raise UserError(
                f"--vocab_size {options.vocab_size} and --{name} {getattr(options, name)}: the first is for a plan "
                f"without a text; give one of the two"
            )


def show(options, given):
    """Print what the run of these options would take. Returns the exit status."""
    place = find_place(options, given)
    peak = place.peak * place.processes
    if options.init_from is not None:
        options, model, data = begin_from(options, given, place.device, place.dtype, place.processes)
        config = model.config
    elif options.vocab_size is not None:
        V = options.vocab_size
        options = choose_settings(options, given, 0, place.device, place.dtype, peak, place.processes, V)
        data = None
        config = make_config(options, options.vocab_size)
    else:
        options, data = settle(options, given, place.device, place.dtype, peak, place.processes)
        config = make_config(options, data.tokenizer.vocab_size)
    check_run(options, given, place.device, place.dtype, place.processes)
    model = empty_model(config)
    print("A plan: nothing is trained, and nothing written.")
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, context {config.block_size}"
    print(f"{options.arch}: {shape}, {config.vocab_size:,} tokens in the vocabulary")
    print_parameters(model)
    fits = print_memory(model, options, place, data)
    print_time(model, options, place, data, fits)
    print(f"files in {options.out_dir}/")
    for name, size, remark in files(model, options.keep, place.shard):
        print_row(name, in_words(size), remark)
    return 0


def print_row(name, figure, remark=""):
    print(f"  {name:<26}{figure:>16}  {remark}".rstrip())


def in_words(size):
    """Bytes as MB or GB, of 10^6 or 10^9 bytes."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def print_parameters(model):
    counts = parameters(model)
    print("parameters")
    for part, count in counts.items():
        print_row(part, f"{count:,}", "" if count or part != "head" else "the same table as the embeddings'")
    print_row("all", f"{sum(counts.values()):,}")


def print_memory(model, options, place, data):
    """The parts and the most at one time, and what to do where it is too much. Returns whether that fits."""
    always, step, evaluation = memory(model, options, place, data)
    print(
        f"memory of {'the process' if place.processes == 1 else f'each of {place.processes} processes'}, {place.name}"
    )
    for part, size, remark in [*always, *step, *evaluation]:
        print_row(part, in_words(size), remark)
    peak = peak_bytes(always, step, evaluation)
    fits = place.memory is None or peak < place.memory
    remark = "" if place.memory is None else f"of {in_words(place.memory)}"
    if not fits:
        remark += f": does not fit; {remedy(model, options, place, data)}"
    print_row("at most", in_words(peak), remark)
    return fits


def remedy(model, options, place, data):
    """What makes a run fit that does not, in words: a smaller batch, activations computed again, or a smaller model."""
    fewer = dict(batch_size=place.processes) if options.batch_size > place.processes else {}
    once = dict(gradient_accumulation_steps=1) if options.batch_size % place.processes == 0 else {}
    again = {} if options.gradient_checkpointing else dict(gradient_checkpointing=True)
    ways = [("lower --gradient_accumulation_steps", once)]
    ways += [("lower --batch_size", fewer), ("add --gradient_checkpointing", again)]
    for words, change in [*ways, (" and ".join(words for words, _ in ways[1:]), {**fewer, **again})]:
        if peak_bytes(*memory(model, replace(options, **change), place, data)) < place.memory:
            return words
    return "take a smaller model, or lower --block_size"


def peak_bytes(always, step, evaluation):
    """The most memory that the process takes at one time."""
    total = [sum(size for _, size, _ in parts) for parts in (always, step, evaluation)]
    return total[0] + max(total[1:])


def print_time(model, options, place, data, fits):
    """The work of the run and how long it takes: timed where a step can be, else by the speed of matrix products."""
    step_tokens = options.batch_size * options.gradient_accumulation_steps * options.block_size
    flops = model.flops_per_token()
    if place.here and data is not None and fits:
        started = time.perf_counter() - STARTED
        step, evaluation = step_seconds(model.config, options, place, data)
        share = flops * step_tokens / step / place.peak
        remark = f"parts of a step were timed: {share:.0%} of {place.peak / 1e9:,.0f} GFLOP/s of matrix products"
    else:
        step = flops * step_tokens / (place.peak * place.processes * SHARE_OF_PEAK)
        started = evaluation = 0.0
        remark = f"assumed: {SHARE_OF_PEAK:.0%} of the peak"
    steps = options.max_iters
    if options.minutes is not None:
        left = max(0.0, 60 * options.minutes - started - end_seconds(options, evaluation))
        steps = max(1, min(steps, int(left / (step + evaluation / options.eval_interval))))
    tokens, windows = steps * step_tokens, f"{options.batch_size} x {options.gradient_accumulation_steps}"
    print("work")
    print_row("FLOP for a token", f"{flops / 1e6:,.1f} M")
    print_row("tokens in a step", f"{step_tokens:,}", f"{windows} windows of {options.block_size}")
    times = "" if data is None else f", {tokens / len(data.train):.1f} times the text"
    print_row("tokens in the run", f"{tokens:,}", f"{steps:,} steps{times}")
    print_row("tokens for a parameter", f"{tokens / model.num_params():,.1f}")
    print_row("FLOP in the run", f"{flops * tokens:.1e}")
    print("time")
    print_row("tokens in a second", f"{step_tokens / step:,.0f}", remark)
    print_row("a step", f"{1000 * step:,.1f} ms")
    evaluations = math.ceil(steps / options.eval_interval)
    seconds = started + steps * step + evaluations * evaluation
    if options.minutes is not None and steps < options.max_iters:
        seconds = 60 * options.minutes
    print_row("the run", seconds_in_words(seconds))
