"""model.py is GPT-2: the same numbers as Hugging Face's, causal, initialised as published, and able to learn."""

import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import model as model_file
from checkpoint import TRANSPOSED, save_model
from model import GPT, GPTConfig, attention, attention_written_out
from tokenizer import CharTokenizer

TEXT = 'The "miller" said:\n\n  "Dry."\tÄpfel & Öl, naïve café — 3 € … 東京 🙂\r\n'


def tokens(batch, length, vocab_size, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# The same as Hugging Face's GPT2LMHeadModel


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A random Hugging Face GPT-2 in which no bias is 0 and no LayerNorm is the identity, and its directory."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    directory = tmp_path_factory.mktemp("hugging_face")
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.fixture
def both(hugging_face):
    """Their model and ours, on the same weights and in eval mode."""
    theirs, directory = hugging_face
    return theirs, GPT.from_pretrained(str(directory)).eval()


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
def test_logits_equal_hugging_faces_on_its_weights(both, training):
    """Either way, because attention takes another kernel where gradients are wanted."""
    theirs, ours = both
    idx = tokens(3, 16, 61)
    with torch.set_grad_enabled(training):
        difference = ours(idx, targets=idx)[0] - theirs(idx).logits
    assert difference.abs().max() <= 1e-4


def test_loss_equals_hugging_faces(both):
    theirs, ours = both
    idx = tokens(3, 16, 61)
    _, loss = ours(idx[:, :-1], targets=idx[:, 1:])
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, rtol=0, atol=1e-5)


def test_gradient_of_every_parameter_equals_hugging_faces(both):
    theirs, ours = both
    idx = tokens(3, 16, 61)
    theirs.zero_grad()
    theirs(idx, labels=idx).loss.backward()
    ours(idx[:, :-1], targets=idx[:, 1:])[1].backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        found = p.grad.t() if name.endswith(TRANSPOSED) else p.grad
        assert found.abs().max() > 0, f"{name} takes no part in the loss"
        assert (found - expected[name]).abs().max() <= 1e-4, name


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_what_we_save_and_gives_the_same_logits(make_model, tmp_path, bias):
    ours = make_model(vocab_size=len(set(TEXT)), bias=bias)
    save_model(tmp_path, ours, CharTokenizer.from_text(TEXT))
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # no missing, unexpected or misshapen weights
    idx = tokens(3, 8, ours.config.vocab_size)
    difference = ours(idx, targets=idx)[0] - theirs.eval()(idx).logits
    assert difference.abs().max() <= 1e-4


def test_transformers_reads_the_dropout_that_we_save(make_model, tmp_path):
    save_model(tmp_path, make_model(vocab_size=2, dropout=0.3), CharTokenizer("ab"))
    config = GPT2LMHeadModel.from_pretrained(tmp_path).config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize("text", [TEXT, "", " ", "\n", "  said  .\n\n", '"Dry ," 東京\t🙂'])
def test_auto_tokenizer_reads_our_tokenizer_and_returns_the_text_exactly(make_model, tmp_path, text):
    ours = CharTokenizer.from_text(TEXT)
    save_model(tmp_path, make_model(vocab_size=ours.vocab_size), ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text).tolist()
    assert theirs.decode(ids) == text


def test_auto_tokenizer_knows_how_long_a_text_may_be(make_model, tmp_path):
    save_model(tmp_path, make_model(vocab_size=2, block_size=8), CharTokenizer("ab"))
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 8


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("function", [attention, attention_written_out])
@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("T, S", [(7, 7), (3, 7), (1, 7), (1, 1), (600, 600)])
def test_attention_equals_the_formula(T, S, training, function):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, T, 5, dtype=torch.float64, generator=generator).requires_grad_(training)
    k, v = torch.randn(2, 2, 3, S, 5, dtype=torch.float64, generator=generator)
    scores = q @ k.transpose(-2, -1) / math.sqrt(5)
    scores = scores.masked_fill(~torch.ones(T, S).bool().tril(S - T), float("-inf"))
    torch.testing.assert_close(function(q, k, v), F.softmax(scores, dim=-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 7), (2, 1, 3, 7)], ids=str)
