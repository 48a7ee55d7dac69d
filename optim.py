"""One update of the weights: loss, gradients and optimizers, in the number format that pays on the device."""

import contextlib
import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from distributed import ALONE
from graphs import RecordedStep, can_be_recorded
from learn_cpu import in_c
from model import dice
from sharding import by_whole_matrices, is_sharded, own, read_tensors, spread, whole
from utils import UserError, autocast, first_problem, has_bfloat16, version


def build_optimizers(model, options, device, dtype=torch.float32):
    """A GPT's AdamW (Loshchilov & Hutter 2019), or a modern model's Muon for the matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) makes all singular values of a matrix's update equal, so that no direction is neglected.
    Weight decay is for matrices alone, not for biases, norms and other vectors; in a modern model it is for the layers'
    matrices, and the n-gram vectors have a decay of their own. dtype: the number format of the model's arithmetic.
    """
    adamw = dict(lr=options.learning_rate, betas=(options.beta1, options.beta2))
    since = dict(cuda=(2, 1), cpu=(2, 4)).get(device.type)  # a GPU's in 2.0.0 does not heed found_inf (Learner.update)
    if since is not None and version(torch) >= since:
        adamw["fused"] = True
    if can_be_recorded(device):
        adamw["capturable"] = True  # its learning rates are then tensors, which a replay reads anew
    if options.arch == "modern":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"--arch modern: needs PyTorch 2.9 or newer for its Muon optimizer, not {torch.__version__}; update "
                f"it, or take --arch gpt"
            )
        matrices = [p for p in model.layers.parameters() if p.dim() == 2]
        ngrams = [] if model.ngrams is None else [model.ngrams.table.weight]
        others = set(map(id, matrices + ngrams))
        rest = [p for p in model.parameters() if id(p) not in others]
        groups = [dict(params=rest, weight_decay=0.0)]
        groups += [dict(params=ngrams, weight_decay=options.ngram_decay)] if ngrams else []
        muon = Muon(matrices, lr=options.matrix_lr, weight_decay=options.weight_decay, momentum=0.9)
        if dtype != torch.float32 and has_bfloat16(device):
            muon.dtype = torch.bfloat16
        return [muon, AdamW(groups, eps=1e-10, **adamw)]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return [AdamW(groups, **adamw)]


def plain(cls, name):
    """A method of PyTorch's optimizers as it is, without what keeps torch.compile out of it."""
    method = getattr(cls, name)
    return getattr(method, "__wrapped__", method)


class WithoutCompiler:
    """An optimizer that does not load PyTorch's compiler, which takes a second or two at the start of every run."""

    add_param_group = plain(torch.optim.Optimizer, "add_param_group")
    zero_grad = plain(torch.optim.Optimizer, "zero_grad")
    state_dict = plain(torch.optim.Optimizer, "state_dict")
    load_state_dict = plain(torch.optim.Optimizer, "load_state_dict")


class AdamW(WithoutCompiler, torch.optim.AdamW):
    """torch.optim.AdamW."""

    step = torch.no_grad()(plain(torch.optim.AdamW, "step"))


class Muon(WithoutCompiler, getattr(torch.optim, "Muon", object)):  # PyTorch 2.9
    """torch.optim.Muon, twice as fast for small models, with singular values nearer to 1.

    Matrices of one shape are stacked: one product for all of them instead of one for each. And the polynomial that
    brings the singular values to 1 differs from step to step (POLAR_EXPRESS) where torch.optim.Muon has one for all.
    Like the fused AdamW it changes nothing where found_inf, a tensor on its device, is 1 (Learner.update sets it).
    Of a sharded matrix each process changes its own rows, but makes orthogonal the whole, which it gets from all.
    """

    _step_supports_amp_scaling = True  # PyTorch's name for an optimizer that heeds found_inf
    found_inf = None
    dtype = torch.float32  # in which matrices are made orthogonal; bfloat16's three digits are enough, if it is fast

    @torch.no_grad()
    def step(self, closure=None):
        good = 1.0 if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), weights in of_shape.items():
                grads = [own(p.grad) for p in weights]
                for p in weights:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                means = [own(self.state[p]["momentum_buffer"]) for p in weights]
                if self.found_inf is not None:  # then bad gradients are replaced by their mean, which stays as it is
                    grads = [torch.where(good > 0, grad, mean) for mean, grad in zip(means, grads)]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov's momentum
                updates = by_whole_matrices(lambda x: orthogonal(x, self.dtype), torch.stack(updates), weights[0])
                ours = [own(p) for p in weights]
                torch._foreach_mul_(ours, 1 - group["lr"] * group["weight_decay"] * good)
                lr = group["lr"] * math.sqrt(max(1, rows / columns)) * good
                torch._foreach_sub_(ours, list((updates.to(ours[0].dtype) * lr).unbind()))


