"""Text -> tokens -> batches.

    data = load_data("input.txt")          # reads the text, builds the tokenizer, splits train | val
    x, y = data.batches(64, 256, seed=1).batch(step=0)     # two (64, 256) tensors; y is x shifted by one

Three rules hold everywhere, so that every number in this project can be compared with every other:
- the validation split is the last tenth of the text, counted in characters;
- the validation loss is over the whole of it, in non-overlapping windows, in nats per token (`validation_loss`);
- which windows a training step sees depends on the seed and the step alone, so a resumed run sees what it would have.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass

import torch

from utils import UserError, missing_extra, write_json

# ---------------------------------------------------------------------------------------------------------------------
# Text


def load_text(path):
    """Read a UTF-8 text file whole. Raises UserError where it is missing, empty, binary or not UTF-8."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror}); give a UTF-8 text file") from None
    if b"\0" in raw:
        raise UserError(
            f"--data {path}: is a binary file (a zero byte at offset {raw.index(0)}); give a UTF-8 text file"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: is not UTF-8 (byte {error.start}); convert it to UTF-8 first") from None
    if not text:
        raise UserError(f"--data {path}: is empty; give a UTF-8 text file")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: encode(text) -> (T,) int64 tensor, decode(ids) -> text, vocab_size, save(directory)


class UnknownCharacters(UserError):
    """A text with characters that a vocabulary of characters does not have; names: the first of them, in words."""

    def __init__(self, names):
        super().__init__(f"the model was trained on a text without the character(s) {names}; leave them out")
        self.names = names


class CharTokenizer:
    """One token a character: exactly the characters of the training text, in code-point order."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._code_points = torch.tensor([ord(c) for c in self.chars])  # sorted, so ids can be found by bisection

    @classmethod
    def from_text(cls, text):
        return cls(sorted(set(text)))

    def encode(self, text):
        """Raises UnknownCharacters, which names those that the vocabulary does not have."""
        if not text:
            return torch.empty(0, dtype=torch.int64)
        code_points = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
        ids = torch.searchsorted(self._code_points, code_points).clamp(max=self.vocab_size - 1)
        if not torch.equal(self._code_points[ids], code_points.long()):
            strange = sorted(set(text) - set(self.chars))
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in strange[:5]) + (" ..." if len(strange) > 5 else "")
            raise UnknownCharacters(names)
        return ids

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def save(self, directory):
        """Write tokenizer.json in the `tokenizers` library's format, so that transformers reads it as it lies."""
        spec = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "[\\s\\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(self.chars)}, "unk_token": "<unk>"},
        }
        write_json(os.path.join(directory, "tokenizer.json"), spec)


class LibraryTokenizer:
    """Any tokenizer.json (GPT-2's byte-pair encoding, say), run by Hugging Face's `tokenizers` library."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # some files carry the settings they were trained with
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text):
        return torch.tensor(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def decode(self, ids):
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory):
        write_json(os.path.join(directory, "tokenizer.json"), json.loads(self._tokenizer.to_str()))


def load_tokenizer(directory):
    """The tokenizer saved in a model directory, or None where there is none.

    Reads tokenizer.json (ours or any other) or GPT-2's older pair vocab.json and merges.txt.
    """
    path = os.path.join(directory, "tokenizer.json")
    pair = [os.path.join(directory, name) for name in ("vocab.json", "merges.txt")]
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                spec = json.load(f)
            model, splitter = spec["model"], spec["pre_tokenizer"] or {}
            if model["type"] == "WordLevel" and splitter.get("pattern") == {"Regex": "[\\s\\S]"}:
                chars = sorted(model["vocab"])
                if model["vocab"] == {c: i for i, c in enumerate(chars)}:  # ours is in code-point order
                    return CharTokenizer(chars)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{path}: is not a tokenizer file ({error}); train again or restore it") from None
    elif not all(map(os.path.exists, pair)):
        return None
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", f"the tokenizer in {directory}") from None
    try:
        if os.path.exists(path):
            return LibraryTokenizer(tokenizers.Tokenizer.from_file(path))
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*pair))
    except Exception as error:  # the library raises bare Exceptions for a damaged file
        raise UserError(f"{directory}: its tokenizer cannot be read ({error})") from None
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return LibraryTokenizer(bpe)


def save_tokenizer(directory, tokenizer, block_size):
    """Write tokenizer.json and the tokenizer_config.json that transformers' AutoTokenizer looks for."""
    tokenizer.save(directory)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    write_json(os.path.join(directory, "tokenizer_config.json"), config)


def prompt_tokens(tokenizer, prompt):
    """The prompt as (1, T) int64 with T >= 1: an empty one becomes a line break (or the first token there is)."""
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        try:
            ids = tokenizer.encode("\n")
        except UserError:
            ids = torch.zeros(1, dtype=torch.int64)
    return ids[None]


# ---------------------------------------------------------------------------------------------------------------------
# The two splits


