"""Text -> tokens -> batches.

    data = load_data("input.txt")          # reads the text, builds the tokenizer, splits train | val
    x, y = data.batches(64, 256, seed=1).batch(step=0)     # two (64, 256) tensors; y is x shifted by one

A text too large for memory is tokenized onto the disk first, and then read from there:

    python data.py prepare "pages/*.jsonl" tokens --tokenizer bpe:32000         # then: python train.py --data tokens
    python data.py check tokens                                                 # is all of it as it was written?

Three rules hold everywhere, so that every number in this project can be compared with every other:
- the validation split is the last tenth of the text, counted in characters;
- the validation loss is over the whole of it (where that takes more than --eval_iters batches, over so many, spread
  evenly), in non-overlapping windows, in nats per token (`validation_loss`);
- which windows a training step sees depends on the seed and the step alone, so a resumed run sees what it would have.
"""

import utils  # first: Ctrl-C while PyTorch is loading is then no traceback  # noqa: F401

# isort: split
import hashlib
import math
import shlex
from dataclasses import dataclass
from typing import Optional

import torch

from corpus import in_splits, pieces, progress_bar, read, size_of
from distributed import ALONE
from shards import SHARD_TOKENS, holds_prepared, is_prepared, open_prepared, prepare
from tokenizer import KINDS, OtherTokenizer, check_name, make_tokenizer, spread, tokenizer_hash
from utils import UserError, argument, memory_of, option, parse_options, run_command

# ---------------------------------------------------------------------------------------------------------------------
# The two splits

# Bytes of memory that loading takes for each byte of a text. Measured: 2.2 for ASCII, and 6.2 where there are emoji (a
# string with one takes 4 bytes a character) and so many different characters that a token takes 2.
BYTES_A_BYTE = 7


@dataclass
class TextData:
    """A text in tokens: train (N,) and val (M,), in the smallest integer type that holds them, or Shards on a disk.

    A model wants int64: `batches` gives it that, and of a part of your own, `data.train[:8].long()` does.
    """

    train: torch.Tensor
    val: torch.Tensor
    tokenizer: object
    val_bytes: int  # length of the val text in UTF-8
    fingerprint: str  # of the text: a run is only ever resumed on the text it began with

    @property
    def nbytes(self):
        """Bytes of memory that the tokens take for good. Those on a disk count nothing: the system drops pages."""
        return sum(t.numel() * t.element_size() for t in (self.train, self.val) if isinstance(t, torch.Tensor))

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


def load_text(source, field="text"):
    """The whole text of a source: a UTF-8 text file, or what else corpus.py reads. Raises UserError."""
    return "".join(_load_pieces(source, field))


def _load_pieces(source, field):
    """The text in pieces: as one string, a single emoji in it would make each of its characters take four bytes."""
    try:
        check_size(source)
        with progress_bar(size_of(source), "reading", "B") as bar:
            found = list(pieces(read(source, field, bar.update)))
    except UserError as error:
        raise UserError(f"--data {error}") from None
    if not found:
        raise UserError(f"--data {source}: is empty; give a UTF-8 text file")
    if any("\r\n" in piece for piece in found):
        print(f"--data {source}: has Windows' line ends, of two characters, which stay so (dos2unix makes them one)")
    return found


def load_data(source, tokenizer=None, field="text"):
    """Read a text, tokenize it and split off the last tenth; or open one that was prepared.

    tokenizer: a name (tokenizer.KINDS), or a tokenizer. None: characters, or what the text was prepared with. Raises
    UserError.
    """
    if is_prepared(source):
        return load_prepared(source, tokenizer)
    tokenizer = "chars" if tokenizer is None else tokenizer
    if isinstance(tokenizer, str):
        check_name(tokenizer)
    whole = _load_pieces(source, field)
    characters = sum(map(len, whole))
    cut = int(0.9 * characters)
    if isinstance(tokenizer, str):

        def texts():
            return spread((text for split, text in in_splits(whole, cut) if split == "train"), cut)

        tokenizer = make_tokenizer(tokenizer, lambda: set().union(*whole), texts)
    V = tokenizer.vocab_size
    dtype = torch.uint8 if V <= 256 else torch.int16 if V <= 32768 else torch.int32
    tokens, val_bytes, sha256 = {"train": bytearray(), "val": bytearray()}, 0, hashlib.sha256()
    for split, text in in_splits(whole, cut):
        raw = text.encode()
        sha256.update(raw)
        val_bytes += len(raw) if split == "val" else 0
        tokens[split] += tokenizer.encode(text).to(dtype).numpy().tobytes()
    train, val = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0) for raw in tokens.values())
    if len(train) < 2 or len(val) < 2:
        raise UserError(
            f"--data {source}: has only {characters} character(s), which make {len(train)} token(s) to train on and "
            f"{len(val)} to validate; give a longer text, of which each has at least 2"
        )
    return TextData(train, val, tokenizer, val_bytes, sha256.hexdigest()[:16])


