"""distributed.py: runs of 2 and 4 processes, which learn what one process learns, and which end together.

Each start of torchrun costs seconds, so one start makes several runs (together.py), and a fixture keeps what they left.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import together
import torch
from processes import Command

import distributed
import sharding
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
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *start, f"--max-restarts={restarts}", *map(str, command)],
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


def in_one_job(cwd, processes, runs):
    """Make several runs in one job of so many processes, as together.py says. Returns the exit statuses of each."""
    (cwd / "runs.json").write_text(json.dumps(runs))
    job = Command("tests/together.py", "runs.json", processes, cwd=cwd)
    _, err = job.communicate()
    assert job.returncode == 0, err.decode()
    return list(zip(*(json.loads((cwd / f"runs.json.{rank}").read_text()) for rank in range(processes))))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a text, in which the tests of this file work."""
    directory = tmp_path_factory.mktemp("distributed")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    before, handlers = os.getcwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    plain = train.Run.draw, train.sample_text, train.report
    os.chdir(str(directory))
    together.make_short()
    yield directory
    train.Run.draw, train.sample_text, train.report = plain
    os.chdir(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def alone(arguments):
    """A whole run in this process."""
    assert train.train(*parse_options(train.TrainOptions, arguments, "")) == 0


MODERN = ["--arch", "modern", "--matrix_lr", 0.02, "--min_lr", 4e-3, "--learning_rate", 4e-3]
ALL = [("gpt", []), *([("modern", MODERN)] if hasattr(torch.optim, "Muon") else [])]


@pytest.fixture(scope="module")
def one(here):
    """Runs of one process."""
    for arch, more in ALL:
        alone(flags(f"{arch}-1", *more))
    alone(flags("half-1", steps=6))
    alone(flags("bfloat16-1", "--dtype", "bfloat16"))
    together.with_accidents(dict(nan=[0, 4]), rank=0)
    try:
        alone(flags("nan-1"))
    finally:
        together.with_accidents({}, rank=0)
    return here


@pytest.fixture(scope="module")
def two(one):
    """Runs of two processes, and their exit statuses by their names."""
    runs = {
        "bfloat16-2": dict(flags=flags("bfloat16-2", "--dtype", "bfloat16")),
        "bfloat16-s2": dict(flags=flags("bfloat16-s2", "--dtype", "bfloat16", "--shard")),
        "nan-2": dict(flags=flags("nan-2"), nan=[1, 4]),
        "nan-s2": dict(flags=flags("nan-s2", "--shard"), nan=[1, 4]),
        "dice-a": dict(flags=flags("dice-a", "--dropout", 0.3, "--gradient_checkpointing", "--sample_interval", 6)),
        "dice-b": dict(flags=flags("dice-b", "--dropout", 0.3), signal=[1, 5, int(signal.SIGTERM)]),
        "dice-b again": dict(flags=["--resume", "--out_dir", "dice-b"]),
        "late": dict(flags=flags("late", steps=2), late=1),
        "half-1": dict(flags=["--resume", "--out_dir", "half-1", "--max_iters", str(STEPS), "--shard"]),
    }
    for arch, more in ALL:
        runs[f"{arch}-2"] = dict(flags=flags(f"{arch}-2", *more))
        runs[f"{arch}-s2"] = dict(flags=flags(f"{arch}-s2", "--shard", *more))
    return dict(zip(runs, in_one_job(one, 2, list(runs.values()))))


@pytest.fixture(scope="module")
def four(two, here):
    """Runs of four processes, new ones and ones that go on from what two have left."""
    runs = [dict(flags=flags("gpt-4"))]
    for arch, more in ALL:
        runs.append(dict(flags=flags(f"{arch}-s4", "--shard", *more)))
        runs.append(dict(flags=["--resume", "--out_dir", f"{arch}-2", "--max_iters", str(STEPS + 4), "--shard"]))
        runs.append(dict(flags=["--resume", "--out_dir", f"{arch}-s2", "--max_iters", str(STEPS + 4)]))
    in_one_job(here, 4, runs)
    return here


def losses(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return [(m["step"], key, m[key]) for m in lines for key in ("train_loss", "val_loss", "grad_norm") if key in m]


def assert_alike(found, expected, tolerance=2e-5, weights=2e-4):
    """The same losses and gradient norms at every step, and in the end the same weights, but for rounding.

    weights: the most by which one may differ; None where the runs end at different steps.
    """
    ours, theirs = ({line[:2]: line[2] for line in losses(out)} for out in (found, expected))
    both = [key for key in theirs if key in ours]  # where a run was to end it has one evaluation more
    assert {key for key in theirs if key[1] == "train_loss"} <= set(both) and ("val_loss" in {key[1] for key in both})
    assert [ours[key] for key in both] == pytest.approx([theirs[key] for key in both], rel=tolerance)
    if weights is None:
        return
    ours, theirs = load_model(found)[0].state_dict(), load_model(expected)[0].state_dict()
    for name, p in theirs.items():
        if name.endswith("c_attn.bias"):  # that of the keys changes nothing, and only noise moves it
            ours[name].chunk(3)[1].zero_()
            p.chunk(3)[1].zero_()
        torch.testing.assert_close(ours[name], p, atol=weights, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# The same run on any number of processes


@pytest.mark.parametrize("shard", ["", "s"], ids=["DistributedDataParallel", "FSDP2"])
@pytest.mark.parametrize("arch", ARCHS)
def test_two_processes_learn_what_one_learns(two, arch, shard):
    assert_alike(f"{arch}-{shard}2", f"{arch}-1")


@pytest.mark.parametrize("shard", ["", "s"], ids=["copies", "FSDP2"])
def test_two_processes_in_bfloat16_learn_what_one_learns(two, shard):
    assert_alike(f"bfloat16-{shard}2", "bfloat16-1", tolerance=1e-2, weights=1e-2)


@pytest.mark.parametrize("run", ["gpt-4", "gpt-s4", pytest.param("modern-s4", marks=needs_muon)])
def test_four_processes_learn_what_one_learns(four, run):
    assert_alike(run, f"{run.split('-')[0]}-1")


@pytest.mark.parametrize("shard", ["", "s"], ids=["DistributedDataParallel", "FSDP2"])
def test_a_loss_that_is_no_number_in_one_process_skips_the_step_in_all(two, shard):
    lines = train.read_metrics(f"nan-{shard}2/metrics.jsonl")
    assert [m["step"] for m in lines if m.get("skipped") == 1 and "train_loss" not in m][:1] == [4]
    assert_alike(f"nan-{shard}2", "nan-1")


def test_all_exit_statuses_are_those_of_the_run(two):
    assert two["dice-b"] == (143, 143), "a signal to one process stops both"
    assert {statuses for name, statuses in two.items() if name != "dice-b"} == {(0, 0)}


def test_each_process_has_its_own_dropout_and_goes_on_with_it(two):
    random = load_state("dice-a")["random"]
    assert len(random) == 2 and not torch.equal(random[0]["cpu"], random[1]["cpu"])
    assert losses("dice-a") == losses("dice-b"), "stopped after step 5 and resumed"
    assert Path("dice-a/model.safetensors").read_bytes() == Path("dice-b/model.safetensors").read_bytes()


def test_a_run_of_one_process_goes_on_sharded(two):
    assert_alike("half-1", "gpt-1")


@pytest.mark.parametrize("arch", ARCHS)
def test_runs_go_on_with_four_processes_and_then_with_one(four, arch):
    """From two to four, from whole to sharded; from two to four, sharded in both; from there to one."""
    longer = str(STEPS + 8)
    shutil.copytree(f"{arch}-1", f"{arch}-long")
    for out in (f"{arch}-long", f"{arch}-2", f"{arch}-s2"):
        alone(["--resume", "--out_dir", out, "--max_iters", longer])
    assert_alike(f"{arch}-2", f"{arch}-long")
    assert_alike(f"{arch}-s2", f"{arch}-long")
    assert os.path.exists(f"{arch}-s2/state.pt") and not os.path.exists(f"{arch}-s2/state.dcp")


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


def test_a_worker_that_is_killed_is_started_again_and_where_none_is_left_to_start_the_job_ends(here):
    job = torchrun(here, 2, ROOT / "train.py", *flags("broken", "--eval_interval", 10, steps=10**6), restarts=1)
    wait_for_steps(job, "broken", 12)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    before = losses("broken")[-1][0]
    wait_for_steps(job, "broken", before + 15)
    os.kill(workers(job.pid)[0], signal.SIGKILL)
    killed = time.monotonic()
    status, _, err = finish(job, timeout=60)
    assert time.monotonic() - killed < 30
    said, tracebacks = errors(err)
    assert status == 1 and len(said) == 2 and tracebacks <= TORCHRUN_SAYS, said  # by the one that is left, each time
    assert all("another process of this run has ended" in line and "--resume" in line for line in said)
    alone(flags("unbroken", "--eval_interval", 10, steps=before + 15))
    assert_alike("broken", "unbroken", tolerance=1e-3, weights=None)
    steps = [step for step, key, _ in losses("broken") if key == "train_loss"]
    assert steps == list(range(1, len(steps) + 1)), "each step is there once"


def test_a_signal_to_torchrun_finishes_the_step_and_saves(here):
    job = torchrun(here, 2, ROOT / "train.py", *flags("stopped", "--shard", steps=10**6))
    wait_for_steps(job, "stopped", 2)
    job.send_signal(signal.SIGTERM)
    status, out, err = finish(job, timeout=60)
    assert (
        status != 0
        and out.count("go on with: torchrun --standalone --nproc_per_node 2 train.py") == 1
        and not errors(err)[0]
    )
    assert load_state("stopped")["counters"]["step"] == losses("stopped")[-1][0]


def test_an_error_in_one_process_ends_all_with_its_message(here):
    (here / "runs.json").write_text(json.dumps([dict(flags=flags("wrong"), error=[1, 3])]))
    status, _, err = finish(torchrun(here, 2, ROOT / "tests" / "together.py", "runs.json"), timeout=60)
    said, tracebacks = errors(err)
    assert status == 1 and len(said) == 1 and tracebacks <= TORCHRUN_SAYS
    assert "error: process 1 on " in said[0] and said[0].endswith("--accident: it happened; avoid it")


@pytest.mark.long
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


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("MASTER_ADDR", None, "WORLD_SIZE and RANK are set, MASTER_ADDR is not: start several processes with torchrun"),
        ("MASTER_PORT", None, "WORLD_SIZE and RANK are set, MASTER_PORT is not: start several processes with torchrun"),
        ("MASTER_PORT", "http", "MASTER_PORT=http: this environment variable wants a whole number"),
        ("WORLD_SIZE", "abc", "WORLD_SIZE=abc: this environment variable wants a whole number of at least 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: this environment variable wants a whole number of at least 1"),
        ("WORLD_SIZE", "", "WORLD_SIZE=: this environment variable wants a whole number"),
        ("RANK", "x", "RANK=x: this environment variable wants a whole number of at least 0"),
        ("RANK", "2", "RANK=2: is too high for WORLD_SIZE=2"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1: this environment variable wants a whole number"),
    ],
)
def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, name, value, words):
    environment = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    environment[name] = value
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "join", lambda: pytest.fail("it went on"))
    with pytest.raises(UserError, match="^" + words), distributed.job():
        pass


