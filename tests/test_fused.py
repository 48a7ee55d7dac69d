"""The kernels, against model.py: on a CPU under Triton's interpreter, and on a GPU where there is one.

Triton decides when it is imported whether it interprets. So test_the_kernels_under_tritons_interpreter starts a pytest
of its own, which collects the functions here that are called check_...
"""

import os
import subprocess
import sys

import pytest
import torch
from test_generate import tokens

from generate import Reader, generate
from graphs import GraphReader

WIDTHS = [dict(n_embd=16, n_head=2), dict(n_embd=39, n_head=3, bias=False, block_size=11)]


def has_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@needs_triton
def test_the_kernels_under_tritons_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=check_*",
        __file__,
    ]
    result = subprocess.run(command, env=dict(os.environ, TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr


@pytest.fixture
def fused(monkeypatch):
    """fused.py for a CPU: few and large programs for Linears, since each takes long to interpret; several BLOCKs."""
    import fused

    monkeypatch.setattr(fused, "usable", lambda model, batch: True)
    monkeypatch.setattr(fused, "ROWS", 64)
    monkeypatch.setattr(fused, "TILE", 4 * 16)
    return fused


def both(model, text, prompt, other=None):
    """The logits after each position of text (B, N) from `prompt` on: of a GraphReader with kernels, and of a Reader of
    the same or another model. Both (steps, B, V)."""
    mine, plain, logits = GraphReader(model), Reader(other or model), ([], [])
    with torch.inference_mode():
        for n in range(prompt, text.size(1) + 1):
            for reader, found in zip((mine, plain), logits):
                found.append(reader.next_logits(text[:, :n]))
    assert mine.fused is not None
    return [torch.stack(found) for found in logits]


@pytest.mark.parametrize("sizes", WIDTHS, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def check_logits_are_those_of_the_model_past_block_size_too(fused, make_model, sizes, B):
    model = make_model(n_layer=1 if B == 3 else 2, **sizes)
    torch.testing.assert_close(*both(model, tokens(B, model.config.block_size + 3), 2), atol=1e-5, rtol=0)


def check_in_bfloat16_they_are_nearer_to_exact_ones_than_those_of_pytorchs_operations(fused, make_model):
    """Exact: the same weights, and all sums, in float32."""
    model, exact = make_model(**WIDTHS[1]).bfloat16(), make_model(**WIDTHS[1])
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    text = tokens(1, 11)
    found, expected = both(model, text, 1, exact)
    rounded = model(text, text)[0].float().transpose(0, 1)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert (found - expected).square().mean() < (rounded - expected).square().mean()


def check_the_number_of_rows_changes_nothing(fused, make_model, monkeypatch):
    model, text = make_model(n_layer=1), tokens(1, 5)
    for rows, many, many_rows in ((4, 16384, 16), (4, 11, 8)):
        for name, n in dict(ROWS=rows, MANY=many, MANY_ROWS=many_rows).items():
            monkeypatch.setattr(fused, name, n)
        torch.testing.assert_close(*both(model, text, 3), atol=1e-5, rtol=0)


def check_where_triton_cannot_compile_the_model_itself_writes_and_a_line_says_why(
    fused, make_model, monkeypatch, capsys
):
    def broken(self, token):
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(fused.FusedStep, "__call__", broken)
    model, idx = make_model(), tokens(2, 3)
    for _ in range(2):
        found = list(generate(model, idx, 9, temperature=0, reader=GraphReader(model)))
        assert torch.equal(torch.stack(found), torch.stack(list(generate(model, idx, 9, temperature=0))))
    said = capsys.readouterr().err
    assert said == "fused.py is not used, and writing is slower: Failed to find C compiler.\n"


# What the compiler takes each pointer for: numbers of 16 bits where the model's are
LINEAR = dict(x="*fp32", norm="*bf16", shift="*bf16", W="*bf16", bias="*bf16", y="*fp32", N="i32", B="i32")
ATTENTION = dict(qkv="*fp32", cache_k="*bf16", cache_v="*bf16", position="*i64", y="*fp32", S="i32", SCALE="fp32")
EMBEDDING = dict(token="*i64", position="*i64", wte="*bf16", wpe="*bf16", x="*fp32")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them, which says more")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name, types, constants, warps",
    [
        ("embedding_kernel", EMBEDDING, dict(C=768, BLOCK=1024), 4),
        ("linear_kernel", LINEAR, dict(K=768, GELU=True, ADD=False, ROWS=4, BLOCK=1024), 4),
        ("linear_kernel", LINEAR, dict(K=6400, GELU=False, ADD=True, ROWS=4, BLOCK=8192, norm=None, shift=None), 16),
        ("attention_kernel", ATTENTION, dict(H=12, D=64, BLOCK=128, BLOCK_D=64), 8),
    ],
    ids=["embedding", "linear", "long", "attention"],
)
def test_the_kernels_compile_for_gpus_that_are_not_here_and_write_only_after_the_wait(
    name, types, constants, warps, capability, tmp_path, monkeypatch
):
    import triton
    from triton.backends.compiler import GPUTarget

    import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(fused, name)
    constants = dict(constants, OVERLAP=capability >= 90)
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, signature, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
    ptx = built.asm["ptx"]
    assert "st.global" in ptx and ("griddepcontrol.wait" in ptx) == (capability >= 90)
    assert "st.global" not in ptx.split("griddepcontrol.wait")[0] or capability < 90


@needs_triton
@needs_gpu
@pytest.mark.parametrize("B", [1, 3])
def test_on_a_gpu_what_is_recorded_gives_the_logits_of_the_model(make_model, B):
    """At many lengths of the cache, and past block_size. In bfloat16 they are the nearer ones to exact logits."""
    sizes = dict(n_embd=192, n_head=3, block_size=600, vocab_size=20000)
    exact, model = make_model(**sizes).cuda(), make_model(**sizes).cuda().bfloat16()
    text = torch.randint(20000, (B, 640), device="cuda")
    found, expected = both(exact, text, 3)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    (found, expected), (_, rounded) = both(model, text, 3, exact), both(model, text, 3)
    assert (found - expected).square().mean() < (rounded - expected).square().mean()


@needs_triton
@needs_gpu
def test_on_a_gpu_the_text_is_the_same(make_model):
    model, start = make_model(n_embd=192, n_head=3, block_size=64).cuda(), torch.zeros(1, 1, dtype=torch.int64)
    readers = (GraphReader(model), Reader(model))
    texts = [list(generate(model, start.cuda(), 100, temperature=0, reader=reader)) for reader in readers]
    assert readers[0].fused is not None and torch.equal(*map(torch.stack, texts))
