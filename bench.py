"""How fast is it here? Ours, and peers beside us on the same work.

    python bench.py                                    # training and generation speed, memory, share of the peak
    python bench.py --peers --nanogpt ../nanoGPT       # the same beside Hugging Face transformers and a nanoGPT clone
    python bench.py generate --out_dir out             # how fast a trained model writes (bench_generate.py)
    python bench.py page --out_dir out                 # its web page: size, opening, speed in Chromium (bench_page.py)
    python bench.py quality --data mytext.txt          # the loss reached in a given time, whole processes
    python bench.py ideas                              # what each idea of modern.py buys, by leaving it out

Each figure is measured in a process of its own, so that memory is its own too. The systems take turns, round after
round, because a machine's speed drifts; what is shown is the median, and the spread between the lowest and the highest.
The peak is measured, not looked up: the fastest product of two large matrices in the number format that training uses.
"""

import utils  # first: Ctrl-C while PyTorch is loading is then no traceback  # noqa: F401

# isort: split
import json
import math
import os
import pickle
import platform
import shutil
import statistics
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass
from typing import Optional

import torch
import torch.nn.functional as F

import bench_generate
import bench_page
import learn_cpu
import modern
import optim
import plan
import train
from bench_peers import (
    AS_PYTORCH_HAS_IT,
    check_json,
    dtype_of,
    finished,
    in_turns,
    measured,
    nanogpt_module,
    peers,
    synchronize,
)
from checkpoint import METRICS, load_model, read_metrics
from data import load_data, validation_loss
from model import GPT
from optim import Learner
from plan import make_config, matmul_peak
from train import TrainOptions
from utils import (
    HERE,
    UserError,
    autocast,
    dtype_name,
    option,
    parse_options,
    pick_device,
    pick_dtype,
    run_command,
    write_json,
)


@dataclass
class Setting(TrainOptions):
    """What is trained in a measurement."""

    vocab_size: int = 65  # of Tiny Shakespeare's characters


# What peers report on: the default model, nanoGPT's for a computer without a GPU, and on a CUDA GPU its GPT-2.
GPT2 = "GPT-2 124M (12 x 768, block 1024, batch 16)"
SETTINGS = {
    "default (6 x 384, block 256, batch 64)": Setting(),
    "small (4 x 128, block 64, batch 12)": Setting(
        n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0
    ),
    GPT2: Setting(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, dropout=0.0, vocab_size=50304),
}
NEW_TOKENS = 250


@dataclass
class BenchOptions:
    """Every flag of bench.py: its type, its default and its line of help."""

    rounds: int = option(3, "times each figure is measured", at_least=1)
    seconds: float = option(8.0, "seconds of work in each measurement", at_least=0.1)
    peers: bool = option(False, "measure Hugging Face transformers beside us, where it is installed")
    nanogpt: Optional[str] = option(None, "directory of a nanoGPT clone to measure beside us")
    json: Optional[str] = option(None, "file for all figures, as JSON")
    device: Optional[str] = option(None, "cpu, cuda, cuda:1 or mps (default: the first there is of cuda, mps, cpu)")
    case: Optional[str] = option(None, "measure this one case, SYSTEM|WORK|SETTING, and print JSON (used by bench.py)")


@dataclass
class QualityOptions:
    """Every flag of `bench.py quality`: its type, its default and its line of help."""

    data: str = option("input.txt", "text file to train on (UTF-8)")
    minutes: str = option("0.15 0.25 1 3", "times to train for, in minutes, with a space between")
    target: Optional[float] = option(None, "val loss to reach: the shortest of the times that does is named")
    rounds: int = option(1, "runs of each time, with seeds 1, 2, ...", at_least=1)
    flags: str = option("", "more flags for train.py, in one string")
    fixed: bool = option(False, "also train the fixed settings, for as many steps as fit into each time")
    nanogpt: Optional[str] = option(None, "directory of a nanoGPT clone: its CPU run is made beside ours")
    json: Optional[str] = option(None, "file for all figures, as JSON")


@dataclass
class IdeasOptions:
    """Every flag of `bench.py ideas`: its type, its default and its line of help."""

    data: str = option("input.txt", "text file to train on (UTF-8)")
    minutes: float = option(0.5, "time for each run", above=0)
    rounds: int = option(3, "runs of each, with seeds 1, 2, ...", at_least=1)
    without: Optional[str] = option(None, "make one run without this idea (used by bench.py)")
    out_dir: str = option("out-ideas", "directory of that one run")
    seed: int = option(1, "seed of that one run", at_least=0)