def load_prepared(source, tokenizer):
    """load_data for a prepared text. Raises OtherTokenizer where it was not prepared with the tokenizer given."""
    try:
        data = TextData(*open_prepared(source))
    except UserError as error:
        raise UserError(f"--data {error}") from None
    if isinstance(tokenizer, str):
        raise UserError(f"--data {source}: is in tokens already; give the text itself")
    if tokenizer is not None and tokenizer_hash(tokenizer) != tokenizer_hash(data.tokenizer):
        raise OtherTokenizer(source)
    if len(data.train) < 2 or len(data.val) < 2:
        raise UserError(f"--data {source}: has too few tokens to train on; prepare a longer text")
    return data


def check_size(source):
    """Raises UserError where a text is too large to be read into this machine's memory."""
    size, memory = size_of(source) or 0, memory_of(torch.device("cpu"))
    if memory is not None and size * BYTES_A_BYTE > memory:
        raise UserError(
            f"{source}: has {size / 2**30:.1f} GiB, more than fits in this machine's memory while it is "
            f"tokenized; prepare it first: python data.py prepare {shlex.quote(source)} tokens --tokenizer bpe:32000"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


MOST_SHUFFLED = 2**22  # windows whose order is kept in memory, 32 MiB of it


def windows(tokens, starts, length):
    """The `length` tokens from each of starts (n,) on: (n, length) int64."""
    if isinstance(tokens, torch.Tensor):
        return tokens[starts[:, None] + torch.arange(length)].long()
    return tokens.windows(starts, length)


class Batches:
    """Training windows, shuffled without replacement.

    Each epoch cuts the tokens into windows of block_size behind a random offset and deals them in random order. Both
    depend on the seed and the number of the epoch alone, so `batch(step)` is a pure function, with no state to save.

    tokens: a tensor (N,), or the Shards of a text on the disk.
    """

    def __init__(self, tokens, batch_size, block_size, seed):
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)  # one fewer leaves room for the offset
        self._epoch, self._offset, self._order = None, None, None

    def _starts(self, epoch, first, count):
        """Where the windows dealt from `first` on begin in this epoch: `count` of them, or what is left, int64."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            room = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            self._epoch, self._offset = epoch, torch.randint(room + 1, (1,), generator=generator)
            if self.windows_per_epoch <= MOST_SHUFFLED:
                self._order = torch.randperm(self.windows_per_epoch, generator=generator)
            else:
                self._order = LargePermutation(self.windows_per_epoch, generator)
        return self._offset + self._order[first : first + count] * self.block_size

    def batch(self, step, device="cpu", processes=ALONE):
        """The inputs and targets of training step `step`: two (batch_size, block_size) int64 tensors on the device.

        Of several processes each gets its own share, in order: (batch_size / processes.world, block_size).
        """
        starts, first = [], step * self.batch_size
        while sum(map(len, starts)) < self.batch_size:  # a batch may span the end of an epoch
            epoch, k = divmod(first + sum(map(len, starts)), self.windows_per_epoch)
            missing = self.batch_size - sum(map(len, starts))
            starts.append(self._starts(epoch, k, missing))
        starts = torch.cat(starts).chunk(processes.world)[processes.rank]
        tokens = windows(self.tokens, starts, self.block_size + 1)  # (batch_size, block_size + 1)
        if torch.device(device).type == "cuda":  # pinned memory is copied while both sides go on with their work
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        tokens = tokens.to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class LargePermutation:
    """The numbers below n in random order, `order[a:b]` as a tensor, without ever holding them all.

    A Feistel network (Luby & Rackoff 1988) puts the numbers of 2k bits in another order: the upper half is xored with a
    hash of the lower one, then they change places, in each of several rounds. What lands at n or above goes through it
    again until it lands below (Black & Rogaway 2002, cycle walking), which keeps it one to one.
    """

    ROUNDS = 6

    def __init__(self, n, generator):
        self.n, self.bits = n, max(1, (n - 1).bit_length() + 1 >> 1)  # 2 ** (2 * bits) is at most 4 n
        self.keys = torch.randint(2**62, (self.ROUNDS,), generator=generator).tolist()

    def __getitem__(self, where):
        begin, end, _ = where.indices(self.n)
        numbers = self._once(torch.arange(begin, end))
        while (outside := numbers >= self.n).any():
            numbers[outside] = self._once(numbers[outside])
        return numbers

    def _once(self, numbers):
        mask = (1 << self.bits) - 1
        upper, lower = numbers >> self.bits, numbers & mask
        for key in self.keys:
            mixed = (lower + key) * 0x9E3779B97F4A7C1  # wraps around; the upper bits of the product depend on all
            upper, lower = lower, upper ^ ((mixed ^ (mixed >> 29)) >> 32 & mask)
        return upper << self.bits | lower


# ---------------------------------------------------------------------------------------------------------------------
# The validation loss


class ValidationBatches:
    """Non-overlapping windows of tokens (M,): a sequence of pairs (x, y), each (n, T) int64 with n <= batch_size.

    T = block_size, but for the last window, which may be shorter and comes alone. Every token but the first is a target
    exactly once. A pair is read when it is asked for.
    """

    def __init__(self, tokens, block_size, batch_size):
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.whole = (len(tokens) - 1) // block_size  # windows of block_size
        self.rest = len(tokens) - 1 - self.whole * block_size  # targets in the last, shorter one

    def __len__(self):
        return math.ceil(self.whole / self.batch_size) + (self.rest > 0)

    def __getitem__(self, i):
        first = i * self.batch_size  # window
        n, T = min(self.batch_size, self.whole - first), self.block_size
        if n <= 0:
            first, n, T = self.whole, 1, self.rest
        begin = first * self.block_size
        tokens = self.tokens[begin : begin + n * T + 1].long()
        return tokens[:-1].view(n, T), tokens[1:].view(n, T)


@torch.no_grad()
def validation_loss(model, tokens, batch_size, max_batches=None, device="cpu", progress=iter, processes=ALONE):
    """Mean cross-entropy of `model(x, y) -> (logits, loss)` over the tokens, in nats per token.

    Over all of them, or, where that takes more than max_batches batches, over that many, spread evenly. The model's
    training mode (dropout) is switched off meanwhile. Several processes take turns, a batch each, and all return the
    same. `progress` may wrap the list of turns in a progress bar.
    """
    batches = ValidationBatches(tokens, model.config.block_size, batch_size)
    n = min(max_batches or len(batches), len(batches))
    was_training = model.training
    model.eval()
    losses, count = [], 0
    for turn in progress(range(0, n, processes.world)):
        mine = turn + processes.rank
        counts = mine < n  # else it computes another's batch, as the parts of a sharded model need each other
        x, y = batches[(mine if counts else turn) * len(batches) // n]
        loss = model(x.to(device), y.to(device))[1]  # without the logits, which would stay while the next are made
        losses.append(loss.float() * y.numel() * counts)
        count += y.numel() * counts
    model.train(was_training)
    total = float(torch.stack(losses).cpu().double().sum())  # on the CPU, as an Apple GPU has no float64
    return processes.sum(total) / processes.sum(count)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class PrepareOptions:
    """Every argument of `data.py prepare`: its type, its default and its line of help."""

    source: str = argument("the text: what --data of train.py takes")
    out: str = argument("the directory to write; one that was begun is gone on with")
    tokenizer: str = option("chars", KINDS)
    field: str = option("text", "field of .jsonl files, or column of tables, with the text")
    processes: Optional[int] = option(None, "processes that tokenize (default: one a core)", at_least=1, below=1000)
    shard_tokens: int = option(SHARD_TOKENS, "tokens in a file, about", at_least=1)


@dataclass
class CheckOptions:
    """Every argument of `data.py check`."""

    out: str = argument("the prepared directory")


def main(argv):
    command, arguments = (argv[0], argv[1:]) if argv else (None, [])
    if command == "prepare":
        options, _ = parse_options(PrepareOptions, arguments, "Tokenize a text onto the disk.", "data.py prepare")
        return prepare_text(options)
    if command == "check":
        options, _ = parse_options(CheckOptions, arguments, "Verify a prepared text.", "data.py check")
        return describe(options.out)
    if command in ("-h", "--help"):
        print("usage: data.py prepare SOURCE OUT [--tokenizer NAME] ...\n       data.py check OUT\n")
        print("Prepare a text that is too large for memory; --help after a command tells more.")
        return 0
    raise UserError(f"{command or 'no command'}: give prepare or check; --help tells more")


def prepare_text(options):
    """Prepare as the options say. Returns the exit status."""
    o = options
    if not o.out:
        raise UserError("OUT: is empty; name a directory")
    try:
        prepare(o.source, o.out, o.tokenizer, o.field, o.processes, o.shard_tokens)
    except OSError as error:
        kept = "what is finished is kept, the same command goes on"
        remedy = kept if holds_prepared(o.out) else "name another directory"
        raise UserError(f"{o.out}: cannot be written ({error.strerror}); {remedy}") from None
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, the same command goes on")
        return 130
    describe(o.out)
    print(f"train on it with: python train.py --data {shlex.quote(o.out)}")
    return 0


def describe(directory):
    """Verify a prepared text and say what it holds. Returns the exit status."""
    train, val, tokenizer, val_bytes, _ = open_prepared(directory)
    print(
        f"{directory}: whole; {len(train):,} tokens to train on, {len(val):,} to validate ({val_bytes:,} bytes), "
        f"{tokenizer.vocab_size:,} in the vocabulary"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
