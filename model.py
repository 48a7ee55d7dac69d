"""GPT: a language model that reads tokens and predicts, at each position, the next one.

This is GPT-2 exactly, in one file that needs nothing but PyTorch. Read it from top to bottom: the parts first
(attention, MLP, block), then the model that stacks them.

    tokens (B, T) --wte + wpe--> x (B, T, C) --n_layer x [x += attn(ln(x)); x += mlp(ln(x))]--> ln_f --lm_head--> logits

Shapes in the comments: B sequences in the batch, T tokens in each, C = n_embd channels, H = n_head heads of D = C / H
channels, V = vocab_size.

The papers: Vaswani et al. 2017, "Attention Is All You Need" (the Transformer); Radford et al. 2019, "Language Models
are Unsupervised Multitask Learners" (GPT-2). Parameter names are those of GPT-2's published weights.

Exercises:
- How many parameters has GPTConfig()? Add them up by hand, and compare with GPT(GPTConfig()).num_params().
- Take the causal mask away and train for a minute: why is the training loss soon near 0, and the text worthless?
"""

import math
import threading
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are the smallest GPT-2 (124 million parameters).

    Raises ValueError where the numbers make no model.
    """

    block_size: int = 1024  # the most tokens it can look back on
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the Linears and LayerNorms, as GPT-2 has it

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be a whole number of at least 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: each head takes an equal share of the "
                f"channels; try n_embd {self.n_embd // self.n_head * self.n_head or self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout}: must be at least 0 and below 1")


class LayerNorm(nn.Module):
    """Shift and scale each position's channels to mean 0 and variance 1, then by learned amounts (Ba et al. 2016)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-5)


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it what it finds relevant (Vaswani et al., 3.2).

    A position sends out a query; every earlier one answers with a key. How well they match decides how much of that
    earlier position's value flows in. The heads do this side by side, each in its own D channels.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # each (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)  # (B, H, S, D): the S - T tokens read before, then these T
        y = attention(q, k, v, self.dropout if self.training else 0.0, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads' outputs side by side again
        return self.resid_dropout(self.c_proj(y))


def attention(q, k, v, dropout=0.0, mask=None):
    """softmax(q k^T / sqrt(D)) v with a causal mask: the last T of S positions look at themselves and what is before.

    q is (B, H, T, D), k and v are (B, H, S, D) with S >= T; returns (B, H, T, D). mask: what to add to the scores in
    place of the causal mask, (T, S) or (B, 1, T, S), -inf where one may not look; generate.py's cache makes it.

    PyTorch's fused kernel computes it without keeping the (T, S) scores (Dao et al. 2022, FlashAttention). The formula
    written out is faster where a CPU trains with dropout, for which PyTorch has no fused kernel there, and in bfloat16
    up to 1024 positions. The two agree to rounding. On an Apple GPU, whose fused kernels keep the scores too and were
    wrong in several versions (PyTorch's issues 163597, 174861, 195910), it is always written out.
    """
    T, S = q.size(2), k.size(2)
    written_out_is_faster = q.device.type == "cpu" and (dropout > 0 or (q.dtype == torch.bfloat16 and T <= 1024))
    if q.device.type == "mps" or (T == S and q.requires_grad and written_out_is_faster):
        return attention_written_out(q, k, v, dropout, mask)
    if T == S and mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if T > 1 and mask is None:  # a single query sees all
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_written_out(q, k, v, p=0.0, mask=None):
    """The formula itself: all scores, those of the future at minus infinity, softmax, weighted mean."""
    B, H, T, D = q.shape
    S = k.size(2)
    if mask is None:
        mask = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1 + S - T)
    elif mask.dim() == 4:
        mask = mask.expand(B, H, T, S).reshape(B * H, T, S)
    q, k, v = (t.reshape(B * H, -1, D) for t in (q, k, v))
    # (B * H, T, S): mask + q k^T / sqrt(D)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
    weights = dropout(F.softmax(scores, dim=-1), p)
    return (weights @ v).view(B, H, T, D)


dice = threading.local()  # dice.generator: a thread's own torch.Generator, where several compute at once (optim.py)


def dropout(x, p):
    """Set a random share p of x to zero and scale the rest to keep the mean (Srivastava et al. 2014).

    On a CPU, drawing a number for each element takes a quarter of a training step. There, eight elements share one
    64-bit draw, a byte each, compared with a threshold; so p is rounded to a multiple of 1/256.
    """
    if x.device.type != "cpu" or p == 0:
        return F.dropout(x, p)
    threshold = min(max(round(256 * p), 1), 255)
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
    draws = draws.random_(-(2**63), None, generator=getattr(dice, "generator", None)).view(torch.uint8)
    keep = draws[: x.numel()].ge_(threshold).view(x.shape)  # 1 with probability 1 - threshold / 256
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


class Dropout(nn.Module):
    """`dropout` as a layer: on while training, off in evaluation."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


class MLP(nn.Module):
    """Each position by itself thinks over what attention gathered: widen by four, bend, narrow again."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 has the tanh form (Hendrycks & Gimpel 2016)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the MLP, each reading a normalised copy of x and adding to it (pre-LayerNorm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The whole model. `logits, loss = model(idx, targets)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # set to True to trade a third more compute for far less memory
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),  # a vector for each token
                wpe=nn.Embedding(config.block_size, config.n_embd),  # a vector for each position
                drop=Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017): one table for reading and writing
        self._init_weights()

    def _init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases zero (Radford et al. 2019, 2.3).

        The projections that add to the residual stream, 2 a layer, are scaled by 1/sqrt(2 n_layer), so that the stream
        does not grow with depth.
        """
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, last=1):
        """Predict the token after each position.

        idx: (B, T) int64 token ids. targets: (B, T) int64, the token that should follow each; -1 is ignored.
        cache: what generate.KVCache keeps of the tokens already read; idx then continues them.
        last: without targets, the logits of only so many positions are computed, the last ones.

        Returns (logits, loss). With targets: logits (B, T, V) and the mean cross-entropy in nats per token. Without:
        logits (B, last, V) and None. Raises ValueError when there are more than block_size tokens.
        """
        T = idx.size(1)
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit in block_size {self.config.block_size}; keep the last ones"
            )
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T, idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C), the same for all rows
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)  # keeps x only, computes the rest again in the backward
            else:
                x = block(x, None if cache is None else cache.layers[i])
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -last:])), None  # (B, last, V)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def num_params(self, embedding=True):
        """How many numbers are learned; the tied table counts once. Without `embedding`, positions are left out."""
        return sum(p.numel() for p in self.parameters()) - (0 if embedding else self.transformer.wpe.weight.numel())

    def flops_per_token(self):
        """Floating-point operations that training takes for one token: forward 1/3, backward 2/3.

        6 for each weight in a matrix product, and 12 C T a layer for attention's two products over a full window of T
        (Chowdhery et al. 2022, PaLM, appendix B; causality, which could halve the second term, is not counted).
        """
        c = self.config
        return 6 * self.num_params(embedding=False) + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_pretrained(cls, path_or_name):
        """Load a Hugging Face GPT-2 directory, a run of ours, a nanoGPT ckpt.pt, or "gpt2" ... "gpt2-xl" by name."""
        from checkpoint import load_model  # the one place where this file needs another

        return load_model(path_or_name)[0]
