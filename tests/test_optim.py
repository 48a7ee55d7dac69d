"""optim.py, and the fast paths of model.py that training takes: a step is what plain PyTorch does, in every format."""

import contextlib
import copy
import io
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import OnMeta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import graphs
import model as model_file
import optim
import plan
import train
import utils
from data import load_data, validation_loss
from generate import Reader
from graphs import GraphReader, RecordedStep
from model import Dropout, attention, attention_written_out, dropout
from optim import Learner, build_optimizers, lr_share
from utils import UserError, autocast, has_bfloat16, random_states, restore_random_states

CPU = torch.device("cpu")
VOCAB = 11
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=20, dropout=0.0, learning_rate=1e-2)
TINY.update(warmup_iters=0, ngram=3, ahead=3)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a modern model needs PyTorch 2.9's Muon")
ARCHS = ["gpt", pytest.param("modern", marks=needs_muon)]
DTYPES = [torch.float32, torch.bfloat16]


def make_options(**changes):
    return train.TrainOptions(**{**TINY, **changes})


def make_learner(arch="gpt", dtype=torch.float32, seed=0, **changes):
    """A learner with a model in training mode whose every weight is random: fresh weights, many of them 0 or 1, hide
    mistakes."""
    options = make_options(arch=arch, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = plan.build_model(options, VOCAB)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return Learner(model.train(), options, CPU, dtype)


def make_batch(options, steps=1, seed=0):
    rows = options.batch_size * options.gradient_accumulation_steps
    tokens = torch.randint(VOCAB, (steps, rows, options.block_size + 1), generator=torch.Generator().manual_seed(seed))
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def take_steps(learner, batches):
    """The losses of the learner's steps over the batches."""
    return [learner.step(x, y, 1.0)[0].item() for x, y in batches]


def gradients(learner, x, y):
    """What a step would hand to the optimizers, by name. Spends the learner."""
    learner.optimizers, learner.highest = [], []
    learner.step(x, y, 1.0)
    return {name: p.grad for name, p in learner.model.named_parameters()}


def assert_same_weights(model, other, atol):
    """All weights but the biases of the keys: the loss does not depend on these (softmax ignores what all scores have
    in common), so that their gradient is rounding error alone, which Adam scales up to a full step."""
    C = model.config.n_embd
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if name.endswith("c_attn.bias"):
            p, q = (torch.cat([b[:C], b[2 * C :]]) for b in (p, q))
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


def relative_error(found, expected):
    """The length of the difference as a share of the length of what was expected."""
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------
# The optimizers


def test_every_weight_is_trained_once_and_only_the_matrices_decay(make_model):
    model = make_model()
    (optimizer,) = build_optimizers(model, make_options(weight_decay=0.3, beta1=0.8, beta2=0.95), CPU)
    groups = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert sorted(id(p) for ps in groups.values() for p in ps) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for p in groups[0.3]) and all(p.dim() == 1 for p in groups[0.0])
    assert all(g["betas"] == (0.8, 0.95) for g in optimizer.param_groups)


@needs_muon
def test_of_a_modern_model_muon_gets_the_matrices_of_the_layers_and_adamw_the_rest_each_once():
    settings = dict(weight_decay=0.3, beta1=0.8, beta2=0.95, matrix_lr=0.05, ngram_decay=0.7)
    learner = make_learner("modern", **settings)
    names = {id(p): name for name, p in learner.model.named_parameters()}
    muon, adamw = learner.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    by_muon, by_adamw = ([names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw))
    in_a_layer = ("c_q.weight", "c_k.weight", "c_v.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    assert len(by_muon) == 2 * len(in_a_layer) and all(n.startswith("layers.") for n in by_muon)
    assert all(n.endswith(in_a_layer) for n in by_muon)
    rest = ["wte.weight", "lm_head.weight", "ahead.weight", "layers.0.shift", "layers.1.shift"]
    assert sorted(by_adamw[:-1]) == sorted(rest) and by_adamw[-1] == "ngrams.table.weight"
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert [(g["weight_decay"], g["lr"], g["momentum"]) for g in muon.param_groups] == [(0.3, 0.05, 0.9)]
    others = [(g["weight_decay"], g["lr"], g["betas"]) for g in adamw.param_groups]
    assert others == [(0.0, 1e-2, (0.8, 0.95)), (0.7, 1e-2, (0.8, 0.95))]


def test_a_pytorch_without_muon_trains_a_gpt_and_refuses_a_modern_model_in_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    learner = make_learner("gpt")
    batches = make_batch(learner.options) * 5
    losses = take_steps(learner, batches)
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match=r"--arch modern: needs PyTorch 2\.9 or newer for its Muon") as error:
        make_learner("modern")
    assert "\n" not in str(error.value) and torch.__version__ in str(error.value)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_group_gets_the_given_share_of_its_own_highest_learning_rate(arch):
    learner = make_learner(arch, learning_rate=1e-2, matrix_lr=0.05)
    ((x, y),) = make_batch(learner.options)
    highest = [0.05, 1e-2, 1e-2] if arch == "modern" else [1e-2, 1e-2]
    for share in (0.5, 0.1, 1.0):  # of the highest, not of the one before
        learner.step(x, y, share)
        rates = [group["lr"] for o in learner.optimizers for group in o.param_groups]
        assert rates == pytest.approx([share * lr for lr in highest])
    before = copy.deepcopy(learner.model.state_dict())
    learner.step(x, y, 0.0)
    assert all(torch.equal(before[name], p) for name, p in learner.model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


@needs_muon
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_further_tokens_count_as_much_as_the_learning_rate_does(dtype):
    learner = make_learner("modern", dtype)
    [(x, y)] = make_batch(learner.options)
    for share in (1.0, 0.25, 0.0):
        learner.step(x, y, share)
        assert learner.worker.ahead_share.item() == share


def shares(options):
    return [lr_share(step, step / options.max_iters, options) for step in range(options.max_iters + 1)]


def test_the_learning_rate_falls_along_half_a_cosine_to_min_lr():
    found = shares(make_options(learning_rate=1.0, min_lr=0.2, warmup_iters=0, max_iters=100))
    assert (found[0], found[50], found[100]) == pytest.approx((1.0, 0.6, 0.2))
    assert found[25] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in zip(found, found[1:]))


