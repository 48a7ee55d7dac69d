"""Where a text comes from: files, directories, tables and datasets, read part by part.

    for part in read("books/*.txt"): ...       # strings of at most some megabytes, which joined are the text

    notes.txt               a UTF-8 text file, as it is (any name that does not end in one of the others)
    pages.jsonl             a JSON object in each line, of which a field is the text of a document
    pages.parquet           a table, of which a column is the same (needs pyarrow)
    a directory             all .txt, .jsonl and .parquet files in it, in the order of their names, but for the
                            metrics.jsonl of a run that train.py made there
    a glob                  all files that it matches, the same
    hf:NAME, hf:NAME:CONFIG a Hugging Face dataset, by name or the directory it lies in (needs datasets)

The text of many documents is one after another, in order, with a line break between; empty ones are left out. Whatever
the size of the source, only a part of it is in memory. What is wrong with it is told with the file and the place.
"""

import codecs
import glob
import json
import os
import sys

from tqdm import tqdm

from utils import UserError, first_line, missing_extra

KINDS = (".txt", ".jsonl", ".parquet")
BLOCK = 2**20  # bytes that are read at once
ROWS = 256  # rows of a table that are read at once
PIECE = 2**18  # characters that are tokenized at once, for each of which that takes some hundred bytes


def read(source, field="text", count=lambda n: None):
    """The text of a source, in parts: yields strings, which joined are the text.

    count(n) is called as the text is read, with the bytes of the source that were passed. Raises UserError.
    """
    began = False
    for document in _documents(source, field, count):
        first = True
        for part in document:
            if part:
                if began and first:
                    yield "\n"
                yield part
                began, first = True, False


def _documents(source, field, count):
    """The documents of a source, each an iterator of strings."""
    if source.startswith("hf:"):
        yield from (iter((text,)) for text in _read_dataset(source, field))
        return
    for path in find_files(source):
        if path.lower().endswith(".jsonl"):
            yield from (iter((text,)) for text in _read_jsonl(path, field, count))
        elif path.lower().endswith(".parquet"):
            yield from (iter((text,)) for text in _read_parquet(path, field, count))
        else:
            yield _read_text(path, count)


def find_files(source):
    """The files of a source that is a file, a directory or a glob, in the order in which they are read."""
    if os.path.isdir(source):
        found = []
        for directory, below, names in os.walk(source, onerror=_refuse_directory):
            below[:] = sorted(name for name in below if not name.startswith("."))
            names = [name for name in names if name.lower().endswith(KINDS) and name[0] != "."]
            found += [os.path.join(directory, name) for name in names]
        found = [path for path in found if os.path.isfile(path) or not os.path.exists(path)]  # no pipes: they may wait
        found.sort(key=lambda path: path.split(os.sep))
    elif os.path.lexists(source) or not glob.has_magic(source):
        return [source]
    else:
        found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    found = [path for path in found if not _is_record(path)]
    if not found:
        raise UserError(f"{source}: holds no text; give a file, or where .txt, .jsonl or .parquet files are")
    return found


def _is_record(path):
    """Is this what a run has measured (checkpoint.py)? Its own out_dir may lie among the texts that it reads."""
    directory, name = os.path.split(path)
    return name == "metrics.jsonl" and os.path.exists(os.path.join(directory, "run.lock"))


def size_of(source):
    """The bytes of the files of a source; None for a dataset, of which nobody knows."""
    if source.startswith("hf:"):
        return None
    return sum(os.path.getsize(path) for path in find_files(source) if os.path.exists(path))


def progress_bar(total, words, unit, initial=0):
    """A bar with an ETA, for what takes seconds: it appears after one, and leaves nothing behind."""
    return tqdm(
        total=total,
        initial=initial,
        desc=words,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        delay=1,
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,  # rarely where the output goes to a file
    )


# ---------------------------------------------------------------------------------------------------------------------
# One file


def _open(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _blocks(path, read):
    """What read(f) gives of the file at path, again and again, up to the empty one at its end."""
    with _open(path) as f:
        block = None
        while block != b"":
            try:
                block = read(f)
            except OSError as error:
                raise _unreadable(path, error) from None
            yield block


def _refuse_directory(error):
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); allow it, or move it elsewhere")


def _unreadable(path, error):
    return UserError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file")


def _read_text(path, count):
    """The text of a UTF-8 file, in parts. A byte order mark at its beginning is no part of it."""
    offset, rest = 0, b""  # of the file before `rest`, bytes that may be the first half of a character
    for block in _blocks(path, lambda f: f.read(BLOCK)):
        if offset == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path}: is UTF-16, which some editors call Unicode; save it as UTF-8")
        if b"\0" in block:
            place = offset + len(rest) + block.index(0)
            raise UserError(f"{path}: is a binary file (a zero byte at offset {place}); give a UTF-8 text file")
        raw = rest + block
        if offset == 0 and raw.startswith(codecs.BOM_UTF8):
            raw, offset = raw[3:], 3
        try:
            text, used = codecs.utf_8_decode(raw, "strict", not block)
        except UnicodeDecodeError as error:
            place = offset + error.start
            raise UserError(
                f"{path}: is not UTF-8 (byte {place}); convert it to UTF-8 first, such as: iconv -f latin1 -t utf-8"
            ) from None
        offset, rest = offset + used, raw[used:]
        count(len(block))
        yield text


