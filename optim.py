"""One update of the weights: loss, gradients and optimizers, in the number format that pays on the device."""

import copy
import math

import torch

from utils import UserError, autocast


def build_optimizers(model, options, device):
    """A GPT's AdamW (Loshchilov & Hutter 2019), or a modern model's Muon for the matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) makes all singular values of a matrix's update equal, so that no direction is neglected.
    Weight decay is for matrices alone, not for biases, norms and other vectors.
    """
    adamw = dict(lr=options.learning_rate, betas=(options.beta1, options.beta2))
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if device.type == "cuda" or (device.type == "cpu" and version >= (2, 4)):
        adamw["fused"] = True
    if options.arch == "modern":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--arch modern needs PyTorch 2.9 or newer for its Muon optimizer, not {torch.__version__}")
        matrices = [p for p in model.layers.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
        muon = torch.optim.Muon(matrices, lr=options.matrix_lr, weight_decay=options.weight_decay, momentum=0.95)
        return [muon, torch.optim.AdamW(rest, weight_decay=0.0, eps=1e-10, **adamw)]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return [torch.optim.AdamW(groups, **adamw)]


def lr_share(step, progress, options):
    """The share of its highest learning rate that a step is made with, 0 to 1. progress: the share of the run done.

    It climbs for warmup_iters steps and falls to min_lr at the end: with --minutes in a line (Defazio et al. 2023: hard
    to beat), else along half a cosine (Loshchilov & Hutter 2017).
    """
    floor = 0.1 if options.min_lr is None else options.min_lr / (options.learning_rate or 1)
    left = 1 - progress if options.minutes is not None else 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / (options.warmup_iters or 1)) * (floor + (1 - floor) * left)


class Learner:
    """A model and all that changes it.

    On a GPU the model computes under autocast, and its float32 weights learn. On a CPU with bfloat16 hardware a
    bfloat16 copy of the model does the arithmetic: autocast's casts of every weight and activation cost a small model
    half its time. Each step adds the copy's gradients up in float32, updates the float32 weights, and copies them over.
    """

    def __init__(self, model, options, device, dtype):
        self.model, self.options, self.device, self.dtype = model, options, device, dtype
        self.optimizers = build_optimizers(model, options, device)
        self.highest = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        Scaler = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler  # torch.amp's: PyTorch 2.3
        self.scaler = Scaler(enabled=dtype == torch.float16)
        self.weights = list(model.parameters())
        self.copied = device.type == "cpu" and dtype == torch.bfloat16
        self.worker = copy.deepcopy(model).to(dtype) if self.copied else model
        self.compute = self.worker  # may be replaced by torch.compile(self.worker)

    def rows_at_once(self, T):
        """How many of a step's windows of T tokens go through the model together; then the next, and gradients add up.

        On a GPU the batch_size that was asked for. On a CPU some 2,048 tokens: then what one operation writes is still
        in the cache when the next reads it, which makes the default model a third faster than its whole batch at once.
        """
        rows = self.options.batch_size
        return rows if self.device.type != "cpu" else min(rows, max(1, 2048 // T))

    def loss(self, x, y):
        """The loss of windows x, y (B, T), with its graph."""
        if self.copied:
            return self.compute(x, y)[1]
        with autocast(self.device, self.dtype):
            return self.compute(x, y)[1]

    def step(self, x, y, lr_share):
        """Update the weights once from x, y (batch_size * gradient_accumulation_steps, T).

        lr_share: the share of each group's highest learning rate. Returns the loss in nats per token and the norm of
        the gradient before clipping, as tensors: reading their value would make the CPU wait for the GPU.
        """
        rows, total = self.rows_at_once(x.size(1)), 0.0
        for x_part, y_part in zip(x.split(rows), y.split(rows)):
            loss = self.loss(x_part, y_part) * (len(x_part) / len(x))  # the parts add up to the mean over all windows
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
            if self.copied:
                self._collect_gradients()
        for optimizer, highest in zip(self.optimizers, self.highest):
            self.scaler.unscale_(optimizer)
            for group, lr in zip(optimizer.param_groups, highest):
                group["lr"] = lr * lr_share
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.options.grad_clip or float("inf"))
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # then none may step: clipping spread it to all
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.copied:
            self.refresh()
        return total, norm

    def _collect_gradients(self):
        """Move the copy's gradients to the float32 weights."""
        for weight, low in zip(self.weights, self.worker.parameters()):
            weight.grad = low.grad.float() if weight.grad is None else weight.grad.add_(low.grad)
            low.grad = None

    @torch.no_grad()
    def refresh(self):
        """Give the copy the weights as they are now."""
        for weight, low in zip(self.weights, self.worker.parameters()):
            low.copy_(weight)

    def state_dict(self):
        """What a resumed run needs: the float32 weights, the optimizers' memory, the scaler."""
        optimizers = [o.state_dict() for o in self.optimizers]
        return dict(model=self.model.state_dict(), optimizers=optimizers, scaler=self.scaler.state_dict())

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.copied:
            self.refresh()
