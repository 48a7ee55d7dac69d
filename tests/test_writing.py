"""Writing fast and in company: guesses, prompts of different lengths, lighter weights, and the flags that use them."""

import collections
import errno
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import OnMeta
from test_cli import assert_refused, command  # noqa: F401
from test_generate import Table, tokens
from torch.fx.experimental.proxy_tensor import make_fx

import bench
import graphs
import lighten as lighten_module
import plan
import sample
import train
import utils
from checkpoint import save_model
from data import load_data, validation_loss
from draft import ORDERS, Draft, hash_of, most_frequent
from generate import (
    Hypothesis,
    KVCache,
    Reader,
    Sampling,
    Speculation,
    beam_search,
    best_threads,
    generate,
    guess_cost,
    next_token_probs,
    penalize_repetition,
    speculate,
    use_threads,
)
from graphs import GraphReader, StaticCache, undrawn
from lighten import call_directly, has_float16, join_qkv, lighten, usual_format
from tokenizer import CharTokenizer, train_bpe
from utils import UserError

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a modern model needs PyTorch 2.9's Muon")
needs_int8 = pytest.mark.skipif(not hasattr(torch, "_weight_int8pack_mm"), reason="int8 needs PyTorch 2.3")
ARCHS = ["gpt", pytest.param("modern", marks=needs_muon)]
needs_float16 = pytest.mark.skipif(not has_float16(), reason="float16 weights need an x86 CPU with AVX2")
KINDS = ["bfloat16", *(pytest.param(how, marks=needs_float16) for how in ("float16", "16 bits"))]
KINDS += [pytest.param("int8", marks=needs_int8)]


@pytest.fixture
def make(make_model):
    """make(arch, **sizes): a tiny model of either architecture whose every weight is random."""

    def make(arch, **sizes):
        if arch == "gpt":
            return make_model(**sizes)
        sizes = {**dict(block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0, ngram=4), **sizes}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = plan.build_model(train.TrainOptions(arch="modern", **sizes), 11)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn_like(p))
        return model.eval()

    return make


def written(steps):
    return torch.stack(list(steps), dim=1)


class Fixed:
    """A draft that always guesses what a function of the last token says."""

    def __init__(self, after):
        self.after = after

    def propose(self, known, n):
        guesses, token = [], known[-1]
        for _ in range(n):
            token = self.after(token)
            guesses.append(token)
        return guesses


# ---------------------------------------------------------------------------------------------------------------------
# Prompts of different lengths


def padded(rows):
    """Rows of different lengths as one tensor, filled up at the left, and by how much."""
    longest = max(map(len, rows))
    pad = torch.tensor([longest - len(row) for row in rows])
    return torch.stack([F.pad(row, (longest - len(row), 0), value=3) for row in rows]), pad


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [(1, 4, 7), (5, 5, 2), (7, 1, 1)])
def test_prompts_of_different_lengths_are_continued_as_each_alone(make, arch, use_cache, lengths):
    model = make(arch, block_size=16)
    rows = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    idx, pad = padded(rows)
    together = written(generate(model, idx, 9, temperature=0, pad=pad, use_cache=use_cache))
    alone = [written(generate(model, row[None], 9, temperature=0)) for row in rows]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("arch", ARCHS)
def test_what_fills_a_short_row_up_does_not_matter(make, arch):
    model, pad = make(arch), torch.tensor([0, 3])
    idx = tokens(2, 5)
    other = idx.clone()
    other[1, :3] = (idx[1, :3] + 1) % 11
    logits = [Reader(model, pad=pad).next_logits(t) for t in (idx, other)]
    assert logits[0].isfinite().all() and torch.equal(*logits)


@pytest.mark.parametrize("arch", ARCHS)
def test_with_different_lengths_past_block_size_the_cache_changes_nothing(make, arch):
    model = make(arch)
    idx, pad = padded([tokens(1, n, seed=n)[0] for n in (8, 3, 1)])
    dice = [torch.Generator().manual_seed(1) for _ in range(2)]
    found = [
        written(generate(model, idx, 40, pad=pad, use_cache=use, generator=g)) for use, g in zip((True, False), dice)
    ]
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of fixed shapes, as a CUDA graph replays them


class Recorded(GraphReader):
    """Replays its steps as on a GPU, without any of its Python: PyTorch's operations alone, on the same memory."""

    SHORTEST = 2
    operations = frozenset()

    def _prepare(self, size, *draw):
        _, results = super()._prepare(size, *draw)
        with undrawn(draw[1], self.token.device):
            graph = make_fx(lambda: self._step(size, *draw)[0])()
        self.operations = self.operations | {str(node.target) for node in graph.graph.nodes}
        return lambda: results[0].copy_(graph()), results


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", [(5, 5, 5), (6, 3, 1)])
def test_a_step_that_is_recorded_writes_the_same_text_and_reads_no_number_on_the_cpu(make, arch, lengths):
    model = make(arch)
    idx, pad = padded([tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)])
    pad = pad if pad.any() else None
    reader = Recorded(model, pad)
    found = written(generate(model, idx, 40, temperature=0, reader=reader))
    assert torch.equal(found, written(generate(model, idx, 40, temperature=0, pad=pad)))
    how = dict(temperature=0.8, top_k=5, top_p=0.95, min_p=0.01, pad=pad)
    reader.start = None  # a new text
    torch.manual_seed(1)  # make_fx of PyTorch 2.11 knows no generators
    drawn = written(generate(model, idx, 40, reader=reader, **how))
    torch.manual_seed(1)
    assert torch.equal(drawn, written(generate(model, idx, 40, **how)))
    waits = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh")  # of a CUDA graph none may be part
    assert not [operation for operation in reader.operations if any(word in operation for word in waits)]


