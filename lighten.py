"""Lighter weights for writing: one token at a time, a model is as fast as its weights can be read from memory.

    lighten(model, "bfloat16")     # half the bytes of float32, for a CPU that has bfloat16 in hardware
    lighten(model, "float16")      # half the bytes too, for any other x86 CPU with AVX2
    lighten(model, "16 bits")      # both: float16 reads a few tokens faster, bfloat16 a prompt or many texts at once
    lighten(model, "int8")         # a quarter; needs PyTorch 2.3

Only the matrices change (nn.Linear), and only how they are stored and multiplied: between them flows float32. "float32"
keeps their numbers, and is faster all the same: the model's parts are called without PyTorch's ado (call_directly).
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from utils import UserError, has_bfloat16

PACKED_FOR = 4  # tokens at once, as when writing: for so many oneDNN lays out weights
LIGHT_ENOUGH = 4_000_000  # weights that a CPU holds in its cache in float32, where fewer bytes gain nothing
HEAVY = 32_000_000  # weights from which on one format is enough: a second one takes long to make, and much memory


def has_float16():
    """Is there FBGEMM, the library that multiplies with float16 weights on x86 CPUs with AVX2?"""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def fits_float16(model):
    """Is every number of the model's matrices within what float16 can hold?"""
    extremes = [m.weight.aminmax() for m in linears(model)]
    return all(max(-low, high) <= torch.finfo(torch.float16).max for low, high in extremes)


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def usual_format(model):
    """The format in which a model writes fastest on this CPU without losing exactness that one could notice."""
    weights = model.num_params(embedding=False)
    if weights < LIGHT_ENOUGH:
        return "float32"
    bfloat16 = has_bfloat16(torch.device("cpu"))
    if bfloat16 and weights >= HEAVY:
        return "bfloat16"
    if has_float16() and fits_float16(model):
        return "16 bits" if bfloat16 else "float16"
    return "bfloat16" if bfloat16 else "float32"


class Bfloat16Linear(nn.Module):
    """A Linear with bfloat16 weights and products."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight.bfloat16(), None if bias is None else bias.bfloat16()

    def forward(self, x):
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


class PackedBfloat16Linear(nn.Module):
    """The same, with the weights laid out once as oneDNN's product reads them; F.linear has it done in every call."""

    def __init__(self, weight, bias):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), PACKED_FOR)
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [], "").float()


@functools.lru_cache(maxsize=None)
def packs_bfloat16():
    """Can oneDNN lay weights out here? It needs bfloat16 hardware and operations meant for PyTorch's compiler."""
    try:
        PackedBfloat16Linear(torch.ones(16, 16), None)(torch.ones(1, 16))
    except (AttributeError, RuntimeError):
        return False
    return True


def bfloat16_linear(weight, bias):
    """A Linear with bfloat16 weights, the faster kind that there is here."""
    return (PackedBfloat16Linear if packs_bfloat16() else Bfloat16Linear)(weight, bias)


class Float16Linear(nn.Module):
    """A Linear with float16 weights, which become float32 on their way to the registers: the products are float32's."""

    def __init__(self, weight, bias):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16.default
        self.multiply = getattr(multiply, "_op", multiply)  # what it calls, which takes a tenth less time

    def forward(self, x):
        return self.multiply(x, self.packed)


class Linear16Bits(Float16Linear):
    """float16 weights for a few tokens, bfloat16 weights for many: as many bytes as float32, of which half are read.

    oneDNN's product is called with more ado, and in a bfloat16 that lasts only from one cast to the next: a few tokens
    take FBGEMM less time.
    """

    FEW = 8

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.many, self.few = bfloat16_linear(weight, bias), self.FEW * weight.size(1)

    def forward(self, x):
        return super().forward(x) if x.numel() <= self.few else self.many(x)


