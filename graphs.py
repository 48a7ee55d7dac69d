"""Steps whose shapes never change, recorded once on a CUDA GPU and replayed as a whole: to train, and to write.

A GPU does a step of a small model faster than Python can ask for its hundreds of operations. A CUDA graph asks for all
of them at once, but it replays exactly what was recorded: the same operations on the same memory. So what goes in and
comes out has a fixed place, and no operation may depend on a number that only the GPU knows.

    recorded = RecordedStep(step)   # step(x, y, share), for training: optim.py
    reader = GraphReader(model)     # in place of generate.Reader, for writing: the same logits

When writing, the step reads one token from a fixed place. It looks at the first `size` positions of the cache, and a
mask hides those not filled yet; for a text that outgrows them another step is recorded, of twice as many positions.
Where fused.py can be used, the step is its FusedStep, which looks at no more positions than are filled.
"""

import contextlib
from dataclasses import astuple

import torch

from generate import ROUNDING, Reader, Sampling, difference, pick
from utils import UserError, first_line, is_out_of_memory, same_dice, say_once, told_when_slow, version

WARM_UP = 3  # runs of a step before it is recorded, in which PyTorch's libraries set themselves up
COMPILING = "preparing this GPU for a model of this size, which Triton remembers: some seconds more ..."


def can_be_recorded(device):
    """Are steps recorded on this device? On NVIDIA GPUs alone, where that was tried, and from PyTorch 2.4 on."""
    return device.type == "cuda" and not torch.version.hip and version(torch) >= (2, 4)


def record(step, device, generator=None):
    """Record what step() asks of a CUDA GPU. Returns (a function that lets it do that, the tensors that step returned).

    On other devices, as in the tests, that function does the step anew. The tensors keep their places. generator: the
    torch.Generator from which the step draws, where it is not PyTorch's own. Raises UserError where it cannot be done.
    """
    if device.type != "cuda":
        results = step()
        return lambda: [place.copy_(result) for place, result in zip(results, step())], results
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        try:  # other threads, such as one that saves the run, may go on
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = step()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"a step cannot be recorded as a CUDA graph ({first_line(error)[:150]}): something in it may wait for "
                f"the GPU, as .item() does; add --no-record to train.py, or --device cpu to sample.py"
            ) from error
    return graph.replay, results


class RecordedStep:
    """A training step on a CUDA GPU: step(x, y, share) -> tensors, where share is a tensor () in float32.

    The first calls, and those with x and y of another shape, run as they are. What is random stays so: a graph draws
    on from PyTorch's generator.
    """

    def __init__(self, step, device):
        self.step, self.device, self.calls, self.replay = step, device, 0, None

    def __call__(self, x, y, share):
        self.calls += 1
        if self.calls <= WARM_UP or (self.replay is not None and x.shape != self.x.shape):
            return self.step(x, y, torch.full((), share, device=self.device))
        if self.replay is None:
            self.x, self.y, self.share = x.clone(), y.clone(), torch.full((), share, device=self.device)
            self.replay, self.results = record(lambda: self.step(self.x, self.y, self.share), self.device)
        self.x.copy_(x)
        self.y.copy_(y)
        self.share.fill_(share)
        self.replay()
        return tuple(result.clone() for result in self.results)


class StaticLayer:
    """A LayerCache, as a step of a StaticCache sees it."""

    def __init__(self, layer, static):
        self.layer, self.static = layer, static
        self.last = None if layer.last is None else layer.last[:, -1:].clone()

    def append(self, k, v):
        """Add one token's keys and values (B, H, 1, D); returns those of `size` positions, and which to look at."""
        layer, size = self.layer, self.static.size
        layer.k.index_copy_(2, self.static.position, k.detach())  # as LayerCache.append
        layer.v.index_copy_(2, self.static.position, v.detach())
        return layer.k[:, :, :size], layer.v[:, :, :size], self.static.mask

    def previous(self, x):
        before = self.last.clone()
        self.last.copy_(x)
        return before


class StaticCache:
    """A KVCache, as a step sees it that adds one token at `position`, (1,) int64, below `size`."""

    length = 0  # how full it is says `position`, which may change after the step was recorded

    def __init__(self, cache, position):
        pad = cache.visible.pad
        self.position, self.size, self.pad = position, None, None if pad is None else pad.clone()
        self.layers = [StaticLayer(layer, self) for layer in cache.layers]
        self.tokens = None if cache.tokens is None else cache.tokens[:, -cache.before :].clone()

    def make_mask(self):
        """Visible.mask of the step, over S = size positions: (1, 1, 1, S), or with padding (B, 1, 1, S)."""
        k = self.layers[0].layer.k
        places = torch.arange(self.size, device=k.device)
        hidden = places > self.position
        if self.pad is not None:
            hidden = hidden | (places < self.pad[:, None])
        self.mask = k.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf")).view(-1, 1, 1, self.size)

    def with_before(self, idx):
        """KVCache.with_before of one token (B, 1)."""
        tokens = torch.cat([self.tokens, idx], dim=1)
        self.tokens.copy_(tokens[:, 1:])
        return tokens

    def refresh(self, cache):
        """Take over what has changed since tokens were read by other means."""
        if self.tokens is not None:
            self.tokens.copy_(cache.tokens[:, -cache.before :])
        if self.pad is not None:
            self.pad.copy_(cache.visible.pad)
        for static, layer in zip(self.layers, cache.layers):
            if layer.last is not None:
                static.last.copy_(layer.last[:, -1:])

    def places(self, T, device):
        return self.position

    def positions(self, T, device):
        return self.position if self.pad is None else self.position - self.pad[:, None]

    def give_back(self, cache):
        """Let the cache know what these steps have moved."""
        if self.tokens is not None:
            cache.tokens = self.tokens.clone()
        for static, layer in zip(self.layers, cache.layers):
            if static.last is not None:
                layer.last = static.last.clone()


