"""corpus.py: each kind of source gives its text exactly, and what is wrong with it is told with the file and place."""

import contextlib
import errno
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
from checkpoint import METRICS, Lock
from corpus import pieces, read
from plan import make_directory
from tokenizer import train_bpe
from train import TrainOptions
from utils import UserError

DOCUMENTS = ["The miller said:\n  naïve", "東京 🙂", "", "the end\n"]
JOINED = "The miller said:\n  naïve\n東京 🙂\nthe end\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(documents, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents))


def parquet(path, documents, field="text", **settings):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), field: documents}), path, **settings)
    return str(path)


def text_of(source, field="text"):
    return "".join(read(str(source), field))


def refused(source, *words, field="text"):
    with pytest.raises(UserError) as error:
        text_of(source, field)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------------------
# Each kind of source


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), block=st.integers(1, 9))
def test_a_text_file_comes_back_whatever_the_blocks_it_is_read_in(tmp_path_factory, text, block):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    kept, corpus.BLOCK = corpus.BLOCK, block
    try:
        assert text_of(path) == text
    finally:
        corpus.BLOCK = kept


def test_the_documents_of_every_kind_are_joined_by_a_line_break(tmp_path):
    for i, text in enumerate(DOCUMENTS):
        write(tmp_path / "texts" / f"{i}.txt", text)
    sources = [tmp_path / "texts", tmp_path / "texts" / "*.txt", tmp_path / "texts" / "*"]
    sources += [write(tmp_path / "a.jsonl", jsonl(DOCUMENTS)), parquet(tmp_path / "a.parquet", DOCUMENTS)]
    sources += [parquet(tmp_path / "b.parquet", DOCUMENTS, row_group_size=1)]
    for source in sources:
        assert text_of(source) == JOINED, source


def test_a_directory_is_read_with_what_is_below_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "2.jsonl", jsonl(["a2", "a2'"]))
    write(tmp_path / "a" / "10.txt", "a10")
    parquet(tmp_path / "c.parquet", ["c"])
    write(tmp_path / "notes.md", "left out")
    write(tmp_path / ".hidden" / "a.txt", "left out")
    assert text_of(tmp_path) == "a10\na2\na2'\nb\nc"
    assert text_of(tmp_path / "**" / "*.txt") == "a10\nb"


def test_what_a_run_among_the_texts_has_measured_is_no_text(tmp_path):
    write(tmp_path / "a.txt", "a")
    with Lock() as lock:
        make_directory(TrainOptions(out_dir=str(tmp_path / "out")), lock)
        write(tmp_path / "out" / METRICS, '{"step": 1}\n')
        for source in (tmp_path, tmp_path / "**" / "[am]*"):
            assert text_of(source) == "a", source
    refused(tmp_path / "out", "holds no text")
    write(tmp_path / "other" / METRICS, jsonl(["b"]))  # of no run
    assert text_of(tmp_path) == "a\nb"
    refused(tmp_path / "out" / METRICS, "has no field 'text'")  # asked for by name


def test_another_field_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(DOCUMENTS, "content"))
    assert text_of(path, "content") == JOINED
    assert text_of(parquet(tmp_path / "a.parquet", DOCUMENTS, "content"), "content") == JOINED
    refused(path, "a.jsonl, line 1: has no field 'text' but 'id', 'content'", "--field")


def test_empty_lines_and_nulls_are_no_documents(tmp_path):
    assert text_of(write(tmp_path / "a.jsonl", '\n{"text": "a"}\n  \n{"text": null}\n{"text": "b"}')) == "a\nb"
    assert text_of(parquet(tmp_path / "a.parquet", ["a", None, "b"])) == "a\nb"


