"""Reading a trained model from outside: hooks record what flows through it; the model's code knows nothing of them.

    seen = look(model, idx)                      # one forward pass over idx (B, T)
    seen.attention[layer][:, head]               # (B, T, T): who looks at whom
    lens(model, seen.stream[layer])              # (B, T, V): what the model would say if it ended there
    with ablated(model, [(layer, head)]): ...    # the same model without that head

For both architectures. Shapes as in model.py: B sequences, T tokens, C channels, H heads of D channels, V vocabulary.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modern import CausalSelfAttention as ModernAttention
from modern import Modern, norm, rotate


@dataclass
class Inside:
    """What one forward pass did, a tensor for each layer."""

    attention: list  # (B, H, T, T): weights, row = who looks; each row sums to 1
    heads: list  # (B, H, T, D): what each head hands over, before c_proj mixes the heads
    neurons: list  # (B, T, 4C): the MLP's hidden layer, after the bend
    stream: list  # (B, T, C): the residual stream before the first layer and after each, n_layer + 1 tensors
    logits: torch.Tensor  # (B, T, V)


def blocks(model):
    """The model's layers, in order."""
    return model.layers if isinstance(model, Modern) else model.transformer.h


@contextlib.contextmanager
def hooked(handles):
    """Remove the hooks again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model):
    """Dropout off, and no gradients, for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def look(model, idx):
    """Run the model over idx (B, T) int64 and record what it did. Returns an Inside."""
    seen = Inside([], [], [], [], None)

    def before_first(block, inputs):
        seen.stream.append(inputs[0])

    def after_block(block, inputs, output):
        seen.stream.append(output)

    def before_attention(attn, inputs):
        seen.attention.append(attention_weights(*queries_and_keys(attn, *inputs)))

    def before_head_mixing(c_proj, inputs):
        B, T, _ = inputs[0].shape
        seen.heads.append(inputs[0].view(B, T, model.config.n_head, -1).transpose(1, 2))

    def before_narrowing(c_proj, inputs):
        seen.neurons.append(inputs[0])

    handles = [blocks(model)[0].register_forward_pre_hook(before_first)]
    for block in blocks(model):
        handles.append(block.register_forward_hook(after_block))
        handles.append(block.attn.register_forward_pre_hook(before_attention))
        handles.append(block.attn.c_proj.register_forward_pre_hook(before_head_mixing))
        handles.append(block.mlp.c_proj.register_forward_pre_hook(before_narrowing))
    with hooked(handles), evaluating(model):
        seen.logits, _ = model(idx, last=idx.size(1))
    return seen


def queries_and_keys(attn, x, *extra):
    """The queries and keys (B, H, T, D) that an attention layer makes of its input x (B, T, C).

    extra: what its forward takes beside x: a modern model's cos and sin, and no cache.
    """
    B, T, C = x.shape
    q, k = (attn.c_q(x), attn.c_k(x)) if attn.c_attn is None else attn.c_attn(x).split(C, dim=2)[:2]  # (B, T, C)
    q, k = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in (q, k))
    return (rotate(norm(q), *extra[:2]), rotate(norm(k), *extra[:2])) if isinstance(attn, ModernAttention) else (q, k)


def attention_weights(q, k):
    """softmax(q k^T / sqrt(D)) with a causal mask: (B, H, T, D) twice -> (B, H, T, T). model.attention's formula."""
    T, D = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    return F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)


def lens(model, x):
    """What the model would say if it ended here (nostalgebraist 2020, "interpreting GPT: the logit lens").

    x (B, T, C), the residual stream anywhere -> logits (B, T, V).
    """
    with evaluating(model):
        if isinstance(model, Modern):
            return 15 * torch.tanh(model.lm_head(norm(x)).float() / 15)
        return model.lm_head(model.transformer.ln_f(x))


# ---------------------------------------------------------------------------------------------------------------------
# Heads: leaving them out, and scoring what they look at


@contextlib.contextmanager
def ablated(model, heads):
    """The model without some heads: what they hand over is 0. heads: (layer, head) pairs, counted from 0.

    Raises IndexError where there is no such head.
    """
    D = model.config.n_embd // model.config.n_head
    handles = []
    for layer, head in heads:
        if not (0 <= layer < model.config.n_layer and 0 <= head < model.config.n_head):
            raise IndexError(f"there is no head {head} in layer {layer}")

        def silence(c_proj, inputs, first=head * D):
            x = inputs[0].clone()  # (B, T, C): the heads side by side
            x[..., first : first + D] = 0
            return (x,)

        handles.append(blocks(model)[layer].attn.c_proj.register_forward_pre_hook(silence))
    with hooked(handles):
        yield


def loss_without_heads(model, x, y):
    """How much worse the loss gets without each head, in nats per token: (n_layer, H). x, y: (B, T) windows."""
    c = model.config
    harm = torch.zeros(c.n_layer, c.n_head)
    with evaluating(model):
        whole = model(x, y)[1]
        for layer in range(c.n_layer):
            for head in range(c.n_head):
                with ablated(model, [(layer, head)]):
                    harm[layer, head] = model(x, y)[1] - whole
    return harm


def repeated(vocabulary, length, rows=16, seed=0):
    """Random tokens, then the same again: (rows, 2 * length). vocabulary: (N,) the tokens to draw from."""
    dice = torch.Generator().manual_seed(seed)
    once = vocabulary[torch.randint(len(vocabulary), (rows, length), generator=dice)]
    return torch.cat([once, once], dim=1)


def induction_scores(model, vocabulary, length=None, rows=16, seed=0):
    """How much each head looks at what followed the last time: (n_layer, H), 0 to 1 (Olsson et al. 2022, "In-context
    Learning and Induction Heads": prefix matching).

    The text is random and repeated, so nothing but looking there helps. At a token of the second half, the score is the
    weight on the token that came after the same one in the first half; its mean is taken over tokens and rows.
    """
    length = length or model.config.block_size // 2
    text = repeated(vocabulary, length, rows, seed)  # (rows, 2 * length)
    seen = look(model, text.to(next(model.parameters()).device))
    # Row t, column t - length + 1, for t from length on: a diagonal (T - (length - 1) long) without its first entry.
    scores = [w.diagonal(1 - length, dim1=-2, dim2=-1)[..., 1:].mean(dim=(0, 2)) for w in seen.attention]
    return torch.stack(scores)


def previous_token_scores(seen):
    """How much each head looks at the token just before: (n_layer, H), 0 to 1. seen: of any text."""
    return torch.stack([w.diagonal(-1, dim1=-2, dim2=-1).mean(dim=(0, 2)) for w in seen.attention])


# ---------------------------------------------------------------------------------------------------------------------
# Neurons and embeddings


def top_contexts(activations, most=8):
    """Where a neuron is most active: [(row, position)], strongest first, one place from each row at most.

    activations: (rows, T), of one neuron.
    """
    values, positions = activations.max(dim=1)
    rows = values.topk(min(most, len(values))).indices
    return [(int(row), int(positions[row])) for row in rows]


def two_dimensions(vectors):
    """The two directions in which vectors (N, C) differ most: points (N, 2), and each one's share of the variance.

    Principal component analysis (Pearson 1901), by the singular values of the centred vectors.
    """
    centred = vectors - vectors.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2], s[:2] ** 2 / (s**2).sum()
