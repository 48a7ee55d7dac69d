"""One token through a GPT on an NVIDIA GPU, in a few large kernels: for one text, writing is waiting for the weights.

A token takes 20 operations of PyTorch's a layer, and each leaves the GPU's memory idle while it starts and ends. Here a
layer is five kernels, written in Triton (Tillet et al. 2019), the language of kernels that comes with PyTorch:

    x (B, C) --ln_1, c_attn--> qkv (B, 3C) --attention--> y (B, C) --c_proj--> added to x
             --ln_2, c_fc, gelu--> h (B, 4C) --c_proj--> added to x                        x, qkv, y, h in float32

    step = FusedStep(model, cache, position)   # model.GPT, generate.KVCache, (1,) int64 on the GPU
    logits = step(token)                       # (B, 1) int64 -> (B, 1, V) float32, in place of model(token, cache=...)
    token = step.draw(sampling)                # (B,) int64, the next token: one of the top_k, in one more kernel

Each program of linear_kernel makes a few rows of a product. It asks for its weights before all else, on a Hopper GPU
even while the kernel before still runs: those are the bytes that cost time. All else it reads waits until that one is
done (`wait`, "programmatic dependent launch" in CUDA).
"""

import torch
import triton
import triton.language as tl

from generate import GREEDY
from model import GPT
from utils import first_line, say_once, version

