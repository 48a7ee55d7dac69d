"""generate.py: the cache changes nothing, samples follow the model, and beam search finds what it should."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2LMHeadModel

from checkpoint import save_model
from generate import (
    KVCache,
    Visible,
    beam_search,
    generate,
    keep_places,
    next_token_probs,
    penalize_repetition,
    speculate,
)
from tokenizer import CharTokenizer


def tokens(batch, length, vocab_size=11, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def written(model, idx, n, seed=0, **settings):
    """The n new tokens of each row, (B, n)."""
    steps = list(generate(model, idx, n, generator=torch.Generator().manual_seed(seed), **settings))
    return torch.stack(steps, dim=1)


def count_calls(model):
    """A list that grows by the number of tokens read whenever the model is called."""
    calls = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].size(1)))
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("parts", [[1] * 8, [3, 5], [8], [2, 1, 4, 1]])
def test_reading_in_parts_through_the_cache_gives_the_logits_of_reading_whole(make_model, parts):
    model, idx, cache, end = make_model(), tokens(3, 8), None, 0
    cache = KVCache(model.config)
    for part in parts:
        end += part
        logits, _ = model(idx[:, end - part : end], cache=cache)
        assert cache.length == end
        torch.testing.assert_close(logits, model(idx[:, :end])[0], rtol=0, atol=1e-5)


def test_a_model_that_learns_with_gradient_checkpointing_uses_the_cache_too(make_model):
    model, idx = make_model().train(), tokens(2, 6)
    model.gradient_checkpointing, cache = True, KVCache(model.config)
    model(idx[:, :4], cache=cache)
    assert cache.length == 4
    torch.testing.assert_close(model(idx[:, 4:], cache=cache)[0], model(idx)[0], rtol=0, atol=1e-5)


def test_a_mask_is_made_once_for_all_layers_and_anew_where_it_must_be():
    visible, k = Visible(), torch.zeros(2, 1, 3, 4)
    assert visible.mask(1, 5, k) is visible.mask(4, 4, k) is None  # a single token, and all tokens there are
    mask = visible.mask(2, 4, k)
    numbers = visible.numbers
    assert torch.equal(mask == 0, torch.tensor([[True, True, True, False], [True] * 4]))
    for S in (4, 5, 8, 3):  # the end of a longer mask
        assert torch.equal(visible.mask(2, S, k) == 0, torch.ones(2, S, dtype=torch.bool).tril(S - 2))
    assert visible.numbers is numbers
    for T, S in ((2, 9), (3, 9)):
        assert torch.equal(visible.mask(T, S, k) == 0, torch.ones(T, S, dtype=torch.bool).tril(S - T))
        assert visible.numbers is not numbers
    visible.reset(torch.tensor([0, 3]))
    alone = [True, False, False, False]  # a place without a token looks at itself, and nobody looks at what it finds
    first, second = visible.mask(4, 4, k)[:, 0] == 0
    assert torch.equal(first, torch.ones(4, 4, dtype=torch.bool).tril())
    assert second.tolist() == [alone[-i:] + alone[:-i] for i in range(4)]


def test_rows_with_padding_keep_it_where_they_change_places(make_model):
    model, idx, pad = make_model(), tokens(3, 5), torch.tensor([0, 2, 3])
    cache, rows = KVCache(model.config, pad), torch.tensor([2, 0, 1])
    model(idx, cache=cache)
    cache.select(rows)
    new = tokens(3, 2, seed=1)
    for row, logits in zip(range(3), model(new, cache=cache, last=2)[0]):
        alone = torch.cat([idx[rows[row], pad[rows[row]] :], new[row]])
        torch.testing.assert_close(logits, model(alone[None], last=2)[0][0], rtol=0, atol=1e-5)


def test_the_cache_holds_block_size_tokens_and_no_more(make_model):
    model = make_model(block_size=8)
    cache = KVCache(model.config)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match="9 tokens do not fit in block_size 8"):
        model(tokens(1, 1), cache=cache)


def test_select_makes_row_i_what_row_rows_i_was(make_model):
    model, idx = make_model(), tokens(3, 5)
    cache, rows = KVCache(model.config), torch.tensor([2, 0, 2, 1])
    model(idx, cache=cache)
    cache.select(rows)
    new = tokens(4, 2, seed=1)
    whole = torch.cat([idx[rows], new], dim=1)
    torch.testing.assert_close(model(new, cache=cache)[0], model(whole)[0], rtol=0, atol=1e-5)


def test_select_leaves_what_rows_have_in_common_where_it_is(make_model):
    model, idx = make_model(), tokens(3, 5)
    idx[:, :3] = idx[:1, :3]
    cache, rows = KVCache(model.config), torch.tensor([2, 1, 0])
    model(idx, cache=cache)
    before = cache.layers[0].k.clone()
    cache.select(rows, since=3)
    assert torch.equal(cache.layers[0].k[:, :, :3], before[:, :, :3])
    assert torch.equal(cache.layers[0].k[:, :, 3:], before[rows][:, :, 3:])
    new = tokens(3, 2, seed=1)
    torch.testing.assert_close(model(new, cache=cache)[0], model(torch.cat([idx[rows], new], 1))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [1, 5, 8, 20], ids="prompt{}".format)
def test_cached_and_uncached_decoding_write_the_same_tokens(make_model, block_size, prompt):
    """40 tokens, so that even the largest window is left behind several times."""
    model, idx = make_model(block_size=block_size), tokens(3, prompt)
    assert torch.equal(written(model, idx, 40), written(model, idx, 40, use_cache=False))


def test_every_row_is_written_as_if_it_were_alone(make_model):
    model, idx = make_model(), tokens(3, 4)
    together = written(model, idx, 20, temperature=0)
    alone = [written(model, row[None], 20, temperature=0) for row in idx]
    assert torch.equal(together, torch.cat(alone))


def test_of_a_long_prompt_the_last_block_size_tokens_count(make_model):
    model, idx = make_model(block_size=8), tokens(1, 20)
    assert torch.equal(written(model, idx, 5), written(model, idx[:, -8:], 5))
    assert not torch.equal(written(model, idx, 5), written(model, idx[:, -7:], 5))


def test_a_long_text_costs_at_most_two_reads_a_token(make_model):
    model = make_model(block_size=8)
    calls = count_calls(model)
    written(model, tokens(1, 8), 100)
    assert len(calls) == 100 and sum(calls) <= 2 * 108


def test_the_longest_text_that_fits_is_never_cut(make_model):
    """As long as prompt and text fit in block_size, every token sees all before it."""
    model, text = make_model(block_size=12), tokens(2, 3)
    new = written(model, text, 10, temperature=0)
    for i in range(10):
        assert torch.equal(new[:, i], model(text)[0][:, -1].argmax(dim=-1))
        text = torch.cat([text, new[:, i : i + 1]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# From logits to probabilities


LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.0, 0.0], [3.0, 3.0, 3.0, -3.0, 2.9]])


def kept(probs):
    """The tokens that can still be drawn, row by row."""
    return [{i for i, p in enumerate(row) if p > 0} for row in probs.tolist()]


def test_by_default_it_is_the_softmax():
    torch.testing.assert_close(next_token_probs(LOGITS), LOGITS.softmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.1, 0.8, 2.0])
def test_temperature_divides_the_logits(temperature):
    by_hand = [[math.exp(x / temperature) for x in row] for row in LOGITS.tolist()]
    by_hand = torch.tensor([[e / sum(row) for e in row] for row in by_hand])
    torch.testing.assert_close(next_token_probs(LOGITS, temperature), by_hand)


@pytest.mark.parametrize("settings", [{}, dict(top_k=3), dict(top_p=0.5), dict(top_k=2, top_p=0.9)])
def test_temperature_zero_gives_all_to_one_most_likely_token(settings):
    assert next_token_probs(LOGITS, 0, **settings).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("logit", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5)])
def test_logits_that_are_no_numbers_have_no_probabilities(settings, logit):
    logits = LOGITS.clone()
    logits[0, 3] = logit
    probs = next_token_probs(logits, **settings)
    assert probs[0].isnan().all() and torch.equal(probs[1], next_token_probs(LOGITS, **settings)[1])
    masked = torch.tensor([[-math.inf, 1.0, -math.inf]])
    assert next_token_probs(masked, **settings).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature):
    probs = next_token_probs(LOGITS[:1], temperature)
    assert probs.tolist() == [[0, 1, 0, 0, 0]]


def test_a_huge_temperature_is_uniform():
    torch.testing.assert_close(next_token_probs(LOGITS, 1e30), torch.full((2, 5), 0.2))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_top_k_keeps_the_k_most_likely_in_proportion(k):
    likeliest = [1, 3, 0, 4, 2][:k]
    probs = next_token_probs(LOGITS[:1], top_k=k)
    assert kept(probs) == [set(likeliest)]
    torch.testing.assert_close(probs[0, likeliest], LOGITS[0, likeliest].softmax(dim=-1))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_exactly_k_of_equally_likely_tokens(k):
    assert list(map(len, kept(next_token_probs(torch.zeros(2, 5), top_k=k)))) == [k, k]


@pytest.mark.parametrize("k", [None, 0, 5, 6, 10**9])
def test_top_k_of_none_zero_or_above_the_vocabulary_keeps_all(k):
    assert torch.equal(next_token_probs(LOGITS, top_k=k), next_token_probs(LOGITS))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.59, 0.6, 0.75, 0.85, 0.95, 0.99])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p):
    """Among all subsets of the tokens, none that is smaller reaches p, and none of its size reaches more."""
    full = LOGITS[0].softmax(dim=-1).tolist()
    sizes = (n for n in range(1, 6) if max(map(sum, itertools.combinations(full, n))) >= p)
    smallest = max(itertools.combinations(range(5), next(sizes)), key=lambda ids: sum(full[i] for i in ids))
    probs = next_token_probs(LOGITS[:1], top_p=p)
    assert kept(probs) == [set(smallest)]
    torch.testing.assert_close(probs[0, list(smallest)], LOGITS[0, list(smallest)].softmax(dim=-1))


def test_top_p_zero_keeps_one_even_of_equally_likely_tokens():
    assert list(map(len, kept(next_token_probs(torch.zeros(2, 5), top_p=0.0)))) == [1, 1]


@pytest.mark.parametrize("p", [None, 1.0])
def test_top_p_of_none_or_one_keeps_all(p):
    flat = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(next_token_probs(flat, top_p=p), flat.softmax(dim=-1))


def test_top_p_applies_to_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of all four tokens, 0.7 is needed to reach 0.55; of the two that top-k leaves, 0.4 / 0.7 = 0.571 is enough.
    assert kept(next_token_probs(logits[None], top_p=0.55)) == [{0, 1}]
    assert kept(next_token_probs(logits[None], top_p=0.55, top_k=2)) == [{0}]


def test_top_p_applies_after_the_temperature():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(next_token_probs(logits[None], temperature=0.2, top_p=0.55)) == [{0}]


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.3), dict(top_k=7), dict(top_p=0.9), dict(temperature=0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_float32_and_sum_to_one(settings, dtype):
    logits = 5 * torch.randn(4, 3, 500, generator=torch.Generator().manual_seed(0))
    probs = next_token_probs(logits.to(dtype), **settings)
    assert probs.dtype == torch.float32 and probs.shape == (4, 3, 500)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def chi_square(drawn, expected):
    """Pearson's statistic of counts against probabilities that are all above 0."""
    expected = drawn.sum() * expected.detach()
    assert expected.min() >= 5, "too few draws for the statistic to mean anything"
    return ((drawn - expected) ** 2 / expected).sum().item()


