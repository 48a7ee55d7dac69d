"""train.py and plan.py: what the flags are, how the learning rate moves, one step, and whole runs in this process.

The commands as a person runs them are in test_cli.py.
"""

import copy
import json
import math
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import plan
import train
from data import CharTokenizer, load_data
from utils import UserError, parse_options

CPU = torch.device("cpu")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=20, compile=False, device="cpu")
TINY.update(dtype="float32", eval_interval=10, log_interval=1, learning_rate=1e-2, warmup_iters=0)
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 20


def make_options(**changes):
    return train.TrainOptions(**{**TINY, **changes})


def make_batch(options, steps=1, vocab_size=11, seed=0):
    rows = options.batch_size * options.gradient_accumulation_steps
    tokens = torch.randint(
        vocab_size, (steps, rows, options.block_size + 1), generator=torch.Generator().manual_seed(seed)
    )
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def take_steps(model, options, batches, scaler=None):
    """The losses of training_step over the batches; the model is changed."""
    optimizer = train.build_optimizer(model, options, CPU)
    scaler = scaler or no_scaler()
    return [
        train.training_step(model, optimizer, scaler, x, y, options, CPU, torch.float32)[0].item() for x, y in batches
    ]


def assert_same_weights(model, other, atol):
    """All weights but the biases of the keys: the loss does not depend on these (softmax ignores what all scores have
    in common), so that their gradient is rounding error alone, which Adam scales up to a full step."""
    C = model.config.n_embd
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if name.endswith("c_attn.bias"):
            p, q = (torch.cat([b[:C], b[2 * C :]]) for b in (p, q))
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out_dir, **options) -> (exit status, the lines of its metrics.jsonl): a whole run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def go(out_dir, given=(), **changes):
        options = make_options(data="text.txt", out_dir=out_dir, **changes)
        status = train.train(options, {"data", "out_dir", *given})
        return status, train.read_metrics(os.path.join(out_dir, "metrics.jsonl"))

    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    assert names >= train.MAY_CHANGE
    fixed = {"n_layer", "n_head", "n_embd", "block_size", "dropout", "bias", "batch_size", "learning_rate", "seed"}
    fixed |= {"gradient_accumulation_steps", "min_lr", "warmup_iters", "weight_decay", "beta1", "beta2", "grad_clip"}
    assert not fixed & train.MAY_CHANGE and names >= fixed


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


def test_the_learning_rate_climbs_in_equal_steps_and_falls_along_half_a_cosine():
    options = make_options(learning_rate=1.0, min_lr=0.2, warmup_iters=4, max_iters=104)
    rates = [train.learning_rate(step, options) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4 + 50] == pytest.approx(0.6) and rates[104] == pytest.approx(0.2)
    assert rates[4 + 25] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))


def test_the_learning_rate_ends_at_a_tenth_unless_told_otherwise():
    assert train.learning_rate(20, make_options(learning_rate=0.5)) == pytest.approx(0.05)
    assert train.learning_rate(20, make_options(learning_rate=0.5, min_lr=0.0)) == pytest.approx(0.0)
    assert train.learning_rate(20, make_options(learning_rate=0.5, min_lr=0.5)) == 0.5


@pytest.mark.parametrize("warmup, length", [(0, 1), (0, 20), (20, 20), (100, 20), (1, 1)])
def test_the_learning_rate_is_a_number_between_0_and_its_highest_in_every_run(warmup, length):
    options = make_options(learning_rate=0.5, warmup_iters=warmup, max_iters=length)
    assert all(0 < train.learning_rate(step, options) <= 0.5 for step in range(length + 1))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer and one step


def test_every_weight_is_trained_once_and_only_the_matrices_decay(make_model):
    model = make_model()
    optimizer = train.build_optimizer(model, make_options(weight_decay=0.3, beta1=0.8, beta2=0.95), CPU)
    groups = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert sorted(id(p) for ps in groups.values() for p in ps) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for p in groups[0.3]) and all(p.dim() == 1 for p in groups[0.0])
    assert all(g["betas"] == (0.8, 0.95) for g in optimizer.param_groups)


