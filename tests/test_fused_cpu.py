"""fused_cpu.c, against model.py and modern.py with the same weights, on every kind of vector that this compiler has."""

import copy
import gc
import os
import platform
import stat
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_generate import tokens
from test_modern import make_modern

import fused_cpu
import model as model_module
import modern as modern_module
import native
import utils
from fused_cpu import FusedStep, prepare
from generate import KVCache, beam_search, generate
from lighten import join_qkv, linears, to_int8
from model import MLP, CausalSelfAttention, GPTConfig, LayerNorm

pytestmark = [
    pytest.mark.skipif(native.compiler() == [], reason="there is no C compiler"),
    pytest.mark.skipif(os.name == "nt", reason="not made for Windows"),
]
WIDE = dict(n_embd=48, n_head=3, n_layer=2, vocab_size=65, block_size=40)
ARCHS = ["gpt", "modern"]
VECTORS = [[]]  # flags that leave the compiler fewer registers: AVX2's, then SSE's
if platform.machine() == "x86_64":
    VECTORS += [["-mno-avx512f"], ["-mno-avx512f", "-mno-avx2", "-mno-f16c"]]


@pytest.fixture
def trained(make_model):
    """trained(arch, ...): a model with weights of some size everywhere, as after training."""

    def build(arch, **settings):
        return (make_model if arch == "gpt" else make_modern)(**{**WIDE, **settings})

    return build


