"""The layers of a GPT while it learns on a CPU, forward and backward, in two calls of functions in C (layers_cpu.c).

PyTorch takes some 120 operations for a layer. Each must be looked up, allocated for and kept for the backward pass, and
what it writes is read by the next from further away than the cache nearest to the core. layers_cpu.c computes the same
in half to two thirds of the time, each core its own windows.

    worker, layers = in_c(worker, model)  # layers is None where that does not fit: then PyTorch computes as before
    layers.lay_out()                      # after each change of the worker's weights
    sums = layers.sums()                  # of a thread
    with adding_up(sums):                 # in that thread: blocks that are called now are computed by layers_cpu.c,
        worker(x, y)[1].backward()        # and the gradients of their weights added to sums.gradients, in float32

Everything else of the model stays PyTorch's: embeddings, the last norm, logits and loss. A model.py or modern.py with
an idea of one's own is noticed (`knows`), and computed by PyTorch.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import os
import sys
import threading

import torch

import model as model_module
import modern
from model import GPT, GPTConfig, dice
from modern import Modern, ModernConfig
from native import CannotCompile, fields, library, of_shape
from utils import first_line, same_dice, say_once

TRIED = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=31, block_size=44, dropout=0.5)  # the model of `knows`
MOST_SUMS = 500_000_000  # numbers, for the gradients of all threads: 2 GB
OTHER_MODEL = "it computes other layers than those of model.py or modern.py"


class Linear(ctypes.Structure):
    _fields_ = [*fields(int="N K"), *fields(place="forward backward bias d_weight d_bias")]


class Norm(ctypes.Structure):
    _fields_ = fields(place="weight bias d_weight d_bias")


class Layer(ctypes.Structure):
    _fields_ = [
        *fields(int="C H modern"),
        *[(name, Linear) for name in ("attn", "attn_proj", "fc", "fc_proj")],
        *[(name, Norm) for name in ("norm_1", "norm_2")],
        *fields(place="shift d_shift cos sin", int="B T threshold add"),
        *fields(place="seeds x out kept"),
    ]


class Pass(ctypes.Structure):
    _fields_ = fields(int="B T layers threshold add", place="seeds x d_out out d_x kept scratch")


here = threading.local()  # here.sums: the Sums to which this thread adds gradients; None where PyTorch computes


@functools.lru_cache(maxsize=None)
def functions_for(dtype):
    """Those of layers_cpu.c for numbers of a dtype. Raises what native.library raises."""
    functions = library("layers_cpu.c", *(["-DBFLOAT16"] if dtype == torch.bfloat16 else []))
    address, number = ctypes.c_void_p, ctypes.c_int
    functions.lay_out.argtypes = [address, number, number, number, number, address, address]
    functions.masks.argtypes = [address, number, ctypes.c_int64, address]
    functions.sizes.argtypes = [address] * 4
    functions.forward.argtypes = functions.backward.argtypes = [address] * 2
    return functions


def needed_bytes(functions, layers, B, T):
    """(bytes to keep of B windows of T tokens for the backward pass, bytes of scratch) of an array of Layers, of which
    C and H count."""
    kept, scratch, asked = ctypes.c_int64(), ctypes.c_int64(), Pass(B, T, len(layers))
    functions.sizes(layers, *map(ctypes.byref, (asked, kept, scratch)))
    return kept.value, scratch.value


def unsuited(dtype):
    """In words, why PyTorch is as fast here as layers_cpu.c, or not known to be slower; None where it is slower.

    An Apple CPU, and Intel's with AMX, have a unit for products of matrices, which PyTorch uses and layers_cpu.c does
    not; with fewer and shorter vectors than AVX-512's, PyTorch's products are the faster ones (docs/speed.md).
    """
    if os.name == "nt":
        return "it was never tried on Windows"
    try:
        with open("/proc/cpuinfo") as f:
            can = set(f.read().split())
    except OSError:
        can = set()
    if "avx512f" not in can:
        return "it is made for CPUs with AVX-512"
    if dtype == torch.bfloat16 and ("avx512_bf16" not in can or "amx_bf16" in can):
        return "it is made for CPUs that have bfloat16 in AVX-512 and no AMX"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def place(tensor):
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


class Part:
    """A block of the model that computes: its weights as layers_cpu.c wants them.

    tables: a modern model's cos and sin, in float32. Raises ValueError where a weight has not the shape that
    layers_cpu.c counts on, and AttributeError where one is missing.
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
                if linear.weight.dtype != dtype or not linear.weight.is_contiguous():
                    raise ValueError("a weight in another number format or order")
        for vector in [v for norm in self.norms.values() for v in (norm.weight, norm.bias)]:
            of_shape(vector, C)
        self.tables = {} if tables is None else {name: t.float().contiguous() for name, t in tables.items()}
        self.sizes = dict(C=C, H=attn.n_head, modern=self.modern)
        [self.dropout] = {attn.dropout, attn.resid_dropout.p, mlp.dropout.p}
        vectors = [p for p in block.parameters() if p.dim() == 1]
        self.matrices = [linear.weight for linears in self.linears.values() for linear in linears]
        if {*self.matrices, *vectors} != set(block.parameters()):
            raise ValueError("a layer has other weights")
        self.vectors = {p: torch.empty(p.shape) for p in vectors}  # in float32
        self.panels = {
            name: (torch.empty(N * K, dtype=dtype), torch.empty(N * K, dtype=dtype))  # forward, backward
            for name, (N, K) in self.shapes.items()
        }

    def lay_out(self):
        """Take over the block's weights as they are now."""
        for name, linears in self.linears.items():
            N, K = self.shapes[name]
            forward, backward = map(place, self.panels[name])
            for i, linear in enumerate(linears):
                rows = N // len(linears)
                self.functions.lay_out(place(linear.weight), rows, N, K, i * rows, forward, backward)
        for p, vector in self.vectors.items():
            vector.copy_(p)

    def structure(self, gradients):
        """The Layer that adds to these gradients: {weight: float32 tensor}."""

        def places(p):  # of a vector and its gradient
            return (None, None) if p is None else (place(self.vectors[p]), place(gradients[p]))

        layer = Layer(**self.sizes, **{name: place(table) for name, table in self.tables.items()})
        for name, linears in self.linears.items():
            N, K = self.shapes[name]
            bias, d_bias = places(linears[0].bias)
            d_weight = place(gradients[linears[0].weight])
            setattr(layer, name, Linear(N, K, *map(place, self.panels[name]), bias, d_weight, d_bias))
        for name, norm in self.norms.items():
            (weight, d_weight), (bias, d_bias) = places(norm.weight), places(norm.bias)
            setattr(layer, name, Norm(weight, bias, d_weight, d_bias))
        if self.modern:
            layer.shift, layer.d_shift = places(self.block.shift)
        return layer


