"""distributed.py: runs of 2 and 4 processes, which learn what one process learns, and which end together.

Each start of torchrun costs seconds, so one start makes several runs (together.py), and a fixture keeps what they left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distributed
import train
from checkpoint import load_model, load_state
from data import Batches
from distributed import ALONE, Processes
from plan import check_windows, choose_settings
from utils import UserError, parse_options

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the tests look for workers in /proc")

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40
# 16 windows a step: two parts of 8 in one process, two of 4 in each of two. The learning rate stays the same, so that
# 6 steps are the first of 12.
FLAGS = "--data text.txt --device cpu --no-compile --n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 8"
FLAGS += " --gradient_accumulation_steps 2 --dropout 0 --learning_rate 1e-2 --min_lr 1e-2 --warmup_iters 2"
FLAGS += " --log_interval 1 --eval_interval 6 --dtype float32"
STEPS = 12
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a modern model needs PyTorch 2.9's Muon")
ARCHS = ["gpt", pytest.param("modern", marks=needs_muon)]


def flags(out, *more, steps=STEPS):
    return [*FLAGS.split(), "--max_iters", str(steps), "--out_dir", out, *map(str, more)]


def torchrun(cwd, processes, *command, restarts=0):
    """A Popen of that many processes of a command."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*start, f"--max-restarts={restarts}", *map(str, command)],
        cwd=str(cwd),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=240):
    """(exit status, stdout, stderr); a job that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in workers(process.pid).values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        pytest.fail(f"it hangs: {process.communicate()}")
    return process.returncode, out, err


def workers(agent):
    """The process ids of a torchrun's workers by their ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = dict(e.split("=", 1) for e in (path / "environ").read_text().split("\0") if "=" in e)
        except (OSError, ValueError):
            continue
        if parent == agent and "RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return found


