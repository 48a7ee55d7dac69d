"""Runs that are killed, find no room on the disk or read damaged files: they go on, and end as the unbroken one.

The short forms are in `make test`; the long ones, marked so, in `make test-long`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import forked
from processes import Command

import checkpoint
import utils
from checkpoint import load_model, load_state, save_state, saved_loss, write_model
from tokenizer import CharTokenizer
from utils import UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL, no fork and no limits")

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40
# Two parts in every step, side by side in two threads, each with its own dropout; saved after every other step. The
# learning rate stays the same, so that 10 steps are the first of 60.
FLAGS = "--data text.txt --device cpu --no-compile --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 48"
FLAGS += " --gradient_accumulation_steps 2 --dropout 0.2 --learning_rate 1e-2 --min_lr 1e-2 --warmup_iters 5"
FLAGS += " --log_interval 1 --eval_interval 2 --max_iters"
STEPS = 60


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs in processes of their own


class Training:
    """A run in a directory of its own, which is started again and again."""

    def __init__(self, cwd, steps=STEPS, flags=""):
        self.cwd, self.out, self.flags = Path(cwd), Path(cwd, "out"), f"{FLAGS} {steps} {flags}".split()
        self.cwd.mkdir(exist_ok=True)
        (self.cwd / "text.txt").write_text(TEXT, encoding="utf-8")

    def start(self, *more, limit=None):
        """A Command of the run: from the beginning, or going on where it has saved something. limit: on file sizes."""
        started = bool(checkpoint.state_files(str(self.out)))
        flags = [*(["--resume"] if started else [*self.flags, "--fresh"]), *map(str, more)]
        return Command("train.py", *flags, cwd=self.cwd, threads=2, limit=limit)

    def finish(self, *more, limit=None):
        """Run it to its end: (exit status, stdout, stderr)."""
        process = self.start(*more, limit=limit)
        out, err = process.communicate()
        return process.returncode, out.decode(), err.decode()

    def metrics(self):
        with contextlib.suppress(FileNotFoundError), open(str(self.out / "metrics.jsonl")) as f:
            return [json.loads(line) for line in f if line.endswith("}\n")]
        return []

    def wait_for_more(self, process, lines):
        """Wait until its metrics are not those any more."""
        for _ in range(10_000):
            assert process.poll() is None, process.communicate()
            if self.metrics() != lines:
                return
            time.sleep(0.005)
        pytest.fail("no step came")


def assert_same_end(found, expected):
    """The same files bit for bit, the same state and the same measured losses, of runs that were made in pieces."""
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (found.out / name).read_bytes() == (expected.out / name).read_bytes(), name
    ours, theirs = load_state(str(found.out)), load_state(str(expected.out))
    for state in (ours, theirs):  # how long they took, and how they were started, is all that may differ
        for name in ("seconds", "first_second"):
            del state["counters"][name]
        for name in ("resume", "fresh"):
            del state["options"][name]
    assert_equal(ours, theirs)
    lines = [
        {(m["step"], key, m[key]) for m in run.metrics() for key in ("train_loss", "val_loss", "grad_norm") if key in m}
        for run in (found, expected)
    ]
    assert lines[0] == lines[1]
    assert len(found.metrics()) == len(expected.metrics()), "a step is there twice"


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill_again_and_again(killed, unbroken, kills):
    """Kill a run that many times, each at a random moment after it has begun its steps, and compare its end."""
    dice = random.Random(0)
    for n in range(kills):
        process = killed.start()
        for _ in range(dice.randrange(1, 12)):  # steps, not seconds: however fast they are, the run is not over yet
            killed.wait_for_more(process, killed.metrics())
        time.sleep(dice.uniform(0, 0.02))
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it was over before kill {n + 1}: {err}"
    status, _, err = killed.finish()
    assert status == 0, err
    assert_same_end(killed, unbroken)
    assert_nothing_is_half_written(killed.out)


def assert_nothing_is_half_written(out):
    assert not [name for name in os.listdir(str(out)) if name.endswith(".tmp")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happened to."""
    run = Training(tmp_path_factory.mktemp("unbroken"))
    status, _, err = run.finish()
    assert status == 0, err
    return run


