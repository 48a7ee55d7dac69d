"""plan.py: what is chosen for the time one has, what is refused, how long a run will take, and when compiling pays."""

import contextlib
import copy
import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import learn_cpu
import plan
import train
from data import load_data
from model import GPTConfig
from modern import ModernConfig
from optim import Learner
from plan import (
    check_checkpointing,
    check_memory,
    evaluation_batches,
    for_minutes,
    matmul_peak,
    maybe_compile,
    seconds_per_token,
    smaller_setting,
)
from shards import MANIFEST
from utils import UserError, parse_options

CPU = torch.device("cpu")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=20)
PEAKS = [1e8, 1e10, 8e11, 1e13, 8e14]  # FLOP/s, from a small board to a large GPU
MINUTES = [0.01, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300, 1440, 10_000]


def make_options(**changes):
    return train.TrainOptions(**{**TINY, **changes})


@pytest.fixture
def choose(monkeypatch):
    """choose(minutes, tokens, peak) -> (settings, why), as on a machine of that peak speed."""

    def choose(minutes, tokens=10**6, peak=1e11, device=CPU, arch="modern", in_c=False):
        monkeypatch.setattr(plan, "matmul_peak", lambda device, dtype: peak)
        monkeypatch.setattr(learn_cpu, "usable", lambda dtype: in_c)
        return for_minutes(minutes, tokens, device, torch.float32, arch=arch)

    return choose


# ---------------------------------------------------------------------------------------------------------------------
# --minutes: the settings for the time one has


