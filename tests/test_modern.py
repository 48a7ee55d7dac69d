"""modern.py: model.GPT's interface, what each of its ideas promises, and the same text with and without a cache."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_model, save_model
from generate import KVCache, beam_search, generate
from model import GPT
from modern import Modern, ModernConfig, norm, rotary_table, rotate
from optim import Learner
from tokenizer import CharTokenizer
from train import TrainOptions
from utils import UserError

LETTERS = "\nabcdefghij"
SIZES = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, ngram=4, ngram_rows=101)
CPU = torch.device("cpu")


def fresh(seed=0, **sizes):
    """A model as it is before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Modern(ModernConfig(**{**SIZES, **sizes})).eval()


def make_modern(seed=0, noise=0.2, **sizes):
    """A tiny model in eval mode whose every parameter is random: in a fresh one half of them are 0."""
    model = fresh(seed, **sizes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed + 1)
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def tokens(batch, length, vocab_size=11, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def written(model, idx, n, seed=0, **settings):
    """The n new tokens of each row, (B, n)."""
    steps = list(generate(model, idx, n, generator=torch.Generator().manual_seed(seed), **settings))
    return torch.stack(steps, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The interface of model.GPT


def test_with_targets_come_the_logits_of_all_positions_and_without_those_of_the_last():
    model, idx = make_modern(), tokens(3, 5)
    logits, loss = model(idx, targets=idx)
    assert logits.shape == (3, 5, 11) and loss.shape == () and logits.dtype == loss.dtype == torch.float32
    last, none = model(idx)
    assert last.shape == (3, 1, 11) and none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])


def test_loss_is_the_mean_negative_log_probability():
    idx, targets = tokens(3, 5), tokens(3, 5, seed=1)
    logits, loss = make_modern()(idx, targets)
    log_probs = logits.log_softmax(dim=-1)
    by_hand = -sum(log_probs[b, t, targets[b, t]] for b in range(3) for t in range(5)) / 15
    torch.testing.assert_close(loss, by_hand)


def test_targets_of_minus_one_are_ignored():
    model, idx, targets = make_modern(), tokens(2, 4), tokens(2, 4, seed=1)
    targets[0, 1:] = targets[1] = -1  # only the very first position counts
    expected = F.cross_entropy(model(idx, targets)[0][0, :1], targets[0, :1])
    torch.testing.assert_close(model(idx, targets)[1], expected)


def test_targets_need_not_be_contiguous():
    model, text = make_modern(), tokens(3, 6)
    torch.testing.assert_close(model(text[:, :-1], text[:, 1:])[1], model(text[:, :-1], text[:, 1:].clone())[1])


def test_exactly_block_size_tokens_are_read_and_more_are_refused():
    assert make_modern()(tokens(1, 8))[0].shape == (1, 1, 11)
    with pytest.raises(ValueError, match="9 tokens do not fit in block_size 8"):
        make_modern()(tokens(1, 9))


def test_parameters_and_flops_by_hand():
    V, T, C, L = 11, 8, 16, 2
    layer = 4 * C * C + 2 * 4 * C * C + C  # attention's four matrices, the MLP's two, the token shift
    model = fresh()
    assert model.num_params() == 2 * V * C + 101 * C + L * layer
    assert model.num_params(embedding=False) == V * C + L * layer
    assert model.flops_per_token() == 6 * (V * C + L * layer) + 12 * L * C * T


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(n_embd=30, n_head=2), "n_embd 30 is not divisible by 2 x n_head 2.*in pairs; try n_embd 28"),  # odd heads
        (dict(n_embd=5, n_head=1), "n_embd 5 is not divisible by 2 x n_head 1.*try n_embd 4"),
        (dict(n_embd=2, n_head=12), "n_embd 2 is not divisible by 2 x n_head 12.*try n_embd 24"),
        (dict(n_embd=100, n_head=12), "n_embd 100 is not divisible.*try n_embd 96"),
        (dict(n_layer=0), "n_layer 0: must be"),
        (dict(n_layer=1.5), "n_layer 1.5: must be a whole number"),
        (dict(vocab_size=-5), "vocab_size -5: must be"),
        (dict(block_size=0), "block_size 0: must be"),
        (dict(n_head=0), "n_head 0: must be"),
        (dict(n_embd="16"), "n_embd '16': must be a whole number"),
        (dict(dropout=1.0), "dropout 1.0: must be at least 0 and below 1"),
        (dict(dropout=float("nan")), "dropout nan: must be"),
        (dict(ahead=0), "ahead 0: must be"),
        (dict(ahead=9), "ahead 9: must be at most block_size, 8"),
    ],
)
def test_numbers_that_make_no_model_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        ModernConfig(**{**SIZES, **wrong})


