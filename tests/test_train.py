"""train.py: what the flags are, and whole runs in this process.

The learning rate and one step are in test_optim.py, what is chosen for a machine in test_plan.py, the commands as a
person runs them in test_cli.py.
"""

import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import together
import torch
from conftest import forked

import plan
import plots
import sample
import train
from checkpoint import save_model
from data import load_data
from optim import Learner
from tokenizer import CharTokenizer
from utils import UserError, parse_options, run_command

CPU = torch.device("cpu")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=20, compile=False, device="cpu")
TINY.update(dtype="float32", eval_interval=10, log_interval=1, learning_rate=1e-2, warmup_iters=0)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a modern model needs PyTorch 2.9's Muon")
ARCHS = ["gpt", pytest.param("modern", marks=needs_muon)]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 20
DRAW = train.Run.draw


def make_options(**changes):
    return train.TrainOptions(**{**TINY, **changes})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out_dir, **options) -> (exit status, the lines of its metrics.jsonl): a whole run in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(plan, "matmul_peak", lambda *_: 1e11)  # measuring it takes a second
    for place, name, short in together.SHORT:  # test_cli.py has these in full
        monkeypatch.setattr(place, name, short)

    def go(out_dir, not_given=(), **changes):
        options = make_options(data="text.txt", out_dir=out_dir, **changes)
        monkeypatch.setattr(train, "STARTED", train.time.perf_counter())
        status = train.train(options, {"data", "out_dir", *TINY, *changes} - set(not_given))
        return status, train.read_metrics(os.path.join(out_dir, "metrics.jsonl"))

    return go


def losses(metrics, key="train_loss"):
    return [m[key] for m in metrics if key in m]


# ---------------------------------------------------------------------------------------------------------------------
# The flags


def test_the_defaults_are_those_of_the_description():
    options, given = parse_options(train.TrainOptions, [], "")
    promised = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2)
    promised.update(batch_size=64, max_iters=10_000, learning_rate=3e-4, eval_interval=500, eval_iters=200)
    promised.update(gradient_accumulation_steps=1, compile=True, device=None, dtype=None)
    assert {name: getattr(options, name) for name in promised} == promised and given == set()


def test_every_flag_has_one_line_of_help_that_fits_a_screen():
    for f in fields(train.TrainOptions):
        help = f.metadata["help"]
        assert help and "\n" not in help and len(help) < 100, f.name


def test_what_may_change_on_resume_are_flags_and_none_that_shapes_the_model_or_its_learning():
    names = {f.name for f in fields(train.TrainOptions)}
    assert names >= plan.MAY_CHANGE
    fixed = {
        "arch",
        "matrix_lr",
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "dropout",
        "bias",
        "batch_size",
        "learning_rate",
        "seed",
    }
    fixed |= {"gradient_accumulation_steps", "min_lr", "warmup_iters", "weight_decay", "beta1", "beta2", "grad_clip"}
    assert not fixed & plan.MAY_CHANGE and names >= fixed


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_learns_and_its_metrics_say_so(run):
    status, metrics = run("out", max_iters=100, eval_interval=20)
    assert status == 0
    assert losses(metrics)[-1] < losses(metrics)[0] - 1
    assert len(losses(metrics)) == 100 and len(losses(metrics, "val_loss")) == 5