def test_what_was_read_is_counted(tmp_path):
    sources = [write(tmp_path / "a.txt", "abc" * 1000), write(tmp_path / "a.jsonl", jsonl(["abc"] * 1000))]
    sources += [parquet(tmp_path / "a.parquet", ["abc"] * 1000, row_group_size=100)]
    for source in sources:
        counts = []
        for _ in read(source, count=counts.append):
            pass
        assert sum(counts) == pytest.approx(corpus.size_of(source), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# A dataset


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_dataset_saved_to_disk_is_read(datasets, tmp_path):
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": [1, 2, 3, 4]})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits"):
        assert text_of(f"hf:{tmp_path / name}") == JOINED
    refused(f"hf:{tmp_path / 'one'}", "row 1: has no field 'body' but 'text', 'n'", field="body")


def test_a_dataset_in_a_directory_of_its_files_is_read(datasets, tmp_path):
    parquet(tmp_path / "train-0.parquet", DOCUMENTS[:2])
    parquet(tmp_path / "train-1.parquet", DOCUMENTS[2:])
    assert text_of(f"hf:{tmp_path}") == JOINED


def test_a_dataset_without_a_train_split_is_refused(datasets, tmp_path):
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(str(tmp_path))
    refused(f"hf:{tmp_path}", "has no split 'train' but 'test'")


def test_a_dataset_that_cannot_be_had_is_refused(datasets):
    refused("hf:nobody/nothing-of-this-name", "hf:nobody/nothing-of-this-name: cannot be read", "check the name")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is told with its place


def test_invalid_utf8_in_the_middle_is_told_with_its_byte(tmp_path):
    text = "naïve café 🙂\n".encode() * 200_000  # two blocks and more
    for place in (1, 2**20 - 1, 2**20, 2**20 + 1, len(text) - 1):
        broken = bytearray(text)
        broken[place] = 0xFF
        with pytest.raises(UnicodeDecodeError) as error:
            bytes(broken).decode()
        refused(write(tmp_path / "a.txt", bytes(broken)), f"a.txt: is not UTF-8 (byte {error.value.start})", "convert")


def test_a_zero_byte_in_the_middle_is_told_with_its_place(tmp_path):
    text = bytearray(b"abcdefg\n" * 300_000)
    text[2_000_001] = 0
    refused(write(tmp_path / "a.txt", bytes(text)), "a.txt: is a binary file (a zero byte at offset 2000001)")


LINES = [
    (b'{"text": "a"', "is not JSON (Expecting ',' delimiter: column 13), it may be cut off"),
    (b'{"text": "a', "is not JSON (Unterminated string"),
    (b"[1]", "is no JSON object"),
    (b'{"body": 1}', "has no field 'text' but 'body'"),
    (b"{}", "has no field 'text' but none"),
    (b'{"text": 7}', "its field 'text' is no text but 7"),
    (b'{"text": ["a"]}', "its field 'text' is no text but ['a']"),
    (b'{"text": "a\xff"}', "is not UTF-8 (byte 11 of the line)"),
    (b'{"text": "a\\ud800"}', "holds '\\ud800', which is no character"),
    (b"[" * 200_000, "has a number too long or brackets too deep; correct or remove it"),
]
if hasattr(sys, "get_int_max_str_digits"):  # an older Python reads a number of any length
    LINES += [(b'{"text": "a", "id": ' + b"7" * 5000 + b"}", "has a number too long or brackets too deep; correct")]


@pytest.mark.parametrize("line, words", LINES, ids=[words for _, words in LINES])
def test_a_bad_line_of_jsonl_is_told_with_its_number(tmp_path, line, words):
    good = b'{"text": "good"}\n'
    refused(write(tmp_path / "a.jsonl", good * 5 + line + b"\n" + good), f"a.jsonl, line 6: {words}")
    refused(write(tmp_path / "a.jsonl", good * 5 + line), f"a.jsonl, line 6: {words}")


