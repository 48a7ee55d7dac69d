"""The README's pictures, of a run in out_dir: its page in light and dark, in a headless Chromium, and its loss.

    make train pictures

writes page-light.webp, page-dark.webp and loss.png beside this file. The text in the page is drawn with a seed, and the
token that is looked at is the most surprising one of the last hundred.
"""

import base64
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from browser import Browser, NoChromium, find_chromium

import export
import plots
from checkpoint import METRICS, load_model
from generate import generate
from tokenizer import prompt_tokens
from utils import UserError, option, parse_options, run_command

HERE = Path(__file__).resolve().parent
PROMPT, NEW_TOKENS, SEED = "One morning", 420, 3
WIDTH, HEIGHT = 1400, 1000


@dataclass
class PicturesOptions:
    """Every flag of docs/pictures.py: its type, its default and its line of help."""

    out_dir: str = option("out", "the run to show")


def main(argv):
    options, _ = parse_options(PicturesOptions, argv, "Draw the README's pictures.")
    model, tokenizer = load_model(options.out_dir)
    with open(os.path.join(options.out_dir, METRICS), encoding="utf-8") as f:
        plots.loss_curve([json.loads(line) for line in f]).savefig(HERE / "loss.png", dpi=90)
    draw_page(model.eval(), tokenizer, options.out_dir)
    return 0


def draw_page(model, tokenizer, out_dir):
    """page-light.webp and page-dark.webp: the top of the page with a text of the model."""
    prompt = prompt_tokens(tokenizer, PROMPT)
    dice = torch.Generator().manual_seed(SEED)
    written = torch.stack(list(generate(model, prompt, NEW_TOKENS, temperature=0.8, generator=dice)), dim=-1)
    text = tokenizer.decode(torch.cat([prompt, written.view(1, -1)], dim=1)[0].tolist())
    how = export.choose_format(model, export.ExportOptions(out_dir=out_dir))
    spec, facts = export.tokenizer_spec(tokenizer, out_dir), export.training_facts(out_dir)
    try:
        chromium = find_chromium()
    except NoChromium as error:
        raise UserError(str(error)) from None
    with tempfile.TemporaryDirectory() as directory, Browser(chromium, os.path.join(directory, "profile")) as browser:
        path = Path(directory, "model.html")
        path.write_text(export.build_page(model, spec, how, text, training=facts), encoding="utf-8", newline="\n")
        page = browser.open(path.as_uri(), WIDTH, HEIGHT)
        page.wait("!byId('run').disabled && !looking")
        page.evaluate(
            "choose(state.tokens.reduce((best, {bits}, i) => i > state.tokens.length - 100"
            " && (best < 0 || bits > state.tokens[best].bits) ? i : best, -1))"
        )
        page.wait("!looking")
        for theme in ("light", "dark"):
            page.dark(theme == "dark")
            picture = page.ask("Page.captureScreenshot", format="webp", quality=85)["data"]
            (HERE / f"page-{theme}.webp").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    run_command(main)