@pytest.fixture(params=VECTORS, ids=lambda flags: " ".join(flags) or "native")
def any_vectors(request, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *request.param])
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def rounded(model, how):
    """A model whose matrices are what `how` makes of them, in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for linear in linears(model):
            if how == "int8":
                whole, scale = to_int8(linear.weight)
                weight = whole * scale.bfloat16().float()
            else:
                weight = linear.weight.to(getattr(torch, how)).float()
            linear.weight = torch.nn.Parameter(weight)  # not in place: a GPT's wte stays as it is
    return model


def passes(model, step, idx, sizes):
    """Logits of idx (B, N), read `sizes` tokens at a time behind the first: by the model, and by the step."""
    pairs, caches, start = [], (KVCache(model.config), KVCache(model.config)), sizes[0]
    with torch.inference_mode():
        for cache in caches:
            model(idx[:, :start], cache=cache)
        for n in sizes[1:]:
            new = idx[:, start : start + n]
            assert step.fits(new, caches[1])
            pairs.append((model(new, cache=caches[0], last=n)[0], step(new, caches[1], n)))
            start += n
    assert caches[0].length == caches[1].length == start
    return pairs


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("how", sorted(fused_cpu.FORMATS))
def test_it_computes_the_model(trained, any_vectors, arch, how):
    model = join_qkv(trained(arch))
    step, plain = FusedStep(model, how), rounded(model, how)
    for B in (1, 3, 7):
        for expected, found in passes(plain, step, tokens(B, 40, vocab_size=65), [9, 1, 4, 1, 7, 8, 1, 1]):
            assert expected.shape == found.shape and expected.abs().max() > 1
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_of_more_tokens_than_it_is_asked_for_the_logits_of_the_last(trained, arch):
    model, idx = join_qkv(trained(arch)), tokens(3, 12, vocab_size=65)
    step, caches = FusedStep(model, "float32"), [KVCache(model.config) for _ in range(4)]
    with torch.inference_mode():
        for cache in caches:
            model(idx[:, :5], cache=cache)
        found = [step(idx[:, 5:], cache, last) for cache, last in zip(caches, (7, 1, 3, 99))]
    assert torch.equal(found[1], found[0][:, -1:]) and torch.equal(found[2], found[0][:, -3:])
    assert torch.equal(found[3], found[0])


@pytest.mark.parametrize("settings", [dict(bias=False), dict(n_embd=16, n_head=1, vocab_size=3), dict(n_layer=1)])
def test_other_shapes_of_a_gpt(trained, settings):
    model = trained("gpt", **settings)
    idx = tokens(2, 30, vocab_size=model.config.vocab_size)
    for expected, found in passes(model, FusedStep(model, "float32"), idx, [1, 1, 20, 8]):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [dict(ngram=1), dict(ngram=2, ngram_rows=7), dict(n_embd=192, n_head=3)])
def test_other_shapes_of_a_modern_model(trained, settings):
    model = join_qkv(trained("modern", **settings))
    for expected, found in passes(model, FusedStep(model, "float32"), tokens(2, 30, vocab_size=65), [3, 1, 18, 8]):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tokens_logits_are_the_same_whatever_is_read_beside_it_and_on_any_number_of_threads(trained, arch):
    model, idx = join_qkv(trained(arch)), tokens(7, 30, vocab_size=65)
    step, threads, found = FusedStep(model, "bfloat16"), torch.get_num_threads(), []
    try:
        for rows, n, sizes in ((7, 1, [7, 1]), (1, 1, [1] * 8), (1, 3, [8]), (3, 2, [4, 4])):
            torch.set_num_threads(n)
            cache, logits, start = KVCache(model.config), [], 5
            with torch.inference_mode():
                model(idx[:, :start], cache=cache)  # all rows, so that what is in the caches is the same
                cache.select(torch.arange(rows))
                for size in sizes:
                    logits.append(step(idx[:rows, start : start + size], cache, size))
                    start += size
            found.append(torch.cat(logits, dim=1)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("arch", ARCHS)
def test_texts_are_those_of_the_model_past_the_window_too(trained, arch):
    model, idx = trained(arch), tokens(2, 3, vocab_size=65)
    assert prepare(model, "float32") is None
    texts = []
    for each in (model, trained(arch)):
        how = dict(temperature=0.9, top_k=30, generator=torch.Generator().manual_seed(3))
        texts.append([t.tolist() for t in generate(each, idx, 100, **how)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("arch", ARCHS)
def test_beams_are_those_of_the_model(trained, arch):
    plain, model = trained(arch), trained(arch)
    prepare(model, "float32")
    expected, found = (beam_search(m, tokens(1, 4, vocab_size=65), 30, 4) for m in (plain, model))
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)


def test_what_does_not_fit_the_model_reads_itself(trained):
    model, c = trained("gpt"), WIDE
    assert prepare(model, "float32") is None
    step, idx = model.fused, tokens(2, 10, vocab_size=65)
    cache, padded = KVCache(model.config), KVCache(model.config, torch.tensor([0, 2]))
    assert not step.fits(idx, cache), "nothing was read, so there is no memory yet"
    with torch.inference_mode():
        model(idx, cache=cache)
        model(idx, cache=padded)
    assert step.fits(idx, cache) and not step.fits(idx, padded)
    assert step.fits(tokens(2, c["block_size"] - 10), cache) and not step.fits(tokens(2, c["block_size"] - 9), cache)
    assert not step.fits(idx[:1], cache), "as many rows as were read"
    assert not step.fits(idx.int(), cache) and not step.fits(idx[:, :0], cache)
    for other in (dict(block_size=30), dict(n_layer=3), dict(n_head=1)):
        config = GPTConfig(**{**c, **other})
        small = KVCache(config)
        small.memory.make(torch.empty(2, config.n_head, 0, config.n_embd // config.n_head))
        for layer in small.layers:
            layer.length = 3
        assert not step.fits(idx, small)
    step.most = 19
    assert not step.fits(idx, cache)
    with pytest.raises(ValueError, match="do not fit in block_size"):
        model(tokens(2, c["block_size"] - 9), cache=cache)
    cache.clear()
    assert not step.fits(idx, cache)


def test_padded_prompts_are_written_on_as_without_it(trained):
    pad, idx = torch.tensor([0, 2]), tokens(2, 5, vocab_size=65)
    model, plain = trained("gpt"), trained("gpt")
    prepare(model, "float32")
    texts = [[t.tolist() for t in generate(m, idx, 20, temperature=0, pad=pad)] for m in (model, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("token", [-1, -7, 65, 2**40])
def test_a_token_that_is_none_is_refused_and_nothing_is_read(trained, arch, token):
    model, plain, idx = trained(arch), trained(arch), tokens(2, 6, vocab_size=65)
    prepare(model, "float32")
    caches = KVCache(model.config), KVCache(model.config)
    with torch.inference_mode():
        for each, cache in zip((model, plain), caches):
            each(idx[:, :3], cache=cache)
        with pytest.raises(IndexError, match="not among the 65"):
            model(torch.tensor([[1, 2], [1, token]]), cache=caches[0])
        assert caches[0].length == 3
        found, expected = (each(idx[:, 3:], cache=cache)[0] for each, cache in zip((model, plain), caches))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_ctrl_c_leaves_the_cache_as_it_was(trained, arch, monkeypatch):
    model, cache, idx = trained(arch), KVCache(trained(arch).config), tokens(1, 6, vocab_size=65)
    prepare(model, "float32")
    with torch.inference_mode():
        expected = model(idx)[0]
        model(idx[:, :3], cache=cache)
        run = model.fused.functions.run

        def interrupted(*what):
            run(*what)
            raise KeyboardInterrupt

        monkeypatch.setattr(model.fused.functions, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(idx[:, 3:], cache=cache)
        monkeypatch.undo()
        torch.testing.assert_close(model(idx[:, 3:], cache=cache)[0], expected, atol=2e-5, rtol=1e-4)


def test_several_threads_may_use_one_model(trained):
    model, idx = trained("gpt"), tokens(4, 30, vocab_size=65)
    prepare(model, "float32")

    def write(i):
        return [int(t) for t in generate(model, idx[i : i + 1, :5], 30, temperature=0)]

    expected = [write(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(write, range(4))) == expected


def test_a_copy_of_a_model_writes_the_same(trained):
    model, idx = trained("gpt"), tokens(1, 5, vocab_size=65)
    prepare(model, "float32")
    texts = [[int(t) for t in generate(m, idx, 20, temperature=0)] for m in (model, copy.deepcopy(model))]
    assert texts[0] == texts[1]


def test_a_cache_that_is_gone_is_not_kept(trained):
    model, cache = trained("gpt"), KVCache(trained("gpt").config)
    prepare(model, "float32")
    model(tokens(1, 3, vocab_size=65), cache=cache)
    model(tokens(1, 3, vocab_size=65), cache=cache)
    memory = weakref.ref(cache.memory.tensor)
    del cache
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("bias", [-1000.0, -20.0, 20.0, 1000.0])
def test_gelu_far_from_zero(trained, bias):
    model = trained("gpt")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.fill_(bias)
    for expected, found in passes(model, FusedStep(model, "float32"), tokens(2, 20, vocab_size=65), [3, 1, 16]):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_scores_far_from_zero(trained, arch):
    model = join_qkv(trained(arch))
    with torch.no_grad():
        for block in model.transformer.h if arch == "gpt" else model.layers:
            block.attn.c_attn.weight.mul_(100)
    for expected, found in passes(model, FusedStep(model, "float32"), tokens(2, 20, vocab_size=65), [3, 1, 16]):
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_no_number_stays_none(trained, arch):
    payload = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32).item()  # a NaN whose last bit is set
    for name, value in (("c_fc", payload), ("c_fc", float("nan")), ("c_proj", float("inf")), ("c_attn", float("nan"))):
        model = join_qkv(trained(arch))
        cache = KVCache(model.config)
        model(tokens(1, 3, vocab_size=65), cache=cache)
        blocks = model.transformer.h if arch == "gpt" else model.layers
        part = blocks[0].mlp if name == "c_fc" else blocks[0].attn
        with torch.no_grad():
            getattr(part, name).weight[0] = value
        step = FusedStep(model, "float32")
        with torch.inference_mode():
            assert not step(tokens(1, 1, vocab_size=65), cache).isfinite().any()


def test_numbers_too_small_for_others_stay_as_they_are_when_it_is_loaded():
    native.library("fused_cpu.c")
    assert torch.tensor(1e-40) * 1 != 0 and float("1e-310") * 1 != 0


def test_both_formats_of_16_bits(trained):
    model = trained("gpt")
    assert prepare(model, "16 bits") is None
    assert model.fused.how == "float16" and type(model.lm_head).__name__.endswith("Bfloat16Linear")


def test_a_large_model_in_bfloat16_reads_only_a_few_rows_so(trained, monkeypatch):
    monkeypatch.setattr(fused_cpu, "HEAVY", 1000)
    assert FusedStep(trained("gpt"), "bfloat16").most == 8
    assert FusedStep(trained("gpt"), "float32").most == 64


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Wide(MLP):
    def __init__(self, config):
        super().__init__(config)
        self.c_fc = torch.nn.Linear(config.n_embd, 8 * config.n_embd)
        self.c_proj = torch.nn.Linear(8 * config.n_embd, config.n_embd)


class Negative(MLP):
    def forward(self, x):
        return -super().forward(x)


class Plain(LayerNorm):
    """Without a bias to look up."""

    def __init__(self, config):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return self.weight * x / x.square().mean(dim=-1, keepdim=True).sqrt()


class Window(CausalSelfAttention):
    """Each position sees the 50 before it alone."""

    def forward(self, x, cache=None):
        y = super().forward(x, cache)
        return y if cache is None or cache.length < 50 else 0 * y


IDEAS = {
    "sine": (torch.nn.functional, "gelu", lambda x, approximate: x.sin()),
    "SiLU": (torch.nn.functional, "gelu", lambda x, approximate: torch.nn.functional.silu(x)),
    "quick GELU": (torch.nn.functional, "gelu", lambda x, approximate: quick_gelu(x)),
    "a wide MLP": (model_module, "MLP", Wide),
    "a plain norm": (model_module, "LayerNorm", Plain),
    "a window": (model_module, "CausalSelfAttention", Window),
}


@pytest.mark.parametrize("how", ["float32", "float16", "int8"])
@pytest.mark.parametrize("idea", IDEAS)
def test_a_model_with_an_idea_of_ones_own_is_not_written_by_code_that_does_not_know_it(
    trained, monkeypatch, capsys, idea, how
):
    utils.say_once.cache_clear()
    monkeypatch.setattr(*IDEAS[idea])
    model, idx = trained("gpt", block_size=100), tokens(1, 6, vocab_size=65)
    expected = model(idx)[0]
    assert "another model" in prepare(model, how)
    assert capsys.readouterr().err.startswith("fused_cpu.c is not used, and writing is slower: it computes another")
    assert not hasattr(model, "fused")
    cache = KVCache(model.config)
    with torch.inference_mode():
        model(idx[:, :3], cache=cache)
        found = model(idx[:, 3:], cache=cache)[0]
    torch.testing.assert_close(found, expected, atol=2e-5 if how == "float32" else 1.0, rtol=1e-4)


def test_a_modern_model_with_an_idea_of_ones_own(trained, monkeypatch):
    monkeypatch.setattr(modern_module, "relu_squared", torch.nn.functional.relu)
    assert "another model" in prepare(trained("modern"), "int8")


def test_a_model_that_is_changed_by_itself_is_found_out(trained):
    model = trained("gpt")
    model.transformer.h[1].mlp.__class__ = Negative
    assert "another model" in prepare(model, "float32")


def test_the_trial_leaves_the_dice_alone(trained):
    model = trained("gpt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert prepare(model, "float32") is None
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_number_format_is_left_alone(trained, dtype):
    assert "in float32" in prepare(trained("gpt").to(dtype), "float32")


@pytest.mark.parametrize(
    "settings, why",
    [(dict(n_embd=24), "multiple of 16 channels, and these have 8"), (dict(block_size=1), "block_size")],
)
def test_a_model_that_it_is_not_made_for_is_lightened_alone(trained, settings, why):
    model = trained("gpt", **settings)
    assert why in prepare(model, "float32")
    assert model(tokens(1, 1, vocab_size=65))[0].shape == (1, 1, 65)


def test_a_very_large_model_is_not_laid_out_twice(trained, monkeypatch):
    monkeypatch.setattr(fused_cpu, "MOST_WEIGHTS", 1000)
    assert "up to 1,000 weights" in prepare(trained("gpt"), "float32")


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As where fused_cpu.c was never compiled: a directory of its own."""
    monkeypatch.setattr(native, "KEPT", str(tmp_path / "__pycache__"))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_it_is_compiled_once(anew, trained, monkeypatch):
    assert prepare(trained("gpt"), "float32") is None
    [kept] = (anew / "__pycache__").iterdir()
    native.library.cache_clear()
    asked = []
    compile_to = native.compile_to
    monkeypatch.setattr(native, "compile_to", lambda *how: asked.append(how) or compile_to(*how))
    assert prepare(trained("gpt"), "float32") is None and asked == []
    monkeypatch.setattr(native, "processor", lambda: "another CPU")  # on which it could be an illegal instruction
    native.library.cache_clear()
    assert prepare(trained("gpt"), "float32") is None and len(asked) == 1
    assert kept in (anew / "__pycache__").iterdir()