def test_the_same_seed_gives_the_same_run_and_another_seed_another_one(run):
    first, again, other = (losses(run(name, seed=seed)[1]) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again and first != other


@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_gives_the_losses_of_the_plain_run(run, arch):
    plain, saving = run("plain", arch=arch)[1], run("saving", arch=arch, gradient_checkpointing=True)[1]
    assert losses(saving) == losses(plain) and losses(saving, "val_loss") == losses(plain, "val_loss")


@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_accumulation_gives_the_losses_of_the_run_with_the_large_batch(run, arch):
    same = dict(arch=arch, dropout=0.0, max_iters=10)
    large = run("large", batch_size=64, **same)[1]
    small = run("small", batch_size=16, gradient_accumulation_steps=4, **same)[1]
    atol = 1e-5 if arch == "gpt" else 2e-3  # Muon's products are in bfloat16: a last digit may become a third one
    assert losses(small) == pytest.approx(losses(large), abs=atol)
    assert losses(small, "val_loss") == pytest.approx(losses(large, "val_loss"), abs=atol)
    assert small[-1]["tokens"] == large[-1]["tokens"] == 10 * 64 * 8


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_stopped_and_resumed_has_the_losses_and_weights_of_the_unbroken_one(run, monkeypatch, arch, dtype):
    settings = dict(arch=arch, dtype=dtype, gradient_accumulation_steps=2)
    unbroken = run("unbroken", **settings)[1]
    step, seen = Learner.step, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        assert run("broken", **settings)[0] == 130
    assert len(seen) == 7
    assert run("broken", **settings, resume=True)[0] == 0
    broken = train.read_metrics("broken/metrics.jsonl")
    assert [(m["step"], losses([m])) for m in broken] == [(m["step"], losses([m])) for m in unbroken]
    assert Path("broken/model.safetensors").read_bytes() == Path("unbroken/model.safetensors").read_bytes()


def test_a_run_stopped_in_an_evaluation_makes_that_first_when_it_goes_on(run, monkeypatch):
    unbroken = run("unbroken")[1]
    for step in (10, 20):  # in the middle, and in the last one, after which there is no step any more
        out, measure = f"broken-{step}", train.validation_loss

        def interrupted(*args, step=step, measure=measure):
            if interrupted.evaluations == step // 10:
                signal.raise_signal(signal.SIGTERM)
            interrupted.evaluations += 1
            return measure(*args)

        interrupted.evaluations = 1
        with monkeypatch.context() as patch:
            patch.setattr(train, "validation_loss", interrupted)
            status, metrics = run(out)
        assert status == 143 and metrics[-1]["step"] == step and "val_loss" not in metrics[-1]
        with pytest.raises(UserError, match=f"has done its {step} steps; give a larger --max_iters"):
            run(out, resume=True, max_iters=step - 1)
        status, metrics = run(out, resume=True)
        assert status == 0 and [m.get("val_loss") for m in metrics] == [m.get("val_loss") for m in unbroken]
        assert Path(out, "model.safetensors").read_bytes() == Path("unbroken/model.safetensors").read_bytes()


def busy(rounds, *signals, pause=0.7):
    """(exit status, what it says) of a process that gets these signals within one call of a C function, a pause after
    each other."""
    ours, its = socket.socketpair()

    def compute():
        signal.alarm(90)  # whatever happens to this test, it does not go on for ever
        with train.StopSignal() as stop:
            its.send(b"ready")
            hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
            its.send(str(stop.came).encode())

    process = forked(compute)
    its.close()
    with ours:
        ours.settimeout(60)
        assert ours.recv(100) == b"ready"
        for i, number in enumerate(signals):
            time.sleep(pause if i else 0.2)
            os.kill(process, number)
        said = ours.recv(100)
    _, status = os.waitpid(process, 0)
    return status >> 8 if os.WIFEXITED(status) else -os.WTERMSIG(status), said.decode()


@pytest.mark.skipif(os.name == "nt", reason="on Windows a process cannot be sent a Ctrl-C")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once_whatever_is_computed_and_the_first_waits_for_its_end(first):
    assert busy(3_000_000, first) == (0, f"{int(first)}")
    assert busy(2_000_000_000, first, signal.SIGINT) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="on Windows a process cannot be sent a Ctrl-C")