def test_the_learning_rate_climbs_in_equal_steps_at_the_start():
    options = make_options(warmup_iters=4, max_iters=100_000)
    assert [lr_share(step, 0.0, options) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_climbing_and_falling_are_multiplied():
    options = make_options(learning_rate=1.0, min_lr=0.2, warmup_iters=4)
    assert lr_share(1, 0.5, options) == pytest.approx(0.5 * 0.6) and lr_share(9, 0.5, options) == pytest.approx(0.6)


def test_with_minutes_the_learning_rate_falls_in_a_line():
    options = make_options(learning_rate=1.0, min_lr=0.0, warmup_iters=0, minutes=1.0)
    assert [lr_share(9, progress, options) for progress in (0, 0.25, 0.75, 1)] == [1, 0.75, 0.25, 0]


def test_the_learning_rate_ends_at_a_tenth_unless_told_otherwise():
    for settings, end in ((dict(), 0.1), (dict(min_lr=0.0), 0.0), (dict(min_lr=0.5), 1.0)):
        assert lr_share(20, 1.0, make_options(learning_rate=0.5, **settings)) == pytest.approx(end)


@pytest.mark.parametrize("warmup, length", [(0, 1), (0, 20), (20, 20), (100, 20), (1, 1)])
def test_the_learning_rate_is_above_0_and_at_most_its_highest_in_every_step(warmup, length):
    assert all(0 < share <= 1 for share in shares(make_options(warmup_iters=warmup, max_iters=length)))


def test_a_learning_rate_of_0_is_no_division_by_0():
    assert lr_share(5, 0.5, make_options(learning_rate=0.0, min_lr=0.0)) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# One step


def test_a_step_is_what_plain_pytorch_does(make_model):
    options = make_options(learning_rate=1e-2, weight_decay=0.1, grad_clip=0.5)
    ours, plain = make_model().train(), make_model().train()
    batches = make_batch(options, steps=3)
    found = take_steps(Learner(ours, options, CPU, torch.float32), batches)

    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in plain.parameters() if p.dim() == 2], weight_decay=0.1),
            dict(params=[p for p in plain.parameters() if p.dim() == 1], weight_decay=0.0),
        ],
        lr=1e-2,
        betas=(options.beta1, options.beta2),
    )
    expected = []
    for x, y in batches:
        _, loss = plain(x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6)
    assert_same_weights(ours, plain, atol=1e-6)


@needs_muon
def test_a_step_of_a_modern_model_is_what_plain_pytorch_does(monkeypatch):
    monkeypatch.setattr(optim, "POLAR_EXPRESS", 5 * ((3.4445, -4.775, 2.0315),))  # torch.optim.Muon's polynomial
    monkeypatch.setattr(optim.Muon, "dtype", torch.bfloat16)  # and its number format
    learner = make_learner("modern", matrix_lr=0.02, weight_decay=0.1, grad_clip=0.5)
    batches, plain = make_batch(learner.options, steps=3), copy.deepcopy(learner.model)
    found = take_steps(learner, batches)

    matrices = [p for name, p in plain.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    ngrams = [plain.ngrams.table.weight]
    others = set(map(id, matrices + ngrams))
    groups = [
        dict(params=[p for p in plain.parameters() if id(p) not in others], weight_decay=0.0),
        dict(params=ngrams, weight_decay=1.0),
    ]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9)
    adamw = torch.optim.AdamW(
        groups, lr=1e-2, betas=(learner.options.beta1, learner.options.beta2), eps=1e-10, fused=True
    )
    expected = []
    for x, y in batches:
        plain.zero_grad()
        _, loss = plain(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        muon.step()
        adamw.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-4)  # an update of 0.02 in bfloat16 is rounded in its third digit
    for p, q in zip(learner.model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=5e-4, rtol=0)


@needs_muon
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32), (1, 8), (192, 768)])
def test_an_update_by_muon_has_singular_values_near_1_and_the_directions_of_the_gradient(shape, dtype):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonal(x, dtype)
    assert found.dtype == dtype and found.shape == x.shape
    found = found.float()
    for matrix, before in zip(found, x):
        u, s, vt = torch.linalg.svd(before, full_matrices=False)
        exact = u @ vt  # the nearest orthogonal matrix
        assert torch.linalg.svdvals(matrix)[s > 0.02 * s.norm()].sub(1).abs().max() < 0.65  # as torch.optim.Muon's
        assert F.cosine_similarity(matrix.flatten(), exact.flatten(), dim=0) > 0.9


@needs_muon
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")
@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_muon_computes_in_bfloat16_where_the_hardware_has_it_and_the_run_does_not_ask_for_float32(
    dtype, hardware, monkeypatch
):
    monkeypatch.setattr(optim, "has_bfloat16", lambda device: hardware)
    expected = torch.bfloat16 if hardware and dtype != torch.float32 else torch.float32
    assert make_learner("modern", dtype).optimizers[0].dtype == expected


@needs_muon
def test_muon_steps_each_shape_by_itself_and_leaves_weights_without_gradient_alone():
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 8), (8, 4), (4, 8), (4, 4))]
    before = [p.detach().clone() for p in weights]
    muon = optim.Muon(weights, lr=0.1, weight_decay=0.5)
    for p in weights[:3]:
        p.grad = torch.randn_like(p)
    muon.step()
    assert torch.equal(weights[3], before[3]) and weights[3] not in muon.state
    for p, old, gradient in zip(weights[:3], before, [p.grad for p in weights]):
        scale = 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5
        nesterov = gradient.lerp(torch.zeros_like(gradient).lerp(gradient, 0.05), 0.95)
        update = scale * optim.orthogonal(nesterov[None])[0].float()
        torch.testing.assert_close(p.detach(), old * 0.95 - update, atol=0.01 * scale, rtol=0)  # bfloat16's rounding


