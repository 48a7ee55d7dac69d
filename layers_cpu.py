"""A layer of a GPT while it learns on a CPU, forward and backward, in two calls of functions in C (layers_cpu.c).

PyTorch takes some 120 operations for a layer. Each must be looked up, allocated for and kept for the backward pass, and
what it writes is read by the next from further away than the cache nearest to the core. layers_cpu.c computes the same
in half to two thirds of the time, each core its own windows.

    layers = Layers.of(worker, model)     # None where it does not fit: then PyTorch computes as before
    layers.lay_out()                      # after each change of the worker's weights
    with layers.adding_up(sums):          # in a thread: the blocks called here are computed by layers_cpu.c,
        loss.backward()                   # and the gradients of their weights added to sums.gradients, float32

Everything else of the model stays PyTorch's: embeddings, the last norm, logits and loss. A model.py or modern.py with
an idea of one's own is noticed (`knows`), and computed by PyTorch.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import threading
from unittest import mock

import torch

import model as model_module
import modern
from model import GPT, dice
from modern import Modern
from native import CannotCompile, compiler, fields, library, of_shape
from utils import first_line, same_dice, say_once

TRIED = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=31, block_size=44, dropout=0.5)  # the model of `knows`
SITES = dict(weights=0, first_sum=1, second_sum=2)  # where there is dropout, as layers_cpu.c numbers it
MATRICES = "attn attn_proj fc fc_proj"


class Linear(ctypes.Structure):
    _fields_ = [*fields(int="N K"), *fields(place="forward backward bias d_weight d_bias")]


class Norm(ctypes.Structure):
    _fields_ = fields(place="weight bias d_weight d_bias")


class Layer(ctypes.Structure):
    _fields_ = [
        *fields(int="B T C H modern threshold", long="seed"),
        *[(name, Linear) for name in MATRICES.split()],
        *[(name, Norm) for name in ("norm_1", "norm_2")],
        *fields(place="shift d_shift cos sin x d_out out d_x kept scratch"),
    ]


here = threading.local()  # here.sums: the Sums to which this thread adds gradients; None where PyTorch computes


@functools.lru_cache(maxsize=None)
def functions_for(dtype):
    """Those of layers_cpu.c for numbers of a dtype. Raises what native.library raises."""
    functions = library("layers_cpu.c", *(["-DBFLOAT16"] if dtype == torch.bfloat16 else []))
    address, number = ctypes.c_void_p, ctypes.c_int
    functions.lay_out.argtypes = [address, number, number, number, number, address, address]
    functions.masks.argtypes = [address, number, ctypes.c_int64, address]
    functions.forward.argtypes = functions.backward.argtypes = [address]
    return functions


def suits(dtype):
    """In words, why PyTorch's products are better here than those of layers_cpu.c; None where they are not."""
    if os.name == "nt":
        return "it was never tried on Windows"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "it is made for x86 CPUs"  # an Apple CPU has a unit for matrices, which PyTorch uses
    if dtype == torch.bfloat16:
        try:
            with open("/proc/cpuinfo") as f:
                flags = f.read()
        except OSError:
            return "it is not known what this CPU can do"
        if "avx512_bf16" not in flags or "amx_bf16" in flags:
            return "it is made for bfloat16 CPUs with AVX-512 and without AMX, which has a unit for matrices"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def place(tensor):
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


