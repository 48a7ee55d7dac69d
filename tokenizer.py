"""Text -> tokens -> text.

    tokenizer = CharTokenizer.from_text(text)                  # one token a character: the simplest, for a small text
    tokenizer = ByteTokenizer()                                # one token a byte: 256 tokens say any text
    tokenizer = train_bpe(texts, 4096)                         # byte pairs: the bytes that often come together are one
    tokenizer.decode(tokenizer.encode(text)) == text           # always, for each of them

A tokenizer has `encode(text) -> (T,) int64`, `decode(ids) -> text`, `vocab_size`, and `spec()`, which is what its
tokenizer.json holds, in the format of Hugging Face's `tokenizers` library: transformers reads each of them as it lies.
One of your own must encode any part of a text (data.py cuts off the last tenth wherever that begins, in a word too).
"""

import contextlib
import hashlib
import json
import math
import os
import sys

import torch

from utils import UserError, first_line, missing_extra, write_json

FILE = "tokenizer.json"
KINDS = "chars, bytes, bpe:N (N tokens, as in bpe:4096), gpt2, or the path of a tokenizer.json"
MOST_CHARACTERS = 16_000_000  # of a longer text, byte pairs are counted in so many, from all of its parts
SENTENCE = 2**14  # characters given to the trainer at once; it collects some hundred of them


def plain(ids):
    """Token ids, a list or a tensor (T,), as a list of whole numbers: a loop over a tensor is fifty times slower."""
    return ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]


# ---------------------------------------------------------------------------------------------------------------------
# Characters


class UnknownCharacters(UserError):
    """A text with characters that a vocabulary of characters does not have; names: the first of them, in words."""

    def __init__(self, names):
        super().__init__(f"the model was trained on a text without the character(s) {names}; leave them out")
        self.names = names


class OtherTokenizer(UserError):
    """A text that was prepared with another tokenizer than the model's; path: where it lies."""

    def __init__(self, path):
        super().__init__(f"{path}: was prepared with another tokenizer; prepare the text anew, with --tokenizer")
        self.path = path


def names_of(chars):
    """The first few of some characters, in words."""
    chars = sorted(chars)
    return ", ".join(f"{c!r} (U+{ord(c):04X})" for c in chars[:5]) + (" ..." if len(chars) > 5 else "")


class CharTokenizer:
    """One token a character: exactly the characters of the training text, in code-point order where it is ours."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        # Sorted, so that places among them can be found by bisection, and the id at each place.
        self._code_points, self._ids = torch.tensor([ord(c) for c in self.chars]).sort()

    @classmethod
    def from_text(cls, text):
        return cls(sorted(set(text)))

    def encode(self, text):
        """Raises UnknownCharacters, which names those that the vocabulary does not have."""
        if not text:
            return torch.empty(0, dtype=torch.int64)
        code_points = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
        places = torch.searchsorted(self._code_points, code_points).clamp(max=self.vocab_size - 1)
        if not torch.equal(self._code_points[places], code_points.long()):
            raise UnknownCharacters(names_of(set(text) - set(self.chars)))
        return self._ids[places]

    def decode(self, ids):
        return "".join([self.chars[i] for i in plain(ids)])

    def spec(self):
        return {
            **EMPTY_SPEC,
            "pre_tokenizer": {"type": "Split", "pattern": ANY_CHARACTER, "behavior": "Isolated", "invert": False},
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(self.chars)}, "unk_token": "<unk>"},
        }


ANY_CHARACTER = {"Regex": "[\\s\\S]"}
EMPTY_SPEC = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
}

# ---------------------------------------------------------------------------------------------------------------------
# Bytes


class ByteTokenizer:
    """One token a byte of the text in UTF-8: token 65 is byte 65."""

    vocab_size = 256

    def encode(self, text):
        """Raises UnknownCharacters for half a surrogate pair, which is no character and has no bytes."""
        raw = utf8(text)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else torch.empty(0, dtype=torch.int64)

    def decode(self, ids):
        """Bytes that are no UTF-8, such as the first half of a character, become U+FFFD."""
        return bytes(plain(ids)).decode(errors="replace")

    def spec(self):
        """Byte pairs without a single pair: the alphabet alone."""
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
        return {
            **EMPTY_SPEC,
            "pre_tokenizer": words,
            "decoder": words,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }


def utf8(text):
    """The bytes of a text. Raises UnknownCharacters for half a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UnknownCharacters(names_of({c for c in text if "\ud800" <= c <= "\udfff"})) from None