class Sums:
    """A thread's gradients of all blocks' weights, added up in float32, and the memory in which it computes."""

    def __init__(self, parts):
        self.parts, self.functions = parts, parts[0].functions
        matrices = [p for part in parts for p in part.matrices]
        weights = matrices + [p for part in parts for p in part.vectors]
        numbers = [p.numel() for p in weights]
        self.flat = torch.zeros(sum(numbers))
        self.of_vectors = self.flat[sum(numbers[: len(matrices)]) :]
        self.add = 0
        self.gradients = {p: piece.view(p.shape) for p, piece in zip(weights, self.flat.split(numbers))}
        self.layers = (Layer * len(parts))(*(part.structure(self.gradients) for part in parts))
        self.channels, self.dtype = parts[0].sizes["C"], matrices[0].dtype
        [self.rate] = {part.dropout for part in parts}
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.spare = []  # memory for what is kept for the backward pass, not in use
        self.needed = {}  # (B, T) -> (bytes to keep, bytes of scratch)

    @property
    def dropout(self):
        return self.rate if self.parts[0].block.training else 0.0

    def begin(self):
        """Forget what was added up."""
        self.of_vectors.zero_()
        self.add = 0  # the next gradients of matrices take the place of those that are there

    def a_pass(self, x, seeds, kept=None):
        """A Pass of x (B, T, C)."""
        B, T = x.shape[:2]
        places = dict(seeds=place(seeds), x=place(x), kept=place(kept), scratch=place(self.scratch))
        return Pass(B, T, len(self.layers), threshold(self.dropout), self.add, **places)

    def room(self, x):
        """Memory for what is kept of x; makes room in scratch too."""
        shape = tuple(x.shape[:2])
        if shape not in self.needed:
            self.needed[shape] = needed_bytes(self.functions, self.layers, *shape)
        kept, scratch = self.needed[shape]
        if len(self.scratch) < scratch:
            self.scratch = torch.empty(scratch, dtype=torch.uint8)
        if self.spare and len(self.spare[-1]) >= kept:
            return self.spare.pop()
        return torch.empty(kept, dtype=torch.uint8)

    def forward(self, x):
        """(what the blocks make of x (B, T, C), what backward needs). Raises ValueError for another kind of x."""
        if x.dtype != self.dtype or x.dim() != 3:
            raise ValueError(f"{x.dtype} of {x.dim()} dimensions in place of {self.dtype} of 3")
        of_shape(x, *x.shape[:2], self.channels)
        seeds, kept = draw_seeds(len(self.layers)) if self.dropout else None, self.room(x)
        out, now = torch.empty_like(x), self.a_pass(x, seeds, kept)
        now.out = place(out)
        self.functions.forward(self.layers, ctypes.byref(now))
        return out, (seeds, kept)

    def backward(self, x, d_out, of_forward):
        """The gradient of x; those of the weights are added to the sums."""
        seeds, kept = of_forward
        d_x, d_out = torch.empty_like(x), d_out.contiguous()
        now = self.a_pass(x, seeds, kept)
        now.d_out, now.d_x = place(d_out), place(d_x)
        self.functions.backward(self.layers, ctypes.byref(now))
        self.spare, self.add = [kept], 1
        return d_x


