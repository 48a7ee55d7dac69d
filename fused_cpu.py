"""A pass over a few tokens on a CPU in one call of a function in C: what fused.py is for a GPU.

PyTorch takes some 300 operations for such a pass, and longer to call them than to compute them. fused_cpu.c computes
all of it. Any C compiler will do: it is called once, for a second, and what it made is kept in __pycache__. Where there
is none, PyTorch writes as before.

    prepare(model, "int8")      # model.GPT or modern.Modern, in float32; how: a key of lighten.KINDS
    model(idx, cache=cache)     # from now on by fused_cpu.c, where that fits (FusedStep.fits)

Here is what fused_cpu.c cannot know: where the numbers lie, and which operations make a model.
"""

import copy
import ctypes
import dataclasses
import functools
import math
import os
import threading

import torch
import torch.nn.functional as F

from generate import ROUNDING, KVCache, difference
from lighten import HEAVY, join_qkv, lighten, to_int8
from model import GPT
from modern import Modern
from native import CannotCompile, compiler, fields, library, of_shape
from utils import first_line, same_dice, say_once

MOST = 64  # rows, B texts * T tokens, that are read at once
MOST_IF_HEAVY = 8  # the same of a large model in bfloat16, of which oneDNN multiplies more rows faster
MOST_WEIGHTS = 500_000_000  # of a larger model the weights are not laid out twice, for the memory that would take
TRIED = 128  # tokens of the trials that show whether model and step agree

# As fused_cpu.c numbers them
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
GELU, RELU_SQUARED, SOFT_CAP = 1, 2, 3

# ---------------------------------------------------------------------------------------------------------------------
# The structures of fused_cpu.c, field by field


class Linear(ctypes.Structure):
    _fields_ = [
        *fields(int="N K format bend add newest norm layer"),
        *fields(place="W scale bias x y norm_scale norm_bias shift"),
    ]


class Attention(ctypes.Structure):
    _fields_ = fields(int="H D S", place="k v qkv y cos sin")


class Embedding(ctypes.Structure):
    _fields_ = fields(int="C V n rows", place="wte wpe table factors x")


