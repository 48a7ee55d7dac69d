"""Your model in one web page.

    python export.py --html out/model.html              # then open it in a browser; mail it; put it on any web space
    python export.py --weights float16 --max_mb 100     # weights as exact as float16 has them, in a larger file

The page holds the weights, the tokenizer and the whole forward pass in JavaScript, and needs nothing else: no network,
no server, no library. Its sources lie in page/ and are read in this order: page.html (what is seen), style.css,
tokenizer.js, model.js with arithmetic.js, generate.js, worker.js (the model's thread), panels.js and app.js. This file
packs the weights and puts all of it into one.
"""

import utils  # first: Ctrl-C while PyTorch is loading is then no traceback  # noqa: F401

# isort: split
import base64
import copy
import errno
import hashlib
import html
import importlib
import inspect
import json
import math
import ntpath
import os
import re
import textwrap
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from typing import Optional

import torch
import torch.nn.functional as F

from checkpoint import METRICS, load_state, load_writer, read_metrics
from lighten import to_int8
from model import GPT
from modern import Modern, ModernConfig
from tokenizer import CharTokenizer, prompt_tokens
from utils import UserError, option, parse_options, run_command, write_atomically

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page")
EASY_MB = 16  # a page that is opened within two seconds, and that most mail servers let pass
PROMPTS = ("One morning", "The")  # the first one that the model knows stands in the page, or none


@dataclass
class ExportOptions:
    """Every flag of export.py: its type, its default and its line of help."""

    out_dir: str = option("out", "what train.py wrote, a GPT-2 directory, a nanoGPT ckpt.pt, or gpt2 ... gpt2-xl")
    html: Optional[str] = option(None, "the page to write (default: model.html in out_dir)")
    weights: str = option(
        "auto",
        f"float16, int8 (half of that), or auto: float16 where the page has at most {EASY_MB} MB with it",
        choices=("auto", "float16", "int8"),
    )
    max_mb: int = option(200, "the largest page to write, in megabytes", at_least=1, below=500)  # browsers' own limit
    title: Optional[str] = option(None, "heading of the page")
    prompt: Optional[str] = option(None, "text that stands in the page at first")


def main(argv):
    options, _ = parse_options(ExportOptions, argv, "Write a trained GPT as one web page.")
    return write_page(options)


def write_page(options):
    """Export as the options say. Returns the exit status 0."""
    page, chosen = page_of(*load_writer(options.out_dir), options, training_facts(options.out_dir))
    page = page.encode(errors="replace")  # a file's name may have half a surrogate
    path = options.html or os.path.join(options.out_dir if os.path.isdir(options.out_dir) else "", "model.html")

    if os.path.isfile(path) and not path.lower().endswith((".html", ".htm")):
        raise UserError(f"--html {path}: is there already and no page by its name; name a .html file")

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(page)

    try:
        write_atomically(path, write)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there" if full else "name a file in a directory that exists and may be written to"
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); {remedy}") from None
    print(f"{path}: {len(page) / 1e6:.1f} MB, weights in {chosen}. Open it in a browser.")
    return 0