@dataclass
class TextData:
    """A text in tokens: train (N,) and val (M,), in the smallest integer type that holds them."""

    train: torch.Tensor
    val: torch.Tensor
    tokenizer: object
    val_bytes: int  # length of the val text in UTF-8
    fingerprint: str  # of the text: a run is only ever resumed on the text it began with

    def check_length(self, block_size):
        """Raises UserError where the training text is too short for windows of block_size."""
        if len(self.train) <= block_size:
            raise UserError(
                f"--block_size {block_size}: the training text has only {len(self.train)} tokens; "
                f"give a smaller block_size or a longer text"
            )

    def batches(self, batch_size, block_size, seed):
        self.check_length(block_size)
        return Batches(self.train, batch_size, block_size, seed)

    def bits_per_byte(self, loss):
        """Turn a val loss in nats per token into bits per byte of text, which does not depend on the tokenizer."""
        return loss * len(self.val) / self.val_bytes / math.log(2)


def load_data(path, tokenizer=None):
    """Read a text file, tokenize it (by characters unless a tokenizer is given) and split off the last tenth."""
    text = load_text(path)
    if tokenizer is None:
        tokenizer = CharTokenizer.from_text(text)
    cut = int(0.9 * len(text))
    train, val = (_compact(tokenizer.encode(part), tokenizer.vocab_size) for part in (text[:cut], text[cut:]))
    if len(train) < 2 or len(val) < 2:
        raise UserError(f"--data {path}: has only {len(text)} character(s); a text needs at least 20 to train on")
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return TextData(train, val, tokenizer, len(text[cut:].encode()), fingerprint)


def _compact(ids, vocab_size):
    return ids.to(torch.uint8 if vocab_size <= 256 else torch.int16 if vocab_size <= 32768 else torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batches:
    """Training windows, shuffled without replacement.

    Each epoch cuts the tokens into windows of block_size behind a random offset and deals them in random order. Both
    depend on the seed and the number of the epoch alone, so `batch(step)` is a pure function, with no state to save.
    """

    def __init__(self, tokens, batch_size, block_size, seed):
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)  # one fewer leaves room for the offset
        self._epoch, self._starts = None, None

    def _epoch_starts(self, epoch):
        """Where the windows of this epoch begin, in the order in which they are dealt: (windows_per_epoch,) int64."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            room = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            offset = torch.randint(room + 1, (1,), generator=generator)
            order = torch.randperm(self.windows_per_epoch, generator=generator)
            self._epoch, self._starts = epoch, offset + order * self.block_size
        return self._starts

    def batch(self, step, device="cpu"):
        """The inputs and targets of training step `step`: two (batch_size, block_size) int64 tensors on the device."""
        starts, first = [], step * self.batch_size
        while sum(map(len, starts)) < self.batch_size:  # a batch may span the end of an epoch
            epoch, k = divmod(first + sum(map(len, starts)), self.windows_per_epoch)
            missing = self.batch_size - sum(map(len, starts))
            starts.append(self._epoch_starts(epoch)[k : k + missing])
        windows = torch.cat(starts)[:, None] + torch.arange(self.block_size + 1)  # (batch_size, block_size + 1)
        tokens = self.tokens[windows].long()
        if torch.device(device).type == "cuda":  # pinned memory is copied while both sides go on with their work
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        tokens = tokens.to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def validation_windows(tokens, block_size):
    """Cut tokens into non-overlapping windows: yields (x, y) pairs of (n, T) int64 tensors, T = block_size but for the
    last, shorter one. Every token but the first is a target exactly once."""
    whole = (len(tokens) - 1) // block_size * block_size
    if whole:
        yield tokens[:whole].view(-1, block_size).long(), tokens[1 : whole + 1].view(-1, block_size).long()
    if whole < len(tokens) - 1:
        yield tokens[whole:-1][None].long(), tokens[whole + 1 :][None].long()


@torch.no_grad()
def validation_loss(model, tokens, batch_size, max_batches=None, device="cpu", progress=iter):
    """Mean cross-entropy of `model(x, y) -> (logits, loss)` over the tokens, in nats per token.

    Over all of them, or, where that takes more than max_batches batches, over that many, spread evenly. The model's
    training mode (dropout) is switched off meanwhile. `progress` may wrap the list of batches in a progress bar.
    """
    batches = [
        pair
        for x, y in validation_windows(tokens, model.config.block_size)
        for pair in zip(x.split(batch_size), y.split(batch_size))
    ]
    if max_batches and len(batches) > max_batches:
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    was_training = model.training
    model.eval()
    losses, count = [], 0
    for x, y in progress(batches):
        _, loss = model(x.to(device), y.to(device))
        losses.append(loss.float() * y.numel())
        count += y.numel()
    model.train(was_training)
    return float(torch.stack(losses).cpu().double().sum()) / count  # on the CPU, as an Apple GPU has no float64
