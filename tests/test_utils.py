"""utils.py: the command line, the choice of device and dtype, errors of one line, files that are whole or not there."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
import torch

import utils
from utils import UserError, option, parse_options, pick_device, pick_dtype, run_command, write_atomically, write_json

CPU = torch.device("cpu")
ROOT = str(Path(utils.__file__).parent)


@dataclass
class Options:
    size: int = option(6, "a size", at_least=1)
    rate: float = option(0.5, "a rate of 50 %", at_least=0, below=1)
    free: float = option(1.0, "any number")
    name: Optional[str] = option(None, "a name (default: none)")
    kind: str = option("red", "a colour", choices=("red", "blue"))
    compile: bool = option(True, "yes or no")


def parse(*argv):
    return parse_options(Options, list(argv), "A test.")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_without_flags_all_hold_their_default_and_none_is_given():
    assert parse() == (Options(), set())


@pytest.mark.parametrize("argv", [["--size", "3", "--name", "x"], ["--size=3", "--name=x"]])
def test_a_value_follows_the_flag_after_a_space_or_an_equals_sign(argv):
    assert parse(*argv) == (Options(size=3, name="x"), {"size", "name"})


def test_the_last_of_a_flag_given_twice_counts():
    assert parse("--size", "3", "--size", "4")[0].size == 4


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--compile"], True),
        (["--compile", "True"], True),
        (["--compile=true"], True),
        (["--compile", "1"], True),
        (["--compile", "False"], False),
        (["--compile=false"], False),
        (["--compile", "0"], False),
        (["--no-compile"], False),
        (["--no_compile"], False),
        (["--no-compile", "--compile"], True),
    ],
)
def test_booleans_can_be_written_in_every_usual_way(argv, value):
    options, given = parse(*argv)
    assert options.compile is value and given == {"compile"}


@pytest.mark.parametrize("number, value", [("1e-3", 0.001), (".25", 0.25), ("0", 0.0), ("3E-4", 3e-4)])
def test_numbers_are_read_in_every_usual_notation(number, value):
    assert parse("--rate", number)[0].rate == value


def test_negative_numbers_and_values_that_begin_with_a_dash_are_not_taken_for_flags():
    assert parse("--free", "-1.5")[0].free == -1.5
    assert parse("--name=-x")[0].name == "-x"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--size", "0"], "--size: wants a whole number of at least 1, not '0'"),
        (["--size", "-3"], "--size: wants a whole number of at least 1, not '-3'"),
        (["--size", "1.5"], "--size: wants a whole number of at least 1, not '1.5'"),
        (["--size", "six"], "--size: wants a whole number of at least 1, not 'six'"),
        (["--size", ""], "--size: wants a whole number of at least 1, not ''"),
        (["--size=" + 30 * "9"], "too large"),
        (["--size"], "--size: expected one argument"),
        (["--rate", "1"], "--rate: wants a number of at least 0 and below 1, not '1'"),
        (["--rate", "nan"], "--rate: wants a number of at least 0 and below 1, not 'nan'"),
        (["--free", "nan"], "--free: wants a number, not 'nan'"),
        (["--free", "inf"], "--free: wants a number, not 'inf'"),
        (["--free=-1e999"], "--free: wants a number"),
        (["--kind", "green"], "--kind: wants one of red, blue, not 'green'"),
        (["--compile", "maybe"], "--compile: wants True or False, not 'maybe'"),
        (["--nam", "x"], "unknown flag --nam; did you mean --name?"),
        (["--sizes=3"], "unknown flag --sizes; did you mean --size?"),
        (["--banana"], "unknown flag --banana; --help lists them all"),
        (["stray"], "stray: belongs to no flag; put quotes around"),
        (["--name", "two", "words=2"], "words=2: belongs to no flag"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_flag_the_rule_and_the_value(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_has_one_entry_a_flag_with_its_default_and_exits_0(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "--size N a size (default: 6)" in words
    assert "--rate X a rate of 50 % (default: 0.5)" in words
    assert "--name TEXT a name (default: none) --kind" in words
    assert "--compile [BOOL] yes or no (default: True)" in words
    assert "no-compile" not in words and "no_compile" not in words


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def status_of(main, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["/some/where/program.py", *argv])
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    return exit.value.code


def test_a_command_gets_its_arguments_and_its_result_is_the_exit_status(monkeypatch):
    assert status_of(len, monkeypatch, "a", "b", "c") == 3


def test_a_user_error_is_one_line_on_stderr_and_status_2(monkeypatch, capsys):
    def main(argv):
        raise UserError("--size 0: too small; give a larger one")

    assert status_of(main, monkeypatch) == 2
    assert capsys.readouterr() == ("", "program.py: error: --size 0: too small; give a larger one\n")


def test_ctrl_c_is_status_130_without_a_traceback(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert status_of(main, monkeypatch) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden(monkeypatch):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(ZeroDivisionError):
        run_command(main)


def test_a_package_that_is_not_installed_is_one_line(tmp_path):
    for program, package in (("train.py", "matplotlib"), ("sample.py", "safetensors")):
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, program)], env=environment, capture_output=True, text=True, timeout=60
        )
        line = f"{program}: error: the package '{package}' is missing; install all that is needed with: pip install -r"
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(line), done.stderr
        assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Device and number format


def fake_cuda(monkeypatch, devices, capability=(8, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_120"])


def fake_mps(monkeypatch, available):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)


@pytest.mark.parametrize("gpus, mps, best", [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_the_device_is_by_default_the_best_there_is(monkeypatch, gpus, mps, best):
    fake_cuda(monkeypatch, gpus)
    fake_mps(monkeypatch, mps)
    assert pick_device().type == best


def test_a_device_that_is_there_can_be_chosen(monkeypatch):
    fake_cuda(monkeypatch, 2)
    assert pick_device("cpu") == CPU
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    "name, words",
    [
        ("gpu", "no such device"),
        ("", "no such device"),
        ("cpu cpu", "no such device"),
        ("cuda:x", "no such device"),
        ("meta", "no such device"),  # PyTorch knows it; nobody can train on it
        ("cuda", "finds no CUDA GPU"),
        ("cuda:1", "finds no CUDA GPU"),
        ("mps", "finds no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch, name, words):
    fake_cuda(monkeypatch, 0)
    fake_mps(monkeypatch, False)
    with pytest.raises(UserError, match=f"--device {name}: .*{words}"):
        pick_device(name)


def test_a_gpu_number_above_those_present_is_refused(monkeypatch):
    fake_cuda(monkeypatch, 2)
    with pytest.raises(UserError, match="cuda:2: this machine has 2 GPU"):
        pick_device("cuda:2")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_a_gpu_for_which_pytorch_was_not_built_is_refused_with_its_name(monkeypatch, capability):
    fake_cuda(monkeypatch, 1, capability)
    if capability in ((7, 0), (10, 0)):  # older than all, and between two with no PTX below it
        for name in (None, "cuda"):
            with pytest.raises(
                UserError, match=rf"^--device cuda: .*for the a GPU \(compute capability {capability[0]}.0\)"
            ):
                pick_device(name)
        assert pick_device("cpu") == CPU
    else:
        assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize(
    "capability, dtype", [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 0), torch.float16)]
)
def test_on_cuda_the_default_is_bfloat16_where_the_hardware_has_it_else_float16(monkeypatch, capability, dtype):
    fake_cuda(monkeypatch, 1, capability)
    assert pick_dtype(None, torch.device("cuda")) == dtype


@pytest.mark.parametrize("bfloat16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_on_the_cpu_the_default_is_bfloat16_where_the_hardware_has_it_else_float32(monkeypatch, bfloat16, dtype):
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: bfloat16)
    assert pick_dtype(None, CPU) == dtype


def test_a_dtype_can_be_chosen_and_float16_needs_cuda():
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="--dtype float16 needs a CUDA GPU"):
        pick_dtype("float16", CPU)


def test_autocast_multiplies_in_the_dtype_and_keeps_the_weights_in_float32():
    layer = torch.nn.Linear(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with utils.autocast(CPU, dtype):
            assert layer(torch.randn(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("gpu", ["cuda", "mps"])
def test_the_random_numbers_of_a_gpu_are_left_as_they_were_too(monkeypatch, gpu):
    stand = torch.tensor([7])
    dice = SimpleNamespace(get_rng_state=lambda *_: stand.clone(), set_rng_state=lambda state, *_: stand.copy_(state))
    monkeypatch.setattr(torch, gpu, dice)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), utils.same_dice(torch.device(gpu)):
        stand += 1
        torch.rand(3)
        raise KeyError
    assert stand.tolist() == [7] and torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# Files and words


def test_a_file_is_written_whole_or_the_old_one_stays(tmp_path):
    path = tmp_path / "file.json"
    write_json(str(path), {"ä": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2]}

    def fail_halfway(temporary):
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(str(path), fail_halfway)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2]}
    assert os.listdir(str(tmp_path)) == ["file.json"]


def test_a_name_that_is_no_utf8_comes_back_from_json(tmp_path):
    path = str(tmp_path / "file.json")
    write_json(path, {"ä": "\udcff"})
    with open(path, encoding="utf-8") as f:
        assert json.load(f) == {"ä": "\udcff"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    reader = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    write_json(path, [1])
    assert json.loads(reader.communicate(timeout=60)[0]) == [1] and os.listdir(str(tmp_path)) == ["pipe"]


# ---------------------------------------------------------------------------------------------------------------------
# Streams that are closed, or cannot be written


TALKS = """
import sys, utils

