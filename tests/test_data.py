"""data.py: every character comes back, no validation token is ever trained on, and every token is measured once."""

import itertools
import math
import os
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data as data_module
from corpus import pieces
from data import Batches, LargePermutation, ValidationBatches, load_data, load_text, validation_loss
from tokenizer import train_bpe
from utils import UserError

TEXT = 'The "miller" said:\n\n  "Dry."\tÄpfel & Öl, naïve café — 3 € … 東京 🙂\r\n'


def write(path, content):
    """Write text or bytes as they are, without touching line ends; returns the path as a string."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading text


def test_text_is_read_exactly(tmp_path):
    assert load_text(write(tmp_path / "a.txt", TEXT)) == TEXT


def test_windows_line_ends_are_kept(tmp_path):
    assert load_text(write(tmp_path / "a.txt", "a\r\nb\rc\n")) == "a\r\nb\rc\n"


def test_windows_line_ends_are_told(tmp_path, capsys):
    load_data(write(tmp_path / "a.txt", "a\r\nb\rc\n" * 10))
    assert "a.txt: has Windows' line ends, of two characters, which stay so" in capsys.readouterr().out
    load_data(write(tmp_path / "a.txt", "a\nb\rc\n" * 10))
    assert capsys.readouterr().out == ""


def test_a_byte_order_mark_is_removed(tmp_path):
    assert load_text(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == "hello"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"PK\x03\x04\0\0", r"is a binary file \(a zero byte at offset 4\)"),
        ("hello".encode("utf-16"), "is UTF-16, which some editors call Unicode; save it as UTF-8"),
        ("naïve".encode("latin-1"), r"is not UTF-8 \(byte 2\)"),
        ("naïve".encode()[:3], r"is not UTF-8 \(byte 2\)"),
    ],
    ids=["empty", "only a mark", "binary", "UTF-16", "Latin-1", "cut within a character"],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, words):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=words) as refused:
        load_text(path)
    assert path in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.txt: cannot be read \(No such file"):
        load_text(str(tmp_path / "nowhere.txt"))


def test_a_directory_without_a_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no text; give a file"):
        load_text(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The two splits


@pytest.fixture(scope="module")
def byte_pairs():
    return train_bpe([TEXT * 20], 300)


@pytest.mark.parametrize("n", [11, 19, 20, 21, 99, 100, 1000, 12345])
def test_the_val_split_is_the_last_tenth_of_the_characters(tmp_path, n):
    text = (TEXT * n)[:n]
    data = load_data(write(tmp_path / "a.txt", text))
    cut = n * 9 // 10
    assert data.tokenizer.decode(data.train.tolist()) == text[:cut]
    assert data.tokenizer.decode(data.val.tolist()) == text[cut:]


def test_byte_pairs_are_split_at_the_same_character(byte_pairs, tmp_path):
    data = load_data(write(tmp_path / "a.txt", TEXT * 10), byte_pairs)
    assert data.tokenizer.decode(data.val) == (TEXT * 10)[len(TEXT) * 9 :]


def test_the_vocabulary_covers_characters_that_only_the_val_split_has(tmp_path):
    data = load_data(write(tmp_path / "a.txt", "a" * 90 + "b" * 10))
    assert data.tokenizer.chars == ["a", "b"]


@pytest.mark.parametrize("vocab_size", [2, 255, 256, 257, 32768, 32769])
def test_tokens_are_kept_small_without_loss(tmp_path, vocab_size):
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab_size))) * (20 if vocab_size < 20 else 2)
    data = load_data(write(tmp_path / "a.txt", text))
    assert data.tokenizer.decode(torch.cat([data.train, data.val]).tolist()) == text


@pytest.mark.parametrize("text", ["a", "ab", "a" * 10])
def test_a_text_too_short_to_split_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=rf"has only {len(text)} character"):
        load_data(write(tmp_path / "a.txt", text))


def test_a_text_too_short_in_byte_pairs_is_refused_with_its_tokens(tmp_path):
    pairs = train_bpe(["abcd" * 100], 259)
    with pytest.raises(UserError, match=r"40 character\(s\), which make 9 token\(s\) to train on and 1 to validate"):
        load_data(write(tmp_path / "a.txt", "abcd" * 10), pairs)


def test_a_text_larger_than_memory_is_refused_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT * 10)
    monkeypatch.setattr(data_module, "memory_of", lambda device: 7 * len((TEXT * 10).encode()) - 1)
    with pytest.raises(UserError, match=f"prepare it first: python data.py prepare {path} tokens"):
        load_data(path)
    monkeypatch.setattr(data_module, "memory_of", lambda device: 7 * len((TEXT * 10).encode()))
    load_data(path)


def test_loading_takes_little_more_than_the_text(tmp_path):
    """One emoji in it does not make each of its characters take four bytes. (What PyTorch has is not counted.)"""
    path = write(tmp_path / "a.txt", "The miller said that it was dry.\n" * 250_000 + "🙂")
    tracemalloc.start()
    try:
        load_data(path, "bytes")
        most = tracemalloc.get_traced_memory()[1] / os.path.getsize(path)
    finally:
        tracemalloc.stop()
    assert most < 4


@pytest.mark.parametrize("tokenizer", ["chars", "bytes", "bpe:300"])
def test_a_text_of_several_pieces_is_one(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT * 50)
    whole = load_data(path, tokenizer)
    monkeypatch.setattr(data_module, "pieces", lambda parts: pieces(parts, 100))
    parts = load_data(path, tokenizer)
    assert torch.equal(whole.train, parts.train) and torch.equal(whole.val, parts.val)


def test_the_fingerprint_tells_texts_apart(tmp_path):
    texts = [TEXT, TEXT, TEXT[:-1] + "!"]
    prints = [load_data(write(tmp_path / f"{i}.txt", text)).fingerprint for i, text in enumerate(texts)]
    assert prints[0] == prints[1] != prints[2]


def test_bits_per_byte_by_hand(tmp_path):
    """20 characters, the last 2 of them 'é' (2 bytes) and '東' (3): 2 tokens of 1 bit each over 5 bytes."""
    data = load_data(write(tmp_path / "a.txt", "a" * 18 + "é東"))
    assert data.val_bytes == 5
    assert data.bits_per_byte(math.log(2)) == pytest.approx(2 / 5)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(byte_pairs, tmp_path):
    """The same val text at the same total cost in nats, whatever the number of tokens it is divided by."""
    path = write(tmp_path / "a.txt", TEXT * 10)
    by_characters, by_pairs = load_data(path), load_data(path, byte_pairs)
    assert len(by_characters.val) != len(by_pairs.val)
    bits = [data.bits_per_byte(100 / len(data.val)) for data in (by_characters, by_pairs)]
    assert bits[0] == pytest.approx(bits[1]) == pytest.approx(100 / math.log(2) / len(TEXT.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def starts(batches, steps):
    """Where the windows of these steps begin, in a text whose tokens are their own positions."""
    return [int(row[0]) for step in steps for row in batches.batch(step)[0]]


@given(n=st.integers(2, 60), block_size=st.integers(1, 20), batch_size=st.integers(1, 9), step=st.integers(0, 50))
def test_every_window_lies_in_the_text_and_y_is_x_shifted(n, block_size, batch_size, step):
    if n <= block_size:
        return
    x, y = Batches(torch.arange(n), batch_size, block_size, seed=1).batch(step)
    assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(block_size)) and torch.equal(y, x + 1)
    assert x.min() >= 0 and y.max() < n


@given(n=st.integers(2, 60), block_size=st.integers(1, 20), seed=st.integers(0, 5))
def test_an_epoch_deals_every_window_once_and_none_overlap(n, block_size, seed):
    if n <= block_size:
        return
    batches = Batches(torch.arange(n), 1, block_size, seed)
    for epoch in range(3):
        first = epoch * batches.windows_per_epoch
        dealt = sorted(starts(batches, range(first, first + batches.windows_per_epoch)))
        assert all(b - a == block_size for a, b in zip(dealt, dealt[1:]))
    assert batches.windows_per_epoch >= max(1, n // block_size - 2), "little of the text is left out"


@given(n=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_large_permutation_deals_every_number_once(n, seed):
    order = LargePermutation(n, torch.Generator().manual_seed(seed))
    assert sorted(order[0:n].tolist()) == list(range(n))


def test_a_large_permutation_asked_in_parts_is_the_same():
    whole, parts = (LargePermutation(1000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(whole[0:1000], torch.cat([parts[i : i + 7] for i in range(0, 1000, 7)]))


def test_a_large_permutation_is_mixed_well():
    """Of 10^12 windows: a batch is spread over all of them, and neighbours lie as far apart as dice would have it."""
    n = 10**12
    order = LargePermutation(n, torch.Generator().manual_seed(1))[5 : 5 + 10_000].double() / n
    assert len(order.unique()) == 10_000
    shares = torch.histc(order, 10, 0, 1) / 10_000
    assert shares.sub(0.1).abs().max() < 0.015, "three times the spread of dice"
    assert order.diff().abs().mean() == pytest.approx(1 / 3, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([order[:-1], order[1:]]))[0, 1]) < 0.03


@settings(max_examples=15)
@given(n=st.integers(30, 120), block_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_of_a_large_text_deals_every_window_once_too(n, block_size, seed):
    kept, data_module.MOST_SHUFFLED = data_module.MOST_SHUFFLED, 1
    try:
        test_an_epoch_deals_every_window_once_and_none_overlap.hypothesis.inner_test(n, block_size, seed)
    finally:
        data_module.MOST_SHUFFLED = kept


def test_the_order_of_a_small_text_is_that_of_a_shuffle_in_memory():
    """So that a seed trains on what it always has."""
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    n = (1000 - 1) // 8 - 1
    offset = torch.randint(1000 - 1 - n * 8 + 1, (1,), generator=generator)
    expected = offset + torch.randperm(n, generator=generator) * 8
    assert starts(Batches(torch.arange(1000), 1, 8, seed=3), range(2 * n, 3 * n)) == expected.tolist()


@pytest.mark.parametrize("n", [9, 10, 16, 17, 18, 24, 25, 32, 40, 100])
def test_over_the_epochs_every_token_is_trained_on(n):
    batches = Batches(torch.arange(n), 1, 8, seed=0)
    seen = {int(t) for step in range(200 * batches.windows_per_epoch) for t in batches.batch(step)[1].flatten()}
    assert seen == set(range(1, n))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """Asked in any order, by another object: a resumed run sees what it would have seen."""
    one, other = (Batches(torch.arange(100), 4, 7, seed=3) for _ in range(2))
    forwards = [one.batch(step) for step in range(20)]
    backwards = [other.batch(step) for step in reversed(range(20))]
    assert all(torch.equal(x, x2) for (x, _), (x2, _) in zip(forwards, reversed(backwards)))


def test_drawing_batches_leaves_the_global_dice_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Batches(torch.arange(100), 4, 7, seed=3).batch(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_epochs_and_other_seeds_deal_in_another_order():
    first, other_seed = (Batches(torch.arange(200), 1, 4, seed) for seed in (1, 2))
    n = first.windows_per_epoch
    orders = [starts(first, range(n)), starts(first, range(n, 2 * n)), starts(other_seed, range(n))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_any_seed_that_the_command_line_takes_will_do(seed):
    assert Batches(torch.arange(100), 4, 7, seed).batch(5)[0].shape == (4, 7)


def test_a_batch_larger_than_an_epoch_spans_several():
    one_by_one, large = Batches(torch.arange(30), 1, 8, seed=0), Batches(torch.arange(30), 11, 8, seed=0)
    assert large.windows_per_epoch < 11
    assert starts(large, [0, 1]) == starts(one_by_one, range(22))


@pytest.mark.parametrize("n, block_size", [(2, 1), (9, 8), (10, 8), (17, 8)])
def test_a_text_as_short_as_can_be_is_enough(n, block_size):
    x, y = Batches(torch.arange(n), 5, block_size, seed=0).batch(0)
    assert x.shape == (5, block_size) and int(y.max()) < n


def test_a_training_text_no_longer_than_block_size_is_refused(tmp_path):
    data = load_data(write(tmp_path / "a.txt", "a" * 20))  # 18 to train on
    data.batches(1, 17, seed=0)
    with pytest.raises(UserError, match="--block_size 18: the training text has only 18 tokens"):
        data.batches(1, 18, seed=0)


def test_val_tokens_are_never_trained_on(tmp_path):
    """The val split has characters of its own, so one of them in a batch would show."""
    data = load_data(write(tmp_path / "a.txt", "abc" * 30 + "X" * 10))
    batches = data.batches(4, 8, seed=0)
    forbidden = int(data.tokenizer.encode("X"))
    assert not any((t == forbidden).any() for step in range(50) for t in batches.batch(step))


def test_slices_of_a_large_batch_are_the_small_batches():
    """So 4 accumulated batches of 16 are the same training as one of 64."""
    large, small = Batches(torch.arange(999), 64, 7, seed=0), Batches(torch.arange(999), 16, 7, seed=0)
    for step in range(5):
        slices = [small.batch(4 * step + i) for i in range(4)]
        for whole, parts in zip(large.batch(step), zip(*slices)):
            assert torch.equal(whole, torch.cat(parts))


def test_gradients_accumulated_over_slices_equal_those_of_the_large_batch(make_model):
    x, y = Batches(torch.arange(999) % 11, 64, 8, seed=0).batch(0)
    whole, accumulated = make_model(), make_model()
    whole(x, y)[1].backward()
    for x_part, y_part in zip(x.split(16), y.split(16)):
        (accumulated(x_part, y_part)[1] / 4).backward()
    for p, q in zip(whole.parameters(), accumulated.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The validation loss


@given(n=st.integers(2, 60), block_size=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_every_token_but_the_first_is_a_target_exactly_once(n, block_size, batch_size):
    targets = []
    batches = ValidationBatches(torch.arange(n), block_size, batch_size)
    for x, y in (batches[i] for i in range(len(batches))):
        assert torch.equal(y, x + 1) and x.size(1) <= block_size and 1 <= len(x) <= batch_size
        targets += y.flatten().tolist()
    assert targets == list(range(1, n))


@pytest.mark.parametrize("n", [2, 8, 9, 10, 33, 60])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_loss_equals_a_plain_loop(make_model, n, batch_size):
    model = make_model(block_size=8)
    tokens = torch.randint(11, (n,), generator=torch.Generator().manual_seed(0))
    losses = []
    for i in range(1, n):  # token i, predicted from the tokens of its window before it
        logits, _ = model(tokens[(i - 1) // 8 * 8 : i][None])
        losses.append(-float(logits[0, -1].detach().log_softmax(dim=-1)[tokens[i]]))
    assert validation_loss(model, tokens, batch_size) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


class Recorder(torch.nn.Module):
    """A model that notes what it was shown; its loss is the mean of its targets."""

    def __init__(self, block_size):
        super().__init__()
        self.config, self.seen = SimpleNamespace(block_size=block_size), []

    def forward(self, x, y):
        self.seen.append((x, self.training, torch.is_grad_enabled()))
        return None, y.float().mean()


def test_validation_loss_weighs_every_token_alike():
    """11 targets in windows of 4: batches of 8 tokens and of the 3 that are left."""
    assert validation_loss(Recorder(4), torch.arange(12), batch_size=2) == pytest.approx(sum(range(1, 12)) / 11)


@pytest.mark.parametrize("max_batches, shown", [(None, 10), (0, 10), (99, 10), (10, 10), (4, 4), (1, 1)])
def test_max_batches_limits_what_is_read(max_batches, shown):
    model = Recorder(4)
    validation_loss(model, torch.arange(4 * 2 * 10 + 1), batch_size=2, max_batches=max_batches)
    assert len(model.seen) == shown


def test_the_batches_of_a_limited_validation_are_spread_over_the_text():
    model = Recorder(1)
    validation_loss(model, torch.arange(101), batch_size=1, max_batches=4)
    assert [int(x) for x, _, _ in model.seen] == [0, 25, 50, 75]


@pytest.mark.parametrize("training", [True, False])
def test_validation_runs_in_eval_mode_without_gradients_and_restores_the_mode(training):
    model = Recorder(4).train(training)
    validation_loss(model, torch.arange(12), batch_size=2)
    assert not any(was_training or gradients for _, was_training, gradients in model.seen)
    assert model.training is training and torch.is_grad_enabled()