@pytest.mark.parametrize("batch_size, steps", [(16, 4), (1, 64), (32, 2)])
def test_accumulated_gradients_give_the_losses_and_weights_of_the_whole_batch_at_once(make_model, batch_size, steps):
    whole_options = make_options(batch_size=64)
    part_options = make_options(batch_size=batch_size, gradient_accumulation_steps=steps)
    batches = make_batch(whole_options, steps=4)
    whole, part = make_model().train(), make_model().train()
    expected = take_steps(Learner(whole, whole_options, CPU, torch.float32), batches)
    found = take_steps(Learner(part, part_options, CPU, torch.float32), batches)
    assert found == pytest.approx(expected, abs=2e-6)
    assert_same_weights(part, whole, atol=2e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_gradients_of_the_parts_add_up_to_that_of_the_whole_batch_though_the_last_part_is_smaller(arch, rows):
    learner = make_learner(arch, batch_size=8, grad_clip=0.0)
    ((x, y),) = make_batch(learner.options)
    learner.model(x, y)[1].backward()
    expected = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    learner.model.zero_grad()
    learner.rows_at_once = lambda T: rows
    for name, grad in gradients(learner, x, y).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    "windows, batch_size, T, cores, rows",
    [
        (12, 12, 64, 2, 6),  # 768 tokens would be one part
        (12, 12, 64, 1, 12),
        (12, 12, 64, 4, 12),  # 192 tokens are too few for a part
        (12, 12, 256, 2, 3),  # three parts of 4 would leave one core idle for a quarter of the time
        (10, 10, 256, 2, 4),  # four parts of 3 would be no better
        (3, 3, 256, 2, 3),  # two parts of 2 and 1
        (64, 64, 256, 2, 4),
        (64, 64, 256, 6, 4),
        (8, 1, 64, 2, 1),  # no more than the batch_size
        (1, 1, 2048, 4, 1),
    ],
)
def test_windows_are_shared_out_evenly_among_cores_where_that_leaves_parts_of_384_tokens(
    windows, batch_size, T, cores, rows
):
    assert optim.rows_on_cpu(windows, batch_size, T, cores) == rows


def test_on_a_cpu_some_1024_tokens_go_through_together_and_on_a_gpu_the_batch_size():
    learner = make_learner(batch_size=64)
    learner.side_by_side = lambda parts: 1
    assert [learner.rows_at_once(T) for T in (16, 32, 33, 256, 2048, 5000)] == [64, 32, 22, 4, 1, 1]
    learner.side_by_side = lambda parts: 2
    assert learner.rows_at_once(16) == 32
    learner.device = torch.device("cuda")
    assert [learner.rows_at_once(T) for T in (16, 256, 5000)] == [64, 64, 64]


def test_a_step_takes_its_windows_in_parts_of_that_many():
    learner, seen = make_learner(n_layer=1, block_size=512, batch_size=5, gradient_accumulation_steps=2), []
    ((x, y),) = make_batch(learner.options)
    learner.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    learner.step(x, y, 1.0)
    assert seen == [2, 2, 2, 2, 2]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def learner_in_parts(threads, arch="gpt", dtype=torch.float32, **sizes):
    """A learner of steps in 4 parts, of which so many are computed at the same time."""
    learner = make_learner(arch, dtype, batch_size=8, grad_clip=0.0, **sizes)
    learner.rows_at_once = lambda T: 2
    learner.side_by_side = lambda parts: threads
    return learner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_parts_side_by_side_give_the_gradients_of_one_after_the_other(three_threads, arch, dtype):
    ((x, y),) = make_batch(make_options(batch_size=8))
    expected = gradients(learner_in_parts(1, arch, dtype), x, y)
    for threads in (2, 3, 4):
        for name, grad in gradients(learner_in_parts(threads, arch, dtype), x, y).items():
            atol = 1e-6 if dtype == torch.float32 else 0.02 * float(expected[name].abs().max())
            torch.testing.assert_close(grad, expected[name], atol=atol, rtol=1e-5, msg=name)