def test_several_processes_with_a_pytorch_that_is_too_old_are_refused(monkeypatch):
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr(distributed.dist.Store, "check")
    with pytest.raises(UserError, match=r"need PyTorch 2\.3 or newer, not"), distributed.job():
        pass


def test_a_process_alone_asks_nobody():
    assert ALONE.from_first(lambda: 3) == 3 and ALONE.gather("x") == ["x"]
    assert ALONE.agree(0.5, True, signal=15) == [15, 0.5, True] and ALONE.sum(2.5) == 2.5
    tensor = torch.ones(3)
    ALONE.average([tensor])
    ALONE.leave()
    assert torch.equal(tensor, torch.ones(3))


# ---------------------------------------------------------------------------------------------------------------------
# The states of sharded runs


@pytest.fixture
def sharded(two, tmp_path):
    """A copy of the directory of a sharded run, with two states."""
    shutil.copytree("nan-s2", str(tmp_path / "run"))
    return tmp_path / "run"


def test_the_newest_states_are_kept(sharded):
    assert sorted(path.name for path in sharded.glob("state*")) == ["state-6.dcp", "state.dcp"]
    state = load_state(str(sharded))
    assert state["counters"]["step"] == STEPS and state["shards"] == str(sharded / "state.dcp")


@pytest.mark.parametrize("name", ["rest.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_a_damaged_state_is_noticed_and_the_one_before_it_read(sharded, capsys, name, how):
    path = sharded / "state.dcp" / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :] if how == "flipped" else b"")
    )
    if how == "missing":
        path.unlink()
    assert load_state(str(sharded))["counters"]["step"] == 6
    out = capsys.readouterr().out
    assert f"{path}: " in out and out.endswith(
        "going on from the state before it, " + str(sharded / "state-6.dcp") + "\n"
    )
    shutil.rmtree(str(sharded / "state-6.dcp"))
    with pytest.raises(UserError, match="start anew with --fresh"):
        load_state(str(sharded))