class GraphReader(Reader):
    """A Reader that replays its step where a text has grown by one token; all else it reads as a Reader does."""

    SHORTEST = 256  # positions that the shortest step looks at

    def __init__(self, model, pad=None):
        super().__init__(model, pad=pad)
        self.static = None
        self.steps = {}  # (positions that a step looks at, how it draws) -> (its replay, its logits or tokens)
        self.stale = True  # have tokens been read since the last step by other means?
        self.luck_from = None  # (the generator of FusedStep.luck,), since the window was last read by other means

    def next_logits(self, text, last=1):
        if last == 1 and self._grown_by_one(text):
            return self._replayed(text)[:, -1].to(torch.float32, copy=True)  # the next step overwrites them
        self._give_back()
        return super().next_logits(text, last)

    def next_tokens(self, text, sampling, generator=None):
        """As Reader.next_tokens. Drawing them is part of the step, unless they depend on all of the text.

        FusedStep draws with random numbers that are made for a window at once: should the generator be seeded anew,
        that counts from the next window on.
        """
        recorded = type(sampling) is Sampling and sampling.repetition_penalty == 1  # another's Python would not be
        if not recorded or not self._grown_by_one(text):
            return super().next_tokens(text, sampling, generator)
        return self._replayed(text, sampling, generator).clone()

    def select(self, rows, since):
        self._give_back()
        if self.static is not None and len(rows) != len(self.token):  # other memory than was recorded
            self.static, self.steps = None, {}
        super().select(rows, since)

    def _give_back(self):
        """Before other things than a replay go on with the cache."""
        if not self.stale:
            self.static.give_back(self.cache)
            self.stale = True

    def _grown_by_one(self, text):
        N = text.size(1)
        return self.start is not None and N - self.start == self.cache.length + 1 <= self.block_size

    def _replayed(self, text, sampling=None, generator=None):
        """The logits (B, 1, V) or, with a sampling, the tokens (B,) that follow text (B, N), in the step's place."""
        if self.static is None:
            self.token = text[:, -1:].clone()
            self.position = torch.tensor([self.cache.length], device=text.device)
            self.static = StaticCache(self.cache, self.position)
            with told_when_slow(COMPILING):
                self.fused = self._fused_step()
        self.token.copy_(text[:, -1:])
        self.position.fill_(self.cache.length)
        size = self.block_size if self.fused else self.SHORTEST
        while size <= self.cache.length:
            size *= 2
        size = min(size, self.block_size)
        draws = self._draws(sampling)
        inside = None if draws else generator  # from which the step itself draws
        kind = (size, sampling and astuple(sampling), inside)
        if kind not in self.steps:
            with told_when_slow(COMPILING) if self.fused else contextlib.nullcontext():
                self.steps[kind] = self._prepare(size, sampling, inside)
        if self.stale:
            self.static.refresh(self.cache)
            self.stale, self.luck_from = False, None
        if draws and self.luck_from != (generator,):  # for all tokens that fit into the window
            self.fused.luck.uniform_(generator=generator)
            self.luck_from = (generator,)
        replay, [result] = self.steps[kind]
        replay()
        for layer in self.cache.layers:
            layer.length += 1
        return result

    def _fused_step(self):
        """fused.FusedStep, where it can be used for this model and text, else None."""
        if self.pad is not None:
            return None
        try:
            import fused
        except ImportError:  # Triton, which PyTorch brings along for CUDA on Linux
            return None
        step = fused.fused_step(self.model, self.cache, self.position, self.token)
        if step is None or self._agrees(step.logits):
            return step
        say_once("fused.py is not used, and writing is slower: its kernels compute another model than model.py")
        return None

    def _agrees(self, logits):
        """Are these (B, V), but for 16 bits' rounding, what the model itself says of self.token? Not, where its code
        was changed and that of the kernels was not."""
        self.static.size = self.block_size
        self.static.make_mask()
        expected = self.model(self.token, cache=self.static)[0][:, -1].float()
        return difference(logits, expected) <= ROUNDING

    def _draws(self, sampling):
        """Does FusedStep draw the tokens too?"""
        return bool(self.fused) and sampling is not None and self.fused.can_draw(sampling)

    def _step(self, size, sampling=None, generator=None):
        if self.fused:
            logits = self.fused(self.token)
        else:
            self.static.size = size
            self.static.make_mask()  # once for all layers
            logits, _ = self.model(self.token, cache=self.static)
        if sampling is None:
            return (logits,)
        if self._draws(sampling):
            return (self.fused.draw(sampling),)
        return (pick(sampling.probs(logits[:, -1], self.token), generator),)

    def _prepare(self, size, sampling, generator):
        """Get a step ready that looks at so many positions. Returns what does it, and [where its result will be]."""
        self._give_back()  # what the token shift remembers would be lost in the runs before it is recorded
        with undrawn(generator, self.token.device):
            for _ in range(WARM_UP):
                self._step(size, sampling, generator)
            return record(lambda: self._step(size, sampling, generator), self.token.device, generator)


def reader_on(device, model, threads=None):
    """The Reader for a model on a device: with recorded steps where there are any, else with so many CPU threads."""
    return GraphReader(model) if can_be_recorded(device) else Reader(model, threads=threads)


@contextlib.contextmanager
def undrawn(generator, device):
    """A context that leaves a generator, or for None PyTorch's own for a device, where it stood."""
    if generator is None:
        with same_dice(device):
            yield
        return
    state = generator.get_state()
    yield
    generator.set_state(state)