def together(cwd, processes, runs):
    """Make several runs in one job of so many processes: [{flags, signal, error}]. Returns their exit statuses."""
    (cwd / "runs.json").write_text(json.dumps(runs))
    status, _, err = finish(torchrun(cwd, processes, ROOT / "tests" / "together.py", "runs.json"))
    assert status == 0, err
    return list(zip(*(json.loads((cwd / f"runs.json.{rank}").read_text()) for rank in range(processes))))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a text, in which the tests of this file work."""
    directory = tmp_path_factory.mktemp("distributed")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    before, handlers = os.getcwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(str(directory))
    yield directory
    os.chdir(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def alone(arguments):
    """A whole run in this process."""
    assert train.train(*parse_options(train.TrainOptions, arguments, "")) == 0


@pytest.fixture(scope="module")
def one(here):
    """Runs of one process."""
    alone(flags("gpt-1"))
    alone(flags("half-1", steps=6))
    alone(flags("bfloat16-1", "--dtype", "bfloat16"))
    if hasattr(torch.optim, "Muon"):
        alone(flags("modern-1", "--arch", "modern", "--matrix_lr", 0.02, "--min_lr", 4e-3, "--learning_rate", 4e-3))
    return here


@pytest.fixture(scope="module")
def two(one):
    """Runs of two processes."""
    modern = ["--arch", "modern", "--matrix_lr", 0.02, "--min_lr", 4e-3, "--learning_rate", 4e-3]
    runs = [
        dict(flags=flags("gpt-2")),
        dict(flags=flags("bfloat16-2", "--dtype", "bfloat16")),
        dict(flags=flags("dice-a", "--dropout", 0.3, "--gradient_checkpointing")),
        dict(flags=flags("dice-b", "--dropout", 0.3), signal=[1, 5, int(signal.SIGTERM)]),
        dict(flags=["--resume", "--out_dir", "dice-b"]),
        dict(flags=["--resume", "--out_dir", "half-1", "--max_iters", str(STEPS)]),
    ]
    if hasattr(torch.optim, "Muon"):
        runs.append(dict(flags=flags("modern-2", *modern)))
    statuses = together(one, 2, runs)
    return one, statuses


@pytest.fixture(scope="module")
def four(two):
    """Runs of four processes, which go on from what two have left."""
    directory, _ = two
    alone(flags("first", steps=4))
    runs = [
        dict(flags=flags("gpt-4")),
        dict(flags=["--resume", "--out_dir", "gpt-2", "--max_iters", str(STEPS + 4)]),
    ]
    together(directory, 4, runs)
    return directory


def losses(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return [(m["step"], key, m[key]) for m in lines for key in ("train_loss", "val_loss", "grad_norm") if key in m]


def assert_alike(found, expected, tolerance=2e-5, weights=2e-4):
    """The same losses and gradient norms at every step, and in the end the same weights, but for rounding."""
    ours, theirs = ({line[:2]: line[2] for line in losses(out)} for out in (found, expected))
    both = [key for key in theirs if key in ours]  # where a run was to end it has one evaluation more
    assert {key for key in theirs if key[1] == "train_loss"} <= set(both) and ("val_loss" in {key[1] for key in both})
    assert [ours[key] for key in both] == pytest.approx([theirs[key] for key in both], rel=tolerance)
    ours, theirs = load_model(found)[0].state_dict(), load_model(expected)[0].state_dict()
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, atol=weights, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# The same run on any number of processes


@pytest.mark.parametrize("arch", ARCHS)
def test_two_processes_learn_what_one_learns(two, arch):
    assert_alike(f"{arch}-2", f"{arch}-1")


def test_two_processes_with_bfloat16_copies_learn_what_one_learns(two):
    assert_alike("bfloat16-2", "bfloat16-1", tolerance=1e-3, weights=5e-3)


def test_four_processes_learn_what_one_learns(four):
    assert_alike("gpt-4", "gpt-1")


def test_all_exit_statuses_are_those_of_the_run(two):
    statuses = two[1]
    stopped = 3
    assert statuses.pop(stopped) == (143, 143), "a signal to one process stops both"
    assert set(statuses) == {(0, 0)}


def test_each_process_has_its_own_dropout_and_goes_on_with_it(two):
    random = load_state("dice-a")["random"]
    assert len(random) == 2 and not torch.equal(random[0]["cpu"], random[1]["cpu"])
    assert losses("dice-a") == losses("dice-b"), "stopped after step 5 and resumed"
    assert Path("dice-a/model.safetensors").read_bytes() == Path("dice-b/model.safetensors").read_bytes()


def test_a_run_goes_on_with_more_processes(two):
    assert_alike("half-1", "gpt-1")


def test_a_run_goes_on_with_four_processes_and_then_with_one(four):
    alone(["--resume", "--out_dir", "gpt-2", "--max_iters", str(STEPS + 8)])
    alone(["--resume", "--out_dir", "gpt-1", "--max_iters", str(STEPS + 8)])
    assert_alike("gpt-2", "gpt-1")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_shares_of_a_batch_are_the_batch(world):
    batches = Batches(torch.arange(1000), batch_size=12, block_size=8, seed=1)
    for step in range(30):
        x, y = batches.batch(step)
        shares = [batches.batch(step, processes=Processes(rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat([x for x, _ in shares]), x) and torch.equal(torch.cat([y for _, y in shares]), y)
        assert {len(x) for x, _ in shares} == {12 // world}


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    options = train.TrainOptions(batch_size=5, gradient_accumulation_steps=3)
    check_windows(options, 3)
    with pytest.raises(UserError, match="--batch_size 5: 2 processes cannot share the 15 windows"):
        check_windows(options, 2)


def test_the_batch_that_the_dial_chooses_can_be_shared():
    options = train.TrainOptions(minutes=1.0)
    for world in (1, 3, 7):
        chosen = choose_settings(options, {"minutes"}, 10**6, torch.device("cpu"), torch.float32, 1e11, world)
        check_windows(chosen, world)


# ---------------------------------------------------------------------------------------------------------------------
# They end together


def wait_for_steps(process, out, steps):
    """Wait until a run's metrics have come that far."""
    for _ in range(20_000):
        assert process.poll() is None, process.communicate()
        try:
            if losses(str(out))[-1][0] >= steps:
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.01)
    pytest.fail("no step came")