def test_dropout_side_by_side_can_be_repeated_and_differs_from_part_to_part_and_step_to_step(three_threads):
    ((x, y),) = make_batch(make_options(batch_size=8))
    x, y = x[:2].repeat(4, 1), y[:2].repeat(4, 1)  # the same windows in each part
    learner = learner_in_parts(3, dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append([[loss.item() for loss, _ in learner.part_gradients(learner.parts(x, y))] for _ in range(2)])
    assert losses[0] == losses[1] != losses[2]
    assert len({loss for step in losses[0] + losses[2] for loss in step}) == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_steps_side_by_side_with_dropout_end_bit_for_bit_alike_under_one_seed(three_threads, arch, dtype):
    ends = []
    for _ in range(3):
        learner = learner_in_parts(3, arch, dtype, dropout=0.3)
        torch.manual_seed(5)
        take_steps(learner, make_batch(learner.options, steps=5))
        ends.append([p.detach().clone() for p in learner.model.parameters()])
    assert all(torch.equal(p, q) for other in ends[1:] for p, q in zip(ends[0], other))


def test_which_parts_are_computed_side_by_side(three_threads):
    learner = make_learner()
    assert [learner.side_by_side(parts) for parts in (1, 2, 3, 40)] == [1, 2, 3, 3]
    learner.worker.gradient_checkpointing = True
    assert learner.side_by_side(40) == 1
    learner.worker.gradient_checkpointing, learner.compute = False, lambda x, y: None  # compiled
    assert learner.side_by_side(40) == 1
    learner = make_learner()
    learner.device = torch.device("cuda")
    assert learner.side_by_side(40) == 1


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_gradient_checkpointing_with_dropout_computes_the_same_dropout_twice(three_threads, p):
    ((x, y),) = make_batch(make_options(batch_size=64))
    found = []
    for checkpointing in (False, True):
        learner = make_learner(batch_size=64, dropout=p, grad_clip=0.0)
        learner.rows_at_once, learner.worker.gradient_checkpointing = (lambda T: 32), checkpointing
        learner.side_by_side = (lambda parts: 1) if not checkpointing else learner.side_by_side
        torch.manual_seed(7)
        found.append(gradients(learner, x, y))
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_has_no_part_in_the_loss_stays_and_the_others_learn(dtype):
    """As in plain PyTorch: that of an expert who was not asked, or what an idea no longer uses."""
    options = make_options()
    plain = make_learner(dtype=dtype)
    model = copy.deepcopy(plain.model)
    model.spare = torch.nn.LayerNorm(3)
    learner = Learner(model, options, CPU, dtype)
    batches = make_batch(options, steps=3)
    assert take_steps(learner, batches) == take_steps(plain, batches)
    assert torch.equal(model.spare.weight, torch.ones(3))
    assert_same_weights(plain.model, model, atol=0)


@pytest.mark.parametrize("change", ["another layer", "a tensor more to learn"])
def test_a_state_of_other_code_is_refused_in_one_line(change):
    learner = make_learner()
    state = learner.state_dict()
    other = copy.deepcopy(learner.model)
    if change == "another layer":
        other.extra = torch.nn.Linear(2, 2, bias=False)
    else:  # untied
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    with pytest.raises(
        UserError, match=r"--resume: the model is not the one that this run began with \(.+\); put back"
    ):
        Learner(other, make_options(), CPU, torch.float32).load_state_dict(state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_of_a_step_is_the_mean_over_all_its_windows(dtype):
    learner = make_learner(dtype=dtype, batch_size=3, gradient_accumulation_steps=2)
    ((x, y),) = make_batch(learner.options)
    expected = learner.model(x, y)[1].item()
    assert take_steps(learner, [(x, y)]) == pytest.approx([expected], abs=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3])
def test_the_norm_is_that_before_clipping_and_0_switches_clipping_off(grad_clip):
    learner = make_learner(grad_clip=grad_clip)
    model = learner.model
    ((x, y),) = make_batch(learner.options)
    model(x, y)[1].backward()
    true_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    model.zero_grad()
    learner.optimizers, learner.highest = [torch.optim.SGD(model.parameters(), lr=1.0)], [[1.0]]
    before = [p.detach().clone() for p in model.parameters()]
    _, norm = learner.step(x, y, 1.0)
    used = torch.stack([(p.detach() - q).norm() for p, q in zip(model.parameters(), before)]).norm().item()
    assert norm.item() == pytest.approx(true_norm, rel=1e-4)
    assert used == pytest.approx(grad_clip or true_norm, rel=1e-2)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_is_left_over_for_the_next_step(arch, dtype):
    learner = make_learner(arch, dtype)
    take_steps(learner, make_batch(learner.options))
    assert all(p.grad is None for p in [*learner.model.parameters(), *learner.worker.parameters()])


@pytest.mark.parametrize(
    "device, version, fused",
    [("cuda", "2.0.0+cu118", None), ("cuda", "2.1.0", True), ("cpu", "2.3.1", None), ("cpu", "2.10.0+cpu", True)],
)
def test_adamw_is_fused_where_its_kernel_skips_bad_steps(monkeypatch, device, version, fused):
    monkeypatch.setattr(torch, "__version__", version)
    options = make_options()
    (adamw,) = build_optimizers(plan.build_model(options, VOCAB), options, torch.device(device))
    assert [group["fused"] for group in adamw.param_groups] == [fused, fused]


# ---------------------------------------------------------------------------------------------------------------------
# The gradient scaler of float16


def with_scaler(learner, **settings):
    """As float16 has it on a GPU; on a CPU the scaler has to be told so."""
    learner.scaler = torch.amp.GradScaler("cpu", **settings)
    return learner


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gradient_scaler_of_float16_changes_no_step_and_skips_one_that_overflows(arch):
    plain, scaled = make_learner(arch), with_scaler(make_learner(arch))
    batches = make_batch(plain.options, steps=3)
    assert take_steps(scaled, batches) == pytest.approx(take_steps(plain, batches), abs=1e-6)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)

    before = copy.deepcopy(scaled.model.state_dict())
    take_steps(with_scaler(scaled, init_scale=float("inf")), batches[:1])
    assert all(torch.equal(before[name], p) for name, p in scaled.model.state_dict().items())


