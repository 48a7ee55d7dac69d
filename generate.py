"""From a model to text: a cache, how to pick the next token, and three ways to write.

    logits --next_token_probs(temperature, top_k, top_p, min_p)--> probabilities --pick--> token      pure functions
    generate()       samples, one token after another, and yields each as it comes
    speculate()      the same, faster: checks several guessed tokens in one pass of the model
    beam_search()    keeps the few most probable continuations and returns the best

Any model with `logits, loss = model(idx, cache=cache)` and `model.config.block_size` can be used with use_cache=False.
With the cache it also needs `config.n_layer`, and gives its keys and values to `cache.layers` as model.py does. With
guesses it also needs `last=n`, for the logits of the last n positions.

When a text grows past block_size, the model goes on with the newest half of its window: it drops the older half, reads
the rest once more, and has room for block_size / 2 further tokens. So a token costs the same however long the text is.
"""

import contextlib
import heapq
import time
from dataclasses import dataclass
from typing import List, Optional

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The cache: each token is read once


class Visible:
    """What the tokens of a pass may look at: the same in every layer, so it is made once.

    pad: None, or (B,) int64, how many of a row's first positions hold no token (see `generate`).
    """

    def __init__(self, pad=None):
        self.reset(pad)

    def reset(self, pad):
        self.pad, self.shape, self.numbers = pad, (0, 0), None

    def mask(self, T, S, k):
        """What is added to the scores of S positions for each of the last T: 0, or -inf where it may not look.

        (T, S), or with padding (B, 1, T, S), of the type and on the device of k. None where model.attention needs none:
        for a single token, which sees all, and where no token was read before these T.
        """
        if self.pad is None and T in (1, S):
            return None
        # Without padding, only among the last T is anything hidden. So the end of a longer mask will do, if it need not
        # stand in memory by itself, as for a GPU's attention.
        longer = self.pad is None and k.device.type == "cpu"
        if self.shape[0] != T or (self.shape[1] < S if longer else self.shape[1] != S):
            self._make(T, 2 * S if longer else S, k)
        return self.numbers[..., -S:] if longer else self.numbers

    def _make(self, T, S, k):
        places = torch.arange(S, device=k.device)  # (S,)
        own = places[S - T :, None]  # (T, 1)
        seen = places <= own  # (T, S)
        if self.pad is not None:
            real = (places >= self.pad[:, None])[:, None, None]  # (B, 1, 1, S)
            seen = seen & real | (places == own)  # itself always: softmax over nothing would be no number
        self.shape, self.numbers = (T, S), k.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))


class Memory:
    """The keys and values of all layers, side by side: beam search moves them in one operation."""

    def __init__(self, config):
        self.n_layer, self.block_size = config.n_layer, config.block_size
        self.tensor = None  # (n_layer, 2, B, H, block_size, D), made when shape, device and type are known

    def make(self, k):
        """Room for keys such as k (B, H, T, D), and values."""
        B, H, _, D = k.shape
        self.tensor = k.new_zeros(self.n_layer, 2, B, H, self.block_size, D)

    def select(self, rows, since, end):
        """Make row i of the batch what row `rows[i]` was, where they may differ: positions since, ..., end - 1."""
        if len(rows) != self.tensor.size(2):
            self.tensor = self.tensor[:, :, rows]
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if len(moved) > 0 and since < end:
            part = self.tensor[..., since:end, :]
            part[:, :, moved] = part[:, :, rows[moved]]


