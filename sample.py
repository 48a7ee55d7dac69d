"""Write text with a trained GPT.

    python sample.py --prompt "The meaning of life is"
    python sample.py --temperature 0.8 --top_k 40 --max_new_tokens 500
    python sample.py --num_beams 4 --stop "."           # beam search: the most probable sentence it can find
    cat letter.txt | python sample.py --prompt_file -

Text goes to stdout as it is written, everything else to stderr.
"""

import sys
from dataclasses import dataclass
from typing import Optional

import torch

from checkpoint import gpt2_tokenizer, load_model
from data import prompt_tokens
from generate import beam_search, generate
from utils import UserError, option, parse_options, pick_device, pick_dtype, run_command

SAMPLES_AT_ONCE = 64  # more than this many samples are written in groups, so that memory stays bounded


@dataclass
class SampleOptions:
    """Every flag of sample.py: its type, its default and its line of help."""

    prompt: Optional[str] = option(None, "text to continue (default: begin as after a line break)")
    prompt_file: Optional[str] = option(None, "file with the text to continue; - for standard input")
    out_dir: str = option("out", "what train.py wrote, a GPT-2 directory, a nanoGPT ckpt.pt, or gpt2 ... gpt2-xl")
    max_new_tokens: int = option(500, "tokens to write; may exceed the model's block_size", at_least=0)
    num_samples: int = option(1, "texts to write", at_least=1)
    temperature: float = option(1.0, "below 1 more cautious, above 1 wilder, 0 always the likeliest token", at_least=0)
    top_k: Optional[int] = option(None, "draw from the k likeliest tokens; 0 or above the vocabulary: all", at_least=0)
    top_p: Optional[float] = option(
        None, "draw from the likeliest tokens that together have probability p; 0: the likeliest only", at_least=0
    )
    num_beams: int = option(1, "above 1: beam search with that many beams in place of sampling", at_least=1)
    length_penalty: float = option(
        1.0, "for beams that --stop ends: above 0 favours longer texts, below 0 shorter", at_least=-10, below=10
    )
    stop: Optional[str] = option(None, "end a text where this appears (kept out of it)")
    seed: Optional[int] = option(None, "the same seed writes the same text (default: a new one each time)", at_least=0)
    device: Optional[str] = option(None, "cpu, cuda, cuda:1 or mps (default: cuda if available)")
    dtype: Optional[str] = option(
        None,
        "float32, bfloat16 or float16 (default: float32 on CPU, else as in train.py)",
        choices=("float32", "bfloat16", "float16"),
    )


def main(argv):
    options, _ = parse_options(SampleOptions, argv, "Write text with a trained GPT.")
    return sample(options)


def read_prompt(options):
    """The prompt from --prompt, a file or standard input."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt_file: give one of the two")
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        if options.prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with open(options.prompt_file, encoding="utf-8-sig", newline="") as f:
            return f.read()
    except OSError as error:
        raise UserError(f"--prompt_file {options.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file {options.prompt_file}: is not UTF-8 text") from None


def sample(options):
    """Print what the options ask for. Returns the exit status 0."""
    if options.top_p is not None and options.top_p > 1:
        raise UserError(f"--top_p {options.top_p}: is a probability; give a number from 0 to 1")
    if options.num_beams > 1 and options.num_samples > options.num_beams:
        raise UserError(
            f"--num_samples {options.num_samples}: a search with --num_beams {options.num_beams} ends with no more "
            f"than that many texts; raise --num_beams"
        )
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype or ("float32" if device.type == "cpu" else None), device)
    prompt = read_prompt(options)
    model, tokenizer = load_model(options.out_dir)
    tokenizer = tokenizer or gpt2_tokenizer(model)
    if tokenizer is None:
        raise UserError(f"--out_dir {options.out_dir}: has no tokenizer; put the tokenizer.json of its run beside it")
    model.to(device, dtype).eval()
    idx = prompt_tokens(tokenizer, prompt).to(device)
    seed = options.seed if options.seed is not None else torch.seed() % 2**63
    generator = torch.Generator(device).manual_seed(seed)

    if options.num_beams > 1:
        texts = search(model, tokenizer, idx, options)
        separate(prompt + text for text in texts[: options.num_samples])
    elif options.num_samples == 1:
        stream(prompt, model, tokenizer, idx, options, generator)
    else:
        separate(prompt + text for text in many(model, tokenizer, idx, options, generator))
    return 0


def stream(prompt, model, tokenizer, idx, options, generator):
    """One text, printed as it is written."""
    write(prompt)
    writer = TextWriter(tokenizer, options.stop)
    for token in tokens(model, idx, options, generator):
        write(writer.add(int(token)))
        if writer.stopped:
            break
    write(writer.rest() + "\n")


def many(model, tokenizer, idx, options, generator):
    """num_samples texts, written side by side in groups: yields each text."""
    for first in range(0, options.num_samples, SAMPLES_AT_ONCE):
        n = min(SAMPLES_AT_ONCE, options.num_samples - first)
        writers = [TextWriter(tokenizer, options.stop) for _ in range(n)]
        texts = [""] * n
        for step in tokens(model, idx.expand(n, -1), options, generator):
            for i, token in enumerate(step.tolist()):
                texts[i] += writers[i].add(token)
            if all(writer.stopped for writer in writers):
                break
        yield from (text + writer.rest() for text, writer in zip(texts, writers))


def search(model, tokenizer, idx, options):
    """The texts of a beam search, best first."""

    def is_end(ids):
        return options.stop in tokenizer.decode(ids)

    found = beam_search(
        model, idx, options.max_new_tokens, options.num_beams, options.length_penalty, is_end if options.stop else None
    )
    texts = [tokenizer.decode(hypothesis.tokens) for hypothesis in found]
    return [text.split(options.stop)[0] if options.stop else text for text in texts]


def tokens(model, idx, options, generator):
    return generate(
        model, idx, options.max_new_tokens, options.temperature, options.top_k, options.top_p, generator=generator
    )


class TextWriter:
    """Turns tokens into text that is safe to print: characters that are complete, and nothing of the stop string.

    A character can take several byte-level tokens, and a stop string several characters: both are held back until it
    is known what they become.
    """

    def __init__(self, tokenizer, stop=None):
        self.tokenizer, self.stop, self.ids, self.printed, self.stopped = tokenizer, stop, [], 0, False

    def add(self, token):
        """The text that can be printed now that this token has come."""
        if self.stopped:
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if self.stop and self.stop in text[self.printed :]:
            self.stopped = True
            return self._up_to(text, text.index(self.stop, self.printed))
        end = len(text.rstrip("\ufffd"))
        if self.stop:
            held = (n for n in range(len(self.stop) - 1, 0, -1) if text[:end].endswith(self.stop[:n]))
            end -= next(held, 0)
        return self._up_to(text, max(end, self.printed))

    def rest(self):
        """What is still held back when no more tokens come."""
        return "" if self.stopped else self._up_to(self.tokenizer.decode(self.ids), None)

    def _up_to(self, text, end):
        piece = text[self.printed : end]
        self.printed += len(piece)
        return piece


def separate(texts):
    """Print texts with a line between them."""
    for i, text in enumerate(texts):
        write(("---------------\n" if i else "") + text + "\n")


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