@pytest.mark.parametrize("function", [attention, attention_written_out])
def test_a_mask_says_where_one_may_look(shape, function):
    q, (k, v) = torch.randn(2, 3, 3, 5), torch.randn(2, 2, 3, 7, 5)
    mask = torch.where(torch.rand(shape) < 0.5, 0.0, float("-inf"))
    mask[..., 0] = 0.0  # somewhere
    weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(5) + mask, dim=-1)
    assert (weights == 0).any()
    torch.testing.assert_close(function(q, k, v, 0.0, mask), weights @ v)


def test_on_an_apple_gpu_the_formula_is_written_out(monkeypatch):
    apple = SimpleNamespace(type="mps")
    q = SimpleNamespace(size=lambda _: 7, device=apple, dtype=torch.float32, requires_grad=False)
    monkeypatch.setattr(model_file, "attention_written_out", lambda *inputs: inputs)
    assert attention(q, q, q, 0.2, "mask") == (q, q, q, 0.2, "mask")


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
def test_a_later_token_never_changes_an_earlier_logit(make_model, training):
    model = make_model(block_size=12)
    idx = tokens(2, 12, 11)

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


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the shapes


def test_with_targets_come_the_logits_of_all_positions(make_model):
    idx = tokens(3, 5, 11)
    logits, loss = make_model()(idx, targets=idx)
    assert logits.shape == (3, 5, 11) and loss.shape == ()


def test_without_targets_come_the_logits_of_the_last_position_only(make_model):
    model, idx = make_model(), tokens(3, 5, 11)
    logits, loss = model(idx)
    assert logits.shape == (3, 1, 11) and loss is None
    torch.testing.assert_close(logits[:, 0], model(idx, targets=idx)[0][:, -1])


def test_loss_is_the_mean_negative_log_probability(make_model):
    idx, targets = tokens(3, 5, 11), tokens(3, 5, 11, seed=1)
    logits, loss = make_model()(idx, targets)
    log_probs = logits.log_softmax(dim=-1)
    by_hand = -sum(log_probs[b, t, targets[b, t]] for b in range(3) for t in range(5)) / 15
    torch.testing.assert_close(loss, by_hand)


def test_targets_of_minus_one_are_ignored(make_model):
    model, idx, targets = make_model(), tokens(2, 4, 11), tokens(2, 4, 11, seed=1)
    targets[0, 1:] = targets[1] = -1  # only the very first position counts
    expected = F.cross_entropy(model(idx, targets)[0][0, :1], targets[0, :1])
    torch.testing.assert_close(model(idx, targets)[1], expected)


def test_targets_need_not_be_contiguous(make_model):
    model, text = make_model(), tokens(3, 6, 11)
    torch.testing.assert_close(model(text[:, :-1], text[:, 1:])[1], model(text[:, :-1], text[:, 1:].clone())[1])


def test_more_tokens_than_block_size_are_refused(make_model):
    with pytest.raises(ValueError, match="9 tokens do not fit in block_size 8"):
        make_model(block_size=8)(tokens(1, 9, 11))


def test_exactly_block_size_tokens_are_read(make_model):
    assert make_model(block_size=8)(tokens(1, 8, 11))[0].shape == (1, 1, 11)


# ---------------------------------------------------------------------------------------------------------------------
# The configuration


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(n_layer=0), "n_layer 0: must be"),
        (dict(vocab_size=-5), "vocab_size -5: must be"),
        (dict(block_size=0), "block_size 0: must be"),
        (dict(n_embd=0), "n_embd 0: must be"),
        (dict(n_head=0), "n_head 0: must be"),
        (dict(n_layer=1.5), "n_layer 1.5: must be a whole number"),
        (dict(n_embd=100, n_head=12), "n_embd 100 is not divisible by n_head 12.*try n_embd 96"),
        (dict(n_embd=4, n_head=12), "n_embd 4 is not divisible by n_head 12.*try n_embd 12"),
        (dict(dropout=1.0), "dropout 1.0: must be at least 0 and below 1"),
        (dict(dropout=-0.1), "dropout -0.1: must be"),
        (dict(dropout=float("nan")), "dropout nan: must be"),
    ],
)
def test_numbers_that_make_no_model_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**wrong)


def test_default_config_has_the_parameters_of_the_smallest_gpt2():
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    assert model.num_params(embedding=False) == 124_439_808 - 1024 * 768


