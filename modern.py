"""The same GPT with the ideas of the years since GPT-2, each named where it stands (chapter 6; read model.py first).

What changed, and why, with the papers. What most of them buy, measured by leaving each one out, is in the README.

    rotary positions        where a token stands is told by turning its queries and keys, not by adding a vector
    query-key norm          queries and keys of fixed length: attention cannot blow up, so larger learning rates work
    n-gram vectors          each run of up to five tokens has a vector too: what is seen often need not be computed
    token shift             each layer also sees the token before, so attention need not be spent on that
    ReLU squared            a cheaper, sparser bend than GELU, and as good or better
    no biases, plain norms  nothing to learn where learning buys nothing
    zero projections        every layer begins as doing nothing, and learns to add something
    untied, zero head       the first guess is "all tokens equally likely"; reading and writing have a table each
    soft-capped logits      no token can be called certain, so no step can be wildly wrong
    further tokens          while it learns, each position also foretells those after the next: that helps with the next
    Muon                    updates of the matrices in which all directions count the same (optim.build_optimizers)

Shapes in the comments as in model.py: B sequences, T tokens, C channels, H heads of D channels, V possible tokens.

Exercises:
- Leave one idea out, train for half a minute with and without it, and compare with the README's table.
- Train on a text of 100 KB that is read some 25 times, with --ngram_decay 1, 4 and 16: which way ends with the lower
  training loss, which with the lower val loss, and why?
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import Dropout, attention

LONGEST = 16  # most tokens in a run that has a vector


@dataclass
class ModernConfig:
    """The shape of a model. Raises ValueError where the numbers make no model."""

    block_size: int = 256
    vocab_size: int = 65
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    ngram: int = 5  # tokens of the longest run that has a vector of its own; 1 for none but the tokens themselves
    ngram_rows: int = 16384  # vectors that all runs share
    ahead: int = 1  # tokens that a position foretells while it learns; it writes with the first alone

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "ngram", "ngram_rows", "ahead"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be a whole number of at least 1")
        if self.ngram > LONGEST:
            raise ValueError(f"ngram {self.ngram}: must be at most {LONGEST}")
        if self.ahead > self.block_size:
            raise ValueError(f"ahead {self.ahead}: must be at most block_size, {self.block_size}")
        if self.n_embd % (2 * self.n_head) != 0:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by 2 x n_head {self.n_head}: rotary positions turn each head's "
                f"channels in pairs; try n_embd {max(1, self.n_embd // (2 * self.n_head)) * 2 * self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout}: must be at least 0 and below 1")


def norm(x):
    """Scale each position's channels to mean 0 and variance 1, nothing learned (Groeneveld et al. 2024, OLMo, 2.1)."""
    return F.layer_norm(x, x.shape[-1:])


PRIME = 2**31 - 1  # factors are below it: times a token they stay below 2^53, up to which JavaScript is exact


class NGrams(nn.Module):
    """A vector for each run of 2, 3, ... n tokens, added to the vector of the run's last token.

    trigram.py counts what follows each two tokens; here such a run has a vector that is learned like a token's. There
    are more runs than rows in the table, so a number made of a run's tokens says which row is its own, and some share
    one (Pagnoni et al. 2024, Byte Latent Transformer, 3.2.1; Huang et al. 2025, Over-Tokenized Transformer).

    The vectors of long runs soon know the training text by heart. So all of them shrink a little with each step, and
    only those stay large that are used often (optim.build_optimizers, --ngram_decay).
    """

    def __init__(self, config):
        super().__init__()
        self.n = config.ngram
        self.table = nn.Embedding(config.ngram_rows, config.n_embd)
        self.table.weight.data.mul_(0.1)  # a tenth of the tokens' own, which so count for more at first
        factors = torch.tensor([pow(1_000_003, back, PRIME) for back in range(self.n)])
        self.register_buffer("factors", factors, persistent=False)  # (n,)

    def forward(self, tokens):
        """tokens: (B, n - 1 + T) int64, the last T and the n - 1 before them, -1 for none -> (B, T, C)."""
        return self.table(self.rows(tokens)).sum(dim=2)

    def rows(self, tokens):
        """Which row is that of each run that ends at a token: (B, n - 1 + T) -> (B, T, n - 1), the shortest first."""
        device, factors = tokens.device, self.factors
        # An Apple GPU took remainders in float32 until then. (PyTorch's version compares as numbers do.)
        if device.type == "mps" and torch.__version__ < "2.8":
            tokens, factors = tokens.cpu(), factors.cpu()
        newest_first = tokens.unfold(1, self.n, 1).flip(2)  # (B, T, n): each token, then those before it
        numbers = ((newest_first + 2) * factors).cumsum(dim=2)  # (B, T, n): of the run of each length
        return (numbers[:, :, 1:] % PRIME % self.table.num_embeddings).to(device)


