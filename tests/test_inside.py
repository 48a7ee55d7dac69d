"""inside.py: what the hooks record is what the model does, by Hugging Face's own records and by brute force."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

import inside
from checkpoint import save_model
from lighten import has_float16, lighten
from modern import Modern, ModernConfig
from tokenizer import CharTokenizer

needs_float16 = pytest.mark.skipif(not has_float16(), reason="float16 weights need an x86 CPU with AVX2")
SIZES = dict(block_size=16, vocab_size=11, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture(params=["gpt", "modern"])
def model(request, make_model):
    """A tiny model of either architecture whose every weight is random."""
    if request.param == "gpt":
        return make_model(**SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Modern(ModernConfig(**SIZES))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(B, T, seed=0):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


def test_attention_and_stream_are_what_hugging_face_records(make_model, tmp_path):
    ours, idx = make_model(**SIZES), tokens(2, 9)
    save_model(tmp_path, ours, CharTokenizer("abcdefghijk"))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(idx, output_attentions=True, output_hidden_states=True)
    seen = inside.look(ours, idx)
    assert len(seen.attention) == 3 and len(seen.stream) == 4
    for mine, other in zip(seen.attention, expected.attentions):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    for mine, other in zip(seen.stream[:-1], expected.hidden_states):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    normed = ours.transformer.ln_f(seen.stream[-1])  # Hugging Face's last one is after ln_f
    torch.testing.assert_close(normed, expected.hidden_states[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.logits, expected.logits, atol=1e-4, rtol=0)


def test_weights_times_values_is_what_each_head_hands_over(model):
    idx = tokens(2, 9)
    values = []

    def record(attn, inputs):
        x = inputs[0]
        v = attn.c_attn(x)[..., 64:] if attn.c_attn is not None else attn.c_v(x)
        values.append(v.view(2, 9, 4, 8).transpose(1, 2))

    handles = [block.attn.register_forward_pre_hook(record) for block in inside.blocks(model)]
    with inside.hooked(handles):
        seen = inside.look(model, idx)
    assert len(values) == len(seen.heads) == 3
    for weights, v, handed in zip(seen.attention, values, seen.heads):
        torch.testing.assert_close(weights @ v, handed, atol=1e-5, rtol=0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert weights.triu(1).abs().max() == 0


def test_the_stream_grows_by_what_attention_and_the_mlp_add(model):
    seen = inside.look(model, tokens(2, 9))
    for i, block in enumerate(inside.blocks(model)):
        gathered = block.attn.c_proj(seen.heads[i].transpose(1, 2).reshape(2, 9, 32))
        thought = block.mlp.c_proj(seen.neurons[i])
        torch.testing.assert_close(seen.stream[i] + gathered + thought, seen.stream[i + 1], atol=1e-5, rtol=0)
        assert seen.neurons[i].shape == (2, 9, 128)


def test_after_the_last_layer_the_lens_shows_the_models_own_logits(model):
    idx = tokens(2, 9)
    seen = inside.look(model, idx)
    with torch.no_grad():
        logits, _ = model(idx, idx)
    torch.testing.assert_close(seen.logits, logits)
    torch.testing.assert_close(inside.lens(model, seen.stream[-1]), logits)
    assert (inside.lens(model, seen.stream[0]) - logits).abs().max() > 0.1


def test_looking_changes_nothing(model):
    idx = tokens(2, 9)
    model.train()
    before = model(idx, idx)[0]
    inside.look(model, idx)
    with inside.ablated(model, [(0, 0)]):
        pass
    assert model.training
    assert torch.equal(model(idx, idx)[0], before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_hooks_are_gone_after_an_error_too(model):
    with pytest.raises(ValueError, match="block_size"):
        inside.look(model, tokens(1, 17))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_head_left_out_is_a_head_whose_output_weights_are_zero(model):
    idx = tokens(2, 9)
    with torch.no_grad():
        with inside.ablated(model, [(1, 2), (0, 0)]):
            found = model(idx, idx)[0]
        for layer, head in [(1, 2), (0, 0)]:
            inside.blocks(model)[layer].attn.c_proj.weight[:, 8 * head : 8 * head + 8] = 0
        expected = model(idx, idx)[0]
    torch.testing.assert_close(found, expected)


def test_the_loss_without_each_head(model):
    x, y = tokens(3, 9), tokens(3, 9, seed=1)
    harm = inside.loss_without_heads(model, x, y)
    assert harm.shape == (3, 4)
    with torch.no_grad():
        whole = model(x, y)[1]
        with inside.ablated(model, [(2, 1)]):
            without = model(x, y)[1]
    assert float(harm[2, 1]) == pytest.approx(float(without - whole), abs=1e-6)
    assert harm.abs().min() > 0  # of random weights, every head has some effect


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0)])
def test_a_head_that_there_is_not_cannot_be_left_out(model, head):
    with pytest.raises(IndexError, match="there is no head"), inside.ablated(model, [head]):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_repeated_text_is_random_and_then_the_same_again():
    text = inside.repeated(torch.tensor([3, 5, 7]), 20, rows=4)
    assert text.shape == (4, 40) and torch.equal(text[:, :20], text[:, 20:])
    assert set(text.flatten().tolist()) == {3, 5, 7} and not torch.equal(text[0], text[1])
    assert torch.equal(text, inside.repeated(torch.tensor([3, 5, 7]), 20, rows=4))


def test_induction_and_previous_token_scores_by_brute_force(model):
    vocabulary = torch.arange(11)
    found = inside.induction_scores(model, vocabulary, length=6, rows=3, seed=5)
    seen = inside.look(model, inside.repeated(vocabulary, 6, rows=3, seed=5))
    for layer in range(3):
        for head in range(4):
            weights = seen.attention[layer][:, head]
            induction = [float(weights[row, t, t - 6 + 1]) for row in range(3) for t in range(6, 12)]
            previous = [float(weights[row, t, t - 1]) for row in range(3) for t in range(1, 12)]
            assert float(found[layer, head]) == pytest.approx(sum(induction) / len(induction), abs=1e-6)
            scores = inside.previous_token_scores(seen)
            assert float(scores[layer, head]) == pytest.approx(sum(previous) / len(previous), abs=1e-6)


def test_a_head_that_always_looks_behind_the_last_time_scores_one(model, monkeypatch):
    def perfect(_model, idx):
        weights = torch.zeros(len(idx), 1, 12, 12)
        for t in range(12):
            weights[:, :, t, max(0, t - 5)] = 1  # 6 tokens back stands the same one, 5 back what followed it
        return inside.Inside([weights], [], [], [], None)

    monkeypatch.setattr(inside, "look", perfect)
    assert inside.induction_scores(model, torch.arange(11), length=6).tolist() == [[1.0]]


def test_a_neurons_top_contexts_are_the_strongest_of_each_row():
    activations = torch.tensor([[0.1, 0.9, 0.2], [3.0, 2.9, 0.0], [-1.0, -2.0, -3.0]])
    assert inside.top_contexts(activations, most=2) == [(1, 0), (0, 1)]
    assert inside.top_contexts(activations, most=9) == [(1, 0), (0, 1), (2, 0)]


def test_two_dimensions_are_the_principal_components():
    vectors = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 3, 1, 1, 1, 1]) + 7
    points, shares = inside.two_dimensions(vectors)
    values, directions = torch.linalg.eigh(torch.cov(vectors.T))  # ascending
    expected = (vectors - vectors.mean(0)) @ directions[:, [-1, -2]]
    torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-3, rtol=0)  # a direction has two signs
    torch.testing.assert_close(shares, values[[-1, -2]] / values.sum())


@pytest.mark.parametrize("how", ["bfloat16", pytest.param("float16", marks=needs_float16)])
def test_a_lightened_model_can_be_looked_into(model, how):
    idx = tokens(2, 9)
    seen, light = inside.look(model, idx), inside.look(lighten(model, how), idx)
    for a, b in zip(seen.attention, light.attention):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0)
    assert F.cosine_similarity(seen.logits.flatten(), light.logits.flatten(), dim=0) > 0.99
