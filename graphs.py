"""Writing on a CUDA GPU: a step whose shapes never change, recorded once and replayed as a whole.

A GPU does a step of a small model faster than Python can ask for its hundreds of operations. A CUDA graph asks for all
of them at once, but it replays exactly what was recorded: the same memory, the same shapes. So here the step reads one
token from a fixed place, looks at all block_size positions of the cache, and a mask hides those not filled yet.

    reader = GraphReader(model)     # in place of generate.Reader: the same logits, tested on a CPU without recording
"""

import torch

from generate import Reader


class StaticLayer:
    """A LayerCache, as a step of a StaticCache sees it."""

    def __init__(self, layer, static):
        self.layer, self.static = layer, static
        self.last = None if layer.last is None else layer.last[:, -1:].clone()

    def append(self, k, v):
        """Add one token's keys and values (B, H, 1, D); returns those of all positions, and which to look at."""
        layer = self.layer
        layer.k.index_copy_(2, self.static.position, k)
        layer.v.index_copy_(2, self.static.position, v)
        return layer.k, layer.v, self.static.mask

    def previous(self, x):
        before = self.last.clone()
        self.last.copy_(x)
        return before


class StaticCache:
    """A KVCache, as a step sees it that adds one token at `position`, (1,) int64."""

    length = 0  # how full it is says `position`, which may change after the step was recorded

    def __init__(self, cache, position):
        pad = cache.visible.pad
        self.position, self.pad = position, None if pad is None else pad.clone()
        self.layers = [StaticLayer(layer, self) for layer in cache.layers]

    def make_mask(self):
        """Visible.mask of the step, over all S positions of the cache: (1, 1, 1, S), or with padding (B, 1, 1, S)."""
        k = self.layers[0].layer.k
        places = torch.arange(k.size(2), device=k.device)
        hidden = places > self.position
        if self.pad is not None:
            hidden = hidden | (places < self.pad[:, None])
        self.mask = k.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf")).view(-1, 1, 1, k.size(2))

    def refresh(self, cache):
        """Take over what has changed since tokens were read by other means."""
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
        for static, layer in zip(self.layers, cache.layers):
            if static.last is not None:
                layer.last = static.last.clone()


class GraphReader(Reader):
    """A Reader that replays its step where a text has grown by one token; all else it reads as a Reader does."""

    def __init__(self, model, pad=None):
        super().__init__(model, pad=pad)
        self.replay = None
        self.stale = True  # have tokens been read since the last step by other means?

    def next_logits(self, text, last=1):
        N = text.size(1)
        grown_by_one = self.start is not None and N - self.start == self.cache.length + 1 <= self.block_size
        if not grown_by_one or last != 1:
            if not self.stale:
                self.static.give_back(self.cache)
            self.stale = True
            return super().next_logits(text, last)
        if self.replay is None:
            self._record(text)
        if self.stale:
            self.static.refresh(self.cache)
            self.stale = False
        self.token.copy_(text[:, -1:])
        self.position.fill_(self.cache.length)
        self.replay()
        for layer in self.cache.layers:
            layer.length += 1
        return self.logits[:, -1].float()

    def _step(self):
        self.static.make_mask()  # once for all layers
        self.logits, _ = self.model(self.token, cache=self.static)

    def _record(self, text):
        """Prepare the step; on a GPU record it, after a few runs in which PyTorch's libraries set themselves up."""
        self.token, self.position = text[:, -1:].clone(), torch.tensor([self.cache.length], device=text.device)
        self.static = StaticCache(self.cache, self.position)
        self.replay = self._step
        if text.device.type != "cuda":
            return
        with torch.cuda.device(text.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        self.replay = graph.replay
        self.stale = True  # these runs have moved what the token shift remembers
