"""Chapter 1: counting is right, learning arrives at the same table, and the command behaves."""

import math
import os
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import bigram
import plots
from bigram import ADD, Bigram, count_pairs, learn, write
from data import load_data
from tokenizer import CharTokenizer
from utils import run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = "the miller kept the words, and the mayor kept the bet.\n" * 3


def tokens_of(text):
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer.encode(text), tokenizer.vocab_size


def test_counts_are_those_of_a_plain_count():
    tokens, V = tokens_of(TEXT)
    expected = Counter(zip(tokens.tolist(), tokens.tolist()[1:]))
    counts = count_pairs(tokens.to(torch.uint8), V)  # the type in which load_data keeps them
    assert {(a, b): int(counts[a, b]) for a in range(V) for b in range(V) if counts[a, b]} == expected
    probs = Bigram.from_tokens(tokens, V).probs
    a, b = tokens[0], tokens[1]
    row = sum(n for (first, _), n in expected.items() if first == a)
    assert float(probs[a, b]) == pytest.approx((expected[int(a), int(b)] + ADD) / (row + ADD * V))


def test_next_probs():
    tokens, V = tokens_of(TEXT)
    model = Bigram.from_tokens(tokens, V + 1)  # one token that the text does not have
    context = torch.randint(V + 1, (7, 5), generator=torch.Generator().manual_seed(0))
    probs = model.next_probs(context)
    assert probs.shape == (7, V + 1) and probs.dtype == torch.float32 and (probs > 0).all()
    assert torch.allclose(probs.sum(dim=1), torch.ones(7))
    assert torch.equal(probs, model.next_probs(context[:, -1:]))
    assert not torch.equal(model.next_probs(tokens[None, :1]), model.next_probs(tokens[None, :2]))
    assert torch.allclose(model.next_probs(torch.tensor([[V]])), torch.full((1, V + 1), 1 / (V + 1)))


def test_val_loss_is_a_loop_over_next_probs():
    tokens, V = tokens_of(TEXT)
    model = Bigram.from_tokens(tokens[:60], V)
    losses = [-math.log(model.next_probs(tokens[None, :t])[0, tokens[t]]) for t in range(1, len(tokens))]
    assert model.val_loss(tokens) == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_gradient_is_that_of_the_cross_entropy_over_all_pairs():
    tokens, V = tokens_of(TEXT)
    x, y = tokens[:-1], tokens[1:]
    logits = torch.randn(V, V, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits[x], y).backward()
    counts = count_pairs(tokens, V).double()
    n = counts.sum(dim=1, keepdim=True)
    expected = n / n.sum() * (F.softmax(logits, dim=1) - counts / n.clamp(min=1))  # as learn's docstring has it
    assert torch.allclose(logits.grad, expected)


@pytest.mark.parametrize("text", [TEXT, "ab" * 9, "aaaaaaa", "abcdefghij" + "j" * 500])
def test_learning_arrives_where_counting_does(text):
    tokens, V = tokens_of(text)
    counts = count_pairs(tokens, V + 1) + ADD  # the last row is all equal: nothing is known of it
    learned = learn(counts, 1000)
    assert (learned - Bigram(counts).probs).abs().max() < 1e-4
    assert torch.allclose(learn(counts, 0), torch.full((V + 1, V + 1), 1 / (V + 1), dtype=torch.float64))


def test_writing_follows_the_probabilities():
    model = Bigram(torch.tensor([[1e-9, 1, 1e-9], [1e-9, 1e-9, 1], [1, 1e-9, 1e-9]]))  # 0 -> 1 -> 2 -> 0
    ids = list(write(model, torch.tensor([[0]]), 7, torch.Generator().manual_seed(0)))
    assert ids == [1, 2, 0, 1, 2, 0, 1]


def test_labels():
    assert [plots.visible(c) for c in "a\n \t\xa0\U0010ffff$"] == ["a", "↵", "␣", "⇥", "a0", "10ffff", "$"]


def test_picture_shows_the_table(tmp_path):
    probs = Bigram.from_tokens(*tokens_of(TEXT)).probs
    figure = plots.bigram_table(probs, sorted(set(TEXT)))
    (image,) = figure.axes[0].images
    assert torch.equal(torch.as_tensor(image.get_array().data), probs)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][:3] == ["↵", "␣", ","]
    figure.savefig(tmp_path / "table.png")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert bigram.main(["--out", str(tmp_path / "table.png")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    data = load_data(os.path.join(ROOT, "input.txt"))
    loss = Bigram.from_tokens(data.train, data.tokenizer.vocab_size).val_loss(data.val)
    assert f"val loss {loss:.4f} nats per token ({data.bits_per_byte(loss):.3f} bits per byte)" in out
    difference = float(out.split("largest difference between their probabilities: ")[1].split()[0])
    assert difference < 1e-4
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_seed_and_length_decide_the_sample(tmp_path, capsys):
    text, outputs = tmp_path / "text.txt", []
    text.write_text(TEXT)
    for seed in ("1", "1", "2"):
        flags = ["--data", str(text), "--out", str(tmp_path / "p.svg"), "--steps", "1", "--max_new_tokens", "40"]
        assert bigram.main([*flags, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0].split("a sample:\n")[1].split("\npicture:")[0]) == 40 + 1
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (None, [], "cannot be read"),
        ("", [], "is empty"),
        ("short", [], "give a longer text, of which each has at least 2"),
        (TEXT, ["--step", "3"], "did you mean --steps"),
        (TEXT, ["--steps", "-1"], "at least 0"),
        (TEXT, ["--out", "no/such/directory/p.png"], "--out"),
        (TEXT, ["--out", "picture.docx"], "--out"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 1001))), [], "1001 different characters"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, content, flags, words):
    if content is not None:
        (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "p.png"), "--steps", "1", *flags]
    monkeypatch.setattr(sys, "argv", ["bigram.py", *flags])  # in this process: starting another takes a second
    with pytest.raises(SystemExit) as stopped:
        run_command(bigram.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("bigram.py: error: ") and error.count("\n") == 1
    assert words in error
