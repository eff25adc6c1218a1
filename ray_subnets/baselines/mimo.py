"""MIMO: one network that takes several images at once and answers for each of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_subnets import masks, schedules
from ray_subnets.baselines.batch_ensemble import STEPS
from ray_subnets.baselines.fitting import check_members
from ray_subnets.baselines.method import Bench, Build, Method, Progress, Trained, of
from ray_subnets.data import Batch
from ray_subnets.recipes import Count, Training, derive
from ray_subnets.supervised import Objective

FITS = "networks fit whose first layer reads the image and whose last gives the logits, ours do"


class Heads(nn.Module):
    """A network that takes M images side by side: `(N, *shape)` -> `(M, N, C)`, M times each."""

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network, self.members = network, members

    def forward(self, x: Tensor) -> Tensor:
        return self.separate([x] * self.members)

    def separate(self, images: Sequence[Tensor]) -> Tensor:
        """M images for every answer, `M x (N, *shape)` -> logits of each, `(M, N, C)`."""
        logits = self.network(torch.cat(list(images), 1))
        return logits.view(len(logits), self.members, -1).transpose(0, 1)


def _ends(model: nn.Module) -> tuple[Any, Any]:
    """First and last linear or convolution layer, by registration.

    Raises:
        ValueError: there is one only, or they work in groups of channels.
    """
    layers = [module for module in model.modules() if isinstance(module, masks.MASKABLE)]
    if len(layers) < 2:
        raise ValueError("mimo: needs a network of two layers or more")
    for layer in (layers[0], layers[-1]):
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"mimo: the first and last layer must not have groups; {FITS}")
    return layers[0], layers[-1]


@torch.no_grad()
def _widen(model: nn.Module, others: Sequence[nn.Module]) -> None:
    """First layer for the images of all, last layer with a head for each, from networks alike.

    Drawn side by side, and as small as a layer with so many inputs has it.
    """
    all_first, all_last = zip(*(_ends(one) for one in (model, *others)), strict=True)
    members = len(all_first)
    first, last = all_first[0], all_last[0]
    weight = torch.cat([one.weight for one in all_first], 1) / members**0.5
    first.weight = nn.Parameter(weight)
    last.weight = nn.Parameter(torch.cat([one.weight for one in all_last]))
    if last.bias is not None:
        last.bias = nn.Parameter(torch.cat([one.bias for one in all_last]))
    if isinstance(first, nn.Linear):
        first.in_features *= members
    else:
        first.in_channels *= members
    if isinstance(last, nn.Linear):
        last.out_features *= members
    else:
        last.out_channels *= members


@dataclass(frozen=True, kw_only=True)
class MIMO(Method):
    """One network with M inputs and M heads; heads are trained on different images at once.

    Published (Havasi et al. 2021, WRN-28-10 on CIFAR): 3 members, every batch 4 times in a step,
    rate 0.1 times 0.2 at 100, 200 and 225 of 250 epochs. At test time all inputs are one image.
    """

    title: ClassVar[str] = "MIMO"
    source: ClassVar[str] = "Havasi et al. 2021; settings of uncertainty-baselines"
    deviation: ClassVar[str] = (
        "batches are not repeated, there 4 times; where they are, there are as many fewer epochs"
    )
    method: Literal["mimo"] = "mimo"
    members: Annotated[int, Ge(2)] = 3
    """images at once"""
    batch_repetition: Count = 1
    """times that a batch is in a step, shuffled anew for each head; takes as many epochs' budget"""
    input_repetition: Annotated[float, Ge(0), Le(1)] = 0.0
    """part of a batch where all heads see the same image in training too"""
    published_rate: bool = True
    """steps of the published training, where the column's rate is not constant"""

    def epochs(self, budget: int) -> int:
        if budget < self.batch_repetition:
            raise ValueError(
                f"batch_repetition: {self.batch_repetition} passes of an image take as many "
                f"epochs, the budget is {budget}"
            )
        return budget // self.batch_repetition

    def network(self, build: Build, seed: int) -> nn.Module:
        network = build(seed)
        _widen(network, [build(derive(seed, "head", m)) for m in range(1, self.members)])
        return Heads(network, self.members)

    def inputs(self, n: int) -> Tensor:
        """Which image each head sees in each row, `(M, n * batch_repetition)`; draws."""
        rows = torch.randperm(n * self.batch_repetition) % n
        mixed = round(len(rows) * (1 - self.input_repetition))
        return torch.stack(
            [
                torch.cat([rows[:mixed][torch.randperm(mixed)], rows[mixed:]])
                for _ in range(self.members)
            ]
        )

    def objective(self, training: Training) -> Objective:
        """Sum over heads of the cross-entropy for each one's image, summed over images."""
        loss = partial(cross_entropy, reduction="sum", label_smoothing=training.label_smoothing)

        def separate(model: nn.Module, batch: Batch) -> Tensor:
            assert isinstance(model, Heads)
            seen = self.inputs(len(batch.y)).to(batch.y.device)
            logits = model.separate([batch.x[index] for index in seen]).float()
            return loss(logits.flatten(0, 1), batch.y[seen].flatten()) / self.batch_repetition

        return separate

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        training = of(bench.training, self.epochs(bench.budget))
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        check_members(model, self.members, bench.data, "mimo", FITS)

        def stepwise(step: int, steps: int) -> float:
            return schedules.steps(step, steps, lr=training.lr, at=STEPS, factor=0.2)

        own = self.published_rate and training.schedule != "constant"
        yield from bench.fit(
            model,
            training,
            seed=derive(bench.seed, "fit", 0),
            rate=stepwise if own else None,
            objective=self.objective(training),
        )
        return Trained(networks=[model])