def test_the_size_that_the_error_names_makes_a_model():
    Modern(ModernConfig(**{**SIZES, "n_embd": 28}))
    Modern(ModernConfig(**{**SIZES, "n_embd": 24, "n_head": 12}))
    Modern(ModernConfig(**{**SIZES, "n_embd": 2, "n_head": 1}))  # the smallest there is


# ---------------------------------------------------------------------------------------------------------------------
# How it starts


@pytest.mark.parametrize("vocab_size", [2, 65, 1000])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_first_guess_is_that_all_tokens_are_equally_likely(vocab_size, training):
    model, idx = fresh(vocab_size=vocab_size, dropout=0.3).train(training), tokens(4, 8, vocab_size)
    logits, loss = model(idx, targets=idx.roll(1, 1))
    assert (logits == 0).all() and loss.item() == pytest.approx(math.log(vocab_size), rel=1e-6)


def test_every_layer_begins_as_doing_nothing():
    model, seen = fresh(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(tokens(3, 8))
    assert len(seen) == 2 and all(torch.equal(before, after) for before, after in seen)


def test_the_other_matrices_of_the_layers_start_uniform_and_the_table_for_reading_normal():
    for name, p in fresh(n_embd=128, n_head=4, vocab_size=200).state_dict().items():
        if name.endswith("c_proj.weight") or name.endswith("shift") or name == "lm_head.weight":
            assert (p == 0).all(), name
        else:
            std = {"wte.weight": 1.0, "ngrams.table.weight": 0.1}.get(name, 0.5 / math.sqrt(128))
            assert float(p.std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(p.mean())) < 0.05 * std, name
            assert (p.abs().max() <= math.sqrt(3) * std) == (name.startswith("layers.")), name


def test_reading_and_writing_have_a_table_each():
    model = fresh()
    assert model.lm_head.weight is not model.wte.weight


# ---------------------------------------------------------------------------------------------------------------------
# What each idea promises


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
def test_a_later_token_never_changes_an_earlier_logit(training):
    model = make_modern(block_size=12)
    idx = tokens(2, 12)

    def logits(idx):
        with torch.set_grad_enabled(training):
            return model(idx, targets=idx)[0].detach()

    before = logits(idx)
    for t in range(12):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = logits(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert ((after - before)[:, t:].abs().amax(dim=(0, 2)) > 1e-3).all(), "and every later logit does change"


def row_of(run, rows):
    """The row of a run of tokens, the first one first, in whole numbers that never overflow."""
    number = sum((token + 2) * 1_000_003**back for back, token in enumerate(reversed(run)))
    return number % (2**31 - 1) % rows


@pytest.mark.parametrize("vocab_size", [11, 50_257])
@pytest.mark.parametrize("n", [2, 5])
def test_every_run_of_tokens_has_the_row_of_its_number(vocab_size, n):
    model = fresh(ngram=n, ngram_rows=1009)
    idx = [-1] * (n - 1) + torch.randint(vocab_size, (20,), generator=torch.Generator().manual_seed(n)).tolist()
    rows = model.ngrams.rows(torch.tensor([idx]))
    assert rows.shape == (1, 20, n - 1)
    for t in range(20):
        runs = [idx[n - 1 + t - back : n + t] for back in range(1, n)]
        assert rows[0, t].tolist() == [row_of(run, 1009) for run in runs]


def test_runs_are_spread_evenly_over_the_rows():
    """Of all runs of up to three of 11 tokens, no more share a row than chance would have it."""
    runs = torch.tensor(list(itertools.product(range(11), repeat=3)))
    rows = fresh(ngram=3, ngram_rows=16384).ngrams.rows(runs)  # (1331, 1, 2): of two tokens and of three
    assert len(rows.unique()) > 0.9 * (11**2 + 11**3)


def test_what_a_token_reads_is_its_own_vector_and_those_of_the_runs_that_end_with_it():
    model, idx, n, seen = make_modern(), tokens(1, 8), 4, []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(idx)
    text = [-1] * (n - 1) + idx[0].tolist()
    for t in range(8):
        runs = [text[n - 1 + t - back : n + t] for back in range(1, n)]
        expected = model.wte.weight[idx[0, t]] + sum(model.ngrams.table.weight[row_of(run, 101)] for run in runs)
        torch.testing.assert_close(seen[0][0, t], norm(expected))


def test_without_ngrams_a_token_reads_its_own_vector_alone():
    model, idx, seen = make_modern(ngram=1), tokens(2, 8), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model(idx)[0].shape == (2, 1, 11) and not any("ngram" in name for name in model.state_dict())
    assert torch.equal(seen[0], norm(model.wte(idx)))


def scores(q, k, first, cos, sin):
    """The dot products (T, T) of T queries and keys (T, D) that stand at positions first, first + 1, ..."""
    where = slice(first, first + len(q))
    return rotate(q, cos[where], sin[where]) @ rotate(k, cos[where], sin[where]).T


@pytest.mark.parametrize("D", [2, 6, 64])
def test_the_scores_of_rotary_positions_depend_on_the_distance_alone(D):
    q, k = torch.randn(2, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = [table.double() for table in rotary_table(1000, D)]
    at_the_start = scores(q, k, 0, *tables)
    for first in (1, 7, 500, 960):
        torch.testing.assert_close(scores(q, k, first, *tables), at_the_start, rtol=0, atol=1e-3)
    same = q[:1].expand(40, D)  # one query everywhere: what differs is the distance
    by_distance = scores(same, same, 0, *tables)
    assert (
        by_distance[20, 20] == pytest.approx(float(q[0] @ q[0])) and (by_distance[20, :20] < by_distance[20, 20]).all()
    )


def test_turning_keeps_lengths_and_position_0_as_it_is():
    cos, sin = rotary_table(64, 8)
    x = torch.randn(2, 3, 64, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.allclose(turned[:, :, 1:], x[:, :, 1:])


def test_the_first_pair_turns_by_a_radian_a_token_and_the_last_by_a_thousandth():
    cos, sin = rotary_table(10, 8)
    point = torch.zeros(10, 8)
    point[:, 0] = point[:, 3] = 1.0  # with channels 4 and 7: the first and the last of four pairs
    turned, t = rotate(point, cos, sin), torch.arange(10.0)
    torch.testing.assert_close(turned[:, 0], (t).cos())
    torch.testing.assert_close(turned[:, 4].abs(), (t).sin().abs())
    torch.testing.assert_close(turned[:, 3], (t / 1000).cos())
    torch.testing.assert_close(turned[:, 7].abs(), (t / 1000).sin().abs())


def test_attention_at_another_place_in_the_window_is_the_same():
    attn = make_modern(block_size=64).layers[0].attn
    x, (cos, sin) = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), rotary_table(64, 8)
    expected = attn(x, cos[:8], sin[:8])
    for start in (1, 20, 56):
        where = slice(start, start + 8)
        torch.testing.assert_close(attn(x, cos[where], sin[where]), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(attn(x, cos[::8], sin[::8]), expected, atol=1e-3), "but not if they stand further apart"


@pytest.mark.parametrize("scale", [10, 1e6])
def test_attention_does_not_depend_on_how_large_queries_and_keys_are(scale):
    attn, x = make_modern().layers[0].attn, torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(8, 8)
    expected = attn(x, cos, sin)
    with torch.no_grad():
        attn.c_q.weight.mul_(scale)
        attn.c_k.weight.mul_(scale)
    torch.testing.assert_close(attn(x, cos, sin), expected, rtol=0, atol=1e-3)


def test_norm_gives_every_position_mean_0_and_variance_1():
    x = norm(5 + 3 * torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.mean(-1), torch.zeros(4, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(-1, unbiased=False), torch.ones(4, 7), rtol=0, atol=1e-4)


def attention_inputs(block, x):
    """What the block's attention reads of x."""
    cos, sin = rotary_table(x.size(1), block.attn.c_q.in_features // block.attn.n_head)
    seen = []
    hook = block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    block(x, cos, sin)
    hook.remove()
    return seen[0]


def test_token_shift_adds_its_share_of_the_token_before_and_of_no_other():
    block, x = make_modern().layers[0], torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    found, h = attention_inputs(block, x), norm(x)
    torch.testing.assert_close(found[:, 0], h[:, 0])  # nothing is before the first
    torch.testing.assert_close(found[:, 1:], h[:, 1:] + block.shift.detach() * h[:, :-1])
    for t in range(8):
        other = x.clone()
        other[:, t] = -other[:, t]
        changed = (attention_inputs(block, other) != found).any(dim=2).any(dim=0)
        assert changed.nonzero().flatten().tolist() == [p for p in (t, t + 1) if p < 8]


def test_the_mlp_bends_with_relu_squared():
    mlp, x = make_modern().layers[0].mlp, torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = (x @ mlp.c_fc.weight.T).clamp(min=0) ** 2 @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_no_logit_is_beyond_15_so_that_no_token_is_ever_called_certain(scale):
    model, idx = make_modern(), tokens(3, 8)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    logits, loss = model(idx, targets=idx.roll(1, 1))
    assert logits.abs().max() <= 15 and loss.item() <= 30 + math.log(11)
    if scale == 1.0:  # small logits pass as they are
        raw = 15 * torch.atanh(logits.double() / 15)
        assert (raw - logits)[logits.abs() < 1].abs().max() < 0.01


def test_no_parameter_is_a_bias_or_belongs_to_a_norm():
    names = {name.split(".", 2)[-1] for name, _ in fresh().named_parameters() if name.startswith("layers.")}
    attn = {f"attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")}
    assert names == {"shift", "mlp.c_fc.weight", "mlp.c_proj.weight", *attn}


# ---------------------------------------------------------------------------------------------------------------------
# With and without the cache


@pytest.mark.parametrize("parts", [[1] * 8, [3, 5], [8], [2, 1, 4, 1]], ids=str)
def test_reading_in_parts_through_the_cache_gives_the_logits_of_reading_whole(parts):
    model, idx, end = make_modern(), tokens(3, 8), 0
    cache = KVCache(model.config)
    for part in parts:
        end += part
        logits, _ = model(idx[:, end - part : end], cache=cache)
        assert cache.length == end
        torch.testing.assert_close(logits, model(idx[:, :end])[0], rtol=0, atol=1e-5)


def test_the_cache_holds_block_size_tokens_and_no_more():
    model = make_modern()
    cache = KVCache(model.config)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match="9 tokens do not fit in block_size 8"):
        model(tokens(1, 1), cache=cache)


@pytest.mark.parametrize("parts", [[5], [1, 3, 1]], ids=str)
def test_select_makes_row_i_what_row_rows_i_was_token_shift_included(parts):
    model, idx = make_modern(), tokens(3, 5)
    cache, rows = KVCache(model.config), torch.tensor([2, 0, 2, 1])
    for part in idx.split(parts, dim=1):
        model(part, cache=cache)
    cache.select(rows)
    new = tokens(4, 2, seed=1)
    whole = torch.cat([idx[rows], new], dim=1)
    torch.testing.assert_close(model(new, cache=cache)[0], model(whole)[0], rtol=0, atol=1e-5)


def test_a_cleared_cache_remembers_nothing():
    model, cache = make_modern(), KVCache(ModernConfig(**SIZES))
    model(tokens(2, 6), cache=cache)
    cache.clear()
    idx = tokens(2, 3, seed=1)
    torch.testing.assert_close(model(idx, cache=cache)[0], model(idx)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [1, 5, 8, 20], ids="prompt{}".format)
def test_cached_and_uncached_decoding_write_the_same_tokens(block_size, prompt):
    """40 tokens, so that even the largest window is left behind several times."""
    model, idx = make_modern(block_size=block_size), tokens(3, prompt)
    assert torch.equal(written(model, idx, 40), written(model, idx, 40, use_cache=False))


def test_every_row_is_written_as_if_it_were_alone():
    model, idx = make_modern(), tokens(3, 4)
    together = written(model, idx, 20, temperature=0)
    assert torch.equal(together, torch.cat([written(model, row[None], 20, temperature=0) for row in idx]))


@pytest.mark.parametrize("num_beams", [1, 3, 6])
@pytest.mark.parametrize("length", [5, 20], ids=["in the window", "past block_size"])
def test_beam_search_finds_the_same_with_and_without_the_cache(num_beams, length):
    model, idx = make_modern(), tokens(1, 3)
    cached, plain = (beam_search(model, idx, length, num_beams, use_cache=use) for use in (True, False))
    assert [h.tokens for h in cached] == [h.tokens for h in plain] and len(cached) == num_beams
    assert [h.score for h in cached] == pytest.approx([h.score for h in plain], abs=1e-4)
    if num_beams == 1:
        assert cached[0].tokens == written(model, idx, length, temperature=0)[0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Saved and loaded


@pytest.fixture
def saved(tmp_path):
    """A model and the directory that holds it."""
    model = make_modern(dropout=0.1)
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    return model, tmp_path


def refused(path, *words):
    with pytest.raises(UserError) as error:
        load_model(str(path))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message and len(message) < 500, message


def test_a_saved_model_comes_back_exactly(saved):
    model, directory = saved
    for loaded, tokenizer in (load_model(str(directory)), (GPT.from_pretrained(str(directory)), None)):
        assert isinstance(loaded, Modern) and loaded.config == model.config
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
        assert tokenizer is None or tokenizer.chars == list(LETTERS)
    idx = tokens(2, 8)
    assert torch.equal(loaded.eval()(idx)[0], model(idx)[0])


def test_its_config_json_says_what_it_is_so_that_nobody_takes_it_for_a_gpt2(saved):
    model, directory = saved
    config = json.loads((directory / "config.json").read_text())
    sizes = asdict(model.config)
    assert sizes.pop("ahead") == 1  # of learning alone
    assert config == {"model_type": "nanogpt-modern", **sizes}


def test_what_foretells_further_tokens_is_not_saved(tmp_path):
    model, idx = make_modern(ahead=3), tokens(2, 8)
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    loaded, _ = load_model(str(tmp_path))
    assert loaded.config.ahead == 1 and set(model.state_dict()) - set(loaded.state_dict()) == {"ahead.weight"}
    assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_a_model_saved_before_there_were_ngrams_has_none(tmp_path):
    model = make_modern(ngram=1)
    save_model(str(tmp_path), model, CharTokenizer(LETTERS))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if "ngram" not in name}))
    loaded, idx = load_model(str(tmp_path))[0].eval(), tokens(2, 8)
    assert loaded.config.ngram == 1 and torch.equal(loaded(idx)[0], model(idx)[0])


def test_a_model_that_computed_in_bfloat16_is_saved_in_float32(tmp_path):
    save_model(str(tmp_path), make_modern().bfloat16(), CharTokenizer(LETTERS))
    assert all(p.dtype == torch.float32 for p in load_model(str(tmp_path))[0].parameters())


def test_a_smaller_block_size_crops_the_window_and_a_larger_one_is_refused(saved):
    model, directory = saved
    small, _ = load_model(str(directory), block_size=5, dropout=0.0)
    assert (small.config.block_size, small.config.dropout) == (5, 0.0)
    idx = tokens(2, 5)
    torch.testing.assert_close(small.eval()(idx, targets=idx)[0], model(idx, targets=idx)[0])
    with pytest.raises(ValueError, match="block_size 5"):
        small(tokens(2, 6))
    with pytest.raises(UserError, match=r"--block_size 9: .* knows only 8 positions"):
        load_model(str(directory), block_size=9)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(n_layer=...), "'n_layer'"),
        (dict(n_embd="16"), "n_embd '16': must be a whole number"),
        (dict(n_embd=None), "n_embd None: must be"),
        (dict(n_layer=1.5), "n_layer 1.5: must be a whole number"),
        (dict(n_head=16), "n_embd 16 is not divisible by 2 x n_head 16"),
        (dict(dropout="much"), "is no complete config"),
        (dict(block_size=-1), "block_size -1: must be"),
        (dict(n_layer=3), "its weights do not fit its own config (they are those of 2 layers, not of 3)"),
        (dict(n_layer=9000), "its weights do not fit its own config (they are those of 2 layers, not of 9000)"),
        (dict(block_size=10**12), "its config has a block_size of 1000000000000, for which"),
        (dict(n_layer=1), "its weights do not fit its own config"),
        (dict(n_embd=32), "its weights do not fit its own config"),
        (dict(vocab_size=12), "its weights do not fit its own config"),
        (dict(ngram_rows=102), "config (ngrams.table.weight is (101, 16), not (102, 16))"),
        (dict(ngram=1), "its weights do not fit its own config"),
        (dict(ngram=0), "ngram 0: must be a whole number"),
        (dict(ngram=2_000_000), "ngram 2000000: must be at most 16"),
        (dict(vocab_size=5), "its tokenizer has 11 tokens, its model only 5"),
        (dict(model_type="gpt2"), "is no complete GPT-2 config"),
        (dict(model_type="llama"), "is a model of type 'llama'"),
        (dict(model_type=...), "is a model of type None"),
    ],
    ids=str,
)
def test_a_damaged_config_is_refused_in_one_line(saved, change, words):
    path = saved[1] / "config.json"
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    refused(saved[1], words)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_was_cut_off_is_refused_in_one_line(saved, file):
    path = saved[1] / file
    path.write_bytes(path.read_bytes()[:50])
    refused(saved[1], file)