def test_no_pickle_is_executed_for_a_state(sharded, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    (sharded / "state.dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"\.metadata: is damaged \(it names posix.system\)"):
        sharding.safe_reader(str(sharded / "state.dcp")).read_metadata()
    inside = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x06exit 1\x85R."
    (sharded / "state.dcp" / ".metadata").write_bytes(inside)  # by way of a module that is allowed
    with pytest.raises(UserError, match=r"is damaged \(it names torch.distributed.checkpoint.metadata.os.system\)"):
        sharding.safe_reader(str(sharded / "state.dcp")).read_metadata()
    assert not (tmp_path / "exploded").exists()


def test_a_state_that_was_half_written_is_none(sharded):
    shutil.copytree(str(sharded / "state.dcp"), str(sharded / "state.dcp.tmp"))
    (sharded / "state.dcp.tmp" / "rest.pt").unlink()
    assert load_state(str(sharded))["shards"] == str(sharded / "state.dcp")


def test_sharding_needs_its_pytorch_and_a_number_format_that_all_scale_alike(monkeypatch):
    def check(dtype, processes=2, device="cuda", **options):
        sharding.check_shard(train.TrainOptions(**options), {"shard"}, torch.device(device), dtype, processes)

    check(torch.bfloat16, shard=True)
    check(torch.bfloat16, processes=1, shard=True, resume=True)
    with pytest.raises(UserError, match="--shard: needs --dtype bfloat16 or float32, not float16"):
        check(torch.float16, shard=True)
    with pytest.raises(UserError, match="--shard: spreads a model over several processes; start them with torchrun"):
        check(torch.bfloat16, processes=1, shard=True)
    fsdp = sys.modules["torch.distributed.fsdp"]
    monkeypatch.delattr(fsdp.FSDPModule, "set_force_sum_reduction_for_comms", raising=False)
    check(torch.bfloat16, shard=True)
    with pytest.raises(UserError, match=r"--shard: on a CPU needs PyTorch 2\.8 or newer"):
        check(torch.bfloat16, device="cpu", shard=True)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    with pytest.raises(UserError, match=r"--shard: needs PyTorch 2\.6 or newer"):
        check(torch.float32, shard=True)
    check(torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Two machines


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: [(its name, its address)]. Needs root and iproute2."""
    names, ends, addresses = (f"nano{os.getpid()}a", f"nano{os.getpid()}b"), ("ca", "cb"), ("10.99.0.1", "10.99.0.2")

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, addresses))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_two_machines_train_together_and_carry_on_when_a_worker_of_the_second_is_killed(here, hosts, tmp_path):
    jobs = []
    for n, (name, address) in enumerate(hosts):
        cwd = tmp_path / name  # they share no directory
        cwd.mkdir()
        (cwd / "text.txt").write_text(TEXT, encoding="utf-8")
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{hosts[0][1]}:29500", "--rdzv_id", "test"]
        rendezvous += ["--local_addr", address, "--rdzv_conf", f"is_host={1 - n}"]  # their names mean this machine
        start = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        start += ["--nproc_per_node", "2", "--max-restarts", "1", *rendezvous, str(ROOT / "train.py")]
        jobs.append(
            subprocess.Popen(
                [*start, *flags("far", "--eval_interval", 10, steps=60)],
                cwd=str(cwd),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    wait_for_steps(jobs[0], tmp_path / hosts[0][0] / "far", 12)
    os.kill(workers(jobs[1].pid)[2], signal.SIGKILL)
    for job in jobs:
        status, _, err = finish(job)
        assert status == 0, err
    alone(flags("near", "--eval_interval", 10, steps=60))
    assert_alike(str(tmp_path / hosts[0][0] / "far"), "near", tolerance=1e-3, weights=1e-2)
    assert not (tmp_path / hosts[1][0] / "far").exists()
