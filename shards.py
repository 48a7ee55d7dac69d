"""A text too large for memory: tokenized once, onto the disk, and read from there while a model is trained.

    prepare("pages/*.jsonl", "tokens", "bpe:32000")      # python data.py prepare "pages/*.jsonl" tokens --tokenizer ...
    train, val, tokenizer, val_bytes, fingerprint = open_prepared("tokens")
    train[0:100], train.windows(starts, 257)             # tensors of tokens; the rest stays on the disk

A prepared directory holds

    train-00000.bin train-00001.bin ... val-00000.bin ...    the tokens of the two splits, in order
    tokenizer.json  tokenizer_config.json                    the tokenizer
    prepared.json                                            what was prepared, and which shards are finished
    prepare.lock                                             held while `prepare` is at work

A shard is a header of 128 bytes (`Header`) and its tokens, little-endian, two bytes each or, for a vocabulary above
65,536, four. Its checksum stands in the header: `prepare` and `python data.py check` verify it, and so does every run
before its first step. A shard is written beside its place and renamed, so that one that is there is whole.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import struct
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch

from corpus import PIECE, find_files, in_splits, pieces, progress_bar, read, size_of
from tokenizer import FILE, check_name, load_tokenizer, make_tokenizer, save_tokenizer, spread, tokenizer_hash
from utils import UserError, environment_number, sync_directory, write_json

MANIFEST, LOCK = "prepared.json", "prepare.lock"
WRITTEN_FIRST = {MANIFEST, LOCK, FILE, "tokenizer_config.json"}  # before there is a manifest, or as a part of it
MAGIC, VERSION = b"nanoGPT\n", 1
HEADER = struct.Struct("<8sIIQQ32s32s32x")  # 128 bytes
SHARD_TOKENS = 2**26  # 128 MiB of two bytes each: the most that a kill can cost
SMALL = 2**22  # characters that one process tokenizes before another has started
SPLITS = ("train", "val")
KEYS = {"format", "source", "field", "tokenizer_name", "shard_tokens", "files", "characters", "text_sha256"}
KEYS |= {"tokenizer", "vocab_size", "shards", "complete"}  # of a manifest; a complete one has val_bytes too
SHARD_KEYS = {"file", "split", "tokens", "sha256", "end"}  # of each of its shards


# ---------------------------------------------------------------------------------------------------------------------
# One shard


@dataclass
class Header:
    """What stands before the tokens of a shard."""

    itemsize: int  # bytes a token: 2 or 4
    count: int  # tokens
    vocab_size: int
    tokenizer: bytes  # the 32 bytes of tokenizer_hash
    sha256: bytes  # of the tokens' bytes

    def pack(self):
        return HEADER.pack(MAGIC, VERSION, self.itemsize, self.count, self.vocab_size, self.tokenizer, self.sha256)

    @classmethod
    def read(cls, path):
        """The header of the shard at path. Raises UserError where it is none, or its length is not what it says."""
        try:
            with open(path, "rb") as f:
                raw, size = f.read(HEADER.size), os.fstat(f.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {_remedy(path)}") from None
        if len(raw) < HEADER.size or raw[:8] != MAGIC:
            raise UserError(f"{path}: is no shard of tokens, or its beginning is damaged; {_remedy(path)}")
        _, version, *values = HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(f"{path}: has version {version} of the format, not {VERSION}; {_remedy(path)}")
        header = cls(*values)
        expected = HEADER.size + header.itemsize * header.count
        if header.itemsize not in (2, 4) or size != expected:
            raise UserError(f"{path}: has {size:,} bytes in place of {expected:,}; {_remedy(path)}")
        return header


def _remedy(path):
    """How to get a shard back: the command that made it, which makes anew what is damaged."""
    directory = os.path.dirname(path) or "."
    try:
        with open(os.path.join(directory, MANIFEST), encoding="utf-8") as f:
            m = json.load(f)
        words = [m["source"], directory, "--tokenizer", m["tokenizer_name"]]
        words += ["--field", m["field"]] if m["field"] != "text" else []
        words += ["--shard_tokens", str(m["shard_tokens"])] if m["shard_tokens"] != SHARD_TOKENS else []
        command = "python data.py prepare " + " ".join(map(shlex.quote, words))
    except (OSError, ValueError, KeyError, TypeError):
        command = "python data.py prepare SOURCE OUT"
    return f"make it anew with: {command}"


def verify(path, count=lambda n: None):
    """Raises UserError where the tokens of a shard are not those that were written. count(n): bytes read so far."""
    header, sha256 = Header.read(path), hashlib.sha256()
    try:
        with open(path, "rb") as f:
            f.seek(HEADER.size)
            for block in iter(lambda: f.read(2**20), b""):
                sha256.update(block)
                count(len(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_remedy(path)}") from None
    if sha256.digest() != header.sha256:
        raise UserError(f"{path}: is damaged, its checksum does not match; {_remedy(path)}")


def damage(paths):
    """What is wrong with each of these shards: UserErrors, None for one that is whole. Reads on all cores."""

    def found(path):
        try:
            verify(path, bar.update)
        except UserError as error:
            return error

    total = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    with ThreadPoolExecutor() as threads, progress_bar(total, "checking", "B") as bar:
        return list(threads.map(found, paths))


class ShardWriter:
    """Writes one shard: beside its place first, renamed when it is whole. Raises OSError."""

    def __init__(self, path, itemsize, vocab_size, tokenizer):
        self.path, self.header = path, Header(itemsize, 0, vocab_size, tokenizer, bytes(32))
        self.sha256, self.file = hashlib.sha256(), open(f"{path}.tmp", "wb")  # noqa: SIM115
        self.file.write(self.header.pack())

    def add(self, raw):
        """Some more tokens, as the bytes that they are in the file."""
        self.file.write(raw)
        self.sha256.update(raw)
        self.header.count += len(raw) // self.header.itemsize

    def close(self):
        self.header.sha256 = self.sha256.digest()
        self.file.seek(0)
        self.file.write(self.header.pack())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        sync_directory(os.path.dirname(self.path))

    def discard(self):
        self.file.close()
        with contextlib.suppress(OSError):
            os.remove(self.file.name)


# ---------------------------------------------------------------------------------------------------------------------
# Many shards as one text


class Shards:
    """The tokens of shards, one after another, mapped into memory: what is not used takes none."""

    def __init__(self, paths):
        headers = [Header.read(path) for path in paths]
        self.parts = [
            np.memmap(path, dtype=f"<u{h.itemsize}", mode="r", offset=HEADER.size, shape=(h.count,))
            for path, h in zip(paths, headers)
            if h.count
        ]
        self.ends = np.cumsum([len(part) for part in self.parts])  # where in the text each part ends

    def __len__(self):
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, where):
        """A slice of neighbours, as a tensor (n,) int64."""
        begin, end, step = where.indices(len(self))
        if step != 1:
            raise ValueError("shards are read token by token, in order")
        return torch.from_numpy(self._read(begin, max(0, end - begin)))

    def windows(self, starts, length):
        """The `length` tokens from each of starts (n,) on: (n, length) int64."""
        return torch.from_numpy(np.stack([self._read(start, length) for start in starts.tolist()]))

    def _read(self, begin, length):
        out, done = np.empty(length, dtype=np.int64), 0
        k = int(np.searchsorted(self.ends, begin, side="right"))  # the part that holds token `begin`
        while done < length:
            part = self.parts[k]
            at = begin + done - (int(self.ends[k]) - len(part))
            piece = part[at : at + length - done]
            out[done : done + len(piece)] = piece
            done, k = done + len(piece), k + 1
        return out


def holds_prepared(directory):
    """Was a text prepared in this directory, or begun to be?"""
    return os.path.isfile(os.path.join(directory, MANIFEST))


def is_prepared(source):
    """Is this a prepared directory, or shards of one?"""
    return source.endswith(".bin") or holds_prepared(source)


def open_prepared(source):
    """The tokens of a prepared directory. Returns (train, val, tokenizer, val_bytes, fingerprint).

    source: the directory, or a .bin file or a glob of such: then only these are trained on, and the val split is that
    of the directory. Every checksum is verified, by the first process on a machine. Raises UserError where something
    is missing, damaged or does not belong together; the message begins with the path.
    """
    chosen = None
    if source.endswith(".bin"):
        chosen = {os.path.basename(path) for path in find_files(source)}
        directory = os.path.dirname(source) or "."
        if not holds_prepared(directory):
            raise UserError(f"{source}: has no {MANIFEST} beside it, as `python data.py prepare` writes; give the text")
        source = directory
    manifest = _read_manifest(source)
    if not manifest["complete"]:
        raise UserError(f"{source}: is not prepared to the end; {_remedy(os.path.join(source, MANIFEST))}")
    tokenizer = _saved_tokenizer(source)
    if manifest["tokenizer"] != tokenizer_hash(tokenizer):
        raise UserError(f"{os.path.join(source, FILE)}: is not the tokenizer of the shards; put that back")
    paths, sums = {split: [] for split in SPLITS}, []
    for shard in manifest["shards"]:
        path = os.path.join(source, shard["file"])
        header = Header.read(path)
        expected = Header(
            header.itemsize,
            shard["tokens"],
            tokenizer.vocab_size,
            bytes.fromhex(manifest["tokenizer"]),
            bytes.fromhex(shard["sha256"]),
        )
        if header != expected:
            raise UserError(f"{path}: is not the shard that was prepared here; {_remedy(path)}")
        if shard["split"] == "val" or chosen is None or shard["file"] in chosen:
            paths[shard["split"]].append(path)
            sums.append(shard["sha256"])
    if not paths["train"]:
        raise UserError(f"{source}: none of its shards of the train split was chosen; name train-*.bin, or {source}")
    if environment_number("LOCAL_RANK", 0) == 0:
        for error in filter(None, damage(paths["train"] + paths["val"])):
            raise error
    fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()[:16]
    return Shards(paths["train"]), Shards(paths["val"]), tokenizer, manifest["val_bytes"], fingerprint


def _saved_tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"{os.path.join(directory, FILE)}: is missing; {_remedy(os.path.join(directory, FILE))}")
    return tokenizer


def _write_manifest(directory, manifest):
    write_json(os.path.join(directory, MANIFEST), {**manifest, "sha256": _sum(manifest)})


def _sum(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory):
    """What _write_manifest wrote, or what was written before it added a sum. Raises UserError where it is damaged."""
    path = os.path.join(directory, MANIFEST)
    if not os.path.exists(path):
        raise UserError(f"{directory}: holds no prepared text (no {MANIFEST}); name what data.py prepare wrote")
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        if manifest["format"] != VERSION:
            raise UserError(f"{path}: has version {manifest['format']} of the format, not {VERSION}; prepare it anew")
        if manifest.pop("sha256", None) not in (None, _sum(manifest)):
            raise UserError(
                f"{path}: is damaged, its checksum does not match; delete the directory and prepare it anew"
            )
        missing = (KEYS | {"val_bytes"} if manifest["complete"] else KEYS) - set(manifest)
        for shard in manifest["shards"]:
            missing |= SHARD_KEYS - set(shard)
            bytes.fromhex(shard["sha256"]), SPLITS.index(shard["split"])
        if missing:
            raise KeyError(*missing)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); delete the directory and prepare it anew") from None
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def prepare(source, out, tokenizer_name="chars", field="text", processes=None, shard_tokens=SHARD_TOKENS):
    """Tokenize a source into shards in the directory `out`, the last tenth of its characters as the val split.

    It reads the source twice or three times: to measure it, to train byte pairs, and to tokenize. What was finished
    before a kill is kept, and what is damaged made anew. Returns the manifest. Raises UserError and OSError.
    """
    check_name(tokenizer_name)
    wanted = dict(
        source=source, field=field, tokenizer_name=tokenizer_name, shard_tokens=shard_tokens, files=_files(source)
    )
    path, found = os.path.join(out, MANIFEST), None
    if not os.path.exists(path):
        names = os.listdir(out) if os.path.isdir(out) else []
        if any(name.replace(".tmp", "") not in WRITTEN_FIRST for name in names):
            raise UserError(f"{out}: holds other files already; name a new directory")
        found = _measure(source, field, tokenizer_name)
        os.makedirs(out, exist_ok=True)
    with _locked(out):
        manifest = _begun(out, wanted) if os.path.exists(path) else _begin(out, wanted, *found)
        if not manifest["complete"]:
            _tokenize(out, manifest, processes)
    return manifest


@contextlib.contextmanager
def _locked(out):
    """Keeps other processes from preparing a text in the directory; ends with this one, however that ends."""
    from checkpoint import NO_LOCKS, lock_file  # here, as reading shards needs nothing of it

    with open(os.path.join(out, LOCK), "a") as f:
        try:
            lock_file(f)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{out}: another process is preparing a text there; wait for it") from None
        yield


def _begin(out, wanted, measured, tokenizer):
    """The manifest of a text of which nothing is in tokens yet. The tokenizer is saved before it."""
    save_tokenizer(out, tokenizer, 10**6)
    own = dict(tokenizer=tokenizer_hash(tokenizer), vocab_size=tokenizer.vocab_size)
    manifest = dict(format=VERSION, **wanted, **measured, **own, shards=[], complete=False)
    _write_manifest(out, manifest)
    return manifest


def _files(source):
    """[[path, size, time of change]] of each file: what tells whether a source has changed. A dataset: []."""
    if source.startswith("hf:"):
        return []
    stats = [(path, os.stat(path)) for path in find_files(source) if os.path.exists(path)]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _begun(out, wanted):
    """The manifest in `out` of what was begun there, with the shards up to the first damaged one."""
    manifest = _read_manifest(out)
    for name, value in wanted.items():
        if name == "files" and value != manifest[name]:
            raise UserError(f"{wanted['source']}: has changed since {out} was prepared; name a new directory")
        if value != manifest[name]:
            flag = {"tokenizer_name": "--tokenizer", "source": "SOURCE"}.get(name, f"--{name}")
            raise UserError(f"{flag} {value}: {out} was begun with {manifest[name]}; name a new directory")
    if tokenizer_hash(_saved_tokenizer(out)) != manifest["tokenizer"]:
        raise UserError(f"{os.path.join(out, FILE)}: is not the one it was begun with; name a new directory")
    whole = []
    found = damage([os.path.join(out, shard["file"]) for shard in manifest["shards"]])
    for shard, error in zip(manifest["shards"], found):
        if error is None and Header.read(os.path.join(out, shard["file"])).sha256.hex() != shard["sha256"]:
            error = f"{os.path.join(out, shard['file'])}: is another shard"
        if error is not None:
            print(f"{str(error).split(';')[0]}; making it and those after it anew")
            break
        whole.append(shard)
    manifest["complete"] = manifest["complete"] and len(whole) == len(manifest["shards"])
    manifest["shards"] = whole
    return manifest


def _measure(source, field, name):
    """What must be known before the first token: ({characters, text_sha256}, tokenizer)."""
    characters, sha256, chars, size = 0, hashlib.sha256(), set(), size_of(source)
    with progress_bar(size, "reading", "B") as bar:
        for part in read(source, field, bar.update):
            characters += len(part)
            sha256.update(part.encode())
            if name == "chars" or os.path.exists(name):  # the file may be a vocabulary of characters
                chars.update(part)
    if characters < 20:
        raise UserError(f"{source}: has only {characters} character(s); a text needs at least 20 to train on")
    cut = int(0.9 * characters)

    def texts():
        parts = in_splits(pieces(read(source, field), PIECE), cut)
        return spread((text for split, text in parts if split == "train"), cut)

    return dict(characters=characters, text_sha256=sha256.hexdigest()), make_tokenizer(name, lambda: chars, texts)


def _tokenize(out, manifest, processes):
    """Write the shards that are not finished."""
    total, shards = manifest["characters"], manifest["shards"]
    done = shards[-1]["end"] if shards else 0  # characters of the text that are in finished shards
    sha256, val_bytes = hashlib.sha256(), 0

    def texts():
        """What is left to do, as (split, end, text); the whole text is measured on the way."""
        nonlocal val_bytes
        end = 0
        parts = pieces(read(manifest["source"], manifest["field"]), PIECE)
        for split, text in in_splits(parts, int(0.9 * total)):
            raw, end = text.encode(), end + len(text)
            sha256.update(raw)
            val_bytes += len(raw) if split == "val" else 0
            if end > done:
                yield split, end, text

    bar = progress_bar(total, "tokenizing", " characters", done)
    with bar, _TextWriter(out, manifest, done) as writer, _Encoders(out, processes, total - done) as encoders:
        for split, end, raw in encoders.run(texts(), writer.itemsize):
            bar.update(end - writer.end)
            writer.add(split, end, raw)
    if sha256.hexdigest() != manifest["text_sha256"]:
        raise UserError(f"{manifest['source']}: changed while it was read; delete {out} and begin again")
    manifest.update(val_bytes=val_bytes, complete=True)
    _write_manifest(out, manifest)


class _TextWriter:
    """Writes the tokens of a text into shards, and notes each finished one in the manifest. To be used as a context."""

    def __init__(self, out, manifest, end):
        self.out, self.manifest, self.end = out, manifest, end  # end: characters that are in tokens
        self.itemsize = 2 if manifest["vocab_size"] <= 2**16 else 4
        self.shard, self.split = None, None

    def add(self, split, end, raw):
        """The tokens of the text up to character `end`, as bytes. A shard is of one split, and ends where raw does."""
        if self.shard is not None and split != self.split:
            self._finish()
        if self.shard is None:
            number = sum(shard["split"] == split for shard in self.manifest["shards"])
            path = os.path.join(self.out, f"{split}-{number:05d}.bin")
            tokenizer = bytes.fromhex(self.manifest["tokenizer"])
            self.shard, self.split = ShardWriter(path, self.itemsize, self.manifest["vocab_size"], tokenizer), split
        self.shard.add(raw)
        self.end = end
        if self.shard.header.count >= self.manifest["shard_tokens"]:
            self._finish()

    def _finish(self):
        self.shard.close()
        file, h = os.path.basename(self.shard.path), self.shard.header
        self.shard = None
        noted = dict(file=file, split=self.split, tokens=h.count, sha256=h.sha256.hex(), end=self.end)
        self.manifest["shards"].append(noted)
        _write_manifest(self.out, self.manifest)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.shard is not None and error is None:
            self._finish()
        elif self.shard is not None:
            self.shard.discard()


class _Encoders:
    """Processes that tokenize. A small text is done in this one, before another could have started."""

    def __init__(self, directory, processes, characters):
        self.pool, self.directory = None, directory
        self.others = multiprocessing.active_children()  # of whoever called prepare
        self.processes = processes or (os.cpu_count() or 1 if characters > SMALL else 1)
        if os.name == "nt":  # which can wait for no more at a time
            self.processes = min(self.processes, 61)
        if self.processes > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
            self.pool = ProcessPoolExecutor(self.processes, context, _begin_worker, (directory,))

    def run(self, texts, itemsize):
        """(split, end, text) -> (split, end, bytes of tokens), in order; few of them are in memory at a time."""
        if self.pool is None:
            tokenizer = load_tokenizer(self.directory)
            yield from ((split, end, _encode(tokenizer, text, itemsize)) for split, end, text in texts)
            return
        waiting = collections.deque()
        try:
            for split, end, text in texts:
                with _deaf():  # where it starts a process
                    waiting.append((split, end, self.pool.submit(_encode_in_worker, text, itemsize)))
                if len(waiting) > 2 * self.processes:
                    split, end, result = waiting.popleft()
                    yield split, end, result.result()
            while waiting:
                split, end, result = waiting.popleft()
                yield split, end, result.result()
        except BrokenProcessPool:
            raise UserError(
                "--processes: one of them was killed, perhaps for want of memory; the same command with fewer goes on"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.pool is not None:
            if error is not None:  # nobody waits for what they are doing
                for process in multiprocessing.active_children():
                    if process not in self.others:
                        process.terminate()
            self.pool.shutdown()


@contextlib.contextmanager
def _deaf():
    """Ctrl-C does nothing meanwhile, and never anything to processes that are started in it: it is for their parent,
    which ends them. Each of them would show where in the loading of PyTorch it was."""
    heard = threading.current_thread() is threading.main_thread()  # no other thread may change it
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, handler)


def _encode(tokenizer, text, itemsize):
    return tokenizer.encode(text).numpy().astype(f"<u{itemsize}").tobytes()


def _begin_worker(directory):
    """What a process does first: load the tokenizer, use one core, and end with its parent."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as _deaf has it already, but on Windows
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _tokenizer = load_tokenizer(directory)


def _encode_in_worker(text, itemsize):
    return _encode(_tokenizer, text, itemsize)