def test_two_signals_that_come_together_are_one_and_a_later_one_leaves():
    """`timeout` sends one to the program and one to its group."""
    assert busy(3_000_000, signal.SIGTERM, signal.SIGTERM, pause=0.005) == (0, f"{int(signal.SIGTERM)}")
    assert busy(2_000_000_000, signal.SIGTERM, signal.SIGINT, signal.SIGINT, pause=0.3) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_closed_terminal_which_may_tell_so_twice_stops_a_run_as_ctrl_c_does_but_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a new process has it too; these tests may be under nohup
    try:
        assert busy(4_000_000, signal.SIGHUP, signal.SIGHUP) == (0, f"{int(signal.SIGHUP)}")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert busy(3_000_000, signal.SIGHUP) == (0, "0")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_run_signals_are_what_they_were_before(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run("out", max_iters=1)[0] == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_long_run_is_saved_between_its_evaluations_and_as_seldom_as_that_costs_1_percent(run, clock, monkeypatch):
    settings = dict(max_iters=300, eval_interval=1000)
    saved = []
    monkeypatch.setattr(train, "save_state", lambda out, state, keep: saved.append(state["counters"]["step"]))
    monkeypatch.setattr(train.Saver, "seconds", property(lambda self: 0.9, lambda self, value: None), raising=False)
    assert run("out", **settings)[0] == 0  # a step a second
    assert saved == [91, 182, 273, 300]


@pytest.mark.parametrize("ctrl_c, last", [(None, 105), (30, 28)])
def test_the_loss_is_drawn_as_seldom_as_that_costs_5_percent_and_at_the_end(run, clock, monkeypatch, ctrl_c, last):
    drawn, clock.ctrl_c = [], ctrl_c

    def picture(metrics):
        drawn.append(metrics[-1]["step"])
        clock.now += 2
        return SimpleNamespace(savefig=lambda path, **_: Path(path).touch())

    monkeypatch.setattr(train.Run, "draw", DRAW)
    monkeypatch.setattr(plots, "loss_curve", picture)
    run("out", max_iters=105, eval_interval=5)  # a step a second
    assert drawn == [step for step in (15, 60) if step < last] + [last]


def test_a_saving_that_fails_in_its_thread_ends_the_run_with_its_error(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        run("out")
    assert train.read_metrics("out/metrics.jsonl")[-1]["step"] == 20, "of the next saving, or the end"


NO_MEMORY = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 4.00 GB, max allowed: ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: ..."),
]


def test_what_is_as_small_as_can_be_is_not_to_be_lowered():
    options = make_options(batch_size=1, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"^out of memory; lower --block_size$"), train.errors_in_words(options):
        raise MemoryError


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:24])
def test_out_of_memory_is_one_line_that_names_what_to_lower(run, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(Learner, "step", full)
    monkeypatch.setattr(train, "parse_options", lambda *_: (make_options(data="text.txt"), {"data", *TINY}))
    with pytest.raises(UserError, match=r"^out of memory; lower --batch_size .* --gradient_checkpointing$"):
        train.main([])


def test_another_error_of_pytorch_is_no_lack_of_memory(run, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Learner, "step", wrong)
    monkeypatch.setattr(train, "parse_options", lambda *_: (make_options(data="text.txt"), {"data", *TINY}))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.main([])


def test_what_began_compiled_goes_on_compiled_and_what_did_not_does_not(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or (lambda *args: model(*args)))
    run("compiled", compile=True, max_iters=2)
    assert run("compiled", compile=True, not_given=["compile"], max_iters=4, resume=True)[0] == 0
    assert len(compiled) == 2
    run("plain", compile=True, not_given=["compile"], max_iters=2)
    monkeypatch.setattr(train, "maybe_compile", lambda *_: pytest.fail("compiled"))
    assert run("plain", compile=True, not_given=["compile"], max_iters=4, resume=True)[0] == 0
    assert len(compiled) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers


@pytest.fixture
def bad_steps(monkeypatch):
    """bad_steps(steps): in those steps of this process, counted from 1, the loss is no number."""
    step, loss, now = Learner.step, Learner.loss, [0]

    def set_steps(steps):
        now[0] = 0

        def counting(*args):
            now[0] += 1
            return step(*args)

        def bad(self, x, y):
            return loss(self, x, y) * (float("nan") if now[0] in steps else 1.0)

        monkeypatch.setattr(Learner, "step", counting)
        monkeypatch.setattr(Learner, "loss", bad)

    return set_steps


@pytest.mark.parametrize("arch", ARCHS)
def test_steps_whose_loss_is_no_number_are_skipped_and_counted_and_the_run_goes_on(run, bad_steps, capsys, arch):
    bad_steps({3, 4, 11})
    status, metrics = run("out", arch=arch)
    assert status == 0 and losses(metrics)[-1] < losses(metrics)[0]
    steps = [m for m in metrics if "lr" in m]
    assert [m["step"] for m in steps if "train_loss" not in m] == [3, 4, 11]
    assert [m.get("skipped", 0) for m in steps] == [0, 0, 1] + 7 * [2] + 10 * [3]
    assert "step 4: 2 steps skipped so far" in capsys.readouterr().out
    assert all(torch.isfinite(p).all() for p in plan.load_model("out")[0].parameters())


def test_many_in_a_row_end_the_run_with_advice_and_what_was_saved_goes_on(run, bad_steps):
    unbroken = run("unbroken", max_iters=60)[1]
    bad_steps(range(15, 1000))
    with pytest.raises(UserError, match=r"20 steps in a row .* at step 34: .*lower --learning_rate.* kept in out") as e:
        run("out", max_iters=60)
    assert "\n" not in str(e.value)
    bad_steps(())
    status, metrics = run("out", max_iters=60, resume=True)  # once the cause is gone
    assert status == 0 and metrics[-1]["val_loss"] != unbroken[-1]["val_loss"], "steps 15 to 30 were skipped"
    state = plan.load_state("out")
    assert state["counters"]["step"] == 60 and state["skipped"].tolist() == [16, 0]


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time, and workers that torchrun starts again


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_one_lives(run, monkeypatch):
    step, steps, refusals = Learner.step, [], []

    def second(*args):
        steps.append(1)
        if len(steps) in (1, 15):  # before the first saving, and after it
            for flags in ({}, dict(fresh=True), dict(resume=True)) if len(steps) == 15 else ({}, dict(fresh=True)):
                with pytest.raises(UserError) as error:
                    train.train(make_options(data="text.txt", out_dir="out", **flags), set())
                refusals.append(str(error.value))
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", second)
        assert run("out")[0] == 0
    said = f"--out_dir out: process {os.getpid()} is training there; wait for it or name another directory"
    assert refusals == 5 * [said]
    assert sorted(os.listdir()) == ["out", "text.txt"], "nothing was moved"
    assert run("out", fresh=True)[0] == 0 and sorted(os.listdir()) == ["out", "out-1", "text.txt"]


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(restarts, job): the environment of a worker that was started again so many times."""

    def set_environment(restarts, job="a"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)

    return set_environment


class Crash(Exception):
    pass


def crash_in(monkeypatch, at):
    """Have the run in this process end without a word in its step number `at`."""
    step, seen = Learner.step, []

    def crashing(*args):
        seen.append(1)
        if len(seen) == at:
            raise Crash
        return step(*args)

    monkeypatch.setattr(Learner, "step", crashing)


@pytest.mark.parametrize("at", [5, 15])  # before it was saved for the first time, and after that
def test_a_worker_that_torchrun_starts_again_carries_on_by_itself(run, monkeypatch, torchrun, at):
    unbroken = run("unbroken")[1]
    torchrun(0)
    with monkeypatch.context() as patch:
        crash_in(patch, at)
        with pytest.raises(Crash):
            run("out")
    torchrun(1)
    status, metrics = run("out")  # the same flags, no --resume
    assert status == 0 and losses(metrics) == losses(unbroken)
    assert Path("out/model.safetensors").read_bytes() == Path("unbroken/model.safetensors").read_bytes()


@pytest.mark.parametrize("timed", [False, True])
def test_a_worker_that_dies_in_its_last_words_says_them_when_it_is_started_again(
    run, monkeypatch, torchrun, clock, capsys, timed
):
    def crash(*_, **__):
        raise Crash

    settings = TIMED if timed else {}
    torchrun(0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", crash)
        with pytest.raises(Crash):
            run("out", **settings)
    before = Path("out/metrics.jsonl").read_bytes()
    capsys.readouterr()
    torchrun(1)
    assert run("out", **settings)[0] == 0
    assert "a sample:" in capsys.readouterr().out and Path("out/metrics.jsonl").read_bytes() == before


def test_a_worker_started_again_does_not_go_on_with_a_run_that_another_job_began(run, torchrun):
    torchrun(0, "another")
    run("out")
    for restarts in (0, 1):
        torchrun(restarts, "a")
        with pytest.raises(UserError, match="already holds a run"):
            run("out")


def test_reports_do_not_change_what_is_learned(run, capsys):
    quiet = run("quiet", log_interval=100, eval_interval=100)[1]
    busy = run("busy", log_interval=1, eval_interval=3, sample_interval=2)[1]
    assert losses(busy)[-1] == losses(quiet)[-1]
    assert losses(busy, "val_loss")[-1] == losses(quiet, "val_loss")[-1]


def test_the_best_and_the_newest_weights_are_kept(run, make_model):
    run("out")
    data = load_data("text.txt")
    model = make_model(vocab_size=data.tokenizer.vocab_size)
    with train.Saver() as saver:
        probe = train.Run(make_options(out_dir="out"), model, data, CPU, torch.float32, saver)
        good = probe.evaluate()
        with torch.no_grad():
            model.transformer.wte.weight.mul_(10)
        assert probe.evaluate() > good
    kept, _ = plan.load_model("out")
    assert train.validation_loss(kept, data.val, 4) == pytest.approx(good, abs=1e-5)
    newest = plan.load_state("out")["model"]
    assert all(torch.equal(newest[name], p) for name, p in model.state_dict().items())


def test_weights_that_give_no_number_are_neither_kept_nor_logged(run, make_model):
    run("out")
    data = load_data("text.txt")
    probe = train.Run(make_options(out_dir="out"), make_model(vocab_size=40), data, CPU, torch.float32, train.Saver())
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    with torch.no_grad():
        probe.model.transformer.ln_f.weight.fill_(float("nan"))
    assert not math.isfinite(probe.evaluate())
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # all of it but the C++, which takes half a minute
        pytest.param("inductor", marks=[pytest.mark.long, pytest.mark.skipif(not COMPILER, reason="no C++ compiler")]),
    ],
)
def test_compile_gives_the_losses_of_the_plain_run(run, capsys, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = run("plain", dropout=0.0, max_iters=6)[1]
    capsys.readouterr()
    compiled = run("compiled", dropout=0.0, max_iters=6, compile=True)[1]
    said = capsys.readouterr().out
    assert "compile: yes" in said and "no working compiler" not in said
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(compiled, "val_loss") == pytest.approx(losses(plain, "val_loss"), abs=1e-5)


def test_metrics_are_valid_json_even_where_a_gradient_is_infinite(run, make_model):
    run("out")
    options = make_options(data="text.txt", out_dir="out")
    probe = train.Run(options, make_model(), load_data("text.txt"), CPU, torch.float32, train.Saver())
    probe.log(train_loss=1.5, grad_norm=float("inf"))
    with open("out/metrics.jsonl") as f:
        last = f.readlines()[-1]
    line = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["train_loss"] == 1.5 and "grad_norm" not in line


def test_a_metrics_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2, "train_l')
    assert train.read_metrics(str(path)) == [{"step": 1, "train_loss": 2.0}]


def test_a_sample_leaves_the_model_in_training_mode_and_the_dice_alone(make_model):
    model, tokenizer = make_model(vocab_size=3).train(), CharTokenizer("abc")
    before = torch.get_rng_state()
    text = train.sample_text(model, tokenizer, 20, CPU)
    assert len(text) == 20 and set(text) <= set("abc")
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_the_sample_of_a_slow_model_is_cut_off(make_model, monkeypatch):
    model, tokenizer = make_model(), CharTokenizer("abcdefghijk")
    assert len(train.sample_text(model, tokenizer, 20, CPU)) == 20
    monkeypatch.setattr(train, "SAMPLE_SECONDS", 0)
    assert len(train.sample_text(model, tokenizer, 20, CPU)) == 1 and model.training


# ---------------------------------------------------------------------------------------------------------------------
# What it says before it starts


def test_a_run_of_more_than_an_hour_says_so_up_front_and_names_a_smaller_one_that_train_takes(run, capsys, monkeypatch):
    monkeypatch.setattr(train, "seconds_per_token", lambda *_: 6000 / (2 * 4 * 8))
    plain = train.smaller_setting
    monkeypatch.setattr(train, "smaller_setting", lambda *options: (plain(*options)[0], 0.1))
    run("slow", n_layer=6, n_embd=96, n_head=6, max_iters=2)
    out = capsys.readouterr().out.splitlines()
    announced = next(i for i, line in enumerate(out) if "about 1.7 hours" in line)
    assert announced < next(i for i, line in enumerate(out) if line.startswith("step "))
    flags = shlex.split(out[announced + 1].split("python train.py ")[1])
    smaller, _ = parse_options(train.TrainOptions, flags, "")
    assert smaller.n_embd < 384 and smaller.n_embd % smaller.n_head == 0
    assert (smaller.data, smaller.out_dir, smaller.learning_rate) == ("text.txt", "slow", 1e-2), "what was given stays"
    assert smaller.fresh and not smaller.resume and smaller.compile is False

    monkeypatch.setattr(train, "smaller_setting", plain)
    run("small", max_iters=2)
    out = capsys.readouterr().out
    assert "hours" in out and "A smaller one" not in out, "that one would be larger"

    monkeypatch.setattr(train, "seconds_per_token", lambda *_: 0.01)
    run("fast", max_iters=2)
    assert "hours" not in capsys.readouterr().out


def test_a_run_says_where_it_reads_less_than_the_val_split_as_one_of_minutes_does_where_that_would_take_long(
    run, capsys, monkeypatch
):
    monkeypatch.setattr(plan, "EVALUATION_TOKENS", 64)
    monkeypatch.setattr(train, "seconds_per_token", lambda *_: 1e3)
    read, whole = [], train.validation_loss
    monkeypatch.setattr(train, "validation_loss", lambda *args: read.append(args[3]) or whole(*args))
    timed = dict(minutes=0.02, max_iters=2, not_given=["max_iters", "eval_interval"])
    run("short", **timed)
    val = len(TEXT) - int(0.9 * len(TEXT))
    said = f"An evaluation reads 64 of the {val} tokens to validate (--eval_iters 2).\n"
    assert said in capsys.readouterr().out and read == [2]
    run("given", **timed, eval_iters=3)
    assert f"reads 96 of the {val} tokens to validate (--eval_iters 3).\n" in capsys.readouterr().out
    run("steps", max_iters=2, eval_interval=2)
    assert "An evaluation" not in capsys.readouterr().out and read == [2, 3, 200]


def test_compile_is_left_out_where_it_would_not_pay_and_where_it_is_switched_off(run, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    run("default", not_given=["compile"], compile=True, max_iters=2)
    assert "compile: no" in capsys.readouterr().out
    run("off", compile=False, max_iters=2)
    assert "compile" not in capsys.readouterr().out


def test_compile_is_left_out_where_it_fails_and_the_run_goes_on(run, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nand a long story")

    plain = run("plain", max_iters=3)[1]
    monkeypatch.setattr(torch, "compile", lambda model: broken)
    capsys.readouterr()
    compiled = run("compiled", compile=True, max_iters=3)[1]
    assert "running uncompiled (RuntimeError: no compiler)\n" in capsys.readouterr().out
    assert losses(compiled) == losses(plain)


# ---------------------------------------------------------------------------------------------------------------------
# --minutes


def test_minutes_are_kept_and_the_settings_chosen_are_told_as_flags(run, capsys):
    sizes = ["n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters", "learning_rate", "warmup_iters"]
    start = time.perf_counter()
    status, metrics = run("out", not_given=sizes, minutes=0.06)
    assert status == 0 and time.perf_counter() - start < 3.6 + 6  # a busy machine may be late
    assert losses(metrics, "val_loss")[-1] < losses(metrics)[0]  # which was before any step
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--"))
    chosen, given = parse_options(train.TrainOptions, told.split(), "")
    config = json.loads(Path("out/config.json").read_text())
    assert {"n_layer", "n_embd", "batch_size", "dropout"} <= given
    assert (chosen.n_layer, chosen.n_embd) == (config["n_layer"], config["n_embd"])


def test_settings_given_beside_minutes_are_kept(run):
    run("out", not_given=["max_iters", "batch_size"], minutes=0.02, arch="gpt", n_layer=2)
    config = json.loads(Path("out/config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["n_embd"]) == ("gpt2", 2, 16)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for a second in each step; the process starts when `run` is called. Ctrl-C comes in
    the step in which it shows clock.ctrl_c."""
    clock, step = SimpleNamespace(now=0.0, ctrl_c=None), Learner.step

    def slow(*args):
        clock.now += 1.0
        if clock.now == clock.ctrl_c:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Learner, "step", slow)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