# The polynomials a x + b x^3 + c x^5 that, one after the other, bring numbers between 0.001 and 1 nearest to 1, with a
# margin of 2 % for bfloat16's rounding (Amsel et al. 2025, "The Polar Express", section 3; the first four of five).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
)


def orthogonal(x, dtype=torch.float32):
    """Bring all singular values of each matrix in x (N, rows, columns) near 1: the nearest orthogonal one, in dtype.

    A polynomial of odd powers of a matrix, x (a + b x^T x + c (x^T x)^2), is that polynomial of its singular values.
    """
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def lr_share(step, progress, options):
    """The share of its highest learning rate that a step is made with, 0 to 1. progress: the share of the run done.

    It climbs for warmup_iters steps and falls to min_lr at the end: with --minutes in a line (Defazio et al. 2023: hard
    to beat), else along half a cosine (Loshchilov & Hutter 2017).
    """
    floor = 0.1 if options.min_lr is None else options.min_lr / (options.learning_rate or 1)
    left = 1 - progress if options.minutes is not None else 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / (options.warmup_iters or 1)) * (floor + (1 - floor) * left)


def copied_to(places, tensors):
    """Copy tensors to places of another number format: on a GPU in a few operations. Returns the places."""
    if hasattr(torch, "_foreach_copy_"):  # PyTorch 2.1
        torch._foreach_copy_(places, list(tensors))
    else:
        for place, tensor in zip(places, tensors):
            place.copy_(tensor)
    return places


def averaging(model, processes):
    """The model in a DistributedDataParallel, whose backward pass averages the gradients over the processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer PyTorch has another name for broadcast_buffers
        return torch.nn.parallel.DistributedDataParallel(
            model, process_group=processes.group, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def has_copy(device, dtype, processes, sharded):
    """Does a bfloat16 copy of the model do a Learner's arithmetic, for so many processes, each with such a device?"""
    on_device = device.type == "cpu" or (device.type == "cuda" and processes == 1)
    return dtype == torch.bfloat16 and on_device and not sharded


def other_model(difference):
    """The UserError of a state whose model is not the one that model.py and modern.py make now."""
    return UserError(
        f"--resume: the model is not the one that this run began with ({difference}); put back the code that it began "
        f"with, or start anew in another --out_dir"
    )


def has_recording(options, device, processes):
    """Does a Learner of so many processes record its steps, where its model has no gradient checkpointing?"""
    return options.record and processes == 1 and can_be_recorded(device)


MOST, LEAST = 1024, 384  # tokens of a step that go through the model together on a CPU