class LayerCache:
    """One layer's keys and values of the tokens read so far: each (B, H, block_size, D), `length` of it filled."""

    def __init__(self, number, memory, visible):
        self.number, self.memory, self.visible, self.length = number, memory, visible, 0
        self.k = self.v = None  # (B, H, block_size, D) each: views of the memory
        self.last = None  # (B, T, C): modern.py's token shift looks one position back

    def append(self, k, v):
        """Add the keys and values (B, H, T, D) of T more tokens.

        Returns those of all S tokens, (B, H, S, D), and which of them each of the T may look at (Visible.mask).
        """
        if self.k is None:
            if self.memory.tensor is None:
                self.memory.make(k)
            self._look_up()
        if k.requires_grad:  # the memory is for writing, not for learning
            k, v = k.detach(), v.detach()
        start, T = self.length, k.size(2)
        self.k.narrow(2, start, T).copy_(k)
        self.v.narrow(2, start, T).copy_(v)
        self.length = end = start + T
        return self.k.narrow(2, 0, end), self.v.narrow(2, 0, end), self.visible.mask(T, end, k)

    def previous(self, x):
        """x (B, T, C) one position earlier: what the position before these T was, then the first T - 1 of them."""
        before = torch.zeros_like(x[:, :1]) if self.last is None else self.last[:, -1:]
        self.last = x
        before = torch.cat([before, x[:, :-1]], dim=1)
        if self.visible.pad is not None:  # before a row's first token there is nothing
            positions = self.length + torch.arange(x.size(1), device=x.device)
            before = before * (positions > self.visible.pad[:, None])[:, :, None]
        return before

    def clear(self):
        self.length, self.last = 0, None

    def forget(self, n):
        """Forget the last n tokens; fewer than the last call read."""
        if n > 0:
            self.length -= n
            self.last = None if self.last is None else self.last[:, :-n]

    def select(self, rows):
        """After the memory has done so: make row i of the batch what row `rows[i]` was."""
        if len(rows) != len(self.k):  # the memory is another one
            self._look_up()
        if self.last is not None:
            self.last = self.last[:, -1:].index_select(0, rows)

    def _look_up(self):
        self.k, self.v = self.memory.tensor[self.number, 0], self.memory.tensor[self.number, 1]


class KVCache:
    """The keys and values of every layer. `model(idx, cache=cache)` continues after the tokens in it."""

    def __init__(self, config, pad=None):
        self.visible, self.memory = Visible(pad), Memory(config)
        self.layers = [LayerCache(n, self.memory, self.visible) for n in range(config.n_layer)]
        self.before = getattr(config, "ngram", 1) - 1  # how far modern.py's n-grams look back
        self.tokens = None  # (B, self.before or more): the newest ones, of a model with n-grams

    @property
    def length(self):
        return self.layers[0].length

    def places(self, T, device):
        """Where in the cache the next T tokens stand: (T,)."""
        return torch.arange(self.length, self.length + T, device=device)

    def positions(self, T, device):
        """The same, counted from each row's first token: (T,), or (B, T) where rows are padded."""
        places, pad = self.places(T, device), self.visible.pad
        return places if pad is None else (places - pad[:, None]).clamp(min=0)

    def with_before(self, idx):
        """The next tokens idx (B, T) and the self.before tokens before them, -1 for none: (B, self.before + T)."""
        if self.visible.pad is not None:
            idx = idx.masked_fill(self.places(idx.size(1), idx.device) < self.visible.pad[:, None], -1)
        if self.tokens is None:
            self.tokens = idx.new_full((len(idx), self.before), -1)
        self.tokens = torch.cat([self.tokens[:, -self.before :], idx], dim=1)
        return self.tokens

    def clear(self, pad=None):
        """Forget all tokens, and keep the memory."""
        self.visible.reset(pad)
        self.tokens = None
        for layer in self.layers:
            layer.clear()

    def forget(self, n):
        """Forget the last n tokens, fewer than the last call of the model read: guesses that were wrong."""
        if self.tokens is not None:
            self.tokens = self.tokens[:, : self.tokens.size(1) - n]
        for layer in self.layers:
            layer.forget(n)

    def select(self, rows, since=0):
        """Make row i of the batch what row `rows[i]` was: beam search drops some rows and doubles others.

        since: the first position at which a row and what it becomes may differ; what is before stays where it is.
        """
        self.memory.select(rows, since, self.length)
        for layer in self.layers:
            layer.select(rows)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)
        if self.visible.pad is not None:
            self.visible.reset(self.visible.pad[rows])