TIMED = dict(arch="gpt", minutes=2, not_given=["max_iters", "eval_interval"], learning_rate=1e-2, min_lr=0.0)


def assert_a_line_to_0(metrics):
    """A step a second until the last seconds, which are kept for the end; each at the rate of the time it begins at."""
    steps = [m for m in metrics if "lr" in m]
    end = len(steps)
    assert 116 <= end <= 119 and [m["step"] for m in steps] == list(range(1, end + 1))
    assert [m["seconds"] for m in steps] == list(range(1, end + 1)), "of the run, not of the process"
    assert [m["lr"] for m in steps] == pytest.approx([1e-2 * (1 - i / end) for i in range(end)], abs=1e-4)


def test_with_minutes_the_learning_rate_reaches_0_when_the_time_is_up(run, clock):
    assert_a_line_to_0(run("out", **TIMED)[1])


def test_in_a_run_of_minutes_the_clock_asks_for_evaluations_or_the_steps_that_were_given(run, clock):
    at = [m["step"] for m in run("clock", **TIMED)[1] if "val_loss" in m]
    assert 5 <= len(at) <= 8 and {later - earlier for earlier, later in zip(at, at[1:-1])} == {16}, "an eighth of 2 min"
    clock.ctrl_c = clock.now + 60
    settings = dict(TIMED, not_given=["max_iters"], eval_interval=25)
    assert run("given", **settings)[0] == 130
    metrics = run("given", **TIMED, resume=True)[1]
    assert [m["step"] for m in metrics if "val_loss" in m] == [25, 50, 75, 100, metrics[-1]["step"]]