# ---------------------------------------------------------------------------------------------------------------------
# One case, in a process of its own


def training_work(system, setting, options):
    """A function that makes one training step, and how many tokens that is."""
    device = pick_device(options.device)
    tokens = torch.randint(setting.vocab_size, (setting.batch_size, setting.block_size + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if system == "ours":
        model = GPT(make_config(setting, setting.vocab_size)).to(device)
        learner = Learner(model, setting, device, pick_dtype(None, device))
        if device.type == "cuda":
            learner.compute = learner.compiled()
        return lambda: learner.step(x, y, 1.0), x.numel()
    model = peer_model(system, setting, options).to(device)
    settings = dict(lr=setting.learning_rate, betas=(0.9, 0.99), weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda", **settings)
    if device.type == "cuda":
        model = torch.compile(model)

    def step():
        with autocast(device, dtype_of(device)):  # both peers' own settings
            loss = model(x, labels=x).loss if system == "transformers" else model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, x.numel()


def generation_work(system, setting, options):
    """A function that writes NEW_TOKENS tokens in one stream, and how many tokens that is."""
    device = pick_device(options.device)
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    if system == "ours":
        model = GPT(make_config(setting, setting.vocab_size)).to(device, dtype_of(device)).eval()
        return bench_generate.writing(model, idx, NEW_TOKENS), NEW_TOKENS
    model = peer_model(system, setting, options).to(device, dtype_of(device)).eval()
    if system == "nanogpt":
        return lambda: model.generate(idx, NEW_TOKENS, **bench_generate.HOW), NEW_TOKENS
    how = dict(do_sample=True, **bench_generate.HOW)
    return bench_generate.transformers_writing(model, idx, NEW_TOKENS, **how), NEW_TOKENS


def peer_model(system, setting, options):
    """The same model as a peer builds it."""
    if system == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = dict(n_layer=setting.n_layer, n_head=setting.n_head, n_embd=setting.n_embd)
        sizes.update(
            n_positions=setting.block_size, vocab_size=setting.vocab_size, bos_token_id=None, eos_token_id=None
        )
        p = setting.dropout
        return GPT2LMHeadModel(GPT2Config(attn_pdrop=p, embd_pdrop=p, resid_pdrop=p, **sizes))
    module = nanogpt_module(options.nanogpt)
    return module.GPT(module.GPTConfig(**asdict(make_config(setting, setting.vocab_size))))


def measure(case, options):
    """Do a case's work for options.seconds. Returns its speed in tokens/s and the process's peak memory in MB."""
    system, work, name = [*case.split("|"), "", ""][:3]
    if system not in ("ours", "transformers", "nanogpt") or work not in ("train", "generate") or name not in SETTINGS:
        raise UserError(f"--case {case}: is none; give one that bench.py names while it measures")
    build = {"train": training_work, "generate": generation_work}[work]
    step, tokens = build(system, SETTINGS[name], options)
    device = pick_device(options.device)
    step()  # warms up
    times = []
    while sum(times) < options.seconds or len(times) < 2:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return dict(tokens_per_s=tokens / statistics.median(times), memory_mb=peak_memory(device))


def peak_memory(device):
    """The most memory this process ever held, on a CUDA GPU or else in all, in MB; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def main(argv):
    commands = {
        "generate": (bench_generate.main, bench_generate.GenerateOptions, "Measure how fast a trained model writes."),
        "page": (bench_page.main, bench_page.PageOptions, "Measure a model's web page in Chromium."),
        "quality": (quality, QualityOptions, "Measure the loss reached in a given time."),
        "ideas": (ideas, IdeasOptions, "Measure what each idea of modern.py buys."),
    }
    if argv and argv[0] in commands:
        run, cls, about = commands[argv[0]]
        return run(parse_options(cls, argv[1:], about, f"bench.py {argv[0]}")[0])
    about = f"Measure speed, ours and peers'. Other measurements, each with its --help: bench.py {', '.join(commands)}."
    options, _ = parse_options(BenchOptions, argv, about)
    if options.case is not None:
        print(json.dumps(measure(options.case, options)))
        return 0
    return speed(options)


def speed(options):
    """Measure every case in turns and print the table."""
    check_json(options.json)
    device = pick_device(options.device)
    dtype = pick_dtype(None, device)
    systems = ["ours", *peers(options)]
    names = [name for name in SETTINGS if name != GPT2 or device.type == "cuda"]  # a CPU takes minutes for its step
    works = {name: ("train", "generate") if SETTINGS[name].block_size > NEW_TOKENS else ("train",) for name in names}
    cases = [f"{system}|{work}|{name}" for name in names for work in works[name] for system in systems]
    peak = matmul_peak(device, dtype)
    print(f"{machine(device)}; matrix products {peak / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)}")
    results = in_turns(cases, options.rounds, lambda case: run_case(case, options))
    rows = []
    for case, found in results.items():
        system, work, name = case.split("|")
        speeds = [m["tokens_per_s"] for m in found]
        memory = [m["memory_mb"] for m in found if m["memory_mb"] is not None]
        row = dict(system=system, work=work, setting=name, tokens_per_s=statistics.median(speeds))
        row.update(lowest=min(speeds), highest=max(speeds), memory_mb=max(memory) if memory else None)
        if work == "train":
            with torch.device("meta"):  # a model without memory
                flops = GPT(make_config(SETTINGS[name], SETTINGS[name].vocab_size)).flops_per_token()
            row["share_of_peak"] = row["tokens_per_s"] * flops / peak
        rows.append(row)
    for name in names:
        print_table(name, [row for row in rows if row["setting"] == name])
    if options.json:
        content = dict(date=time.strftime("%Y-%m-%d"), machine=machine(device), matmul_flops=peak, rows=rows)
        write_json(options.json, content)
    return 0


def print_table(name, rows):
    """One setting's rows, ours first, with the ratio to ours."""
    print(f"\n{name}\n  {'':<26}{'tokens/s':>10}  {'lowest - highest':>18}{'ours is':>10}{'of peak':>9}{'memory':>10}")
    ours = {row["work"]: row["tokens_per_s"] for row in rows if row["system"] == "ours"}
    for row in sorted(rows, key=lambda r: (r["work"] == "generate", r["system"] != "ours")):
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        memory = f"{row['memory_mb']:,.0f} MB" if row["memory_mb"] else ""
        ratio = "" if row["system"] == "ours" else f"{ours[row['work']] / row['tokens_per_s']:.1f} x"
        spread = f"{row['lowest']:,.0f} - {row['highest']:,.0f}"
        label = f"{row['work']}, {row['system']}"
        print(f"  {label:<26}{row['tokens_per_s']:>10,.0f}  {spread:>18}{ratio:>10}{share:>9}{memory:>10}")


def run_case(case, options):
    """Measure a case in a new process."""
    command = [sys.executable, os.path.abspath(__file__), "--case", case, "--seconds", str(options.seconds)]
    for name in ("nanogpt", "device"):
        if getattr(options, name) is not None:
            command += [f"--{name}", getattr(options, name)]
    return measured(command, case)


# ---------------------------------------------------------------------------------------------------------------------
# Quality: the loss reached in a given time, whole processes from start to exit


def quality(options):
    """Train for each time, and print the seconds that the process took and the loss over the whole val split."""
    try:
        times = [float(m) for m in options.minutes.split()]
    except ValueError:
        times = []
    if not times or not all(0 < minutes < math.inf for minutes in times):
        raise UserError(f"--minutes '{options.minutes}': wants numbers above 0 with a space between")
    check_json(options.json)
    data, rows = load_data(options.data), []
    print(f"{machine(torch.device('cpu'))}; {options.data}\n  {'':<29}{'seconds':>9}{'val loss':>10}{'bits/byte':>11}")
    for seed in range(1, options.rounds + 1):
        if options.nanogpt is not None:
            rows.append(dict(system="nanoGPT, its CPU setting", **nanogpt_run(options.nanogpt, data)))
            print_quality(rows[-1])
        for minutes in times:
            rows.append(dict(system=f"--minutes {minutes:g}", seed=seed, **our_run(options, minutes, seed)))
            print_quality(rows[-1])
            for name, flags in FIXED.items() if options.fixed else ():
                rows.append(dict(system=f"{name}, {minutes:g} min", seed=seed))
                rows[-1].update(fixed_run(options, flags, minutes, seed))
                print_quality(rows[-1])
    reached = [row["seconds"] for row in rows if options.target is not None and row["val_loss"] <= options.target]
    if options.target is not None:
        print(f"val loss {options.target:g}: " + (f"reached in {min(reached):.1f} s" if reached else "not reached"))
    if options.json:
        content = dict(date=time.strftime("%Y-%m-%d"), machine=machine(torch.device("cpu")), rows=rows)
        write_json(options.json, content)
    return 0


def print_quality(row):
    line = f"  {row['system']:<29}{row['seconds']:>9.1f}{row['val_loss']:>10.4f}{row['bits_per_byte']:>11.3f}"
    print(line + f"  {row.get('note', '')}".rstrip(), flush=True)


def our_run(options, minutes, seed):
    """Train for that many minutes in a process. Returns its seconds and the losses of the weights it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        return train_process(options, folder, seed, "--minutes", minutes)


# The settings that the README names: the default model, and the small one under Examples.
SMALL = "--n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --batch_size 12 --dropout 0 --learning_rate 1e-3"
FIXED = {"the default model": [], "4 x 128": SMALL.split()}


def fixed_run(options, flags, minutes, seed):
    """Train a fixed setting for as many steps as fit into the time, by the speed of 20 steps made before."""
    print("20 steps, to see how many fit", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        short = train_process(options, folder, seed, *flags, "--max_iters", 20, "--log_interval", 1)
        steps = read_metrics(os.path.join(folder, "out", METRICS))[:20]
    a_step = (steps[-1]["seconds"] - steps[0]["seconds"]) / 19
    fitting = max(1, int((60 * minutes - short["seconds"]) // a_step) + 20)
    note = f"{fitting:,} step{'s' if fitting > 1 else ''}"
    if short["seconds"] > 60 * minutes:
        note += f"; the 20 before it took {short['seconds']:.0f} s, longer than the time"
    with tempfile.TemporaryDirectory() as folder:
        return dict(train_process(options, folder, seed, *flags, "--max_iters", fitting), note=note)


def train_process(options, folder, seed, *flags):
    """Train in a process, in a folder. Returns its seconds and the losses of the weights it leaves."""
    out = os.path.join(folder, "out")
    command = [sys.executable, os.path.join(HERE, "train.py"), "--data", options.data, "--out_dir", out]
    seconds = timed([*command, "--seed", str(seed), *map(str, flags), *options.flags.split()])
    return dict(seconds=seconds, **whole_val_loss(out, options.data))


def nanogpt_run(clone, data):
    """nanoGPT's README run for a computer without a GPU, on our text: its seconds and the val loss of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "nanogpt")
        shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"))
        write_nanogpt_text(os.path.join(copy, "data", "ours"), data)
        flags = (
            "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
        )
        flags += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --dataset=ours"
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags.split()]
        seconds = timed(command, cwd=copy, env=AS_PYTORCH_HAS_IT)
        model, _ = load_model(os.path.join(copy, "out-shakespeare-char", "ckpt.pt"))
        return dict(seconds=seconds, **losses_of(model, data))


def write_nanogpt_text(folder, data):
    """Write a text as nanoGPT's prepare.py does. Raises UserError where its two bytes a token are too few."""
    if data.tokenizer.vocab_size > 2**16:
        raise UserError(f"--nanogpt: knows no more than 65,536 tokens, the text has {data.tokenizer.vocab_size:,}")
    os.makedirs(folder)
    for name, tokens in (("train", data.train), ("val", data.val)):
        tokens[:].numpy().astype("uint16").tofile(os.path.join(folder, f"{name}.bin"))
    with open(os.path.join(folder, "meta.pkl"), "wb") as f:
        pickle.dump(dict(vocab_size=data.tokenizer.vocab_size), f)


def timed(command, cwd=None, env=None):
    """Run a command; returns its seconds from start to exit. Raises UserError with its last line where it fails."""
    start = time.perf_counter()
    finished(command, " ".join(command), cwd=cwd, env=env)
    return time.perf_counter() - start


def whole_val_loss(directory, path):
    """The losses of a trained model on a text, in its own tokens."""
    model, tokenizer = load_model(directory)
    return losses_of(model, load_data(path, tokenizer))


def losses_of(model, data):
    """The loss over the whole val split, in float32: in nats per token, and in bits per byte."""
    loss = validation_loss(model, data.val, 64)
    return dict(val_loss=loss, bits_per_byte=data.bits_per_byte(loss))


# ---------------------------------------------------------------------------------------------------------------------
# Ideas: what each one in modern.py buys


def rewired(function, **names):
    """The same function, in which some global names mean something else."""
    return types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )


def without_rotary():
    modern.CausalSelfAttention.forward = rewired(modern.CausalSelfAttention.forward, rotate=lambda x, cos, sin: x)


def without_ngrams():
    plan.MODERN_SHAPE["ngram"] = 1


def without_query_key_norm():
    modern.CausalSelfAttention.forward = rewired(modern.CausalSelfAttention.forward, norm=lambda x: x)


def without_token_shift():
    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(modern.norm(x) + 0 * self.shift, cos, sin, cache)
        return x + self.mlp(modern.norm(x))

    modern.Block.forward = forward


def without_relu_squared():
    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))

    modern.MLP.forward = forward