def rows_on_cpu(windows, batch_size, T, cores):
    """How many of a step's windows of T tokens go through the model together on a CPU, as one part of the step.

    At most batch_size, and some 1,024 tokens: then what one operation writes is still in the cache when the next reads
    it. cores: how many parts are computed at the same time. Where no core would then be idle for long, the windows are
    shared out evenly, in as many rounds of parts as it takes anyway: 12 windows of 64 tokens are two parts of 6.
    """
    rows = min(windows, batch_size, max(1, MOST // T))
    rounds = math.ceil(math.ceil(windows / rows) / cores)
    even = math.ceil(windows / (rounds * cores))
    idle = 1 - windows / (rounds * cores * even)
    return even if even * T >= LEAST and idle < 1 / 8 else rows


def enough_for_c(parts):
    """Are so many parts of a step enough for learn_cpu.c, which computes each in one thread? Not where most cores would
    have none."""
    return 2 * parts >= torch.get_num_threads()


class Learner:
    """A model and all that changes it.

    In bfloat16, on a CPU or on a GPU that works alone, a copy of the model does the arithmetic: autocast's casts of
    every weight and activation cost a small model half its time. Each step adds the copy's gradients up in float32,
    updates the float32 weights, and copies them over. Several GPUs, float16 and an Apple GPU compute under autocast,
    and the float32 weights learn.

    On a CPU with AVX-512 loss and gradients are computed in C (learn_cpu.py), from the float32 weights. The copy is
    then brought up to date only where PyTorch computes after all.

    On an NVIDIA GPU that works alone the fourth step is recorded, and replayed from then on (graphs.RecordedStep).

    Several processes have the same weights, and average the gradients of their shares of the batch: by PyTorch's
    DistributedDataParallel while the backward pass is still at work, or, where a bfloat16 copy computes, in one message
    behind it: DistributedDataParallel would add up and average in bfloat16. A sharded model (sharding.py) computes in
    its number format by itself, and averages the gradients of each part.
    """

    def __init__(self, model, options, device, dtype, processes=ALONE):
        self.model, self.options, self.device, self.dtype = model, options, device, dtype
        self.processes = processes
        self.optimizers = build_optimizers(model, options, device, dtype)
        self.highest = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        Scaler = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler  # torch.amp's: PyTorch 2.3
        self.scaler = Scaler(enabled=dtype == torch.float16)
        self.weights = list(model.parameters())
        self.sharded = is_sharded(model)
        self.copied = has_copy(device, dtype, processes.world, self.sharded)
        self.worker = copy.deepcopy(model).to(dtype) if self.copied else model
        self.learned, self.sums = None, []  # the model as learn_cpu.c has it, where it computes; each thread's Sums
        self.flat = None  # all gradients in one tensor, where they lie in Sums
        alone = not self.sharded and (self.copied or processes.world == 1)  # PyTorch averages no gradients by itself
        if device.type == "cpu" and alone and not model.gradient_checkpointing:
            self.learned = in_c(model, dtype)
        self.copies = list(self.worker.parameters())
        self.averaging = None  # the DistributedDataParallel, where there is one
        if processes.world > 1 and not self.copied and not self.sharded:
            self.averaging = averaging(model, processes)
        self.uncompiled = self.averaging or self.worker
        self.compute = self.uncompiled  # may be replaced by self.compiled()
        self.skipped = torch.zeros(2, device=device)  # steps skipped for bad numbers: in all, and in a row until now
        self.pools = {}  # number of threads -> the threads
        self.recorded = None
        if has_recording(options, device, processes.world):
            self.recorded = RecordedStep(self.take_step, device)

    def rows_at_once(self, T):
        """How many of a step's windows of T tokens go through the model together, as one part of the step: on a GPU
        the batch_size that was asked for."""
        rows = self.options.batch_size
        if self.device.type != "cpu":
            return rows
        return rows_on_cpu(self.windows, rows, T, self.side_by_side(self.windows))

    @property
    def windows(self):
        """How many windows a step has in this process."""
        return max(1, self.options.batch_size * self.options.gradient_accumulation_steps // self.processes.world)

    def side_by_side(self, parts):
        """How many of a step's parts are computed at the same time, each by its share of the CPU's cores.

        A core that works on its own part need not wait for the others after each operation. Not with a compiled or
        sharded model, nor with gradient checkpointing: it computes a part twice, the second time with the same dropout,
        for which it sets back PyTorch's own random numbers, which are those of all threads.
        """
        alone = self.device.type != "cpu" or self.compute is not self.worker or self.sharded
        return 1 if alone or self.worker.gradient_checkpointing else min(parts, torch.get_num_threads())

    def compiled(self):
        """What may stand in for self.compute: the model, compiled.

        Its loss only, unless DistributedDataParallel or sharding wraps it: had it logits to return, the backward pass
        would make and add a gradient of zeros for them, at GPT-2's size 1.6 GB and 3 % of a step.
        """
        if self.averaging is not None or self.sharded:
            return torch.compile(self.uncompiled)
        worker = self.worker
        return torch.compile(lambda x, y: (None, worker(x, y)[1]))

    def loss(self, x, y):
        """The loss of windows x, y (B, T), with its graph."""
        if self.copied or self.sharded:
            return self.compute(x, y)[1]
        with autocast(self.device, self.dtype):
            return self.compute(x, y)[1]

    def gradients(self, x, y, share=1.0, seed=None):
        """The loss of windows x, y (B, T) times share, and its gradient for each of self.copies.

        seed: for a thread's own dropout, where several threads compute at once.
        """
        dice.generator = None if seed is None else torch.Generator().manual_seed(seed)
        loss = self.loss(x, y) * share
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.copies, allow_unused=True)
        # A weight that had no part in this loss, such as that of an expert who was not asked, has a gradient of zeros.
        return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(self.copies, gradients)]

    def parts(self, x, y):
        """The parts in which windows x, y go through the model: a list of (x, y, share of the windows)."""
        rows = self.rows_at_once(x.size(1))
        return [(a, b, len(a) / len(x)) for a, b in zip(x.split(rows), y.split(rows))]

    def part_gradients(self, parts):
        """Yields the loss and gradients of each part, in order; they add up to those of all windows."""
        threads = self.side_by_side(len(parts))
        if threads == 1:
            return (self.gradients(*part) for part in parts)
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        return self.pool(threads).map(lambda part, seed: self.gradients(*part, seed), parts, seeds)

    def learn_in_c(self, parts):
        """The loss of all parts, whose gradients are added to those of the weights, by learn_cpu.c.

        Each thread computes always the same parts, and adds up their gradients by itself.
        """
        threads = self.side_by_side(len(parts))
        run = map if threads == 1 else self.pool(threads).map
        list(run(lambda thread: self.learned.lay_out(thread, threads), range(threads)))
        while len(self.sums) < threads:
            self.sums.append(self.learned.sums())
        if self.weights[0].grad is not None:
            for weight in self.weights:
                weight.grad = weight.grad.clone()  # it may lie in Sums, which are about to be used again
        self.flat, had = None, [weight.grad for weight in self.weights]
        seeds = torch.randint(2**62, (len(parts),)).tolist()

        def learn(thread):
            sums = self.sums[thread]
            sums.begin()
            return sum(sums.learn(*part, seed) for part, seed in list(zip(parts, seeds))[thread::threads])

        total = sum(run(learn, range(threads)))
        first, *others = self.sums[:threads]
        for other in others:
            first.flat.add_(other.flat)
        self.flat = first.flat
        for weight in self.weights:
            weight.grad = first.gradients[weight]
        if had[0] is not None:
            self._add(had)
        return torch.tensor(total)

    def pool(self, threads):
        """So many threads, which share the cores."""
        if threads not in self.pools:
            cores = max(1, torch.get_num_threads() // threads)
            self.pools[threads] = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores,))
        return self.pools[threads]

    def computes_in_c(self, parts):
        """Is a step of so many parts computed in C? Not where most cores would have no part, nor where some weights
        were frozen, which learn_cpu.c does not know."""
        as_it_is = self.learned is not None and self.compute is self.worker and not self.worker.gradient_checkpointing
        return as_it_is and enough_for_c(parts) and all(p.requires_grad for p in self.weights)

    def steps_in_c(self):
        """Are the steps computed in C that the options ask for?"""
        return self.computes_in_c(math.ceil(self.windows / self.rows_at_once(self.options.block_size)))

    def step(self, x, y, lr_share):
        """Update the weights once from x, y (batch_size * gradient_accumulation_steps, T), or this process's share.

        lr_share: the share of each group's highest learning rate. Returns the loss in nats per token and the norm of
        the gradient before clipping, as tensors: reading their value would make the CPU wait for the GPU. Where either
        is infinite or no number the step is skipped: all stays as it was, but for self.skipped. Loss and norm are those
        of all processes, so that all of them skip the same steps.
        """
        return self.recorded(x, y, lr_share) if self.records else self.take_step(x, y, lr_share)

    @property
    def records(self):
        """Are steps recorded? Not with gradient checkpointing, which looks up where the random numbers stand."""
        return self.recorded is not None and not self.worker.gradient_checkpointing

    def take_step(self, x, y, lr_share):
        """What `step` does, operation by operation. lr_share may be a tensor () on the device."""
        if getattr(self.worker, "ahead", None) is not None:  # so that at the end the next token counts alone
            for computing in {self.worker, self.model}:
                computing.ahead_share.zero_().add_(lr_share)
        total = self.add_gradients(x, y)
        for optimizer, highest in zip(self.optimizers, self.highest):
            self.scaler.unscale_(optimizer)
            for group, lr in zip(optimizer.param_groups, highest):
                group["lr"] = lr * lr_share
        norm = self.clip()
        self.update((total + norm).isfinite())
        self.scaler.update()
        if self.copied and self.learned is None:
            self.refresh()
        return total, norm

    def clip(self):
        """Scale the gradients so that their norm is at most grad_clip; returns what it was, as a tensor."""
        most = self.options.grad_clip or float("inf")
        if self.flat is None:
            return whole(torch.nn.utils.clip_grad_norm_(self.weights, most))
        norm = self.flat.norm()
        if norm > most:
            self.flat.mul_(most / (norm + 1e-6))
        return norm

    def update(self, good):
        """Let every optimizer step where `good`, a tensor (), is true; else none of them, and count that."""
        bad = (~good).float()
        for optimizer in self.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = bad  # it looks at that itself, on the device: the CPU need not wait
                optimizer.step()
            elif good:
                optimizer.step()
        self.forget_gradients()
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad]))

    def add_gradients(self, x, y):
        """Add the gradients of windows x, y (B, T) to those of the float32 weights; returns their loss.

        Of several processes, each with its own windows, all get the mean of the gradients and losses.
        """
        parts, total = self.parts(x, y), 0.0
        if self.averaging is None and not self.sharded:
            if self.computes_in_c(len(parts)):
                total = self.learn_in_c(parts)
            else:
                if self.copied and self.learned is not None:
                    self.refresh()
                for loss, gradients in self.part_gradients(parts):
                    total = total + loss
                    self._add(gradients)
            self.processes.average([total, *(weight.grad for weight in self.weights)])
        else:
            for n, (a, b, share) in enumerate(parts, 1):
                last = n == len(parts)  # it averages what all have added up
                with contextlib.nullcontext() if last or self.sharded else self.averaging.no_sync():
                    loss = self.loss(a, b) * share
                    self.scaler.scale(loss).backward()
                total = total + loss.detach()
            self.processes.average([total])
        return total

    def forget_gradients(self):
        self.flat = None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _add(self, gradients):
        """Add a part's gradients to those of the float32 weights."""
        if self.weights[0].grad is not None:
            torch._foreach_add_([weight.grad for weight in self.weights], list(gradients))
            return
        if gradients[0].dtype != self.weights[0].dtype:
            gradients = copied_to([torch.empty_like(weight) for weight in self.weights], gradients)
        for weight, gradient in zip(self.weights, gradients):
            weight.grad = gradient

    @torch.no_grad()
    def refresh(self):
        """Give the copy the weights as they are now."""
        copied_to(self.copies, self.weights)

    def state_dict(self):
        """What a resumed run needs: the float32 weights, the optimizers' memory, the scaler, the steps skipped.

        Of a sharded model without the tensors, which are those of sharding.learned.
        """
        model, optimizers = self.model.state_dict(), [o.state_dict() for o in self.optimizers]
        if self.sharded:
            model, optimizers = {}, [{**saved, "state": {}} for saved in optimizers]
        return dict(model=model, optimizers=optimizers, scaler=self.scaler.state_dict(), skipped=self.skipped)

    def load_state_dict(self, state):
        """Go back to a state: of this number of processes or another, sharded or not. Raises UserError."""
        of_each = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        learned = [sum(len(group["params"]) for group in saved["param_groups"]) for saved in state["optimizers"]]
        if learned != [len(weights) for weights in of_each]:
            raise other_model(f"it learns {sum(map(len, of_each))} tensors, not {sum(learned)}")
        memories = [saved["state"] for saved in state["optimizers"]]
        if "shards" in state:
            memories = read_tensors(state["shards"], self.model, of_each)
        elif self.sharded:
            named = dict(self.model.named_parameters())
            for name, tensor in spread(state["model"], named).items():
                if name in named:
                    named[name].data.copy_(tensor)
            memories = [
                {i: spread(kept, dict.fromkeys(kept, weights[i])) for i, kept in memory.items()}
                for memory, weights in zip(memories, of_each)
            ]
        else:
            try:
                self.model.load_state_dict(state["model"])
            except RuntimeError as error:
                raise other_model(first_problem(error)) from None
        for optimizer, memory in zip(self.optimizers, memories):  # the saved settings may be those of another device
            optimizer.load_state_dict({**optimizer.state_dict(), "state": memory})
        if state["scaler"]:  # {} where the run was not in float16 until now
            self.scaler.load_state_dict(state["scaler"])
        if "skipped" in state:  # not in states of before there was such a count
            self.skipped.copy_(state["skipped"])
        if self.recorded is not None:  # what was recorded until now works on the memory that the optimizers had
            self.recorded = RecordedStep(self.take_step, self.device)
        if self.copied:
            self.refresh()
