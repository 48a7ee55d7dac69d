"""A part of a training step on a CPU in one call of a function in C (learn_cpu.c): a GPT's loss, and all gradients.

PyTorch takes some 120 operations for a layer. Each must be looked up, allocated for and kept for the backward pass, and
what it writes is read by the next from further away than the cache nearest to the core. learn_cpu.c computes the same
in half to two thirds of the time, each core its own windows.

    learned = in_c(model, dtype)              # None where that does not fit: then PyTorch computes as before
    learned.lay_out()                         # after each change of the model's weights
    sums = learned.sums()                     # of a thread
    sums.begin()
    loss = sums.learn(idx, targets, 1.0, 0)   # adds its gradients to sums.gradients, in float32

A model.py or modern.py with an idea of one's own is noticed (`knows`), and computed by PyTorch.
"""

import contextlib
import ctypes
import functools
import itertools
import os

import torch
import torch.nn as nn

import model as model_module
import modern
from model import GPT, GPTConfig
from modern import Modern, ModernConfig
from native import CannotCompile, fields, library, of_shape
from utils import dtype_name, first_line, same_dice, say_once

TRIED = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=31, block_size=44, dropout=0.5)  # the model of `knows`
MOST_SUMS = 500_000_000  # numbers, for the gradients of all threads: 2 GB
BEYOND = 8  # rows behind the head's gradient that learn_cpu.c writes zeros to: whole tiles
OTHER_MODEL = "it does not know what model.py or modern.py computes since it was changed"


class Linear(ctypes.Structure):
    _fields_ = [*fields(int="N K"), *fields(place="forward backward bias d_weight d_bias")]


class Norm(ctypes.Structure):
    _fields_ = fields(place="weight bias d_weight d_bias")


class Layer(ctypes.Structure):
    _fields_ = [
        *[(name, Linear) for name in ("attn", "attn_proj", "fc", "fc_proj")],
        *[(name, Norm) for name in ("norm_1", "norm_2")],
        *fields(place="shift d_shift"),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *fields(int="modern C H V layers foretold ngram ngram_rows"),
        *fields(place="layer wte wpe ngrams d_wte d_wpe d_ngrams factors cos sin"),
        ("norm", Norm),
        ("head", Linear),
    ]


class Pass(ctypes.Structure):
    _fields_ = fields(int="B T threshold add", long="seed", float="share ahead_share", place="idx targets kept scratch")


@functools.lru_cache(maxsize=None)
def functions_for(dtype):
    """Those of learn_cpu.c for products of a dtype's numbers. Raises what native.library raises."""
    with_bfloat16 = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
    functions = library("learn_cpu.c", f"-DLONGEST={modern.LONGEST}", *with_bfloat16)
    address, number = ctypes.c_void_p, ctypes.c_int
    functions.lay_out.argtypes = [address, *[number] * 5, address, address]
    functions.masks.argtypes = [address, number, ctypes.c_int64, address]
    functions.sizes.argtypes = [address] * 4
    functions.learn.argtypes = [address] * 3
    return functions


def sizes_of(config):
    """The fields of a Model that say how large it is."""
    sizes = dict(C=config.n_embd, H=config.n_head, V=config.vocab_size, layers=config.n_layer)
    if isinstance(config, ModernConfig):
        return dict(sizes, modern=1, foretold=config.ahead, ngram=config.ngram, ngram_rows=config.ngram_rows)
    return dict(sizes, foretold=1, ngram=1)


def needed_bytes(config, dtype, B, T):
    """(bytes to keep of B windows of T tokens for the backward pass, bytes of scratch)."""
    kept, scratch = ctypes.c_int64(), ctypes.c_int64()
    functions_for(dtype).sizes(*map(ctypes.byref, (Model(**sizes_of(config)), Pass(B, T), kept, scratch)))
    return kept.value, scratch.value


def unsuited(dtype):
    """In words, why PyTorch is as fast here as learn_cpu.c, or not known to be slower; None where it is slower.

    An Apple CPU, and Intel's with AMX, have a unit for products of matrices, which PyTorch uses and learn_cpu.c does
    not; with fewer and shorter vectors than AVX-512's, PyTorch's products are the faster ones (docs/speed.md).
    """
    if os.name == "nt":
        return "it was never tried on Windows"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it does not multiply {dtype_name(dtype)}"
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
# A model's weights


def place(tensor):
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