def errors(err):
    """The lines in which train.py or the tests' runs of it tell of an error, and the tracebacks of theirs."""
    ours = [line for line in err.splitlines() if "error: " in line and line.startswith(("train.py", "together.py"))]
    return ours, err.count("Traceback")


TORCHRUN_SAYS = 1  # torchrun's own traceback, of the error that a worker has failed


def test_workers_that_torchrun_starts_again_carry_on_and_a_signal_to_torchrun_saves(here):
    alone(flags("unbroken", "--eval_interval", 20, steps=200))
    command = [ROOT / "train.py", *flags("broken", "--eval_interval", 20, steps=10**6)]
    job = torchrun(here, 2, *command, restarts=1)
    wait_for_steps(job, "broken", 45)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    before = losses("broken")[-1][0]
    wait_for_steps(job, "broken", before + 30)
    job.send_signal(signal.SIGTERM)
    status, out, err = finish(job)
    assert status != 0 and out.count("and saved; go on with: ") == 1
    assert len(errors(err)[0]) == 1, err
    reached = load_state("broken")["counters"]["step"]
    assert reached == losses("broken")[-1][0] > before
    steps = [step for step, key, _ in losses("broken") if key == "train_loss"]
    assert steps == list(range(1, reached + 1)), "each step is there once"
    found, expected = ({line[:2]: line[2] for line in losses(run)} for run in ("broken", "unbroken"))
    both = sorted(found.keys() & expected.keys())
    assert len(both) > 100
    assert [found[key] for key in both] == pytest.approx([expected[key] for key in both], rel=1e-3)


def test_a_worker_that_is_killed_ends_the_job_with_one_message(here):
    job = torchrun(here, 2, ROOT / "train.py", *flags("killed", steps=10**6))
    wait_for_steps(job, "killed", 8)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    start = time.monotonic()
    status, _, err = finish(job, timeout=60)
    assert time.monotonic() - start < 30
    said, tracebacks = errors(err)
    assert status == 1 and len(said) == 1 and "another process of this run has ended" in said[0]
    assert "--resume" in said[0] and tracebacks <= TORCHRUN_SAYS


def test_an_error_in_one_process_ends_all_with_its_message(here):
    (here / "runs.json").write_text(json.dumps([dict(flags=flags("wrong"), error=[1, 3])]))
    status, _, err = finish(torchrun(here, 2, ROOT / "tests" / "together.py", "runs.json"), timeout=60)
    said, tracebacks = errors(err)
    assert status == 1 and len(said) == 1 and tracebacks <= TORCHRUN_SAYS
    assert "error: process 1 on " in said[0] and said[0].endswith("--accident: it happened; avoid it")


def test_an_error_of_all_processes_is_told_once(here):
    status, out, err = finish(torchrun(here, 3, ROOT / "train.py", *flags("unfair"), "--n_head", 5), timeout=60)
    said, tracebacks = errors(err)
    assert status == 1 and out == "" and len(said) == 1 and tracebacks <= TORCHRUN_SAYS
    assert said[0].startswith("train.py: error: --n_embd 16 is not divisible by n_head 5")
    assert not Path("unfair").exists()


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection reset by peer"), False),
        (UserError("--data: gloo.txt is missing"), False),
    ],
)
def test_which_errors_are_about_another_process(error, lost):
    assert distributed.is_loss(error) is lost


def test_a_process_alone_asks_nobody():
    assert ALONE.from_first(lambda: 3) == 3 and ALONE.gather("x") == ["x"]
    assert ALONE.agree(0.5, True, signal=15) == [15, 0.5, True] and ALONE.sum(2.5) == 2.5
    tensor = torch.ones(3)
    ALONE.average([tensor])
    ALONE.leave()
    assert torch.equal(tensor, torch.ones(3))