@pytest.mark.parametrize("same", [True, False])
def test_kernels_are_used_only_where_they_compute_what_the_model_does(make, monkeypatch, same):
    """fused.py knows GPT-2 alone: someone who has changed model.py gets the text of the changed model."""
    model, theirs, said = make("gpt"), make("gpt"), []
    if not same:
        theirs.transformer.h[1].mlp.c_proj = torch.nn.Identity()
        theirs.transformer.h[1].mlp.c_fc = torch.nn.Identity()

    class Kernels:  # what FusedStep does, by PyTorch
        can_draw = staticmethod(lambda sampling: False)

        def __init__(self, model, cache, position, token):
            self.static = StaticCache(cache, position)
            self(token)

        def __call__(self, token):
            self.static.size = model.config.block_size
            self.static.make_mask()
            self.logits = theirs(token, cache=self.static)[0][:, -1]
            return self.logits[:, None]

    monkeypatch.setitem(sys.modules, "fused", SimpleNamespace(fused_step=Kernels))
    monkeypatch.setattr(graphs, "say_once", said.append)
    reader = Recorded(model)
    found = written(generate(model, tokens(2, 3), 20, temperature=0, reader=reader))
    assert torch.equal(found, written(generate(model, tokens(2, 3), 20, temperature=0)))
    assert (reader.fused is not None) == same
    assert len(said) == (0 if same else 1) and all("another model than model.py" in line for line in said)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pad", [None, [0, 2, 4]])
@pytest.mark.parametrize("kind", [Reader, GraphReader])
def test_all_that_writing_makes_lies_on_the_device_of_the_model(make, arch, pad, kind):
    model = join_qkv(make(arch).to("meta", torch.float16))
    pad = None if pad is None else torch.tensor(pad, device="meta")
    reader, text = kind(model, pad=pad), torch.zeros(3, 5, dtype=torch.int64, device="meta")
    with torch.inference_mode(), OnMeta():
        for grow in (2, 1, 1, 1, 1, 1):
            probs = Sampling(0.8, 3, 0.9, 0.1, 1.2).probs(reader.next_logits(text), text)
            text = torch.cat([text, torch.multinomial(probs, grow)], 1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("prompt", [1, 5, 8, 20])
def test_steps_of_fixed_shapes_write_the_same_text_past_block_size_too(make, arch, prompt):
    model, idx = make(arch), tokens(3, prompt)
    found = written(generate(model, idx, 40, temperature=0, reader=GraphReader(model)))
    assert torch.equal(found, written(generate(model, idx, 40, temperature=0)))


@pytest.mark.parametrize("arch", ARCHS)
def test_steps_of_fixed_shapes_take_prompts_of_different_lengths(make, arch):
    model = make(arch)
    idx, pad = padded([tokens(1, n, seed=n)[0] for n in (6, 3, 1)])
    found = written(generate(model, idx, 40, temperature=0, reader=GraphReader(model, pad)))
    assert torch.equal(found, written(generate(model, idx, 40, temperature=0, pad=pad)))


@pytest.mark.parametrize("arch", ARCHS)
def test_between_steps_of_fixed_shapes_a_text_may_grow_by_several_tokens(make, arch):
    model, text = make(arch, block_size=32), tokens(2, 3)
    fixed, plain = GraphReader(model), Reader(model, use_cache=False)
    for grow in (1, 1, 1, 4, 1, 1, 3, 1, 2, 1):
        torch.testing.assert_close(fixed.next_logits(text), plain.next_logits(text), atol=1e-5, rtol=0)
        text = torch.cat([text, tokens(2, grow, seed=grow)], 1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("num_beams", [1, 4, 30])
@pytest.mark.parametrize("end", [None, 3])
def test_a_beam_search_with_steps_of_fixed_shapes_finds_the_same(make, arch, num_beams, end):
    """Past block_size, and with beams of which some end, so that others take their place in the cache."""
    model, idx = make(arch), tokens(1, 5)
    is_end = None if end is None else lambda continuation: continuation[-1] == end and len(continuation) > 6
    found = beam_search(model, idx, 20, num_beams, is_end=is_end, reader=GraphReader(model))
    expected = beam_search(model, idx, 20, num_beams, is_end=is_end)
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-5)


def test_a_sampling_that_does_more_than_draw_is_no_part_of_a_recorded_step(make):
    class Counted(Sampling):
        calls = 0

        def probs(self, logits, text):
            self.calls += 1
            return super().probs(logits, text)

    sampling = Counted(temperature=0)
    written(generate(make("gpt"), tokens(1, 3), 20, sampling=sampling, reader=GraphReader(make("gpt"))))
    assert sampling.calls == 20


@pytest.mark.parametrize(
    "settings", [dict(repetition_penalty=3.0), dict(repetition_penalty=3.0, use_cache=False)], ids=str
)
def test_what_fills_a_row_up_is_not_penalized_as_if_it_were_said(make, settings):
    model, rows = make("gpt", block_size=16), [tokens(1, n, seed=n)[0] for n in (7, 2)]
    idx, pad = padded(rows)
    together = written(generate(model, idx, 9, temperature=0, pad=pad, **settings))
    alone = [written(generate(model, row[None], 9, temperature=0, **settings)) for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_a_step_of_fixed_shapes_uses_the_same_memory_each_time(make):
    model, text = make("gpt"), tokens(2, 3)
    reader, places = GraphReader(model), set()
    for _ in range(5):
        logits = reader.next_logits(text)
        text = torch.cat([text, logits.argmax(1, keepdim=True)], 1)
        if reader.static is not None:
            places.add(
                (reader.token.data_ptr(), reader.position.data_ptr(), reader.static.layers[0].layer.k.data_ptr())
            )
    assert len(places) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("guesses", [1, 3, 6, 20])
@pytest.mark.parametrize("prompt", [1, 7, 8, 12])
def test_greedy_text_is_the_same_with_and_without_guesses_past_block_size_too(make, arch, guesses, prompt):
    model, idx, n = make(arch), tokens(1, prompt), 60
    expected = written(generate(model, idx, n, temperature=0))
    right = expected[0].tolist()
    drafts = [
        Fixed(lambda token: (token + 1) % 11),
        SimpleNamespace(propose=lambda known, k: right[len(known) - prompt :][:k]),  # all right
        SimpleNamespace(propose=lambda known, k: (right[len(known) - prompt :][:1] + [0] * k)[:k]),
        SimpleNamespace(propose=lambda known, k: []),
    ]
    passes = []
    for draft in drafts:
        counts = Speculation()
        found = written(speculate(model, idx, n, draft, guesses, Sampling(temperature=0), counts=counts))
        assert torch.equal(found, expected)
        assert counts.tokens == n and counts.accepted <= counts.guessed
        passes.append(counts.passes)
    assert passes[1] < passes[3] == n or (guesses == 1 and passes[1] <= n)


def test_guessing_ends_once_it_costs_more_than_it_saves(make):
    model, idx, n = make("gpt"), tokens(1, 3), 300
    right = written(generate(model, idx, n, temperature=0))[0].tolist()
    wrong = SimpleNamespace(propose=lambda known, k: [(right[len(known) - 3] + 1) % 11] * k)
    half = SimpleNamespace(propose=lambda known, k: [(right[len(known) - 3] + len(known) % 2) % 11])
    for draft, cost, goes_on in ((wrong, 0.0, True), (wrong, 0.1, False), (half, 0.3, True), (half, 0.9, False)):
        counts = Speculation(cost)
        found = written(speculate(model, idx, n, draft, 3, Sampling(temperature=0), counts=counts))
        assert found[0].tolist() == right
        assert (counts.guessed > 64 + 3) == goes_on, (counts.guessed, counts.accepted)


def chi_square(found, expected):
    """How far counts are from what was expected, in standard deviations of the chi-square statistic."""
    cells = [k for k in expected if expected[k] > 0]
    assert not set(found) - set(cells), "what has no probability was written"
    statistic = sum((found.get(k, 0) - expected[k]) ** 2 / expected[k] for k in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


ROWS = [[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02]]


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.7, top_k=3)], ids=str)
@pytest.mark.parametrize("after", [lambda t: (t + 1) % 4, lambda t: 0, lambda t: 3], ids=["next", "0", "3"])
def test_texts_with_guesses_have_exactly_the_probabilities_of_the_model(start, settings, after):
    """Texts of three tokens, against the product of the model's probabilities."""
    model, sampling = Table(*ROWS), Sampling(**settings)
    probs = next_token_probs(model.log_probs, settings.get("temperature", 1.0), settings.get("top_k")).tolist()
    dice, found = torch.Generator().manual_seed(0), collections.Counter()
    draft, idx = Fixed(after), torch.tensor([[start]])
    for _ in range(2_000):
        reader = Reader(model, use_cache=False)
        steps = speculate(model, idx, 3, draft, 2, sampling, dice, reader=reader)
        found[tuple(int(t) for t in steps)] += 1
    expected = {
        (a, b, c): sum(found.values()) * probs[start][a] * probs[a][b] * probs[b][c]
        for a, b, c in itertools.product(range(4), repeat=3)
    }
    assert abs(chi_square(found, expected)) < 5


