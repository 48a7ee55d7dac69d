"""`python bench.py generate`: how fast does a trained model write here? Ours, and peers beside us on the same weights.

Each figure is measured in a process of its own; the systems take turns, round after round. Shown is the median.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Optional

import torch

from bench_peers import finished, measured, nanogpt_module, peers
from checkpoint import load_model
from draft import Draft
from generate import Reader, Sampling, Speculation, beam_search, best_threads, generate, speculate, use_threads
from lighten import lighten
from tokenizer import prompt_tokens
from utils import UserError, option

HERE = os.path.dirname(os.path.abspath(__file__))
NEW_TOKENS = 250
WORKS = {
    "sample": "one stream, tokens/s",
    "beams": "beam search with 4 beams, tokens/s",
    "many": "32 samples at once, tokens/s in all",
    "first": "first token after a prompt of 200, ms",
}
OURS = {"ours, float32": "float32", "ours, bfloat16": "bfloat16", "ours, int8": "int8"}
HOW = dict(temperature=0.8, top_k=40)


@dataclass
class GenerateOptions:
    """Every flag of `bench.py generate`: its type, its default and its line of help."""

    out_dir: str = option("out", "the trained model to write with")
    rounds: int = option(3, "times each figure is measured", at_least=1)
    peers: bool = option(False, "measure Hugging Face transformers beside us, with the same weights (--arch gpt)")
    nanogpt: Optional[str] = option(None, "directory of a nanoGPT clone to measure beside us (a model of that size)")
    json: Optional[str] = option(None, "file for all figures, as JSON")
    case: Optional[str] = option(None, "measure this one case, SYSTEM|WORK, and print JSON (used by bench.py)")


def main(options):
    """Measure every case in turns and print the table. Returns the exit status 0."""
    if options.case is not None:
        print(json.dumps(measure(options)))
        return 0
    model, _ = load_model(options.out_dir)  # a missing model is one line here, not one for each case
    if options.peers and model.config.block_size <= NEW_TOKENS:
        raise UserError(f"--peers: write no more than block_size tokens; give a model with more than {NEW_TOKENS}")
    systems = [*OURS, *peers(options)]
    cases = [f"{s}|{w}" for w in WORKS for s in systems if s != "nanogpt" or w in ("sample", "first")]
    results = {case: [] for case in cases}
    whole = []
    for number in range(options.rounds):
        for case in cases:
            print(f"round {number + 1} of {options.rounds}: {case}", file=sys.stderr)
            results[case].append(run_case(case, options))
        whole.append(whole_process(options.out_dir))
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
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump(content, f, indent=1)
    return 0


def run_case(case, options):
    """Measure a case in a new process."""
    command = [sys.executable, os.path.join(HERE, "bench.py"), "generate", "--case", case, "--out_dir", options.out_dir]
    if options.nanogpt is not None:
        command += ["--nanogpt", options.nanogpt]
    return measured(command, case)


def whole_process(out_dir):
    """Seconds of `python sample.py`, of `import torch` alone, and of the tokens alone by sample.py's own count."""
    command = [sys.executable, os.path.join(HERE, "sample.py"), "--out_dir", out_dir]
    command += ["--max_new_tokens", "200", "--temperature", "0.8", "--top_k", "40", "--stats"]
    start = time.perf_counter()
    done = finished(command, "sample.py")
    process = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"])
    return process, time.perf_counter() - start, float(done.stderr.split(" tokens in ")[1].split(" s")[0])


# ---------------------------------------------------------------------------------------------------------------------
# One case, in a process of its own


def measure(options):
    """A case's figure: the median of five, after one to warm up."""
    system, work = options.case.split("|")
    model, tokenizer = load_model(options.out_dir)
    prompt = prompt_tokens(tokenizer, "")
    if work == "first":
        prompt = prompt.repeat(1, 200)[:, :200]
    build = our_work if system in OURS else transformers_work if system == "transformers" else nanogpt_work
    do, note = build(system, work, model.eval(), prompt, options)
    do()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    tokens = NEW_TOKENS * (32 if work == "many" else 1)
    return dict(figure=1000 * seconds if work == "first" else tokens / seconds, note=note())


def our_work(system, work, model, prompt, options):
    """As sample.py does it, with weights in the system's format. Returns the work and a function for its footnote."""
    kind, counts = OURS[system], Speculation()
    if kind in ("bfloat16", "int8"):
        lighten(model, kind)
    draft, threads = Draft.load(options.out_dir), best_threads(model, 4)

    def sample():
        if draft is None:
            return list(generate(model, prompt, NEW_TOKENS, reader=Reader(model, threads=threads), **HOW))
        how = dict(sampling=Sampling(**HOW), counts=counts, reader=Reader(model, threads=threads))
        return list(speculate(model, prompt, NEW_TOKENS, draft, **how))

    def beams():
        with use_threads(threads):
            beam_search(model, prompt, NEW_TOKENS, 4)

    works = dict(
        sample=sample,
        beams=beams,
        many=lambda: list(generate(model, prompt.expand(32, -1), NEW_TOKENS, **HOW)),
        first=lambda: list(generate(model, prompt, 1, **HOW)),
    )
    return works[work], lambda: f"{counts.tokens / counts.passes:.1f} tokens a pass" if counts.passes else ""


def transformers_work(system, work, model, prompt, options):
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(options.out_dir).eval()
    n = 1 if work == "first" else NEW_TOKENS
    settings = dict(max_new_tokens=n, min_new_tokens=n, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    if work == "beams":
        settings.update(num_beams=4, do_sample=False)
    else:
        settings.update(do_sample=True, **HOW)
    if work == "many":
        settings["num_return_sequences"] = 32
    return (lambda: theirs.generate(prompt, **settings)), lambda: ""


def nanogpt_work(system, work, model, prompt, options):
    module = nanogpt_module(options.nanogpt)
    sizes = {k: v for k, v in asdict(model.config).items() if k in module.GPTConfig.__dataclass_fields__}
    theirs = module.GPT(module.GPTConfig(**sizes)).eval()
    return (lambda: theirs.generate(prompt, 1 if work == "first" else NEW_TOKENS, **HOW)), lambda: ""