def without_zero_init():
    torch.nn.init.zeros_ = lambda p: torch.nn.init.normal_(p, std=0.02)


def without_soft_cap():
    cap_free = types.SimpleNamespace(tanh=lambda x: x)
    modern.Modern.forward = rewired(modern.Modern.forward, torch=cap_free)


def without_further_tokens():
    plan.tokens_ahead = lambda options, vocab_size: 1


def without_muon():
    def build_optimizers(model, options, device, dtype):
        named = list(model.named_parameters())
        ngrams = [p for name, p in named if name.startswith("ngrams.")]
        rest = [p for name, p in named if not name.startswith("ngrams.")]
        groups = [dict(params=rest, weight_decay=0.1), dict(params=ngrams, weight_decay=options.ngram_decay)]
        return [torch.optim.AdamW(groups, lr=0.016, betas=(0.9, 0.99), fused=True)]

    optim.build_optimizers = build_optimizers


IDEAS = {
    "rotary positions": without_rotary,
    "n-gram vectors": without_ngrams,
    "query-key norm": without_query_key_norm,
    "token shift": without_token_shift,
    "ReLU squared (GELU instead)": without_relu_squared,
    "zero projections and head": without_zero_init,
    "soft-capped logits": without_soft_cap,
    "further tokens": without_further_tokens,
    "Muon (AdamW instead)": without_muon,
}