class Pass(ctypes.Structure):
    _fields_ = fields(
        int="B T last start threads layers", place="tokens before newest logits scratch", long="stride scratch_size"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The step


def why_not(model):
    """In words, why there can be no FusedStep for a model; None where there can."""
    if os.name == "nt":
        return "it was never tried on Windows"
    if type(model) not in (GPT, Modern):
        return f"it is made for model.GPT and modern.Modern, not for {type(model).__name__}"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return "it is made for a model in float32 on a CPU"
    c = model.config
    if c.n_embd // c.n_head % 16:
        return f"it needs heads of a multiple of 16 channels, and these have {c.n_embd // c.n_head}"
    if model.num_params() > MOST_WEIGHTS:
        return f"it is for models of up to {MOST_WEIGHTS:,} weights"
    if c.block_size < 2:
        return "it needs a block_size of 2 or more"
    return None


class FusedStep:
    """step(idx, cache, last) -> logits: what model(idx, cache=cache, last=last)[0] is, by fused_cpu.c.

    It uses as many threads as PyTorch has, and computes the same numbers on any.

    model: a GPT, or a Modern after lighten.join_qkv; its weights are copied, in the number format `how`, a key of
    FORMATS. Raises what native.library raises, and ValueError where a weight has not the shape that fused_cpu.c counts
    on.
    """

    def __init__(self, model, how):
        c = model.config
        self.functions, self.how, self.config = library("fused_cpu.c"), how, c
        self.functions.run.argtypes = [ctypes.c_void_p] * 4
        self.group = self.functions.group()
        self.most = MOST_IF_HEAVY if how == "bfloat16" and model.num_params(embedding=False) >= HEAVY else MOST
        self.held = []  # the tensors that the structures point to
        self.sizes = dict(x=c.n_embd, qkv=3 * c.n_embd, y=c.n_embd, h=4 * c.n_embd, logits=c.vocab_size)
        self.places = {name: self._hold(torch.empty(self.most, n)) for name, n in self.sizes.items()}
        self.embedding, self.turn, steps = self._gpt(model) if isinstance(model, GPT) else self._modern(model)
        if len(steps) != 4 * c.n_layer + 1:
            raise ValueError(f"{len(steps)} products in {c.n_layer} layers")
        self.linears = (Linear * len(steps))(*steps)
        self.scratch_size = max(self.most * (self.group + c.n_embd), c.block_size + self.group + c.n_embd)
        self.scratch = torch.empty(0)  # scratch_size for each thread
        self.memory = self.attentions = None  # where a cache's memory is, and the structures that point into it
        self.lock = threading.Lock()  # of places and scratch, of which each has one pass at a time

    def __deepcopy__(self, memo):
        return self  # its weights never change

    def fits(self, idx, cache):
        """Can it read idx (B, T) after what is in the cache? Not into an empty one, nor of padded rows."""
        (B, T), c = idx.shape, self.config
        if not isinstance(cache, KVCache) or cache.memory.tensor is None or cache.visible.pad is not None:
            return False
        memory, shape = cache.memory.tensor, (c.n_layer, 2, B, c.n_head, c.block_size, c.n_embd // c.n_head)
        if (memory.shape, memory.dtype, idx.dtype) != (shape, torch.float32, torch.int64):
            return False
        few = T > 0 and self.most >= B * T and cache.before == self.embedding.n - 1
        return few and cache.length > 0 and cache.length + T <= c.block_size

    def __call__(self, idx, cache, last=1):
        """idx (B, T) int64, which must fit, after what is in a generate.KVCache -> logits (B, last, V), float32.

        Raises IndexError for a token beyond the vocabulary.
        """
        known = cache.tokens
        try:
            with self.lock:
                return self._read(idx, cache, min(last, idx.size(1)))
        except BaseException:  # Ctrl-C too
            cache.tokens = known
            raise

    def _read(self, idx, cache, last):
        (B, T), layers, threads = idx.shape, cache.layers, torch.get_num_threads()
        if self.memory != (cache.memory.tensor.data_ptr(), B):
            self.memory = cache.memory.tensor.data_ptr(), B
            self.attentions = self._attentions(cache.memory.tensor)
        if len(self.scratch) < threads * self.scratch_size:
            self.scratch = torch.empty(threads * self.scratch_size)
        tokens = (idx if self.embedding.n == 1 else cache.with_before(idx)).contiguous()
        logits = torch.empty(B, last, self.config.vocab_size)
        now = Pass(B, T, last, cache.length, threads, len(layers), tokens.data_ptr())
        now.logits, now.scratch, now.scratch_size = logits.data_ptr(), self.scratch.data_ptr(), self.scratch_size
        if self.turn:  # modern.py's token shift
            newest = torch.empty(len(layers), B, T, self.config.n_embd)
            before = [layer.last for layer in layers]  # (B, 1 or more, C) each
            now.newest, now.stride = newest.data_ptr(), before[0].stride(0)
            addresses = (ctypes.c_void_p * len(layers))(*(b[:, -1].data_ptr() for b in before))
            now.before = ctypes.addressof(addresses)
        if self.functions.run(ctypes.byref(self.embedding), self.linears, self.attentions, ctypes.byref(now)):
            raise IndexError(f"idx: has a token that is not among the {self.config.vocab_size} of the vocabulary")
        for i, layer in enumerate(layers):
            layer.length += T
            if self.turn:
                layer.last = newest[i]
        return logits

    def _hold(self, tensor):
        """Where a tensor's numbers lie, from now on; None for None."""
        if tensor is None:
            return None
        self.held.append(tensor.detach().contiguous())
        return self.held[-1].data_ptr()

    def _linear(self, linear, x, y, **more):
        """A Linear from the place called x to that called y."""
        N, K = self.sizes[y], self.sizes[x]
        weight, bias, scale = of_shape(linear.weight, N, K), of_shape(linear.bias, N), None
        if self.how == "int8":
            weight, scale = to_int8(weight)
            scale = scale[:, 0].bfloat16().float()
        else:
            weight = weight.to(getattr(torch, self.how))
        padding = -N % self.group
        weight = F.pad(weight, (0, 0, 0, padding)).view(-1, self.group, K).transpose(1, 2)  # (N / group, K, group)
        scale, bias = (None if t is None else F.pad(t, (0, padding)) for t in (scale, bias))
        places = {name: self._hold(t) for name, t in dict(W=weight, scale=scale, bias=bias).items()}
        return Linear(N=N, K=K, format=FORMATS[self.how], x=self.places[x], y=self.places[y], **places, **more)

    def _layer(self, block, bend, first, second):
        """The Linears of a layer; first and second: the norms before its attention and before its MLP."""
        return [
            self._linear(block.attn.c_attn, "x", "qkv", **first),
            self._linear(block.attn.c_proj, "y", "x", add=1),
            self._linear(block.mlp.c_fc, "x", "h", bend=bend, **second),
            self._linear(block.mlp.c_proj, "h", "x", add=1),
        ]

    def _gpt(self, model):
        """What a GPT is made of: its Embedding, tables that turn queries and keys (none), and its Linears in order."""
        c, parts, C = model.config, model.transformer, model.config.n_embd
        wte, wpe = of_shape(parts.wte.weight, c.vocab_size, C), of_shape(parts.wpe.weight, c.block_size, C)
        embedding = Embedding(C, c.vocab_size, n=1, wte=self._hold(wte), wpe=self._hold(wpe), x=self.places["x"])

        def norm(module):
            scale, bias = (self._hold(of_shape(t, C)) for t in (module.weight, module.bias))
            return dict(norm=1, norm_scale=scale, norm_bias=bias)

        steps = []
        for block in parts.h:
            steps += self._layer(block, GELU, norm(block.ln_1), norm(block.ln_2))
        steps.append(self._linear(model.lm_head, "x", "logits", newest=1, **norm(parts.ln_f)))
        return embedding, {}, steps

    def _modern(self, model):
        """The same of a Modern."""
        c, C, ngrams = model.config, model.config.n_embd, model.ngrams
        wte = self._hold(of_shape(model.wte.weight, c.vocab_size, C))
        embedding = Embedding(C, c.vocab_size, n=c.ngram, wte=wte, x=self.places["x"])
        if ngrams is not None:
            embedding.rows = c.ngram_rows
            embedding.table = self._hold(of_shape(ngrams.table.weight, c.ngram_rows, C))
            embedding.factors = self._hold(of_shape(ngrams.factors, c.ngram))
        steps = []
        for i, block in enumerate(model.layers):
            shifted = dict(norm=1, shift=self._hold(of_shape(block.shift, C)), layer=i)
            steps += self._layer(block, RELU_SQUARED, shifted, dict(norm=1))
        steps.append(self._linear(model.lm_head, "x", "logits", bend=SOFT_CAP, newest=1, norm=1))
        tables = dict(cos=model.cos, sin=model.sin)
        turn = {name: self._hold(of_shape(t, c.block_size, C // c.n_head)) for name, t in tables.items()}
        return embedding, turn, steps

    def _attentions(self, memory):
        """An Attention for each layer of a generate.Memory's tensor (n_layer, 2, B, H, S, D)."""
        here = dict(zip("HSD", memory.shape[3:]), qkv=self.places["qkv"], y=self.places["y"], **self.turn)
        each = [Attention(k=layer[0].data_ptr(), v=layer[1].data_ptr(), **here) for layer in memory]
        return (Attention * len(each))(*each)


def disagreement(model, step):
    """By what share a step's logits differ from those of its model, which may be in a lighter format, for a few random
    tokens at the end of a text."""
    c = model.config
    n = min(4, c.block_size - 1)
    idx = torch.randint(c.vocab_size, (1, min(c.block_size, TRIED)), generator=torch.Generator().manual_seed(0))
    cache = KVCache(c)
    model(idx[:, :-n], cache=cache)
    logits = step(idx[:, -n:], copy.deepcopy(cache), n)
    return difference(logits, model(idx[:, -n:], cache=cache, last=n)[0].float())


@torch.inference_mode()
def knows(cls, config):
    """Does fused_cpu.c compute what a class of models does? Not, where its code was changed.

    Shown by a small model of random weights in float32: what an idea changes in large ones alone, or behind more tokens
    than are TRIED, is not seen.
    """
    sizes = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=31, block_size=TRIED)
    sizes.update(dict(ngram_rows=61, ahead=1) if cls is Modern else {})
    with same_dice(torch.device("cpu")):
        torch.manual_seed(0)
        model = cls(dataclasses.replace(config, **sizes)).eval()
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return disagreement(join_qkv(model), FusedStep(model, "float32")) < 1e-4


@functools.lru_cache(maxsize=None)
def stepping(cls):
    """The subclass of a model's class that is called by way of its `fused`, a FusedStep, where that fits."""

    def call(self, idx, targets=None, cache=None, last=1):
        if cache is not None and targets is None and self.fused.fits(idx, cache):
            return self.fused(idx, cache, last), None
        return self.forward(idx, targets, cache, last)

    return type(cls.__name__, (cls,), {"__call__": call})


OTHER_MODEL = "it computes another model than model.py or modern.py"


def say(why):
    """Print a line of what one would not expect, once. Returns why."""
    say_once(f"fused_cpu.c is not used, and writing is slower: {why}")
    return why


def fused_step(model, how):
    """A FusedStep for a model, and None; or None, and in words why there is none. how: a key of FORMATS."""
    why = why_not(model)
    if why is not None:
        return None, why
    try:
        if not knows(type(model), model.config):
            return None, say(OTHER_MODEL)
        return FusedStep(join_qkv(model), how), None
    except CannotCompile as error:
        return None, say(str(error)) if compiler() else str(error)
    except OSError as error:
        return None, say(f"it cannot be loaded: {error}")
    except Exception as error:  # of a model that has other parts, or parts of other shapes
        return None, say(f"{OTHER_MODEL} ({first_line(error) or type(error).__name__})")


@torch.inference_mode()
def prepare(model, how):
    """lighten.lighten(model, how), and where it can be, let a FusedStep read few tokens, in place.

    Returns None, or in words why there is no such step. Raises UserError as lighten does.
    """
    # The two formats of "16 bits" are for few and for many tokens.
    step, why = fused_step(model, "float16" if how == "16 bits" else how)
    lighten(model, "bfloat16" if step is not None and how == "16 bits" else how)
    if step is None:
        return why
    differ = disagreement(model, step)
    if not math.isfinite(differ):
        return "the model computes infinities or NaN"
    if differ > ROUNDING:
        return say(OTHER_MODEL)
    model.fused = step
    model.__class__ = stepping(type(model))
    return None
