"""The benchmarks' own arithmetic: what they measure, what they refuse, and their tables, with tiny or faked work."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import assert_refused, command  # noqa: F401

import bench
import bench_generate
import bench_peers
import plan
import train
from checkpoint import METRICS
from data import load_data
from generate import Reader
from graphs import GraphReader
from shards import prepare
from utils import UserError, parse_options

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A trained model of 24 channels, which int8 cannot hold, and whose tokens are bytes; its text lies beside it."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "text.txt").write_text("Ob Ähren, Öfen, Übel: ßchön.\n" * 60, encoding="utf-8")
    flags = "--tokenizer bytes --n_layer 1 --n_head 2 --n_embd 24 --block_size 16 --batch_size 4 --max_iters 3"
    flags += " --dropout 0 --eval_interval 3 --dtype float32 --device cpu"
    out = str(folder / "out")
    assert train.main(["--data", str(folder / "text.txt"), "--out_dir", out, *flags.split()]) == 0
    return out


@pytest.mark.parametrize("name", ["generate", "page", "quality", "ideas"])
def test_help_names_the_measurements_and_how_each_is_called(command, name):  # noqa: F811
    whole, own = (command(bench, *args).out for args in (["--help"], [name, "--help"]))
    assert "bench.py generate, page, quality, ideas" in " ".join(whole.split())
    assert own.startswith(f"usage: bench.py {name} [-h]")


def options_of(cls, *flags):
    return parse_options(cls, [*flags], "")[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "args, words",
    [
        ("--case banana", "--case banana: is none"),
        ("--case ours|train|banana", "--case ours|train|banana: is none"),
        ("generate --case ours|sample", "--case ours|sample: is none"),
        ("quality --minutes=", "--minutes '': wants numbers above 0"),
        ("quality --minutes 0.1,1", "--minutes '0.1,1': wants numbers above 0"),
        ("quality --minutes nan", "--minutes 'nan': wants numbers above 0"),
        ("ideas --without banana", "--without banana: is no idea; give one of rotary positions"),
    ],
)
def test_what_cannot_be_measured_is_refused(command, args, words):  # noqa: F811
    assert_refused(command(bench, *args.split()), words)


@pytest.mark.parametrize("which", ["generate", "page"])
def test_a_model_that_has_no_tokenizer_is_refused(command, out_dir, which, tmp_path):  # noqa: F811
    shutil.copytree(out_dir, str(tmp_path / "bare"))
    (tmp_path / "bare" / "tokenizer.json").unlink()
    words = "--out_dir bare: has no tokenizer; put the tokenizer.json of its run beside it"
    assert_refused(command(bench, which, "--out_dir", "bare"), words)


@pytest.mark.parametrize("which", [[], ["generate"], ["page"], ["quality"]])
@pytest.mark.parametrize("path", ["nowhere/figures.json", "."])
def test_a_json_that_cannot_be_written_is_refused_before_any_measuring(command, which, path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bench, "run_case", lambda *_: pytest.fail("measured"))
    assert_refused(command(bench, *which, "--json", path), f"--json {path}: cannot be written (")


def test_the_try_to_write_leaves_what_is_there(tmp_path):
    (tmp_path / "old.json").write_text("old")
    bench_peers.check_json(str(tmp_path / "old.json"))
    bench_peers.check_json(str(tmp_path / "new.json"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.json", "old")]


@pytest.mark.parametrize("peer", ["transformers", "nanogpt"])
def test_peers_are_not_measured_beside_a_modern_model(command, peer, monkeypatch):  # noqa: F811
    sizes = dict(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0)
    model = plan.build_model(train.TrainOptions(arch="modern", **sizes), 11)
    monkeypatch.setattr(bench_generate, "load_writer", lambda path: (model, None))
    monkeypatch.setattr(bench_generate, "peers", lambda options: [peer])
    assert_refused(command(bench, "generate", "--peers"), "--arch gpt")


# ---------------------------------------------------------------------------------------------------------------------
# bench.py generate


@pytest.mark.parametrize("work", bench_generate.WORKS)
def test_every_work_is_measured_on_the_device_asked_for(out_dir, work, monkeypatch):
    monkeypatch.setattr(bench_generate, "NEW_TOKENS", 3)
    options = options_of(
        bench_generate.GenerateOptions, "--out_dir", out_dir, "--device", "cpu", "--case", f"ours, float32|{work}"
    )
    assert bench_generate.measure(options)["figure"] > 0


def test_int8_is_left_out_where_it_cannot_be_and_the_device_is_passed_on(command, out_dir, monkeypatch):  # noqa: F811
    asked = []

    def finished(line, what, **settings):
        asked.append(line)
        return SimpleNamespace(stdout='{"figure": 1.0, "note": "a note"}', stderr="200 tokens in 0.50 s, ...")

    monkeypatch.setattr(bench_generate, "finished", finished)
    monkeypatch.setattr(bench_peers, "finished", finished)
    formats = (1 + bench_generate.has_bfloat16(CPU)) * (1 + bench_generate.has_float16())
    flags = ["--rounds", 1, "--device", "cpu", "--json", "figures.json"]
    result = command(bench, "generate", "--out_dir", out_dir, *flags)
    assert result.status == 0 and "int8 is left out (" in result.out and "multiple of 16" in result.out, result
    assert len(asked) == 4 * formats + 1 and all(line[line.index("--device") + 1] == "cpu" for line in asked)
    assert not [line for line in asked if "ours, int8" in " ".join(line)]
    with open("figures.json") as f:
        assert len(json.load(f)["cases"]) == 4 * formats


def test_a_gpu_has_one_format_of_ours_and_more_samples(make_model, monkeypatch):
    monkeypatch.setattr(bench_generate, "pick_dtype", lambda name, device: torch.float16)
    cuda = torch.device("cuda")
    assert bench_generate.kinds(make_model(), cuda) == ["float16"]
    assert (bench_generate.at_once(cuda), bench_generate.at_once(CPU)) == (64, 32)


def test_a_reader_that_is_used_again_writes_the_same(make_model, monkeypatch):
    """With GraphReader, as on a GPU, and past the end of the window."""
    model, idx, texts = make_model(), torch.tensor([[1, 2], [3, 4]]), []
    for reader in (Reader, GraphReader):
        monkeypatch.setattr(bench_generate, "Reader", lambda model, threads, reader=reader: reader(model))
        write = bench_generate.writing(model, idx, 20)
        for _ in range(2):
            torch.manual_seed(0)
            texts.append(torch.stack(write()).tolist())
    assert len(texts[0]) == 20 and texts[1:] == texts[:1] * 3


def test_the_limit_of_the_memory_counts_the_bytes_that_a_token_reads(make_model):
    model = make_model()
    positions = model.transformer.wpe.weight.numel()
    assert bench_generate.bytes_read(model, torch.bfloat16) == 2 * (model.num_params() - positions)
    assert bench_generate.copy_bandwidth(CPU, size=2**16) > 2**20


def test_nanogpt_writes_with_our_weights(make_model, tmp_path, monkeypatch):
    """A clone in which all is ours but `generate`, which here gives its logits."""
    clone = "import model\nfrom model import GPTConfig\n\nclass GPT(model.GPT):\n"
    clone += "    def generate(self, idx, n, temperature, top_k):\n        return self(idx)[0]\n"
    (tmp_path / "model.py").write_text(clone)
    monkeypatch.setitem(sys.modules, "nanogpt_model", None)
    model, idx = make_model(), torch.tensor([[1, 2, 3]])
    options = SimpleNamespace(nanogpt=str(tmp_path))
    write, note = bench_generate.nanogpt_work("nanogpt", "sample", model, idx, options)
    assert torch.equal(write(), model(idx)[0]) and note() == ""


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


@pytest.mark.parametrize("work", ["train", "generate"])
def test_a_case_is_measured(work, monkeypatch):
    setting = bench.Setting(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=2, vocab_size=11)
    monkeypatch.setattr(bench, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(bench, "NEW_TOKENS", 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # --device cpu wants the CPU's memory all the same
    found = bench.measure(f"ours|{work}|tiny", options_of(bench.BenchOptions, "--device", "cpu", "--seconds", "0.1"))
    assert found["tokens_per_s"] > 0 and found["memory_mb"] > 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_of_speed(command, device, monkeypatch):  # noqa: F811
    speeds = iter(range(100, 200))

    def run_case(case, options):
        system = case.split("|")[0]
        return dict(tokens_per_s=50.0 if system == "nanogpt" else float(next(speeds)), memory_mb=7.0)

    for name, fake in dict(
        run_case=run_case,
        peers=lambda options: ["nanogpt"],
        pick_device=torch.device,
        pick_dtype=lambda name, device: torch.float32,
        matmul_peak=lambda device, dtype: 1e12,
        machine=lambda device: "a machine",
    ).items():
        monkeypatch.setattr(bench, name, fake)
    result = command(bench, "--device", device, "--rounds", 3, "--json", "figures.json")
    assert result.status == 0, result.err
    with open("figures.json") as f:
        rows = json.load(f)["rows"]
    assert (bench.GPT2 in result.out) == (bench.GPT2 in {row["setting"] for row in rows}) == (device == "cuda")
    first = rows[0]  # ours, training: in rounds 1 to 3
    step = len([row for row in rows if row["system"] == "ours"])
    assert [first[k] for k in ("lowest", "tokens_per_s", "highest")] == [100, 100 + step, 100 + 2 * step]
    config = plan.make_config(bench.SETTINGS[first["setting"]], 65)
    assert first["share_of_peak"] == pytest.approx(first["tokens_per_s"] * bench.GPT(config).flops_per_token() / 1e12)
    assert f"{first['tokens_per_s'] / 50:.1f} x" in result.out and "7 MB" in result.out


# ---------------------------------------------------------------------------------------------------------------------
# bench.py quality


@pytest.mark.parametrize("minutes, steps, warned", [(1, 25, False), (0.25, 2, True), (0.01, 1, True)])
def test_a_fixed_setting_gets_the_steps_that_fit(minutes, steps, warned, monkeypatch):
    """20 steps took 50 s as a process, 2 s each."""
    asked = []

    def train_process(options, folder, seed, *flags):
        asked.append(flags[flags.index("--max_iters") + 1])
        metrics = os.path.join(folder, "out", METRICS)
        os.makedirs(os.path.dirname(metrics))
        train.write_lines(metrics, [json.dumps(dict(step=i + 1, seconds=5 + 2 * i)) + "\n" for i in range(20)])
        return dict(seconds=50.0, val_loss=1.5, bits_per_byte=2.0)

    monkeypatch.setattr(bench, "train_process", train_process)
    row = bench.fixed_run(bench.QualityOptions(), [], minutes, 1)
    assert asked == [20, steps] and row["seconds"] == 50 and row["note"].startswith(f"{steps} step")
    assert ("took 50 s, longer than the time" in row["note"]) == warned


def test_bits_per_byte_are_counted_in_the_runs_own_tokens(command, out_dir, monkeypatch):  # noqa: F811
    """A text with letters of two bytes: fewer characters than bytes, which are the tokens here."""
    text = os.path.join(os.path.dirname(out_dir), "text.txt")
    monkeypatch.setattr(bench, "our_run", lambda *_: dict(seconds=3.0, **bench.whole_val_loss(out_dir, text)))
    result = command(bench, "quality", "--data", text, "--minutes", "1", "--target", "9", "--json", "figures.json")
    assert result.status == 0 and "reached in 3.0 s" in result.out, result
    with open("figures.json") as f:
        [row] = json.load(f)["rows"]
    assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / torch.tensor(2.0).log().item())
    assert f"{row['bits_per_byte']:.3f}" in result.out
    assert load_data(text).bits_per_byte(row["val_loss"]) < 0.95 * row["bits_per_byte"]


def test_a_nanogpt_clone_gets_the_tokens_of_a_prepared_text(tmp_path):
    text = str(tmp_path / "text.txt")
    Path(text).write_text("the miller said\n" * 50, encoding="utf-8")
    prepare(text, str(tmp_path / "tokens"), processes=1)
    files = []
    for source in (text, str(tmp_path / "tokens")):
        bench.write_nanogpt_text(str(tmp_path / "ours"), load_data(source))
        files.append({path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()})
        shutil.rmtree(str(tmp_path / "ours"))
    assert files[0] == files[1] and len(files[0]["train.bin"]) == 2 * 720 and len(files[0]["val.bin"]) == 2 * 80
    assert pickle.loads(files[0]["meta.pkl"]) == {"vocab_size": 12}
    with pytest.raises(UserError, match=r"--nanogpt: .* 65,536"):
        bench.write_nanogpt_text(str(tmp_path / "many"), SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=65537)))


def test_cases_take_turns_and_each_figure_is_told_as_it_comes(capsys):
    found = bench_peers.in_turns(["a|x", "b|x"], 2, lambda case: dict(figure=1234.56, note=case))
    assert found == {case: [dict(figure=1234.56, note=case)] * 2 for case in ("a|x", "b|x")}
    told = capsys.readouterr()
    rounds = [f"round {n} of 2: {case}\n  1,234.6\n" for n in (1, 2) for case in ("a|x", "b|x")]
    assert told.err == "".join(rounds) and told.out == ""