def to_int8(matrix):
    """(out, in) float32 -> whole numbers from -127 to 127 (out, in) and a scale for each row (out, 1)."""
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear whose rows are whole numbers, each row times a scale of its own (absmax, per channel).

    The product is a kernel of PyTorch's that turns the whole numbers into bfloat16 on the way to the registers. It is
    made for a few tokens: of many, as in a prompt, a CPU is faster to turn all of them into bfloat16 or float32 first.
    """

    MANY = 64

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, scale = to_int8(weight)
        self.scale, self.bias = scale[:, 0].bfloat16(), bias
        self.dtype = torch.bfloat16 if has_bfloat16(weight.device) else torch.float32

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if len(rows) >= self.MANY:
            y = F.linear(rows.to(self.dtype), self.weight.to(self.dtype)) * self.scale
        else:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y.float() if self.bias is None else y + self.bias  # bfloat16 + float32 is float32


KINDS = {
    "float32": None,  # as it is
    "bfloat16": bfloat16_linear,
    "float16": Float16Linear,
    "16 bits": Linear16Bits,
    "int8": Int8Linear,
}


@functools.lru_cache(maxsize=None)
def direct(cls):
    """The subclass of a class of modules that does what its `forward` says when called, and nothing before or after."""
    return type(cls.__name__, (cls,), {"__call__": cls.forward})


def call_directly(model):
    """Spare a model what PyTorch does to find and call each of its parts, in place: a tenth of a pass over few tokens.

    A module looks for hooks each time it is called, and keeps its parts where Python looks last. From now on hooks are
    not called, and a part must not be replaced.
    """
    for module in model.modules():
        module.__dict__.update({**module._parameters, **module._modules})
        module.__class__ = direct(type(module))


@torch.no_grad()
def join_qkv(model):
    """Make modern.py's three matrices for queries, keys and values one, in place, which need not be joined each time.

    Returns the model, which can then write and be measured, but no longer be saved.
    """
    for module in list(model.modules()):
        if hasattr(module, "c_q"):
            weight = torch.cat([module.c_q.weight, module.c_k.weight, module.c_v.weight])  # (3C, C)
            module.c_attn = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
            module.c_attn.weight = nn.Parameter(weight, requires_grad=False)
            del module.c_q, module.c_k, module.c_v
    return model


@torch.no_grad()
def lighten(model, how):
    """Make a float32 model on the CPU one for writing, in place, with weights of the format `how`, a key of KINDS.

    Returns the model, which can then write and be measured, but no longer be trained or saved. Raises UserError where
    this machine or model cannot have such weights.
    """
    if how == "float16" and not has_float16():
        raise UserError("--dtype float16: on a CPU needs an x86 with AVX2; use bfloat16 or float32")
    if how == "float16" and not fits_float16(model):
        raise UserError("--dtype float16: the model has a weight beyond 65504, where float16 ends; use --dtype float32")
    if how == "int8" and not hasattr(torch, "_weight_int8pack_mm"):
        raise UserError(f"--quantize int8: needs PyTorch 2.3 or newer, not {torch.__version__}; use --dtype bfloat16")
    if how == "int8" and any(m.in_features % 16 for m in linears(model)):  # the kernel reads 16 numbers at once
        raise UserError("--quantize int8: needs an n_embd that is a multiple of 16; use --dtype bfloat16")
    join_qkv(model)
    if KINDS[how] is not None:
        replace_linears(model, how)
    call_directly(model)
    return model


def replace_linears(model, how):
    """Replace every Linear of a model, in place, by one of `how`."""
    places = [(m, name) for m in model.modules() for name, child in m.named_children() if isinstance(child, nn.Linear)]

    def replace(place):
        module, name = place
        child = getattr(module, name)
        bias = None if child.bias is None else child.bias.detach().clone()
        setattr(module, name, KINDS[how](child.weight.detach(), bias))

    # A core for each: what FBGEMM does to float16 weights, 13 s for a billion of them, uses only one.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(replace, places)
        for _ in tqdm(done, f"weights to {how}", len(places), delay=2, leave=False):
            pass