def test_next_tokens_follow_the_model_in_20000_draws_at_several_contexts():
    model, dice, draft = Table(*ROWS), torch.Generator().manual_seed(0), Fixed(lambda t: (t + 1) % 4)
    for start, probs in enumerate(ROWS):
        found, idx = collections.Counter(), torch.tensor([[start]])
        for _ in range(5_000):
            steps = speculate(model, idx, 2, draft, 1, None, dice, reader=Reader(model, use_cache=False))
            found[int(next(iter(steps)))] += 1
        assert abs(chi_square(found, {i: 5_000 * p for i, p in enumerate(probs)})) < 5


def test_the_repetition_penalty_counts_the_guesses_that_were_accepted(make):
    model, idx, sampling = make("gpt"), tokens(1, 4), Sampling(temperature=0, repetition_penalty=3.0)
    expected = written(generate(model, idx, 40, sampling=sampling))
    found = written(speculate(model, idx, 40, Fixed(lambda t: (t + 3) % 11), 5, sampling))
    assert torch.equal(found, expected)
    assert not torch.equal(expected, written(generate(model, idx, 40, temperature=0)))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_never_more_tokens_are_written_than_asked_for(make, n):
    assert len(list(speculate(make("gpt"), tokens(1, 3), n, Fixed(lambda t: t), 5))) == n


