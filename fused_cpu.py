"""A pass over a few tokens on a CPU in one call of a function in C: what fused.py is for a GPU.

PyTorch takes some 300 operations for such a pass, and longer to call them than to compute them. fused_cpu.c computes
all of it. Any C compiler will do: it is called once, for a second, and what it made is kept in __pycache__. Where there
is none, PyTorch writes as before.

    prepare(model, "int8")      # model.GPT or modern.Modern, in float32; how: a key of lighten.KINDS
    model(idx, cache=cache)     # from now on by fused_cpu.c, where that fits (FusedStep.fits)

Here is what fused_cpu.c cannot know: where the numbers lie, and which operations make a model.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F

from generate import KVCache
from lighten import HEAVY, join_qkv, lighten, to_int8
from model import GPT
from modern import Modern
from utils import HERE, first_line

SOURCE = os.path.join(HERE, "fused_cpu.c")
FLAGS = ["-O3", "-fPIC", "-shared", "-lm"]
MOST = 64  # rows, B texts * T tokens, that are read at once
MOST_IF_HEAVY = 8  # the same of a large model in bfloat16, of which oneDNN multiplies more rows faster
MOST_WEIGHTS = 500_000_000  # of a larger model the weights are not laid out twice, for the memory that would take
TRIED = 128, 4  # tokens of the trial that shows whether model and step agree: read before, and by both

# As fused_cpu.c numbers them
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
ROUNDING = {"float32": 0.001, "bfloat16": 0.05, "float16": 0.05, "int8": 0.1}  # by which logits may differ in the trial
GELU, RELU_SQUARED, SOFT_CAP = 1, 2, 3

# ---------------------------------------------------------------------------------------------------------------------
# The structures of fused_cpu.c, field by field


def fields(**names):
    """int, long, place: names of fields of that type, in one string."""
    types = dict(int=ctypes.c_int32, long=ctypes.c_int64, place=ctypes.c_void_p)
    return [(name, types[kind]) for kind, several in names.items() for name in several.split()]


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
# Compiling


def compiler():
    """The path of a C compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def processor():
    """What this CPU can do, in words: what was compiled on one may not run on another."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def loaded(path):
    """The functions of fused_cpu.c, from a shared library."""
    functions = ctypes.CDLL(path)
    functions.run.argtypes = [ctypes.c_void_p] * 4
    return functions


@functools.lru_cache(maxsize=None)
def library():
    """fused_cpu.c, compiled for this CPU. Raises OSError or subprocess.CalledProcessError where that cannot be."""
    with open(SOURCE, "rb") as f:
        source = f.read()
    cc = compiler()
    flags = [*FLAGS, "-march=native"] if platform.machine() in ("x86_64", "AMD64") else FLAGS
    digest = hashlib.sha256(repr((source, cc, flags, processor())).encode()).hexdigest()[:16]
    directory = os.path.join(HERE, "__pycache__")
    kept = os.path.join(directory, f"fused_cpu-{digest}.so")
    if os.path.exists(kept):
        return loaded(kept)
    if cc is None:
        raise OSError("there is no C compiler")
    try:
        os.makedirs(directory, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=directory)
    except OSError:  # not ours to write to: then it is compiled each time
        directory, place = None, tempfile.TemporaryDirectory()
    with place as temporary:
        made = os.path.join(temporary, "made.so")
        command = [cc, SOURCE, "-o", made, *flags]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode != 0:  # Apple's Clang has no OpenMP
            subprocess.run(command, check=True, capture_output=True, text=True)
        if directory is not None:
            os.replace(made, kept)  # at once: another process may be doing the same
        return loaded(made if directory is None else kept)


# ---------------------------------------------------------------------------------------------------------------------
# The step


def why_not(model):
    """In words, why there can be no FusedStep for a model; None where there can."""
    if os.name == "nt":
        return "it was never tried on Windows"
    if type(model) not in (GPT, Modern):
        return f"it is made for model.GPT and modern.Modern, not for {type(model).__name__}"
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

    model: a GPT, or a Modern after lighten.join_qkv; its weights are copied, in the number format `how`, a key of
    FORMATS. One pass at a time: the numbers between its operations have one place. Raises what library() raises.
    """

    def __init__(self, model, how):
        c = model.config
        self.functions, self.how, self.config = library(), how, c
        self.group = self.functions.group()
        self.held = []  # the tensors that the structures point to
        sizes = dict(x=c.n_embd, qkv=3 * c.n_embd, y=c.n_embd, h=4 * c.n_embd)
        self.most = MOST_IF_HEAVY if how == "bfloat16" and model.num_params(embedding=False) >= HEAVY else MOST
        self.places = {name: self._hold(torch.empty(self.most, n)) for name, n in sizes.items()}
        self.embedding, self.turn, steps = self._gpt(model) if isinstance(model, GPT) else self._modern(model)
        self.linears = (Linear * len(steps))(*steps)
        self.scratch_size = max(self.most * (self.group + 4 * c.n_embd), c.block_size + self.group + c.n_embd)
        self.scratch = torch.empty(0)  # scratch_size for each thread
        self.memory = self.attentions = None  # of a cache, and the structures that point into it
        self.threads = None  # on how many it is done, with the same numbers on any; None: as many as PyTorch has

    def fits(self, idx, cache):
        """Can it read idx (B, T) after what is in the cache? Not into an empty one, nor of padded rows."""
        (B, T), memory = idx.shape, cache.memory.tensor if isinstance(cache, KVCache) else None
        if memory is None or memory.dtype != torch.float32 or memory.size(2) != B or cache.visible.pad is not None:
            return False
        return cache.length > 0 and cache.length + T <= self.config.block_size and self.most >= B * T

    def __call__(self, idx, cache, last=1):
        """idx (B, T) int64, which must fit, after what is in a generate.KVCache -> logits (B, last, V), float32.

        Raises IndexError for a token beyond the vocabulary.
        """
        (B, T), layers, threads = idx.shape, cache.layers, self.threads or torch.get_num_threads()
        last = min(last, T)
        if self.memory is not cache.memory.tensor:
            self.memory, self.attentions = cache.memory.tensor, self._attentions(cache.memory.tensor)
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
        weight, scale = linear.weight.detach(), None
        (N, K), missing = weight.shape, -len(weight) % self.group
        if self.how == "int8":
            weight, scale = to_int8(weight)
            scale = F.pad(scale[:, 0].bfloat16().float(), (0, missing))
        else:
            weight = weight.to(getattr(torch, self.how))
        weight = F.pad(weight, (0, 0, 0, missing)).view(-1, self.group, K).transpose(1, 2)  # (N / group, K, group)
        bias = None if linear.bias is None else F.pad(linear.bias, (0, missing))
        tensors = {name: self._hold(t) for name, t in dict(W=weight, scale=scale, bias=bias).items()}
        return Linear(N=N, K=K, format=FORMATS[self.how], x=self.places[x], y=self.places.get(y), **tensors, **more)

    def _gpt(self, model):
        """What a GPT is made of: its Embedding, tables that turn queries and keys (none), and its Linears in order."""

        def norm(module):
            return dict(norm=1, norm_scale=self._hold(module.weight), norm_bias=self._hold(module.bias))

        c, parts = model.config, model.transformer
        wte, wpe = (self._hold(table.weight) for table in (parts.wte, parts.wpe))
        steps = []
        for block in parts.h:
            steps += [
                self._linear(block.attn.c_attn, "x", "qkv", **norm(block.ln_1)),
                self._linear(block.attn.c_proj, "y", "x", add=1),
                self._linear(block.mlp.c_fc, "x", "h", bend=GELU, **norm(block.ln_2)),
                self._linear(block.mlp.c_proj, "h", "x", add=1),
            ]
        steps.append(self._linear(model.lm_head, "x", "logits", newest=1, **norm(parts.ln_f)))
        return Embedding(c.n_embd, c.vocab_size, n=1, wte=wte, wpe=wpe, x=self.places["x"]), {}, steps

    def _modern(self, model):
        """The same of a Modern."""
        c, ngrams = model.config, model.ngrams
        embedding = Embedding(c.n_embd, c.vocab_size, n=c.ngram, wte=self._hold(model.wte.weight), x=self.places["x"])
        if ngrams is not None:
            embedding.rows, embedding.table = c.ngram_rows, self._hold(ngrams.table.weight)
            embedding.factors = self._hold(ngrams.factors)
        steps = []
        for i, block in enumerate(model.layers):
            steps += [
                self._linear(block.attn.c_attn, "x", "qkv", norm=1, shift=self._hold(block.shift), layer=i),
                self._linear(block.attn.c_proj, "y", "x", add=1),
                self._linear(block.mlp.c_fc, "x", "h", bend=RELU_SQUARED, norm=1),
                self._linear(block.mlp.c_proj, "h", "x", add=1),
            ]
        steps.append(self._linear(model.lm_head, "x", "logits", bend=SOFT_CAP, newest=1, norm=1))
        return embedding, dict(cos=self._hold(model.cos), sin=self._hold(model.sin)), steps

    def _attentions(self, memory):
        """An Attention for each layer of a generate.Memory's tensor (n_layer, 2, B, H, S, D)."""
        here = dict(zip("HSD", memory.shape[3:]), qkv=self.places["qkv"], y=self.places["y"], **self.turn)
        each = [Attention(k=layer[0].data_ptr(), v=layer[1].data_ptr(), **here) for layer in memory]
        return (Attention * len(each))(*each)


