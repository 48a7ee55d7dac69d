"""`python bench.py generate`: how fast does a trained model write here? Ours, and peers beside us on the same weights.

Each figure is measured in a process of its own; the systems take turns, round after round. Shown is the median.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Optional

import torch

from bench_peers import check_json, dtype_of, finished, in_turns, measured, nanogpt_module, peers, synchronize
from checkpoint import load_writer
from draft import Draft
from fused_cpu import prepare
from generate import (
    Reader,
    Sampling,
    Speculation,
    beam_search,
    best_threads,
    generate,
    guess_cost,
    speculate,
)
from graphs import reader_on
from lighten import KINDS, has_float16, join_qkv, lighten
from model import GPT
from tokenizer import prompt_tokens
from utils import DTYPES, HERE, UserError, dtype_name, has_bfloat16, option, pick_device, pick_dtype, write_json

NEW_TOKENS = 250
WORKS = {
    "sample": "one stream, tokens/s",
    "beams": "beam search with 4 beams, tokens/s",
    "many": "samples at once (32, with CUDA 64), tokens/s in all",
    "first": "first token after a prompt of 200, ms",
}
HOW = dict(temperature=0.8, top_k=40)
AS_IN_SAMPLE = dict(os.environ, GOMP_SPINCOUNT="6000")  # how sample.py's threads wait


@dataclass
class GenerateOptions:
    """Every flag of `bench.py generate`: its type, its default and its line of help."""

    out_dir: str = option("out", "the trained model to write with")
    rounds: int = option(3, "times each figure is measured", at_least=1)
    peers: bool = option(False, "measure Hugging Face transformers beside us, with the same weights (--arch gpt)")
    nanogpt: Optional[str] = option(None, "directory of a nanoGPT clone to measure beside us (a model of that size)")
    json: Optional[str] = option(None, "file for all figures, as JSON")
    device: Optional[str] = option(None, "cpu, cuda, cuda:1 or mps (default: the first there is of cuda, mps, cpu)")
    case: Optional[str] = option(None, "measure this one case, SYSTEM|WORK, and print JSON (used by bench.py)")


def main(options):
    """Measure every case in turns and print the table. Returns the exit status 0."""
    if options.case is not None:
        print(json.dumps(measure(options)))
        return 0
    check_json(options.json)
    device = pick_device(options.device)
    model, _ = load_writer(options.out_dir)  # a missing model is one line here, not one for each case
    others = peers(options)
    if others and not isinstance(model, GPT):
        raise UserError(f"--out_dir {options.out_dir}: peers have no model like it; give one made with --arch gpt")
    if options.peers and model.config.block_size <= NEW_TOKENS:
        raise UserError(f"--peers: write no more than block_size tokens; give a model with more than {NEW_TOKENS}")
    systems = [*(f"ours, {kind}" for kind in kinds(model, device)), *others]
    cases = [f"{s}|{w}" for w in WORKS for s in systems if s != "nanogpt" or w in ("sample", "first")]
    results = in_turns(cases, options.rounds, lambda case: run_case(case, options))
    print("sample.py as a whole process", file=sys.stderr)
    whole = [whole_process(options) for _ in range(options.rounds)]
    for work, title in WORKS.items():
        print(f"\n{title}")
        for system in systems:
            if f"{system}|{work}" in results:
                found = results[f"{system}|{work}"]
                middle, more = statistics.median(r["figure"] for r in found), found[-1].get("note", "")
                low, high = (f(r["figure"] for r in found) for f in (min, max))
                print(f"  {system:<16}{middle:>10,.1f}  {f'{low:,.1f} - {high:,.1f}':>20}  {more}")
    print("\nsample.py, 200 tokens, as a whole process, s")
    for i, name in enumerate(("the process", "import torch alone", "the 200 tokens alone")):
        print(f"  {name:<22}{statistics.median(times[i] for times in whole):>8.2f}")
    if options.json:
        content = dict(date=time.strftime("%Y-%m-%d"), cases=results, whole_process=whole)
        write_json(options.json, content)
    return 0


def kinds(model, device):
    """The number formats in which sample.py holds the model's weights on a device. The model is of no use after it."""
    if device.type != "cpu":
        return [dtype_name(pick_dtype(None, device))]
    bfloat16, float16 = has_bfloat16(device), has_float16()
    found = ["float32"] + ["bfloat16"] * bfloat16 + ["float16"] * float16 + ["16 bits"] * (bfloat16 and float16)
    try:
        lighten(model, "int8")
    except UserError as error:
        print(f"ours, int8 is left out ({str(error).split(';')[0]})")
        return found
    return [*found, "int8"]


def run_case(case, options):
    """Measure a case in a new process."""
    command = [sys.executable, os.path.join(HERE, "bench.py"), "generate", "--case", case, "--out_dir", options.out_dir]
    for name in ("nanogpt", "device"):
        if getattr(options, name) is not None:
            command += [f"--{name}", getattr(options, name)]
    return measured(command, case, AS_IN_SAMPLE)