@needs_muon
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["wte.weight", "layers.0.attn.c_q.weight"])
def test_where_the_gradients_of_one_optimizer_overflow_none_of_them_steps_and_the_scale_falls(wrong, where):
    learner = with_scaler(make_learner("modern"))
    batches = make_batch(learner.options, steps=2)
    dict(learner.model.named_parameters())[where].register_hook(lambda grad: grad * wrong)
    before, scale = copy.deepcopy(learner.model.state_dict()), learner.scaler.get_scale()
    take_steps(learner, batches)
    assert all(torch.equal(before[name], p) for name, p in learner.model.state_dict().items())
    assert learner.scaler.get_scale() == scale / 4, "halved at each of the two steps"


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "one gradient"])
def test_a_step_of_bad_numbers_changes_nothing_but_the_count_of_them(monkeypatch, arch, dtype, wrong, where):
    learner, spared = make_learner(arch, dtype, weight_decay=0.1), make_learner(arch, dtype, weight_decay=0.1)
    first, bad, last = make_batch(learner.options, steps=3)
    for each in (learner, spared):
        take_steps(each, [first])
    compute = Learner.gradients

    def gradients(self, *args):
        loss, found = compute(self, *args)
        if where == "loss":
            return loss * wrong, found
        return loss, (found[0] * wrong, *found[1:])

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "gradients", gradients)
        take_steps(learner, [bad, bad])
    assert learner.skipped.tolist() == [2, 2]
    assert take_steps(learner, [last]) == take_steps(spared, [last])
    assert learner.skipped.tolist() == [2, 0]
    assert all(map(torch.equal, learner.model.parameters(), spared.model.parameters()))
    assert all(map(torch.equal, learner.copies, spared.copies))
    for ours, theirs in zip(learner.optimizers, spared.optimizers):
        for p, q in zip(ours.state.values(), theirs.state.values()):
            assert all(torch.equal(p[name], q[name]) for name in p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_no_step_waits_for_the_numbers_that_decide_whether_it_counts(arch, dtype):
    options, device = make_options(arch=arch), torch.device("cuda")
    learner = Learner(plan.build_model(options, VOCAB).to(device).train(), options, device, dtype)
    learner.recorded = None
    batches = [(x.to(device), y.to(device)) for x, y in make_batch(options, steps=3)]
    learner.step(*batches[0], 1.0)  # the first one sets up the optimizers' memory
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[1:]:
            learner.step(x, y, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    weights = [p.detach().clone() for p in learner.weights]
    learner.update(torch.tensor(False, device=device))
    assert all(map(torch.equal, weights, learner.weights))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_that_a_step_makes_lies_on_the_device_of_the_model(arch, checkpointing, monkeypatch):
    monkeypatch.setattr(optim.AdamW, "_step_supports_amp_scaling", True, raising=False)
    monkeypatch.setattr(optim.AdamW, "step", lambda self: None)
    if checkpointing and torch.cuda.is_available():
        pytest.skip("gradient checkpointing looks up where the random numbers of a GPU stand, on the CPU")
    options = make_options(arch=arch, dropout=0.1, gradient_accumulation_steps=2)
    model = plan.build_model(options, VOCAB).to("meta").train()
    model.gradient_checkpointing = checkpointing
    learner = Learner(model, options, torch.device("meta"), torch.float32)
    for x, y in make_batch(options, steps=2):
        x, y = x.to("meta"), y.to("meta")
        with OnMeta():
            learner.step(x, y, 1.0)


READS = [getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")]


class NeverRead(TorchDispatchMode):
    """No operation may need a tensor's value on the CPU: on a GPU the CPU would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READS, function
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < "2.4", reason="a CPU's AdamW, not fused before, reads the numbers")
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_reads_no_number_that_decides_whether_it_counts(arch, monkeypatch):
    """What the test above shows on a GPU, by the same code on a CPU."""
    monkeypatch.setattr(Learner, "side_by_side", lambda self, parts: 1)  # in this thread, where the mode is at work
    options = make_options(arch=arch)
    learner, batches = make_learner(arch), make_batch(options, steps=2)
    learner.step(*batches[0], 1.0)  # the first one sets up the optimizers' memory
    with NeverRead():
        learner.step(*batches[1], 1.0)
    with pytest.raises(AssertionError), NeverRead():
        bool(torch.ones(()).isfinite())


def replayed(step, device):
    """graphs.record without a GPU: nothing is done while it is recorded, and each replay does all of it."""
    results = (torch.zeros(()), torch.zeros(()))
    return lambda: [place.copy_(result) for place, result in zip(results, step())], results


def record_steps(learner):
    """Let the learner take its steps as on a GPU."""
    learner.recorded = RecordedStep(learner.take_step, learner.device)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recorded_steps_change_the_weights_as_others_do(arch, dtype, monkeypatch):
    monkeypatch.setattr(graphs, "record", replayed)
    plain, recorded = make_learner(arch, dtype), make_learner(arch, dtype)
    record_steps(recorded)
    results = []
    for learner in (plain, recorded):
        batches, shares = make_batch(learner.options, steps=8), (1.0, 0.5, 1.0, 0.2, 1.0, 0.0, 0.7, 0.1)
        batches[5] = tuple(t[:2] for t in batches[5])  # of another shape
        results.append([learner.step(x, y, share) for (x, y), share in zip(batches, shares)])
    assert recorded.recorded.replay is not None and recorded.recorded.calls == 8
    for ours, theirs in zip(*results):  # each step's own, though all replays write to the same place
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    rough = arch == "modern" and has_bfloat16(torch.device("cpu"))  # Muon then rounds to bfloat16
    assert_same_weights(plain.model, recorded.model, atol=3e-4 if rough else 1e-5)
    assert torch.equal(plain.skipped, recorded.skipped)


def test_after_going_back_to_a_state_steps_are_recorded_anew(monkeypatch):
    """What was recorded before works on the memory that the optimizers had then."""
    monkeypatch.setattr(graphs, "record", replayed)
    learner = make_learner()
    record_steps(learner)
    skipped = learner.skipped
    take_steps(learner, make_batch(learner.options, steps=5))
    before = learner.recorded
    assert before.replay is not None
    learner.load_state_dict({**learner.state_dict(), "skipped": torch.tensor([3.0, 1.0])})
    assert learner.recorded is not before and learner.recorded.replay is None
    assert learner.skipped is skipped and skipped.tolist() == [3, 1]


@pytest.mark.parametrize(
    "device, version, hip, recorded",
    [
        ("cuda", "2.4.0+cu121", None, True),
        ("cuda", "2.10.0", None, True),
        ("cuda", "2.3.1", None, False),
        ("cuda", "2.0.0", None, False),
        ("cuda", "2.10.0+rocm7.0", "7.0", False),
        ("cpu", "2.10.0", None, False),
        ("mps", "2.10.0", None, False),
    ],
)
def test_steps_are_recorded_on_nvidia_gpus_alone_and_from_pytorch_2_4_on(
    monkeypatch, make_model, device, version, hip, recorded
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    device, options = torch.device(device), make_options()
    assert graphs.can_be_recorded(device) == recorded
    assert type(graphs.reader_on(device, make_model())) is (GraphReader if recorded else Reader)
    (adamw,) = build_optimizers(plan.build_model(options, VOCAB), options, device)
    assert all(group["capturable"] == recorded for group in adamw.param_groups)


def test_a_step_that_cannot_be_recorded_names_the_flag_in_one_line_and_full_memory_stays_that(monkeypatch):
    for name in ("device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)

    def fail(words):
        raise RuntimeError(words)

    with pytest.raises(UserError, match=r"\(not permitted .* capturing\).*\.item\(\).*add --no-record to") as error:
        graphs.record(lambda: fail("not permitted when stream is capturing\nand more"), torch.device("cuda"))
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.record(lambda: fail("CUDA out of memory. Tried to"), torch.device("cuda"))


def test_steps_are_recorded_unless_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(optim, "can_be_recorded", lambda device: True)
    monkeypatch.setattr(optim, "build_optimizers", lambda *_: [])
    assert make_learner().records and not make_learner(record=False).records


def test_a_step_with_gradient_checkpointing_is_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "record", None)
    learner = make_learner()
    learner.worker.gradient_checkpointing = True
    record_steps(learner)
    take_steps(learner, make_batch(learner.options, steps=6))
    assert learner.recorded.calls == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_recorded_steps_change_the_weights_as_others_do(arch, dtype):
    options, device, ends = make_options(arch=arch, gradient_accumulation_steps=2), torch.device("cuda"), []
    for recorded in (True, False):
        torch.manual_seed(0)
        learner = Learner(plan.build_model(options, VOCAB).to(device).train(), options, device, dtype)
        learner.recorded = learner.recorded if recorded else None
        batches = [(x.to(device), y.to(device)) for x, y in make_batch(options, steps=12)]
        ends.append((learner, [[t.item() for t in learner.step(x, y, 1 - i / 12)] for i, (x, y) in enumerate(batches)]))
    (learner, found), (plain, expected) = ends
    assert learner.recorded.replay is not None
    atol = 1e-3 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=atol, rtol=0.02)
    assert_same_weights(learner.model, plain.model, atol=2 * atol)
    assert torch.equal(learner.skipped, plain.skipped)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("arch", ARCHS)
def test_on_a_gpu_recorded_steps_draw_new_dropout_which_a_resumed_run_draws_too(arch):
    options, device = make_options(arch=arch, dropout=0.5, learning_rate=0.0, matrix_lr=0.0), torch.device("cuda")
    learner = Learner(plan.build_model(options, VOCAB).to(device).train(), options, device, torch.bfloat16)
    with torch.no_grad():
        for p in learner.weights:
            p.add_(0.1 * torch.randn_like(p))
    learner.refresh()
    ((x, y),) = [(x.to(device), y.to(device)) for x, y in make_batch(options)]
    losses = []
    for step in range(12):
        if step == 8:
            before = random_states(device)
        losses.append(learner.step(x, y, 1.0)[0].item())
    assert len(set(losses)) == 12
    restore_random_states(before, device)
    learner.recorded = RecordedStep(learner.take_step, device)  # as in a new process: these are not recorded yet
    again = [learner.step(x, y, 1.0)[0].item() for _ in range(4)]
    assert again == pytest.approx(losses[8:], abs=2e-3)


def test_a_step_does_not_load_the_compiler_of_pytorch():
    """Which takes a second or two at the start of every run."""
    code = (
        "import sys, torch, plan, train; from optim import Learner\n"
        "o = train.TrainOptions(n_layer=1, n_head=1, n_embd=8, block_size=8, arch=sys.argv[1])\n"
        "learner = Learner(plan.build_model(o, 5), o, torch.device('cpu'), torch.float32)\n"
        "learner.step(*torch.zeros(2, 2, 8, dtype=torch.int64), 1.0)\n"
        "learner.load_state_dict(learner.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    for arch in ("gpt", *(["modern"] if hasattr(torch.optim, "Muon") else [])):
        subprocess.run([sys.executable, "-c", code, arch], cwd=utils.HERE, check=True)


def test_only_float16_has_a_scaler_at_work():
    assert not make_learner().scaler.is_enabled()
    assert not make_learner(dtype=torch.bfloat16).scaler.is_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16 on a CPU: a copy computes, the float32 weights learn


def assert_copy_is_the_weights(learner):
    pairs = list(zip(learner.model.parameters(), learner.worker.parameters()))
    assert len(pairs) == len(list(learner.worker.parameters()))
    assert all(p.dtype == torch.float32 and low.dtype == torch.bfloat16 for p, low in pairs)
    assert all(torch.equal(p.bfloat16(), low) for p, low in pairs)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_copy_is_the_weights_rounded_after_every_step_and_after_loading(arch):
    learner, other = make_learner(arch, torch.bfloat16), make_learner(arch, torch.bfloat16, seed=1)
    assert learner.worker is not learner.model
    assert_copy_is_the_weights(learner)
    for batch in make_batch(learner.options, steps=3):
        before = copy.deepcopy(learner.worker.state_dict())
        take_steps(learner, [batch])
        assert_copy_is_the_weights(learner)
        assert not all(torch.equal(before[name], p) for name, p in learner.worker.state_dict().items())
    learner.load_state_dict(other.state_dict())
    assert_copy_is_the_weights(learner)
    assert all(map(torch.equal, learner.worker.parameters(), other.worker.parameters()))


def test_tied_weights_stay_tied_in_the_copy():
    learner = make_learner("gpt", torch.bfloat16)
    take_steps(learner, make_batch(learner.options, steps=2))
    for model in (learner.model, learner.worker):
        assert model.lm_head.weight is model.transformer.wte.weight
    assert learner.worker.lm_head.weight is not learner.model.lm_head.weight


def test_in_float32_there_is_no_copy():
    learner = make_learner()
    assert learner.worker is learner.model and not learner.copied


def test_the_copy_has_dropout_while_training():
    learner = make_learner(dtype=torch.bfloat16, dropout=0.5)
    ((x, y),) = make_batch(learner.options)
    assert learner.loss(x, y).item() != learner.loss(x, y).item()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 16])
def test_gradients_in_bfloat16_are_those_of_float32_to_3_percent_and_of_each_weight_to_10(arch, rows):
    """Measured: 1 % over all, at most 4 % for one weight. The biases of the keys have no gradient but rounding."""
    sizes = dict(n_embd=32, block_size=16, batch_size=16, grad_clip=0.0)
    learners = [make_learner(arch, dtype, **sizes) for dtype in DTYPES]
    ((x, y),) = make_batch(learners[0].options)
    for learner in learners:
        learner.rows_at_once = lambda T: rows
    expected, found = (gradients(learner, x, y) for learner in learners)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert relative_error(*(torch.cat([g.flatten() for g in gs.values()]) for gs in (found, expected))) < 0.03
    for name, grad in found.items():
        assert relative_error(grad, expected[name]) < 0.1, name


@pytest.mark.parametrize("arch", ARCHS)
def test_many_parts_add_up_in_float32(arch):
    """In bfloat16 the sum of 256 equal parts would stop growing before it is complete."""
    learner = make_learner(arch, torch.bfloat16, batch_size=1, gradient_accumulation_steps=256, grad_clip=0.0)
    learner.rows_at_once = lambda T: 1
    one = make_learner(arch, torch.bfloat16, batch_size=1, grad_clip=0.0)
    ((x, y),) = make_batch(one.options)
    expected = gradients(one, x, y)
    for name, grad in gradients(learner, x.expand(256, -1), y.expand(256, -1)).items():
        assert relative_error(grad, expected[name]) < 0.001, name


@pytest.mark.parametrize("arch", ARCHS)
def test_updates_far_below_the_resolution_of_bfloat16_are_not_lost(arch):
    """50 steps of 1e-6 from weights near 1, where bfloat16 knows nothing finer than 0.004: AdamW's vectors move by
    their sum, as in float32, though the copy hardly sees it."""
    moved = {}
    for dtype in DTYPES:
        learner = make_learner(arch, dtype, learning_rate=1e-6, matrix_lr=0.0, weight_decay=0.0)
        name = "layers.0.shift" if arch == "modern" else "transformer.ln_f.weight"
        weight = dict(learner.model.named_parameters())[name]
        with torch.no_grad():
            weight.fill_(1.001)  # rounds to 1.0 with room on both sides
        learner.refresh()
        take_steps(learner, make_batch(learner.options) * 50)
        moved[dtype] = weight.detach() - 1.001
    assert relative_error(moved[torch.bfloat16], moved[torch.float32]) < 0.2
    assert moved[torch.bfloat16].abs().mean() > 3e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_training_in_bfloat16_ends_within_0_01_of_the_val_loss_of_float32_on_the_same_steps(arch):
    """Measured: within 0.002 for several seeds. (At higher rates, weights that are rounded once end as far apart.)"""
    data, loss = load_data(str(train.__file__).replace("train.py", "input.txt")), {}
    sizes = dict(n_layer=2, n_embd=64, block_size=32, batch_size=8, learning_rate=1e-3, min_lr=0.0, warmup_iters=10)
    for dtype in DTYPES:
        options = make_options(arch=arch, max_iters=120, **sizes)
        torch.manual_seed(0)
        learner = Learner(plan.build_model(options, data.tokenizer.vocab_size).train(), options, CPU, dtype)
        batches = data.batches(options.batch_size, options.block_size, seed=0)
        for step in range(120):
            learner.step(*batches.batch(step), lr_share(step, step / 120, options))
        with autocast(CPU, dtype):  # as train.py measures it
            loss[dtype] = validation_loss(learner.model, data.val[:10_000], 64)
    assert loss[torch.float32] < math.log(data.tokenizer.vocab_size) - 1, "it has learned something"
    assert abs(loss[torch.bfloat16] - loss[torch.float32]) < 0.01, loss


# ---------------------------------------------------------------------------------------------------------------------
# To stop and go on


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(arch, dtype):
    learner = make_learner(arch, dtype, dropout=0.2)
    batches = make_batch(learner.options, steps=6)
    torch.manual_seed(1)
    take_steps(learner, batches[:3])
    file = io.BytesIO()
    torch.save(dict(learner.state_dict(), dice=torch.get_rng_state()), file)
    expected = take_steps(learner, batches[3:])

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make_learner(arch, dtype, dropout=0.2, seed=5)
    resumed.load_state_dict(state)
    torch.set_rng_state(state["dice"])
    assert take_steps(resumed, batches[3:]) == expected
    assert all(map(torch.equal, resumed.model.parameters(), learner.model.parameters()))


def test_the_state_holds_the_scale_of_float16():
    learner, resumed = with_scaler(make_learner(), init_scale=8.0), with_scaler(make_learner())
    resumed.load_state_dict(learner.state_dict())
    assert resumed.scaler.get_scale() == 8.0


def test_a_run_that_began_without_a_scaler_goes_on_with_one():
    """As on a GPU without bfloat16, where it began on one that has it."""
    learner, resumed = make_learner(), with_scaler(make_learner(), init_scale=8.0)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.scaler.get_scale() == 8.0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_goes_on_where_its_optimizer_is_fused_and_before_was_not_and_the_other_way_round(arch):
    """As on a GPU, where it began on an Apple GPU or with an older PyTorch."""
    batches = make_batch(make_options(), steps=2)
    for before, after in ((True, None), (None, True)):
        learner, resumed = make_learner(arch), make_learner(arch, seed=1)
        for each, fused in ((learner, before), (resumed, after)):
            groups = [dict(group, fused=fused) for group in each.optimizers[-1].param_groups]
            each.optimizers[-1] = torch.optim.AdamW(groups, fused=fused)
        take_steps(learner, batches[:1])
        resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
        assert take_steps(resumed, batches[1:]) == take_steps(learner, batches[1:])
        for p, q in zip(resumed.model.parameters(), learner.model.parameters()):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_state_is_the_float32_weights_under_the_names_of_the_model_whatever_the_format(arch):
    for dtype in DTYPES:
        learner = make_learner(arch, dtype)
        state = learner.state_dict()["model"]
        assert list(state) == list(learner.model.state_dict())
        assert all(tensor.dtype == torch.float32 for tensor in state.values())


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the formula written out and PyTorch's fused kernel


def qkv(T, dtype, requires_grad=False, seed=0):
    """Queries, keys and values of T positions: each (2, 3, T, 8)."""
    q, k, v = torch.randn(3, 2, 3, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return [t.clone().requires_grad_(requires_grad) for t in (q, k, v)]


def outputs_and_gradients(function, inputs):
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("function", [attention, attention_written_out])
def test_attention_and_its_gradients_equal_the_fused_kernels_for_1_to_70_positions(function, dtype, atol):
    for T in range(1, 71):
        expected = outputs_and_gradients(fused, qkv(T, dtype, requires_grad=True))
        found = outputs_and_gradients(function, qkv(T, dtype, requires_grad=True))
        torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=atol, msg=f"{T} positions")
        for a, b in zip(found[1:], expected[1:]):  # of up to 30 in size
            torch.testing.assert_close(a, b, atol=10 * atol, rtol=0, msg=f"gradient, {T} positions")


@pytest.mark.parametrize("T", [1, 2, 17, 64, 70])
def test_attention_in_bfloat16_and_its_gradients_are_those_of_float64_to_1_percent(T):
    exact = outputs_and_gradients(
        fused, [t.detach().double().requires_grad_() for t in qkv(T, torch.bfloat16, requires_grad=True)]
    )
    found = outputs_and_gradients(attention, qkv(T, torch.bfloat16, requires_grad=True))
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    assert relative_error(found[0].double(), exact[0]) < 0.01
    for a, b in zip(found[1:], exact[1:]):
        assert (a.double() - b).norm() <= 0.01 * exact[3].norm()  # of one position, those of q and k are 0


@pytest.mark.parametrize(
    "T, dtype, requires_grad, rate, written_out",
    [
        (64, torch.bfloat16, True, 0.0, True),
        (64, torch.float32, True, 0.1, True),
        (64, torch.float32, True, 0.0, False),
        (64, torch.bfloat16, False, 0.0, False),
        (1025, torch.bfloat16, True, 0.0, False),
    ],
)
def test_the_formula_is_written_out_only_where_it_is_the_faster(
    monkeypatch, T, dtype, requires_grad, rate, written_out
):
    calls = []
    monkeypatch.setattr(model_file, "attention_written_out", lambda q, k, v, p, mask: calls.append(p) or v)
    attention(*qkv(T, dtype, requires_grad), rate)
    assert calls == ([rate] if written_out else [])


# ---------------------------------------------------------------------------------------------------------------------
# Dropout from random bytes

N = 1_000_000


def standard_error(p, n=N):
    return math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.9])
def test_dropout_has_its_rate_to_1_in_256_and_keeps_the_mean(p):
    output = dropout(torch.ones(N), p)
    rate = float((output == 0).double().mean())
    assert abs(rate - p) < 1 / 512 + 4 * standard_error(p)  # rounded to the nearest multiple of 1/256
    assert float(output.double().mean()) == pytest.approx(1, abs=4 * standard_error(p) / (1 - p) + 1e-3)
    assert output[output != 0].unique().numel() == 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_all_eight_bytes_of_a_draw_have_the_same_rate_and_none_knows_of_another(p):
    dropped = (dropout(torch.ones(N), p) == 0).double().view(-1, 8)
    exact, n = round(256 * p) / 256, len(dropped)
    assert dropped.mean(dim=0).tolist() == pytest.approx([exact] * 8, abs=4.5 * standard_error(exact, n))
    correlation = torch.corrcoef(dropped.T) - torch.eye(8)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    neighbours = torch.corrcoef(torch.stack([dropped[:-1, 7], dropped[1:, 0]]))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(n), "nor of those in the next draw"


def test_every_threshold_is_hit_in_its_share():
    """The bytes are uniform: from 1/256 to 255/256 the rate is what it says."""
    for byte in (1, 2, 7, 31, 64, 127, 128, 129, 192, 254, 255):
        rate = float((dropout(torch.ones(N), byte / 256) == 0).double().mean())
        assert rate == pytest.approx(byte / 256, abs=4 * standard_error(byte / 256)), byte


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_backward_pass_of_dropout_uses_the_mask_of_the_forward_pass(p):
    x = torch.full((1000, 33), 2.0, requires_grad=True)
    output = dropout(x, p)
    output.sum().backward()
    torch.testing.assert_close(x.grad, output.detach() / 2)
    assert 0 < (x.grad == 0).float().mean() < 1


def test_gradient_checkpointing_replays_the_mask():
    x = torch.ones(1000, 7, requires_grad=True)
    output = checkpoint(lambda x: dropout(x, 0.5), x, use_reentrant=False)
    torch.rand(3)  # the dice roll on before the backward pass
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())


def test_the_same_seed_drops_the_same_and_the_next_call_something_else():
    def drop():
        return dropout(torch.ones(10_000), 0.3)

    torch.manual_seed(3)
    first, second = drop(), drop()
    torch.manual_seed(3)
    assert torch.equal(drop(), first) and torch.equal(drop(), second)
    agree = ((first == 0) == (second == 0)).float().mean()
    assert float(agree) == pytest.approx(0.7**2 + 0.3**2, abs=0.03)


@pytest.mark.parametrize("p", [1e-12, 1e-3, 0.999, 1 - 1e-12])
def test_a_rate_near_0_or_1_is_off_by_1_in_256_at_most_and_keeps_the_mean(p):
    output = dropout(torch.ones(N), p)
    rate = float((output == 0).double().mean())
    assert abs(rate - p) < 1 / 256 + 4 * standard_error(1 / 256)
    assert output.isfinite().all() and float(output.double().mean()) == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("size", [(), (1,), (7,), (8,), (9,), (3, 5, 7), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dropout_takes_every_shape_and_keeps_it_and_the_number_format(size, dtype):
    output = dropout(torch.ones(size, dtype=dtype), 0.5)
    assert output.shape == size and output.dtype == dtype
    assert set(output.flatten().tolist()) <= {0.0, 2.0}


def test_dropout_of_a_transposed_tensor_scales_what_it_keeps():
    x = torch.randn(30, 40).t()
    output = dropout(x, 0.25)
    kept = output != 0
    assert output.shape == x.shape and 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(output[kept], x[kept] / 0.75)


def test_dropout_is_off_in_eval_and_at_rate_0():
    x, layer = torch.randn(100), Dropout(0.5)
    assert torch.equal(layer.eval()(x), x) and not torch.equal(layer.train()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
