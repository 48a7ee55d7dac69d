"""learn_cpu.c, against model.py and modern.py with the same weights: the loss, and all its gradients."""

import copy
import os
import platform

import pytest
import torch
import torch.nn.functional as F
from test_modern import make_modern
from test_optim import make_options, needs_muon

import learn_cpu
import model as model_module
import modern
import native
import optim
import plan
import utils
from learn_cpu import Learned, in_c, known_dropout, knows, replaced
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
    learn_cpu.unsuited(torch.bfloat16) is not None, reason="this CPU has no bfloat16 in AVX-512"
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
    """In float32, learn_cpu.c computes the same on every CPU, where it is fast and where it is not."""
    unsuited = learn_cpu.unsuited
    monkeypatch.setattr(learn_cpu, "unsuited", lambda dtype: None if dtype == torch.float32 else unsuited(dtype))


@pytest.fixture(params=VECTORS, ids=lambda flags: " ".join(flags) or "native")
def any_vectors(request, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *request.param])
    for cache in (native.library, learn_cpu.functions_for):
        cache.cache_clear()
    yield
    for cache in (native.library, learn_cpu.functions_for):
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


def by_c(model, x, y, dtype=torch.float32, sums=None, seed=0):
    """The same by learn_cpu.c."""
    sums = Learned(model, dtype).sums() if sums is None else sums
    loss = sums.learn(x, y, 1.0, seed)
    return loss, [sums.gradients[p].clone() for p in model.parameters()]


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
    x, y = batch(model, B, T)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(model, x, y)
    assert found_loss == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert max(differences(found, expected)) < (1e-5 if T > 1 else 1e-4)  # of 1 queries' and keys' are rounding alone


@pytest.mark.parametrize("vocab_size", [2, 15, 16, 17, 65, 500])
@pytest.mark.parametrize("arch, more", [("gpt", {}), ("modern", dict(ahead=1)), ("modern", dict(ahead=5))], ids=str)
def test_a_vocabulary_of_any_size(trained, arch, more, vocab_size):
    model = trained(arch, vocab_size=vocab_size, **more)
    x, y = batch(model, 3, 40)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(model, x, y)
    assert found_loss == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert max(differences(found, expected)) < 1e-5