PROMPT = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "idx, settings, words",
    [
        ([1, 2], {}, "idx: must be a tensor .* is a list"),
        (PROMPT[0], {}, r"idx: must be .* is \(3,\) of torch.int64"),
        (PROMPT[:, :0], {}, r"is \(2, 0\) of torch.int64"),
        (PROMPT.byte(), {}, r"is \(2, 3\) of torch.uint8"),
        (PROMPT, dict(pad=torch.tensor([0, 3])), r"pad: must have 2 numbers from 0 to 2, and is \[0, 3\]"),
        (PROMPT, dict(pad=torch.tensor([1])), "pad: must have 2 numbers"),
        (PROMPT, dict(pad=torch.tensor([-1, 0])), "pad: must have 2 numbers"),
        (PROMPT, dict(temperature=-1.0), "temperature -1.0: must be at least 0"),
        (PROMPT, dict(temperature=math.nan), "temperature nan: must be at least 0"),
        (PROMPT, dict(top_k=-1), "top_k -1: must be at least 0"),
        (PROMPT, dict(top_p=1.5), "top_p 1.5: must be at least 0 and at most 1"),
        (PROMPT, dict(min_p=2.0), "min_p 2.0: must be at least 0 and at most 1"),
        (PROMPT, dict(repetition_penalty=0.0), "repetition_penalty 0.0: must be at least"),
    ],
)
def test_a_prompt_or_setting_that_cannot_be_is_refused_by_its_name(make_model, idx, settings, words):
    with pytest.raises(ValueError, match=words):
        next(generate(make_model(), idx, 1, **settings))