class Matrix:
    """Weights (rows, K) of what reads the same numbers, behind each other, laid out in panels, forward and backward.

    filled: up to how many rows each has zeros behind it. Raises ValueError for a weight of another shape.
    """

    def __init__(self, dtype, weights, rows, K, bias=None, filled=None):
        self.weights = [of_shape(weight, rows, K) for weight in weights]
        self.bias = of_shape(bias, rows * len(weights))
        self.rows, self.filled, self.K = rows, filled or rows, K
        self.N = self.filled * len(weights)
        self.panels = torch.empty(2, self.N * K, dtype=dtype)

    def pieces(self):
        """For each weight: how many numbers it has, and what lay_out() of learn_cpu.c needs to know."""
        laid_out = self.N, self.K, *map(place, self.panels)
        return [
            (weight.numel(), (place(weight), self.rows, self.filled, i * self.filled, *laid_out))
            for i, weight in enumerate(self.weights)
        ]


class Block:
    """A layer's weights: Matrix for each product, its norms and its shift."""

    def __init__(self, block, C, dtype):
        attn, mlp = block.attn, block.mlp
        if isinstance(block, modern.Block):
            weights, bias = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight], None
            self.norms, self.shift = {}, of_shape(block.shift, C)
        else:
            weights, bias = [attn.c_attn.weight], attn.c_attn.bias
            self.norms, self.shift = dict(norm_1=block.ln_1, norm_2=block.ln_2), None
        self.matrices = dict(
            attn=Matrix(dtype, weights, 3 * C // len(weights), C, bias),
            attn_proj=Matrix(dtype, [attn.c_proj.weight], C, C, attn.c_proj.bias),
            fc=Matrix(dtype, [mlp.c_fc.weight], 4 * C, C, mlp.c_fc.bias),
            fc_proj=Matrix(dtype, [mlp.c_proj.weight], C, 4 * C, mlp.c_proj.bias),
        )
        self.rates = {attn.dropout, attn.resid_dropout.p, mlp.dropout.p}


def is_of_known_parts(model):
    """Is each part of a model one of those of model.py and modern.py, or one of PyTorch's that they use?"""
    ours, kinds = {GPT.__module__, Modern.__module__}, {nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList}
    return all(type(part).__module__ in ours or type(part) in kinds for part in model.modules())


def blocks(model):
    return model.transformer.h if isinstance(model, GPT) else model.layers


class Learned:
    """A model that learn_cpu.c computes while it learns.

    model: in float32; its weights stay where they are. dtype: of the numbers that are multiplied. Raises CannotCompile,
    OSError, or ValueError, AttributeError and others where the model is not as learn_cpu.c needs it.
    """

    def __init__(self, model, dtype):
        if not is_of_known_parts(model):
            raise ValueError("it has other parts")
        self.model, self.dtype, self.functions = model, dtype, functions_for(dtype)
        c, own = model.config, model.transformer if isinstance(model, GPT) else model
        C, V = c.n_embd, c.vocab_size
        self.blocks = [Block(block, C, dtype) for block in blocks(model)]
        self.norm = own.ln_f if isinstance(model, GPT) else None
        self.wte, self.wpe, self.ngrams, heads = of_shape(own.wte.weight, V, C), None, None, [model.lm_head.weight]
        if isinstance(model, GPT):
            self.wpe = of_shape(own.wpe.weight, c.block_size, C)
        elif model.ngrams is not None:
            self.ngrams = of_shape(model.ngrams.table.weight, c.ngram_rows, C)
        ahead = [] if isinstance(model, GPT) or model.ahead is None else [model.ahead.weight]
        for weight in ahead:
            heads += of_shape(weight, (c.ahead - 1) * V, C).split(V)
        self.head = Matrix(dtype, heads, V, C, filled=self.functions.wide(V))
        [self.rate] = {own.drop.p}.union(*(block.rates for block in self.blocks))

        matrices = [m for block in self.blocks for m in block.matrices.values()]
        norms = [norm for block in self.blocks for norm in block.norms.values()] + [self.norm]
        vectors = [of_shape(v, C) for norm in norms if norm is not None for v in (norm.weight, norm.bias)]
        vectors += [m.bias for m in matrices] + [block.shift for block in self.blocks]
        # Of each of these there is a gradient. learn_cpu.c sets those of the multiplied ones, and adds to the others.
        self.multiplied = [w for m in matrices for w in m.weights] + [model.lm_head.weight, *ahead]
        others = [*vectors, self.wte, self.wpe, self.ngrams]
        self.others = [w for w in others if w is not None and w is not model.lm_head.weight]
        self.weights = [*self.multiplied, *self.others]
        if set(self.weights) != set(model.parameters()):
            raise ValueError("it has other weights")
        if any(w.dtype != torch.float32 or not w.is_contiguous() for w in self.weights):
            raise ValueError("a weight in another number format or order")
        self.places = list(map(place, self.weights))
        self.pieces = sorted((piece for m in [*matrices, self.head] for piece in m.pieces()), reverse=True)
        self.lay_out()

    def lay_out(self, first=0, step=1):
        """Take over the weights as they are now: of all, or of every step-th from the first on.

        Raises RuntimeError where they are no longer in the same memory.
        """
        if list(map(place, self.weights)) != self.places:
            raise RuntimeError("a weight was given other memory; change it in place, or make a new Learned")
        for _, piece in self.pieces[first::step]:
            self.functions.lay_out(*piece)

    def sums(self):
        """New Sums, all 0."""
        return Sums(self)

    def structure(self, gradients):
        """The Model that adds to these gradients: {weight: float32 tensor}; and what must be kept as long as it is."""

        def norm_of(norm):
            if norm is None:
                return Norm()
            return Norm(*map(place, (norm.weight, norm.bias, gradients[norm.weight], gradients.get(norm.bias))))

        def linear_of(m):
            sums = gradients[m.weights[0]], gradients.get(m.bias)
            return Linear(m.N, m.K, *map(place, (*m.panels, m.bias, *sums)))

        layers = (Layer * len(self.blocks))()
        for layer, block in zip(layers, self.blocks):
            for name, matrix in block.matrices.items():
                setattr(layer, name, linear_of(matrix))
            for name, norm in block.norms.items():
                setattr(layer, name, norm_of(norm))
            layer.shift, layer.d_shift = place(block.shift), place(gradients.get(block.shift))
        model = Model(**sizes_of(self.model.config), norm=norm_of(self.norm), head=linear_of(self.head))
        model.layer = ctypes.addressof(layers)
        for name in ("wte", "wpe", "ngrams"):
            weight = getattr(self, name)
            setattr(model, name, place(weight))
            setattr(model, f"d_{name}", place(gradients.get(weight)))
        tables = {}
        if isinstance(self.model, Modern):
            tables = dict(cos=self.model.cos.float().contiguous(), sin=self.model.sin.float().contiguous())
            if self.ngrams is not None:
                tables["factors"] = of_shape(self.model.ngrams.factors, self.model.config.ngram)
        for name, table in tables.items():
            setattr(model, name, place(table))
        return model, (layers, tables)


class Sums:
    """A thread's gradients of a Learned model's weights, added up in float32, and the memory in which it computes.

    flat: all of them behind each other.
    """

    def __init__(self, learned):
        self.learned, self.functions = learned, learned.functions
        multiplied, others = ([w.numel() for w in weights] for weights in (learned.multiplied, learned.others))
        beyond = BEYOND * learned.head.K
        self.flat = torch.zeros(sum(multiplied) + beyond + sum(others))
        *pieces, _, self.added = self.flat.split([*multiplied, beyond, sum(others)])
        pieces += self.added.split(others)
        self.gradients = {w: piece.view(w.shape) for w, piece in zip(learned.weights, pieces)}
        self.model, self.kept_alive = learned.structure(self.gradients)
        self.kept = self.scratch = torch.empty(0, dtype=torch.uint8)
        self.needed = {}  # (B, T) -> needed_bytes
        self.begin()

    def begin(self):
        """Forget what was added up."""
        self.added.zero_()
        self.add = 0  # the next gradients of multiplied weights take the place of those that are there

    def learn(self, idx, targets, share, seed):
        """The loss of windows idx (B, T) times share, as a number; its gradients are added to the sums.

        seed: of dropout. Raises ValueError for windows that are longer than the model's, and IndexError for a token
        that is none of its vocabulary.
        """
        model, (B, T) = self.learned.model, idx.shape
        c = model.config
        if c.block_size < T or idx.dtype != torch.int64 or targets.dtype != torch.int64:
            raise ValueError(f"{T} tokens of {idx.dtype} and {targets.dtype} in place of {c.block_size} of torch.int64")
        idx, targets = idx.contiguous(), of_shape(targets, B, T).contiguous()
        if (B, T) not in self.needed:
            self.needed[B, T] = needed_bytes(c, self.learned.dtype, B, T)
        self.kept, self.scratch = (
            memory if len(memory) >= bytes_ else torch.empty(bytes_, dtype=torch.uint8)
            for memory, bytes_ in zip((self.kept, self.scratch), self.needed[B, T])
        )
        ahead_share = float(model.ahead_share) if model.training and getattr(model, "ahead", None) is not None else 0.0
        dropped = threshold(self.learned.rate if model.training else 0.0)
        places = map(place, (idx, targets, self.kept, self.scratch))
        now, loss = Pass(B, T, dropped, self.add, seed, share, ahead_share, *places), ctypes.c_float()
        if self.functions.learn(*map(ctypes.byref, (self.model, now, loss))):
            raise IndexError(f"a token that is none of the vocabulary's {c.vocab_size}")
        self.add = 1
        return loss.value


def threshold(p):
    """Of 256 numbers, how many dropout sets to zero at a rate of p: as in model.dropout."""
    return min(max(round(256 * p), 1), 255) if p else 0


# ---------------------------------------------------------------------------------------------------------------------
# Where it fits


def known_dropout(functions, rate, seed):
    """What stands in for model.dropout in a trial: at this rate it drops what learn_cpu.c drops with this seed.

    The first call is of the vectors of tokens, and each layer has three more, the first of them in attention.
    """
    calls = itertools.count()
    now = Pass(threshold=threshold(rate), seed=seed)

    def dropout(x, p):
        call = next(calls)
        if p != rate:
            return x
        width = x.shape[-1]
        counted = functions.wide(width) if call % 3 == 1 else width
        mask = torch.empty(x.numel() // width * counted)
        functions.masks(ctypes.byref(now), call, mask.numel(), place(mask))
        return x * mask.view(*x.shape[:-1], counted)[..., :width].to(x.dtype)

    return dropout


def knows(cls, bias, with_bfloat16):
    """Does learn_cpu.c compute the loss of a class of models, and its gradients? Not, where its code was changed.

    Shown by a small model of random weights. What an idea changes in large ones alone is not seen.
    """
    shape = dict(TRIED, bias=bias) if cls is GPT else dict(TRIED, ngram_rows=61, ahead=3)
    with same_dice(torch.device("cpu")), torch.enable_grad():
        torch.manual_seed(0)
        kept = model_module.dropout(torch.ones(4096), 0.5)
        if not set(kept.tolist()) <= {0.0, 2.0} or abs(kept.mean() - 1) > 0.2:
            return False
        model = cls((GPTConfig if cls is GPT else ModernConfig)(**shape)).train()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        if cls is Modern:
            model.ahead_share.fill_(0.7)
        idx, targets = torch.randint(model.config.vocab_size, (2, 2, model.config.block_size))
        targets[0, 3] = -1
        with replaced(model_module, dropout=known_dropout(functions_for(torch.float32), shape["dropout"], 1)):
            loss = model(idx, targets)[1]
            gradients = torch.autograd.grad(loss, list(model.parameters()))
    for dtype, rounding in [(torch.float32, 1e-4)] + ([(torch.bfloat16, 0.1)] if with_bfloat16 else []):
        sums = Learned(model, dtype).sums()
        found = sums.learn(idx, targets, 1.0, 1)
        if not abs(found - loss) <= rounding * loss:
            return False
        if any(
            not (sums.gradients[p] - g).norm() <= rounding * g.norm() for p, g in zip(model.parameters(), gradients)
        ):
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


def about_numbers(config):
    """About how many numbers a config's model learns: those of its matrices and tables."""
    if isinstance(config, ModernConfig):
        rows = config.vocab_size * (1 + config.ahead) + (config.ngram_rows if config.ngram > 1 else 0)
    else:
        rows = config.vocab_size + config.block_size
    return (12 * config.n_layer * config.n_embd + rows) * config.n_embd


def why_not(config, dtype):
    """In words, why a config's model is not computed by learn_cpu.c in this dtype; None where it can be."""
    if config.n_embd // config.n_head % 16:
        return f"it needs heads of a multiple of 16 channels, and these have {config.n_embd // config.n_head}"
    if torch.get_num_threads() * about_numbers(config) > MOST_SUMS:
        return f"the sums of each thread's gradients would be more than {MOST_SUMS:,} numbers"
    return unsuited(dtype)


def usable(dtype):
    """Is learn_cpu.c faster on this machine than PyTorch, for products of a dtype, and can it be compiled?"""
    try:
        return unsuited(dtype) is None and functions_for(dtype) is not None
    except (CannotCompile, OSError):
        return False


def fits(config, dtype):
    """Will learn_cpu.c compute a config's model, if its code is what it knows?"""
    return why_not(config, dtype) is None and usable(dtype)


def say(why):
    say_once(f"learn_cpu.c is not used, and training is slower: {why}")


def in_c(model, dtype):
    """The Learned of a model, for products of a dtype; None where learn_cpu.c is not for such a model or machine."""
    if type(model) not in (GPT, Modern) or why_not(model.config, dtype) is not None:
        return None
    try:
        if knows(type(model), getattr(model.config, "bias", False), dtype == torch.bfloat16):
            return Learned(model, dtype)
        say(OTHER_MODEL)
    except CannotCompile as error:
        say(error)
    except OSError as error:
        say(f"it cannot be loaded: {error}")
    except Exception as error:  # of a model that has other parts, or parts of other shapes
        say(f"{OTHER_MODEL} ({first_line(error) or type(error).__name__})")
    return None