def whole_process(options):
    """Seconds of `python sample.py`, of `import torch` alone, and of the tokens alone by sample.py's own count."""
    command = [sys.executable, os.path.join(HERE, "sample.py"), "--out_dir", options.out_dir]
    command += ["--device", options.device] if options.device is not None else []
    command += ["--max_new_tokens", "200", "--temperature", "0.8", "--top_k", "40", "--stats"]
    start = time.perf_counter()
    done = finished(command, "sample.py", env=AS_IN_SAMPLE)
    process = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"])
    return process, time.perf_counter() - start, float(done.stderr.split(" tokens in ")[1].split(" s")[0])


# ---------------------------------------------------------------------------------------------------------------------
# One case, in a process of its own


def measure(options):
    """A case's figure: the median of five, after one to warm up, in which a GPU's step is recorded too."""
    system, work = [*options.case.split("|"), ""][:2]
    if system not in (*(f"ours, {kind}" for kind in KINDS), "transformers", "nanogpt") or work not in WORKS:
        raise UserError(f"--case {options.case}: is none; give one that bench.py names while it measures")
    device = pick_device(options.device)
    model, tokenizer = load_writer(options.out_dir)
    prompt = prompt_tokens(tokenizer, "").to(device)
    if work == "first":
        prompt = prompt.repeat(1, 200)[:, :200]
    build = dict(transformers=transformers_work, nanogpt=nanogpt_work).get(system, our_work)
    do, note = build(system, work, model.eval(), prompt, options)
    do()
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        do()
        synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    if work == "first":
        return dict(figure=1000 * seconds, note=note())
    figure = NEW_TOKENS * (at_once(device) if work == "many" else 1) / seconds
    if work == "sample" and device.type == "cuda":  # a pass for each token, which reads all weights
        share = bytes_read(model, dtype_of(device)) * figure / copy_bandwidth(device)
        return dict(figure=figure, note=f"{share:.0%} of what the memory's bandwidth allows")
    return dict(figure=figure, note=note())


def at_once(device):
    """How many samples are "many"."""
    return 64 if device.type == "cuda" else 32


def bytes_read(model, dtype):
    """The bytes of the weights that a pass over one token reads: of a table only a row."""
    return model.num_params(embedding=False) * torch.finfo(dtype).bits // 8


def copy_bandwidth(device, size=2**29):
    """The bytes a second that the device's memory moves: the best of ten copies of `size` bytes, read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def our_work(system, work, model, prompt, options):
    """As sample.py does it, with weights in the system's format. Returns the work and a function for its footnote."""
    kind, counts, device = system.split(", ")[1], Speculation(), prompt.device
    draft = threads = None
    if device.type == "cpu":
        prepare(model, kind)
        draft, threads = Draft.load(options.out_dir, model.config.vocab_size), best_threads(model, 4)
        counts.cost = guess_cost(model, 3, threads) if draft is not None else 0.0
    else:
        join_qkv(model.to(device, DTYPES[kind]))

    def guessed():
        how = dict(sampling=Sampling(**HOW), counts=counts, reader=Reader(model, threads=threads))
        return list(speculate(model, prompt, NEW_TOKENS, draft, **how))

    def beams():
        beam_search(model, prompt, NEW_TOKENS, 4, reader=reader_on(device, model, threads))

    works = dict(
        sample=guessed if draft is not None else writing(model, prompt, NEW_TOKENS, threads),
        beams=beams,
        many=writing(model, prompt.expand(at_once(device), -1), NEW_TOKENS),
        first=writing(model, prompt, 1),
    )
    return works[work], lambda: f"{counts.tokens / counts.passes:.1f} tokens a pass" if counts.passes else ""


def writing(model, idx, n, threads=None):
    """A function that writes n tokens after each row of idx (B, T), as sample.py does on the device of idx."""
    reader = reader_on(idx.device, model, threads)

    def write():
        reader.start = None  # a new text; a step that is recorded stays so
        return list(generate(model, idx, n, reader=reader, **HOW))

    return write


def transformers_work(system, work, model, prompt, options):
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(options.out_dir).to(prompt.device, dtype_of(prompt.device)).eval()
    n = 1 if work == "first" else NEW_TOKENS
    settings = dict(do_sample=True, **HOW) if work != "beams" else dict(do_sample=False, num_beams=4)
    if work == "many":
        settings["num_return_sequences"] = at_once(prompt.device)
    return transformers_writing(theirs, prompt, n, **settings), lambda: ""


def transformers_writing(model, idx, n, **settings):
    """A function that writes n tokens after each row of idx (B, T), as Hugging Face's model does."""
    settings.update(max_new_tokens=n, min_new_tokens=n, pad_token_id=0, attention_mask=torch.ones_like(idx))
    return lambda: model.generate(idx, **settings)


def nanogpt_work(system, work, model, prompt, options):
    module = nanogpt_module(options.nanogpt)
    sizes = {k: v for k, v in asdict(model.config).items() if k in module.GPTConfig.__dataclass_fields__}
    theirs = module.GPT(module.GPTConfig(**sizes))
    theirs.load_state_dict(model.state_dict())  # the names are the same
    theirs.to(prompt.device, dtype_of(prompt.device)).eval()
    return (lambda: theirs.generate(prompt, 1 if work == "first" else NEW_TOKENS, **HOW)), lambda: ""
