"""Write text with a trained GPT.

    python sample.py --prompt "The meaning of life is"
    python sample.py --temperature 0.8 --top_k 40 --max_new_tokens 500
    python sample.py --num_beams 4 --stop "."           # beam search: the most probable sentence it can find
    cat letter.txt | python sample.py --prompt_file -
    python sample.py --interactive                      # write a story by turns

Text goes to stdout as it is written, everything else to stderr.

Exercises:
- Write with --temperature 0, 0.5, 1 and 2, each with --seed 1. Where does the text begin to repeat itself, and where do
  words fall apart?
- Look at a text with --probs: at which places of a word is the model surprised, and why there?
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # threads have work again 120 us after a pass over a few tokens: docs/speed.md
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

# isort: split
import utils  # first: it starts the clock  # noqa: F401

# isort: split
import errno
import math
import sys
import time
from dataclasses import dataclass
from typing import Optional

import torch

from checkpoint import load_writer
from draft import FILE as DRAFT
from draft import Draft
from fused_cpu import prepare
from generate import (
    FEW,
    Sampling,
    Speculation,
    beam_search,
    best_threads,
    generate,
    guess_cost,
    speculate,
)
from graphs import reader_on
from lighten import join_qkv, usual_format
from tokenizer import prompt_tokens, whole_characters
from utils import UserError, is_out_of_memory, option, parse_options, pick_device, pick_dtype, run_command

SEEDED_COST = 0.2  # of a guess, where it is not measured: what it is on most machines,
FUSED_SEEDED_COST = 0.4  # and where fused_cpu.c reads it
SAMPLES_AT_ONCE = 64  # more than this many samples are written in groups, so that memory stays bounded


@dataclass
class SampleOptions:
    """Every flag of sample.py: its type, its default and its line of help."""

    prompt: Optional[str] = option(None, "text to continue (default: begin as after a line break)")
    prompt_file: Optional[str] = option(None, "file with the text to continue; - for standard input")
    out_dir: str = option("out", "what train.py wrote, a GPT-2 directory, a nanoGPT ckpt.pt, or gpt2 ... gpt2-xl")
    max_new_tokens: int = option(500, "tokens to write; may exceed the model's block_size", at_least=0)
    num_samples: int = option(1, "texts to write; of a beam search the best ones, each once", at_least=1)
    temperature: float = option(1.0, "below 1 more cautious, above 1 wilder, 0 always the likeliest token", at_least=0)
    top_k: Optional[int] = option(None, "draw from the k likeliest tokens; 0 or above the vocabulary: all", at_least=0)
    top_p: Optional[float] = option(
        None, "draw from the likeliest tokens that together have probability p; 0: the likeliest only", at_least=0
    )
    min_p: float = option(0.0, "draw from tokens at least p times as probable as the likeliest", at_least=0)
    repetition_penalty: float = option(
        1.0, "above 1: tokens that are in the text already get less likely", at_least=0.01
    )
    num_beams: int = option(1, "above 1: beam search with that many beams, in which nothing is drawn", at_least=1)
    length_penalty: float = option(
        1.0, "for beams that --stop ends: above 0 favours longer texts, below 0 shorter", at_least=-10, below=10
    )
    stop: Optional[str] = option(None, "end a text where this appears (kept out of it)")
    interactive: bool = option(False, "write by turns: type, watch it go on, type again; Ctrl-C stops it, Ctrl-D ends")
    probs: bool = option(False, "print each token with its probability; in a terminal coloured by surprise")
    stats: bool = option(False, "print tokens per second, and how many guesses were right, on stderr")
    guesses: int = option(3, "tokens guessed from draft.safetensors for each pass of the model; 0: none", at_least=0)
    seed: Optional[int] = option(None, "the same seed writes the same text (default: a new one each time)", at_least=0)
    device: Optional[str] = option(None, "cpu, cuda, cuda:1 or mps (default: the first there is of cuda, mps, cpu)")
    dtype: Optional[str] = option(
        None,
        "float32, bfloat16 or float16 (default: 16 bits where they are fast; float32 for a small model on a CPU)",
        choices=("float32", "bfloat16", "float16"),
    )
    quantize: Optional[str] = option(None, "int8: weights in a quarter of the bytes, on a CPU", choices=("int8",))


def main(argv):
    options, given = parse_options(SampleOptions, argv, "Write text with a trained GPT.")
    try:
        return sample(options, given)
    except (RuntimeError, MemoryError, FloatingPointError) as error:
        if isinstance(error, FloatingPointError) or "probability tensor" in str(error):  # torch.multinomial's, on a CPU
            raise UserError(
                f"--out_dir {options.out_dir}: its model computes infinities or NaN, of which nothing can be drawn; "
                f"restore its weights or train again"
            ) from None
        if not is_out_of_memory(error):
            raise
        many = [f"--{name}" for name in ("num_beams", "num_samples") if getattr(options, name) > 1]
        lower = f"lower {' or '.join(many)}, or " if many else ""
        raise UserError(f"out of memory; {lower}write with a smaller model") from None


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
        raise UserError(
            f"--prompt_file {options.prompt_file}: cannot be read ({error.strerror}); check the name"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file {options.prompt_file}: is not UTF-8 text; save it as such") from None


def known(prompt, tokenizer, options):
    """The prompt, if the model knows its characters; Windows' line ends become a line break where it knows that only.
    Raises UserError."""
    try:
        tokenizer.encode(prompt)
        return prompt
    except UserError as error:
        if "\r\n" in prompt:
            return known(prompt.replace("\r\n", "\n"), tokenizer, options)
        flag = "--prompt" if options.prompt_file is None else f"--prompt_file {options.prompt_file}"
        raise UserError(f"{flag}: {error}") from None


def check(options, given):
    """Raises UserError for flags that do not go together, or that would do nothing."""
    if options.top_p is not None and options.top_p > 1:
        raise UserError(f"--top_p {options.top_p}: is a probability; give a number from 0 to 1")
    if options.min_p > 1:
        raise UserError(f"--min_p {options.min_p}: is a share of the highest probability; give a number from 0 to 1")
    if options.num_beams > 1 and options.num_samples > options.num_beams:
        raise UserError(
            f"--num_samples {options.num_samples}: a search with --num_beams {options.num_beams} ends with no more "
            f"than that many texts; raise --num_beams"
        )
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if options.num_beams > 1 and name in given:
            raise UserError(
                f"--{name} {getattr(options, name)} and --num_beams {options.num_beams}: a beam search draws nothing; "
                f"leave out one of the two"
            )
    if "length_penalty" in given and (options.num_beams == 1 or not options.stop):
        raise UserError(
            f"--length_penalty {options.length_penalty:g}: compares beams that --stop ends; leave it out, or add "
            f"--num_beams and --stop"
        )
    for name in ("interactive", "probs"):
        if getattr(options, name) and (options.num_beams > 1 or options.num_samples > 1):
            raise UserError(f"--{name}: shows one text; leave out --num_beams and --num_samples")
    if options.stop == "":
        raise UserError("--stop: is empty; give the text that ends a sample, or leave it out")
    if options.probs and options.stop:
        raise UserError("--probs: shows every token; leave out --stop")
    if options.quantize and options.dtype:
        raise UserError(f"--quantize {options.quantize} and --dtype {options.dtype}: give one of the two")
    if options.interactive and (options.probs or options.prompt_file is not None):
        raise UserError("--interactive: reads what you type; leave out --prompt_file and --probs")


def why_no_guesses(options, device):
    """Why the model is given no guesses to check, in words; None where it is.

    They pay where a pass over four tokens takes little longer than one over one: on a CPU, for a single text.
    """
    if options.num_beams > 1 or options.num_samples > 1 or options.probs:
        return "are made for a single text, without --num_beams, --num_samples and --probs"
    if device.type != "cpu":
        return f"are made on a CPU, not on {device.type}"
    if not os.path.isfile(os.path.join(options.out_dir, DRAFT)):
        return f"come from {DRAFT}, which is not in {options.out_dir}; train.py writes it at the end of a run"
    return None


def sample(options, given):
    """Print what the options ask for. Returns the exit status 0."""
    check(options, given)
    device = pick_device(options.device)
    why = why_no_guesses(options, device)
    if why is not None and "guesses" in given and options.guesses > 0:
        raise UserError(f"--guesses {options.guesses}: guesses {why}; leave it out")
    if options.quantize and device.type != "cpu":
        raise UserError(f"--quantize {options.quantize}: is made for the CPU, not {device.type}; use --dtype")
    prompt = read_prompt(options)
    model, tokenizer = load_writer(options.out_dir)
    prompt = known(prompt, tokenizer, options)
    unfused = None
    if device.type == "cpu":
        unfused = prepare(model, options.quantize or options.dtype or usual_format(model))
    else:
        join_qkv(model.to(device, pick_dtype(options.dtype, device)))
    scribe = Scribe(model, tokenizer, options, device, unfused)
    if options.interactive:
        interact(prompt, scribe)
    elif options.num_beams > 1:
        texts = search(scribe, prompt_tokens(tokenizer, prompt).to(device))
        separate(prompt + text for text in texts[: options.num_samples])
    elif options.probs:
        explain(prompt, scribe)
    elif options.num_samples == 1:
        idx = prompt_tokens(tokenizer, prompt).to(device)
        write(prompt)
        for text in scribe.continued(idx):
            write(text)
        write("\n")
    else:
        separate(prompt + text for text in many(scribe, prompt_tokens(tokenizer, prompt).to(device)))
    if options.stats:
        print(scribe.stats(), file=sys.stderr)
    return 0


class Scribe:
    """Continues texts as the options say, and keeps count of its speed.

    unfused: on a CPU, why the model writes without fused_cpu.c; None where it does not.
    """

    def __init__(self, model, tokenizer, options, device, unfused=None):
        self.model, self.tokenizer, self.options, self.unfused = model, tokenizer, options, unfused
        seed = options.seed if options.seed is not None else torch.seed() % 2**63
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sampling = Sampling(
            options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
        )
        guess = options.guesses > 0 and why_no_guesses(options, device) is None
        self.draft = Draft.load(options.out_dir, model.config.vocab_size) if guess else None
        at_once = options.num_beams if options.num_beams > 1 else 1 + options.guesses if self.draft else 1
        # Not with a seed: another number of threads rounds otherwise, but in fused_cpu.c, and with or without guesses
        # other numbers are drawn, which could end in another text.
        few, fused = device.type == "cpu" and options.num_samples == 1 and at_once <= FEW, hasattr(model, "fused")
        measure = few and options.seed is None
        self.threads = best_threads(model, at_once) if measure or (few and fused) else None
        self.reader = reader_on(device, model, self.threads)
        cost = FUSED_SEEDED_COST if fused else SEEDED_COST
        if self.draft and measure:
            cost = guess_cost(model, options.guesses, self.threads)
        self.counts, self.written, self.seconds = Speculation(cost), 0, 0.0

    def tokens(self, idx):
        """The tokens that continue idx (B, T), one step at a time: (B,) each."""
        o, same = self.options, dict(sampling=self.sampling, generator=self.generator)
        start = time.perf_counter()
        if self.draft is not None and len(idx) == 1:
            same.update(reader=self.reader, counts=self.counts)
            steps = speculate(self.model, idx, o.max_new_tokens, self.draft, o.guesses, **same)
        else:
            reader = self.reader if len(idx) == 1 else reader_on(idx.device, self.model)
            steps = generate(self.model, idx, o.max_new_tokens, reader=reader, **same)
        try:
            for step in steps:
                self.written += len(step)
                yield step
        finally:
            self.seconds += time.perf_counter() - start

    def continued(self, idx, ids=None):
        """The text after idx (1, T), in pieces as they come. ids: a list to which the tokens are added."""
        writer = TextWriter(self.tokenizer, self.options.stop)
        for token in self.tokens(idx):
            if ids is not None:
                ids.append(int(token))
            yield writer.add(int(token))
            if writer.stopped:
                break
        yield writer.rest()

    def stats(self):
        """How fast it was, in a line."""
        line = f"{self.written} tokens in {self.seconds:.2f} s, {self.written / max(self.seconds, 1e-9):,.0f} tokens/s"
        c = self.counts
        if c.guessed:
            share = c.accepted / c.guessed
            line += f"; {share:.0%} of {c.guessed} guesses accepted, {c.tokens / c.passes:.1f} tokens a pass"
        if self.unfused:
            line += f"; slower without fused_cpu.c: {self.unfused}"
        return line


def many(scribe, idx):
    """num_samples texts, written side by side in groups: yields each text."""
    options = scribe.options
    for first in range(0, options.num_samples, SAMPLES_AT_ONCE):
        n = min(SAMPLES_AT_ONCE, options.num_samples - first)
        writers = [TextWriter(scribe.tokenizer, options.stop) for _ in range(n)]
        texts = [""] * n
        for step in scribe.tokens(idx.expand(n, -1)):
            for i, token in enumerate(step.tolist()):
                texts[i] += writers[i].add(token)
            if all(writer.stopped for writer in writers):
                break
        yield from (text + writer.rest() for text, writer in zip(texts, writers))


def interact(prompt, scribe):
    """A story by turns: a line from stdin, its continuation, the next line. What was read stays in the cache.

    What is typed follows the last character that was written, without a line break between: where --stop ended a turn,
    the model has forgotten the stop string too.
    """
    text = []
    new = scribe.tokenizer.encode(prompt).tolist() if prompt else []
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: the tokenizer names them
    write(prompt)
    while True:
        if new:
            text += new
            n, shown = len(text), ""
            try:
                for piece in scribe.continued(torch.tensor([text], device=scribe.generator.device), text):
                    write(piece)
                    shown += piece
            except KeyboardInterrupt:
                pass
            if len(text) < n + scribe.options.max_new_tokens or scribe.tokenizer.decode(text[n:]) != shown:
                text[n:] = scribe.tokenizer.encode(shown).tolist()  # tokens and cache may hold more than was written
                scribe.reader.start = None
            write("\n")
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            said = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal is gone
                return
            problem = f"--interactive: standard input cannot be read ({error.strerror})"
            raise UserError(f"{problem}; start it in a terminal, or give it a file") from None
        if not said:  # the end of the input
            return
        said = said[1:] if said.startswith("\ufeff") else said  # a file's byte order mark
        try:
            new = scribe.tokenizer.encode(said.rstrip("\r\n")).tolist()
        except UserError as error:
            print(f"sample.py: {error}", file=sys.stderr)
            new = []


# From no surprise to much: background colours of a terminal with 256 of them, light enough for black letters.
SURPRISE_COLOURS = (None, 230, 229, 222, 216, 210)


def explain(prompt, scribe):
    """One text with the probability that the model gave to each token, at temperature 1 and with no other choice made.

    One line a token, a character of several tokens in the line of the last; in a terminal also the text at the end,
    coloured by surprise: one shade deeper for each bit.
    """

    class Recorded(Sampling):
        def probs(self, logits, text):
            self.plain = logits.softmax(dim=-1)
            return super().probs(logits, text)

    scribe.sampling = Recorded(**vars(scribe.sampling))
    idx = prompt_tokens(scribe.tokenizer, prompt).to(scribe.generator.device)
    pieces, ids = [], []
    for piece in scribe.continued(idx, ids):
        if len(ids) > len(pieces):
            p = float(scribe.sampling.plain[0, ids[-1]])
            pieces.append((piece, p))
            write(f"{p:.4f}  {piece!r}\n")
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        coloured = (
            f"\x1b[48;5;{colour}m\x1b[30m{piece}\x1b[0m" if colour else piece
            for piece, p in pieces
            for colour in [SURPRISE_COLOURS[min(len(SURPRISE_COLOURS) - 1, int(-math.log2(max(p, 1e-9))))]]
        )
        write(prompt + "".join(coloured) + "\n")


def search(scribe, idx):
    """The texts of a beam search, best first. Where two ways to cut a text into tokens were found, it comes once."""
    options, tokenizer, start = scribe.options, scribe.tokenizer, time.perf_counter()

    def is_end(ids):
        return options.stop in tokenizer.decode(ids)

    how = dict(length_penalty=options.length_penalty, repetition_penalty=options.repetition_penalty)
    how.update(is_end=is_end if options.stop else None, reader=reader_on(idx.device, scribe.model, scribe.threads))
    found = beam_search(scribe.model, idx, options.max_new_tokens, options.num_beams, **how)
    scribe.written, scribe.seconds = len(found[0].tokens), time.perf_counter() - start
    texts = [whole_characters(tokenizer, tokenizer.decode(hypothesis.tokens)) for hypothesis in found]
    return list(dict.fromkeys(text.split(options.stop)[0] if options.stop else text for text in texts))


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
        end = len(whole_characters(self.tokenizer, text))
        if self.stop:
            held = (n for n in range(len(self.stop) - 1, 0, -1) if text[:end].endswith(self.stop[:n]))
            end -= next(held, 0)
        piece = self._up_to(text, max(end, self.printed))
        if len(self.ids) > 256 and self.printed == len(text):  # a long text is not decoded from its beginning each time
            self.ids = self.ids[-8:]
            self.printed = len(self.tokenizer.decode(self.ids))
        return piece

    def rest(self):
        """What is still held back when no more tokens come."""
        whole = whole_characters(self.tokenizer, self.tokenizer.decode(self.ids))
        return "" if self.stopped else self._up_to(whole, None)

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