def test_the_bar_of_a_run_of_minutes_goes_on_in_evaluations(run, clock, monkeypatch):
    bars, shown, tqdm = [], [], train.tqdm

    def slow(model, tokens, batch_size, max_batches, device, progress, processes):
        for _ in progress(range(3)):
            shown.append((bars[0].n, clock.now))
            clock.now += 2.0
        return 1.0

    monkeypatch.setattr(train, "tqdm", lambda **settings: bars.append(tqdm(**settings)) or bars[0])
    monkeypatch.setattr(train, "validation_loss", slow)
    assert run("out", **TIMED)[0] == 0
    assert len(shown) >= 6 and all(n == min(now, 120) for n, now in shown)
    assert shown[-1][1] > 120  # and then it does not go beyond its end


def test_a_run_of_minutes_goes_on_in_the_time_that_was_left_as_if_it_had_not_stopped(run, clock):
    clock.ctrl_c = 40.0
    status, first = run("out", **TIMED)
    assert status == 130 and (first[-1]["step"], first[-1]["seconds"]) == (40, 40.0)
    clock.now = 1000.0  # later that day
    with pytest.raises(UserError, match=r"^--minutes 0.5: the run in out has had 0\.67; give more, or leave it out"):
        run("out", **dict(TIMED, minutes=0.5), resume=True)
    status, both = run("out", **TIMED, resume=True)
    assert status == 0 and both[: len(first)] == first
    assert_a_line_to_0(both)