def weights(sizes):
    return sizes["n_layer"] * sizes["n_embd"] ** 2


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("tokens", [100, 100_000, 10**8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_minutes_never_choose_a_smaller_model_or_less_to_look_back_on(choose, peak, tokens, device):
    chosen = [choose(minutes, tokens, peak, torch.device(device))[0] for minutes in MINUTES]
    for less, more in zip(chosen, chosen[1:]):
        assert weights(more) >= weights(less) and more["block_size"] >= less["block_size"]


@pytest.mark.parametrize(
    "minutes, tokens, channels, batch_size",
    [
        (3, 10**6, 192, 8),  # three times
        (5, 10**6, 192, 8),  # five
        (8, 10**6, 256, 8),  # it would be eight times
        (12, 10**6, 256, 16),  # where the larger model is the usual one
        (8, 10**8, 192, 8),  # a long text
        (5, 10**5, 192, 8),  # 1,100 steps are too few for a larger model
        (1, 3 * 10**5, 128, 8),  # the next size up would have been worse here
    ],
)
def test_where_a_text_would_be_read_more_than_five_times_a_cpu_takes_the_next_size(
    choose, minutes, tokens, channels, batch_size
):
    sizes, _ = choose(minutes, tokens, 4.3e11)
    assert (sizes["n_embd"], sizes["batch_size"]) == (channels, batch_size)
    assert (
        choose(minutes, tokens, 4.3e11, torch.device("cuda"))[0]["n_embd"]
        == choose(minutes, 10**9, 4.3e11, torch.device("cuda"))[0]["n_embd"]
    )


@pytest.mark.parametrize("minutes", MINUTES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_faster_machine_never_gets_a_smaller_model(choose, minutes, device):
    sizes = [weights(choose(minutes, peak=peak, device=torch.device(device))[0]) for peak in PEAKS]
    assert sizes == sorted(sizes)


def test_the_smallest_and_the_largest_size_are_both_reached(choose):
    assert weights(choose(0.01, peak=1e8)[0]) < weights(choose(1, peak=8e11)[0])
    assert weights(choose(1, peak=8e11)[0]) < weights(choose(1440, peak=8e14)[0])


@pytest.mark.parametrize("minutes", [0.01, 1, 60, 10_000])
@pytest.mark.parametrize("tokens", [9, 18, 100, 10**6, 10**10])
@pytest.mark.parametrize("peak", PEAKS)
def test_every_choice_is_a_flag_of_train_and_together_they_make_a_model(choose, minutes, tokens, peak):
    sizes, _ = choose(minutes, tokens, peak)
    assert {f.name for f in fields(train.TrainOptions)} >= set(sizes)
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    options, given = parse_options(train.TrainOptions, flags, "")  # refuses what does not fit a flag's rule
    assert given == set(sizes) and sizes["block_size"] < tokens and 0 <= sizes["dropout"] <= 0.5
    for config in (GPTConfig, ModernConfig):  # these refuse what makes no model
        names = {f.name for f in fields(config)} & set(sizes)
        config(vocab_size=65, **{name: getattr(options, name) for name in names})


@pytest.mark.parametrize("length", [11, 20, 50, 100, 500, 2000, 10_000])
@pytest.mark.parametrize("peak", PEAKS)
def test_the_block_size_fits_the_text_however_short_it_is(choose, tmp_path, length, peak):
    (tmp_path / "text.txt").write_text("ab" * (length // 2) + "c" * (length % 2))
    data = load_data(str(tmp_path / "text.txt"))
    sizes, _ = choose(10, len(data.train), peak)
    data.check_length(sizes["block_size"])  # raises an error where it does not fit
    assert sizes["block_size"] == 8 or 8 * sizes["block_size"] <= len(data.train)


def test_a_long_text_gets_the_block_size_of_its_model_and_a_short_one_a_smaller_one(choose):
    assert [choose(1, tokens, 1e13)[0]["block_size"] for tokens in (10**6, 2048, 2047, 1024, 100, 64, 63)] == [
        256,
        256,
        128,
        128,
        8,
        8,
        8,
    ]


def tokens_in(seconds, peak, sizes):
    """At 40 % of the peak, 26 % below 192 channels, and 6 operations for each weight of the layers and each token."""
    return (0.26 if sizes["n_embd"] < 192 else 0.4) * peak * seconds / (6 * 12 * weights(sizes))


@pytest.mark.parametrize("minutes, channels", [(0.5, 64), (10, 192)])
def test_large_models_are_expected_to_read_as_much_on_a_cpu_as_their_share_of_the_peak_allows(
    choose, minutes, channels
):
    sizes, why = choose(minutes, 10**5, 1e11)
    assert sizes["n_embd"] == channels
    assert f"about {tokens_in(60 * minutes, 1e11, sizes) / 1e5:.1f} times the text" in why


@pytest.mark.parametrize(
    "epochs, modern, gpt",
    [
        (0.01, 0, 0),
        (5.2, 0, 0),
        (5.8, 0.03, 0),
        (6.8, 0.04, 0.03),
        (8, 0.05, 0.05),
        (16, 0.1, 0.15),
        (31, 0.15, 0.25),
        (41, 0.29, 0.29),
        (9e3, 0.5, 0.5),
    ],
)
def test_dropout_grows_each_time_that_the_text_is_read_twice_as_often_up_to_0_5(choose, epochs, modern, gpt):
    sizes, _ = choose(1, peak=1e11)
    tokens_read = tokens_in(60, 1e11, sizes)
    sizes, why = choose(1, round(tokens_read / epochs), peak=1e11)
    assert sizes["dropout"] == modern and sizes.get("ngram", 5) == (5 if epochs < 32 else 1)
    assert choose(1, round(tokens_read / epochs), peak=1e11, arch="gpt")[0]["dropout"] == gpt
    assert float(why.split("about ")[1].split(" times the text")[0]) == pytest.approx(epochs, rel=0.01, abs=0.05)


@pytest.mark.parametrize("tokens, most", [(1000, 32), (48_000, 32), (75_000, 50), (90_000, 60), (10**6, 60)])
def test_n_grams_are_left_out_where_a_text_is_read_so_often_that_they_know_it_by_heart(choose, tokens, most):
    found = set()
    for peak in (1.1**n for n in range(170, 450)):
        sizes, _ = choose(1, tokens, peak)
        epochs = tokens_in(60, peak, sizes) / tokens
        if not 0.99 < epochs / most < 1.01:
            assert ("ngram" in sizes) == (epochs > most), epochs
            found.add(epochs > most)
    assert found == {True, False}


@pytest.mark.parametrize("epochs, decay", [(0.01, 1.0), (2, 1.0), (3, 1.6), (7.5, 5.2), (9, 6.4), (50, 16.0)])
def test_the_more_often_a_text_is_read_the_sooner_its_n_grams_fade(choose, capsys, epochs, decay):
    sizes, _ = choose(1, peak=1e11)
    tokens = round(tokens_in(60, 1e11, sizes) / epochs)
    fixed = dict(arch="modern", max_iters=400, batch_size=4, gradient_accumulation_steps=2, block_size=32)
    for options in (dict(arch="modern", minutes=1), {**fixed, "minutes": None}):
        options = make_options(**options)
        text = tokens if options.minutes else round(400 * 4 * 2 * 32 / epochs)
        chosen = plan.choose_settings(options, {"arch"}, text, CPU, torch.float32, peak=1e11)
        assert chosen.ngram_decay == pytest.approx(decay, abs=0.1)
        told = capsys.readouterr().out
        assert ("--ngram_decay" in told) == (chosen.ngram > 1 and options.minutes is not None)


def test_the_same_time_on_a_shorter_text_never_gets_less_dropout(choose):
    rates = [choose(3, tokens, 8e11)[0]["dropout"] for tokens in (10**9, 10**8, 10**7, 10**6, 10**5, 10**4, 1000)]
    assert rates == sorted(rates) and rates[0] == 0.0 and rates[-1] == 0.5


@pytest.mark.parametrize("minutes, rate", [(0.05, 0.016), (3, 8e-3), (60, 2e-3), (10_000_000, 2e-3)])
def test_a_gpt_learns_at_lower_rates_than_a_modern_model(minutes, rate):
    options = make_options(arch="gpt", minutes=minutes)
    chosen = plan.choose_settings(options, {"arch"}, 10**9, CPU, torch.float32, peak=1e11)
    assert chosen.learning_rate == pytest.approx(rate)
    assert chosen.arch == "gpt" and chosen.matrix_lr == options.matrix_lr


def test_the_reason_names_the_speed_the_time_and_the_length_of_the_text(choose):
    _, why = choose(2.5, 123_456, 8e11)
    assert why.startswith("800 GFLOP/s x 2.5 min on 123,456 tokens") and "\n" not in why


def test_a_cpu_for_which_there_is_c_code_counts_as_faster(choose, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for minutes, gain in ((2.5, plan.IN_C), (0.13, plan.SMALL_IN_C)):
        found, why = choose(minutes, 1_234_567, 8e11, in_c=True)
        as_fast, _ = choose(minutes, 1_234_567, gain * 8e11)
        assert found == as_fast != choose(minutes, 1_234_567, 8e11)[0]
        assert why.startswith(f"800 GFLOP/s x {gain:g} in C x {minutes:g} min on 1,234,567 tokens")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # of which most would have no part of a step
    assert choose(2.5, 123_456, 8e11, in_c=True) == choose(2.5, 123_456, 8e11)
    gpu = torch.device("cuda")
    assert choose(2.5, 123_456, 8e14, gpu, in_c=True) == choose(2.5, 123_456, 8e14, gpu)


def test_the_table_of_sizes_is_not_changed_by_choosing(choose, monkeypatch):
    table = ((0, dict(n_layer=1, n_embd=8, n_head=1, block_size=64, batch_size=4)),)
    monkeypatch.setattr(plan, "SIZES", copy.deepcopy(table))
    assert choose(1, 100)[0]["block_size"] == 8 and table == plan.SIZES


def test_the_table_of_sizes_has_one_for_any_work():
    assert plan.SIZES[0][0] == 0 and [least for least, _ in plan.SIZES] == sorted(least for least, _ in plan.SIZES)


def test_on_a_gpu_small_models_do_less_work_than_the_products_alone():
    gpu, smallest = torch.device("cuda"), plan.SIZES[0][1]
    for _, sizes in plan.SIZES:
        assert plan.possible_work(sizes, 1, 8e11, CPU) == 8e11 * 60
    by_size = [plan.possible_work(sizes, 1, 8e14, gpu) for _, sizes in plan.SIZES]
    assert by_size == sorted(by_size) and by_size[-1] < 8e14 * 53
    # 53 s after the start, 0.8 ms for the operations of two layers and twice the time of the products
    work = 6 * 12 * 2 * 64**2 * 32 * 64 / 0.4
    assert plan.possible_work(smallest, 1, 8e14, gpu) == pytest.approx(53 / (0.8e-3 + 2 * work / 8e14) * work)
    assert plan.possible_work(smallest, 0.01, 8e14, gpu) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_is_the_work_of_a_product_over_the_time_of_the_fastest(monkeypatch, dtype):
    assert 1e6 < matmul_peak(CPU, dtype, size=64) < 1e16
    ticks = iter([0.0, 0.0, 0.2, 0.2, 0.2, 0.25, 0.25, 0.25, 0.4, 0.4])  # began; then start, end, now of each product
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))
    assert matmul_peak(CPU, dtype, size=8) == pytest.approx(2 * 8**3 / 0.05)


@pytest.mark.parametrize("seconds, sizes", [(0.02, [1024]), (0.002, [1024, 2048])])
def test_the_peak_is_measured_with_larger_matrices_where_the_products_of_smaller_ones_take_no_time(
    monkeypatch, seconds, sizes
):
    made, clock = [], iter(seconds * i for i in range(1000))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(plan.torch, "randn", lambda *size, **how: made.append(size) or torch.ones(2, 2))
    assert matmul_peak(CPU, torch.float32) == pytest.approx(2 * sizes[-1] ** 3 / seconds)
    assert made == [(size, size) for size in sizes for _ in range(2)]


def test_with_minutes_the_whole_process_ends_in_time_with_the_settings_it_told_before_it_started(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 20)
    given = "--data text.txt --minutes 0.15 --device cpu --log_interval 1"
    given += " --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 4"
    command = [sys.executable, train.__file__, *given.split()]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert abs(seconds - 9) < 6, "within a tenth of a minute"

    lines = done.stdout.splitlines()
    why = next(i for i, line in enumerate(lines) if " x 0.15 min on" in line)
    told, started = lines[why + 1], next(i for i, line in enumerate(lines) if " M parameters" in line)
    assert why + 1 < started < next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert "--learning_rate" in told and "--dropout" in told, "what was chosen"
    assert "--n_embd" not in told and "--batch_size" not in told, "not what was given"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ("n_layer", "n_head", "n_embd", "n_positions" if config["model_type"] == "gpt2" else "block_size")
    assert [config[name] for name in names] == [1, 2, 16, 8]

    metrics = train.read_metrics(str(tmp_path / "out" / "metrics.jsonl"))
    rates, losses = ([m[name] for m in metrics if name in m] for name in ("lr", "train_loss"))
    after_warm_up = rates[100 if config["model_type"] == "gpt2" else 20 :]  # a GPT, where PyTorch has no Muon
    assert after_warm_up == sorted(after_warm_up, reverse=True) and rates[-1] < 0.02 * max(rates)
    assert losses[-1] < losses[0] - 1 and metrics[-1]["seconds"] <= seconds
    assert "a sample:" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# --init_from: what fine-tuning has for defaults


def fine_tuning(tokens, given=(), **options):
    return plan.for_fine_tuning(make_options(init_from="old", block_size=256, **options), set(given), tokens)


@pytest.mark.parametrize(
    "tokens, steps",
    [(1_000, 50), (273_066, 50), (273_067, 51), (10**6, 184), (10_922_666, 2000), (10**9, 2000)],
)
def test_fine_tuning_reads_the_text_three_times_in_no_fewer_than_50_steps_and_no_more_than_2000(tokens, steps):
    chosen, why = fine_tuning(tokens)
    assert chosen["max_iters"] == steps and chosen["batch_size"] * 256 == 16_384
    assert why == f"fine-tuning old on {tokens:,} tokens, {steps * 16_384 / tokens:.1f} times"
    assert chosen["eval_interval"] == steps // 10


def test_fine_tuning_counts_with_the_batch_and_the_steps_that_are_given():
    assert fine_tuning(10**6, ["batch_size"], batch_size=32)[0]["max_iters"] == 367  # 8,192 tokens a step
    assert fine_tuning(10**6, ["max_iters"], max_iters=70)[0]["eval_interval"] == 7
    assert fine_tuning(10**6, ["gradient_accumulation_steps"], gradient_accumulation_steps=2)[0]["max_iters"] == 92


def test_fine_tuning_has_lower_rates_than_a_new_model_and_keeps_what_only_a_modern_one_has():
    new = train.TrainOptions()
    gpt, modern = fine_tuning(10**6)[0], fine_tuning(10**6, arch="modern")[0]
    assert gpt["learning_rate"] < new.learning_rate and modern["learning_rate"] < plan.MODERN["learning_rate"]
    assert modern["matrix_lr"] < new.matrix_lr and "matrix_lr" not in gpt
    assert set(plan.MODERN) <= set(modern) and modern["beta2"] == plan.MODERN["beta2"]
    assert max(gpt["max_iters"], modern["max_iters"]) < new.max_iters and gpt["weight_decay"] < new.weight_decay
    assert 0 < gpt["dropout"] == modern["dropout"] < new.dropout, "load_model needs it before the model is known"


@pytest.mark.parametrize("muon", [True, False])
def test_a_flag_of_the_other_architecture_is_refused_where_the_architecture_is_chosen(monkeypatch, capsys, muon):
    """With --minutes it is modern where PyTorch has Muon, and else gpt."""
    if not muon:
        monkeypatch.delattr(torch.optim, "Muon", raising=False)
    elif not hasattr(torch.optim, "Muon"):
        monkeypatch.setattr(torch.optim, "Muon", None, raising=False)

    def settings(*given, tokens=10**6, **options):
        options = make_options(minutes=1, **options)
        return plan.choose_settings(options, {"minutes", *given}, tokens, CPU, torch.float32, 1e11)

    for name, value in (("matrix_lr", 0.5), ("bias", True)):
        if muon == (name == "matrix_lr"):
            assert getattr(settings(name, **{name: value}), name) == value
        else:
            with pytest.raises(UserError, match=f"^--{name}.*this model is of --arch {'modern' if muon else 'gpt'}"):
                settings(name, **{name: value})
    assert settings("bias", bias=False).bias is False  # true of both
    assert settings().ngram == (5 if muon else 1) and settings("ngram", ngram=1).ngram == 1
    assert settings().ahead == (4 if muon else 1)
    if muon:
        assert settings("ahead", ahead=2).ahead == 2
    else:
        with pytest.raises(UserError, match=r"^--ngram 3: is for --arch modern"):
            settings("ngram", ngram=3)
        with pytest.raises(UserError, match=r"^--ahead 2: is for --arch modern"):
            settings("ahead", ahead=2)
    for name, value in (("ngram_rows", 100), ("ngram_decay", 0.1)):
        if muon:
            assert getattr(settings(name, **{name: value}), name) == value
        with pytest.raises(UserError, match=f"^--{name} {value}: is for a modern model with --ngram above 1"):
            settings(name, "ngram", ngram=1, **{name: value})
        capsys.readouterr()
        with pytest.raises(UserError, match=r"leave it out, or add --ngram 5$" if muon else "leave it out$"):
            settings(name, tokens=10**4, **{name: value})  # read too often for n-grams
        assert capsys.readouterr().out == ""
    for arch, name in (("gpt", "bias"), ("modern", "matrix_lr")):
        assert settings("arch", name, arch=arch).arch == arch


@pytest.mark.parametrize(
    "layers, channels, vocab_size, ahead", [(2, 64, 63, 3), (3, 128, 65, 4), (3, 128, 300, 2), (12, 768, 50257, 1)]
)
def test_further_tokens_take_at_most_a_tenth_of_the_work_of_the_layers(layers, channels, vocab_size, ahead):
    options = make_options(arch="modern", n_layer=layers, n_embd=channels)
    given = {"arch", "n_layer", "n_embd"}
    chosen = plan.choose_settings(options, given, 10**6, CPU, torch.float32, vocab_size=vocab_size)
    assert chosen.ahead == ahead
    work = 12 * layers * channels**2
    assert (ahead - 1) * vocab_size * channels <= 0.1 * work
    assert ahead == 4 or ahead * vocab_size * channels > 0.1 * work, "another one would take more"


@pytest.mark.parametrize("minutes", [0.1, 1, 30, 3000])
def test_a_model_with_the_channels_or_heads_that_were_given_can_be_made(minutes):
    for name, value in [("n_embd", 256), ("n_embd", 100), ("n_embd", 2), ("n_head", 6), ("n_head", 5), ("n_head", 40)]:
        options = make_options(minutes=minutes, **{name: value})
        chosen = plan.choose_settings(options, {"minutes", name}, 10**6, CPU, torch.float32, 1e11)
        assert getattr(chosen, name) == value
        plan.make_config(chosen, 65)


def test_a_rate_that_would_end_above_its_highest_is_refused():
    with pytest.raises(UserError, match=r"--min_lr 0\.01: is where the learning rate ends, and above"):
        plan.choose_settings(make_options(min_lr=0.01), {"min_lr"}, 10**6, CPU, torch.float32)


def test_what_was_left_out_comes_to_its_default_on_the_device_and_for_the_text(monkeypatch, tmp_path):
    options = make_options(learning_rate=3e-4, dtype=None)
    assert plan.came_to("min_lr", options, CPU) == pytest.approx(3e-5)
    assert plan.came_to("min_lr", dataclasses.replace(options, min_lr=0.0), CPU) == 0
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("utils.has_bfloat16", lambda device, has=has: has)
        assert plan.came_to("dtype", options, CPU) == dtype
    assert plan.came_to("tokenizer", options, CPU) == "chars"
    assert plan.came_to("tokenizer", dataclasses.replace(options, init_from="out"), CPU) is None
    (tmp_path / MANIFEST).touch()
    assert plan.came_to("tokenizer", dataclasses.replace(options, data=str(tmp_path)), CPU) is None  # the text has one


def test_fine_tuning_for_minutes_ends_by_the_clock():
    chosen, why = fine_tuning(10**6, minutes=3)
    assert chosen["max_iters"] == plan.STEPS_WITHOUT_END and chosen["min_lr"] == 0.0
    assert why == "fine-tuning old on 1,000,000 tokens for 3 min"


# ---------------------------------------------------------------------------------------------------------------------
# What fits


@pytest.mark.parametrize(
    "sizes",
    [dict(n_layer=10**9), dict(n_embd=10**9), dict(batch_size=10**9), dict(gradient_accumulation_steps=10**9)],
    ids=str,
)
@pytest.mark.parametrize("arch", ["gpt", "modern"])
def test_sizes_that_no_memory_holds_are_refused_before_the_model_is_made(sizes, arch):
    [(name, size)] = sizes.items()
    words = rf"need at least .* GiB of memory and this machine has .*; lower .*--{name} \({size}\)"
    with pytest.raises(UserError, match=words) as error:
        check_memory(make_options(**sizes), vocab_size=50)
    assert ("--batch_size" in str(error.value)) == (name not in ("n_layer", "n_embd")), "what helps, and only that"
    with pytest.raises(UserError, match="GiB of memory"):
        plan.build_model(make_options(arch=arch, **sizes), vocab_size=50)


def test_what_each_kind_of_run_is_sure_to_take_is_counted(monkeypatch):
    matrices, rows, refused = 12 * 2 * 16**2, 50 + 8, []
    for more in (dict(), dict(arch="modern", ngram=1), dict(shard=True)):
        each = 16 * (matrices + rows * 16) - (4 * matrices if "arch" in more else 0)
        least = (4 * (matrices + rows * 16) if "shard" in more else each) + 4 * 4 * 8 * (50 + 4)
        for memory in (least - 1, least):
            monkeypatch.setattr(plan, "memory_of", lambda device, memory=memory: memory)
            try:
                check_memory(make_options(n_layer=2, n_embd=16, block_size=8, batch_size=4, **more), 50)
            except UserError:
                refused.append((memory - least, more))
    assert [by for by, _ in refused] == [-1, -1, -1], refused


def test_the_sizes_of_the_description_are_not_refused():
    check_memory(train.TrainOptions(), vocab_size=100)
    check_memory(
        train.TrainOptions(n_layer=12, n_head=12, n_embd=768, batch_size=16, gradient_accumulation_steps=4), 100
    )


# ---------------------------------------------------------------------------------------------------------------------
# How long it takes


def make_learner(make_model, dtype=torch.float32, **changes):
    return Learner(make_model(dropout=0.2).train(), make_options(**changes), CPU, dtype)


def windows(rows=4, T=8):
    tokens = torch.randint(11, (rows, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_dropout_that_an_apple_gpu_would_draw_anew_in_the_backward_pass_is_refused():
    for device, on, dropout in (("mps", True, 0.0), ("mps", False, 0.2), ("cpu", True, 0.2), ("cuda", True, 0.2)):
        check_checkpointing(train.TrainOptions(gradient_checkpointing=on, dropout=dropout), torch.device(device))
    with pytest.raises(UserError, match=r"--gradient_checkpointing: on an Apple GPU .* --dropout 0.2; add --dropout 0"):
        check_checkpointing(train.TrainOptions(gradient_checkpointing=True), torch.device("mps"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_timing_a_step_leaves_no_trace(make_model, dtype):
    learner = make_learner(make_model, dtype)
    dice, state = torch.get_rng_state(), copy.deepcopy(learner.state_dict())
    assert 0 < seconds_per_token(learner, *windows()) < 1
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(p.grad is None for p in [*learner.model.parameters(), *learner.worker.parameters()])
    assert all(torch.equal(state["model"][name], p) for name, p in learner.model.state_dict().items())
    assert state["optimizers"] == learner.state_dict()["optimizers"], "no optimizer has taken a step"
    assert learner.model.training and learner.worker.training


def test_processes_agree_on_whether_a_pass_was_slow(make_model, monkeypatch):
    """Each needs the others in a pass: had they clocks of their own, one could wait for another that has gone on."""
    learner, told = make_learner(make_model), iter([0.1, 30.0])  # of the first process
    monkeypatch.setattr(plan, "seconds_of", lambda work: (work(), 5.0)[1])  # of this one, to which all are slow
    processes = SimpleNamespace(agree=lambda seconds: (0, next(told)), average=id, world=1)
    monkeypatch.setattr(learner, "processes", processes)
    assert seconds_per_token(learner, *windows()) == 30.0 / 32 and next(told, None) is None


@pytest.mark.parametrize("seconds, passes", [(0.1, 3), (30.0, 1)])
def test_a_pass_that_is_slow_is_timed_once(make_model, monkeypatch, seconds, passes):
    timed = []
    monkeypatch.setattr(plan, "seconds_of", lambda work: timed.append(work) or seconds)
    learner = make_learner(make_model)
    assert seconds_per_token(learner, *windows()) == seconds / 32 and len(timed) == passes


def test_a_step_is_timed_on_one_part_of_it_for_each_core(make_model, monkeypatch):
    learner, seen = make_learner(make_model), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    loss = learner.loss
    learner.loss = lambda x, y: seen.append(tuple(x.shape)) or loss(x[:1, :8], y[:1, :8])
    learner.options = dataclasses.replace(learner.options, batch_size=500)
    for rows, T in ((4, 8), (500, 8), (9, 1024), (2, 5000)):
        seconds_per_token(learner, *windows(rows, T))
    assert Counter(seen) == {(4, 8): 3, (125, 8): 6, (1, 1024): 6, (1, 5000): 6}  # three times each


@pytest.mark.parametrize(
    "minutes, token_seconds, processes, batches",
    [
        (1, 1e-6, 1, 200),  # all that fit are more than eval_iters
        (0.1, 1e-3, 1, 100),  # 0.3 s for 20,000 tokens at 2,500 a second: they are read all the same
        (10, 1e-3, 1, 375),  # 30 s for 200 tokens at 0.4 ms each
        (10, 1e-3, 2, 750),
    ],
)
def test_an_evaluation_takes_a_twentieth_of_a_run_of_minutes_or_reads_20_000_tokens(
    minutes, token_seconds, processes, batches
):
    options = make_options(minutes=minutes, batch_size=20, block_size=10, eval_iters=200 if batches == 200 else 1000)
    assert evaluation_batches(options, token_seconds, processes) == batches


def test_the_smaller_setting_is_flags_that_train_takes_and_less_work_than_the_default():
    flags, share = smaller_setting(train.TrainOptions())
    smaller, given = parse_options(train.TrainOptions, flags.split(), "")
    assert given >= {"n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters"}
    GPTConfig(n_layer=smaller.n_layer, n_head=smaller.n_head, n_embd=smaller.n_embd, block_size=smaller.block_size)
    assert 0 < share < 0.05


def test_the_share_of_work_of_the_smaller_setting_by_hand():
    small = 2000 * 16 * 128 * 4 * 128**2
    _, share = smaller_setting(train.TrainOptions())
    assert share == pytest.approx(small / (10_000 * 64 * 256 * 6 * 384**2))
    _, share = smaller_setting(train.TrainOptions(gradient_accumulation_steps=5))
    assert share == pytest.approx(small / (10_000 * 5 * 64 * 256 * 6 * 384**2))


# ---------------------------------------------------------------------------------------------------------------------
# Whether compiling pays


@pytest.fixture
def compiled(monkeypatch):
    """The functions that torch.compile was asked for; it returns each with a wrapper around it."""
    models = []

    def compile(model):
        models.append(model)
        return lambda *args: model(*args)

    monkeypatch.setattr(torch, "compile", compile)
    return models


@pytest.mark.parametrize(
    "gpu, forced, seconds, pays",
    [
        (False, False, 60, False),
        (False, False, 10**6, False),  # on a CPU it saves nothing
        (False, True, 1, True),
        (True, False, 199, False),  # on a GPU 20 s to save a tenth
        (True, False, 201, True),
        (True, True, 1, True),
    ],
)
def test_a_model_is_compiled_where_it_is_forced_or_earns_its_time_back(
    make_model, compiled, monkeypatch, capsys, gpu, forced, seconds, pays
):
    learner = make_learner(make_model)
    if gpu:
        learner.device = torch.device("cuda")
        learner.loss = lambda x, y: learner.compute(x, y)[1]  # there is no GPU to compute on
        monkeypatch.setattr(plan, "same_dice", lambda device: contextlib.nullcontext())
    maybe_compile(learner, *windows(), forced, seconds)
    assert len(compiled) == pays
    assert (learner.compute is not learner.worker) == pays
    why = "this run would not earn back the 20 s" if gpu else "on a CPU it makes a step no faster"
    said = f"compile: yes, about {20 if gpu else 40} s" if pays else f"compile: no, {why}"
    out = capsys.readouterr().out
    assert out.startswith(said) and out.count("\n") == 1
    assert pays or "--compile forces it" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiling_leaves_no_trace_and_what_learns_is_still_the_model(make_model, compiled, dtype):
    learner, plain = (make_learner(make_model, dtype) for _ in range(2))
    dice, before = torch.get_rng_state(), copy.deepcopy(learner.model.state_dict())
    maybe_compile(learner, *windows(), True, 1)
    assert len(compiled) == 1 and torch.equal(torch.get_rng_state(), dice)
    assert all(p.grad is None for p in [*learner.model.parameters(), *learner.worker.parameters()])
    assert list(learner.state_dict()["model"]) == list(before)
    losses = []
    for each in (learner, plain):
        torch.manual_seed(0)
        losses.append([each.step(*windows(), 1.0)[0].item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert not torch.equal(before["lm_head.weight"], learner.model.lm_head.weight)


def test_of_a_model_that_works_alone_the_loss_alone_is_compiled(make_model, compiled):
    learner, (x, y) = make_learner(make_model), windows()
    learner.worker.eval()  # no dropout
    logits, loss = learner.compiled()(x, y)
    assert logits is None and torch.equal(loss, learner.worker(x, y)[1])
    learner.averaging = learner.uncompiled = torch.nn.Identity()  # of several processes
    learner.compiled()
    assert compiled[1] is learner.averaging


@pytest.mark.parametrize("when", ["at once", "at the first use"])
def test_without_a_compiler_the_model_runs_uncompiled_and_one_line_says_why(make_model, monkeypatch, capsys, when):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail if when == "at once" else lambda model: fail)
    learner = make_learner(make_model)
    maybe_compile(learner, *windows(), True, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("running uncompiled (RuntimeError: no C++ compiler)")
    assert learner.compute is learner.worker
    assert learner.step(*windows(), 1.0)[0].isfinite()


def test_an_error_without_words_is_told_by_its_name(make_model, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model: (_ for _ in ()).throw(NotImplementedError()))
    maybe_compile(make_learner(make_model), *windows(), True, 1)
    assert "(NotImplementedError: )" in capsys.readouterr().out