def main(argv):
    print("said")
    print("aside", file=sys.stderr)
    print(repr(sys.stdin.read()), sys.stdout.isatty(), sys.stderr.isatty())
    if "memory" in argv:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return 0

utils.run_command(main)
"""
STAND_IN = "def __getattr__(name): return None\n"  # of PyTorch, where nothing is computed and it need not be loaded
FULL = "standard output: cannot be written (No space left on device); make room there, or send it elsewhere"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a POSIX shell and Linux's /dev/full")
@pytest.mark.parametrize(
    "how, status, out, err",
    [
        (">&-", 0, "", "aside\n"),
        ("2>&-", 0, "said\n'' False False\n", ""),
        ("<&- >&- 2>&-", 0, "", ""),
        ("2>/dev/full", 0, "said\n'' False False\n", ""),
        (">/dev/full", 2, "", f"aside\ntalks.py: error: {FULL}\n"),
        ("memory", 2, "said\n'' False False\n", "aside\ntalks.py: error: out of memory; take a smaller model or text"),
    ],
)
def test_a_command_whose_streams_are_closed_or_full_has_no_traceback(tmp_path, how, status, out, err):
    (tmp_path / "talks.py").write_text(TALKS)
    (tmp_path / "torch.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(utils.__file__)}
    environment.pop("PYTHONUNBUFFERED", None)
    shell = ["bash", "-c", f'exec "$0" talks.py {how}', sys.executable]
    streams = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(shell, cwd=str(tmp_path), env=environment, **streams)
    assert (done.returncode, done.stdout) == (status, out) and done.stderr.startswith(err), done
    assert done.stderr.count("\n") == err.rstrip("\n").count("\n") + bool(err)


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 seconds"), (59, "59 seconds"), (95, "1.6 minutes"), (7200, "2.0 hours"), (400_000, "4.6 days")],
)
def test_seconds_are_told_in_the_unit_that_a_person_would_choose(seconds, words):
    assert utils.seconds_in_words(seconds) == words


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("script", ["train", "sample", "data", "export", "bench", "bigram", "trigram"])
def test_ctrl_c_while_a_command_is_starting_ends_it_without_a_word(tmp_path, script):
    """The signal comes from inside, while utils.py is importing PyTorch."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    path = Path(utils.__file__).with_name(f"{script}.py")
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_a_second_ctrl_c_leaves_at_once_without_a_word(tmp_path):
    """The first one waits for a thread that computes; the thread itself sends both."""
    (tmp_path / "torch.py").write_text(STAND_IN)
    program = """if True:
        import os, signal, sys, threading, time
        from utils import run_command

        def compute():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        def main(argv):
            threading.Thread(target=compute).start()
            time.sleep(60)

        run_command(main)"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_looks_for_garbage_once_all_is_loaded_and_not_among_that(tmp_path):
    """While PyTorch is loading (here: a stand-in of it) a command looks for none; another program goes on as it was."""
    shutil.copy(utils.__file__, str(tmp_path))
    (tmp_path / "torch.py").write_text(f"import gc\nlooks = gc.isenabled()\n{STAND_IN}")
    program = "import utils, gc, torch\n"
    program += "def main(argv): print(torch.looks, gc.isenabled(), gc.get_freeze_count() > 1000)\n"
    (tmp_path / "command.py").write_text(f"{program}utils.run_command(main)\n")
    for words, said in ((["command.py"], "False True True\n"), (["-c", f"{program}main([])"], "True True False\n")):
        done = subprocess.run([sys.executable, *words], cwd=str(tmp_path), capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (said, ""), words


def test_the_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch):
    limits = [str(tmp_path / name) for name in ("memory.max", "memory.limit_in_bytes")]
    monkeypatch.setattr(utils, "CGROUP", limits)
    machine = utils.memory_of(CPU)
    assert machine > 2**27
    for i, other in ((0, 1), (1, 0)):
        Path(limits[other]).write_text("max\n")
        Path(limits[i]).write_text(f"{2**27}\n")
        assert utils.memory_of(CPU) == 2**27
    Path(limits[0]).write_text("max\n")
    Path(limits[1]).write_text(f"{2**63 - 4096}\n")
    assert utils.memory_of(CPU) == machine


def test_what_takes_longer_than_two_seconds_is_told(capsys, monkeypatch):
    due = []

    class Timer:
        def __init__(self, seconds, function, args, keywords):
            self.seconds, self.ring = seconds, lambda: function(*args, **keywords)
            self.start, self.cancel = lambda: due.append(self), due.clear

    monkeypatch.setattr(utils.threading, "Timer", Timer)
    with utils.told_when_slow("preparing"):
        assert due[0].seconds == 2 and capsys.readouterr().err == ""
        due[0].ring()
        assert capsys.readouterr().err == "\npreparing\n"
    assert not due
    with pytest.raises(KeyError), utils.told_when_slow("preparing"):
        raise KeyError
    assert not due