def test_when_the_time_is_over_a_resumed_run_wants_more_and_goes_on_with_it(run, clock):
    first = run("out", **TIMED)[1]
    for more in ([], ["--minutes", "2"], ["--minutes", "1"]):
        with pytest.raises(UserError, match=r"has had its [12] minutes; give a larger --minutes") as error:
            train.main(["--out_dir", "out", "--resume", *more])
        assert "\n" not in str(error.value)
    status, longer = run("out", **dict(TIMED, minutes=3), resume=True)
    assert status == 0 and longer[: len(first)] == first and 176 <= longer[-1]["step"] <= 179


@pytest.fixture
def slow_start(clock, monkeypatch):
    """A resumed run needs a minute until its first step."""
    restore = train.Run.restore

    def slow(self, state):
        restore(self, state)
        clock.now += 60.0

    monkeypatch.setattr(train.Run, "restore", slow)


def test_a_minute_more_which_the_start_takes_is_refused_and_changes_nothing(run, clock, slow_start):
    first = run("out", **TIMED)[1]
    before = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name != "run.lock"}
    with pytest.raises(UserError, match=r"--minutes 3: the run has had 2\.9\d min, and what is left is too short for"):
        run("out", **dict(TIMED, minutes=3), resume=True)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name != "run.lock"} == before
    assert train.read_metrics("out/metrics.jsonl") == first


def test_a_stopped_run_whose_start_takes_the_time_that_was_left_ends_with_an_evaluation(run, clock, slow_start):
    clock.ctrl_c = 110.0
    assert run("out", **TIMED)[0] == 130
    status, metrics = run("out", **TIMED, resume=True)
    assert status == 0 and metrics[-1]["step"] == 110 and "val_loss" in metrics[-1]
    with pytest.raises(UserError, match="has had its 2 minutes"):
        run("out", **TIMED, resume=True)


