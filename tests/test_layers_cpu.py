"""layers_cpu.c, against model.py and modern.py with the same weights: what a layer makes, and all its gradients."""

import copy
import os
import platform
import types

import pytest
import torch
import torch.nn.functional as F
from test_modern import make_modern
from test_optim import make_options, needs_muon

import layers_cpu
import model as model_module
import modern
import native
import optim
import plan
import utils
from layers_cpu import Layers, adding_up, in_c, known_dropout, knows, replaced, same_weights
from model import GPT, GPTConfig
from modern import Modern
from optim import Learner
from utils import has_bfloat16

pytestmark = [
    pytest.mark.skipif(native.compiler() == [], reason="there is no C compiler"),
    pytest.mark.skipif(os.name == "nt", reason="not made for Windows"),
]
CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(
    layers_cpu.unsuited(torch.bfloat16) is not None, reason="this CPU has no bfloat16 in AVX-512"
)
SIZES = dict(n_embd=64, n_head=2, n_layer=2, vocab_size=31, block_size=100)
LEARNED = dict(n_embd=32, n_head=2, n_layer=2, block_size=24, batch_size=6)  # of a Learner
ARCHS = ["gpt", "modern"]
LEARNERS = ["gpt", pytest.param("modern", marks=needs_muon)]
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
VECTORS = [[]]  # flags that leave the compiler fewer registers: AVX2's, then SSE's
if platform.machine() == "x86_64":
    VECTORS += [["-mno-avx512f"], ["-mno-avx512f", "-mno-avx2", "-mno-f16c"]]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """In float32, layers_cpu.c computes the same on every CPU, where it is fast and where it is not."""
    unsuited = layers_cpu.unsuited
    monkeypatch.setattr(layers_cpu, "unsuited", lambda dtype: None if dtype == torch.float32 else unsuited(dtype))


@pytest.fixture(params=VECTORS, ids=lambda flags: " ".join(flags) or "native")
def any_vectors(request, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *request.param])
    for cache in (native.library, layers_cpu.functions_for):
        cache.cache_clear()
    yield
    for cache in (native.library, layers_cpu.functions_for):
        cache.cache_clear()


@pytest.fixture
def trained(make_model):
    """trained(arch, ...): a model with weights of some size everywhere, in training mode."""

    def build(arch, **settings):
        return (make_model if arch == "gpt" else make_modern)(**{**SIZES, **settings}).train()

    return build


def batch(model, B, T, seed=0):
    return torch.randint(model.config.vocab_size, (2, B, T), generator=torch.Generator().manual_seed(seed))


def by_pytorch(model, x, y):
    """The loss of a model and its gradients, for each parameter."""
    loss = model(x, y)[1]
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def by_c(model, layers, x, y, sums=None):
    """The same of the worker of some Layers."""
    sums = layers.sums() if sums is None else sums
    with adding_up(sums):
        loss = model(x, y)[1]
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all((g is None) == (p in sums.gradients) for p, g in zip(model.parameters(), found))
    return loss, [sums.gradients[p].clone() if g is None else g for p, g in zip(model.parameters(), found)]


def differences(found, expected):
    """By what share of its length each gradient differs; of one that is almost 0, of a hundredth of the longest's."""
    found, expected = [g.float() for g in found], [g.float() for g in expected]
    least = 0.01 * max(g.norm() for g in expected)
    return [float((a - b).norm() / max(b.norm(), least)) for a, b in zip(found, expected)]


@pytest.mark.parametrize("B, T", [(3, 64), (2, 33), (5, 1), (1, 7), (3, 100), (8, 4)])
@pytest.mark.parametrize("more", [{}, dict(n_embd=48, n_head=3), dict(n_embd=80, n_head=1), dict(n_layer=1)], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_loss_and_gradients_are_those_of_the_model(trained, arch, more, B, T):
    model = trained(arch, **more)
    worker = same_weights(model)
    x, y = batch(model, B, T)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(worker, Layers(worker, model), x, y)
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=1e-5)
    assert max(differences(found, expected)) < (1e-5 if T > 1 else 1e-4)  # of 1 queries' and keys' are rounding alone


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_of_vector_computes_the_same(any_vectors, trained, arch):
    model = trained(arch)
    worker = same_weights(model)
    x, y = batch(model, 3, 45)
    _, expected = by_pytorch(model, x, y)
    assert max(differences(by_c(worker, Layers(worker, model), x, y)[1], expected)) < 1e-5


