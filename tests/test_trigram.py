"""Chapter 2: counting and mixing are right, the weights are fitted as they should be, and the command behaves."""

import math
import os
import sys
from collections import Counter

import pytest
import torch

import trigram
from bigram import Bigram, mean_surprise
from data import load_data
from tokenizer import CharTokenizer
from trigram import Trigram, bucket, count_triples, count_voices, fit_weights, triples
from utils import UserError, run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = "the miller kept the words, and the mayor kept the bet.\nthe thin thing then threw them there.\n" * 3


def tokens_of(text):
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer.encode(text), tokenizer.vocab_size


@pytest.fixture(scope="module")
def merrow():
    return load_data(os.path.join(ROOT, "input.txt"))


def test_counts_are_those_of_a_plain_count():
    tokens, V = tokens_of(TEXT)
    ids = tokens.tolist()
    counts = count_triples(tokens.to(torch.uint8), V)
    found = {tuple(cell): int(counts[tuple(cell)]) for cell in counts.nonzero().tolist()}
    assert found == Counter(zip(ids, ids[1:], ids[2:]))


def test_voices():
    tokens, V = tokens_of(TEXT)
    ids = tokens.tolist()
    voices, seen = count_voices(tokens, V + 1)  # one token that the text does not have
    for voice in voices:
        assert torch.allclose(voice.sum(dim=-1), torch.ones(voice.shape[:-1]))
    a, b, c = ids[:3]
    pairs, threes = Counter(zip(ids[:-1], ids[1:-1])), Counter(zip(ids, ids[1:], ids[2:]))
    assert int(seen[a, b]) == pairs[a, b]
    assert float(voices[0][c]) == pytest.approx((ids.count(c) + 1) / (len(ids) + V + 1))
    assert torch.equal(voices[1], Bigram.from_tokens(tokens, V + 1).probs)
    assert float(voices[2][a, b, c]) == pytest.approx(threes[a, b, c] / pairs[a, b])
    assert torch.allclose(voices[2][V, 0], torch.tensor(1 / (V + 1)))  # after a pair never seen, all equal


def test_the_mix_is_the_formula():
    tokens, V = tokens_of(TEXT)
    model = Trigram.from_tokens(tokens, V)
    voices, seen = count_voices(tokens, V)
    for a, b, c in ((0, 0, 0), tokens[:3].tolist(), tokens[40:43].tolist()):
        w = model.weights[int(bucket(seen[a, b]))]
        expected = w[0] * voices[0][c] + w[1] * voices[1][b, c] + w[2] * voices[2][a, b, c]
        assert float(model.probs[a, b, c]) == pytest.approx(float(expected), rel=1e-5)


def test_buckets():
    seen = torch.tensor([0, 1, 2, 3, 4, 7, 8, 2**17, 2**40])
    assert bucket(seen).tolist() == [0, 1, 2, 2, 3, 3, 4, 18, trigram.BUCKETS - 1]


def test_next_probs():
    tokens, V = tokens_of(TEXT)
    model = Trigram.from_tokens(tokens, V + 1)
    context = torch.randint(V + 1, (7, 5), generator=torch.Generator().manual_seed(0))
    for probs in (model.next_probs(context), model.next_probs(context[:, :1]), model.probs.flatten(0, 1)):
        assert probs.shape[1] == V + 1 and probs.dtype == torch.float32 and (probs > 0).all()
        assert torch.allclose(probs.sum(dim=1), torch.ones(len(probs)), atol=1e-5)
    assert model.next_probs(context).shape == (7, V + 1)
    assert torch.equal(model.next_probs(context), model.next_probs(context[:, -2:]))
    assert torch.equal(model.next_probs(context[:, :1]), Bigram.from_tokens(tokens, V + 1).next_probs(context[:, :1]))
    the, they = tokens_of(TEXT)[0][:3], torch.stack([tokens[1], tokens[0], tokens[2]])  # "the", "hte"
    assert not torch.allclose(model.next_probs(the[None]), model.next_probs(they[None]))


def test_val_loss_is_a_loop_over_next_probs():
    tokens, V = tokens_of(TEXT)
    model = Trigram.from_tokens(tokens[:150], V)
    losses = [-math.log(model.next_probs(tokens[None, :t])[0, tokens[t]]) for t in range(1, len(tokens))]
    assert model.val_loss(tokens) == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert model.val_loss(tokens[:2]) == pytest.approx(losses[0], abs=1e-6)


def test_each_iteration_makes_the_held_out_text_more_probable(merrow, monkeypatch):
    V, cut = merrow.tokenizer.vocab_size, 900_000
    voices, seen = count_voices(merrow.train[:cut], V)
    a, b, c = triples(merrow.train[cut:])
    said = torch.stack([voices[0][c], voices[1][b, c], voices[2][a, b, c]], dim=1)
    weights, history = fit_weights(said, bucket(seen[a, b]))
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64)) and (weights > 0).all()
    assert all(later >= earlier - 1e-6 for earlier, later in zip(history, history[1:]))
    assert history[-1] > history[0] + 1000

    monkeypatch.setattr(trigram, "ITERATIONS", 40)  # one bucket, where the best weights can be found by trying all
    said = said[(seen[a, b] > 0) & (seen[a, b] < 100)]
    weights, history = fit_weights(said, torch.zeros(len(said), dtype=torch.long))
    grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(1, 19) for j in range(1, 20 - i)]
    best = max(float((said.double() @ torch.tensor(w, dtype=torch.float64)).log().sum()) for w in grid)
    assert float((said.double() @ weights[0]).log().sum()) > best