def test_forgetting_wrong_guesses_leaves_the_cache_as_if_they_had_not_been_read(make):
    for arch in ("gpt",) + (("modern",) if hasattr(torch.optim, "Muon") else ()):
        model, idx = make(arch), tokens(1, 6)
        cache = KVCache(model.config)
        model(idx[:, :2], cache=cache)
        model(torch.cat([idx[:, 2:4], tokens(1, 3, seed=5)], 1), cache=cache)
        cache.forget(3)
        assert cache.length == 4
        torch.testing.assert_close(model(idx[:, 4:], cache=cache)[0], model(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("last", [1, 2, 5])
def test_the_logits_of_the_last_positions_are_those_with_targets(make, arch, last):
    model, idx = make(arch), tokens(2, 5)
    torch.testing.assert_close(model(idx, last=last)[0], model(idx, idx)[0][:, -last:], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The draft


def brute_force(text, order):
    """What followed each context that came more than once with what followed it, by counting."""
    counts = collections.defaultdict(collections.Counter)
    for i in range(len(text) - order):
        counts[tuple(text[i : i + order])][text[i + order]] += 1
    return {
        context: c for context, c in counts.items() if max(c.values()) > 1 and max(c.values()) >= 0.4 * sum(c.values())
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [0, 1, 4, 6, 400])
def test_the_draft_holds_what_most_often_followed(order, length):
    text = torch.randint(3, (length,), generator=torch.Generator().manual_seed(order))
    codes, following = most_frequent(text, order)
    found, expected = dict(zip(codes.tolist(), following.tolist())), brute_force(text.tolist(), order)
    assert set(found) == {hash_of(context) for context in expected}
    for context, counter in expected.items():
        assert counter[found[hash_of(context)]] == max(counter.values())


def test_a_guess_comes_from_the_longest_context_and_goes_on_from_itself():
    text = torch.tensor([1, 2, 3, 4, 5, 6] * 4 + [9, 5, 7] * 5)
    draft = Draft.from_tokens(text)
    assert draft.propose([1, 2, 3, 4, 5], 4) == [6, 1, 2, 3]
    assert draft.propose([8, 4, 5], 1) == [6] and draft.propose([8, 9, 5], 1) == [7]
    assert draft.propose([8, 8], 4) == draft.propose([5], 4) == draft.propose([1, 2], 0) == []


def test_a_saved_draft_comes_back_and_a_directory_may_have_none(tmp_path):
    draft = Draft.from_tokens(tokens(1, 500)[0])
    draft.save(str(tmp_path))
    assert Draft.load(str(tmp_path), 1000).tables == draft.tables
    assert Draft.load(str(tmp_path / "none"), 1000) is None


def test_a_damaged_draft_is_one_line(tmp_path):
    (tmp_path / "draft.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"is damaged .* delete it"):
        Draft.load(str(tmp_path), 1000)


def test_a_draft_of_another_model_whose_tokens_this_one_does_not_have_is_one_line(tmp_path):
    Draft([dict.fromkeys(range(3), token) for token in (7, *ORDERS[1:])]).save(str(tmp_path))
    assert Draft.load(str(tmp_path), 8) is not None
    with pytest.raises(UserError, match=r"it is of another model.*delete it"):
        Draft.load(str(tmp_path), 7)


def test_a_guess_is_not_accepted_from_probabilities_that_are_none():
    reader = Reader(Table([float("nan")] * 4, *[[0.25] * 4] * 3), use_cache=False)
    with pytest.raises(RuntimeError, match="probability tensor"):
        list(speculate(None, torch.tensor([[0]]), 3, Fixed(lambda t: 1 + t % 3), reader=reader))


def test_threads_are_one_or_all_and_those_of_the_caller_come_back(make):
    before = torch.get_num_threads()
    assert best_threads(make("gpt"), 3) in (1, before)
    with pytest.raises(KeyError), use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before

    class Slow:
        config = SimpleNamespace(block_size=4, n_layer=1)

        def __call__(self, idx, cache):
            time.sleep(0.06)

    assert best_threads(Slow()) is None


def test_the_cost_of_a_guess_is_measured_in_passes_over_one_token():
    class Linear:
        config = SimpleNamespace(block_size=16, n_layer=1)

        def __call__(self, idx, cache):
            time.sleep(0.01 + 0.005 * (idx.size(1) - 1))  # half as long again for each further token

    assert 0.3 < guess_cost(Linear(), 3) < 0.7


def test_tokens_of_a_large_vocabulary_are_hashed_alike_in_tensors_and_in_lists():
    text = torch.tensor([50256, 0, 50255, 1, 40000] * 3)
    assert Draft.from_tokens(text).propose([50256, 0, 50255, 1, 40000], 2) == [50256, 0]


# ---------------------------------------------------------------------------------------------------------------------
# min_p and the repetition penalty


@pytest.mark.parametrize("min_p, kept", [(0.0, 4), (0.05, 4), (0.2, 3), (0.5, 2), (1.0, 1)])
def test_min_p_keeps_what_is_probable_enough_beside_the_likeliest_in_proportion(min_p, kept):
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    found = next_token_probs(p.log(), min_p=min_p)
    expected = torch.where(torch.arange(4) < kept, p, torch.tensor(0.0))
    torch.testing.assert_close(found, expected / expected.sum())


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones_of_what_was_said():
    logits, text = torch.tensor([[2.0, -2.0, 2.0, -2.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[0, 1, 0], [3, 3, 3]])
    found = penalize_repetition(logits, text, 2.0)
    assert found.tolist() == [[1.0, -4.0, 2.0, -2.0], [1.0, 1.0, 1.0, 0.5]]
    assert penalize_repetition(logits, text, 1.0) is logits


# ---------------------------------------------------------------------------------------------------------------------
# Lighter weights


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n} and {n + 1} make {2 * n + 1}, said the cat." for n in range(400)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", params=ARCHS)
def out_dir(request, text_file, tmp_path_factory):
    """The directory of a model that has learned something."""
    out = str(tmp_path_factory.mktemp("run") / "out")
    flags = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 32 --batch_size 16 --max_iters 150 --dropout 0"
    options = ["--data", text_file, "--out_dir", out, "--arch", request.param, "--learning_rate", "4e-3"]
    assert train.main([*options, *flags.split(), "--dtype", "float32", "--eval_interval", "150"]) == 0
    return out


@pytest.mark.parametrize("how", KINDS)
def test_lighter_weights_move_the_val_loss_by_less_than_half_a_percent(out_dir, text_file, how):
    model, tokenizer = sample.load_writer(out_dir)
    data = load_data(text_file, tokenizer)
    before = validation_loss(model.eval(), data.val, 16)
    after = validation_loss(lighten(model, how), data.val, 16)
    assert 0 < abs(after - before) < 0.005 * before and before < 1.5


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_lighter_weights_are_read_in_parts_as_whole(make, arch, how):
    model, idx = lighten(make(arch, n_embd=32), how), tokens(2, 8)
    cache = KVCache(model.config)
    parts = [model(idx[:, i : i + 2], cache=cache)[0] for i in range(0, 8, 2)]
    torch.testing.assert_close(parts[-1], model(idx)[0], atol=0.05, rtol=0)
    assert {p.dtype for p in parts} == {torch.float32}


@needs_int8
@pytest.mark.parametrize("bfloat16", [True, False])
def test_int8_multiplies_many_tokens_as_it_does_few(make, monkeypatch, bfloat16):
    monkeypatch.setattr(lighten_module, "has_bfloat16", lambda device: bfloat16)
    linear = torch.nn.Linear(32, 48)
    light = lighten(torch.nn.Sequential(linear), "int8")
    x = torch.randn(5, 20, 32)
    scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    expected = F.linear(x, (linear.weight / scale).round() * scale, linear.bias)
    assert light[0].dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    torch.testing.assert_close(light(x), expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(light(x[:1]), expected[:1], atol=0.02, rtol=0.01)


@pytest.mark.parametrize("prepare", [join_qkv, lambda model: lighten(model, "float32")])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_prepared_in_float32_has_the_same_logits_with_fewer_matrices(make, arch, prepare):
    model, idx = make(arch), tokens(2, 8)
    expected, before = model(idx)[0], {name for name, _ in model.named_modules()}
    torch.testing.assert_close(prepare(model)(idx)[0], expected, atol=1e-6, rtol=1e-5)
    parts = {name.split(".")[-1] for name in before ^ {name for name, _ in model.named_modules()}}
    assert parts == ({"c_q", "c_k", "c_v", "c_attn"} if arch == "modern" else set())


@needs_float16
@pytest.mark.parametrize("arch", ARCHS)
def test_with_float16_weights_the_products_are_those_of_float32(make, arch):
    model, rounded = make(arch), make(arch)
    for linear in rounded.modules():
        if isinstance(linear, torch.nn.Linear):  # no longer tied: the table that is read stays float32
            linear.weight = torch.nn.Parameter(linear.weight.detach().half().float())
    expected = rounded(tokens(2, 8))[0]
    torch.testing.assert_close(lighten(model, "float16")(tokens(2, 8))[0], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_whose_parts_are_called_directly_computes_the_same_but_for_hooks(make, arch):
    model, direct, idx, called = make(arch), make(arch), tokens(2, 7), []
    part = direct.transformer.h[0].attn if arch == "gpt" else direct.layers[0].attn
    call_directly(direct)
    part.register_forward_hook(lambda *_: called.append(part))
    before, caches = list(direct.parameters()), [KVCache(model.config) for _ in range(2)]
    for new in (idx[:, :4], idx[:, 4:5], idx[:, 5:]):
        logits = [m(new, cache=cache)[0] for m, cache in zip((model, direct), caches)]
        assert torch.equal(*logits)
    assert torch.equal(model(idx, targets=idx)[1], direct(idx, targets=idx)[1])
    assert not called and isinstance(part, torch.nn.Module) and isinstance(direct, type(model))
    assert all(a is b for a, b in zip(direct.parameters(), before)) and direct.num_params() == model.num_params()


def test_a_model_whose_parts_are_called_directly_does_what_its_own_code_says(make):
    class Halved(type(make("gpt").transformer.h[0].mlp)):
        def forward(self, x):
            return super().forward(x) / 2

    model = make("gpt")
    model.transformer.h[0].mlp.__class__ = Halved
    expected = model(tokens(2, 7))[0]
    assert torch.equal(lighten(model, "float32")(tokens(2, 7))[0], expected)
    assert not torch.equal(make("gpt")(tokens(2, 7))[0], expected)


@needs_float16
def test_with_float16_weights_a_token_has_the_same_logits_to_rounding_whatever_is_read_with_it(make):
    model, idx = lighten(make("gpt", n_embd=64, block_size=64), "float16"), tokens(1, 40)
    cache, whole = KVCache(model.config), KVCache(model.config)
    one = torch.cat([model(idx[:, i : i + 1], cache=cache)[0] for i in range(40)], dim=1)
    several = [model(idx[:, i : i + 4], cache=whole, last=4)[0] for i in range(0, 40, 4)]
    torch.testing.assert_close(torch.cat(several, dim=1), one, atol=2e-5, rtol=0)


def test_vectors_of_ngrams_are_no_weights_that_a_lighter_format_would_make_faster(make, monkeypatch):
    monkeypatch.setattr(lighten_module, "LIGHT_ENOUGH", 10_000)
    monkeypatch.setattr(lighten_module, "has_bfloat16", lambda device: True)
    model = make("modern")
    assert model.num_params() > 10_000 > model.num_params(embedding=False) and usual_format(model) == "float32"


@pytest.mark.parametrize(
    "weights, bfloat16, float16, expected",
    [
        (5e6, True, True, "16 bits"),
        (5e6, True, False, "bfloat16"),
        (5e6, False, True, "float16"),
        (5e6, False, False, "float32"),
        (3e6, True, True, "float32"),
        (124e6, True, True, "bfloat16"),
        (124e6, False, True, "float16"),
    ],
)
def test_the_usual_format_is_of_16_bits_where_the_machine_is_fast_with_them(
    make, monkeypatch, weights, bfloat16, float16, expected
):
    monkeypatch.setattr(lighten_module, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(lighten_module, "has_float16", lambda: float16)
    model = make("gpt")
    monkeypatch.setattr(model, "num_params", lambda embedding: weights)
    assert usual_format(model) == expected


@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_usual_format_is_not_float16_where_a_weight_does_not_fit(make, monkeypatch, bfloat16):
    monkeypatch.setattr(lighten_module, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(lighten_module, "has_float16", lambda: True)
    model = make("gpt")
    monkeypatch.setattr(model, "num_params", lambda embedding: 5e6)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = -70_000
    assert usual_format(model) == ("bfloat16" if bfloat16 else "float32")


@needs_float16
def test_weights_of_16_bits_are_float16_for_a_few_tokens_and_bfloat16_for_many(make):
    few, many, both = (lighten(make("gpt", n_embd=64), how) for how in ("float16", "bfloat16", "16 bits"))
    for rows, same, other in ((1, few, many), (4, many, few)):  # of 4 tokens each
        idx = tokens(rows, 4)
        logits = both(idx, last=4)[0]
        torch.testing.assert_close(logits, same(idx, last=4)[0], atol=1e-5, rtol=0)
        assert not torch.allclose(logits, other(idx, last=4)[0], atol=1e-5, rtol=0)


def test_float16_is_refused_where_it_cannot_be(make, monkeypatch):
    model = make("gpt")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = -70_000
    monkeypatch.setattr(lighten_module, "has_float16", lambda: True)
    with pytest.raises(UserError, match="--dtype float16: the model has a weight beyond 65504"):
        lighten(model, "float16")
    monkeypatch.setattr(lighten_module, "has_float16", lambda: False)
    with pytest.raises(UserError, match="--dtype float16: on a CPU needs an x86 with AVX2"):
        lighten(make("gpt"), "float16")


@needs_int8
def test_int8_refuses_widths_that_its_kernel_cannot_read(make):
    with pytest.raises(UserError, match="multiple of 16"):
        lighten(make("gpt", n_embd=24), "int8")


def test_int8_without_its_kernel_is_one_line(make, monkeypatch):
    monkeypatch.delattr(torch, "_weight_int8pack_mm", raising=False)
    with pytest.raises(UserError, match=r"--quantize int8: needs PyTorch 2\.3"):
        lighten(make("gpt"), "int8")


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_threads_wait_awake_for_the_next_product_unless_the_user_has_said_how_they_wait():
    for said, expected in ({}, "6000"), (dict(GOMP_SPINCOUNT="7"), "7"), (dict(OMP_WAIT_POLICY="passive"), "None"):
        env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        head = "import os\nexec(open('sample.py').read().split('import utils')[0])\n"  # all that comes before PyTorch
        code = head + "print(os.environ.get('GOMP_SPINCOUNT'))"
        done = subprocess.run([sys.executable, "-c", code], cwd=utils.HERE, env={**env, **said}, stdout=subprocess.PIPE)
        assert done.stdout.split() == [expected.encode()]


@pytest.mark.parametrize(
    "flags",
    ["", "--quantize int8", "--dtype bfloat16", pytest.param("--dtype float16", marks=needs_float16), "--guesses 0"],
)
def test_stats_go_to_stderr_and_text_to_stdout(command, out_dir, flags):  # noqa: F811
    flags = [*flags.split(), "--device", "cpu"]  # on a GPU there are no guesses
    result = command(sample, "--out_dir", out_dir, "--max_new_tokens", 50, "--stats", "--seed", 1, *flags)
    assert result.status == 0 and len(result.out) == 51
    assert result.err.startswith("50 tokens in ") and ("guesses accepted" in result.err) == ("--guesses" not in flags)


def test_probs_prints_a_line_for_each_token_with_its_probability(command, out_dir):  # noqa: F811
    arguments = ["--out_dir", out_dir, "--prompt", "7 and 8", "--max_new_tokens", 20, "--temperature", 0]
    text = command(sample, *arguments, "--guesses", 0, "--dtype", "float32").out
    lines = command(sample, *arguments, "--probs", "--dtype", "float32").out.splitlines()
    assert "7 and 8" + "".join(eval(line.split("  ", 1)[1]) for line in lines) + "\n" == text
    probs = [float(line.split()[0]) for line in lines]
    assert len(probs) == 20 and all(0 < p <= 1 for p in probs) and max(probs) > 0.5


def test_in_a_terminal_the_text_is_coloured_by_surprise(command, out_dir, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample.sys.stdout.__class__, "isatty", lambda _: True, raising=False)
    result = command(sample, "--out_dir", out_dir, "--max_new_tokens", 60, "--temperature", 2, "--probs", "--seed", 1)
    assert result.status == 0 and "\x1b[48;5;" in result.out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):  # no-color.org
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\x1b" not in command(sample, "--out_dir", out_dir, "--max_new_tokens", 9, "--probs").out


def test_turns_go_on_from_all_that_was_said(command, out_dir):  # noqa: F811
    arguments = ["--out_dir", out_dir, "--max_new_tokens", 12, "--temperature", 0, "--dtype", "float32"]
    result = command(sample, *arguments, "--interactive", stdin=b"1 and 2\n and the cat\n")
    assert result.status == 0
    expected = command(sample, *arguments, "--prompt", "1 and 2").out[len("1 and 2") :]
    assert result.out.startswith(expected)
    whole = "1 and 2" + expected[:-1] + " and the cat"
    assert result.out[len(expected) :] == command(sample, *arguments, "--prompt", whole).out[len(whole) :]


@pytest.mark.parametrize("flags", ["--guesses 3 --device cpu", "--guesses 0"])
def test_a_turn_that_a_stop_string_ends_early_leaves_nothing_unwritten_in_the_cache(command, out_dir, flags):  # noqa: F811
    arguments = [
        "--out_dir",
        out_dir,
        "--max_new_tokens",
        40,
        "--temperature",
        0,
        "--dtype",
        "float32",
        "--stop",
        "make",
    ]
    result = command(sample, *arguments, *flags.split(), "--interactive", stdin=b"1 and 2 \n 6 said \n 9\n")
    assert result.status == 0, result.err
    model, tokenizer = sample.load_writer(out_dir)
    text, expected = [], ""
    for said in ("1 and 2 ", " 6 said ", " 9"):  # without a cache
        text, writer, shown = text + tokenizer.encode(said).tolist(), sample.TextWriter(tokenizer, "make"), ""
        for token in generate(model.eval(), torch.tensor([text]), 40, temperature=0, use_cache=False):
            shown += writer.add(int(token))
            if writer.stopped:
                break
        shown += writer.rest()
        text += tokenizer.encode(shown).tolist()  # the stop string is forgotten
        expected += shown + "\n"
    assert result.out == expected and "make" not in expected


def test_what_is_typed_and_is_no_text_is_refused_in_a_line(command, out_dir):  # noqa: F811
    result = command(sample, "--out_dir", out_dir, "--max_new_tokens", 5, "--interactive", stdin=b"1\xff\n1 and\n")
    assert result.status == 0 and len(result.out) == 6 and "Traceback" not in result.err
    assert result.err.startswith("sample.py: ") and "U+DCFF" in result.err


def test_turns_from_a_file_with_a_byte_order_mark(command, out_dir):  # noqa: F811
    arguments = ["--out_dir", out_dir, "--max_new_tokens", 5, "--temperature", 0, "--interactive"]
    assert command(sample, *arguments, stdin=b"\xef\xbb\xbf1 and\n") == command(sample, *arguments, stdin=b"1 and\n")


@pytest.mark.parametrize("number, status", [(errno.EBADF, 2), (errno.EIO, 0)], ids=["closed", "terminal gone"])
def test_where_nothing_can_be_typed_turns_end_in_a_line(command, out_dir, monkeypatch, number, status):  # noqa: F811
    class Unreadable(io.TextIOWrapper):
        def readline(self):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(io, "TextIOWrapper", Unreadable)
    result = command(sample, "--out_dir", out_dir, "--interactive")
    assert result.status == status
    if status == 2:
        assert_refused(result, "--interactive: standard input cannot be read (Bad file descriptor); start it in a")


def test_an_unknown_character_in_the_prompt_of_turns_is_refused(command, out_dir):  # noqa: F811
    assert_refused(command(sample, "--out_dir", out_dir, "--interactive", "--prompt", "é"), "U+00E9")


def test_a_turn_with_characters_the_model_does_not_know_is_one_line_and_the_next_goes_on(command, out_dir):  # noqa: F811
    result = command(sample, "--out_dir", out_dir, "--max_new_tokens", 5, "--interactive", stdin="é\n1\n".encode())
    assert result.status == 0 and "U+00E9" in result.err and len(result.out) == 6


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--min_p 1.5", "--min_p"),
        ("--min_p -1", "--min_p"),
        ("--repetition_penalty 0", "--repetition_penalty"),
        ("--guesses -1", "--guesses"),
        ("--quantize int4", "--quantize"),
        ("--interactive --num_samples 2", "--interactive"),
        ("--probs --num_beams 2", "--probs"),
        ("--interactive --probs", "--interactive"),
        ("--probs --stop cat", "--probs"),
        ("--quantize int8 --dtype float32", "--quantize"),
        ("--interactive --prompt_file x", "--interactive"),
        ("--num_beams 2 --temperature 0.5", "--temperature 0.5 and --num_beams 2"),
        ("--num_beams 2 --top_k 5", "--top_k"),
        ("--num_beams 2 --top_p 0.5", "--top_p"),
        ("--num_beams 2 --min_p 0.5", "--min_p"),
        ("--num_beams 2 --temperature 1", "--temperature 1.0 and --num_beams 2"),
        ("--num_beams 2 --top_k 0", "--top_k 0 and --num_beams 2"),
        ("--num_beams 2 --guesses 3", "--guesses 3: guesses are made for a single text"),
        ("--num_samples 2 --guesses 3", "--guesses 3: guesses are made for a single text"),
        ("--probs --guesses 3", "--guesses 3: guesses are made for a single text"),
        ("--length_penalty 1", "--length_penalty 1: compares beams that --stop ends"),
        ("--length_penalty 1 --stop cat", "--length_penalty 1: compares beams that --stop ends"),
        ("--length_penalty 1 --num_beams 2", "--length_penalty 1: compares beams that --stop ends"),
        ("--interactive --length_penalty 1", "--length_penalty 1: compares beams that --stop ends"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(command, out_dir, flags, word):  # noqa: F811
    assert_refused(command(sample, "--out_dir", out_dir, *flags.split()), word)


def test_guesses_that_cannot_be_made_are_refused_where_they_were_asked_for(command, out_dir, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["--max_new_tokens", 5, "--device", "cpu"]
    shutil.copytree(out_dir, str(tmp_path / "bare"))
    os.remove(tmp_path / "bare" / "draft.safetensors")
    for flags in ([], ["--guesses", 0]):
        assert command(sample, "--out_dir", "bare", *arguments, *flags).status == 0
    refused = command(sample, "--out_dir", "bare", *arguments, "--guesses", 3)
    assert_refused(refused, "--guesses 3: guesses come from draft.safetensors, which is not in bare; train.py")
    monkeypatch.setattr(sample, "pick_device", lambda _: torch.device("cuda"))
    refused = command(sample, "--out_dir", out_dir, "--guesses", 3)
    assert_refused(refused, "--guesses 3: guesses are made on a CPU, not on cuda; leave it out")


@pytest.mark.parametrize("stop, texts", [(None, ["ab", "b", "abb"]), ("b", ["a", ""])])
def test_a_text_that_a_beam_search_finds_in_two_ways_comes_once(monkeypatch, stop, texts):
    """Cut into tokens in two ways, or alike up to --stop."""
    tokenizer = train_bpe(["ab " * 50], 257)
    [a], [b], [ab] = (tokenizer.encode(text).tolist() for text in ("a", "b", "ab"))
    found = [Hypothesis(0.0, ids) for ids in ([a, b], [b], [ab], [ab, b])]
    monkeypatch.setattr(sample, "beam_search", lambda *_, **__: found)
    options = sample.SampleOptions(num_beams=4, stop=stop)
    scribe = SimpleNamespace(options=options, tokenizer=tokenizer, model=Table(), threads=None)
    assert sample.search(scribe, tokens(1, 3)) == texts


@pytest.mark.parametrize("flags", ["", "--temperature 0", "--temperature 0 --guesses 0", "--num_beams 3", "--probs"])
@pytest.mark.parametrize("large", [1e30, 3e38])  # the weights are numbers, and what is computed with them is none
def test_a_model_that_computes_no_numbers_is_one_line(command, out_dir, tmp_path, flags, large):  # noqa: F811
    shutil.copytree(out_dir, str(tmp_path / "run"))
    model, tokenizer = sample.load_writer(out_dir)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_fc" in name or "c_proj" in name:
                p.fill_(large)
    save_model("run", model, tokenizer)
    flags = [*flags.split(), "--max_new_tokens", 9, "--device", "cpu"]
    result = command(sample, "--out_dir", "run", "--prompt", "1", *flags)
    assert result.status == 2 and result.err.count("\n") == 1 and result.out in ("", "1")
    assert "--out_dir run: its model computes infinities or NaN, of which nothing can be drawn" in result.err


def test_thousands_of_samples_and_a_beam_wider_than_the_vocabulary(command, out_dir):  # noqa: F811
    result = command(sample, "--out_dir", out_dir, "--num_samples", 2000, "--max_new_tokens", 2)
    assert result.status == 0 and result.out.count("---------------") == 1999
    result = command(sample, "--out_dir", out_dir, "--num_beams", 500, "--max_new_tokens", 3)
    assert result.status == 0 and len(result.out) == 4


@pytest.mark.parametrize("stop", ["cat", ", said", "."])
@pytest.mark.parametrize("flags", ["--guesses 4", "--guesses 0", "--quantize int8"])
def test_a_stop_string_never_leaks_and_ends_the_text(command, out_dir, stop, flags):  # noqa: F811
    arguments = ["--out_dir", out_dir, "--max_new_tokens", 400, "--temperature", 0.5, "--seed", 3, "--stop", stop]
    result = command(sample, *arguments, *flags.split(), "--device", "cpu")
    assert result.status == 0 and stop not in result.out and len(result.out) < 400


@pytest.mark.parametrize("n", [600, 1500])
@pytest.mark.parametrize("stop", [None, "12345"])
def test_a_long_text_is_printed_whole(n, stop):
    tokenizer, ids = CharTokenizer("abcdefghijk"), tokens(1, n)[0].tolist()
    writer = sample.TextWriter(tokenizer, stop)
    assert "".join(map(writer.add, ids)) + writer.rest() == tokenizer.decode(ids)
    assert len(writer.ids) <= 257


def test_memory_stays_flat_in_a_long_text(make):
    """The cache is made once, and no more than block_size tokens are ever read at once."""
    model = make("gpt")
    reader = Reader(model)
    steps = generate(model, tokens(1, 4), 500, reader=reader)
    next(steps)
    places = [layer.k.data_ptr() for layer in reader.cache.layers]
    collections.deque(steps, maxlen=0)
    assert [layer.k.data_ptr() for layer in reader.cache.layers] == places


def test_beams_are_as_many_as_asked_for_with_lighter_weights(make):
    found = beam_search(lighten(make("gpt"), "bfloat16"), tokens(1, 3), 5, 4)
    assert len(found) == 4 and found == sorted(found, reverse=True)


def test_bench_generate_prints_every_figure(command, out_dir, monkeypatch):  # noqa: F811
    import bench_generate

    monkeypatch.setattr(bench_generate, "run_case", lambda case, options: dict(figure=1.0, note=""))
    result = command(bench, "generate", "--out_dir", out_dir, "--rounds", 1, "--json", "figures.json")
    assert result.status == 0, result.err
    for title in bench_generate.WORKS.values():
        assert title in result.out
    monkeypatch.undo()


@pytest.mark.parametrize("work", ["sample", "beams", "many", "first"])
def test_each_case_of_bench_generate_runs(command, out_dir, work, monkeypatch):  # noqa: F811
    import bench_generate

    monkeypatch.setattr(bench_generate, "NEW_TOKENS", 5)
    result = command(bench, "generate", "--out_dir", out_dir, "--case", f"ours, bfloat16|{work}")
    assert result.status == 0 and '"figure"' in result.out, result.err