def _read_jsonl(path, field, count):
    """A field of the JSON object in each line."""
    for number, line in enumerate(_blocks(path, lambda f: f.readline()), 1):
        count(len(line))
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: is not UTF-8 (byte {error.start} of the line); convert the file to UTF-8 first"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}: is not JSON ({error.msg}: column {error.colno}), it may be cut off; correct or remove it"
            ) from None
        except (ValueError, RecursionError):
            raise UserError(f"{place}: has a number too long or brackets too deep; correct or remove it") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: is no JSON object; each line is to be one, with the text in a field")
        yield _text_of(record, field, place)


def _text_of(record, field, place):
    """A field of a document; "" where it is null. Raises UserError."""
    if field not in record:
        raise UserError(f"{place}: has no field '{field}' but {_names(record)}; name the one with the text: --field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{place}: its field '{field}' is no text but {text!r:.60}; name another one: --field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: holds {text[error.start]!a}, which is no character; correct or remove it") from None
    return text


def _names(names):
    names = list(names)
    return (", ".join(f"'{name}'" for name in names[:8]) + (" ..." if len(names) > 8 else "")) or "none"


def _read_parquet(path, field, count):
    """A column of a table, a few rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", f"{path}") from None
    faults = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    remedy = "write or download it again"
    with _open(path) as f:
        try:
            table = pyarrow.parquet.ParquetFile(f, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True)
        except faults as error:
            raise UserError(f"{path}: is truncated or no parquet file ({_first_line(error)}); {remedy}") from None
        if field not in table.schema_arrow.names:
            columns = _names(table.schema_arrow.names)
            raise UserError(f"{path}: has no column '{field}' but {columns}; name the one with the text: --field")
        groups = table.num_row_groups
        for group in range(groups):
            rows, place = 0, f"{path}, row group {group + 1} of {groups}"
            try:
                for batch in table.iter_batches(ROWS, row_groups=[group], columns=[field], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        rows += 1
                        yield _text_of({field: text}, field, f"{place}, row {rows}")
            except faults as error:
                raise UserError(f"{place}, after row {rows}: cannot be read ({_first_line(error)}); {remedy}") from None
            count(os.path.getsize(path) // groups)


def _first_line(error):
    return (first_line(error) or type(error).__name__)[:150]


# ---------------------------------------------------------------------------------------------------------------------
# A dataset


def _read_dataset(source, field):
    """A field of each row of the train split of a Hugging Face dataset.

    A dataset by name is downloaded once, into the library's cache, which is mapped into memory, not loaded.
    """
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", source) from None
    name, config = source[3:], None
    if not os.path.isdir(name) and ":" in name:
        name, _, config = name.rpartition(":")
    saved = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves behind
    try:
        if any(os.path.exists(os.path.join(name, file)) for file in saved):
            found = datasets.load_from_disk(name)
        else:
            if not os.path.isdir(name):
                _look_for_the_hub(datasets)
            found = datasets.load_dataset(name, config, streaming=os.path.isdir(name))
        if isinstance(found, dict) and "train" not in found:
            raise UserError(f"{source}: has no split 'train' but {_names(found)}; save the one to train on by itself")
        rows = found["train"] if isinstance(found, dict) else found
        for number, row in enumerate(rows, 1):
            yield _text_of(row, field, f"{source}, row {number}")
    except (UserError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:  # no connection, no such name, no such config: each library below has errors of its own
        raise UserError(
            f"{source}: cannot be read ({type(error).__name__}: {_first_line(error)}); check the name and the "
            f"connection, or give the directory that it lies in"
        ) from None


def _look_for_the_hub(datasets):
    """Tell Hugging Face's libraries that they are offline where they are: they then look into their cache at once.

    Left alone they ask six times, for half a minute or more, and print each failure.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # each version has other classes for it
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


# ---------------------------------------------------------------------------------------------------------------------
# Pieces to tokenize


def pieces(parts, size=PIECE):
    """Regroup the parts of a text into pieces of at most size characters: yields strings, which joined are the text.

    They are cut between two words, so that byte-pair encoding finds the same tokens as in the text as a whole, unless
    half a piece has no such place. Where they are cut depends on the text and size alone, not on the parts.
    """
    waiting, length = [], 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length <= size + 1:  # the character after a cut is looked at too
            continue
        text, begin = "".join(waiting), 0
        while len(text) - begin > size + 1:
            end = _cut(text, begin + size // 2, begin + size)
            yield text[begin:end]
            begin = end
        waiting, length = [text[begin:]], len(text) - begin
    while length > size:
        text = "".join(waiting)
        end = _cut(text, size // 2, size)
        yield text[:end]
        waiting, length = [text[end:]], len(text) - end
    if length:
        yield "".join(waiting)


def in_splits(texts, cut):
    """("train", text) or ("val", text) of each of the strings, of which character `cut` of all begins val.

    The one that holds it is divided.
    """
    at = 0
    for text in texts:
        here = min(max(0, cut - at), len(text))
        at += len(text)
        if here > 0:
            yield "train", text[:here]
        if here < len(text):
            yield "val", text[here:]


def _cut(text, low, high):
    """The last place from low + 1 to high, high < len(text), at which a text is best cut.

    GPT-2's rule puts a space with the word after it, and keeps spaces that follow each other together. So the best is
    behind a single line break, the next best before a single space.
    """
    for sign, behind in (("\n", 1), (" ", 0)):
        place = text.rfind(sign, low + 1 - behind, high + 1 - behind)
        while place > 0:
            if not text[place - 1].isspace() and not text[place + 1 : place + 2].isspace():
                return place + behind
            place = text.rfind(sign, low + 1 - behind, place)
    return high