def test_weights_recover_the_shares_of_a_mixture():
    generator = torch.Generator().manual_seed(0)
    voices = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    shares = torch.tensor([0.2, 0.5, 0.3])
    drawn = torch.multinomial(shares @ voices, 50_000, replacement=True, generator=generator)
    weights, _ = fit_weights(voices[:, drawn].T.double(), torch.full((50_000,), 4))
    assert torch.allclose(weights[4].float(), shares, atol=0.02)
    assert torch.allclose(weights[3], torch.full((3,), 1 / 3, dtype=torch.float64))  # no tokens: as they began


def test_the_weights_never_see_the_val_split(merrow):
    text = merrow.train[:20_000]
    model = Trigram.from_tokens(text, merrow.tokenizer.vocab_size)
    voices, seen = count_voices(text[:18_000], merrow.tokenizer.vocab_size)
    a, b, c = triples(text[17_998:])
    assert len(c) == 2000
    said = torch.stack([voices[0][c], voices[1][b, c], voices[2][a, b, c]], dim=1)
    buckets = bucket(seen[a, b])
    fitted = buckets.unique()
    assert torch.equal(model.weights[fitted], fit_weights(said, buckets)[0][fitted])


def test_pairs_seen_more_often_than_any_held_out_one_have_the_weights_of_those_seen_less_often():
    """Counted over all of the text, a pair can cross a power of two, beyond which no weights were fitted."""
    text = torch.tensor([0, 1, 0, 2] * 300)  # ab is seen some 270 times in nine tenths of it, and 300 in all
    model = Trigram.from_tokens(text, 3)
    assert bucket(model.seen).max() == 9 and not torch.allclose(model.weights[9], torch.full((3,), 1 / 3).double())
    text = torch.tensor([0, 1, 0, 2] * 130)  # 117 and 130
    model = Trigram.from_tokens(text, 3)
    assert bucket(model.seen).max() == 8 and torch.equal(model.weights[8], model.weights[7])


def test_the_ladder(merrow):
    V = merrow.tokenizer.vocab_size
    model = Trigram.from_tokens(merrow.train, V)
    bigram = Bigram.from_tokens(merrow.train, V).val_loss(merrow.val)
    unigram = mean_surprise(model.unigram[merrow.val[1:].long()])
    assert model.val_loss(merrow.val) < bigram - 0.3 < unigram - 0.6


@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 10])
def test_texts_too_short_to_hold_anything_out(length):
    model = Trigram.from_tokens(torch.arange(length) % 3, 3)
    assert torch.allclose(model.probs.sum(dim=2), torch.ones(3, 3)) and (model.probs > 0).all()


def test_too_many_characters():
    with pytest.raises(UserError, match="301 different characters"):
        Trigram.from_tokens(torch.arange(301), 301)


def test_too_many_characters_are_refused_before_anything_is_counted(tmp_path, capsys):
    path = tmp_path / "many.txt"
    path.write_text("".join(map(chr, range(300, 601))) * 20, encoding="utf-8")
    with pytest.raises(UserError, match=r"^--data .*many.txt: has 301 different characters, too many for a table of"):
        trigram.main(["--data", str(path)])
    assert capsys.readouterr().out == ""


def test_command(tmp_path, merrow, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert trigram.main(["--out", str(tmp_path / "weights.png"), "--max_new_tokens", "50"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    V = merrow.tokenizer.vocab_size
    loss = Trigram.from_tokens(merrow.train, V).val_loss(merrow.val)
    bigram = Bigram.from_tokens(merrow.train, V).val_loss(merrow.val)
    assert f"val loss {loss:.4f} nats per token ({merrow.bits_per_byte(loss):.3f} bits per byte)" in out
    assert f"bigram:  val loss {bigram:.4f}" in out
    assert len(out.split("a sample:\n")[1].split("\npicture:")[0]) == 50 + 1
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["a" * 11, "ab\n" * 20])
def test_odd_texts(tmp_path, capsys, text):
    (tmp_path / "text.txt").write_text(text)
    flags = ["--data", tmp_path / "text.txt", "--out", tmp_path / "p.png", "--max_new_tokens", 5]
    assert trigram.main([str(flag) for flag in flags]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (None, [], "cannot be read"),
        ("", [], "is empty"),
        (TEXT, ["--steps", "3"], "unknown flag --steps"),
        (TEXT, ["--out", "no/such/directory/p.png"], "--out"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 301))), [], "301 different characters"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, content, flags, words):
    if content is not None:
        (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "p.png"), *flags]
    monkeypatch.setattr(sys, "argv", ["trigram.py", *flags])  # in this process: starting another takes a second
    with pytest.raises(SystemExit) as stopped:
        run_command(trigram.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("trigram.py: error: ") and error.count("\n") == 1
    assert words in error