def test_a_search_and_guessing_are_for_one_row(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="idx: must have 1 row, and has 2"):
        beam_search(model, PROMPT, 1, 2)
    with pytest.raises(ValueError, match="idx: must have 1 row, and has 2"):
        next(speculate(model, PROMPT, 1, None))
    with pytest.raises(ValueError, match="num_beams 0: must be at least 1"):
        beam_search(model, PROMPT[:1], 1, 0)


def test_samples_follow_the_distribution_of_the_model(make_model):
    """Pairs of tokens: 25 kinds, so 24 degrees of freedom. A true sampler exceeds 51.2 once in 1000 seeds."""
    model, prompt = make_model(vocab_size=5), tokens(1, 3, vocab_size=5)
    first = model(prompt)[0][0, -1].softmax(dim=-1)
    second = [model(torch.cat([prompt, torch.tensor([[a]])], dim=1))[0][0, -1].softmax(dim=-1) for a in range(5)]
    expected = torch.stack([first[a] * second[a] for a in range(5)]).flatten()
    a, b = written(model, prompt.expand(20_000, -1), 2).unbind(dim=1)
    assert chi_square(torch.bincount(5 * a + b, minlength=25), expected) < 51.2


def test_samples_follow_the_distribution_that_temperature_and_top_k_leave(make_model):
    """Three kinds of tokens, so 2 degrees of freedom. A true sampler exceeds 13.8 once in 1000 seeds."""
    model, prompt = make_model(vocab_size=9), tokens(1, 3, vocab_size=9)
    values, ids = model(prompt)[0][0, -1].sort(descending=True)
    expected = torch.zeros(9).scatter(0, ids[:3], (values[:3] / 0.7).softmax(dim=-1))
    drawn = written(model, prompt.expand(20_000, -1), 1, temperature=0.7, top_k=3)[:, 0]
    drawn = torch.bincount(drawn, minlength=9)
    assert drawn[expected == 0].sum() == 0
    assert chi_square(drawn[expected > 0], expected[expected > 0]) < 13.8


