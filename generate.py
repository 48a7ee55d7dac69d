"""From a model to text: a cache, how to pick the next token, and two ways to write.

    logits --next_token_probs(temperature, top_k, top_p)--> probabilities --pick--> token      pure functions
    generate()       samples, one token after another, and yields each as it comes
    beam_search()    keeps the few most probable continuations and returns the best

Any model with `logits, loss = model(idx, cache=cache)` and `model.config.block_size` can be used.

When a text grows past block_size, the model goes on with the newest half of its window: it drops the older half, reads
the rest once more, and has room for block_size / 2 further tokens. So a token costs the same however long the text is.
"""

import heapq
from dataclasses import dataclass
from typing import List

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The cache: each token is read once


class LayerCache:
    """One layer's keys and values of the tokens read so far: each (B, H, block_size, D), `length` of it filled."""

    def __init__(self, block_size):
        self.block_size, self.length = block_size, 0
        self.k = self.v = None  # made at the first append, when shape, device and type are known
        self.last = None  # modern.py's token shift looks one position back

    def append(self, k, v):
        """Add the keys and values (B, H, T, D) of T more tokens; returns those of all S tokens, (B, H, S, D)."""
        if self.k is None:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.block_size, D), v.new_empty(B, H, self.block_size, D)
        end = self.length + k.size(2)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def previous(self, x):
        """x (B, T, C) one position earlier: what the position before these T was, then the first T - 1 of them."""
        before = torch.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:]
        return torch.cat([before, x[:, :-1]], dim=1)

    def clear(self):
        self.length, self.last = 0, None

    def select(self, rows):
        """Make row i of the batch what row `rows[i]` was."""
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        if self.last is not None:
            self.last = self.last.index_select(0, rows)


class KVCache:
    """The keys and values of every layer. `model(idx, cache=cache)` continues after the tokens in it."""

    def __init__(self, config):
        self.layers = [LayerCache(config.block_size) for _ in range(config.n_layer)]

    @property
    def length(self):
        return self.layers[0].length

    def clear(self):
        """Forget all tokens, and keep the memory."""
        for layer in self.layers:
            layer.clear()

    def select(self, rows):
        """Make row i of the batch what row `rows[i]` was: beam search drops some rows and doubles others."""
        for layer in self.layers:
            layer.select(rows)


class Reader:
    """Reads a text that grows at its end, and gives the logits of what comes next.

    With use_cache=False every call reads the whole window again: slower, plainer, and the same logits.
    """

    def __init__(self, model, use_cache=True):
        self.model, self.block_size = model, model.config.block_size
        self.cache = KVCache(model.config) if use_cache else None
        self.start = None  # where in the text the window begins

    def next_logits(self, text):
        """text: (B, N) int64, all tokens so far. Returns the float32 logits of token N: (B, V)."""
        N = text.size(1)
        if self.start is None:
            self.start = max(0, N - self.block_size)  # of a longer prompt, the last block_size tokens count
        elif N - self.start > self.block_size:
            self.start = N - max(1, self.block_size // 2)  # the window is full: keep its newest half
            if self.cache is not None:
                self.cache.clear()
        new = text[:, self.start + (self.cache.length if self.cache is not None else 0) :]
        logits, _ = self.model(new, cache=self.cache)
        return logits[:, -1].float()


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw the next token from: logits (..., V) -> probabilities (..., V), float32.

    temperature: below 1 prefers the likely tokens more, above 1 less; 0 gives all to the most likely one (greedy).
    top_k: only the k most likely tokens stay; None, 0 or anything above V keeps all (Fan et al. 2018).
    top_p: only the fewest most likely tokens that together reach p stay, at least one (Holtzman et al. 2020, nucleus).
    Top-k is applied first, top-p to what it left, both after the temperature.
    """
    logits = logits.float()
    if temperature < 1e-5:  # finer than float32 tells logits apart, and dividing by it could overflow
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        values, ids = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, ids, values)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # the probability of all that are likelier
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def pick(probs, generator=None):
    """Draw one token from each row: (B, V) -> (B,) int64."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True):
    """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens; yields them one step at a time, (B,) int64.

    generator: a torch.Generator on the model's device; the same seed gives the same tokens.
    """
    text, reader = idx, Reader(model, use_cache)
    for _ in range(max_new_tokens):
        probs = next_token_probs(reader.next_logits(text), temperature, top_k, top_p)
        token = pick(probs, generator)
        text = torch.cat([text, token[:, None]], dim=1)
        yield token


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


@dataclass(order=True)
class Hypothesis:
    """A continuation and what it is worth: sum of log-probabilities / len(tokens) ** length_penalty."""

    score: float
    tokens: List[int]


@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, length_penalty=1.0, is_end=None, use_cache=True):
    """The num_beams best continuations that a beam search finds, best first: a list of Hypothesis.

    idx: (1, T), T >= 1. At each step every beam is extended by every token and the num_beams most probable results
    stay. is_end(tokens) -> bool says that a continuation is complete; without it all have max_new_tokens tokens.
    length_penalty: the exponent of the length by which a score is divided; above 0 favours longer texts, below 0
    shorter ones (Wu et al. 2016, section 7, in the form that is usual today).
    """

    def score(log_prob, length):
        return log_prob / length**length_penalty

    if max_new_tokens == 0:
        return [Hypothesis(0.0, [])]
    reader, finished = Reader(model, use_cache), []
    dtype = torch.float32 if idx.device.type == "mps" else torch.float64  # an Apple GPU has no float64
    beams, log_probs = idx, torch.zeros(1, dtype=dtype, device=idx.device)  # (b, T + length), (b,)
    for length in range(1, max_new_tokens + 1):
        step = F.log_softmax(reader.next_logits(beams).to(dtype), dim=-1)  # (b, V)
        V = step.size(1)
        totals = (log_probs[:, None] + step).flatten()  # (b * V,)
        # At most num_beams of the candidates can end, so twice as many leave enough that go on.
        values, order = totals.topk(min(2 * num_beams, len(totals)))
        rows, kept = [], []
        for rank, (value, index) in enumerate(zip(values.tolist(), order.tolist())):
            row, token = divmod(index, V)
            tokens = [*beams[row, idx.size(1) :].tolist(), token] if is_end or length == max_new_tokens else None
            if length == max_new_tokens or (is_end and is_end(tokens)):
                if rank < num_beams:
                    finished.append(Hypothesis(score(value, length), tokens))
            elif len(kept) < num_beams:
                rows.append(row)
                kept.append(index)
        finished = heapq.nlargest(num_beams, finished)
        if not kept:
            break
        kept = torch.tensor(kept, device=idx.device)
        rows = torch.tensor(rows, device=idx.device)
        log_probs = totals[kept]
        beams = torch.cat([beams[rows], (kept % V)[:, None]], dim=1)
        if reader.cache is not None:
            reader.cache.select(rows)
        # Log-probabilities only fall. When even the best beam can no longer beat what is finished, we are done.
        reach = score(float(log_probs[0]), max_new_tokens if length_penalty > 0 else length + 1)
        if len(finished) == num_beams and finished[-1].score >= reach:
            break
    return finished