def byte_letters():
    """The letter that stands for each of the 256 bytes in a tokenizer.json: itself, where it prints (GPT-2's rule)."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


# ---------------------------------------------------------------------------------------------------------------------
# Byte pairs


class LibraryTokenizer:
    """Any tokenizer.json (GPT-2's byte-pair encoding, say), run by Hugging Face's `tokenizers` library."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # some files carry the settings they were trained with
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text):
        """Raises UnknownCharacters for half a surrogate pair, which is no character, and UserError for a text that the
        library has no tokens for."""
        utf8(text)
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library has no kind of its own
            raise UserError(f"the tokenizer has no tokens for {text!r:.60} ({first_line(error)})") from None
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids):
        return self._tokenizer.decode(plain(ids), skip_special_tokens=False)

    def spec(self):
        return json.loads(self._tokenizer.to_str())


def library(purpose):
    """The package `tokenizers`. Raises UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", purpose) from None
    return tokenizers


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019, 2.2) with vocab_size tokens.

    texts: an iterator of strings, of which the first MOST_CHARACTERS are counted. It begins with the 256 bytes, then
    makes the pair of neighbours that is most frequent one token, again and again. Where no pair comes twice it stops
    with fewer.
    """
    tokenizers = library("--tokenizer bpe")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # no pair spans two words
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(_sentences(texts), trainer)
    return LibraryTokenizer(bpe)


def spread(texts, characters):
    """The texts to train byte pairs on. characters: how many all of them have together; where that is more than
    MOST_CHARACTERS, only every second text is taken, say, or every tenth."""
    every = max(1, math.ceil(characters / MOST_CHARACTERS))
    return (text for i, text in enumerate(texts) if i % every == 0)


def _sentences(texts):
    left = MOST_CHARACTERS
    for text in texts:
        text = text[:left]
        yield from (text[i : i + SENTENCE] for i in range(0, len(text), SENTENCE))
        left -= len(text)
        if left == 0:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Which one, by name


def check_name(name):
    """Raises UserError where a name is none of KINDS, before a long text is read for it."""
    kind, _, number = name.partition(":")
    if kind == "bpe":
        if not number.isdecimal() or len(number) > 8 or not 256 <= int(number) <= 10_000_000:
            raise UserError(f"--tokenizer {name}: wants bpe: and a number of tokens of at least 256, as in bpe:4096")
        library(f"--tokenizer {name}")
    elif name not in ("chars", "bytes", "gpt2") and not os.path.exists(name):
        raise UserError(f"--tokenizer {name}: there is no such thing; give {KINDS}")


def make_tokenizer(name, chars, texts):
    """The tokenizer of a --tokenizer NAME, which check_name found good, for a text. Raises UserError.

    chars: a function that returns the set of all characters of the text. texts: one that returns an iterator of
    strings, the parts of the text to train on.
    """
    if name == "chars":
        return CharTokenizer(sorted(chars()))
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("bpe:"):
        return train_bpe(texts(), int(name[4:]))
    if name == "gpt2":
        from checkpoint import find_on_hub  # here, as checkpoint.py itself reads tokenizers

        try:
            path = find_on_hub("gpt2", [FILE])
        except UserError as error:
            raise UserError(f"--tokenizer {error}") from None
    else:
        path = name
    tokenizer = load_tokenizer(path) if os.path.isdir(path) else _read_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"--tokenizer {name}: there is no {FILE} in {path}; give {KINDS}")
    remedy = "use a byte-level one, such as bpe:4096"
    if isinstance(tokenizer, CharTokenizer):
        missing = chars() - set(tokenizer.chars)
        if missing:
            raise UserError(f"--tokenizer {name}: has no token for the character(s) {names_of(missing)}; {remedy}")
        return tokenizer
    added = [f"a {token['content']} b" for token in tokenizer.spec()["added_tokens"]]  # some swallow spaces
    for text in (next(iter(texts()), "")[:10_000], *HARD_TEXTS, *added):
        try:
            back = tokenizer.decode(tokenizer.encode(text).repeat(2))  # a text is encoded in pieces
        except Exception:  # the library's, for a word that has no token
            back = ""
        twice = text * 2
        if back != twice:
            at = next((i for i, pair in enumerate(zip(twice, back)) if len(set(pair)) > 1), min(len(twice), len(back)))
            words = f"{twice[at : at + 8]!a} becomes {back[at : at + 8]!a}"
            raise UserError(f"--tokenizer {name}: changes the text ({words}); {remedy}")
    return tokenizer