@pytest.mark.parametrize("more", [dict(ngram=1), dict(ngram=2), dict(ngram=16, ngram_rows=7)], ids=str)
def test_runs_of_any_length(trained, more):
    model = trained("modern", **more)
    x, y = batch(model, 3, 40)
    assert max(differences(by_c(model, x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_targets_that_are_ignored(trained, arch):
    model = trained(arch)
    x, y = batch(model, 3, 40)
    y[0, 5:], y[1, 0], y[2, ::2] = -1, -1, -1
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(model, x, y)
    assert found_loss == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert max(differences(found, expected)) < 1e-5
    assert by_c(model, x, torch.full_like(y, -1))[0] != found_loss  # no number: there is nothing to learn


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_further_tokens_count_by_their_share(trained, share):
    model = trained("modern", ahead=4)
    model.ahead_share.fill_(share)
    x, y = batch(model, 3, 40)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(model, x, y)
    assert found_loss == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert max(differences(found, expected)) < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_and_its_gradients_count_by_their_share(trained, arch):
    model = trained(arch)
    x, y = batch(model, 2, 20)
    sums = Learned(model, torch.float32).sums()
    loss = sums.learn(x, y, 0.25, 0)
    whole, gradients = by_pytorch(model, x, y)
    assert loss == pytest.approx(0.25 * whole.item(), rel=1e-5)
    found = [sums.gradients[p] for p in model.parameters()]
    assert max(differences(found, [0.25 * g for g in gradients])) < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_of_vector_computes_the_same(any_vectors, trained, arch):
    model = trained(arch, vocab_size=17, **(dict(ahead=3) if arch == "modern" else {}))
    x, y = batch(model, 3, 45)
    assert max(differences(by_c(model, x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


def test_a_model_without_biases_has_none(trained):
    model = trained("gpt", bias=False)
    x, y = batch(model, 3, 45)
    assert max(differences(by_c(model, x, y)[1], by_pytorch(model, x, y)[1])) < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("B, T", [(3, 64), (2, 33), (1, 1)])
@pytest.mark.parametrize("arch", ARCHS)
def test_in_bfloat16_gradients_are_as_near_to_those_of_float32_as_pytorchs(trained, arch, B, T):
    model = trained(arch)
    x, y = batch(model, B, T)
    loss, expected = by_pytorch(model, x, y)
    found_loss, found = by_c(model, x, y, torch.bfloat16)
    ours = differences(found, expected)
    assert sum(ours) < 1.1 * sum(differences(by_pytorch(copy.deepcopy(model).bfloat16(), x, y)[1], expected))
    assert max(ours) < 0.05
    assert found_loss == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_several_batches_are_added_up_until_a_new_beginning(trained, arch):
    model = trained(arch)
    sums = Learned(model, torch.float32).sums()
    by_c(model, *batch(model, 2, 30, 9), sums=sums)
    sums.begin()
    for seed, (B, T) in enumerate([(3, 45), (1, 100), (7, 8)]):  # the memory that is at hand need not fit
        by_c(model, *batch(model, B, T, seed), sums=sums)
    once = [by_pytorch(model, *batch(model, B, T, seed))[1] for seed, (B, T) in enumerate([(3, 45), (1, 100), (7, 8)])]
    found = [sums.gradients[p] for p in model.parameters()]
    assert max(differences(found, map(sum, zip(*once)))) < 1e-5
    assert sums.flat.sum().item() == pytest.approx(sum(g.sum().item() for g in found), abs=1e-3)  # nothing else in it


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_that_changed_count_when_they_are_laid_out(trained, arch):
    model = trained(arch)
    learned = Learned(model, torch.float32)
    x, y = batch(model, 2, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    for first in range(3):
        learned.lay_out(first, 3)
    assert max(differences(by_c(model, x, y, sums=learned.sums())[1], by_pytorch(model, x, y)[1])) < 1e-5


def test_weights_that_moved_are_refused(trained):
    model = trained("gpt")
    learned = Learned(model, torch.float32)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with pytest.raises(RuntimeError, match="other memory"):
        learned.lay_out()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_model_stays_as_it_was(trained, arch):
    model = trained(arch)
    before = copy.deepcopy(model)
    by_c(model, *batch(model, 2, 20))
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_is_used_again(trained, arch):
    model = trained(arch)
    sums = Learned(model, torch.float32).sums()
    places = set()
    for seed, B in enumerate((3, 2, 3)):
        by_c(model, *batch(model, B, 20, seed), sums=sums)
        places.add((sums.kept.data_ptr(), sums.scratch.data_ptr()))
    assert len(places) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_no_number_stays_none(trained, arch):
    model = trained(arch)
    with torch.no_grad():
        (model.transformer.wte if arch == "gpt" else model.wte).weight[3] = float("nan")
    x = torch.full((2, 20), 4)
    x[1, 10] = 3
    loss, gradients = by_c(model, x, x)
    assert loss != loss and all(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("token", [31, -1, 2**40, -(2**40)])
def test_a_token_that_is_none_is_refused(trained, arch, token):
    model = trained(arch)
    for wrong in (0, 1):
        x, y = batch(model, 2, 20)
        (x, y)[wrong][1, 3] = token
        if (wrong, token) != (1, -1):
            with pytest.raises(IndexError, match="none of the vocabulary's 31"):
                by_c(model, x, y)


@pytest.mark.parametrize(
    "change", [lambda x: x.int(), lambda x: x[:, :5], lambda x: torch.cat([x] * 6, 1)], ids=["int32", "short", "long"]
)
def test_windows_that_it_would_read_wrongly_are_refused(trained, change):
    model = trained("gpt")
    x, y = batch(model, 2, 20)
    for windows_ in ((change(x), y), (x, change(y))):
        with pytest.raises(ValueError, match="in place of"):
            by_c(model, *windows_)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_same_in_both_directions_and_where_the_model_does(trained, arch, dtype, p):
    model = trained(arch, dropout=p)
    x, y = batch(model, 3, 45)

    def with_the_same_dropped(model):
        with replaced(model_module, dropout=known_dropout(learn_cpu.functions_for(dtype), p, 7)):
            return by_pytorch(model, x, y)[1]

    expected = with_the_same_dropped(model)
    ours = differences(by_c(model, x, y, dtype, seed=7)[1], expected)
    if dtype == torch.float32:
        assert max(ours) < 1e-5
    else:  # as near to float32 as PyTorch
        plain = differences(with_the_same_dropped(copy.deepcopy(model).to(dtype)), expected)
        assert sum(ours) < 1.1 * sum(plain) and max(ours) < 1.5 * max(plain)


@pytest.mark.parametrize("arch", ARCHS)
def test_in_eval_nothing_is_dropped_nor_foretold(trained, arch):
    model = trained(arch, dropout=0.5).eval()
    x, y = batch(model, 2, 20)
    loss = model(x, y)[1]
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), expected)]
    assert max(differences(by_c(model, x, y)[1], expected)) < 1e-5


def masks_of(seed, place, threshold, n=1 << 16):
    found = torch.empty(n)
    now = learn_cpu.Pass(threshold=threshold, seed=seed)
    learn_cpu.functions_for(torch.float32).masks(learn_cpu.ctypes.byref(now), place, n, found.data_ptr())
    return found


@pytest.mark.parametrize("threshold", [1, 51, 128, 255])
def test_dropout_has_its_rate_and_keeps_the_mean(any_vectors, threshold):
    for seed in (0, 1, 2**40 + 7, 2**62 - 1):
        mask = masks_of(seed, 1, threshold)
        rate, spread = threshold / 256, 5 * (threshold / 256 * (1 - threshold / 256) / len(mask)) ** 0.5
        assert (mask == 0).float().mean() == pytest.approx(rate, abs=spread)
        assert mask.unique().tolist() == [0.0, pytest.approx(256 / (256 - threshold))]


def test_what_is_dropped_differs_from_seed_to_seed_and_place_to_place_and_does_not_repeat():
    seeds = (*range(8), *(s << 32 for s in range(1, 8)), 12345)
    masks = torch.stack([masks_of(seed, place, 128) > 0 for seed in seeds for place in (0, 1, 6)])
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
        for cache in (native.library, learn_cpu.functions_for):
            cache.cache_clear()
        found.append(masks_of(99, 2, 51))
    for cache in (native.library, learn_cpu.functions_for):
        cache.cache_clear()
    assert all(torch.equal(found[0], other) for other in found)


# ---------------------------------------------------------------------------------------------------------------------
# The trial


@pytest.mark.parametrize("cls, bias", [(GPT, True), (GPT, False), (Modern, False)])
def test_the_models_of_this_repository_are_known(cls, bias):
    assert knows(cls, bias, learn_cpu.unsuited(torch.bfloat16) is None)


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


def untied_scale(self, idx, targets=None, cache=None, last=1):
    x = self.transformer.drop(2 * self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1))))
    for block in self.transformer.h:
        x = block(x)
    logits = self.lm_head(self.transformer.ln_f(x))
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def smoothed(logits, targets, ignore_index=-100):
    return torch.nn.functional.nll_loss(0.9 * logits.log_softmax(-1), targets, ignore_index=ignore_index)


def gaussian(x, p):
    return x * (1 + torch.randn_like(x) * (p / (1 - p)) ** 0.5)


@pytest.mark.parametrize(
    "of, name, changed",
    [
        (GPT, "forward", untied_scale),
        (F, "cross_entropy", smoothed),
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
    assert in_c(model, torch.float32) is None
    assert capsys.readouterr().err.startswith("learn_cpu.c is not used, and training is slower: it does not know")


further_loss, modern_forward = Modern.further_loss, Modern.forward


def with_squared_share(self, idx, targets=None, cache=None, last=1):
    self.ahead_share.square_()
    found = modern_forward(self, idx, targets, cache, last)
    self.ahead_share.sqrt_()
    return found


@pytest.mark.parametrize(
    "of, name, changed",
    [
        (modern, "norm", lambda x: F.rms_norm(x, x.shape[-1:])),
        (modern, "rotate", lambda x, cos, sin: x),
        (modern, "relu_squared", F.relu),
        (torch, "tanh", torch.atan),
        (modern.NGrams, "rows", lambda self, tokens: tokens[:, self.n - 1 :, None].expand(-1, -1, self.n - 1)),
        (Modern, "forward", with_squared_share),
        (Modern, "further_loss", lambda self, x, targets: 0.5 * further_loss(self, x, targets)),
        (
            modern.Block,
            "forward",
            lambda self, x, cos, sin, cache=None: x + self.mlp(self.attn(x, cos, sin) + self.shift),
        ),
    ],
    ids=["rms norm", "no rotary positions", "relu", "other cap", "other runs", "squared", "half", "block"],
)
def test_so_is_a_modern_model(trained, monkeypatch, capsys, of, name, changed):
    monkeypatch.setattr(of, name, changed)
    utils.say_once.cache_clear()
    model = trained("modern")
    assert in_c(model, torch.float32) is None
    assert "is not used, and training is slower" in capsys.readouterr().err


def test_a_layer_with_another_weight_is_computed_by_pytorch(trained, monkeypatch):
    before = model_module.Block.__init__

    def with_gain(self, config):
        before(self, config)
        self.gain = torch.nn.Parameter(torch.ones(config.n_embd))

    monkeypatch.setattr(model_module.Block, "__init__", with_gain)
    model = trained("gpt")
    assert in_c(model, torch.float32) is None


def test_a_model_with_another_part_is_computed_by_pytorch(trained):
    class Other(model_module.MLP):
        def forward(self, x):
            return self.dropout(self.c_proj(F.relu(self.c_fc(x))))

    for name, other in (("mlp", Other), ("mlp", type("Adapted", (model_module.MLP,), {}))):
        model = trained("gpt")
        setattr(model.transformer.h[1], name, other(model.config))
        assert in_c(model, torch.float32) is None


def test_weights_in_another_order_are_read_by_pytorch(trained):
    model = trained("gpt")
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = weight.data.t().contiguous().t()
    assert in_c(model, torch.float32) is None


def test_models_that_it_is_not_made_for_are_computed_by_pytorch_without_a_word(trained, monkeypatch, capsys):
    class Other(GPT):
        pass

    other = Other(GPTConfig(**SIZES))
    assert in_c(other, torch.float32) is None
    narrow = trained("gpt", n_head=8)  # heads of 8 channels
    assert in_c(narrow, torch.float32) is None
    model = trained("gpt")
    assert in_c(model, torch.float32) is not None
    monkeypatch.setattr(learn_cpu, "MOST_SUMS", 1000)
    assert in_c(model, torch.float32) is None
    assert capsys.readouterr().err == ""


def test_without_a_compiler_pytorch_computes(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "KEPT", str(tmp_path))
    monkeypatch.setattr(native, "compiler", lambda: [])
    for cache in (native.library, learn_cpu.functions_for):
        cache.cache_clear()
    model = trained("gpt")
    utils.say_once.cache_clear()
    assert in_c(model, torch.float32) is None
    why = "learn_cpu.c is not used, and training is slower: there is no C compiler\n"
    assert capsys.readouterr().err == why
    assert not learn_cpu.fits(model.config, torch.float32)
    for cache in (native.library, learn_cpu.functions_for):
        cache.cache_clear()


@pytest.mark.parametrize(
    "flags, dtype, why",
    [
        ("fma avx2 f16c", torch.float32, "AVX-512"),
        ("avx512f", torch.float32, None),
        ("avx512f avx512_bf16", torch.float16, "float16"),
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
    monkeypatch.setattr(learn_cpu, "open", lambda path: open(info), raising=False)  # noqa: SIM115
    found = learn_cpu.unsuited(dtype)
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
    with replaced(optim, **({} if in_c else dict(in_c=lambda model, dtype: None))):
        learner = Learner(model.train(), options, CPU, dtype)
    assert (learner.learned is not None) == in_c
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
    learner.weights[0].data[x[0, 0]] = float("nan")
    loss, _ = learner.step(x, y, 1.0)
    assert loss.isnan() and learner.skipped[0] == 1
    learner.weights[0].data[x[0, 0]] = before[0][x[0, 0]]
    assert all(map(torch.equal, learner.weights, before))
    assert learner.step(x, y, 1.0)[0].isfinite()


def test_gradients_added_up_before_an_error_are_kept(threads):
    learner = make_learner("gpt")
    x, y = windows(learner)
    learner.add_gradients(x, y)
    before = [p.grad.clone() for p in learner.weights]
    with pytest.raises(IndexError):
        learner.add_gradients(x, torch.full_like(y, 99))
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.weights, before))


def test_gradients_added_up_before_are_kept(threads):
    found, expected = (make_learner("gpt", in_c=c) for c in (True, False))
    for learner in (found, expected):
        for n in range(3):
            learner.add_gradients(*windows(learner, n))
    assert max(differences([p.grad for p in found.weights], [p.grad for p in expected.weights])) < 1e-5


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
@pytest.mark.parametrize("arch", LEARNERS)
def test_gradients_are_clipped_as_by_pytorch(threads, arch, clip):
    found, expected = (make_learner(arch, in_c=c, grad_clip=clip) for c in (True, False))
    norms = [learner.step(*windows(learner), 1.0)[1] for learner in (found, expected)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    for learner in (found, expected):
        learner.add_gradients(*windows(learner, 1))
        learner.clip()
    assert max(differences([p.grad for p in found.weights], [p.grad for p in expected.weights])) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", LEARNERS)
def test_where_pytorch_computes_after_all_it_computes_with_the_weights_as_they_are(monkeypatch, arch, dtype):
    found, expected = (make_learner(arch, dtype, in_c=c) for c in (True, False))
    found.step(*windows(found), 1.0)
    expected.load_state_dict(copy.deepcopy(found.state_dict()))
    monkeypatch.setattr(found, "computes_in_c", lambda parts: False)
    losses = [learner.step(*windows(learner, 1), 1.0)[0] for learner in (found, expected)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, found.weights, expected.weights))


def test_which_steps_are_computed_in_c(monkeypatch):
    learner = make_learner("gpt")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [learner.computes_in_c(parts) for parts in (1, 2, 4, 100)] == [False, True, True, True]
    learner.worker.gradient_checkpointing = True
    assert not learner.computes_in_c(4)
    learner.worker.gradient_checkpointing, learner.compute = False, lambda x, y: None  # compiled
    assert not learner.computes_in_c(4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_weight_that_is_frozen_pytorch_computes(dtype):
    learner = make_learner("gpt", dtype)
    for p in (*learner.model.transformer.h[0].parameters(), *learner.worker.transformer.h[0].parameters()):
        p.requires_grad_(False)
    x, y = windows(learner)
    with pytest.raises(RuntimeError):  # as without learn_cpu.c: a Learner learns all weights
        learner.step(x, y, 1.0)


@pytest.mark.parametrize("arch", LEARNERS)
def test_in_bfloat16_it_ends_within_0_01_of_the_loss_of_float32_by_pytorch(arch):
    if learn_cpu.unsuited(torch.bfloat16) is not None or not has_bfloat16(CPU):
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
