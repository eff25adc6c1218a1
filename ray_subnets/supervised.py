"""Train and evaluate one classifier on one device in one process.

The loop is a generator: it yields after every epoch, and the caller decides whether to print,
checkpoint or stop. All randomness of an epoch follows from (seed, epoch), so a network whose
weights, optimizer state and epoch number were saved goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from ray_subnets import schedules
from ray_subnets.data import Batch, Batches, Preprocess
from ray_subnets.items import Items
from ray_subnets.recipes import Epoch, Training, derive
from ray_subnets.regression import Criterion, columns
from ray_subnets.streaming import ImageFiles
from ray_subnets.topology import Topology

Rate = Callable[[int, int], float]
"""(step, steps in all) -> learning rate"""
Objective = Callable[[nn.Module, Batch], Tensor]
"""A network and a batch -> loss in nats, summed over the batch's images."""


_LONELY = "more than 1 value per channel"
"""in what batch normalisation says of a batch of one"""


class Diverged(ValueError):
    """The loss became NaN or infinite: the user's setting, not our fault."""


def make_optimizer(
    model: nn.Module, training: Training, groups: Sequence[Mapping[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam; learning rate and momentum are set at every step.

    Args:
        groups: parameters with settings of their own, as torch takes them; default: all alike.
    """
    parameters: Any = model.parameters() if groups is None else [dict(group) for group in groups]
    if training.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=training.lr, weight_decay=training.weight_decay, foreach=True
        )
    return torch.optim.SGD(
        parameters,
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.nesterov and training.momentum > 0,
        weight_decay=training.weight_decay,
        foreach=True,
    )


def set_rates(
    optimizer: torch.optim.Optimizer,
    training: Training,
    step: int,
    total: int,
    rate: Rate | None = None,
) -> float:
    """Set this step's learning rate (and, for one-cycle, momentum). Returns the rate.

    Args:
        rate: in place of the schedule that `training` names.
    """
    momentum = None
    if rate is not None:
        lr = rate(step, total)
    elif training.schedule == "one_cycle":
        lr, momentum = schedules.one_cycle(step, total, lr_max=training.lr)
    elif training.schedule == "decay":
        lr = schedules.decay(step, total, lr=training.lr)
    elif training.schedule == "steps":
        lr = schedules.steps(step, total, lr=training.lr)
    elif training.schedule == "cosine":
        lr = schedules.cosine(step, total, lr=training.lr)
    else:
        lr = schedules.constant(step, total, lr=training.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and training.momentum > 0:
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum
    return lr


def train(
    model: nn.Module,
    batches: Batches,
    training: Training,
    optimizer: torch.optim.Optimizer,
    *,
    id: str = "model",
    seed: int = 0,
    start_epoch: int = 0,
    topology: Topology | None = None,
    rate: Rate | None = None,
    objective: Objective | None = None,
    criterion: Criterion | None = None,
) -> Iterator[Epoch]:
    """Train `model` in place from `start_epoch` on, yielding after every epoch.

    Args:
        topology: which weights act at each step (chapters 5 and 6); None: all.
        rate: learning rate in place of the schedule that `training` names.
        objective: loss in place of the cross-entropy of `model(x)`. It may draw from torch's own
            generator, which is seeded by (seed, epoch). It sees the parameters themselves: not for
            topologies that draw weights.
        criterion: loss of outputs and targets in place of the cross-entropy; for any topology.

    Raises:
        Diverged: the training loss of an epoch is not finite.
    """
    device = batches.data.train.images.device
    half = torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16"
    )
    if training.compile:
        model.compile()
    steps, total = batches.steps, batches.steps * training.epochs
    model.train()
    for epoch in range(start_epoch, training.epochs):
        began, images, lr = time.perf_counter(), 0, 0.0
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        if topology:
            topology.start_epoch(epoch)
        bernoulli = torch.Generator(device).manual_seed(derive(seed, "bernoulli", epoch))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Layers that draw by themselves, in each process other samples' masks.
            apart = (batches.rank,) if batches.rank else ()
            torch.manual_seed(derive(seed, "dropout", epoch, *apart))
            for i, batch in enumerate(batches.epoch(epoch)):
                step = epoch * steps + i
                lr = set_rates(optimizer, training, step, total, rate)
                seen = topology.weights(step / steps, bernoulli) if topology else None
                if objective is not None:
                    with half:
                        loss = objective(model, batch)
                else:
                    try:
                        with half:
                            logits = (
                                functional_call(model, seen, (batch.x,)) if seen else model(batch.x)
                            )
                    except ValueError as error:
                        if batches.world > 1 or len(batch.y) > 1 or _LONELY not in str(error):
                            raise
                        continue  # the last batch is of one sample, which has no variance
                    answers = main_output(logits).float()
                    if criterion is not None:
                        loss = criterion(answers, batch.y)
                    else:
                        loss = cross_entropy(
                            answers,
                            batch.y,
                            reduction="sum",
                            label_smoothing=training.label_smoothing,
                        )
                optimizer.zero_grad(set_to_none=True)
                (loss / batch.size).backward()
                optimizer.step()
                if topology:
                    topology.after_step()
                loss_sum += loss.detach()
                images += len(batch.y)
        done = Epoch(
            id=id,
            epoch=epoch + 1,
            epochs=training.epochs,
            loss=float(loss_sum) / max(images, 1),
            lr=lr,
            images=images,
            seconds=time.perf_counter() - began,
        )
        if batches.world == 1:  # of several, all must stop: they decide together
            check_loss(done)
        yield done


def check_loss(done: Epoch) -> None:
    """Is the mean loss of an epoch a number?

    Raises:
        Diverged: it is not.
    """
    if not math.isfinite(done.loss):
        raise Diverged(f"{done.id}: the loss is {done.loss} in epoch {done.epoch}; lower its lr")


def main_output(output: Any) -> Tensor:
    """Logits of a network that also has outputs of auxiliary heads while it is trained.

    torchvision's Inception and GoogLeNet return a tuple with the field `logits` then; of other
    tuples they are the first. Auxiliary heads are for training from scratch; here they are left as
    they are.
    """
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


@torch.no_grad()
def recompute_norm(model: nn.Module, batches: Batches) -> None:
    """Batch-norm statistics of `model` as it is now: the mean over one epoch of training batches.

    A network whose weights were changed without training still has its parent's statistics.
    Networks without batch-norm are left as they are; so is a last batch of one sample, which has
    no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    model.train()
    device = batches.data.train.images.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(batches.seed, "norm"))  # dropout layers draw by themselves
        for batch in batches.epoch(0):
            if len(batch.x) > 1:
                model(batch.x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor | ImageFiles | Items,
    preprocess: Preprocess,
    *,
    batch_size: int = 500,
) -> Tensor:
    """Logits `(N, C)` float32 on the CPU, in evaluation mode; images lie where the model does.

    A network that is K members gives `(K, N, C)`; `(N,)` of an MSE head is `(N, 1)` here.

    Raises:
        ValueError: an image file cannot be read.
    """
    training = model.training
    model.eval()
    try:
        logits = [
            columns(model(preprocess(part)).float().cpu()) for part in images.split(batch_size)
        ]
    finally:
        model.train(training)
    return torch.cat(logits, dim=-2)


# --- exact resume -------------------------------------------------------------------------------


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state as one flat dict of tensors."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def restore_training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `training_state`, in place."""
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    record = optimizer.state_dict()
    record["state"] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            record["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(record)
