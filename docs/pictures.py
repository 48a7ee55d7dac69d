"""The README's pictures, of a run in out_dir: its page in light and dark, in a headless Chromium, its loss, its layers.

    make train pictures

writes page-light.webp, page-dark.webp, loss.png and lens.png beside this file. The text in the page is
drawn with a seed, and of its last hundred tokens the one with most nearly three bits of surprise is looked at.
"""

import base64
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from browser import Browser, NoChromium, find_chromium

import export
import inside
import plots
from checkpoint import METRICS, load_model, read_metrics
from generate import generate
from tokenizer import prompt_tokens
from utils import UserError, option, parse_options, run_command

HERE = Path(__file__).resolve().parent
PROMPT, NEW_TOKENS, SEED = "One morning", 420, 3
SENTENCE = '"Good morning," said Mira the baker.'
WIDTH, HEIGHT = 1400, 1000


@dataclass
class PicturesOptions:
    """Every flag of docs/pictures.py: its type, its default and its line of help."""

    out_dir: str = option("out", "the run to show")


def main(argv):
    options, _ = parse_options(PicturesOptions, argv, "Draw the README's pictures.")
    model, tokenizer = load_model(options.out_dir)
    metrics = read_metrics(os.path.join(options.out_dir, METRICS))
    plots.loss_curve(metrics).savefig(HERE / "loss.png", dpi=90)
    draw_lens(model, tokenizer)
    draw_page(model.eval(), tokenizer, options.out_dir)
    return 0


def draw_lens(model, tokenizer):
    """lens.png: the first guesses after each layer, along a sentence."""
    labels = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    ids = tokenizer.encode(SENTENCE)[: model.config.block_size + 1]
    seen = inside.look(model, ids[None, :-1])
    probs = torch.stack([inside.lens(model, x)[0].softmax(dim=-1) for x in seen.stream])  # (n_layer + 1, T, V)
    pieces = [labels[i] for i in ids]
    plots.logit_lens(probs, labels, pieces[:-1], pieces[1:]).savefig(HERE / "lens.png", dpi=90)


def draw_page(model, tokenizer, out_dir):
    """page-light.webp and page-dark.webp: the top of the page with a text of the model."""
    prompt = prompt_tokens(tokenizer, PROMPT)
    dice = torch.Generator().manual_seed(SEED)
    written = torch.stack(list(generate(model, prompt, NEW_TOKENS, temperature=0.8, generator=dice)), dim=-1)
    text = tokenizer.decode(torch.cat([prompt, written.view(1, -1)], dim=1)[0].tolist())
    options = export.ExportOptions(out_dir=out_dir, prompt=text)
    html, _ = export.page_of(model, tokenizer, options, export.training_facts(out_dir))
    try:
        chromium = find_chromium()
    except NoChromium as error:
        raise UserError(str(error)) from None
    with tempfile.TemporaryDirectory() as directory, Browser(chromium, os.path.join(directory, "profile")) as browser:
        path = Path(directory, "model.html")
        path.write_text(html, encoding="utf-8", newline="\n")
        page = browser.open(path.as_uri(), WIDTH, HEIGHT)
        page.wait("!byId('run').disabled && !looking")
        page.evaluate(
            """choose(state.tokens.length - 100 + state.tokens.slice(-100).map(({bits}) => Math.abs(bits - 3))
                .reduce((best, far, i, all) => far < all[best] ? i : best, 0))"""
        )
        page.wait("!looking")
        for theme in ("light", "dark"):
            page.dark(theme == "dark")
            picture = page.ask("Page.captureScreenshot", format="webp", quality=85)["data"]
            (HERE / f"page-{theme}.webp").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    run_command(main)