def rotary_table(block_size, D):
    """cos and signed sin of each position's angles, two (block_size, D) tensors (Su et al. 2021, RoFormer, 3.2).

    Channel i and i + D/2 are the two coordinates of a point that position t turns by t * 1000^(-i / (D/2 - 1)). The dot
    product of a query and a key then depends on how far apart they are, not on where they stand.
    """
    speeds = 1000.0 ** -(torch.arange(D // 2) / max(1, D // 2 - 1))  # from one radian a token to a thousandth
    angles = torch.arange(block_size)[:, None] * speeds  # (block_size, D / 2)
    return torch.cat([angles.cos(), angles.cos()], 1), torch.cat([angles.sin(), -angles.sin()], 1)


def rotate(x, cos, sin):
    """Turn each head's channels by their position's angles: x (..., T, D), cos and sin (T, D)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class CausalSelfAttention(nn.Module):
    """model.py's, with rotary positions and normed queries and keys (Henry et al. 2020)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)  # three matrices, not one: Muon treats each
        self.c_k = nn.Linear(config.n_embd, config.n_embd, bias=False)  # as a whole
        self.c_v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_attn = None  # for writing, lighten.py puts the three into one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        if self.c_attn is not None:
            qkv = self.c_attn(x)
        else:  # one product, not three
            qkv = F.linear(x, torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight]))  # (B, T, 3C)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k = rotate(norm(qkv[:2]), cos, sin).to(qkv.dtype)  # (B, H, T, D) each; autocast norms in float32
        v = qkv[2]
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)  # (B, H, S, D)
        y = attention(q, k, v, self.dropout if self.training else 0.0, mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def relu_squared(x):
    """F.relu(x).square(): nothing below 0, and the square of what is above."""
    return ReluSquared.apply(x) if x.requires_grad else F.relu(x).square()


class ReluSquared(torch.autograd.Function):
    """F.relu(x).square(), with the derivative in two passes over memory where PyTorch's own takes four."""

    @staticmethod
    def forward(ctx, x):
        bent = F.relu(x)
        ctx.save_for_backward(bent)
        return bent * bent

    @staticmethod
    def backward(ctx, gradient):
        (bent,) = ctx.saved_tensors
        return (gradient * bent).mul_(2)


class MLP(nn.Module):
    """Widen by four, bend with ReLU squared (So et al. 2021, Primer), narrow again."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(relu_squared(self.c_fc(x))))


class Block(nn.Module):
    """One layer: token shift, attention, MLP, each reading a normed copy of x and adding to it."""

    def __init__(self, config):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(config.n_embd))  # how much of the token before flows into each channel
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        h = norm(x)
        before = F.pad(h, (0, 0, 1, 0))[:, :-1] if cache is None else cache.previous(h)  # (B, T, C), one token earlier
        x = x + self.attn(torch.addcmul(h, before, self.shift), cos, sin, cache)  # token shift (Peng et al. 2023, RWKV)
        return x + self.mlp(norm(x))


class Modern(nn.Module):
    """The whole model, with model.GPT's interface: `logits, loss = model(idx, targets)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NGrams(config) if config.ngram > 1 else None
        self.drop = Dropout(config.dropout)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # untied
        self.ahead = None
        if config.ahead > 1:
            self.ahead = nn.Linear(config.n_embd, (config.ahead - 1) * config.vocab_size, bias=False)
            self.register_buffer("ahead_share", torch.ones(()), persistent=False)  # falls to 0 (optim.Learner)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            # Each layer begins as doing nothing, the first guess as undecided (Zhang et al. 2019).
            if name.endswith("c_proj.weight") or name in ("lm_head.weight", "ahead.weight"):
                nn.init.zeros_(p)
            elif name.startswith("layers.") and p.dim() == 2:
                bound = 0.5 * math.sqrt(3 / p.size(1))  # a standard deviation of 0.5 / sqrt(C)
                nn.init.uniform_(p, -bound, bound)

    def forward(self, idx, targets=None, cache=None, last=1):
        """As model.GPT.forward: idx and targets (B, T) int64 -> (logits (B, T, V) or (B, last, V), loss or None)."""
        T = idx.size(1)
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit in block_size {self.config.block_size}; keep the last ones"
            )
        x = self.wte(idx)  # (B, T, C)
        if self.ngrams is not None:
            tokens = F.pad(idx, (self.config.ngram - 1, 0), value=-1) if cache is None else cache.with_before(idx)
            x = x + self.ngrams(tokens)
        x = self.drop(norm(x))
        places = slice(0, T) if cache is None else cache.places(T, idx.device)
        cos, sin = (table[places].to(x.dtype) for table in (self.cos, self.sin))
        for i, block in enumerate(self.layers):
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, None if cache is None else cache.layers[i])
        x = norm(x[:, -last:] if targets is None else x)
        logits = self.lm_head(x).float()
        logits = 15 * torch.tanh(logits / 15)  # soft cap (Gemma Team 2024, Gemma 2, section 2)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        if self.ahead is not None and self.training and T > 1:
            further = self.further_loss(x, targets)
            loss = loss + self.ahead_share * (further - further.detach())  # only to learn from: the loss stays the same
        return logits, loss

    def further_loss(self, x, targets):
        """Mean cross-entropy of the tokens after the next one (Gloeckle et al. 2024, multi-token prediction).

        x: (B, T, C), normed. targets: (B, T), of which those further on in the row are the further tokens.
        """
        n = self.config.ahead
        further = F.pad(targets, (0, n - 1), value=-1).unfold(1, n, 1)[:, :, 1:]  # (B, T, n - 1), -1 beyond the end
        logits = self.ahead(x).float()  # (B, T, (n - 1) V)
        return F.cross_entropy(logits.view(-1, self.config.vocab_size), further.reshape(-1), ignore_index=-1)

    def num_params(self, embedding=True):
        """How many numbers are learned; without `embedding`, the tables for reading are left out."""
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        return sum(p.numel() for p in self.parameters()) - (0 if embedding else sum(t.numel() for t in tables))

    def flops_per_token(self):
        """Floating-point operations that training takes for one token, counted as in model.GPT.flops_per_token."""
        c = self.config
        return 6 * self.num_params(embedding=False) + 12 * c.n_layer * c.n_embd * c.block_size