# Only a tokenizer that says any text gives these back.
HARD_TEXTS = (
    # Every byte that UTF-8 has: characters of one byte, of two, and then the first with each byte to begin with.
    "".join(map(chr, [*range(256), *range(256, 2048, 64), 2048, *range(2**12, 2**16, 2**12)]))
    + "".join(map(chr, range(2**16, 17 * 2**16, 2**16))),
    # What normal forms change, and SentencePiece's word mark.
    "e\u0301 \u00e9 \u1100\u1161 \uac00 \ufb01 \uff21 \u212b ½ ß İ \u200b\u200d\ufeff \u2581 東京 👩\u200d👧 🇫🇷",
    "It is n't so , is it ?  don't ' s ! \r\n\r \t\u00a0\u3000\u2028\n\n  7 1,000 Ab AB",
    "  a  ",
    "a",
)


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def load_tokenizer(directory):
    """The tokenizer saved in a model directory, or None where there is none.

    Reads tokenizer.json (ours or any other) or GPT-2's older pair vocab.json and merges.txt.
    """
    path = os.path.join(directory, FILE)
    pair = [os.path.join(directory, name) for name in ("vocab.json", "merges.txt")]
    if os.path.exists(path):
        return _read_tokenizer(path)
    if not all(map(os.path.exists, pair)):
        return None
    tokenizers = library(f"the tokenizer in {directory}")
    try:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*pair))
    except Exception as error:  # the library raises bare Exceptions for a damaged file
        raise UserError(
            f"{directory}: its tokenizer cannot be read ({error}); restore vocab.json and merges.txt"
        ) from None
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return LibraryTokenizer(bpe)


def _read_tokenizer(path):
    """The tokenizer in a tokenizer.json: one of ours, which needs no library, or any other."""
    try:
        with open(path, encoding="utf-8") as f:
            spec = json.load(f)
        model, splitter = spec["model"], spec["pre_tokenizer"] or {}
        if model["type"] == "WordLevel" and splitter.get("pattern") == ANY_CHARACTER:
            chars = sorted(model["vocab"], key=model["vocab"].get)
            if model["vocab"] == {c: i for i, c in enumerate(chars)} and set(map(len, chars)) == {1}:
                return CharTokenizer(chars)
        if spec == ByteTokenizer().spec():
            return ByteTokenizer()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{path}: is not a tokenizer file ({error}); train again or restore it") from None
    tokenizers = library(f"the tokenizer {path}")
    try:
        return LibraryTokenizer(tokenizers.Tokenizer.from_file(path))
    except Exception as error:  # as above
        raise UserError(f"{path}: cannot be read ({error}); train again or restore it") from None


def save_tokenizer(directory, tokenizer, block_size):
    """Write tokenizer.json and the tokenizer_config.json that transformers' AutoTokenizer looks for."""
    write_json(os.path.join(directory, FILE), tokenizer.spec())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    write_json(os.path.join(directory, "tokenizer_config.json"), config)


def tokenizer_hash(tokenizer):
    """What tells apart tokenizers whose tokens mean different things: 64 hexadecimal digits.

    It is of the vocabulary and the merges alone, so that the same tokenizer in another file layout is the same.
    """
    if not hasattr(tokenizer, "_hash"):
        spec = tokenizer.spec()
        vocab, merges = spec["model"].get("vocab"), spec["model"].get("merges", [])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        added = sorted([t["id"], t["content"]] for t in spec["added_tokens"] if t["content"] not in vocab)
        content = json.dumps([vocab, merges, added], sort_keys=True)
        tokenizer._hash = hashlib.sha256(content.encode()).hexdigest()
    return tokenizer._hash


# ---------------------------------------------------------------------------------------------------------------------
# For writing


def prompt_tokens(tokenizer, prompt):
    """The prompt as (1, T) int64 with T >= 1: an empty one becomes a line break (or the first token there is)."""
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        with contextlib.suppress(UserError):
            ids = tokenizer.encode("\n")
    if len(ids) == 0:
        ids = torch.zeros(1, dtype=torch.int64)
    return ids[None]


def whole_characters(tokenizer, text):
    """A text that a tokenizer has decoded, without the half of a character that its last tokens may be."""
    return text if isinstance(tokenizer, CharTokenizer) else text.rstrip("\ufffd")