def test_flops_per_token_by_hand(make_model):
    V, T, C, L = 11, 8, 16, 2
    layer = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C  # qkv, proj, MLP, 2 norms
    expected = 6 * (V * C + L * layer + 2 * C) + 12 * L * C * T
    assert make_model(vocab_size=V, block_size=T, n_embd=C, n_layer=L).flops_per_token() == expected


def test_without_bias_no_parameter_is_a_bias(make_model):
    assert not [name for name, _ in make_model(bias=False).named_parameters() if name.endswith("bias")]


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=100, n_layer=4, n_head=4, n_embd=128))


def test_matrices_start_normal_as_in_gpt2(fresh):
    for name, p in fresh.state_dict().items():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert float(p.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(p.mean())) < 0.05 * std, name


def test_vectors_start_as_the_identity(fresh):
    for name, p in fresh.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_a_fresh_model_finds_all_tokens_about_equally_likely(fresh):
    idx = tokens(4, 64, 100)
    assert fresh(idx, targets=idx.roll(1, 1))[1].item() == pytest.approx(math.log(100), rel=0.02)


def test_embedding_and_head_are_one_tensor(fresh):
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


# ---------------------------------------------------------------------------------------------------------------------
# Dropout and gradient checkpointing


def test_dropout_is_off_in_eval_and_on_in_training(make_model):
    model, idx = make_model(dropout=0.5), tokens(2, 8, 11)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_has_its_rate_wherever_gpt2_has_it(make_model, monkeypatch):
    model = make_model(dropout=0.3, n_embd=64).train()
    zeros, attention_rates = {}, []
    for name, module in model.named_modules():
        if type(module).__name__ == "Dropout":
            module.register_forward_hook(
                lambda _, inputs, output, name=name: zeros.update({name: (output == 0).float().mean()})
            )

    def noted(q, k, v, dropout, mask):
        attention_rates.append(dropout)
        return attention(q, k, v, dropout, mask)

    monkeypatch.setattr(model_file, "attention", noted)
    torch.manual_seed(0)
    model(tokens(16, 8, 11))
    layers = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.resid_dropout", "mlp.dropout")]
    assert set(zeros) == {"transformer.drop", *layers}
    assert all(float(rate) == pytest.approx(0.3, abs=0.03) for rate in zeros.values()), zeros
    assert attention_rates == [0.3, 0.3]
    model.eval()(tokens(16, 8, 11))
    assert attention_rates == [0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_treats_all_channels_alike_and_keeps_the_mean(make_model, rate):
    drop = make_model(dropout=rate).transformer.drop.train()
    torch.manual_seed(0)
    output = drop(torch.ones(20_000, 16))
    assert (output == 0).float().mean(dim=0).tolist() == pytest.approx([rate] * 16, abs=0.02)
    assert output[output != 0].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=0.02)


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
def test_attention_drops_its_weights_and_scales_up_the_others(training):
    """With the identity as values, the output of attention is its weights."""
    q, k = torch.randn(2, 500, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    v = torch.eye(8).expand(500, 2, 8, 8)
    q.requires_grad_(training)
    torch.manual_seed(0)
    dropped, weights = attention(q, k, v, 0.25).detach(), attention(q, k, v).detach()
    kept = dropped != 0
    assert kept[weights > 0].float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_model, dropout):
    idx, results, blocks_run = tokens(4, 8, 11), [], []
    for on in (False, True):
        model = make_model(dropout=dropout).train()
        model.gradient_checkpointing = on
        runs = []
        model.transformer.h[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        _, loss = model(idx, targets=idx.roll(1, 1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        blocks_run.append(len(runs))
    assert blocks_run == [1, 2], "with it, each block runs again in the backward pass"
    assert all(map(torch.equal, *results))


# ---------------------------------------------------------------------------------------------------------------------
# It learns, and it stands alone


def test_one_small_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32))
    text = torch.stack([torch.randperm(30)[:17] for _ in range(4)])
    text[:, 0] = torch.arange(4)  # from its first token on, each row can be told from the others
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        _, loss = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_model_py_works_copied_alone_into_an_empty_directory(tmp_path):
    shutil.copy(model_file.__file__, tmp_path)
    program = (
        "import torch; from model import *; print(*GPT(GPTConfig(8, 5, 1, 1, 4))(torch.ones(1, 3).long())[0].shape)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "1", "5"]), done.stderr