def test_a_run_killed_at_3_random_moments_ends_as_the_unbroken_one(tmp_path, unbroken):
    kill_again_and_again(Training(tmp_path), unbroken, 3)


@pytest.mark.long
@pytest.mark.parametrize("flags", ["--arch gpt --dtype float32", "--arch modern --dtype bfloat16"])
def test_a_run_killed_at_30_random_moments_ends_as_the_unbroken_one(tmp_path, flags):
    whole, killed = (Training(tmp_path / name, 1000, flags) for name in ("whole", "killed"))
    assert whole.finish()[0] == 0
    kill_again_and_again(killed, whole, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Killed at any line of the code that writes


def moment(make_model, step):
    """What a run's saver writes at a step whose weights are the best so far: (state, config, tensors, val loss)."""
    config, tensors = checkpoint.model_files(make_model(seed=step))
    state = dict(options={}, counters=dict(step=step, best=1 / step), model=tensors, optimizers=[])
    return state, config, tensors, 1 / step


def write(directory, moment, keep):
    state, config, tensors, loss = moment
    write_model(directory, config, tensors, CharTokenizer("\nabcdefghij"), 8, loss)
    save_state(directory, state, keep)


def at_each_line(act):
    """A tracer that calls act() before each line of ours that is run."""
    ours = {checkpoint.__file__, utils.__file__}

    def trace(frame, event, _):
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            act()
        return trace

    return trace


def count_lines(function, *args):
    """How many lines of ours a call runs."""
    lines, before = [], sys.gettrace()
    sys.settrace(at_each_line(lambda: lines.append(1)))
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return len(lines)


def kill_at_line(n, function, *args):
    """Call the function in a child that is killed before the n-th line of ours that it runs."""
    left = iter(range(n - 1))

    def kill():
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def call():
        sys.settrace(at_each_line(kill))
        function(*args)

    assert os.waitpid(forked(call), 0)[1] == signal.SIGKILL


def killed_saving(tmp_path, make_model, keep, most):
    """Kill a saving at its lines, or at `most` of them at even distances: what is there is whole and fits together."""
    before, out = str(tmp_path / "before"), str(tmp_path / "out")
    os.mkdir(before)
    write(before, moment(make_model, 1), keep)
    write(before, moment(make_model, 2), keep)
    shutil.copytree(before, out)
    lines = count_lines(write, out, moment(make_model, 3), keep)
    found = set()
    for n in sorted({1 + i * (lines - 1) // (most - 1) for i in range(most)} | {lines - i for i in range(30)}):
        shutil.rmtree(out)
        shutil.copytree(before, out)
        kill_at_line(n, write, out, moment(make_model, 3), keep)
        step, best = load_state(out)["counters"]["step"], saved_loss(out)
        found.add((step, best))
        kept = make_model(seed=round(1 / best)).state_dict()  # the weights that have this loss
        assert all(map(torch.equal, load_model(out)[0].state_dict().values(), kept.values())), n
        write(out, moment(make_model, 3), keep)  # the next saving finds nothing in its way
        names = set(["state.pt", "state-2.pt", "state-1.pt"][:keep])
        assert {name for name in os.listdir(out) if "state" in name or "tmp" in name} == names, n
    assert found == {(2, 1 / 2), (2, 1 / 3), (3, 1 / 3)}, "before, between and after the two renames"


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_a_line_of_a_saving_whole_files_that_fit_together_are_left(tmp_path, make_model, capsys, keep):
    killed_saving(tmp_path, make_model, keep, 30)
    assert capsys.readouterr().out == "", "nothing was damaged"


@pytest.mark.long
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_killed_at_each_line_of_a_saving_whole_files_that_fit_together_are_left(tmp_path, make_model, keep):
    killed_saving(tmp_path, make_model, keep, 10_000)


# ---------------------------------------------------------------------------------------------------------------------
# No room, no permission


def assert_refused(result, *words):
    """Exit status 2 and one line of error that holds all the words (a progress bar may stand before it)."""
    status, _, err = result
    last = err.replace("\r", "\n").splitlines()[-1]
    assert status == 2 and "Traceback" not in err and err.count("error: ") == 1, err
    assert last.startswith("train.py: error: ") and all(word in last for word in words), last


def begun(cwd):
    """A run that has made its first 10 steps of STEPS."""
    run = Training(cwd)
    assert run.finish("--max_iters", 10)[0] == 0
    return run


@pytest.mark.parametrize(
    "share", [0.9, pytest.param(0.6, marks=pytest.mark.long), pytest.param(0.3, marks=pytest.mark.long)]
)
def test_where_a_file_cannot_be_written_the_run_ends_in_one_line_and_later_goes_on(tmp_path, unbroken, share):
    """At a limit of the largest file, the state, which is met in its saving; below it others meet it too."""
    run = begun(tmp_path)
    limit = int(share * (run.out / "state.pt").stat().st_size)
    result = run.finish("--max_iters", STEPS, limit=limit)
    assert_refused(result, "--out_dir out: cannot be written (File too large); make room there", "--resume")
    assert load_state(str(run.out))["counters"]["step"] == 10
    assert_nothing_is_half_written(run.out)
    load_model(str(run.out))
    assert run.finish("--max_iters", STEPS)[0] == 0
    assert_same_end(run, unbroken)


def test_where_even_the_first_saving_fails_the_remedy_is_to_start_anew(tmp_path):
    run = Training(tmp_path)
    assert_refused(run.finish(limit=5000), "cannot be written (File too large); make room there, then start anew with")
    assert not checkpoint.state_files(str(run.out))


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options): a file system in memory, mounted with these options, or mounted anew with others."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(options):
        options = f"remount,{options}" if mounted else options
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        done = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        if not done and not mounted:
            pytest.skip("nothing can be mounted here")
        assert done, options
        mounted.append(options)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_on_a_full_disk_the_run_ends_in_one_line_and_goes_on_once_there_is_room(small_disk, unbroken):
    run = Training(small_disk("size=100m"), flags="--keep 99")
    assert run.finish("--max_iters", 10)[0] == 0
    used = sum(path.stat().st_size for path in [*run.cwd.iterdir(), *run.out.iterdir()] if path.is_file())
    small_disk(f"size={(used + 5 * (run.out / 'state.pt').stat().st_size) // 1024}k")
    result = run.finish("--max_iters", STEPS)
    assert_refused(result, "--out_dir out: cannot be written (No space left on device); make room there", "--resume")
    assert 10 <= load_state(str(run.out))["counters"]["step"] < STEPS
    assert_nothing_is_half_written(run.out)
    load_model(str(run.out))
    small_disk("size=100m")
    assert run.finish("--max_iters", STEPS, "--keep", 2)[0] == 0
    ours = load_state(str(run.out))
    assert_equal(ours["model"], load_state(str(unbroken.out))["model"])
    assert (run.out / "model.safetensors").read_bytes() == (unbroken.out / "model.safetensors").read_bytes()
    assert len(checkpoint.state_files(str(run.out))) == 2


def test_a_directory_that_may_only_be_read_is_refused_in_one_line_and_left_as_it_is(small_disk, unbroken):
    place = small_disk("size=100m")
    shutil.copytree(str(unbroken.out), str(place / "out"))
    run = Training(place)
    before = {path.name: path.read_bytes() for path in run.out.iterdir()}
    small_disk("ro")
    result = run.finish("--max_iters", STEPS + 10)
    assert_refused(result, "--out_dir out: cannot be written (Read-only file system)")
    assert {path.name: path.read_bytes() for path in run.out.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def damages(content, width):
    """(what was done, the damaged content) for each range of `width` bytes: its bits turned, gone to 0, and cut off."""
    for begin in range(0, len(content), width):
        end = min(begin + width, len(content))
        yield (
            f"bytes {begin} to {end} turned",
            b"".join((content[:begin], bytes(255 - byte for byte in content[begin:end]), content[end:])),
        )
        if any(content[begin:end]):
            yield f"bytes {begin} to {end} gone", content[:begin] + bytes(end - begin) + content[end:]
        yield f"cut off at {begin}", content[:begin]


def damage_state(out, width, capsys):
    """Damage each range of the newest state in turn: the one before is loaded, and a line says so."""
    path = out / "state.pt"
    whole = path.read_bytes()
    for what, content in damages(whole, width):
        path.write_bytes(content)
        capsys.readouterr()
        assert load_state(str(out))["counters"]["step"] == STEPS - 2, what
        said = capsys.readouterr().out
        assert said.startswith(f"{path}: ") and said.count("\n") == 1, said
        assert f"; going on from the state before it, {out / f'state-{STEPS - 2}.pt'}" in said
    path.write_bytes(whole)
    assert load_state(str(out))["counters"]["step"] == STEPS and capsys.readouterr().out == ""


def damage_weights(out, width):
    """Damage each range of the weights in turn: they are refused, or right where the checksum is gone."""
    path = out / "model.safetensors"
    whole, expected = path.read_bytes(), load_model(str(out))[0].state_dict()
    for what, content in damages(whole, width):
        path.write_bytes(content)
        try:
            found = load_model(str(out))[0].state_dict()
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert f'"{checkpoint.CHECKSUM}": "'.encode() not in content, what
            assert all(map(torch.equal, found.values(), expected.values())), what
    path.write_bytes(whole)


@pytest.fixture
def own(unbroken, tmp_path):
    """A copy of the unbroken run, to damage."""
    shutil.copytree(str(unbroken.cwd), str(tmp_path / "own"))
    return Training(tmp_path / "own")


def test_whatever_part_of_the_newest_state_is_damaged_the_one_before_is_used(own, capsys):
    damage_state(own.out, 1500, capsys)


@pytest.mark.long
def test_whatever_single_bytes_of_the_newest_state_are_damaged_the_one_before_is_used(own, capsys):
    damage_state(own.out, 17, capsys)


def test_whatever_part_of_the_weights_is_damaged_they_are_refused(own):
    damage_weights(own.out, 500)


@pytest.mark.long
def test_whatever_single_bytes_of_the_weights_are_damaged_they_are_refused(own):
    damage_weights(own.out, 7)


def test_a_run_whose_newest_state_is_damaged_goes_on_from_the_one_before_and_ends_alike(own, unbroken):
    path = own.out / "state.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    status, out, err = own.finish()
    assert status == 0, err
    assert f"going on from the state before it, {os.path.join('out', f'state-{STEPS - 2}.pt')}" in out
    assert_same_end(own, unbroken)


def test_a_run_whose_states_are_all_damaged_is_refused_and_left_as_it_is(own):
    for path in own.out.glob("state*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path.name: path.read_bytes() for path in own.out.iterdir()}
    assert_refused(own.finish("--resume"), "state.pt: is damaged", "nor is an earlier state whole", "--fresh")
    assert {path.name: path.read_bytes() for path in own.out.iterdir()} == before


def test_a_run_whose_weights_are_damaged_says_so_and_writes_them_anew(own):
    path = own.out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, out, err = own.finish("--max_iters", STEPS + 2)
    assert status == 0, err
    assert out.count("model.safetensors: is damaged") == 1
    assert saved_loss(str(own.out)) == load_state(str(own.out))["counters"]["best"]
    load_model(str(own.out))
