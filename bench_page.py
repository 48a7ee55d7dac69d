"""`python bench.py page`: how large is the page of a model, how soon does it open, how fast does it write in Chromium?

Each round opens the page in a new Chromium without a window, from a file, as a person would with a double click. Shown
is the median. The browser is the tests' (tests/browser.py).
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

import export
from bench_peers import check_json
from checkpoint import load_writer
from model import GPT, GPTConfig
from tokenizer import CharTokenizer
from utils import UserError, option, write_json

NEW_TOKENS = 600  # more than two windows of the default model
FIGURES = {
    "size": "size of the file, MB",
    "opening": "from opening to the first token that can be asked for, s",
    "writing": "writing with all panels in view, tokens/s",
    "simd": "the model alone, WebAssembly SIMD, tokens/s",
    "plain": "the model alone, plain JavaScript, tokens/s",
}


@dataclass
class PageOptions:
    """Every flag of `bench.py page`: its type, its default and its line of help."""

    out_dir: Optional[str] = option(None, "the trained model (default: the default model, with random weights)")
    weights: str = option("auto", "float16, int8 or auto, as in export.py", choices=("auto", "float16", "int8"))
    rounds: int = option(3, "times each figure is measured", at_least=1)
    json: Optional[str] = option(None, "file for all figures, as JSON")


def main(options):
    """Measure every figure in every round and print the table. Returns the exit status 0."""
    check_json(options.json)
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
    from browser import NoChromium, find_chromium

    directory = tempfile.mkdtemp()
    try:
        path = Path(directory, "model.html")
        how = write(path, options)
        try:
            chromium = find_chromium()
        except NoChromium as error:
            raise UserError(str(error)) from None
        found = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            found.append(measure(chromium, path, tempfile.mkdtemp(dir=directory)))
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # of the browser, which ends a little later
    print(f"weights in {how}")
    for figure, title in FIGURES.items():
        numbers = [each[figure] for each in found]
        spread = f"{min(numbers):,.2f} - {max(numbers):,.2f}"
        print(f"  {title:<56}{statistics.median(numbers):>10,.2f}  {spread:>18}")
    if options.json:
        write_json(options.json, dict(date=time.strftime("%Y-%m-%d"), weights=how, rounds=found))
    return 0


def write(path, options):
    """Write the page to measure. Returns the format of its weights."""
    if options.out_dir is not None:
        model, tokenizer = load_writer(options.out_dir)
    else:
        torch.manual_seed(0)
        tokenizer = CharTokenizer([chr(32 + i) for i in range(65)])  # as many as in Tiny Shakespeare
        model = GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384))
    settings = export.ExportOptions(out_dir=options.out_dir or "a random model", weights=options.weights)
    page, how = export.page_of(model, tokenizer, settings)
    path.write_bytes(page.encode(errors="replace"))
    return how


def measure(chromium, path, profile):
    """One round's figures: {name: number}."""
    from browser import Browser

    with Browser(chromium, profile) as browser:
        start = time.perf_counter()
        page = browser.open(path.as_uri())
        page.wait("!byId('run').disabled")
        found = dict(size=path.stat().st_size / 1e6, opening=time.perf_counter() - start)
        for name in ("plain", "simd"):
            page.evaluate(f"(byId('arithmetic').value = '{name}', load())")
            tokens = NEW_TOKENS // 4 if name == "plain" else NEW_TOKENS
            page.evaluate(f"({ALONE})({tokens // 4})")  # to warm up
            found[name] = page.evaluate(f"({ALONE})({tokens})")
        page.evaluate("(byId('speed').value = byId('speed').max, drawSettings(), byId('maps').scrollIntoView())")
        page.evaluate("(run(), true)")
        page.wait(f"state.tokens.length > {NEW_TOKENS}")
        page.evaluate("pause()")
        page.wait("byId('status').textContent.endsWith('a second.')")
        found["writing"] = int(page.text("#status").split()[-3])
    return found


# Tokens a second of the model in its worker, drawn with the page's settings, with the page at rest.
ALONE = """async (count) => {
    const began = performance.now();
    await ask("write", {tokens: ids(state.tokens), count, ms: Infinity, settings: settings()});
    return 1000 * count / (performance.now() - began);
}"""