def test_a_model_without_biases_has_none(trained):
    model = trained("gpt", bias=False)
    worker = same_weights(model)
    x, y = batch(model, 3, 45)
    assert max(differences(by_c(worker, Layers(worker, model), x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("B, T", [(3, 64), (2, 33), (1, 1)])
@pytest.mark.parametrize("arch", ARCHS)
def test_in_bfloat16_gradients_are_as_near_to_those_of_float32_as_pytorchs(trained, arch, B, T):
    model = trained(arch)
    x, y = batch(model, B, T)
    _, expected = by_pytorch(model, x, y)
    plain, worker = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16()
    ours = differences(by_c(worker, Layers(worker, model), x, y)[1], expected)
    assert sum(ours) < 1.1 * sum(differences(by_pytorch(plain, x, y)[1], expected))
    assert max(ours) < 0.05


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_several_batches_are_added_up(trained, arch):
    model = trained(arch)
    worker = same_weights(model)
    layers = Layers(worker, model)
    sums = layers.sums()
    for seed, (B, T) in enumerate([(3, 45), (1, 100), (7, 8)]):  # the memory that is at hand need not fit
        by_c(worker, layers, *batch(model, B, T, seed), sums)
    once = [by_pytorch(model, *batch(model, B, T, seed))[1] for seed, (B, T) in enumerate([(3, 45), (1, 100), (7, 8)])]
    names = dict(zip(worker.parameters(), map(sum, zip(*once))))
    assert max(differences(sums.gradients.values(), [names[p] for p in sums.gradients])) < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_that_changed_count_when_they_are_laid_out(trained, arch):
    model = trained(arch)
    worker = same_weights(model)
    layers = Layers(worker, model)
    x, y = batch(model, 2, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    layers.lay_out()
    assert max(differences(by_c(worker, layers, x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


def test_elsewhere_the_blocks_are_pytorchs(trained):
    model = trained("gpt")
    worker = same_weights(model)
    Layers(worker, model)
    x, y = batch(model, 2, 20)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_pytorch(worker, x, y)
    assert torch.equal(loss, found_loss) and all(map(torch.equal, found, expected))
    assert type(model.transformer.h[0]) is model_module.Block  # and the model itself is as it was


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_for_the_backward_pass_is_used_again(trained, arch):
    model = trained(arch)
    worker = same_weights(model)
    layers = Layers(worker, model)
    sums = layers.sums()
    places = []
    for seed in range(3):
        by_c(worker, layers, *batch(model, 2, 20, seed), sums)
        places += [memory.data_ptr() for memory in sums.spare]
    assert places[0] == places[1] == places[2] and len(places) == 3


def test_going_backward_twice_is_refused(trained):
    model = trained("gpt")
    worker = same_weights(model)
    with adding_up(Layers(worker, model).sums()):
        loss = worker(*batch(model, 2, 20))[1]
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="once only"):
            loss.backward()


@pytest.mark.parametrize("arch", ARCHS)
def test_no_number_stays_none(trained, arch):
    model = trained(arch)
    with torch.no_grad():
        (model.transformer.wte if arch == "gpt" else model.wte).weight[3] = float("nan")
    worker = same_weights(model)
    x = torch.full((2, 20), 4)
    x[1, 10] = 3
    with adding_up(Layers(worker, model).sums()):
        logits = worker(x, x)[0][..., :3]  # not of the token itself: a GPT has one table for reading and writing
    assert logits[0].isfinite().all() and logits[1, 10:].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_same_in_both_directions_and_where_the_model_does(trained, monkeypatch, arch, dtype, p):
    model = trained(arch, dropout=p)
    worker = copy.deepcopy(model).to(dtype)
    layers, x, y = Layers(worker, model), *batch(model, 3, 45)
    seeds = torch.randint(2**62, (2, 3), generator=torch.Generator().manual_seed(1))
    with replaced(model_module, dropout=known_dropout(layers_cpu.functions_for(dtype), p, seeds)):
        _, expected = by_pytorch(model, x, y)
    monkeypatch.setattr(layers_cpu, "draw_seeds", lambda layers: seeds)
    monkeypatch.setattr(model_module, "dropout", lambda x, p: x)
    found = by_c(worker, layers, x, y)[1]
    assert max(differences(found, expected)) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("arch", ARCHS)
def test_in_eval_nothing_is_dropped(trained, arch):
    model = trained(arch, dropout=0.5).eval()
    worker = same_weights(model)
    x, y = batch(model, 2, 20)
    assert max(differences(by_c(worker, Layers(worker, model), x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


def masks_of(seed, place, threshold, n=1 << 16):
    functions = layers_cpu.functions_for(torch.float32)
    seeds, found = torch.zeros(3, dtype=torch.int64), torch.empty(n)
    seeds[place] = seed
    now = layers_cpu.Pass(threshold=threshold, seeds=seeds.data_ptr())
    functions.masks(layers_cpu.ctypes.byref(now), place, n, found.data_ptr())
    return found


@pytest.mark.parametrize("threshold", [1, 51, 128, 255])
def test_dropout_has_its_rate_and_keeps_the_mean(any_vectors, threshold):
    for seed in (0, 1, 2**40 + 7, 2**62 - 1):
        mask = masks_of(seed, 1, threshold)
        rate, spread = threshold / 256, 5 * (threshold / 256 * (1 - threshold / 256) / len(mask)) ** 0.5
        assert (mask == 0).float().mean() == pytest.approx(rate, abs=spread)
        assert mask.unique().tolist() == [0.0, pytest.approx(256 / (256 - threshold))]


def test_what_is_dropped_differs_from_seed_to_seed_and_does_not_repeat():
    masks = torch.stack([masks_of(seed, 0, 128) > 0 for seed in (*range(8), *(s << 32 for s in range(1, 8)), 12345)])
    centred = masks.double() - 0.5
    within = 6 * 0.25 * masks.size(1) ** 0.5  # products of independent ones are off by that once in 10^8
    for i, one in enumerate(centred):
        for other in centred[:i]:
            assert abs((one * other).sum()) < within
        for step in (1, 2, 16, 64, 100, 4096):
            assert abs((one[step:] * one[:-step]).sum()) < within


def test_vectors_of_any_width_drop_the_same(monkeypatch):
    found = []
    for flags in VECTORS:
        monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
        for cache in (native.library, layers_cpu.functions_for):
            cache.cache_clear()
        found.append(masks_of(99, 2, 51))
    for cache in (native.library, layers_cpu.functions_for):
        cache.cache_clear()
    assert all(torch.equal(found[0], other) for other in found)


# ---------------------------------------------------------------------------------------------------------------------
# The trial


@pytest.mark.parametrize("cls, bias", [(GPT, True), (GPT, False), (Modern, False)])
def test_the_models_of_this_repository_are_known(cls, bias):
    assert knows(cls, bias, layers_cpu.unsuited(torch.bfloat16) is None)


def without_residual(self, x, cache=None):
    return x + self.mlp(self.ln_2(x + self.attn(self.ln_1(x), cache)))


def exact_gelu(self, x):
    return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


def undropped(self, x):
    return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def other_epsilon(self, x):
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-3)


def scaled_twice(q, k, v, dropout=0.0, mask=None):
    return model_module.attention_written_out(2 * q, k, v, dropout, mask)


def undropped_attention(q, k, v, dropout=0.0, mask=None):
    return model_module.attention_written_out(q, k, v, 0.0, mask)


def gaussian(x, p):
    return x * (1 + torch.randn_like(x) * (p / (1 - p)) ** 0.5)


@pytest.mark.parametrize(
    "of, name, changed",
    [
        (model_module.Block, "forward", without_residual),
        (model_module.MLP, "forward", exact_gelu),
        (model_module.MLP, "forward", undropped),
        (model_module.LayerNorm, "forward", other_epsilon),
        (model_module, "attention", scaled_twice),
        (model_module, "attention", undropped_attention),
        (model_module, "dropout", gaussian),
        (model_module, "dropout", lambda x, p: F.dropout(x, p / 2)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_model_with_an_idea_of_ones_own_is_computed_by_pytorch_and_a_line_says_so(
    trained, monkeypatch, capsys, of, name, changed
):
    monkeypatch.setattr(of, name, changed)
    utils.say_once.cache_clear()
    model = trained("gpt")
    assert in_c(model, model) == (model, None)
    assert capsys.readouterr().err.startswith("layers_cpu.c is not used, and training is slower: it computes other")


@pytest.mark.parametrize(
    "of, name, changed",
    [
        (modern, "norm", lambda x: F.rms_norm(x, x.shape[-1:])),
        (modern, "rotate", lambda x, cos, sin: x),
        (modern, "relu_squared", F.relu),
        (
            modern.Block,
            "forward",
            lambda self, x, cos, sin, cache=None: x + self.mlp(self.attn(x, cos, sin) + self.shift),
        ),
    ],
    ids=["rms norm", "no rotary positions", "relu", "block"],
)
def test_so_is_a_modern_model(trained, monkeypatch, capsys, of, name, changed):
    monkeypatch.setattr(of, name, changed)
    utils.say_once.cache_clear()
    model = trained("modern")
    assert in_c(model, model) == (model, None)
    assert "is not used, and training is slower" in capsys.readouterr().err


def test_a_layer_with_another_weight_is_computed_by_pytorch(trained, monkeypatch):
    before = model_module.Block.__init__

    def with_gain(self, config):
        before(self, config)
        self.gain = torch.nn.Parameter(torch.ones(config.n_embd))

    monkeypatch.setattr(model_module.Block, "__init__", with_gain)
    model = trained("gpt")
    assert in_c(model, model) == (model, None)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 64).double(), torch.zeros(2, 3, 32), torch.zeros(3, 64)], ids=["float64", "narrow", "flat"]
)
def test_numbers_that_it_would_read_wrongly_are_refused(trained, x):
    model = trained("gpt")
    worker = same_weights(model)
    with adding_up(Layers(worker, model).sums()), pytest.raises(ValueError, match="in place of"):
        worker.transformer.h[0](x)


def test_weights_in_another_order_are_read_by_pytorch(trained):
    model = trained("gpt")
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = weight.data.t().contiguous().t()
    assert in_c(model, model) == (model, None)


def test_models_that_it_is_not_made_for_are_computed_by_pytorch_without_a_word(trained, monkeypatch, capsys):
    class Other(GPT):
        pass

    other = Other(GPTConfig(**SIZES))
    assert in_c(other, other) == (other, None)
    narrow = trained("gpt", n_head=8)  # heads of 8 channels
    assert in_c(narrow, narrow) == (narrow, None)
    model = trained("gpt")
    assert in_c(model, model)[1] is not None
    monkeypatch.setattr(layers_cpu, "MOST_SUMS", 1000)
    assert in_c(model, model) == (model, None)
    assert capsys.readouterr().err == ""


def test_without_a_compiler_pytorch_computes(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "KEPT", str(tmp_path))
    monkeypatch.setattr(native, "compiler", lambda: [])
    for cache in (native.library, layers_cpu.functions_for):
        cache.cache_clear()
    model = trained("gpt")
    utils.say_once.cache_clear()
    assert in_c(model, model) == (model, None)
    why = "layers_cpu.c is not used, and training is slower: there is no C compiler\n"
    assert capsys.readouterr().err == why
    assert not layers_cpu.fits(model.config, torch.float32)
    for cache in (native.library, layers_cpu.functions_for):
        cache.cache_clear()


@pytest.mark.parametrize(
    "flags, dtype, why",
    [
        ("fma avx2 f16c", torch.float32, "AVX-512"),
        ("avx512f", torch.float32, None),
        ("avx512f", torch.bfloat16, "bfloat16"),
        ("avx512f avx512_bf16", torch.bfloat16, None),
        ("avx512f avx512_bf16 amx_bf16", torch.bfloat16, "AMX"),
        (None, torch.float32, "AVX-512"),
    ],
)
def test_on_which_cpus_it_is_faster(monkeypatch, tmp_path, flags, dtype, why):
    monkeypatch.undo()  # see `anywhere`
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(layers_cpu, "open", lambda path: open(info), raising=False)  # noqa: SIM115
    found = layers_cpu.unsuited(dtype)
    assert found is None if why is None else why in found


# ---------------------------------------------------------------------------------------------------------------------
# In a Learner


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_learner(arch, dtype=torch.float32, in_c=True, **changes):
    options = make_options(arch=arch, **{**LEARNED, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plan.build_model(options, 31)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    with replaced(optim, **({} if in_c else dict(in_c=lambda worker, model: (worker, None)))):
        learner = Learner(model.train(), options, CPU, dtype)
    assert (learner.layers is not None) == in_c
    return learner


def windows(learner, seed=0):
    o = learner.options
    rows = o.batch_size * o.gradient_accumulation_steps
    return torch.randint(31, (2, rows, o.block_size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [2, 4, 6], ids="{} windows a part".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", LEARNERS)
def test_a_step_has_the_gradients_of_pytorch(threads, arch, dtype, rows):
    found, expected = (make_learner(arch, dtype if c else torch.float32, in_c=c) for c in (True, False))
    found.rows_at_once = expected.rows_at_once = lambda T: rows
    losses = [learner.add_gradients(*windows(learner)) for learner in (found, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5 if dtype == torch.float32 else 2e-3)
    most = max(differences([p.grad for p in found.weights], [p.grad for p in expected.weights]))
    assert most < (1e-5 if dtype == torch.float32 else 0.05)
    assert all(p.grad.dtype == torch.float32 for p in found.weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", LEARNERS)
def test_steps_with_dropout_end_bit_for_bit_alike_under_one_seed(threads, arch, dtype):
    ends = []
    for seed in (1, 1, 2):
        learner = make_learner(arch, dtype, dropout=0.3, gradient_accumulation_steps=3)
        learner.rows_at_once = lambda T: 2
        torch.manual_seed(seed)
        losses = [learner.step(*windows(learner, n), 1.0)[0].item() for n in range(4)]
        ends.append((losses, [p.clone() for p in learner.weights]))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", LEARNERS)
def test_a_model_learns_as_it_does_by_pytorch(arch, dtype):
    losses = []
    for c in (True, False):
        learner = make_learner(arch, dtype if c else torch.float32, in_c=c, max_iters=60)
        x, y = windows(learner)
        losses.append([learner.step(x, y, 1.0)[0].item() for _ in range(30)])
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", LEARNERS)
def test_a_resumed_run_goes_on_bit_for_bit(arch, dtype):
    unbroken, begun, resumed = (make_learner(arch, dtype) for _ in range(3))
    for n in range(4):
        unbroken.step(*windows(unbroken, n), 1.0)
    for n in range(2):
        begun.step(*windows(begun, n), 1.0)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    for n in range(2, 4):
        resumed.step(*windows(resumed, n), 1.0)
    assert all(map(torch.equal, unbroken.weights, resumed.weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_bad_numbers_changes_nothing(dtype):
    learner = make_learner("gpt", dtype)
    x, y = windows(learner)
    learner.step(x, y, 1.0)
    before = [p.clone() for p in learner.weights]
    broken = learner.copies[0].data[x[0, 0]].clone()
    learner.copies[0].data[x[0, 0]] = float("nan")
    loss, _ = learner.step(x, y, 1.0)
    assert loss.isnan() and learner.skipped[0] == 1
    learner.copies[0].data[x[0, 0]] = broken
    assert all(map(torch.equal, learner.weights, before)) or dtype == torch.float32
    assert learner.step(x, y, 1.0)[0].isfinite()


def test_gradients_added_up_before_are_kept(threads):
    found, expected = (make_learner("gpt", in_c=c) for c in (True, False))
    for learner in (found, expected):
        for n in range(3):
            learner.add_gradients(*windows(learner, n))
    assert max(differences([p.grad for p in found.weights], [p.grad for p in expected.weights])) < 1e-5


def test_in_float32_the_worker_has_the_weights_of_the_model_and_the_model_stays_as_it_was():
    learner = make_learner("gpt")
    assert learner.worker is not learner.model and type(learner.model.transformer.h[0]) is model_module.Block
    assert all(a is b for a, b in zip(learner.worker.parameters(), learner.model.parameters()))
    assert learner.worker.lm_head.weight is learner.worker.transformer.wte.weight


def test_which_steps_are_computed_in_c(monkeypatch):
    learner = make_learner("gpt")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [learner.computes_in_c(parts) for parts in (1, 2, 4, 100)] == [False, True, True, True]
    learner.worker.gradient_checkpointing = True
    assert not learner.computes_in_c(4)
    learner.worker.gradient_checkpointing, learner.compute = False, lambda x, y: None  # compiled
    assert not learner.computes_in_c(4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_frozen_stays(dtype):
    learner = make_learner("gpt", dtype)
    for p in (*learner.model.transformer.h[0].parameters(), *learner.worker.transformer.h[0].parameters()):
        p.requires_grad_(False)
    x, y = windows(learner)
    with pytest.raises(RuntimeError):  # as without layers_cpu.c: a Learner learns all weights
        learner.step(x, y, 1.0)


@pytest.mark.parametrize("arch", LEARNERS)
def test_in_bfloat16_it_ends_within_0_01_of_the_loss_of_float32_by_pytorch(arch):
    if layers_cpu.unsuited(torch.bfloat16) is not None or not has_bfloat16(CPU):
        pytest.skip("this CPU has no bfloat16 in AVX-512")
    text = torch.randint(31, (40,), generator=torch.Generator().manual_seed(5)).repeat(60)
    ends = []
    for c, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        learner = make_learner(arch, dtype, in_c=c, learning_rate=3e-3, dropout=0.0)
        where = torch.Generator().manual_seed(3)
        for _ in range(150):
            at = torch.randint(len(text) - 25, (6,), generator=where)
            w = torch.stack([text[i : i + 25] for i in at])
            learner.step(w[:, :-1].contiguous(), w[:, 1:].contiguous(), 1.0)
        w = torch.stack([text[i : i + 25] for i in range(0, 40)])
        with torch.no_grad():
            ends.append(learner.model.eval()(w[:, :-1], w[:, 1:])[1].item())
    assert abs(ends[0] - ends[1]) < 0.01


def test_what_is_kept_of_a_part_is_what_the_plan_counts(trained):
    for dtype in [torch.float32] + ([torch.bfloat16] if layers_cpu.unsuited(torch.bfloat16) is None else []):
        model = trained("gpt", block_size=64)
        worker = copy.deepcopy(model).to(dtype)
        sums = Layers(worker, model).sums()
        kept = sums.room(torch.empty(16, 64, 64, dtype=dtype))
        expected_kept, expected_scratch = layers_cpu.planned_bytes(types.SimpleNamespace(**SIZES), 16 * 64, dtype)
        assert len(kept) == pytest.approx(expected_kept, rel=0.02)
        assert len(sums.scratch) == pytest.approx(expected_scratch, rel=0.1)