MAX_BATCH = 4  # texts side by side; with more of them, PyTorch's matrix products are the better ones
MAX_EMBD = 4096  # channels, up to which a program holds whole rows of all weights in its registers
ROWS = 4  # of W, for a program: so few that N = 768 of them keep the 132 multiprocessors of an H100 busy
MANY_ROWS, MANY = 16, 16384  # the same from so many rows on, as in lm_head: each program makes its own LayerNorm
PER_THREAD = 16  # weights of each row, for a thread: in 16 bits twice what a thread reads at once
TILE, TILE_WARPS = 8192, 8  # numbers of keys, and of values, that a program of attention_kernel reads at once
MAX_TOP_K, DRAW_WARPS = 256, 8  # of how many likeliest tokens draw_kernel can draw one


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """What is before this may run beside the kernel before, which in turn has waited; what is after sees all it wrote.

    So a kernel calls it before it reads what other kernels of the step write, and before it writes at all. The step's
    first kernel starts as any does, when all earlier work is done: what earlier steps wrote may be read at once.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # from now on the kernel after may come as far as its own wait
        tl.extra.cuda.gdc_wait()


@triton.jit
def embedding_kernel(token, position, wte, wpe, x, C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """x (B, C) = wte[token] + wpe[position]; a program for each text."""
    wait(OVERLAP)
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    a = tl.load(wte + tl.load(token + b) * C + c, mask=c < C).to(tl.float32)
    p = tl.load(wpe + tl.load(position) * C + c, mask=c < C).to(tl.float32)
    tl.store(x + b * C + c, a + p, mask=c < C)


@triton.jit
def linear_kernel(
    x, norm, shift, W, bias, y, tops, N, B,
    K: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y (B, N) = [y +] [gelu] ([LayerNorm] x W^T + bias), x (B, K), W (N, K); a program for ROWS rows of W and a text.

    norm, shift: the LayerNorm's weight and bias (K,), or None; bias (N,) or None. BLOCK: at least K, a power of two.
    tops: None, or a place (B, N / ROWS) for the largest of each program's numbers.
    """
    n, b = tl.program_id(0) // B * ROWS + tl.arange(0, ROWS), tl.program_id(0) % B
    k = tl.arange(0, BLOCK)
    rows, inside = n < N, k < K
    w = tl.load(W + n.to(tl.int64)[:, None] * K + k[None, :], mask=rows[:, None] & inside[None, :], other=0.0)
    if norm is not None:
        scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        moved = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        first = tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    wait(OVERLAP)
    u = tl.load(x + b * K + k, mask=inside, other=0.0)  # (BLOCK,)
    if ADD:
        before = tl.load(y + b * N + n, mask=rows, other=0.0)
    if norm is not None:
        u = tl.where(inside, u - tl.sum(u) / K, 0.0)
        u *= tl.rsqrt(tl.sum(u * u) / K + 1e-5) * scale
    if shift is not None:
        u += moved
    out = tl.sum(w.to(tl.float32) * u[None, :], axis=1)  # (ROWS,)
    if bias is not None:
        out += first
    if GELU:  # 0.5 out (1 + tanh(z)) = out sigmoid(2 z)
        out *= tl.sigmoid(1.5957691216057308 * (out + 0.044715 * out * out * out))  # 2 sqrt(2 / pi)
    if ADD:
        out += before
    tl.store(y + b * N + n, out, mask=rows)
    if tops is not None:
        tl.store(tops + b * tl.cdiv(N, ROWS) + tl.program_id(0) // B, tl.max(tl.where(rows, out, float("-inf"))))


@triton.jit
def read(cache, first, end, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Positions first, first + 1, ... of one head's keys or values (S, D), zeros from `end` on: (BLOCK, BLOCK_D)."""
    i, d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return tl.load(cache + i[:, None] * D + d[None, :], mask=(i < end)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def attention_kernel(
    qkv, cache_k, cache_v, position, y, S, SCALE,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y (B, H, D): one query looks at the keys (B, H, S, D) before it, and at its own, which it adds to them.

    A program for a head of a text. Its softmax goes on as positions come (Milakov & Gimelshein 2018), for BLOCK of them
    side by side: place i sees positions i, i + BLOCK, ..., and what the places have seen is put together at the end.
    With 12 programs most of the GPU idles, about 1 us a layer for each BLOCK of positions but the first; several
    programs for a head would be faster from some hundred positions on, but one more kernel for all lengths.
    """
    head, d, i = tl.program_id(0), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    now = tl.load(position).to(tl.int32)
    cache_k += head.to(tl.int64) * S * D
    cache_v += head.to(tl.int64) * S * D
    keys, values = read(cache_k, 0, now, D, BLOCK, BLOCK_D), read(cache_v, 0, now, D, BLOCK, BLOCK_D)
    wait(OVERLAP)
    inside = d < D
    own = qkv + head // H * 3 * H * D + head % H * D + d
    q = tl.load(own, mask=inside, other=0.0) * SCALE
    k = tl.load(own + H * D, mask=inside, other=0.0).to(cache_k.dtype.element_ty)
    v = tl.load(own + 2 * H * D, mask=inside, other=0.0).to(cache_v.dtype.element_ty)
    tl.store(cache_k + now * D + d, k, mask=inside)
    tl.store(cache_v + now * D + d, v, mask=inside)

    top = tl.full((BLOCK,), -1e30, tl.float32)  # the largest score a place has seen: exp of so little is 0 in the end
    total = tl.zeros((BLOCK,), tl.float32)  # of exp(score - top)
    mean = tl.zeros((BLOCK, BLOCK_D), tl.float32)  # of the values, times total
    first = 0
    while first < now:
        score = tl.where(first + i < now, tl.sum(keys.to(tl.float32) * q[None, :], axis=1), -1e30)
        higher = tl.maximum(top, score)
        fade, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * fade + weight
        mean = mean * fade[:, None] + weight[:, None] * values.to(tl.float32)
        top = higher
        first += BLOCK
        keys, values = read(cache_k, first, now, D, BLOCK, BLOCK_D), read(cache_v, first, now, D, BLOCK, BLOCK_D)

    score = tl.sum(q * k.to(tl.float32))  # of the token itself
    highest = tl.maximum(tl.max(top), score)
    fade, weight = tl.exp(top - highest), tl.exp(score - highest)
    out = tl.sum(mean * fade[:, None], axis=0) + weight * v.to(tl.float32)
    tl.store(y + head * D + d, out / (tl.sum(total * fade) + weight), mask=inside)


LEAST = tl.constexpr(-(2**31))  # an int32 for what is no candidate


@triton.jit
def ordered(x):
    """Whole numbers, int32, that stand in the order of x, float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of two negative numbers the larger one has the smaller bits


@triton.jit
def threshold(keys, real, k, most):
    """The k-th largest of the real keys, by halving; or a smaller one, once no more than `most` are at least that."""
    low, high, count = tl.min(tl.where(real, keys, 2147483647)), tl.max(keys) + 1, tl.sum(real.to(tl.int32))
    middle = (low & high) + ((low ^ high) >> 1)  # the mean of the two, which never overflows
    while (count > most) & (middle != low):
        n = tl.sum((keys >= middle).to(tl.int32))
        if n >= k:
            low, count = middle, n
        else:
            high = middle
        middle = (low & high) + ((low ^ high) >> 1)
    return low


@triton.jit
def places(keys, least, most):
    """Where the keys go in a list of those at least `least`: the larger ones first, `most` in all; -1 for the rest."""
    larger, equal = keys > least, keys == least
    n = tl.cumsum(larger.to(tl.int32), 0)
    place = tl.where(larger, n, tl.max(n) + tl.cumsum(equal.to(tl.int32), 0)) - 1
    return tl.where((larger | equal) & (place < most), place, -1)


@triton.jit
def draw_kernel(
    logits, tops, luck, position, slots, token, V, k, TEMPERATURE, B,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """token (B,): one of the k largest of logits (B, V), drawn with probabilities softmax(logits / TEMPERATURE).

    A program for each text. The k largest are in the k parts of ROWS logits whose largest ones, tops (B, V / ROWS), are
    largest: in at most SLOTS parts, a power of two from k on. luck (positions, B): a random number in [0, 1) for each
    position. BLOCK: at least the number of parts, a power of two. slots: a place (B, SLOTS) for the parts' numbers.
    """
    wait(OVERLAP)
    b, parts = tl.program_id(0), tl.cdiv(V, ROWS)
    chance = tl.load(luck + tl.load(position) * B + b)
    i, s = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    keys = tl.where(i < parts, ordered(tl.load(tops + b * parts + i, mask=i < parts, other=0.0)), LEAST)
    place = places(keys, threshold(keys, i < parts, tl.minimum(k, parts), SLOTS), SLOTS)
    slots += b * SLOTS
    tl.store(slots + s, tl.full((SLOTS,), -1, tl.int32))
    tl.debug_barrier()  # between the threads of this program
    tl.store(slots + place, i, mask=place >= 0)
    tl.debug_barrier()
    n = tl.load(slots + s)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    n = tl.reshape(n, (SLOTS * ROWS,))  # the tokens among which the k likeliest are
    real = (n >= 0) & (n < V)
    logit = tl.load(logits + b * V + n, mask=real, other=0.0)
    keys = tl.where(real, ordered(logit), LEAST)
    kept = places(keys, threshold(keys, real, k, k), k) >= 0
    logit = tl.where(kept, logit / TEMPERATURE, float("-inf"))
    up_to = tl.cumsum(tl.exp(logit - tl.max(logit)), 0)  # of the weights
    total = tl.max(tl.where(kept, up_to, 0.0))  # behind the last of them, rounding may differ
    j = tl.arange(0, SLOTS * ROWS)
    wanted = tl.minimum(chance, 0.9999998) * total  # below 1 - 2^-23, and so below total when rounded
    found = tl.min(tl.where(kept & (up_to > wanted), j, SLOTS * ROWS - 1))
    tl.store(token + b, tl.minimum(tl.max(tl.where(j == found, n, 0)), V - 1).to(tl.int64))


def overlaps(capability):
    """Can a GPU of that compute capability start a kernel while the one before still runs (`wait`)? Triton 3.4 has a
    fault in what asks for it."""
    return capability >= (9, 0) and version(triton) > (3, 4)


def usable(model, batch):
    """Can a FusedStep stand in for this model, for so many texts?

    It needs the Triton of PyTorch 2.8, or of 2.10 and newer: 3.5, of 2.9, fails to compile attention_kernel.
    """
    if type(model) is not GPT or model.training or batch > MAX_BATCH or model.config.n_embd > MAX_EMBD:
        return False
    device = model.lm_head.weight.device
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return version(triton) >= (3, 4) and version(triton) != (3, 5)


def fused_step(model, cache, position, token):
    """A FusedStep that has run once on token (B, 1), or None where that cannot be: then a line on stderr says why."""
    if not usable(model, len(token)):
        return None
    step = FusedStep(model, cache, position)
    try:
        step(token)
    except Exception as error:  # Triton needs a C compiler and Python's headers, and raises many kinds of errors
        say_once(f"fused.py is not used, and writing is slower: {first_line(error) or repr(error)}")
        return None
    return step


class FusedStep:
    """step(token (B, 1)) -> logits (B, 1, V) in float32: what model(token, cache=cache) does at `position`, (1,) int64.

    step.draw(sampling) -> the token (B,) that follows.
    The cache must have held a token before, so that its memory is there. All memory stays where it is.
    """

    def __init__(self, model, cache, position):
        c, p = model.config, model.lm_head.weight
        self.model, self.cache, self.position, self.B = model, cache, position, cache.layers[0].k.size(0)
        self.overlap = p.is_cuda and overlaps(torch.cuda.get_device_capability(p.device))
        sizes = (c.n_embd, 3 * c.n_embd, c.n_embd, 4 * c.n_embd, c.vocab_size)
        self.x, self.qkv, self.y, self.h, self.logits = (self._place(n) for n in sizes)
        self.rows = self._rows(c.vocab_size)
        self.tops = self._place(triton.cdiv(c.vocab_size, self.rows))
        self.slots = self._place(2 * MAX_TOP_K, torch.int32)
        self.token = torch.empty(self.B, dtype=torch.int64, device=p.device)
        # (position, text) -> a number in [0, 1) for draw; who draws fills it before.
        self.luck = torch.empty(c.block_size, self.B, dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def __call__(self, token):
        parts, c = self.model.transformer, self.model.config
        with torch.cuda.device_of(token):  # where Triton starts its kernels
            embedding_kernel[(self.B,)](
                token, self.position, parts.wte.weight, parts.wpe.weight, self.x,
                c.n_embd, triton.next_power_of_2(c.n_embd), self.overlap,
            )  # fmt: skip
            for block, layer in zip(parts.h, self.cache.layers):
                self._linear(self.x, block.attn.c_attn, self.qkv, norm=block.ln_1)
                self._attention(layer)
                self._linear(self.y, block.attn.c_proj, self.x, add=True)
                self._linear(self.x, block.mlp.c_fc, self.h, norm=block.ln_2, gelu=True)
                self._linear(self.h, block.mlp.c_proj, self.x, add=True)
            self._linear(self.x, self.model.lm_head, self.logits, norm=parts.ln_f, tops=self.tops)
        return self.logits[:, None]

    @staticmethod
    def can_draw(sampling):
        """Does `draw` know this generate.Sampling? Not the rules that need tokens in order, or the text."""
        whole = sampling.top_p is None or sampling.top_p >= 1
        few = sampling.temperature < GREEDY or 0 < (sampling.top_k or 0) <= MAX_TOP_K
        return whole and few and not sampling.min_p and sampling.repetition_penalty == 1

    def draw(self, sampling):
        """The token (B,) that follows, from the logits of the last call and the luck of its position."""
        greedy = sampling.temperature < GREEDY
        V = self.logits.size(1)
        k, parts = 1 if greedy else min(sampling.top_k, V), self.tops.size(1)
        slots = triton.next_power_of_2(min(2 * k, parts))  # twice as many as needed, so that halving ends early
        draw_kernel[(self.B,)](
            self.logits, self.tops, self.luck, self.position, self.slots, self.token, V, k,
            1.0 if greedy else sampling.temperature, self.B,
            self.rows, triton.next_power_of_2(parts), slots, self.overlap, num_warps=DRAW_WARPS, **self._launch(),
        )  # fmt: skip
        return self.token

    def _place(self, n, dtype=torch.float32):
        return torch.empty(self.B, n, dtype=dtype, device=self.position.device)

    @staticmethod
    def _rows(N):
        return MANY_ROWS if N >= MANY else ROWS

    def _linear(self, x, linear, y, norm=None, gelu=False, add=False, tops=None):
        N, K = linear.weight.shape
        rows, block = self._rows(N), triton.next_power_of_2(K)
        weight, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        linear_kernel[(triton.cdiv(N, rows) * self.B,)](
            x, weight, shift, linear.weight, linear.bias, y, tops, N, self.B,
            K, gelu, add, rows, block, self.overlap,
            num_warps=min(max(block // (32 * PER_THREAD), 1), 16), **self._launch(),
        )  # fmt: skip

    def _attention(self, layer):
        B, H, S, D = layer.k.shape
        block_d = triton.next_power_of_2(D)
        block = min(max(TILE // block_d, 1), triton.next_power_of_2(S))
        attention_kernel[(B * H,)](
            self.qkv, layer.k, layer.v, self.position, self.y, S, D**-0.5, H, D, block, block_d, self.overlap,
            num_warps=TILE_WARPS, **self._launch(),
        )  # fmt: skip

    def _launch(self):
        return dict(launch_pdl=True) if self.overlap else {}