class Part:
    """A block of the model that computes: its weights as layers_cpu.c wants them.

    model_block: the same block in float32; it may be the same object. tables: a modern model's cos and sin. Raises
    ValueError where a weight has not the shape that layers_cpu.c counts on.
    """

    def __init__(self, block, functions, tables=None):
        self.block, self.functions = block, functions
        attn, mlp = block.attn, block.mlp
        C, dtype = attn.c_proj.weight.size(1), attn.c_proj.weight.dtype
        self.modern = isinstance(block, modern.Block)
        # Linears whose weights lie behind each other in one matrix (N, K)
        together = [attn.c_q, attn.c_k, attn.c_v] if self.modern else [attn.c_attn]
        self.linears = dict(attn=together, attn_proj=[attn.c_proj], fc=[mlp.c_fc], fc_proj=[mlp.c_proj])
        self.shapes = dict(attn=(3 * C, C), attn_proj=(C, C), fc=(4 * C, C), fc_proj=(C, 4 * C))
        self.norms = {} if self.modern else dict(norm_1=block.ln_1, norm_2=block.ln_2)
        for name, linears in self.linears.items():
            N, K = self.shapes[name]
            for linear in linears:
                of_shape(linear.weight, N // len(linears), K)
                of_shape(linear.bias, N)
        for vector in [v for norm in self.norms.values() for v in (norm.weight, norm.bias)]:
            of_shape(vector, C)
        self.tables = {} if tables is None else {name: t.float().contiguous() for name, t in tables.items()}
        self.sizes = dict(C=C, H=attn.n_head, modern=self.modern)
        [self.dropout] = {attn.dropout, attn.resid_dropout.p, mlp.dropout.p}
        self.weights = dict(block.named_parameters())
        if sum(len(linears) for linears in self.linears.values()) != sum(p.dim() > 1 for p in self.weights.values()):
            raise ValueError("a layer has other matrices")
        self.vectors = {name: torch.empty(p.shape) for name, p in self.weights.items() if p.dim() == 1}  # in float32
        self.panels = {
            name: (torch.empty(N * K, dtype=dtype), torch.empty(N * K, dtype=dtype))  # forward, backward
            for name, (N, K) in self.shapes.items()
        }

    def in_order(self):
        """[(name, weight)], those of one matrix (`linears`) behind each other."""
        order = [linear.weight for linears in self.linears.values() for linear in linears]
        vectors = [p for p in self.weights.values() if p.dim() == 1]
        names = {id(p): name for name, p in self.weights.items()}
        return [(names[id(p)], p) for p in order + vectors]

    def lay_out(self):
        """Take over the block's weights as they are now."""
        for name, linears in self.linears.items():
            N, K = self.shapes[name]
            forward, backward = map(place, self.panels[name])
            for i, linear in enumerate(linears):
                rows = N // len(linears)
                self.functions.lay_out(place(linear.weight), rows, N, K, i * rows, forward, backward)
        for name, vector in self.vectors.items():
            vector.copy_(self.weights[name].detach())

    def structure(self, gradients):
        """The Layer that adds to these gradients: {name of a weight: float32 tensor}."""
        names = {id(p): name for name, p in self.weights.items()}

        def places(p):  # of a vector and its gradient
            return (None, None) if p is None else (place(self.vectors[names[id(p)]]), place(gradients[names[id(p)]]))

        layer = Layer(**self.sizes, **{name: place(table) for name, table in self.tables.items()})
        for name, linears in self.linears.items():
            N, K = self.shapes[name]
            bias, d_bias = places(linears[0].bias)
            d_weight = place(gradients[names[id(linears[0].weight)]])
            setattr(layer, name, Linear(N, K, *map(place, self.panels[name]), bias, d_weight, d_bias))
        for name, norm in self.norms.items():
            (weight, d_weight), (bias, d_bias) = places(norm.weight), places(norm.bias)
            setattr(layer, name, Norm(weight, bias, d_weight, d_bias))
        if self.modern:
            layer.shift, layer.d_shift = places(self.block.shift)
        return layer


class Sums:
    """A thread's gradients of all parts' weights, added up in float32, and the memory in which it computes."""

    def __init__(self, parts):
        self.parts, self.functions = parts, parts[0].functions
        shapes = [(i, name, p.shape) for i, part in enumerate(parts) for name, p in part.in_order()]
        self.flat = torch.zeros(sum(shape.numel() for _, _, shape in shapes))
        self.gradients = [{} for _ in parts]
        for (i, name, shape), piece in zip(shapes, self.flat.split([shape.numel() for _, _, shape in shapes])):
            self.gradients[i][name] = piece.view(shape)
        self.layers = [part.structure(gradients) for part, gradients in zip(parts, self.gradients)]
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.spare = []  # memory for what is kept for the backward pass, not in use
        self.needed = {}  # (B, T) -> (bytes to keep, bytes of scratch)

    def layer(self, i, x, kept, seed):
        """The i-th Layer, for x (B, T, C)."""
        layer, dropout = self.layers[i], self.parts[i].dropout
        layer.B, layer.T = x.shape[:2]
        layer.threshold = min(max(round(256 * dropout), 1), 255) if dropout else 0  # as in model.dropout
        layer.seed, layer.x, layer.kept, layer.scratch = seed, place(x), place(kept), place(self.scratch)
        return layer

    def room(self, i, x):
        """Memory for what the i-th layer keeps of x; makes room in scratch too."""
        shape = tuple(x.shape[:2])
        if shape not in self.needed:
            kept, scratch = ctypes.c_int64(), ctypes.c_int64()
            self.functions.sizes(ctypes.byref(self.layer(i, x, None, 0)), ctypes.byref(kept), ctypes.byref(scratch))
            self.needed[shape] = kept.value, scratch.value
        kept, scratch = self.needed[shape]
        if len(self.scratch) < scratch:
            self.scratch = torch.empty(scratch, dtype=torch.uint8)
        fitting = next((memory for memory in self.spare if len(memory) >= kept), None)
        if fitting is None:
            return torch.empty(kept, dtype=torch.uint8)
        self.spare = [memory for memory in self.spare if memory is not fitting]
        return fitting

    def forward(self, i, x):
        """(what the i-th block makes of x (B, T, C), what backward needs)."""
        seed = draw_seed() if self.parts[i].dropout else 0
        out, kept = torch.empty_like(x), self.room(i, x)
        layer = self.layer(i, x, kept, seed)
        layer.out = place(out)
        self.functions.forward(ctypes.byref(layer))
        return out, (kept, seed)

    def backward(self, i, x, d_out, of_forward):
        """The gradient of x; those of the weights are added to the sums."""
        kept, seed = of_forward
        d_x, d_out = torch.empty_like(x), d_out.contiguous()
        layer = self.layer(i, x, kept, seed)
        layer.d_out, layer.d_x = place(d_out), place(d_x)
        self.functions.backward(ctypes.byref(layer))
        self.spare.append(kept)
        return d_x


def draw_seed():
    """A number from the thread's own random numbers, or from PyTorch's."""
    return int(torch.randint(2**62, (), generator=getattr(dice, "generator", None)))


class Computed(torch.autograd.Function):
    """A block by layers_cpu.c. The gradients of its weights are added to `sums`, so autograd gets none."""

    @staticmethod
    def forward(ctx, x, sums, i, *weights):
        out, ctx.of_forward = sums.forward(i, x)
        ctx.sums, ctx.i = sums, i
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        of_forward, ctx.of_forward = ctx.of_forward, None
        if of_forward is None:
            raise RuntimeError("layers_cpu.c goes backward through a layer once only")
        (x,) = ctx.saved_tensors
        d_x = ctx.sums.backward(ctx.i, x, d_out, of_forward)
        return (d_x, None, None, *[None] * (len(ctx.needs_input_grad) - 3))


# ---------------------------------------------------------------------------------------------------------------------
# All layers


@functools.lru_cache(maxsize=None)
def computed(cls):
    """The subclass of a block's class that is computed by layers_cpu.c in threads that are `adding_up`."""

    def forward(self, x, *others, **named):
        sums = getattr(here, "sums", None)
        if sums is None:
            return cls.forward(self, x, *others, **named)
        return Computed.apply(x.contiguous(), sums, self.number, *sums.parts[self.number].weights.values())

    return type(cls.__name__, (cls,), {"forward": forward})


class Layers:
    """The blocks of a model, which from now on layers_cpu.c computes in threads that are `adding_up`.

    worker: the model that computes, whose blocks are changed in place. model: the same in float32, or the worker.
    Raises CannotCompile, OSError, or ValueError and others where the blocks are not as layers_cpu.c needs them.
    """

    def __init__(self, worker, model):
        dtype = next(worker.parameters()).dtype
        tables = dict(cos=model.cos, sin=model.sin) if isinstance(model, Modern) else None
        functions = functions_for(dtype)
        self.parts = [Part(block, functions, tables) for block in blocks(worker)]
        for number, block in enumerate(blocks(worker)):
            block.number, block.__class__ = number, computed(type(block))
        self.lay_out()

    @torch.no_grad()
    def lay_out(self):
        """Take over the weights of all blocks as they are now."""
        for part in self.parts:
            part.lay_out()

    def sums(self):
        """New Sums, all 0."""
        return Sums(self.parts)

    @staticmethod
    @contextlib.contextmanager
    def adding_up(sums):
        """In this thread, until the end: blocks are computed by layers_cpu.c, their weights' gradients added to sums."""
        here.sums = sums
        try:
            yield
        finally:
            here.sums = None


def blocks(model):
    return model.transformer.h if isinstance(model, GPT) else model.layers