def page_of(model, tokenizer, options, training=()):
    """(the page of a model as text, the format of its weights), as the options say. training: training_facts'.

    Raises UserError where the page does not run such a tokenizer, and where it would be too large.
    """
    spec = tokenizer_spec(tokenizer, options.out_dir)
    prompt = first_prompt(model, tokenizer, options.prompt)
    chosen = choose_format(model, options, spec)
    return build_page(model, spec, chosen, prompt, options.title, training), chosen


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def names_read(config):
    """The names of the tensors with which page/model.js computes a model of such a config, as page_tensors has them."""
    layers = range(config.n_layer)
    if isinstance(config, ModernConfig):
        parts = ("shift", "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        names = {"wte.weight", "lm_head.weight"} | ({"ngrams.table.weight"} if config.ngram > 1 else set())
        return names | {f"layers.{i}.{part}" for i in layers for part in parts}
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    learned = ["transformer.ln_f", *(f"transformer.h.{i}.{part}" for i in layers for part in parts)]
    names = {f"{name}.{ending}" for name in learned for ending in ("weight", "bias")[: 1 + config.bias]}
    return names | {"transformer.wte.weight", "transformer.wpe.weight"}


def page_tensors(model):
    """The tensors of a GPT or Modern that the page reads, by name, float32: vectors, and matrices (out, in).

    A tied head is left out, and what only learning needs; modern.py's queries, keys and values become one matrix, as
    model.py has them. Raises UserError where the page does not compute such a model.
    """
    tensors = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    if isinstance(model, Modern):
        tensors.pop("ahead.weight", None)
    if isinstance(model, GPT) and model.lm_head.weight is model.transformer.wte.weight:
        del tensors["lm_head.weight"]
    for name in [name for name in tensors if name.endswith("c_q.weight")]:
        parts = [tensors.pop(name.replace("c_q", part)) for part in ("c_q", "c_k", "c_v")]
        tensors[name.replace("c_q", "c_attn")] = torch.cat(parts)
    for name in sorted(names_read(model.config) ^ set(tensors)):
        has, computes = ("has", "without") if name in tensors else ("has no", "with")
        raise UserError(
            f"--out_dir: the model {has} {name}, and the page computes one {computes} it; change page/model.js as "
            f"{type(model).__module__}.py was changed, and names_read in export.py"
        )
    return tensors


def rounded(model, how):
    """A copy of the model whose matrices have the values that they have in a page: rounded to float16 or int8.

    With int8, each row's largest weight becomes 127 and the others the nearest whole numbers.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and how == "int8":
                whole, scale = to_int8(p)
                p.copy_(whole * scale)
            elif p.dim() == 2:
                p.copy_(p.half())
    return model


def packed(tensor, how):
    """A tensor's bytes: a vector's float32; a matrix's float16, or the float32 scales of its rows, then its int8."""
    if tensor.dim() == 1:
        parts = [tensor]
    elif how == "int8":
        whole, scale = to_int8(tensor)
        parts = [scale, whole]
    else:
        parts = [tensor.half()]
    return b"".join(part.contiguous().numpy().tobytes() for part in parts)


def page_bytes(model, how, spec=()):
    """About how long the page will be with these weights: base64 takes four bytes for three. spec: tokenizer_spec's."""
    numbers = sum(
        (2 if how == "float16" else 1) * t.numel() + 4 * t.size(0) if t.dim() == 2 else 4 * t.numel()
        for t in page_tensors(model).values()
    )
    return numbers * 4 // 3 + len(json_in_html(spec)) + 500_000  # and half a megabyte for all else


def choose_format(model, options, spec=()):
    """float16 or int8, by size. Raises UserError where the page would be too large, or the weights do not fit in."""
    size = {how: page_bytes(model, how, spec) / 1e6 for how in ("float16", "int8")}
    fits16 = all(float(p.detach().abs().max()) < 65504 for p in model.parameters())
    how = options.weights
    if how == "auto":
        how = "float16" if fits16 and size["float16"] <= min(EASY_MB, options.max_mb) else "int8"
    if how == "float16" and not fits16:
        raise UserError("--weights float16: the model has weights above 65504, its largest number; use --weights int8")
    if size[how] > options.max_mb:
        remedies = [f"--weights int8 makes it {size['int8']:.0f} MB"] if size["int8"] <= options.max_mb else []
        remedies += ["raise --max_mb"] if size[how] < 500 else []
        remedies = remedies or ["train a smaller model (--n_embd, --n_layer)"]
        raise UserError(
            f"--weights {how}: the page would have {size[how]:.0f} MB, more than --max_mb {options.max_mb}; "
            + " or ".join(remedies)
        )
    return how


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_spec(tokenizer, out_dir):
    """What page/tokenizer.js needs. Raises UserError for a kind of tokenizer that it is not written for."""
    if isinstance(tokenizer, CharTokenizer):
        return {"kind": "characters", "tokens": tokenizer.chars}
    spec = tokenizer.spec()
    model, words, added = spec["model"], spec["pre_tokenizer"] or {}, spec["added_tokens"]
    strange = [spec["normalizer"], model.get("ignore_merges"), model.get("dropout")]
    strange += [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    strange += [t["single_word"] or t["lstrip"] or t["rstrip"] for t in added]
    bytewise = model["type"] == "BPE" and words.get("type") == "ByteLevel" and len(model["vocab"]) >= 256
    if not bytewise or any(strange):
        raise UserError(
            f"--out_dir {out_dir}: its tokenizer is of a kind that the page does not run; it runs characters, "
            f"bytes and byte-level BPE as in GPT-2"
        )
    tokens = [""] * (1 + max(model["vocab"].values()))
    for token, i in model["vocab"].items():
        tokens[i] = token
    return {
        "kind": "bytes",
        "tokens": tokens,
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "split": words.get("use_regex", True),
        "prefixSpace": words["add_prefix_space"],
        "added": [[t["content"], t["id"]] for t in added],
    }


@torch.no_grad()
def first_prompt(model, tokenizer, wanted):
    """The text that stands in the page: the one wanted, or one that the model knows. Raises UserError.

    It knows a text whose tokens surprise it less than half as much as tokens of which it knew nothing.
    """
    if wanted is not None:
        try:
            tokenizer.encode(wanted)
        except UserError as error:
            raise UserError(f"--prompt {wanted}: {error}") from None
        return wanted
    for prompt in PROMPTS:
        with suppress(UserError):
            idx = torch.cat([prompt_tokens(tokenizer, ""), tokenizer.encode(prompt)[None]], dim=1)
            idx = idx[:, : model.config.block_size]
            if idx.size(1) > 1 and float(model(idx[:, :-1], idx[:, 1:])[1]) < math.log(model.config.vocab_size) / 2:
                return prompt
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Words


def training_facts(out_dir):
    """What a run's directory tells of how its model came about: [(name, value)], empty for one that is none.

    The model is that of the best evaluation, which the run may have gone on from.
    """
    facts = []
    with suppress(UserError), redirect_stdout(None):  # no state, or a damaged one: the model is whole without it
        data = str(load_state(out_dir)["options"].get("data"))
        facts.append(("trained on", ntpath.basename(data.rstrip("/\\"))))
    path = os.path.join(out_dir, METRICS)
    evaluations = [m for m in read_metrics(path) if "val_loss" in m] if os.path.exists(path) else []
    if evaluations:
        best = min(evaluations, key=lambda m: m["val_loss"])
        loss = f"{best['val_loss'] / math.log(2):.2f} bits per token ({best['val_loss']:.3f} nats)"
        facts += [("trained for", f"{best['tokens']:,} tokens in {best['step']:,} steps"), ("validation loss", loss)]
    return facts


def model_facts(model, spec, how, size_mb):
    """The model in a few words: [(name, value)]."""
    c = model.config
    n_tokens = f"{c.vocab_size:,} " + ("characters" if spec["kind"] == "characters" else "tokens (byte-level)")
    return [
        ("architecture", "modern.py: GPT-2 with the ideas since" if isinstance(model, Modern) else "model.py: GPT-2"),
        ("parameters", f"{model.num_params():,}"),
        ("layers", f"{c.n_layer}, each with {c.n_head} heads of {c.n_embd // c.n_head} channels ({c.n_embd} in all)"),
        ("window", f"{c.block_size:,} tokens"),
        ("vocabulary", n_tokens),
        ("weights", f"{how}, {size_mb:.1f} MB"),
    ]


WEIGHTS_WORDS = {
    "float16": "The weights are in float16, half the bytes of those that were trained, and all but the tiniest differ "
    "from them by a two-thousandth at most.",
    "int8": "The weights are in int8, a quarter of the bytes of those that were trained: each is the nearest of 255 "
    "evenly spaced values between the largest in size of its row and minus that.",
}


def million(n):
    """10_745_088 -> '10.7 million'; 4_000 -> '4,000'."""
    return f"{n / 1e6:.1f} million" if n >= 100_000 else f"{n:,}"


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build_page(model, spec, how, prompt="", title=None, training=()):
    """The page as text. spec: tokenizer_spec's; how: float16 or int8; training: more facts [(name, value)]."""
    tensors = page_tensors(model)
    weights = b"".join(packed(t, how) for t in tensors.values())
    c = model.config
    header = {
        "architecture": type(model).__name__,
        "config": {k: v for k, v in asdict(c).items() if k not in ("dropout", "bias")},
        "format": how,
        "tensors": [{"name": name, "shape": list(t.shape)} for name, t in tensors.items()],
        "check": check_of(rounded(model, how)),
    }
    facts = model_facts(model, spec, how, len(weights) / 1e6) + list(training)
    data = {"header": header, "tokenizer": spec, "prompt": prompt, "facts": facts}
    trained = "".join(f", {name} {value}" for name, value in training if name == "trained on")
    description = f"A language model with {million(model.num_params())} parameters in {c.n_layer} layers{trained}."
    template = source("page.html")
    words = {
        "title": html.escape(title or "A language model, seen from inside"),
        "description": html.escape(description),
        "policy": content_policy(template),
        "weights_words": WEIGHTS_WORDS[how],
        "data": json_in_html(data),
        "weights": base64.b64encode(weights).decode(),
    }

    def fill(match):
        kind, name = match.groups()
        if name is None:
            return words[kind]
        if kind == "text":  # for the worker; to the page itself no more than text
            return f'<script type="text/plain" id="{name}">{source(name)}</script>'
        if kind == "python":
            module, _, path = name.partition(".")
            return python_source(type(model).__module__ if module == "architecture" else module, path)
        return f'<{kind} id="{name}">{source(name)}</{kind}>'

    return MARK.sub(fill, template)  # in one go: what is filled in is not searched for marks


@torch.no_grad()
def check_of(model):
    """A few tokens and the surprise of each but the first, in bits, with which the page checks what it computes."""
    c = model.config
    tokens = torch.arange(1 + min(8, c.block_size)) * 7 % c.vocab_size
    logits, _ = model(tokens[None, :-1], tokens[None, 1:])
    bits = F.cross_entropy(logits[0].float(), tokens[1:], reduction="none") / math.log(2)
    return {"tokens": tokens.tolist(), "bits": [round(b, 6) for b in bits.tolist()]}


MARK = re.compile(r"\{\{(\w+)(?: ([\w.]+))?\}\}")  # {{title}}, {{script app.js}}, {{python generate.beam_search}}


def source(name):
    """A file of page/."""
    with open(os.path.join(SOURCES, name), encoding="utf-8") as f:
        return f.read()


def content_policy(template):
    """What the page may do: run the scripts and use the style that are in it now, start its worker, and nothing else.

    It cannot ask the network for anything, and a script that came in with a text would not run (W3C, Content Security
    Policy Level 3; a script is named by its SHA-256).
    """

    def hashes(kind):
        texts = [source(name) for mark, name in MARK.findall(template) if mark == kind]
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')} 'wasm-unsafe-eval'; style-src {hashes('style')}; "
        f"worker-src blob:; img-src data:; base-uri 'none'; form-action 'none'"
    )


def json_in_html(content):
    """JSON for a script element: no < is left in it, so that nothing in it can end the element or begin another."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def python_source(module, path):
    """An element that unfolds to show the source of a function or class, as it is in the module now."""
    thing = importlib.import_module(module)
    for name in path.split("."):
        thing = getattr(thing, name)
    code = html.escape(textwrap.dedent(inspect.getsource(thing)), quote=False)
    return (
        f'<details class="python"><summary>In Python: <code>{module}.py</code>, <code>{path}</code></summary>'
        f'<pre tabindex="0">{code}</pre></details>'
    )


if __name__ == "__main__":
    run_command(main)