def ideas(options):
    """Train with all ideas and without each one, in turns, and print the val losses."""
    if options.without is not None:
        if options.without not in ("nothing", *IDEAS, "all of them"):
            raise UserError(f"--without {options.without}: is no idea; give one of {', '.join(IDEAS)}")
        learn_cpu.unsuited = lambda dtype: "it knows no model but that with all ideas"
        if options.without in IDEAS:
            IDEAS[options.without]()
        flags = ["--data", options.data, "--minutes", str(options.minutes), "--seed", str(options.seed)]
        arch = "gpt" if options.without == "all of them" else "modern"
        return train.main([*flags, "--out_dir", options.out_dir, "--arch", arch])
    losses = {name: [] for name in ["nothing", *IDEAS, "all of them"]}
    for seed in range(1, options.rounds + 1):
        for name in losses:
            with tempfile.TemporaryDirectory() as folder:
                out = os.path.join(folder, "out")
                flags = ["--data", options.data, "--minutes", str(options.minutes), "--seed", str(seed)]
                timed([sys.executable, __file__, "ideas", "--without", name, "--out_dir", out, *flags])
                lines = read_metrics(os.path.join(out, METRICS))
                losses[name].append(min(line["val_loss"] for line in lines if "val_loss" in line))
            print(f"seed {seed}, without {name}: {losses[name][-1]:.4f}", file=sys.stderr)
    print(f"{machine(torch.device('cpu'))}; {options.data}, {options.minutes:g} minutes each, {options.rounds} seeds")
    whole = statistics.mean(losses["nothing"])
    for name, values in losses.items():
        mean, spread = statistics.mean(values), max(values) - min(values)
        print(f"  without {name:<30}{mean:>8.4f}  (spread {spread:.4f}){mean - whole:>+9.4f}")
    return 0


def machine(device):
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


if __name__ == "__main__":
    run_command(main)