def test_steps_and_minutes_together_end_a_run_by_what_comes_first_and_more_of_that_lets_it_go_on(run, clock):
    settings = dict(TIMED, not_given=[])
    assert run("out", **settings, max_iters=20)[1][-1]["step"] == 20
    assert run("out", **settings, max_iters=30, resume=True)[1][-1]["step"] == 30
    assert run("out", **settings, max_iters=500, resume=True)[1][-1]["step"] < 120


def test_a_run_of_steps_can_go_on_for_minutes(run, clock):
    assert run("out", max_iters=20)[1][-1]["step"] == 20
    status, metrics = run("out", minutes=1, max_iters=500, resume=True)
    assert status == 0 and 56 <= metrics[-1]["step"] <= 59


@pytest.mark.parametrize("minutes", ["0", "-1", "abc", "nan", "inf", "", "1m"])
def test_minutes_that_are_no_time_are_refused_in_one_line(tmp_path, monkeypatch, capsys, minutes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--minutes={minutes}"])
    with pytest.raises(SystemExit) as exit:
        run_command(train.main)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "") and list(tmp_path.iterdir()) == []
    assert err == f"train.py: error: --minutes: wants a number above 0 and below 1000000, not '{minutes}'\n"


# ---------------------------------------------------------------------------------------------------------------------
# --arch modern