def threshold(p):
    """Of 256 numbers, how many dropout sets to zero at a rate of p: as in model.dropout."""
    return min(max(round(256 * p), 1), 255) if p else 0


def draw_seeds(layers):
    """Numbers from the thread's own random numbers, or from PyTorch's, for the three dropouts of each layer."""
    return torch.randint(2**62, (layers, 3), generator=getattr(dice, "generator", None))


class Computed(torch.autograd.Function):
    """All blocks by layers_cpu.c. The gradients of their weights are added to `sums`, so autograd gets none."""

    @staticmethod
    def forward(ctx, x, sums, *weights):
        out, ctx.of_forward = sums.forward(x)
        ctx.sums = sums
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        of_forward, ctx.of_forward = ctx.of_forward, None
        if of_forward is None:
            raise RuntimeError("layers_cpu.c goes backward through a layer once only")
        (x,) = ctx.saved_tensors
        d_x = ctx.sums.backward(x, d_out, of_forward)
        return (d_x, None, *[None] * (len(ctx.needs_input_grad) - 2))


# ---------------------------------------------------------------------------------------------------------------------
# All layers


@functools.lru_cache(maxsize=None)
def computed(cls):
    """The subclass of a block's class that is computed by layers_cpu.c in threads that are `adding_up`.

    The first block then does the work of all of them, in one call, and the others pass on what it made.
    """

    def forward(self, x, *others, **named):
        sums = getattr(here, "sums", None)
        if sums is None:
            return cls.forward(self, x, *others, **named)
        return Computed.apply(x.contiguous(), sums, *sums.gradients) if self.number == 0 else x

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
        self.lay_out()
        for number, block in enumerate(blocks(worker)):
            block.number, block.__class__ = number, computed(type(block))

    @torch.no_grad()
    def lay_out(self, first=0, step=1):
        """Take over the weights of the blocks as they are now: of all, or of every step-th from the first on."""
        for part in self.parts[first::step]:
            part.lay_out()

    def sums(self):
        """New Sums, all 0."""
        return Sums(self.parts)


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