@pytest.mark.parametrize("left", [0, 100, 4096, 12000])
def test_what_was_kept_and_is_damaged_is_compiled_anew(anew, trained, left):
    prepare(trained("gpt"), "float32")
    [kept] = (anew / "__pycache__").iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # not in place: it is loaded
    kept.write_bytes(whole[:left])
    native.library.cache_clear()
    assert prepare(trained("gpt"), "float32") is None
    assert kept.stat().st_size == len(whole)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_where_nothing_can_be_kept_it_is_compiled_each_time(anew, trained):
    anew.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert prepare(trained("gpt"), "float32") is None
    assert list(anew.iterdir()) == []


def test_where_a_file_is_in_the_way_it_is_compiled_each_time(anew, trained):
    (anew / "__pycache__").write_text("")
    assert prepare(trained("gpt"), "float32") is None


def test_without_a_compiler_pytorch_writes(anew, trained, monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: [])
    monkeypatch.setattr(fused_cpu, "compiler", lambda: [])
    model = trained("gpt")
    assert prepare(model, "float32") == "there is no C compiler"
    assert len(list(generate(model, tokens(1, 3, vocab_size=65), 5, generator=torch.Generator()))) == 5


def test_a_compiler_may_have_arguments_and_where_there_is_none_of_that_name_another_is_taken(monkeypatch):
    monkeypatch.setenv("CC", "cc -O1")
    assert native.compiler() == ["cc", "-O1"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.compiler() in (["cc"], ["gcc"], ["clang"])
    monkeypatch.setenv("PATH", "")
    assert native.compiler() == []


@pytest.mark.parametrize("name", ["true", "false"])
def test_a_compiler_that_makes_nothing_is_named(anew, trained, monkeypatch, name):
    monkeypatch.setenv("CC", name)
    assert prepare(trained("gpt"), "float32") == f"it cannot be compiled: {name} failed"


def test_a_compiler_that_fails_is_named_with_what_it_says(anew, trained, monkeypatch):
    (anew / "fused_cpu.c").write_text("this is no C")
    (anew / "vectors.h").write_text("")
    monkeypatch.setattr(native, "HERE", str(anew))
    why = prepare(trained("gpt"), "float32")
    assert why.startswith("it cannot be compiled: ") and "error" in why
    assert list((anew / "__pycache__").iterdir()) == []


def test_where_there_is_no_openmp_one_thread_does_it(anew, trained, monkeypatch):
    compiler = anew / "cc"
    ours = " ".join(native.compiler())
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {ours} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    model = trained("gpt")
    for expected, found in passes(model, FusedStep(model, "float32"), tokens(2, 20, vocab_size=65), [3, 1, 16]):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