@needs_muon
def test_a_modern_model_trains_and_writes_and_goes_on_bit_for_bit(run, capsys):
    constant = dict(
        arch="modern", dropout=0.2, eval_interval=20, min_lr=1e-2
    )  # a rate that does not know how long the run will be
    status, metrics = run("whole", max_iters=60, **constant)
    assert status == 0 and losses(metrics)[-1] < losses(metrics)[0] - 0.5
    assert losses(metrics)[0] == pytest.approx(math.log(len(set(TEXT))), abs=1e-5), "the first guess is undecided"

    run("parts", max_iters=20, **constant)
    parts = run("parts", max_iters=60, **constant, resume=True)[1]
    assert [(m["step"], losses([m])) for m in parts] == [(m["step"], losses([m])) for m in metrics]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    with pytest.raises(UserError, match=r"--arch gpt: this run began with modern"):
        train.main(["--out_dir", "whole", "--resume", "--arch", "gpt", "--max_iters", "100"])

    texts = []
    for out in ("whole", "parts"):
        capsys.readouterr()
        assert sample.main(["--out_dir", out, "--prompt", "the ", "--max_new_tokens", "50", "--seed", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == len("the ") + 50 + 1 and set(texts[0]) <= set(TEXT)
    assert sample.main(["--out_dir", "whole", "--num_beams", "3", "--max_new_tokens", "20", "--dtype", "bfloat16"]) == 0


@needs_muon
def test_a_modern_model_has_its_own_defaults_and_what_is_given_counts(run):
    unlike = ["learning_rate", "min_lr", "warmup_iters", "weight_decay", "beta1", "beta2"]
    run("out", not_given=unlike, arch="modern", max_iters=2, learning_rate=3e-4, warmup_iters=100)
    found = plan.load_state("out")["options"]
    assert {name: found[name] for name in unlike} == plan.MODERN
    run("given", arch="modern", max_iters=2, learning_rate=3e-4, warmup_iters=7)
    found = plan.load_state("given")["options"]
    assert (found["learning_rate"], found["warmup_iters"], found["beta2"]) == (3e-4, 7, 0.95)


@needs_muon
def test_a_modern_run_of_before_there_were_ngrams_is_resumed_without_any(run, monkeypatch):
    unbroken = run("unbroken", arch="modern", ngram=1, ahead=1, max_iters=8)[1]
    run("out", arch="modern", ngram=1, ahead=1, max_iters=4)

    def load_state(out_dir, load=plan.load_state):
        state = load(out_dir)
        for kept in (state["options"], state["config"]):
            assert [kept.pop(name) for name in ("ngram", "ngram_rows", "ahead")]
        state["options"].pop("ngram_decay")
        return state

    monkeypatch.setattr(plan, "load_state", load_state)
    status, metrics = run("out", not_given=set(TINY) - {"max_iters"}, max_iters=8, resume=True)
    assert status == 0 and metrics[-1]["step"] == unbroken[-1]["step"] == 8


@needs_muon
def test_a_run_from_a_model_with_another_table_is_resumed_with_it(run):
    run("old", arch="modern", ngram=3, ngram_rows=50, max_iters=4)
    not_given = {*NOT_GIVEN, "ngram", "ngram_rows"} - {"max_iters"}
    assert run("new", init_from="old", max_iters=4, not_given=not_given)[0] == 0
    found = plan.load_state("new")
    assert all((kept["ngram"], kept["ngram_rows"]) == (3, 50) for kept in (found["options"], found["config"]))
    assert found["options"]["ngram_decay"] == 0.0
    for name, other in (("ngram", 5), ("ngram_rows", 60)):
        with pytest.raises(UserError, match=rf"^--{name} {other}: old has \d+; leave the flag out"):
            run("other", init_from="old", max_iters=4, not_given=not_given - {name}, **{name: other})
    assert run("new", init_from="old", max_iters=6, not_given=not_given, resume=True)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# --init_from: fine-tuning


NOT_GIVEN = ["arch", "n_layer", "n_head", "n_embd", "block_size", "dropout", "learning_rate", "batch_size"]
NOT_GIVEN += ["max_iters", "eval_interval", "warmup_iters"]
NEW_TEXT = "the dog jumps, and the fox jumps over the brown dog.\n" * 40  # the old text's characters


@pytest.fixture
def small_steps(monkeypatch):
    """Fine-tuning whose steps have 2,048 tokens."""
    monkeypatch.setattr(plan, "STEP_TOKENS", 2048)


def val_losses(metrics):
    return {m["step"]: m["val_loss"] for m in metrics if "val_loss" in m}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block_size", [None, 4])
def test_fine_tuning_starts_from_the_old_models_loss_and_lowers_it_on_the_new_text(
    run, small_steps, capsys, arch, block_size
):
    run("old", arch=arch, max_iters=100, eval_interval=100)
    Path("text.txt").write_text(NEW_TEXT, encoding="utf-8")
    capsys.readouterr()
    cropped = {} if block_size is None else dict(block_size=block_size)
    not_given = [name for name in NOT_GIVEN if name not in cropped]
    status, metrics = run("new", init_from="old", not_given=not_given, **cropped)

    model, tokenizer = plan.load_model("old", block_size)
    expected = train.validation_loss(model, load_data("text.txt", tokenizer).val, 4)
    measured = val_losses(metrics)
    assert status == 0 and metrics[0]["step"] == 0 and measured[0] == pytest.approx(expected, abs=1e-5)
    last = metrics[-1]["step"]
    assert measured[last] < measured[0] - 0.05 and last == plan.FINE_TUNING_STEPS[0], "a short text"
    assert f"step 0: val loss {measured[0]:.4f}" in capsys.readouterr().out
    assert plan.load_model("new")[0].config.block_size == (block_size or 8)


def test_fine_tuning_has_its_own_defaults_which_are_told_and_what_is_given_counts(run, small_steps, capsys):
    run("old", max_iters=1)
    capsys.readouterr()
    run("new", init_from="old", not_given=NOT_GIVEN)
    told = capsys.readouterr().out.splitlines()
    assert re.match(r"fine-tuning old on [\d,]+ tokens, \d+\.\d times:", told[0])
    _, named = parse_options(train.TrainOptions, told[1].split(), "")
    assert named == {*plan.FINE_TUNING, "batch_size", "max_iters", "eval_interval"}
    found = plan.load_state("new")["options"]
    assert {name: found[name] for name in plan.FINE_TUNING} == plan.FINE_TUNING
    assert plan.load_state("new")["config"]["dropout"] == plan.FINE_TUNING["dropout"]

    capsys.readouterr()
    run("given", init_from="old", not_given=["learning_rate", "warmup_iters"], dropout=0.0, max_iters=7)
    _, named = parse_options(train.TrainOptions, capsys.readouterr().out.splitlines()[1].split(), "")
    assert named == {"learning_rate", "warmup_iters", "weight_decay"}
    found = plan.load_state("given")
    assert (found["options"]["max_iters"], found["options"]["eval_interval"]) == (7, 10)
    assert found["options"]["dropout"] == found["config"]["dropout"] == 0.0


@pytest.mark.parametrize("arch", ARCHS)
def test_fine_tuning_for_minutes_keeps_the_sizes_and_has_its_own_rates(run, arch):
    run("old", arch=arch, max_iters=20, n_embd=32)
    status, metrics = run("new", init_from="old", minutes=0.05, not_given=NOT_GIVEN)
    found = plan.load_state("new")["options"]
    assert status == 0 and val_losses(metrics)[0] > min(val_losses(metrics).values())
    assert (found["arch"], found["n_embd"], found["block_size"]) == (arch, 32, 8)
    rates = plan.FINE_TUNING_MODERN if arch == "modern" else plan.FINE_TUNING
    assert found["learning_rate"] == rates["learning_rate"] and found["min_lr"] == 0.0


def test_a_fine_tuning_that_is_resumed_is_that_of_the_unbroken_one(run, monkeypatch):
    run("old", max_iters=20)
    settings = dict(init_from="old", not_given=NOT_GIVEN[:6])
    unbroken = run("unbroken", **settings)[1]
    step, seen = Learner.step, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        assert run("broken", **settings)[0] == 130
    status, broken = run("broken", **settings, resume=True)
    assert status == 0 and val_losses(broken) == val_losses(unbroken) and 0 in val_losses(broken)
    assert Path("broken/model.safetensors").read_bytes() == Path("unbroken/model.safetensors").read_bytes()


def test_weights_that_are_no_numbers_are_refused_before_the_first_step(run):
    run("old", max_iters=1)
    model, tokenizer = plan.load_model("old")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e38)  # of which the logits are infinite
    save_model("old", model, tokenizer)
    with pytest.raises(UserError, match="--init_from old: its val loss is inf"):
        run("new", init_from="old", not_given=NOT_GIVEN)