def test_the_same_seed_writes_the_same_text(make_model):
    model, idx = make_model(), tokens(2, 3)
    assert torch.equal(written(model, idx, 30, seed=7), written(model, idx, 30, seed=7))


def test_another_seed_writes_another_text(make_model):
    model, idx = make_model(), tokens(2, 3)
    assert not torch.equal(written(model, idx, 30, seed=7), written(model, idx, 30, seed=8))


def test_tokens_come_one_by_one(make_model):
    model = make_model()
    calls = count_calls(model)
    stream = generate(model, tokens(2, 3), max_new_tokens=10)
    assert calls == [], "nothing is computed before the first token is asked for"
    for step in range(1, 4):
        assert next(stream).shape == (2,)
        assert len(calls) == step


def test_no_gradients_are_kept(make_model):
    model, modes = make_model(), []
    model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    list(generate(model, tokens(1, 3), 2))
    beam_search(model, tokens(1, 3), 2, num_beams=2)
    assert modes == [False] * 4


def test_between_tokens_the_callers_gradients_stay_on(make_model):
    stream = generate(make_model(), tokens(1, 3), max_new_tokens=10)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_zero_new_tokens_are_none(make_model):
    assert list(generate(make_model(), tokens(1, 3), 0)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


def every_continuation(model, idx, n, is_end=None, length_penalty=1.0):
    """(score, tokens) of each continuation that ends with is_end or at n tokens, best first: no search at all."""
    found = []

    def extend(continuation, log_prob):
        if len(continuation) == n or (is_end and continuation and is_end(continuation)):
            found.append((log_prob / len(continuation) ** length_penalty, continuation))
            return
        logits, _ = model(torch.cat([idx, torch.tensor([continuation], dtype=torch.int64)], dim=1))
        for token, step in enumerate(logits[0, -1].double().log_softmax(dim=-1).tolist()):
            extend([*continuation, token], log_prob + step)

    with torch.no_grad():
        extend([], 0.0)
    return sorted(found, reverse=True)


def assert_same(found, expected):
    assert [h.tokens for h in found] == [continuation for _, continuation in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _ in expected], abs=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_enough_beam_finds_what_trying_every_sequence_finds(make_model, seed, use_cache):
    """V^(n-1) = 4^3 beams keep every sequence of n - 1 tokens, so nothing can be missed."""
    model, idx = make_model(seed, vocab_size=4), tokens(1, 2, vocab_size=4)
    found = beam_search(model, idx, max_new_tokens=4, num_beams=4**3, use_cache=use_cache)
    assert_same(found, every_continuation(model, idx, 4)[: 4**3])


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_an_end_it_finds_what_trying_every_sequence_finds(make_model, seed, length_penalty):
    model, idx = make_model(seed, vocab_size=4), tokens(1, 2, vocab_size=4)

    def is_end(continuation):
        return continuation[-1] == 3 or continuation[-2:] == [1, 2]

    found = beam_search(model, idx, 4, num_beams=4**3, length_penalty=length_penalty, is_end=is_end)
    expected = every_continuation(model, idx, 4, is_end, length_penalty)
    assert len({len(h.tokens) for h in found}) > 1, "continuations of several lengths compete"
    assert_same(found[:20], expected[:20])


@pytest.fixture(scope="module")
def with_twin(make_model, tmp_path_factory):
    """with_twin(seed) -> our random model and Hugging Face's on the same weights."""

    def make(seed):
        ours, directory = make_model(seed, vocab_size=11, block_size=16), tmp_path_factory.mktemp("twin")
        save_model(directory, ours, CharTokenizer("abcdefghijk"))
        return ours, GPT2LMHeadModel.from_pretrained(directory).eval()

    return make


@pytest.mark.parametrize("ends", [[], [3], [0, 3, 4, 6, 9]], ids=["no end", "one token ends", "many tokens end"])
@pytest.mark.parametrize("num_beams, length_penalty", [(2, 1.0), (4, 1.0), (3, 0.0), (3, -1.0), (5, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_beam_search_equals_hugging_faces(with_twin, seed, num_beams, length_penalty, ends):
    ours, theirs = with_twin(seed)
    idx = tokens(1, 3, seed=seed)
    is_end = (lambda continuation: continuation[-1] in ends) if ends else None
    found = beam_search(ours, idx, 8, num_beams, length_penalty, is_end)
    expected = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=8,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = [sequence[3:] for sequence in expected.sequences.tolist()]
    for sequence in sequences:  # behind its end, each is filled up with padding
        end = next((i for i, token in enumerate(sequence) if token in ends), len(sequence))
        del sequence[end + 1 :]
    assert [h.tokens for h in found] == sequences
    assert [h.score for h in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-3)


def test_beam_search_goes_on_past_block_size_with_and_without_the_cache(make_model):
    model, idx = make_model(block_size=8), tokens(1, 5)
    cached = beam_search(model, idx, 20, num_beams=3)
    plain = beam_search(model, idx, 20, num_beams=3, use_cache=False)
    assert [h.tokens for h in cached] == [h.tokens for h in plain]


def test_a_search_heeds_the_repetition_penalty(make_model):
    """One beam is greedy with it, and more beams find the best by log-probabilities that are worked out here."""
    model, idx = make_model(), tokens(1, 3)
    greedy = written(model, idx, 12, temperature=0, repetition_penalty=3.0)[0].tolist()
    assert beam_search(model, idx, 12, num_beams=1, repetition_penalty=3.0)[0].tokens == greedy
    assert greedy != beam_search(model, idx, 12, num_beams=1)[0].tokens
    best = beam_search(model, idx, 4, num_beams=3, repetition_penalty=3.0)[0]
    text, total = idx, 0.0
    for token in best.tokens:
        logits = penalize_repetition(model(text)[0][:, -1].detach(), text, 3.0)
        total += float(logits.log_softmax(dim=-1)[0, token])
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
    assert best.score == pytest.approx(total / 4, abs=1e-5)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 0, 3], [1, 1, 1, 1], [0, 3, 3, 0]])
def test_a_beam_that_goes_on_keeps_its_place(rows):
    order = keep_places(rows, len(rows))
    assert sorted(order) == list(range(len(rows)))
    placed = [rows[i] for i in order]
    assert all(placed[row] == row for row in rows)
    assert all(rows.index(row) == order[row] for row in rows)  # by its likeliest continuation


def test_a_first_beam_is_extended_in_order():
    assert list(keep_places([0, 0, 0, 0], 1)) == [0, 1, 2, 3]


def test_one_beam_is_greedy(make_model):
    model, idx = make_model(), tokens(1, 3)
    assert beam_search(model, idx, 12, num_beams=1)[0].tokens == written(model, idx, 12, temperature=0)[0].tolist()


def test_more_beams_than_tokens_in_the_vocabulary(make_model):
    model, idx = make_model(vocab_size=3), tokens(1, 2, vocab_size=3)
    found = beam_search(model, idx, 1, num_beams=50)
    assert_same(found, every_continuation(model, idx, 1))


def test_zero_new_tokens_are_one_empty_continuation(make_model):
    (found,) = beam_search(make_model(), tokens(1, 3), 0, num_beams=4)
    assert found.tokens == []


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_search_among_logits_that_are_no_numbers_is_refused(make_model, logit):
    model = make_model()
    weight = model.lm_head.weight.data
    weight[5] = logit
    with pytest.raises(FloatingPointError, match="the model computes infinities or NaN"):
        beam_search(model, tokens(1, 3), 5, num_beams=2)


def test_a_search_in_which_everything_ends_at_once_returns(make_model):
    found = beam_search(make_model(), tokens(1, 3), 9, num_beams=4, is_end=lambda continuation: True)
    assert [len(h.tokens) for h in found] == [1] * 4


class Table:
    """A model whose next token depends on the last one alone: row i holds the probabilities after token i."""

    def __init__(self, *rows):
        self.config, self.log_probs, self.calls = SimpleNamespace(block_size=64), torch.tensor(rows).log(), 0

    def __call__(self, idx, cache=None, last=1):
        self.calls += 1
        return self.log_probs[idx[:, -last:]], None

    def search(self, start, n, num_beams, length_penalty):
        """The continuations of token `start` that a search in which token 0 ends a text finds, best first."""
        idx, is_end = torch.tensor([[start]]), lambda continuation: continuation[-1] == 0
        found = beam_search(self, idx, n, num_beams, length_penalty, is_end, use_cache=False)
        return [h.tokens for h in found]


def test_a_search_stops_when_nothing_better_can_come():
    model = Table(*[[0.5, 0.3, 0.2]] * 3)
    assert model.search(1, 50, num_beams=2, length_penalty=0.0) == [[0], [1, 0]]
    assert model.calls == 2, "the third best text so far, 1 1, has 0.09, and what follows can only lower it"


def test_a_search_goes_on_while_a_longer_text_may_win():
    """One that ends at once has log(0.7) / 1 = -0.36, token 1 for ever nearly log(0.3) / 8 = -0.15."""
    model = Table([1 / 3, 1 / 3, 1 / 3], [0.01, 0.98, 0.01], [0.7, 0.3, 0.0])
    assert model.search(2, 8, num_beams=1, length_penalty=1.0) == [[1] * 8]


def test_a_search_goes_on_while_the_next_length_may_win():
    """Where length is punished: [1, 0] has 2 log(0.9 * 0.4) = -2.0, [1, 2, 0] -2.1 and [0] log(0.09) = -2.4."""
    model = Table([0.25] * 4, [0.4, 0.0, 0.55, 0.05], [0.99, 0.01, 0.0, 0.0], [0.09, 0.9, 0.0, 0.01])
    assert model.search(3, 8, num_beams=2, length_penalty=-1.0) == [[1, 0], [1, 2, 0]]
