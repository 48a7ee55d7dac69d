"""shards.py and `data.py prepare`: a prepared text is the text, read from the disk; a kill costs nothing but time."""

import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import assert_refused, command  # noqa: F401
from test_cli import contents as all_contents

import bigram
import data
import sample
import shards
import tokenizer as tokenizer_module
import train
from corpus import pieces
from data import Batches, load_data, validation_loss
from shards import Shards, is_prepared, open_prepared, prepare, verify
from tokenizer import CharTokenizer, load_tokenizer
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "miller", "of", "Merrow", "said", "naïve", "things", "to", "his", "東京", "cat,", "7", "times", "🙂."]


def make_text(n, seed=1):
    """n characters of words and lines."""
    dice = random.Random(seed)
    return "".join(dice.choice(WORDS) + dice.choice("   \n") for _ in range(n // 4))[:n]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 500 characters, so that a short text has many."""
    monkeypatch.setattr(shards, "PIECE", 500)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(20_000), encoding="utf-8", newline="")
    return str(path)


def contents(directory):
    return {name: (Path(directory) / name).read_bytes() for name in sorted(os.listdir(directory))}


# ---------------------------------------------------------------------------------------------------------------------
# A prepared text is the text


def test_byte_pairs_are_those_of_the_text_in_memory(small_pieces, source, tmp_path, monkeypatch):
    """Where they are learned from some of its parts, too."""
    monkeypatch.setattr(tokenizer_module, "MOST_CHARACTERS", 5000)
    monkeypatch.setattr(data, "pieces", lambda parts: pieces(parts, 500))
    prepare(source, str(tmp_path / "out"), "bpe:300", processes=1)
    on_disk, in_memory = load_data(str(tmp_path / "out")), load_data(source, "bpe:300")
    assert on_disk.tokenizer.spec() == in_memory.tokenizer.spec()
    assert torch.equal(on_disk.train[:], in_memory.train.long())


def test_a_run_does_not_write_over_a_prepared_text(command, out):  # noqa: F811
    before = contents(out)
    for more in ([], ["--fresh"]):
        assert_refused(command(train, "--out_dir", out, *TINY, *more), f"--out_dir {out}: holds a prepared text")
    assert contents(out) == before


@pytest.mark.parametrize("tokenizer", ["chars", "bytes", "bpe:300"])
def test_a_prepared_text_has_the_tokens_of_the_text_in_memory(small_pieces, source, tmp_path, tokenizer):
    prepare(source, str(tmp_path / "out"), tokenizer, processes=1, shard_tokens=3000)
    on_disk, in_memory = load_data(str(tmp_path / "out")), load_data(source, load_tokenizer(str(tmp_path / "out")))
    assert len(on_disk.train.parts) > 2
    assert torch.equal(on_disk.train[:], in_memory.train.long())
    assert torch.equal(on_disk.val[:], in_memory.val.long())
    assert on_disk.val_bytes == in_memory.val_bytes
    assert on_disk.tokenizer.vocab_size == in_memory.tokenizer.vocab_size
    for step in (0, 1, 7, 300):
        for a, b in zip(on_disk.batches(4, 16, 5).batch(step), in_memory.batches(4, 16, 5).batch(step)):
            assert torch.equal(a, b)


def test_the_text_comes_back_from_the_shards_and_val_is_its_last_tenth(small_pieces, source, tmp_path):
    prepare(source, str(tmp_path / "out"), "bytes", processes=1, shard_tokens=3000)
    data, text = load_data(str(tmp_path / "out")), make_text(20_000)
    assert data.tokenizer.decode(data.train[:]) == text[:18_000]
    assert data.tokenizer.decode(data.val[:]) == text[18_000:]
    assert data.val_bytes == len(text[18_000:].encode())


def test_documents_of_many_files_are_one_text(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(10):
        (tmp_path / "in" / f"{i}.jsonl").write_text("".join(f'{{"body": "document {i}.{j}"}}\n' for j in range(20)))
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), field="body", processes=1)
    in_memory = load_data(str(tmp_path / "in"), field="body")
    assert torch.equal(load_data(str(tmp_path / "out")).train[:], in_memory.train.long())