def test_a_step_is_what_plain_pytorch_does(make_model):
    options = make_options(learning_rate=1e-2, weight_decay=0.1, grad_clip=0.5)
    ours, plain = make_model().train(), make_model().train()
    batches = make_batch(options, steps=3)
    found = take_steps(ours, options, batches)

    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in plain.parameters() if p.dim() == 2], weight_decay=0.1),
            dict(params=[p for p in plain.parameters() if p.dim() == 1], weight_decay=0.0),
        ],
        lr=1e-2,
        betas=(options.beta1, options.beta2),
    )
    expected = []
    for x, y in batches:
        _, loss = plain(x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6)
    assert_same_weights(ours, plain, atol=1e-6)


@pytest.mark.parametrize("batch_size, steps", [(16, 4), (1, 64), (32, 2)])
def test_accumulated_gradients_give_the_losses_and_weights_of_the_whole_batch_at_once(make_model, batch_size, steps):
    whole_options = make_options(batch_size=64)
    part_options = make_options(batch_size=batch_size, gradient_accumulation_steps=steps)
    batches = make_batch(whole_options, steps=4)
    whole, part = make_model().train(), make_model().train()
    expected = take_steps(whole, whole_options, batches)
    assert take_steps(part, part_options, batches) == pytest.approx(expected, abs=2e-6)
    assert_same_weights(part, whole, atol=2e-5)


def test_the_loss_of_a_step_is_the_mean_over_all_its_windows(make_model):
    model, options = make_model().train(), make_options(batch_size=3, gradient_accumulation_steps=2)
    ((x, y),) = make_batch(options)
    expected = model(x, y)[1].item()
    assert take_steps(model, options, [(x, y)]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3])
def test_the_norm_is_that_before_clipping_and_0_switches_clipping_off(make_model, grad_clip):
    model, options = make_model().train(), make_options(grad_clip=grad_clip, batch_size=4)
    ((x, y),) = make_batch(options)
    model(x, y)[1].backward()
    true_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    model.zero_grad()
    optimizer, used = torch.optim.SGD(model.parameters(), lr=1.0), []
    before = [p.detach().clone() for p in model.parameters()]
    _, norm = train.training_step(model, optimizer, no_scaler(), x, y, options, CPU, torch.float32)
    used = torch.stack([(p.detach() - q).norm() for p, q in zip(model.parameters(), before)]).norm().item()
    assert norm.item() == pytest.approx(true_norm, rel=1e-4)
    assert used == pytest.approx(grad_clip or true_norm, rel=1e-2)