class Reader:
    """Reads a text that grows at its end, and gives the logits of what comes next.

    With use_cache=False every call reads the whole window again: slower, plainer, and the same logits.
    pad: None, or (B,) int64, how many of the first tokens of each row are none of its text.
    threads: on how many CPU threads a few tokens are read behind others; None leaves PyTorch's number (best_threads).
    """

    def __init__(self, model, use_cache=True, pad=None, threads=None):
        self.model, self.block_size, self.use_cache, self.pad = model, model.config.block_size, use_cache, pad
        self.threads = threads
        self.cache = None
        self.start = None  # where in the text the window begins

    def room(self, N):
        """How many more tokens than these N fit into the window."""
        start = max(0, N - self.block_size) if self.start is None else self.start
        return self.block_size - (N - start)

    def next_logits(self, text, last=1):
        """text: (B, N) int64, all tokens so far. Returns the float32 logits of what follows the last token, (B, V);
        with last above 1 of what follows each of that many, (B, last, V)."""
        N = text.size(1)
        if self.start is None:
            self._begin(max(0, N - self.block_size))  # of a longer prompt, the last block_size tokens count
        elif N - self.start > self.block_size:
            self._begin(N - max(1, self.block_size // 2))  # the window is full: keep its newest half
        elif not self.use_cache:
            self._begin(self.start)
        read = 0 if self.cache is None else self.cache.length
        new = text[:, self.start + read :]
        with use_threads(self.threads if read > 0 and new.numel() <= FEW else None):
            logits, _ = self.model(new, cache=self.cache, **({} if last == 1 else dict(last=last)))
        if read == 0 and logits.device.type in ("cuda", "mps"):  # where pick does not look, for the CPU would wait
            check_numbers(logits.amax())
        return logits[:, -1].float() if last == 1 else logits.float()

    def next_tokens(self, text, sampling, generator=None):
        """Draw the token that follows each row of text (B, N), as a Sampling says: (B,) int64."""
        return pick(sampling.probs(self.next_logits(text), text), generator)

    def select(self, rows, since):
        """Make row i of the batch what row `rows[i]` was, from position `since` of the text on (KVCache.select)."""
        if self.cache is not None:
            self.cache.select(rows, max(0, since - self.start))

    def _begin(self, start):
        """Read from position `start` of the text on, with nothing in the cache."""
        self.start = start
        if not self.use_cache and self.pad is None:
            return
        pad = None if self.pad is None else (self.pad - start).clamp(min=0)
        if self.cache is None:
            self.cache = KVCache(self.model.config, pad)
        else:
            self.cache.clear(pad)


# ---------------------------------------------------------------------------------------------------------------------
# Measured on the machine at hand: on how many threads to read, and what a guess costs


SLOW = 0.05  # seconds: a model with a slower pass uses all threads
FEW = 8  # up to so many tokens one thread may be faster than several, which wait for each other


@contextlib.contextmanager
def use_threads(n):
    """PyTorch's operations on n CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    if n is None or n == before:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def pass_seconds(model, n_tokens):
    """How long a pass of a model over so many tokens takes: the median of five, or of fewer where they are slow.

    They come behind other tokens, as when writing, where the window has room for them.
    """
    idx, times = torch.zeros(1, min(n_tokens, model.config.block_size), dtype=torch.int64), []
    cache, room = KVCache(model.config), model.config.block_size - idx.size(1)
    while len(times) < 5 and sum(times) < SLOW:
        if not 0 < cache.length <= room:
            cache.clear()
            if room > 0:
                model(idx[:, :1], cache=cache)
        start = time.perf_counter()
        model(idx, cache=cache)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def best_threads(model, n_tokens=1):
    """Measure on how many CPU threads a model reads so many tokens faster: 1, or all. None for a large model: all."""
    seconds = {}
    for n in (torch.get_num_threads(), 1):
        with use_threads(n):
            seconds[n] = pass_seconds(model, n_tokens)
        if seconds[n] > SLOW:
            return None
    return min(seconds, key=seconds.get)


def guess_cost(model, guesses, threads=None):
    """Measure what a guess costs in speculate: the time that a pass takes longer for it, in passes over one token."""
    with use_threads(threads):
        one, several = (pass_seconds(model, n) for n in (1, 1 + guesses))
    return max(0.0, several / one - 1) / guesses


ROUNDING = 0.1  # by what share logits may differ from a model's own, where they come in another number format


def difference(logits, expected):
    """By what share of their spread logits differ from those that are expected, tensors of one shape; NaN for NaN."""
    return float((logits - expected).norm() / (expected - expected.mean()).norm().clamp(min=1e-9))


def check_numbers(highest):
    """Raises FloatingPointError where the highest of a model's figures, a tensor (), is infinite or no number."""
    if not highest < float("inf"):
        raise FloatingPointError("the model computes infinities or NaN, of which nothing can be drawn")


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token


GREEDY = 1e-5  # below this temperature the likeliest token is taken: dividing by so little could overflow


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution to draw the next token from: logits (..., V) -> probabilities (..., V), float32.

    temperature: below 1 prefers the likely tokens more, above 1 less; 0 gives all to the most likely one (greedy).
    top_k: only the k most likely tokens stay; None, 0 or anything above V keeps all (Fan et al. 2018).
    top_p: only the fewest most likely tokens that together reach p stay, at least one (Holtzman et al. 2020, nucleus).
    min_p: only tokens at least min_p times as probable as the likeliest stay (Nguyen et al. 2024).
    They apply in that order: the temperature, then top-k, and top-p and min-p to what was left.
    """
    logits = logits.float()
    if temperature < GREEDY:
        highest, ids = logits.max(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, ids, 1.0) + 0.0 * highest  # of infinity or NaN: NaN, as a softmax
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
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def penalize_repetition(logits, text, penalty):
    """Make every token that is in a row's text less likely: logits (B, V), text (B, N) -> (B, V).

    Positive logits are divided by the penalty, negative ones multiplied (Keskar et al. 2019, CTRL, 4.1).
    """
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, text)
    return logits.scatter(-1, text, torch.where(seen > 0, seen / penalty, seen * penalty))


def pick(probs, generator=None):
    """Draw one token from each row: (B, V) -> (B,) int64."""
    if probs.device.type == "cuda":  # torch.multinomial draws the same, but looks at probs before: the CPU would wait
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def check_prompt(idx, rows=None):
    """Raises ValueError where idx is no tensor (B, T) of tokens with T >= 1, or has not so many rows."""
    if not isinstance(idx, torch.Tensor) or idx.dim() != 2 or idx.size(1) < 1 or idx.dtype != torch.int64:
        what = f"{tuple(idx.shape)} of {idx.dtype}" if isinstance(idx, torch.Tensor) else f"a {type(idx).__name__}"
        raise ValueError(f"idx: must be a tensor (B, T) of torch.int64 with T at least 1, and is {what}")
    if rows is not None and len(idx) != rows:
        raise ValueError(f"idx: must have {rows} row, and has {len(idx)}; call it for each row")


@dataclass
class Sampling:
    """How tokens are drawn: what next_token_probs and penalize_repetition take, as one thing. Raises ValueError."""

    temperature: float = 1.0
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    min_p: Optional[float] = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        inf = float("inf")
        limits = dict(temperature=(0, inf), top_k=(0, inf), top_p=(0, 1), min_p=(0, 1), repetition_penalty=(1e-9, inf))
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} {value}: must be at least {low:g}" + (f" and at most {high}" * (high == 1)))

    def probs(self, logits, text):
        """The distribution of the token after text (B, N), from its logits (B, V): (B, V)."""
        logits = penalize_repetition(logits, text, self.repetition_penalty)
        return next_token_probs(logits, self.temperature, self.top_k, self.top_p, self.min_p)


@torch.inference_mode()
def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    generator=None,
    use_cache=True,
    pad=None,
    sampling=None,
    reader=None,
):
    """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens; yields them one step at a time, (B,) int64.

    generator: a torch.Generator on the model's device; the same seed gives the same tokens.
    pad: (B,) int64, for prompts of different lengths: row i begins with pad[i] < T tokens that are not read.
    sampling: a Sampling, in place of the five settings. reader: a Reader, in place of use_cache and with the same pad,
    which may have read a beginning of idx already.
    The model should be in evaluation mode, or it drops out at random. To learn from a token that was yielded, clone it:
    it was made in PyTorch's inference mode. Raises ValueError for a prompt or settings that cannot be.
    """
    check_prompt(idx)
    sampling = sampling or Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if pad is not None and (pad.shape != idx.shape[:1] or pad.min() < 0 or pad.max() >= idx.size(1)):
        raise ValueError(f"pad: must have {len(idx)} numbers from 0 to {idx.size(1) - 1}, and is {pad.tolist()}")
    if pad is not None:  # filled up with a token of its own text, which no rule then counts as another
        filler = torch.arange(idx.size(1), device=idx.device) < pad[:, None]  # (B, T)
        idx = torch.where(filler, idx.gather(1, pad[:, None]), idx)
    text, reader = idx, reader or Reader(model, use_cache, pad)
    for _ in range(max_new_tokens):
        token = reader.next_tokens(text, sampling, generator)
        text = torch.cat([text, token[:, None]], dim=1)
        yield token


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding: several tokens for one pass of the model


TRIED = 64  # guesses that are made before anybody asks whether they pay


class Speculation:
    """How a draft fares: `tokens` were written in `passes` of the model; of `guessed` tokens, `accepted` were right.

    cost: of a guess (guess_cost). Each accepted one saves a pass.
    """

    def __init__(self, cost=0.0):
        self.cost, self.tokens, self.passes, self.guessed, self.accepted = cost, 0, 0, 0, 0

    def pays(self):
        """Do guesses save more than they cost? The first TRIED are made to find out."""
        return self.guessed < TRIED or self.accepted >= self.cost * self.guessed


@torch.inference_mode()
def speculate(model, idx, max_new_tokens, draft, guesses=3, sampling=None, generator=None, counts=None, reader=None):
    """What `generate` yields for one row, idx (1, T), in fewer passes of the model (Leviathan et al. 2023, 2.3).

    draft: `draft.propose(tokens, n) -> up to n tokens`, a cheap guess of how a list of tokens goes on (draft.py).
    The model reads the guesses in one pass, which takes little longer than one token, and so has the distribution p at
    each of them. A guess x is accepted with probability p(x); if not, the token is drawn from p without x, and the rest
    of the guesses is forgotten. Each token is then drawn exactly from p: x with p(x), any other y with
    (1 - p(x)) * p(y) / (1 - p(x)).

    sampling: a Sampling. reader: as in generate. counts: a Speculation that is kept up to date, and that ends the
    guessing once it does not pay. Raises ValueError as generate does.
    """
    check_prompt(idx, rows=1)
    sampling, counts = sampling or Sampling(), counts or Speculation()
    text, reader, known = idx, reader or Reader(model), idx[0].tolist()
    left = max_new_tokens
    while left > 0:
        n = min(guesses, left - 1, max(0, reader.room(text.size(1))))
        guessed = draft.propose(known, n) if n > 0 and counts.pays() else []
        if guessed:
            written = checked(text, guessed, reader, sampling, generator)
            if reader.cache is not None:
                reader.cache.forget(1 + len(guessed) - len(written))
        else:
            written = [int(reader.next_tokens(text, sampling, generator))]
        text = torch.cat([text, text.new_tensor([written])], dim=1)
        known += written
        left -= len(written)
        counts.tokens, counts.passes = counts.tokens + len(written), counts.passes + 1
        counts.guessed, counts.accepted = counts.guessed + len(guessed), counts.accepted + len(written) - 1
        yield from text[:, -len(written) :].unbind(1)


def checked(text, guessed, reader, sampling, generator):
    """The tokens after text (1, N), of which some are guessed: those guesses that are accepted, and one more, drawn."""
    N, written = text.size(1), []
    text = torch.cat([text, text.new_tensor([guessed])], dim=1)  # (1, N + g)
    logits = reader.next_logits(text, last=1 + len(guessed))  # (1, 1 + g, V)
    for i, guess in enumerate(guessed):
        probs = sampling.probs(logits[:, i], text[:, : N + i])  # (1, V)
        accepted = torch.rand((), generator=generator, device=text.device) < probs[0, guess]  # not where that is NaN
        if not accepted:
            probs[0, guess] = 0.0
            return [*written, int(pick(probs, generator))]
        written.append(guess)
    return [*written, int(pick(sampling.probs(logits[:, -1], text), generator))]


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


@dataclass(order=True)
class Hypothesis:
    """A continuation and what it is worth: sum of log-probabilities / len(tokens) ** length_penalty."""

    score: float
    tokens: List[int]


def keep_places(rows, n):
    """In which order to take the continuations of n beams, so that as few keys and values as possible have to move.

    rows: which beam each continues, the likeliest first. A beam's first continuation takes its place, further ones take
    the places of beams that have none. Where there are not n of them, they stay in order.
    """
    if len(rows) != n:
        return range(len(rows))
    first = {}
    for i, row in enumerate(rows):
        first.setdefault(row, i)
    further = (i for i, row in enumerate(rows) if first[row] != i)
    return [first[row] if row in first else next(further) for row in range(n)]


@torch.inference_mode()
def beam_search(
    model,
    idx,
    max_new_tokens,
    num_beams,
    length_penalty=1.0,
    is_end=None,
    use_cache=True,
    repetition_penalty=1.0,
    reader=None,
):
    """The num_beams best continuations that a beam search finds, best first: a list of Hypothesis.

    idx: (1, T), T >= 1. At each step every beam is extended by every token and the num_beams most probable results
    stay. is_end(tokens) -> bool says that a continuation is complete; without it all have max_new_tokens tokens.
    length_penalty: the exponent of the length by which a score is divided; above 0 favours longer texts, below 0
    shorter ones (Wu et al. 2016, section 7, in the form that is usual today). repetition_penalty: see
    penalize_repetition; the text of a beam is idx and what it has added. reader: a new Reader to read with.
    Raises ValueError for a prompt of several rows, or no beam.
    """

    def score(log_prob, length):
        return log_prob / length**length_penalty

    check_prompt(idx, rows=1)
    if num_beams < 1:
        raise ValueError(f"num_beams {num_beams}: must be at least 1")
    if max_new_tokens == 0:
        return [Hypothesis(0.0, [])]
    reader, finished = reader or Reader(model, use_cache), []
    dtype = torch.float32 if idx.device.type == "mps" else torch.float64  # an Apple GPU has no float64
    beams, log_probs = idx, torch.zeros(1, dtype=dtype, device=idx.device)  # (b, T + length), (b,)
    for length in range(1, max_new_tokens + 1):
        logits = penalize_repetition(reader.next_logits(beams), beams, repetition_penalty)
        step = F.log_softmax(logits.to(dtype), dim=-1)  # (b, V)
        V = step.size(1)
        totals = (log_probs[:, None] + step).flatten()  # (b * V,)
        # Twice as many as beams, so that some go on where others end. Should all of them end, the search is over.
        values, order = totals.topk(min(2 * num_beams, len(totals)))  # NaN counts as the highest
        check_numbers(values[0])
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
        order = keep_places(rows, len(beams))
        kept = torch.tensor([kept[i] for i in order], device=idx.device)
        rows = torch.tensor([rows[i] for i in order], device=idx.device)
        log_probs, continued, since = totals[kept], beams[rows], 0
        if len(rows) == len(beams):  # beams have most of their text in common
            differ = (continued != beams).any(dim=0).nonzero()
            since = int(differ[0]) if len(differ) else beams.size(1)
        beams = torch.cat([continued, (kept % V)[:, None]], dim=1)
        reader.select(rows, since)
        # Log-probabilities only fall. When even the best beam can no longer beat what is finished, we are done.
        reach = score(float(log_probs.max()), max_new_tokens if length_penalty > 0 else length + 1)
        if len(finished) == num_beams and finished[-1].score >= reach:
            break
    return finished