def test_processes_write_the_same_files_as_one(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 1000)
    for n in (1, 2):
        prepare(source, str(tmp_path / str(n)), "bpe:300", processes=n, shard_tokens=3000)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("vocab_size, itemsize", [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_or_four(tmp_path, vocab_size, itemsize):
    text = "".join(map(chr, range(0x20000, 0x20000 + vocab_size)))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare(str(tmp_path / "text.txt"), str(tmp_path / "out"), processes=1)
    data = load_data(str(tmp_path / "out"))
    assert data.train.parts[0].dtype.itemsize == itemsize
    assert torch.cat([data.train[:], data.val[:]]).tolist() == list(range(vocab_size))


# ---------------------------------------------------------------------------------------------------------------------
# Reading, as properties


def write_shards(directory, lengths):
    """Shards of these lengths whose tokens are their own positions; returns the paths."""
    paths, at = [], 0
    for i, n in enumerate(lengths):
        paths.append(str(directory / f"train-{i:05d}.bin"))
        writer = shards.ShardWriter(paths[-1], 2, 65_536, bytes(32))
        writer.add(np.arange(at, at + n).astype("<u2").tobytes())
        writer.close()
        at += n
    return paths


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 1)


@settings(max_examples=60)
@given(lengths=LENGTHS, begin=st.integers(-5, 250), end=st.integers(-5, 250))
def test_slices_are_those_of_one_tensor(tmp_path_factory, lengths, begin, end):
    tokens = Shards(write_shards(tmp_path_factory.mktemp("shards"), lengths))
    whole = torch.arange(sum(lengths))
    assert len(tokens) == len(whole) and torch.equal(tokens[:], whole)
    assert torch.equal(tokens[begin:end], whole[begin:end])
    assert torch.equal(tokens[begin:], whole[begin:]) and torch.equal(tokens[:end], whole[:end])


@settings(max_examples=60)
@given(lengths=LENGTHS, block_size=st.integers(1, 20), batch_size=st.integers(1, 9), step=st.integers(0, 50))
def test_batches_of_shards_are_those_of_one_tensor(tmp_path_factory, lengths, block_size, batch_size, step):
    if sum(lengths) <= block_size:
        return
    tokens = Shards(write_shards(tmp_path_factory.mktemp("shards"), lengths))
    on_disk, in_memory = (Batches(t, batch_size, block_size, seed=2) for t in (tokens, torch.arange(sum(lengths))))
    for a, b in zip(on_disk.batch(step), in_memory.batch(step)):
        assert torch.equal(a, b) and a.dtype == torch.int64


@settings(max_examples=20)
@given(n=st.integers(30, 3000), block_size=st.integers(1, 8), tokenizer=st.sampled_from(["chars", "bytes"]))
def test_no_token_of_val_is_ever_trained_on(tmp_path_factory, n, block_size, tokenizer):
    """The val split has a character of its own, so that one of its tokens in a batch would show."""
    directory = tmp_path_factory.mktemp("text")
    cut = int(0.9 * n)
    (directory / "text.txt").write_text("abc" * (cut // 3) + "a" * (cut % 3) + "X" * (n - cut))
    prepare(str(directory / "text.txt"), str(directory / "out"), tokenizer, processes=1, shard_tokens=50)
    data = load_data(str(directory / "out"))
    forbidden = int(data.tokenizer.encode("X"))
    assert (data.val[:] == forbidden).all() and len(data.val) == n - cut
    assert not (data.train[:] == forbidden).any() and len(data.train) == cut
    batches = data.batches(5, block_size, 1)
    assert not any(
        (t == forbidden).any() for step in range(batches.windows_per_epoch // 5 + 2) for t in batches.batch(step)
    )


def test_the_val_loss_of_shards_is_that_of_one_tensor(make_model, tmp_path):
    model = make_model(vocab_size=100)
    tokens = Shards(write_shards(tmp_path, [30, 1, 0, 69]))
    for limit in (None, 2):
        assert validation_loss(model, tokens, 2, limit) == validation_loss(model, torch.arange(100), 2, limit)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


class Killed(BaseException):
    pass


def test_killed_after_any_shard_it_goes_on_and_ends_with_the_same_files(small_pieces, source, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    prepare(source, str(tmp_path / "whole"), "bytes", processes=1, shard_tokens=3000)
    renames, rename = [], os.replace

    for last in range(1, 30):

        def killed(a, b, last=last):
            if len(renames) == last:
                raise Killed
            renames.append(b)
            rename(a, b)

        shutil.rmtree(out, ignore_errors=True)
        renames.clear()
        monkeypatch.setattr(os, "replace", killed)
        try:
            prepare(source, out, "bytes", processes=1, shard_tokens=3000)
            break
        except Killed:
            pass
        monkeypatch.setattr(os, "replace", rename)
        prepare(source, out, "bytes", processes=1, shard_tokens=3000)
        assert contents(out) == contents(tmp_path / "whole")
    assert last > 12, "every rename had its turn"


def test_finished_shards_are_not_made_again(small_pieces, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(source, str(out), "bytes", processes=1, shard_tokens=3000)
    manifest = json.loads((out / "prepared.json").read_text())
    whole = contents(out)
    manifest.update(complete=False, shards=manifest["shards"][:4])
    manifest.pop("val_bytes")
    manifest.pop("sha256")
    (out / "prepared.json").write_text(json.dumps(manifest))
    encoded, encode = [], shards._encode
    monkeypatch.setattr(shards, "_encode", lambda t, text, size: encoded.append(text) or encode(t, text, size))
    prepare(source, str(out), "bytes", processes=1, shard_tokens=3000)
    assert contents(out) == whole
    assert "".join(encoded) == make_text(20_000)[manifest["shards"][-1]["end"] :]
    encoded.clear()
    prepare(source, str(out), "bytes", processes=1, shard_tokens=3000)
    assert encoded == [] and contents(out) == whole


def start(*args, cwd):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data.py"), *map(str, args)],
        cwd=str(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def descendants(pid):
    """The processes below a process, itself included, that live now."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [p for child in task.read_text().split() for p in descendants(int(child))]
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kill_9_leaves_no_process_behind_and_the_same_command_goes_on(tmp_path):
    text = make_text(200_000)
    (tmp_path / "text.txt").write_text(text * 5, encoding="utf-8", newline="")  # a million characters
    arguments = ["prepare", "text.txt", "out", "--tokenizer", "bpe:400", "--processes", 2, "--shard_tokens", 100_000]
    process = start(*arguments, cwd=tmp_path)
    while not (tmp_path / "out" / "train-00001.bin").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    family = descendants(process.pid)
    process.kill()
    process.wait()
    assert len(family) >= 3, "it had processes of its own"
    for _ in range(1000):
        left = [
            pid
            for pid in family
            if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
        ]
        if not left:
            break
        time.sleep(0.01)
    assert not left
    before = os.stat(tmp_path / "out" / "train-00000.bin").st_mtime_ns
    out, _ = start(*arguments, cwd=tmp_path).communicate()
    assert b"whole" in out, out
    assert os.stat(tmp_path / "out" / "train-00000.bin").st_mtime_ns == before
    data = load_data(str(tmp_path / "out"))
    assert data.tokenizer.decode(data.val[:]) == (text * 5)[900_000:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_while_its_processes_begin_ends_all_of_them_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    process = start("prepare", "text.txt", "out", "--processes", 2, cwd=tmp_path)
    while len(family := [pid for pid in descendants(process.pid) if is_spawned(pid)]) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.5)  # they load PyTorch
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate()
    assert (process.returncode, out) == (130, b"stopped; what is finished is kept, the same command goes on\n")
    assert not any(map(alive, family))


def is_spawned(pid):
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_two_processes_do_not_prepare_one_directory(tmp_path, source):
    prepare(source, str(tmp_path / "out"), "bytes", processes=1)
    with shards._locked(str(tmp_path / "out")), pytest.raises(UserError, match="another process is preparing"):
        prepare(source, str(tmp_path / "out"), "bytes", processes=1)
    prepare(source, str(tmp_path / "out"), "bytes", processes=1)


# ---------------------------------------------------------------------------------------------------------------------
# Damage and what does not belong together


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    (directory / "text.txt").write_text(make_text(5000), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PIECE", 500)
        prepare(str(directory / "text.txt"), str(directory / "out"), "bpe:280", processes=1, shard_tokens=500)
    return directory


@pytest.fixture
def out(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy" / "out"


def refused(source, *words):
    with pytest.raises(UserError) as error:
        open_prepared(str(source))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def damage(path, place, bits=1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= bits
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00001.bin", "val-00000.bin"])
@pytest.mark.parametrize("place", [0, 8, 12, 16, 24, 40, 80, 128, 129, -1])
def test_a_bit_that_flipped_anywhere_is_found(out, name, place):
    damage(out / name, place)
    refused(out, str(out / name), "make it anew with: python data.py prepare", "--tokenizer bpe:280")


def test_a_shard_cut_off_missing_or_of_another_text_is_refused(out):
    raw = (out / "train-00001.bin").read_bytes()
    for size in (0, 50, 128, len(raw) - 1):
        (out / "train-00001.bin").write_bytes(raw[:size])
        refused(out, str(out / "train-00001.bin"), "make it anew")
    (out / "train-00001.bin").write_bytes((out / "train-00000.bin").read_bytes())
    refused(out, "train-00001.bin: is not the shard that was prepared here")
    (out / "train-00001.bin").unlink()
    refused(out, "train-00001.bin: cannot be read (No such file or directory)", "make it anew")


def test_the_remedy_repairs(small_pieces, prepared, out, capsys):
    """prepare makes the damaged shard and those after it again."""
    whole = contents(prepared / "out")
    manifest = json.loads(whole["prepared.json"])
    for name in ("train-00001.bin", "val-00000.bin"):
        damage(out / name, 200)
        prepare(manifest["source"], str(out), "bpe:280", processes=1, shard_tokens=500)
        assert contents(out) == whole
        assert f"{name}: is damaged" in capsys.readouterr().out


def test_another_tokenizer_in_the_directory_is_refused(out):
    shards.save_tokenizer(str(out), CharTokenizer("abc"), 8)
    refused(out, "tokenizer.json: is not the tokenizer of the shards")
    (out / "tokenizer.json").unlink()
    refused(out, "tokenizer.json: is missing")


def test_what_is_not_prepared_to_the_end_is_refused(out):
    manifest = json.loads((out / "prepared.json").read_text())
    shards._write_manifest(str(out), {**without_sum(manifest), "complete": False})
    refused(out, "is not prepared to the end", "python data.py prepare")
    for broken in ("", "{}", "[]", '{"format": 1}'):
        (out / "prepared.json").write_text(broken)
        refused(out, "prepared.json: cannot be read")
    (out / "prepared.json").write_text('{"format": 2}')
    refused(out, "has version 2 of the format")


def without_sum(manifest):
    return {name: value for name, value in manifest.items() if name != "sha256"}


def test_a_prepared_json_damaged_anywhere_is_refused(out):
    """A bit that flipped in each byte, and the file cut off at each. (A key of another name is a key too many.)"""
    path = out / "prepared.json"
    raw, manifest = path.read_bytes(), json.loads(path.read_text())
    for place in range(len(raw)):
        for broken in (raw[:place], raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]):
            path.write_bytes(broken)
            with contextlib.suppress(UserError):
                read = shards._read_manifest(str(out))
                assert read.items() >= without_sum(manifest).items(), place
    path.write_text(json.dumps({**manifest, "val_bytes": manifest["val_bytes"] + 1}))
    refused(out, "prepared.json: is damaged, its checksum does not match; delete the directory and prepare it anew")
    with pytest.raises(UserError, match="its checksum does not match"):
        prepare(manifest["source"], str(out), "bpe:280", shard_tokens=500)


def test_a_prepared_json_from_before_it_had_a_sum_is_read(out):
    manifest = without_sum(json.loads((out / "prepared.json").read_text()))
    (out / "prepared.json").write_text(json.dumps(manifest))
    assert open_prepared(str(out))[3] == manifest["val_bytes"]
    for broken in (
        {**manifest, "shards": [{**manifest["shards"][0], "sha256": "xyz"}]},
        {**manifest, "shards": [{"file": "train-00000.bin"}]},
        {name: value for name, value in manifest.items() if name != "val_bytes"},
        {name: value for name, value in manifest.items() if name != "field"},
        {**manifest, "shards": 7},
    ):
        (out / "prepared.json").write_text(json.dumps(broken))
        refused(out, "prepared.json: cannot be read", "prepare it anew")
        with pytest.raises(UserError, match=r"prepared\.json: cannot be read"):
            prepare(manifest["source"], str(out), "bpe:280", shard_tokens=500)


def test_a_shard_that_the_disk_does_not_give_is_told_with_its_name(out, monkeypatch):
    class Failing:
        def seek(self, place):
            pass

        def read(self, n=-1):
            raise OSError(errno.EIO, "Input/output error")

    path = str(out / "train-00001.bin")
    header = shards.Header.read(path)
    monkeypatch.setattr(shards.Header, "read", lambda path: header)
    monkeypatch.setattr(shards, "open", lambda *_, **__: contextlib.nullcontext(Failing()), raising=False)
    with pytest.raises(UserError, match=r"train-00001\.bin: cannot be read \(Input/output error\); make it anew with"):
        verify(path)


def test_some_shards_can_be_chosen(prepared, monkeypatch):
    out = prepared / "out"
    train, val, *_, fingerprint = open_prepared(str(out / "train-0000[01].bin"))
    whole, whole_val, *_, whole_fingerprint = open_prepared(str(out))
    assert torch.equal(train[:], whole[:][: len(train)]) and len(train) < len(whole)
    assert torch.equal(val[:], whole_val[:]) and fingerprint != whole_fingerprint
    refused(out / "val-00000.bin", "none of its shards of the train split was chosen")
    monkeypatch.chdir(out)
    refused("val-00000.bin", ".: none of its shards of the train split was chosen", "or .")


def test_bin_files_of_others_are_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(1000))
    refused(tmp_path / "train.bin", "train.bin: has no prepared.json beside it")
    assert is_prepared(str(tmp_path / "train.bin")) and not is_prepared(str(tmp_path))
    with pytest.raises(UserError, match="is no shard of tokens"):
        verify(str(tmp_path / "train.bin"))


def test_another_command_for_the_same_directory_is_refused(prepared, out):
    manifest = json.loads((out / "prepared.json").read_text())
    source, other = manifest["source"], out.parent / "other.txt"
    other.write_text("another text " * 10)
    for arguments, words in (
        (dict(tokenizer_name="bytes"), "--tokenizer bytes: .* was begun with bpe:280; name a new directory"),
        (dict(field="body"), "--field body: .* was begun with text"),
        (dict(shard_tokens=7), "--shard_tokens 7: .* was begun with 500"),
        (dict(source=str(other)), "SOURCE .*other.txt: .* was begun with"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(**{**dict(source=source, out=str(out), tokenizer_name="bpe:280", shard_tokens=500), **arguments})


def test_a_source_that_has_changed_is_refused(tmp_path, source):
    prepare(source, str(tmp_path / "out"), "bytes", processes=1)
    Path(source).write_text("another text " * 10)
    with pytest.raises(UserError, match="has changed since"):
        prepare(source, str(tmp_path / "out"), "bytes", processes=1)


def test_a_directory_with_other_files_is_left_alone(tmp_path, source):
    with pytest.raises(UserError, match="holds other files already"):
        prepare(source, str(tmp_path), "bytes")


def test_a_bad_source_leaves_nothing_behind(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abc" * 100 + b"\xff" + b"abc" * 100)
    with pytest.raises(UserError, match=r"text.txt: is not UTF-8 \(byte 300\)"):
        prepare(str(tmp_path / "text.txt"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("n", [0, 1, 19])
def test_a_text_too_short_is_refused(tmp_path, n):
    (tmp_path / "text.txt").write_text("a" * n)
    with pytest.raises(UserError, match=f"has only {n} character"):
        prepare(str(tmp_path / "text.txt"), str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# The commands


TINY = shlex.split(
    """--device cpu --dtype float32 --compile False --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4
    --max_iters 12 --eval_interval 6 --eval_iters 3 --dropout 0.1"""
)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(20_000), encoding="utf-8", newline="")


def ran(result):
    assert result.status == 0, result
    return result.out


@pytest.mark.parametrize("tokenizer", ["chars", "bytes", "bpe:300"])
def test_training_on_a_prepared_text_ends_in_the_weights_of_training_on_the_text(command, text, tokenizer):  # noqa: F811
    out = ran(command(data, "prepare", "text.txt", "tokens", "--tokenizer", tokenizer, "--shard_tokens", 3000))
    assert "tokens: whole;" in out and "python train.py --data tokens" in out
    assert ran(command(data, "check", "tokens")) == out.splitlines()[0] + "\n"
    ran(command(train, "--data", "text.txt", "--tokenizer", tokenizer, "--out_dir", "in-memory", *TINY))
    ran(command(train, "--data", "tokens", "--out_dir", "on-disk", *TINY))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "draft.safetensors"):
        assert Path("in-memory", name).read_bytes() == Path("on-disk", name).read_bytes(), name
    in_memory, on_disk = (train.read_metrics(f"{run}/metrics.jsonl") for run in ("in-memory", "on-disk"))
    assert [m.get("val_loss") for m in in_memory] == [m.get("val_loss") for m in on_disk]
    ran(command(train, "--data", "tokens", "--out_dir", "on-disk", "--resume", "--max_iters", 20))
    written = ran(
        command(sample, "--out_dir", "on-disk", "--prompt", "東京 naïve ", "--max_new_tokens", 50, "--seed", 1)
    )
    assert written.startswith("東京 naïve ") and (tokenizer != "chars" or len(written) == 60)


def test_a_plan_and_minutes_work_with_a_prepared_text(command, text):  # noqa: F811
    ran(command(data, "prepare", "text.txt", "tokens", "--tokenizer", "bytes"))
    assert "text and batch" in ran(command(train, "--data", "tokens", "--plan", *TINY))
    assert "best val loss" in ran(command(train, "--data", "tokens", "--minutes", 0.03, "--device", "cpu"))


def test_a_tokenizer_that_does_not_match_is_refused_with_the_file_and_the_remedy(command, text, tmp_path):  # noqa: F811
    ran(command(data, "prepare", "text.txt", "bytes", "--tokenizer", "bytes"))
    ran(command(data, "prepare", "text.txt", "chars"))
    ran(command(train, "--data", "chars", "--out_dir", "run", *TINY))
    before = all_contents(tmp_path)

    def bad(*args, words):
        assert_refused(command(train, *args), *words)
        assert all_contents(tmp_path) == before

    words = ["--data bytes: was prepared with another tokenizer than that of the model in run", "--tokenizer run"]
    bad("--data", "bytes", "--init_from", "run", "--out_dir", "new", words=words)
    words = ["--data bytes: was prepared with another tokenizer than that of the run in run; put back"]
    bad("--data", "bytes", "--out_dir", "run", "--resume", "--max_iters", 99, words=words)
    words = ["--tokenizer bytes: the model has its own; leave the flag out"]
    bad("--data", "text.txt", "--init_from", "run", "--tokenizer", "bytes", "--out_dir", "new", words=words)
    bad("--data", "chars", "--tokenizer", "bytes", "--out_dir", "new", words=["--data chars: is in tokens already"])
    assert_refused(command(bigram, "--data", "bytes"), "--data bytes: is in tokens already; give the text itself")
    ran(
        command(
            train, "--data", "chars", "--init_from", "run", "--out_dir", "tuned", "--max_iters", 1, "--device", "cpu"
        )
    )

    kept = Path("run", "tokenizer.json").read_bytes()
    for other in (Path("bytes", "tokenizer.json").read_bytes(), None):
        Path("run", "tokenizer.json").unlink()
        if other:
            Path("run", "tokenizer.json").write_bytes(other)
        words = "is not the tokenizer this run began with" if other else "is missing"
        result = command(train, "--out_dir", "run", "--resume", "--max_iters", 99)
        assert_refused(result, f"run/tokenizer.json: {words}; put that back")
    Path("run", "tokenizer.json").write_bytes(kept)
    ran(command(train, "--out_dir", "run", "--resume", "--max_iters", 14))


def test_a_damaged_shard_stops_a_run_before_it_begins(command, text):  # noqa: F811
    ran(command(data, "prepare", "text.txt", "tokens", "--tokenizer", "bytes"))
    damage(Path("tokens", "train-00000.bin"), 1000)
    remedy = "make it anew with: python data.py prepare text.txt tokens --tokenizer bytes"
    words = "tokens/train-00000.bin: is damaged, its checksum does not match"
    assert_refused(command(train, "--data", "tokens", *TINY), f"--data {words}", remedy)
    assert not Path("out").exists()
    assert_refused(command(data, "check", "tokens"), words, remedy)
    ran(command(data, *remedy.split()[6:]))
    ran(command(data, "check", "tokens"))


def test_the_remedy_works_as_it_is_printed(command, tmp_path):  # noqa: F811
    """Names with spaces, quotes and stars, a tokenizer in a file, another field and size of shards."""
    for i in range(2):
        lines = "".join(json.dumps({"the body": make_text(3000, i)}) + "\n" for _ in range(3))
        (tmp_path / f"o'neill {i}.jsonl").write_text(lines)
    (tmp_path / "my bytes").mkdir()
    tokenizer_module.save_tokenizer(str(tmp_path / "my bytes"), tokenizer_module.ByteTokenizer(), 8)
    options = ["--tokenizer", "my bytes", "--field", "the body", "--shard_tokens", 3000]
    ran(command(data, "prepare", "o'neill *.jsonl", "the tokens", *options))
    before = all_contents(tmp_path)
    damage(Path("the tokens", "train-00000.bin"), 1000)
    result = command(data, "check", "the tokens")
    assert_refused(result, "make it anew with: python data.py")
    ran(command(data, *shlex.split(result.err.split("anew with: python data.py ")[1])))
    assert all_contents(tmp_path) == before


@pytest.mark.parametrize(
    "args, words",
    [
        ("", "no command: give prepare or check"),
        ("banana", "banana: give prepare or check"),
        ("prepare", "the following arguments are required: SOURCE, OUT"),
        ("prepare text.txt", "the following arguments are required: OUT"),
        ("prepare text.txt out stray", "stray: belongs to no flag; put quotes around a value with spaces or with a *"),
        ("prepare missing.txt out", "missing.txt: cannot be read (No such file"),
        ("prepare text.txt text.txt", "text.txt: cannot be written (File exists); name another directory"),
        ("prepare text.txt text.txt/x", "text.txt/x: cannot be written (Not a directory); name another directory"),
        ("prepare text.txt ''", "OUT: is empty; name a directory"),
        ("prepare text.txt out --tokenizer bpe:7", "--tokenizer bpe:7: wants bpe: and a number"),
        ("prepare text.txt out --processes 0", "--processes: wants a whole number of at least 1"),
        ("check missing", "missing: holds no prepared text (no prepared.json); name what data.py prepare wrote"),
        ("check .", ".: holds no prepared text"),
    ],
)
def test_bad_commands_are_refused(command, text, tmp_path, args, words):  # noqa: F811
    before = all_contents(tmp_path)
    assert_refused(command(data, *shlex.split(args)), words)
    assert all_contents(tmp_path) == before


@pytest.mark.parametrize("args", ["--help", "prepare --help", "check -h"])
def test_help(command, args):  # noqa: F811
    assert "usage: data.py" in ran(command(data, *args.split()))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Memory:
    """The most memory that a process and those below it had for themselves at any moment, in bytes: anonymous pages,
    as those of a mapped file can be dropped."""

    def __init__(self, pid):
        self.pid, self.most, self.stopped = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        while not self.stopped.wait(0.1):
            total = 0
            for pid in descendants(self.pid):
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.most = max(self.most, total)

    def stop(self):
        self.stopped.set()
        self.thread.join()
        return self.most


def measured(script, *args, cwd):
    """Run a command; returns its peak of memory. It must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=str(cwd),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    memory = Memory(process.pid)
    out, _ = process.communicate()
    most = memory.stop()
    assert process.returncode == 0, out.decode()
    return most


def write_large(path, n):
    """A text of about n bytes, in documents of which no two are the same."""
    paragraph, dice = make_text(100_000), random.Random(1)
    with open(path, "w", encoding="utf-8", newline="") as f:
        while f.tell() < n:
            begin = dice.randrange(90_000)
            document = paragraph[begin : begin + dice.randrange(10_000)] + f" {dice.random()}"
            f.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


TRAIN = shlex.split(
    """--data out --out_dir run --device cpu --dtype float32 --compile False --n_layer 1 --n_head 2 --n_embd 32
    --block_size 64 --batch_size 8 --max_iters 20 --eval_interval 10 --eval_iters 5"""
)


def prepare_and_train(directory, n, tokenizer, processes):
    directory.mkdir()
    write_large(directory / "text.jsonl", n)
    arguments = ["prepare", "text.jsonl", "out", "--tokenizer", tokenizer, "--processes", processes]
    return [measured("data.py", *arguments, cwd=directory), measured("train.py", *TRAIN, cwd=directory)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """The long test in small: 50 MB more text, in memory 50 MB of characters and twice as much of tokens.

    What training takes besides differs by up to 45 MB from run to run.
    """
    small, large = (prepare_and_train(tmp_path / str(n), n * 10**6, "bytes", 1) for n in (10, 60))
    prepared, trained = ((b - a) / 1e6 for a, b in zip(small, large))
    assert prepared < 25 and trained < 75, (small, large)


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:4096"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_text_of_1_gb_is_prepared_and_trained_on_within_one_and_a_half_gb(tmp_path, tokenizer):
    prepared, trained = prepare_and_train(tmp_path / "large", 10**9, tokenizer, 2)
    print(f"{tokenizer}: prepare {prepared / 1e6:.0f} MB, train {trained / 1e6:.0f} MB")
    assert max(prepared, trained) < 1.5e9