def test_a_parquet_file_cut_off_anywhere_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", [f"document {i}" for i in range(2000)], row_group_size=500)
    raw = (tmp_path / "a.parquet").read_bytes()
    for size in (0, 3, 4, 100, len(raw) // 2, len(raw) - 1):
        refused(write(tmp_path / "a.parquet", raw[:size]), path, "is truncated or no parquet file", "again")


def test_a_damaged_row_group_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    documents = [f"document {i} " + "x" * 50 for i in range(2000)]
    parquet(path, documents, row_group_size=500, write_page_checksum=True, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    refused(write(path, bytes(raw)), "a.parquet, row group 3 of 4", "cannot be read", "write or download it again")


def test_a_column_that_is_missing_or_no_text_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", DOCUMENTS)
    refused(path, "a.parquet: has no column 'body' but 'id', 'text'", field="body")
    refused(path, "a.parquet, row group 1 of 1, row 1: its field 'id' is no text but 0", field="id")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_the_disk_does_not_give_is_told_with_its_name(tmp_path, monkeypatch, name):
    class Failing:
        def read(self, n):
            raise OSError(errno.EIO, "Input/output error")

        def readline(self):
            raise OSError(errno.EIO, "Input/output error")

    path = write(tmp_path / name, jsonl(DOCUMENTS))
    monkeypatch.setattr(corpus, "open", lambda *_: contextlib.nullcontext(Failing()), raising=False)
    refused(path, f"{path}: cannot be read (Input/output error)")


@pytest.mark.parametrize("source", ["nowhere.txt", "nowhere.jsonl", "nowhere.parquet"])
def test_a_missing_file_is_refused(source, tmp_path):
    refused(tmp_path / source, f"{source}: cannot be read (No such file or directory)")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_a_directory_is_not_waited_for_and_a_link_to_nothing_is_refused(tmp_path):
    write(tmp_path / "a.txt", "text")
    os.mkfifo(str(tmp_path / "b.txt"))
    assert text_of(tmp_path) == "text"
    (tmp_path / "c.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"c\.txt: cannot be read \(No such file"):
        text_of(tmp_path)


def test_a_directory_that_cannot_be_listed_is_refused_and_not_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "closed" / "b.txt", "text")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        text_of(tmp_path)


def test_a_glob_that_finds_nothing_is_refused(tmp_path):
    refused(tmp_path / "*.txt", "*.txt: holds no text")


@pytest.mark.parametrize("package, source", [("pyarrow", "a.parquet"), ("datasets", "hf:some/set")])
def test_a_missing_package_is_named(package, source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"")
    refused(source, f"{source} needs the package '{package}'; install it with: pip install {package}")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    os.chmod(path, 0)
    refused(path, "cannot be read (Permission denied)")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


WORDS = st.text(alphabet="ab \n\té", max_size=60)


@given(parts=st.lists(WORDS), size=st.integers(1, 20))
def test_pieces_are_the_text_and_bounded(parts, size):
    found = list(pieces(parts, size))
    assert "".join(found) == "".join(parts)
    assert all(1 <= len(piece) <= size for piece in found)


@given(parts=st.lists(WORDS), size=st.integers(1, 20))
def test_where_a_text_is_cut_does_not_depend_on_its_parts(parts, size):
    assert list(pieces(parts, size)) == list(pieces(["".join(parts)], size)) == list(pieces("".join(parts), size))


@pytest.fixture(scope="module")
def byte_pairs():
    return train_bpe(["one miller and another miller\nsaid this and that\n\n  and the other thing\n" * 20], 320)


WORD = st.sampled_from(["miller", "and", "the", "said", "!", "é", "7"])
LINE = st.tuples(WORD, st.sampled_from(" \n"), WORD, st.sampled_from([" ", "\n", "\n\n", "  ", "\t", " \n "])).map(
    "".join
)


@given(text=st.lists(LINE, max_size=40).map("".join))
def test_byte_pairs_of_the_pieces_are_those_of_the_text(byte_pairs, text):
    """Half a piece, 30 characters, always has a single space or line break between two words: the place to cut."""
    found = [token for piece in pieces([text], 60) for token in byte_pairs.encode(piece).tolist()]
    assert found == byte_pairs.encode(text).tolist()