def test_no_gradient_is_left_over_for_the_next_step(make_model):
    model, options = make_model().train(), make_options()
    take_steps(model, options, make_batch(options))
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_scaler_of_float16_changes_no_step_and_skips_one_that_overflows(make_model):
    options = make_options()
    batches = make_batch(options, steps=3)
    plain, scaled = make_model().train(), make_model().train()
    expected = take_steps(plain, options, batches)
    assert take_steps(scaled, options, batches, torch.amp.GradScaler("cpu")) == pytest.approx(expected, abs=1e-6)
    assert_same_weights(plain, scaled, atol=1e-5)

    before = copy.deepcopy(scaled.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    take_steps(scaled, options, batches[:1], scaler)
    assert all(torch.equal(before[name], p) for name, p in scaled.state_dict().items())


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


def test_gradient_checkpointing_gives_the_losses_of_the_plain_run(run):
    plain, saving = run("plain")[1], run("saving", gradient_checkpointing=True)[1]
    assert losses(saving) == losses(plain) and losses(saving, "val_loss") == losses(plain, "val_loss")


def test_gradient_accumulation_gives_the_losses_of_the_run_with_the_large_batch(run):
    large = run("large", dropout=0.0, batch_size=64, max_iters=10)[1]
    small = run("small", dropout=0.0, batch_size=16, gradient_accumulation_steps=4, max_iters=10)[1]
    assert losses(small) == pytest.approx(losses(large), abs=1e-5)
    assert losses(small, "val_loss") == pytest.approx(losses(large, "val_loss"), abs=1e-5)
    assert small[-1]["tokens"] == large[-1]["tokens"] == 10 * 64 * 8


def test_reports_do_not_change_what_is_learned(run, capsys):
    quiet = run("quiet", log_interval=100, eval_interval=100)[1]
    busy = run("busy", log_interval=1, eval_interval=3, sample_interval=2)[1]
    assert losses(busy)[-1] == losses(quiet)[-1]
    assert losses(busy, "val_loss")[-1] == losses(quiet, "val_loss")[-1]


def test_the_best_and_the_newest_weights_are_kept(run, make_model):
    run("out")
    data = load_data("text.txt")
    model = make_model(vocab_size=data.tokenizer.vocab_size)
    probe = train.Run(make_options(out_dir="out"), model, data, CPU, torch.float32)
    good = probe.evaluate()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    assert probe.evaluate() > good
    kept, _ = train.load_model("out")
    assert train.validation_loss(kept, data.val, 4) == pytest.approx(good, abs=1e-5)
    newest = train.load_state("out")["model"]
    assert all(torch.equal(newest[name], p) for name, p in model.state_dict().items())


def test_weights_that_give_no_number_are_neither_kept_nor_logged(run, make_model):
    run("out")
    data = load_data("text.txt")
    probe = train.Run(make_options(out_dir="out"), make_model(vocab_size=40), data, CPU, torch.float32)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    with torch.no_grad():
        probe.model.transformer.ln_f.weight.fill_(float("nan"))
    assert not math.isfinite(probe.evaluate())
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler here")
def test_compile_gives_the_losses_of_the_plain_run(run, capsys):
    plain = run("plain", dropout=0.0, max_iters=6)[1]
    capsys.readouterr()
    compiled = run("compiled", given=["compile"], dropout=0.0, max_iters=6, compile=True)[1]
    said = capsys.readouterr().out
    assert "compile: yes" in said and "no working compiler" not in said
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(compiled, "val_loss") == pytest.approx(losses(plain, "val_loss"), abs=1e-5)


def test_metrics_are_valid_json_even_where_a_gradient_is_infinite(run, make_model):
    run("out")
    options = make_options(data="text.txt", out_dir="out")
    probe = train.Run(options, make_model(), load_data("text.txt"), CPU, torch.float32)
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


# ---------------------------------------------------------------------------------------------------------------------
# plan.py: how long it takes, and what pays


def test_timing_a_step_leaves_no_trace(make_model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    model, options = make_model(vocab_size=40, dropout=0.2).train(), make_options()
    batches = load_data(str(tmp_path / "text.txt")).batches(4, 8, seed=0)
    dice, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert plan.seconds_per_step(model, batches, options, CPU, torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())


def test_a_run_of_more_than_an_hour_says_so_up_front_and_names_a_smaller_one_that_train_takes(run, capsys, monkeypatch):
    monkeypatch.setattr(train, "seconds_per_step", lambda *_: 3000.0)
    run("slow", n_layer=6, n_embd=96, n_head=6, max_iters=2)
    out = capsys.readouterr().out.splitlines()
    announced = next(i for i, line in enumerate(out) if "about 1.7 hours" in line)
    assert announced < next(i for i, line in enumerate(out) if line.startswith("step "))
    flags = out[announced + 1].split("python train.py ")[1].split()
    smaller, _ = parse_options(train.TrainOptions, flags, "")
    assert smaller.n_embd < 384 and smaller.n_embd % smaller.n_head == 0

    monkeypatch.setattr(train, "seconds_per_step", lambda *_: 1.0)
    run("fast", max_iters=2)
    assert "hours" not in capsys.readouterr().out


def test_the_smaller_setting_is_less_work_than_the_default():
    _, share = plan.smaller_setting(train.TrainOptions())
    assert 0 < share < 0.05


def test_compile_is_left_out_where_it_would_not_pay_and_where_it_is_switched_off(make_model, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    model = make_model()
    arguments = set(), CPU, torch.float32
    assert plan.maybe_compile(model, None, make_options(compile=True), *arguments, 10.0) is model
    assert "compile: no" in capsys.readouterr().out
    assert plan.maybe_compile(model, None, make_options(compile=False), *arguments, 1e6) is model
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "sizes",
    [dict(n_layer=10**9), dict(n_embd=10**9), dict(batch_size=10**9), dict(gradient_accumulation_steps=10**9)],
)
def test_sizes_that_no_memory_holds_are_refused_before_the_model_is_made(sizes):
    with pytest.raises(UserError, match="GiB of memory"):
        plan.check_memory(make_options(**sizes), vocab_size=50)


def test_the_sizes_of_the_description_are_not_refused():
    plan.check_memory(train.TrainOptions(), vocab_size=100)
    plan.check_memory(
        train.TrainOptions(n_layer=12, n_head=12, n_embd=768, batch_size=16, gradient_accumulation_steps=4), 100
    )