def same_weights(model):
    """A copy of a model that has its parameters and buffers, not copies of them."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def known_dropout(functions, rate, seeds):
    """What stands in for model.dropout in a trial: at this rate it drops what layers_cpu.c drops with these seeds.

    The first call, of the embeddings, drops nothing; each layer has three.
    """
    calls = itertools.count()
    now = Pass(threshold=threshold(rate))

    def dropout(x, p):
        call = next(calls)
        if call == 0 or p != rate:
            return x
        number, place_ = divmod(call - 1, 3)
        now.seeds = place(seeds[number])
        width = x.shape[-1]
        counted = functions.mask_width(width) if place_ == 0 else width
        mask = torch.empty(x.numel() // width * counted)
        functions.masks(ctypes.byref(now), place_, mask.numel(), place(mask))
        return x * mask.view(*x.shape[:-1], counted)[..., :width]

    return dropout


def knows(cls, bias, with_bfloat16):
    """Does layers_cpu.c compute what a class of models does, and its gradients? Not, where its code was changed.

    Shown by a small model of random weights. What an idea changes in large ones alone is not seen.
    """
    shape = dict(TRIED, bias=bias) if cls is GPT else dict(TRIED, ngram_rows=61)
    with same_dice(torch.device("cpu")), torch.enable_grad():
        torch.manual_seed(0)
        kept = model_module.dropout(torch.ones(4096), 0.5)
        if not set(kept.tolist()) <= {0.0, 2.0} or abs(kept.mean() - 1) > 0.2:
            return False
        model = cls((GPTConfig if cls is GPT else ModernConfig)(**shape)).train()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        idx, targets = torch.randint(model.config.vocab_size, (2, 2, model.config.block_size))
        seeds = torch.randint(2**62, (model.config.n_layer, 3))

    def gradients(worker, dropout, sums=None):
        ours = replaced(sys.modules[__name__], draw_seeds=lambda layers: seeds)
        with replaced(model_module, dropout=dropout), ours, adding_up(sums):
            _, loss = worker(idx, targets)
            found = torch.autograd.grad(loss, list(worker.parameters()), allow_unused=True)
        summed = {} if sums is None else sums.gradients
        return [
            loss.detach().float(),
            *(summed[p] if g is None else g.float() for g, p in zip(found, worker.parameters())),
        ]

    expected = gradients(model, known_dropout(functions_for(torch.float32), shape["dropout"], seeds))
    for dtype, rounding in [(torch.float32, 1e-4)] + ([(torch.bfloat16, 0.1)] if with_bfloat16 else []):
        worker = copy.deepcopy(model).to(dtype)
        found = gradients(worker, lambda x, p: x, Layers(worker, model).sums())
        if any(not (a - b).norm() <= rounding * b.norm() for a, b in zip(found, expected)):
            return False
    return True


@contextlib.contextmanager
def replaced(module, **names):
    """Until the end, other things under these names of a module."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


def why_not(config, dtype):
    """In words, why the layers of a config's model are not computed by layers_cpu.c in this dtype; None where they can
    be."""
    if config.n_embd // config.n_head % 16:
        return f"it needs heads of a multiple of 16 channels, and these have {config.n_embd // config.n_head}"
    if torch.get_num_threads() * 12 * config.n_layer * config.n_embd**2 > MOST_SUMS:
        return f"the sums of each thread's gradients would be more than {MOST_SUMS:,} numbers"
    return unsuited(dtype)


def fits(config, dtype):
    """Will layers_cpu.c compute the layers of a config's model, if its code is what it knows?"""
    try:
        return why_not(config, dtype) is None and functions_for(dtype) is not None
    except (CannotCompile, OSError):
        return False


def planned_bytes(config, tokens, dtype):
    """needed_bytes of a config's model, of so many tokens in whole windows."""
    T = min(config.block_size, tokens)
    layers = (Layer * config.n_layer)(*[Layer(C=config.n_embd, H=config.n_head)] * config.n_layer)
    return needed_bytes(functions_for(dtype), layers, tokens // T, T)


def say(why):
    say_once(f"layers_cpu.c is not used, and training is slower: {why}")


def in_c(worker, model):
    """(the model that computes, its Layers): worker, or where that is the model itself a copy with the same weights.

    (worker, None) where layers_cpu.c is not for such a model, or such a machine. worker: the model in the number format
    of its products.
    """
    dtype = next(worker.parameters()).dtype
    if type(model) not in (GPT, Modern) or why_not(model.config, dtype) is not None:
        return worker, None
    try:
        if knows(type(model), getattr(model.config, "bias", False), dtype == torch.bfloat16):
            made = same_weights(model) if worker is model else worker
            return made, Layers(made, model)
        say(OTHER_MODEL)
    except CannotCompile as error:
        say(error)
    except OSError as error:
        say(f"it cannot be loaded: {error}")
    except Exception as error:  # of a model that has other parts, or parts of other shapes
        say(f"{OTHER_MODEL} ({first_line(error) or type(error).__name__})")
    return worker, None
