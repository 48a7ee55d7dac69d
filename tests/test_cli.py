"""The commands as a person runs them: train.py, sample.py and every command of the README.

Some tests start a process in full, more fork one (processes.Command). Where a process would show nothing more (a table
of bad inputs, say), `command` calls the same main() in this one.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from processes import Command

import bigram
import budget
import checkpoint
import plan
import sample
import train
import trigram
import utils
from tokenizer import LibraryTokenizer, prompt_tokens

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # it would stream for us
TINY = shlex.split("""--device cpu --dtype float32 --compile False --n_layer=1 --n_head 2 --n_embd 16 --block_size 16
    --batch_size 8 --eval_interval 50 --log_interval 5 --learning_rate 1e-2 --warmup_iters 10""")
STEPS = 300
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "state.pt"}
FILES |= {"metrics.jsonl", "loss.png", "draft.safetensors", "run.lock"}
EARLIER = {"state-250.pt"}  # the state before the newest, of a run of STEPS

Result = namedtuple("Result", "status out err")


# ---------------------------------------------------------------------------------------------------------------------
# Running commands


def start(script, *args, cwd, **settings):
    """Start a command in a process of its own: a Popen whose streams are pipes of bytes."""
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    settings["env"] = {**ENVIRONMENT, **settings.get("env", {})}
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=str(cwd), **settings)


def finish(process, *stdin):
    out, err = process.communicate(*stdin, timeout=300)
    return Result(process.returncode, out.decode("utf-8"), err.decode("utf-8"))


def run(script, *args, cwd, **settings):
    return finish(start(script, *args, cwd=cwd, **settings))


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """command(module, *args, stdin=b"") -> Result: run the module's main in this process, in tmp_path."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def call(module, *args, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            utils.run_command(module.main)
        return Result(exit.value.code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def contents(directory):
    """Every file below the directory with a hash of what is in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(str(directory)).rglob("*"))
    }


def assert_refused(result, *words):
    """Exit status 2 and one line on stderr, which holds all the words, and nothing else."""
    assert (result.status, result.out) == (2, ""), result
    assert result.err.count("\n") == 1 and re.match(r"\w+\.py: error: ", result.err), result.err
    for word in words:
        assert word in result.err


def metrics_of(directory):
    with open(os.path.join(str(directory), "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def wait_for_step(process, directory, step):
    """Wait until the run has logged this step or a later one."""
    path = Path(str(directory)) / "metrics.jsonl"
    for _ in range(10_000):
        assert process.poll() is None, process.communicate()
        if path.exists() and [m for m in train.read_metrics(str(path)) if m["step"] >= step]:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come")


# ---------------------------------------------------------------------------------------------------------------------
# One tiny run that many tests look at


@pytest.fixture(scope="session")
def text():
    """The beginning of input.txt, and a character that takes two bytes."""
    return (ROOT / "input.txt").read_text(encoding="utf-8")[:8000] + "é\n"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    """The directory of a finished run with its text; what it printed to a terminal is in .out and .err."""
    import fcntl
    import pty
    import struct
    import termios

    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "text.txt").write_text(text, encoding="utf-8")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 150, 0, 0))
    with open(str(cwd / "stdout"), "wb") as stdout:
        process = start(
            "train.py", "--data", "text.txt", "--max_iters", STEPS, *TINY, cwd=cwd, stdout=stdout, stderr=slave
        )
        os.close(slave)
        err = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end of a terminal is gone
            while True:
                piece = os.read(master, 65536)
                if not piece:
                    break
                err += piece
    os.close(master)
    status = process.wait(60)
    out = (cwd / "stdout").read_text(encoding="utf-8")
    os.remove(str(cwd / "stdout"))
    return namedtuple("Finished", "cwd model status out err")(cwd, str(cwd / "out"), status, out, err.decode("utf-8"))


@pytest.fixture
def own(finished, tmp_path):
    """A copy of the finished run in tmp_path, to damage: tmp_path/text.txt and tmp_path/out."""
    shutil.copytree(finished.model, str(tmp_path / "out"))
    shutil.copy(str(finished.cwd / "text.txt"), str(tmp_path))
    return tmp_path / "out"


@pytest.fixture
def write(command, finished):
    """write(*args) -> what sample.py prints with the finished run's model."""

    def call(*args, **settings):
        result = command(sample, "--out_dir", finished.model, "--device", "cpu", *args, **settings)
        assert (result.status, result.err) == (0, ""), result
        return result.out

    return call


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_training_ends_with_status_0_and_leaves_the_promised_files(finished):
    assert finished.status == 0, finished.err
    assert set(os.listdir(finished.model)) == FILES | EARLIER
    assert set(os.listdir(str(finished.cwd))) == {"text.txt", "out"}
    assert (Path(finished.model) / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    config = json.loads((Path(finished.model) / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["n_layer"], config["n_embd"], config["n_positions"]) == ("gpt2", 1, 16, 16)


def test_every_line_of_the_metrics_is_json_with_what_was_promised(finished):
    lines = metrics_of(finished.model)
    assert all({"step", "seconds", "tokens"} <= set(m) for m in lines)
    trained = [m for m in lines if "train_loss" in m]
    measured = [m for m in lines if "val_loss" in m]
    assert [m["step"] for m in trained] == [1, *range(5, STEPS + 1, 5)]
    assert [m["step"] for m in measured] == list(range(50, STEPS + 1, 50))
    assert all({"lr", "grad_norm", "tokens_per_s"} <= set(m) for m in trained)
    assert all(m["tokens"] == m["step"] * 8 * 16 for m in lines)
    assert all(0 < a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:]))
    assert all(m["val_loss"] / m["val_bits_per_byte"] == pytest.approx(0.693, rel=0.01) for m in measured)
    assert measured[-1]["val_loss"] < measured[0]["val_loss"]


def test_training_tells_the_val_loss_in_nats_and_in_bits_per_byte_and_ends_with_a_sample(finished):
    best = min(m["val_loss"] for m in metrics_of(finished.model) if "val_loss" in m)
    assert re.search(rf"best val loss {best:.4f} nats per token \(\d\.\d{{3}} bits per byte\)", finished.out)
    assert len(finished.out.split("a sample:\n")[1]) > 400
    assert "python sample.py --out_dir out" in finished.out


def test_the_progress_bar_shows_loss_tokens_per_second_and_the_time_left(finished):
    bars = [bar for bar in finished.err.split("\r") if f"/{STEPS} [" in bar]
    assert len(bars) > 3
    assert re.search(r" (\d+)/300 \[\d\d:\d\d<\d\d:\d\d, .*loss \d\.\d+, [\d,]+ tokens/s\]", bars[len(bars) // 2])


def test_training_prints_no_warnings(finished):
    assert "warn" not in (finished.out + finished.err).lower()
    left = re.sub(r"[^\r\n]*\d+/300 \[[^\r\n]*", "", finished.err)  # without the bar
    assert left.strip() == ""


def test_a_model_that_was_written_is_one_that_transformers_knows_as_its_own(finished):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(finished.model, "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("The é").ids) == "The é"


def test_help_has_every_flag_on_a_line_with_its_help():
    result = run("train.py", "--help", cwd=ROOT, env={"COLUMNS": "250"})
    assert (result.status, result.err) == (0, "")
    shown = " ".join(result.out.split("options:")[1].split())
    flags = [f"--{f.name}" for f in fields(train.TrainOptions)]
    assert re.findall(r"(?<!\S)--\w+", shown) == ["--help", *flags]
    for f in fields(train.TrainOptions):
        assert re.search(rf"--{f.name} \S+ {re.escape(f.metadata['help'])}", shown), f.name


@pytest.mark.parametrize("module", [sample, bigram, trigram])
def test_the_other_commands_have_help_too(command, module):
    result = command(module, "--help")
    assert (result.status, result.err) == (0, "") and "--seed" in result.out


def test_an_unknown_flag_is_refused_with_the_nearest_one(tmp_path):
    assert_refused(run("train.py", "--n_layr", "3", cwd=tmp_path), "--n_layr", "did you mean --n_layer?")
    assert os.listdir(str(tmp_path)) == []


def test_samples_are_shown_while_it_trains_where_that_is_asked_for(command, own):
    flags = ["--max_iters", 4, "--sample_interval", 1, "--log_interval", 3]
    result = command(train, "--data", "text.txt", "--out_dir", "new", *TINY, *flags)
    assert result.status == 0 and 4 * 200 + 400 < len(result.out) < 5 * 200 + 400 + 800
    assert [m["step"] for m in metrics_of("new") if "train_loss" in m] == [1, 3, 4]


def test_a_run_whose_reader_leaves_goes_on_to_its_end(own, tmp_path):
    """As in `python train.py | head -1`, where stdout keeps nothing to itself."""
    flags = ["--out_dir", "new", *TINY, "--max_iters", 5, "--sample_interval", 1]
    process = start("train.py", "--data", "text.txt", *flags, cwd=tmp_path, env={"PYTHONUNBUFFERED": "1"})
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0, err
    assert metrics_of(tmp_path / "new")[-1]["step"] == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_run_whose_words_cannot_be_written_goes_on_to_its_end(own, tmp_path):
    """As where a terminal is closed, or the disk is full that `python train.py > log.txt` writes to."""
    flags = ["--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 5]
    assert Command("train.py", *flags, cwd=tmp_path, stdout="/dev/full", stderr="/dev/full").wait() == 0
    assert metrics_of(tmp_path / "new")[-1]["step"] == 5


@pytest.mark.skipif(os.name == "nt", reason="the search for a compiler is another on Windows")
def test_without_a_compiler_it_says_so_in_one_line_and_trains(own, tmp_path):
    nothing = {"CXX": "/nonexistent", "CC": "/nonexistent", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    arguments = ["--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 3, "--compile"]
    result = finish(Command("train.py", *arguments, cwd=tmp_path, env=nothing))
    assert result.status == 0, result.err
    assert result.out.count("there is no working compiler here, running uncompiled") == 1
    assert "Traceback" not in result.err and metrics_of(tmp_path / "new")[-1]["step"] == 3


def test_a_run_that_diverges_ends_in_one_line_and_keeps_nothing_that_is_no_number(command, own, tmp_path):
    arguments = ["--data", "text.txt", *TINY, "--max_iters", 50, "--learning_rate", "1e30"]
    for name, more in (("new", []), ("often", ["--eval_interval", 1, "--log_interval", 1])):
        result = command(train, *arguments, "--out_dir", name, *more)
        assert result.status == 2
        last = result.err.splitlines()[-1]
        assert re.match(r"train.py: error: .* at step \d+: the run has diverged; .* lower --learning_rate", last)
        assert "Traceback" not in result.err and result.err.count("error") == 1
        assert "NaN" not in (tmp_path / name / "metrics.jsonl").read_text()
        assert (
            not (tmp_path / name / "model.safetensors").exists()
            or torch.isfinite(checkpoint.load_model(str(tmp_path / name))[0].lm_head.weight).all()
        )


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_a_run_stopped_by_ctrl_c_terminated_and_killed_ends_bit_for_bit_as_the_unbroken_one(finished, tmp_path):
    shutil.copy(str(finished.cwd / "text.txt"), str(tmp_path))
    stops = [(signal.SIGINT, 10, 130), (signal.SIGTERM, 60, 143), (signal.SIGKILL, 110, -9)]
    arguments = ["--data", "text.txt", "--max_iters", STEPS, *TINY]
    for number, step, status in stops:
        process = Command("train.py", *arguments, cwd=tmp_path)
        wait_for_step(process, tmp_path / "out", step)
        process.send_signal(number)
        result = finish(process)
        assert result.status == status and "Traceback" not in result.err
        if number != signal.SIGKILL:
            assert re.search(
                r"stopped after step \d+ and saved; go on with: python train.py --out_dir out --resume", result.out
            )
        arguments = ["--resume"]
    assert metrics_of(tmp_path / "out")[-1]["step"] < STEPS, "it was over before it could be stopped"
    result = finish(Command("train.py", "--resume", cwd=tmp_path))
    assert result.status == 0, result.err

    ours, theirs = (torch.load(os.path.join(d, "state.pt")) for d in (str(tmp_path / "out"), finished.model))
    assert ours["counters"]["step"] == STEPS and ours["counters"]["best"] == theirs["counters"]["best"]
    assert all(torch.equal(p, ours["model"][name]) for name, p in theirs["model"].items())
    (our_adamw,), (their_adamw,) = ours["optimizers"], theirs["optimizers"]
    for index, memory in their_adamw["state"].items():
        assert all(torch.equal(value, our_adamw["state"][index][name]) for name, value in memory.items())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        Path(finished.model) / "model.safetensors"
    ).read_bytes()
    assert set(os.listdir(str(tmp_path / "out"))) == FILES | EARLIER

    lines = metrics_of(tmp_path / "out")
    found = {(m["step"], key): m[key] for m in lines for key in ("train_loss", "val_loss") if key in m}
    assert len(found) == len(lines), "a step is there twice"
    assert [m["step"] for m in lines] == sorted(m["step"] for m in lines)
    wanted = {
        (m["step"], key): m[key] for m in metrics_of(finished.model) for key in ("train_loss", "val_loss") if key in m
    }
    assert {key: found[key] for key in wanted} == wanted
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:]))


def test_a_finished_run_goes_on_only_with_more_max_iters(command, own):
    assert_refused(command(train, "--resume"), f"has done its {STEPS} steps", "--max_iters")
    result = command(train, "--resume", "--max_iters", STEPS + 10)
    assert result.status == 0 and metrics_of(own)[-1]["step"] == STEPS + 10


@pytest.mark.parametrize(
    "args, words",
    [
        (["--n_layer", "2"], "--n_layer 2: this run began with 1"),
        (["--learning_rate", "1e-3"], "--learning_rate 0.001: this run began with 0.01"),
        (["--dropout", "0"], "--dropout 0.0: this run began with 0.2"),
        (["--seed", "1"], "--seed 1: this run began with 1337"),
        (["--tokenizer", "bytes"], "--tokenizer bytes: this run began with chars"),
        (["--min_lr", "0"], "--min_lr 0.0: this run began with 0.001"),
        (["--init_from", "out"], "--init_from out: this run began without it"),
        (["--data", "other.txt"], "is not the text this run began with"),
        (["--data", "foreign.txt"], "--data foreign.txt: is not the text this run began with"),
        (["--data", "missing.txt"], "--data missing.txt: cannot be read"),
        (["--out_dir", "nowhere"], "nowhere holds no state.pt"),
        (["--fresh"], "--resume and --fresh"),
    ],
)
def test_resuming_as_another_run_is_refused_and_changes_nothing(command, own, tmp_path, args, words):
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text(encoding="utf-8")[:-1], encoding="utf-8")
    (tmp_path / "foreign.txt").write_text("ж" * 1000, encoding="utf-8")
    before = contents(tmp_path)
    assert_refused(command(train, "--resume", "--max_iters", 2 * STEPS, *args), words)
    assert contents(tmp_path) == before


def test_a_text_that_was_moved_or_has_grown_is_told_with_what_to_do(command, own, tmp_path):
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    more = ["--resume", "--max_iters", STEPS + 1]
    assert_refused(command(train, *more), "--data text.txt: is where this run found its text; say where it is now")
    (tmp_path / "text.txt").write_text(text + text, encoding="utf-8")
    assert_refused(command(train, *more), "--data text.txt: is not the text this run", "--init_from out --out_dir NEW")
    assert command(train, *more, "--data", "moved.txt").status == 0


def test_settings_repeated_on_resume_are_no_change(command, own):
    assert command(train, "--resume", *TINY, "--max_iters", STEPS + 1).status == 0
    defaults = ["--tokenizer", "chars", "--min_lr", "1e-3"]  # what was left out, as it was filled in
    assert command(train, "--resume", *defaults, "--max_iters", STEPS + 2).status == 0


def test_a_run_broken_off_before_its_first_step_does_not_block_its_directory(command, own, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = ["--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 2]
    with monkeypatch.context() as patch:
        patch.setattr(train, "look_ahead", interrupt)
        assert command(train, *arguments).status == 130
    assert command(train, *arguments).status == 0


def test_a_run_broken_off_before_it_was_saved_names_the_way_out(command, own, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(str(own / "metrics.jsonl"), str(tmp_path / "new"))
    arguments = ["--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 2]
    assert_refused(command(train, *arguments), "already holds a run", "--fresh")
    assert_refused(command(train, *arguments, "--resume"), "no state.pt", "--fresh")
    assert command(train, *arguments, "--fresh").status == 0


def test_a_directory_that_holds_a_run_is_refused_and_nothing_in_it_changes(own, tmp_path):
    before = contents(tmp_path)
    result = finish(Command("train.py", "--data", "text.txt", *TINY, "--max_iters", 2, cwd=tmp_path))
    assert_refused(result, "--out_dir out: already holds a run", "--resume", "--fresh")
    assert contents(tmp_path) == before


def test_fresh_moves_the_earlier_run_aside_and_keeps_it_whole(command, own, tmp_path):
    first = contents(own)
    arguments = ["--data", "text.txt", *TINY, "--max_iters", 2, "--fresh"]
    result = command(train, *arguments)
    assert result.status == 0 and "moved the earlier run to out-1" in result.out
    second = contents(own)
    (tmp_path / "out-2").symlink_to("nowhere")  # a name that is taken, though nothing is there
    assert command(train, *arguments, "--out_dir", "out/").status == 0  # a slash makes no difference
    assert contents(tmp_path / "out-1") == first and contents(tmp_path / "out-3") == second
    assert set(os.listdir(str(own))) == FILES


def test_fresh_leaves_a_link_in_place_and_moves_what_it_leads_to(command, own, tmp_path, monkeypatch):
    first = contents(own)
    os.makedirs(tmp_path / "disk")
    own.rename(tmp_path / "disk" / "run")
    own.symlink_to("disk/run")
    arguments = ["--data", tmp_path / "text.txt", *TINY, "--max_iters", 2, "--fresh"]
    assert command(train, *arguments).status == 0
    assert own.is_symlink() and set(os.listdir(tmp_path / "disk" / "run")) == FILES
    assert contents(tmp_path / "disk" / "run-1") == first
    (tmp_path / "new").symlink_to("disk/new")
    assert command(train, *arguments, "--out_dir", "new").status == 0
    assert (tmp_path / "new").is_symlink() and set(os.listdir(tmp_path / "disk" / "new")) == FILES
    monkeypatch.chdir(tmp_path / "disk" / "new")
    assert_refused(command(train, *arguments, "--out_dir", "."), "--out_dir .: --fresh cannot move the directory")


def test_fresh_moves_nothing_where_the_new_run_is_refused(command, own, tmp_path):
    before = contents(tmp_path)
    assert_refused(command(train, "--data", "missing.txt", *TINY, "--fresh"), "missing.txt")
    assert_refused(command(train, "--data", "text.txt", *TINY, "--n_head", 5, "--fresh"), "n_head 5")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# Starting from other weights


NO_LEARNING = shlex.split("--max_iters 1 --learning_rate 0 --batch_size 8 --dtype float32 --device cpu --no-compile")


def test_init_from_a_run_starts_with_its_weights(command, finished, own):
    result = command(train, "--data", "text.txt", "--out_dir", "new", "--init_from", "out", *NO_LEARNING)
    assert result.status == 0, result.err
    best = min(m["val_loss"] for m in metrics_of(finished.model) if "val_loss" in m)
    assert metrics_of("new")[-1]["val_loss"] == pytest.approx(best, abs=1e-5)
    assert (Path("new") / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()


def test_init_from_a_run_with_a_smaller_block_size(command, own):
    arguments = ["--data", "text.txt", "--out_dir", "new", "--init_from", "out", *NO_LEARNING]
    assert command(train, *arguments, "--block_size", 8).status == 0
    assert json.loads(Path("new/config.json").read_text())["n_positions"] == 8
    assert_refused(command(train, *arguments, "--out_dir", "larger", "--block_size", 32), "--block_size 32", "16")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--n_layer", "2"], "--n_layer 2: out has 1"),
        (["--n_embd", "32"], "--n_embd 32: out has 16"),
        (["--matrix_lr", "0.01"], "this model is of --arch gpt; leave it out\n"),
        (["--data", "strange.txt"], "--data strange.txt: has the character(s) 'ß' (U+00DF), which the model in out"),
        (["--block_size", "17"], "--block_size 17: out knows only 16 positions"),
        (["--init_from", "nowhere"], "nowhere: no such file or directory"),
        (["--init_from", "gpt2"], "'gpt2' is not in the local cache and cannot be downloaded"),
    ],
)
def test_init_from_weights_that_do_not_fit_is_refused(command, own, tmp_path, monkeypatch, args, words):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    (tmp_path / "strange.txt").write_text("Straße " * 100, encoding="utf-8")
    before = contents(tmp_path)
    assert_refused(
        command(train, "--data", "text.txt", "--out_dir", "new", "--init_from", "out", *NO_LEARNING, *args), words
    )
    assert contents(tmp_path) == before


@pytest.fixture(scope="session")
def byte_pair_model(tmp_path_factory, text, make_model):
    """The directory of a random GPT-2 with a byte-pair tokenizer that was trained on the spot."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("gpt2")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=400, show_progress=False)
    tokenizer = LibraryTokenizer(tokenizers.Tokenizer.from_str(bpe.to_str()))
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=32)
    checkpoint.save_model(str(directory), model, tokenizer)
    return str(directory)


def test_init_from_a_gpt2_with_byte_pairs_trains_on_any_text_and_writes_any_text(
    command, own, tmp_path, byte_pair_model
):
    (tmp_path / "any.txt").write_text("Straße, жизнь, 生活, 🙂. " * 50, encoding="utf-8")
    result = command(train, "--data", "any.txt", "--out_dir", "new", "--init_from", byte_pair_model, *NO_LEARNING)
    assert result.status == 0, result.err
    config = json.loads(Path("new/config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["n_layer"]) == (400, 32, 2)
    assert 0 < metrics_of("new")[-1]["val_bits_per_byte"] < 20
    prompt = "生活 🙂 x"
    result = command(sample, "--out_dir", "new", "--prompt", prompt, "--max_new_tokens", 40, "--seed", 1)
    assert result.status == 0 and result.out.startswith(prompt) and len(result.out) > len(prompt) + 5


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sample_echoes_the_prompt_and_goes_on_with_text_alone(finished):
    result = run("sample.py", "--prompt", "The ", "--max_new_tokens", 50, "--device", "cpu", cwd=finished.cwd)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("The ") and result.out.endswith("\n") and len(result.out) == 4 + 50 + 1


def test_a_prompt_comes_through_a_pipe(finished):
    arguments = ["--prompt_file", "-", "--max_new_tokens", 5, "--device", "cpu"]
    process = start("sample.py", *arguments, cwd=finished.cwd, stdin=subprocess.PIPE)
    result = finish(process, "One é\nday".encode())
    assert (
        (result.status, result.err) == (0, "") and result.out.startswith("One é\nday") and len(result.out) == 9 + 5 + 1
    )


def test_text_streams_and_ctrl_c_ends_it_without_a_traceback(finished):
    n = 8000  # fits in the buffer of a pipe's writer: without streaming nothing would come before all is written
    process = start("sample.py", "--max_new_tokens", n, "--guesses", 0, "--device", "cpu", cwd=finished.cwd)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.status, result.err) == (130, "")
    assert first and len(result.out) < n, "it wrote everything before it showed anything"


def test_a_reader_who_leaves_early_is_no_error(finished):
    process = start("sample.py", "--max_new_tokens", 1_000_000, "--device", "cpu", cwd=finished.cwd)
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_character_that_the_terminal_cannot_show_is_no_error(finished):
    arguments = ["--prompt", "é", "--max_new_tokens", 5, "--device", "cpu"]
    result = run("sample.py", *arguments, cwd=finished.cwd, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert (result.status, result.err) == (0, "") and result.out.startswith("?") and len(result.out) == 7


def test_where_memory_is_short_the_flags_that_ask_for_much_are_to_be_lowered(command, finished, monkeypatch):
    monkeypatch.setattr(sample, "sample", lambda *_: torch.empty(10**15))
    for flags, remedy in (
        ([], "write with a smaller model"),
        (["--num_samples", 9], "lower --num_samples, or write with a smaller model"),
        (["--num_samples", 2, "--num_beams", 3], "lower --num_beams or --num_samples, or write with a smaller model"),
    ):
        assert command(sample, *flags) == (2, "", f"sample.py: error: out of memory; {remedy}\n")


@pytest.mark.parametrize("n", [0, 1, 16, 17, 100])  # block_size is 16
def test_max_new_tokens_is_exact_and_may_exceed_the_block_size(write, n):
    assert len(write("--prompt", "The ", "--max_new_tokens", n)) == 4 + n + 1
    assert len(write("--max_new_tokens", n, "--num_samples", 2)) == 2 * (n + 1) + len("---------------\n")


def test_max_new_tokens_0_prints_the_prompt(write):
    for more in ([], ["--num_beams", 2], ["--num_samples", 1, "--stop", "e"]):
        assert write("--prompt", "The end", "--max_new_tokens", 0, *more) == "The end\n"


def test_a_prompt_longer_than_the_block_size_is_kept_whole(write, text):
    assert write("--prompt", text[:100], "--max_new_tokens", 5).startswith(text[:100])


def test_the_same_seed_writes_the_same_text_and_another_seed_or_none_another(write):
    texts = [write("--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert write() != write()
    several = [write("--seed", 1, "--num_samples", 3) for _ in range(2)]
    assert several[0] == several[1]


def test_temperature_0_and_the_narrowest_top_k_and_top_p_write_the_likeliest(write):
    greedy = write("--temperature", 0)
    assert greedy == write("--temperature", 0, "--seed", 5) == write("--top_k", 1) == write("--top_p", 0)
    assert greedy == write("--top_p", 0.001, "--top_k", 40, "--temperature", 2)


def test_a_wide_top_k_and_top_p_change_nothing(write):
    plain = write("--seed", 3)
    for same in (["--top_k", 0], ["--top_k", 10_000], ["--top_p", 1], ["--temperature", 1]):
        assert write("--seed", 3, *same) == plain
    assert write("--seed", 3, "--top_k", 5) != plain and write("--seed", 3, "--temperature", 0.5) != plain


def test_num_samples_writes_that_many_texts_with_a_line_between_them(write):
    texts = write("--prompt", "The ", "--num_samples", 70, "--max_new_tokens", 20).split("---------------\n")
    assert len(texts) == 70 and len(set(texts)) > 60
    assert all(text.startswith("The ") and len(text) == 4 + 20 + 1 for text in texts)


def test_beam_search_finds_a_likelier_text_than_greedy_and_best_first(write, finished):
    model, tokenizer = checkpoint.load_model(finished.model)
    model.eval()

    def log_prob(text):
        ids = prompt_tokens(tokenizer, text[:-1])  # without the line break at the end
        return -model(ids[:, :-1], ids[:, 1:])[1].item() * (ids.size(1) - 1)

    arguments = ["--prompt", "The ", "--max_new_tokens", 10]
    greedy = write(*arguments, "--temperature", 0)
    beams = write(*arguments, "--num_beams", 8, "--num_samples", 3).split("---------------\n")
    assert len(beams) == 3
    assert log_prob(beams[0]) >= log_prob(greedy) - 1e-4
    assert [log_prob(b) for b in beams] == sorted((log_prob(b) for b in beams), reverse=True)
    assert write(*arguments, "--num_beams", 8) == beams[0]


def test_the_length_penalty_favours_longer_or_shorter_texts(write):
    arguments = ["--prompt", "The", "--num_beams", 6, "--max_new_tokens", 40, "--stop", " "]
    short, long = write(*arguments, "--length_penalty", -3), write(*arguments, "--length_penalty", 3)
    assert len(short) < len(long)


@pytest.mark.parametrize("stop", ["e", " t", ".", "\n", "no such words"])
def test_stop_ends_a_text_and_never_shows(write, stop):
    whole = write("--prompt", "The ", "--seed", 4)
    assert write("--prompt", "The ", "--seed", 4, "--stop", stop) == "The " + whole[4:-1].split(stop)[0] + "\n"

    whole = write("--prompt", "The ", "--seed", 4, "--num_samples", 5).split("---------------\n")
    found = write("--prompt", "The ", "--seed", 4, "--num_samples", 5, "--stop", stop).split("---------------\n")
    assert found == ["The " + text[4:-1].split(stop)[0] + "\n" for text in whole]

    for text in write("--prompt", "The ", "--num_beams", 3, "--num_samples", 3, "--stop", stop).split(
        "---------------\n"
    ):
        assert text.startswith("The ") and stop not in text[4:-1]


def test_a_prompt_from_a_file_or_from_standard_input_is_taken_as_it_is(write, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("One é\n day".encode())
    (tmp_path / "windows.txt").write_bytes("One é\n day".encode("utf-8-sig"))
    expected = write("--prompt", "One é\n day", "--seed", 1)
    assert write("--prompt_file", "prompt.txt", "--seed", 1) == expected
    assert write("--prompt_file", "windows.txt", "--seed", 1) == expected
    assert write("--prompt_file", "-", "--seed", 1, stdin="One é\n day".encode()) == expected


def test_windows_line_ends_in_a_prompt_are_line_breaks_to_a_model_that_knows_no_others(write, tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"One\r\n day")
    assert write("--prompt_file", "windows.txt", "--seed", 1) == write("--prompt", "One\n day", "--seed", 1)


def test_an_empty_prompt_begins_as_after_a_line_break(write):
    plain = write("--seed", 1)
    assert plain == write("--prompt", "", "--seed", 1) == write("--prompt_file", "-", "--seed", 1, stdin=b"")
    assert write("--prompt", "\n", "--seed", 1) == "\n" + plain


def test_sampling_works_in_bfloat16(write):
    assert len(write("--dtype", "bfloat16", "--max_new_tokens", 20)) == 21


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: exit status 2, one line, no traceback, nothing written


BAD_TRAINING = [
    ("--data missing.txt", "--data missing.txt: cannot be read (No such file"),
    ("--data empty.txt", "--data empty.txt: is empty"),
    ("--data binary.dat", "--data binary.dat: is a binary file (a zero byte at offset 4)"),
    ("--data binary.bin", "--data binary.bin: has no prepared.json beside it"),
    ("--data latin1.txt", "--data latin1.txt: is not UTF-8"),
    ("--data .", "--data ./latin1.txt: is not UTF-8 (byte 4)"),
    ("--data *.jsonl", "--data *.jsonl: holds no text"),
    ("--tokenizer bpe:100", "--tokenizer bpe:100: wants bpe: and a number of tokens of at least 256"),
    ("--tokenizer nowhere", "--tokenizer nowhere: there is no such thing"),
    ("--data one.txt", "--data one.txt: has only 1 character"),
    ("--data short.txt", "--block_size 16: the training text has only 13 tokens"),
    ("--block_size 100000", "--block_size 100000: the training text has only"),
    ("--n_embd 16 --n_head 3", "n_embd 16 is not divisible by n_head 3"),
    ("--n_layer 0", "--n_layer: wants a whole number of at least 1 and below 10000, not '0'"),
    ("--n_layer nan", "--n_layer: wants a whole number of at least 1 and below 10000, not 'nan'"),
    ("--n_layer -1", "--n_layer: wants a whole number of at least 1 and below 10000, not '-1'"),
    ("--n_head 0", "--n_head"),
    ("--n_embd 1.5", "--n_embd: wants a whole number of at least 1, not '1.5'"),
    ("--block_size x", "--block_size: wants a whole number of at least 1, not 'x'"),
    ("--batch_size 0", "--batch_size"),
    ("--max_iters 0", "--max_iters"),
    ("--eval_interval 0", "--eval_interval"),
    ("--eval_iters 0", "--eval_iters"),
    ("--log_interval 0", "--log_interval"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
    ("--dropout 1", "--dropout: wants a number of at least 0 and below 1"),
    ("--dropout -0.1", "--dropout"),
    ("--learning_rate nan", "--learning_rate: wants a number of at least 0, not 'nan'"),
    ("--learning_rate inf", "--learning_rate"),
    ("--learning_rate -1", "--learning_rate"),
    ("--beta2 1", "--beta2"),
    ("--grad_clip -1", "--grad_clip"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999999", "--seed: 99999999999999999999999 is too large"),
    ("--n_layer 1000000000", "--n_layer: wants a whole number of at least 1 and below 10000, not '1000000000'"),
    ("--minutes 1e300", "--minutes: wants a number above 0 and below 1000000, not '1e300'"),
    ("--tokenizer bpe:" + 5000 * "9", "wants bpe: and a number of tokens"),
    ("--n_embd 1000000000", "GiB of memory"),
    ("--batch_size 1000000000", "GiB of memory"),
    ("--n_embd 99999999999999999999999", "--n_embd: 99999999999999999999999 is too large"),
    ("--device abacus", "--device abacus: no such device"),
    ("--device cuda:x", "--device cuda:x: no such device"),
    ("--dtype float16", "--dtype float16 needs a CUDA GPU"),
    ("--dtype float64", "--dtype: wants one of float32, bfloat16, float16"),
    ("--compile perhaps", "--compile: wants True or False, not 'perhaps'"),
    ("--banana 3", "unknown flag --banana"),
    ("stray", "stray: belongs to no flag"),
    ("--out_dir text.txt", "--out_dir text.txt: cannot be written"),
    ("--out_dir text.txt/below", "--out_dir text.txt/below: cannot be written"),
    ("--out_dir=", "--out_dir: is empty"),
    ("--matrix_lr 0.02", "--matrix_lr 0.02: is for --arch modern, and this model is of --arch gpt; leave it out, or"),
    ("--arch modern --bias", "--bias: is for --arch gpt, and this model is of --arch modern; leave it out, or"),
    ("--resume", "holds no state.pt to resume from; start without --resume"),
    ("--init_from text.txt", "--init_from text.txt: is damaged, or a pickle that could run code"),
    ("--init_from .", "--init_from .: holds no model yet"),
    (
        "--init_from run/state.pt",
        "--init_from run/state.pt: is no nanoGPT checkpoint (it has no 'model' and 'model_args'); name",
    ),
    ("--shard", "--shard: spreads a model over several processes; start them with torchrun, or leave it out"),
    (
        "--min_lr 1",
        "--min_lr 1: is where the learning rate ends, and above --learning_rate 0.01, its highest; lower it",
    ),
]

BAD_SAMPLING = [
    ("--prompt Straße", "'ß' (U+00DF)"),
    ("--prompt_file missing.txt", "--prompt_file missing.txt: cannot be read"),
    ("--prompt ж", "--prompt: the model was trained on a text without the character(s) 'ж' (U+0436); leave them out"),
    ("--prompt_file strange.txt", "--prompt_file strange.txt: the model was trained on a text without"),
    ("--prompt_file latin1.txt", "--prompt_file latin1.txt: is not UTF-8"),
    ("--prompt_file .", "--prompt_file .: cannot be read"),
    ("--prompt x --prompt_file text.txt", "--prompt and --prompt_file: give one of the two"),
    ("--stop=", "--stop: is empty; give the text that ends a sample, or leave it out"),
    ("--top_k -1", "--top_k: wants a whole number of at least 0, not '-1'"),
    ("--top_k 1.5", "--top_k"),
    ("--top_p 1.5", "--top_p 1.5: is a probability"),
    ("--top_p -0.5", "--top_p"),
    ("--temperature -1", "--temperature: wants a number of at least 0, not '-1'"),
    ("--temperature nan", "--temperature"),
    ("--max_new_tokens -1", "--max_new_tokens"),
    ("--num_samples 0", "--num_samples: wants a whole number of at least 1, not '0'"),
    ("--num_samples 3 --num_beams 2", "--num_samples 3: a search with --num_beams 2"),
    ("--num_beams 0", "--num_beams"),
    ("--length_penalty nan", "--length_penalty"),
    ("--length_penalty 1000 --num_beams 2", "--length_penalty"),
    ("--seed 99999999999999999999999", "--seed: 99999999999999999999999 is too large"),
    ("--device abacus", "--device abacus: no such device"),
    ("--temprature 1", "did you mean --temperature?"),
    ("--out_dir nowhere", "nowhere: no such file or directory"),
    ("--out_dir .", "holds no model yet (no config.json); train one with: python train.py"),
    ("--out_dir text.txt", "text.txt: is damaged, or a pickle that could run code"),
]


@pytest.fixture
def inputs(finished, tmp_path):
    """tmp_path with good and bad input files in it."""
    shutil.copy(str(finished.cwd / "text.txt"), str(tmp_path))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "strange.txt").write_text("ж", encoding="utf-8")
    for name in ("binary.bin", "binary.dat"):
        (tmp_path / name).write_bytes(b"text\0\1\2" * 100)
    (tmp_path / "latin1.txt").write_bytes("Straße".encode("latin-1") * 100)
    (tmp_path / "one.txt").write_bytes(b"x")
    (tmp_path / "short.txt").write_bytes(b"abcdefghijklmno")
    (tmp_path / "run").mkdir()
    for name in ("state.pt", "config.json"):
        shutil.copy(os.path.join(finished.model, name), str(tmp_path / "run"))
    return tmp_path


@pytest.mark.parametrize("args, words", BAD_TRAINING, ids=[args[:60] for args, _ in BAD_TRAINING])
def test_training_refuses_bad_input(command, inputs, args, words):
    before = contents(inputs)
    assert_refused(
        command(train, "--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 2, *args.split()), words
    )
    assert contents(inputs) == before


@pytest.mark.parametrize("args, words", BAD_SAMPLING, ids=[args for args, _ in BAD_SAMPLING])
def test_sampling_refuses_bad_input(command, inputs, finished, args, words):
    before = contents(inputs)
    assert_refused(command(sample, "--out_dir", finished.model, "--device", "cpu", *args.split()), words)
    assert contents(inputs) == before


def test_a_step_that_no_memory_holds_is_refused(command, inputs, monkeypatch):
    monkeypatch.setattr(budget, "memory_of", lambda device: 10**5)
    before = contents(inputs)
    result = command(train, "--data", "text.txt", "--out_dir", "new", *TINY)
    assert_refused(
        result, "a step would keep", "0 GiB for its backward pass and this machine has 0; lower --block_size (16)"
    )
    assert contents(inputs) == before


def test_a_dataset_on_a_hub_that_is_not_reached_is_refused_without_asking_again(inputs, tmp_path_factory):
    """Hugging Face's library would print each time it asks."""
    pytest.importorskip("datasets")
    environment = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path_factory.mktemp("hf")))
    before = contents(inputs)
    result = run("train.py", "--data", "hf:some/set", "--out_dir", "new", *TINY, cwd=inputs, env=environment)
    assert_refused(result, "--data hf:some/set: cannot be read (ConnectionError: Couldn't reach", "; check the name")
    assert contents(inputs) == before


@pytest.mark.parametrize("name", ["WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"])
def test_an_environment_that_torchrun_did_not_make_is_refused(command, inputs, monkeypatch, name):
    monkeypatch.setenv(name, "x")
    before = contents(inputs)
    for more in ([], ["--plan"]):
        result = command(train, "--data", "text.txt", "--out_dir", "new", *TINY, "--max_iters", 2, *more)
        if name == "WORLD_SIZE" or not more:
            assert_refused(result, f"{name}=x: this environment variable wants a whole number")
    assert contents(inputs) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_is_refused_where_there_is_none(command, inputs, finished):
    for device in ("cuda", "cuda:1"):
        assert_refused(command(train, "--data", "text.txt", *TINY, "--device", device), f"--device {device}", "cpu")
        assert_refused(command(sample, "--out_dir", finished.model, "--device", device), f"--device {device}", "cpu")


def test_bad_input_is_refused_by_the_processes_themselves(inputs):
    before = contents(inputs)
    started = [
        (start("train.py", "--data", "missing.txt", cwd=inputs), "--data missing.txt: cannot be read"),
        (start("sample.py", cwd=inputs), "out: no such file or directory"),
        (start("export.py", cwd=inputs), "out: no such file or directory"),
        (start("bigram.py", "--data", "missing.txt", cwd=inputs), "--data missing.txt: cannot be read"),
        (start("trigram.py", "--data", "missing.txt", cwd=inputs), "--data missing.txt: cannot be read"),
    ]
    for process, words in started:
        assert_refused(finish(process), words)
    assert contents(inputs) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_model_is_refused_by_name(command, own, name, share):
    whole = (own / name).read_bytes()
    (own / name).write_bytes(whole[: int(share * len(whole))])
    assert_refused(command(sample), name)
    assert_refused(command(train, "--data", "text.txt", "--out_dir", "new", "--init_from", "out", *NO_LEARNING), name)
    assert not Path("new").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_states_are_refused_by_name_and_left_as_they_are(command, own, tmp_path, share):
    for name in ("state.pt", *EARLIER):
        whole = (own / name).read_bytes()
        (own / name).write_bytes(whole[: int(share * len(whole))])
    before = contents(tmp_path)
    assert_refused(command(train, "--resume", "--max_iters", 2 * STEPS), "state.pt")
    assert contents(tmp_path) == before


def test_metrics_cut_off_by_a_crash_do_not_stop_a_resume(command, own):
    with open(str(own / "metrics.jsonl"), "a") as f:
        f.write('{"step": 9')
    assert command(train, "--resume", "--max_iters", STEPS + 1).status == 0
    assert metrics_of(own)[-1]["step"] == STEPS + 1


class Trap:
    """A pickle that leaves a mark when it is read the careless way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(command, own, tmp_path):
    mark = str(tmp_path / "mark")
    with pytest.raises(FileNotFoundError):
        os.stat(mark)
    os.remove("out/state-250.pt")
    torch.save({"model": Trap(mark)}, "zipped.pt")
    for content in (Path("zipped.pt").read_bytes(), pickle.dumps(Trap(mark))):
        for path in ("out/state.pt", "ckpt.pt"):
            Path(path).write_bytes(content)
        assert_refused(command(train, "--resume", "--max_iters", 2 * STEPS), "state.pt", "pickle that could run code")
        assert_refused(command(sample, "--out_dir", "ckpt.pt"), "ckpt.pt", "pickle that could run code")
        arguments = ["--data", "text.txt", "--out_dir", "new", "--init_from", "ckpt.pt"]
        assert_refused(command(train, *arguments), "ckpt.pt", "pickle that could run code")
    assert not os.path.exists(mark) and not os.path.exists("new")
    pickle.loads(content)
    assert os.path.exists(mark), "the trap does not work"


def test_a_pickle_is_refused_by_the_process_too(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Trap(str(tmp_path / "mark"))))
    assert_refused(finish(Command("sample.py", "--out_dir", "ckpt.pt", cwd=tmp_path)), "pickle that could run code")
    assert os.listdir(str(tmp_path)) == ["ckpt.pt"]


def test_a_model_of_another_architecture_is_refused_by_its_name(command, own):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert_refused(command(sample), "config.json", "'llama'")
    (own / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    assert_refused(command(sample), "its weights do not fit its own config")


# ---------------------------------------------------------------------------------------------------------------------
# The README: every command in it runs


# What makes a command small enough for a test; later flags win over earlier ones.
SHRINK = {
    "train.py": "--n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --batch_size 4 --gradient_accumulation_steps 1",
    "sample.py": "--max_new_tokens 20",
    "bigram.py": "--steps 5 --max_new_tokens 20",
    "trigram.py": "--max_new_tokens 20",
    "export.py": "",
    "data.py": "",
}
OPTIONS = {"train.py": train.TrainOptions, "sample.py": sample.SampleOptions}
OPTIONS.update({"bigram.py": bigram.BigramOptions, "trigram.py": trigram.TrigramOptions})


def code_blocks(path, language):
    """The lines of every block in that language, continued lines joined, in the order of the file."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines() if language != "python" else blocks
    return [line.strip() if language != "python" else line for line in lines if line.strip()]


def shrunk(line, steps, cwd):
    """The words of the python command in a line, made small. steps: {out_dir: how many steps its run has done}."""
    words = shlex.split(line, comments=True)
    assert words[0] == "python" and words[1] in SHRINK, f"teach this test to shrink: {line}"
    if words[1] != "train.py":
        return [*words[1:], *SHRINK[words[1]].split()]
    options, _ = utils.parse_options(train.TrainOptions, words[2:], "")
    if options.minutes is not None:
        words += ["--minutes", "0.05"]
    out_dir, few = options.out_dir, ["--eval_iters", "1", "--eval_interval", "2"]
    if options.resume:
        steps[out_dir] += 2
        return [*words[1:], *few, "--max_iters", str(steps[out_dir])]
    if (cwd / out_dir).exists():
        out_dir = f"{out_dir}-{len(steps)}"
    steps[out_dir] = 2
    more = ["--out_dir", out_dir, "--max_iters", "2", "--sample_interval", str(min(2, options.sample_interval))]
    return [*words[1:], *SHRINK["train.py"].split(), *few, *more]


def test_readme_commands(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(str(path), str(tmp_path))
    shutil.copytree(str(ROOT / "page"), str(tmp_path / "page"))
    whole = (ROOT / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text(whole[:10_000] + "".join(sorted(set(whole))), encoding="utf-8")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.jsonl").write_text(json.dumps({"text": whole[:10_000]}), encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps, ran = {}, []
    for line in code_blocks(ROOT / "README.md", "bash"):
        first = line.split()[0]
        if first == "make":
            target = line.split()[1]
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target: {line}"
        elif first == "pip":
            words = shlex.split(line, comments=True)
            assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).exists(), line
        elif first in ("git", "cd", "torchrun"):  # test_distributed.py starts torchrun
            continue
        else:
            feed, _, last = line.rpartition("|")
            assert not feed or feed.split()[0] == "echo", f"teach this test to run: {line}"
            words = shrunk(last, steps, tmp_path)
            stdin = " ".join(shlex.split(feed)[1:]).encode() + b"\n" if feed else b""
            result = finish(Command(tmp_path / words[0], *words[1:], cwd=tmp_path, stdin=stdin))
            assert result.status == 0, (line, result)
            assert result.out and "Traceback" not in result.err
            ran.append(words[0])
    assert {"train.py", "sample.py", "bigram.py", "trigram.py", "export.py"} <= set(ran) and len(ran) >= 8
    for code in code_blocks(ROOT / "README.md", "python"):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=str(tmp_path), env=ENVIRONMENT, capture_output=True, timeout=120
        )
        assert (result.returncode, result.stderr) == (0, b""), (code, result)


def test_the_commands_of_the_description_are_in_the_readme_as_written():
    lines = [" ".join(line.split()) for line in code_blocks(ROOT / "README.md", "bash")]
    for line in (
        "python train.py --batch_size 64 --block_size 256 --n_embd 384 --n_head 6 --n_layer 6 --max_iters 5000 "
        "--eval_interval 500",
        'python sample.py --prompt "The meaning of life is"',
        "python train.py --n_layer 12 --n_head 12 --n_embd 768 --batch_size 16 --gradient_accumulation_steps 4 "
        "--max_iters 20000",
        "python sample.py --temperature 0.8 --top_k 40 --max_new_tokens 500",
    ):
        assert line in lines


def test_windows_commands_and_the_makefile_use_flags_that_exist():
    commands = [line for line in code_blocks(ROOT / "README.md", "powershell") if ".py" in line]
    assert commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands.append("python train.py " + re.search(r"^NEW := .*,,(.*)\)$", makefile, re.MULTILINE).group(1))
    for line in commands:
        words = shlex.split(line.replace("\\", "/"))
        options, _ = utils.parse_options(OPTIONS[words[1]], words[2:], "")
        if words[1] == "train.py":
            assert options.n_embd % options.n_head == 0
        else:
            assert not options.prompt or not set(options.prompt) - set((ROOT / "input.txt").read_text(encoding="utf-8"))


def ways_to_write(number):
    """0.004 as 0.004 and 4e-3, 10000 as 10000 and 10,000."""
    if isinstance(number, bool):
        return {str(number)}
    return {str(number), f"{number:g}", f"{number:,}", re.sub(r"e-0", "e-", f"{number:.0e}")}


def test_the_readme_tells_every_flag_of_train_and_its_default():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=- `--)|\n\n", readme)  # an item of a list each, of one flag or of several
    for f in fields(train.TrainOptions):
        told = [entry for entry in entries if entry.startswith("- `--") and f"`--{f.name}`" in entry]
        assert told, f.name
        if isinstance(f.default, (bool, int, float)) and f.default is not False:
            words = set(re.findall(r"[\w.,-]*\w", " ".join(told)))
            assert ways_to_write(f.default) & words, (f.name, f.default, told)


def test_the_defaults_of_a_modern_model_are_those_that_the_help_and_the_readme_tell():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, value in plan.MODERN.items():
        [told] = [f.metadata["help"] for f in fields(train.TrainOptions) if f.name == name]
        assert any(f"modern: {number}" in told for number in ways_to_write(value)), told
        assert any(f"`--{name}` {number}" in readme for number in ways_to_write(value)), name
    [told] = [f.metadata["help"] for f in fields(train.TrainOptions) if f.name == "ngram"]
    assert told.endswith(f"modern: {plan.MODERN_SHAPE['ngram']}") and train.TrainOptions.ngram == 1
    [told] = [f.metadata["help"] for f in fields(train.TrainOptions) if f.name == "ahead"]
    assert "modern: 4," in told and train.TrainOptions.ahead == 1