def disagreement(model, step):
    """By what share a step's logits differ from its model's: by more than ROUNDING, where the model's code was changed.

    Shown by a trial: what an idea changes only behind more tokens than are TRIED is not seen.
    """
    c, (before, n) = model.config, TRIED
    n = min(n, c.block_size - 1)
    before = min(before, c.block_size - n)
    idx = torch.randint(c.vocab_size, (1, before + n), generator=torch.Generator().manual_seed(0))
    caches = KVCache(c), KVCache(c)
    for cache in caches:
        model(idx[:, :before], cache=cache)
    expected = model(idx[:, before:], cache=caches[0], last=n)[0].float()
    logits = step(idx[:, before:], caches[1], n)
    return float((logits - expected).norm() / (expected - expected.mean()).norm().clamp(min=1e-9))


@functools.lru_cache(maxsize=None)
def stepping(cls):
    """The subclass of a model's class that is called by way of its `fused`, a FusedStep, where that fits."""

    def call(self, idx, targets=None, cache=None, last=1):
        if cache is not None and targets is None and self.fused.fits(idx, cache):
            return self.fused(idx, cache, last), None
        return self.forward(idx, targets, cache, last)

    return type(cls.__name__, (cls,), {"__call__": call})


@functools.lru_cache(maxsize=None)
def say(why):
    """Print a line on stderr, once, of what one would not expect. Returns why."""
    print(f"fused_cpu.c is not used, and writing is slower: {why}", file=sys.stderr)
    return why


@torch.inference_mode()
def prepare(model, how):
    """lighten.lighten(model, how), and where it can be, let a FusedStep read few tokens, in place.

    Returns None, or in words why there is no such step. Raises UserError as lighten does.
    """
    step, why = None, why_not(model)
    join_qkv(model)
    if why is None:
        try:
            step = FusedStep(model, "float16" if how == "16 bits" else how)
        except OSError as error:
            why = str(error)
        except subprocess.CalledProcessError as error:
            why = say(f"it cannot be compiled: {first_line(error.stderr)}")
    # The two formats of "16 bits" are for few and for many tokens.
    lighten(model, "bfloat16" if step is not None and how == "16 bits" else how)
    if step is not None:
        differ = disagreement(model, step)
        if not math.isfinite(differ):
            why = "the model computes infinities or NaN"
        elif differ > ROUNDING[step.how]:
            why = say("it computes another model than model.py and modern.py")
    if why is None:
        model.fused = step
        model.__class__ = stepping(type(model))
    return why