# ---------------------------------------------------------------------------------------------------------------------
# Training it


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(dropout):
    idx, results, blocks_run = tokens(4, 8), [], []
    for on in (False, True):
        model, runs = make_modern(dropout=dropout).train(), []
        model.gradient_checkpointing = on
        model.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        _, loss = model(idx, targets=idx.roll(1, 1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        blocks_run.append(len(runs))
    assert blocks_run == [1, 2], "with it, each block runs again in the backward pass"
    assert all(map(torch.equal, *results))


def test_it_learns_from_further_tokens_too_and_its_loss_is_that_of_the_next():
    model, idx, targets, seen = make_modern(ahead=3), tokens(2, 8), tokens(2, 8, seed=1), []
    expected = model(idx, targets)[1]
    model.train().ahead_share.fill_(0.25)
    model.ahead.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = model(idx, targets)[1]
    assert torch.equal(loss, expected)
    log_probs = (seen[0] @ model.ahead.weight.T).view(2, 8, 2, 11).log_softmax(dim=-1)
    places = [(b, t, k) for b in range(2) for t in range(8) for k in (1, 2) if t + k < 8]
    further = -sum(log_probs[b, t, k - 1, targets[b, t + k]] for b, t, k in places) / len(places)
    torch.testing.assert_close(model.further_loss(seen[0], targets), further)
    weights = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    model.ahead_share.zero_()
    of_next = torch.autograd.grad(model(idx, targets)[1], weights)
    of_further = torch.autograd.grad(further, weights, allow_unused=True)
    for ours, a, b in zip(found, of_next, of_further):
        torch.testing.assert_close(ours, a + (0 if b is None else 0.25 * b))


def test_where_no_token_is_further_the_next_one_is_all_there_is():
    model, idx = make_modern(ahead=3).train(), tokens(4, 1)
    loss = model(idx, tokens(4, 1, seed=1))[1]
    loss.backward()
    assert loss.isfinite() and model.wte.weight.grad.isfinite().all() and model.ahead.weight.grad is None


@pytest.mark.parametrize("ahead", [1, 4])
def test_every_parameter_takes_part_in_the_loss(ahead):
    model, idx = make_modern(ahead=ahead).train(), tokens(4, 8)
    model(idx, targets=idx.roll(1, 1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_dropout_has_its_rate_wherever_model_py_has_it():
    model = make_modern(dropout=0.3, n_embd=64).train()
    zeros = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Dropout":
            module.register_forward_hook(
                lambda _, inputs, output, name=name: zeros.update({name: float((output == 0).float().mean())})
            )
    torch.manual_seed(0)
    idx = tokens(16, 8)
    first = model(idx)[0]
    layers = [f"layers.{i}.{part}" for i in range(2) for part in ("attn.resid_dropout", "mlp.dropout")]
    assert zeros == {name: pytest.approx(0.3, abs=0.03) for name in ("drop", *layers)}
    assert not torch.equal(model(idx)[0], first) and torch.equal(model.eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("how", ["copy", "autocast"])
def test_in_bfloat16_the_logits_are_those_of_float32_to_3_percent(how):
    model, idx = make_modern(), tokens(4, 8)
    expected, expected_loss = model(idx, targets=idx.roll(1, 1))
    if how == "copy":
        logits, loss = make_modern().bfloat16()(idx, targets=idx.roll(1, 1))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(idx, targets=idx.roll(1, 1))
    assert logits.dtype == loss.dtype == torch.float32
    assert (logits - expected).norm() < 0.03 * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.01)


@pytest.mark.parametrize("how", ["copy", "autocast"])
def test_in_bfloat16_it_writes_through_the_cache_past_block_size(how):
    model = make_modern()
    if how == "copy":
        text = written(model.bfloat16(), tokens(2, 3), 20)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = written(model, tokens(2, 3), 20)
    assert text.shape == (2, 20) and text.min() >= 0 and text.max() < 11


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9's Muon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_small_batch_is_learned_by_heart(dtype):
    torch.manual_seed(0)
    model = Modern(ModernConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32)).train()
    text = torch.stack([torch.randperm(30)[:17] for _ in range(4)])
    text[:, 0] = torch.arange(4)  # from its first token on, each row can be told from the others
    options = TrainOptions(arch="modern", batch_size=4, block_size=16, learning_rate=1e-2, weight_decay=0.0)
    learner = Learner(model, options, CPU, dtype)
    for _ in range(100):
        loss, _ = learner.step(text[:, :-1], text[:, 1:], 1.0)
    assert loss < 0.05


def test_a_model_is_a_module_like_any_other():
    """Deep copies, moves and state dicts carry no table of angles along, and need none."""
    model = make_modern()
    assert isinstance(model, nn.Module) and not {"cos", "sin", "ngrams.factors"} & set(model.state_dict())
    assert {name for name, _ in model.named_buffers()} == {"cos", "sin", "ngrams.factors"}
