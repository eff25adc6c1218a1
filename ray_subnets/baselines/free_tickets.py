"""FreeTickets: ensembles of networks that are sparse from the start (DST and EDST)."""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import nn

from ray_subnets import masks, schedules, supervised
from ray_subnets.baselines.exploring import Exploring, draw, erk
from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of, shares
from ray_subnets.recipes import Count, derive

_INTERVAL = 1000  # steps between updates, published
_UPDATES = 10  # in a shorter training than was published, at least about so many


@dataclass(frozen=True, kw_only=True)
class DST(Method):
    """Independent sparse networks, each for its share of the budget.

    Published (Liu et al. 2022, WRN-28-10 on CIFAR): 3 networks of 250 epochs, density 0.2 by layer
    as Erdos-Renyi-kernel has it, with the classifier; every 1,000 steps half of a layer's weights
    are replaced, to the end; SGD without Nesterov, rate 0.1, a tenth of it after 50 and 75 %.
    """

    title: ClassVar[str] = "DST ensemble"
    source: ClassVar[str] = "Liu et al. 2022 (FreeTickets)"
    deviation: ClassVar[str] = (
        "updates come more often in short trainings, none in the last interval; momentum of new "
        "weights starts from zero; whole layers are left alone"
    )
    method: Literal["dst"] = "dst"
    members: Count = 3
    """networks"""
    density: Annotated[float, Gt(0), Lt(1)] = 0.2
    """fraction of all weights of convolution and linear layers that a network has"""
    interval: Count | None = None
    """optimizer steps between updates; default: 1,000, in short trainings a tenth of the steps"""
    rate: Annotated[float, Gt(0), Lt(1)] = 0.5
    """fraction of a layer's weights that an update replaces"""
    published_rate: bool = True
    """steps of the published training, where the column's rate is not constant"""

    def epochs(self, budget: int) -> int:
        return sum(shares(budget, self.members, "members"))

    def _explore(
        self,
        bench: Bench,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        seed: int,
        keeps: list[int],
        escape: float = 0.0,
    ) -> Exploring:
        """Random masks on the network. `keeps`: epochs after which a network is kept."""
        shapes = masks.maskable(model, classifier=True)
        drawn = draw(shapes, erk(shapes, self.density), seed)
        steps = bench.batches(bench.training.batch_size, 0).steps
        spans = [end - start for start, end in zip([0, *keeps], keeps, strict=False)]
        often = min(_INTERVAL, max(1, steps * min(spans) // _UPDATES))
        return Exploring(
            dict(model.named_parameters()),
            drawn,
            optimizer,
            interval=self.interval or often,
            keeps=[steps * epoch for epoch in keeps],
            rate=self.rate,
            escape=escape,
        )

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        own = self.published_rate and bench.training.schedule != "constant"

        def stepwise(step: int, steps: int) -> float:
            return schedules.steps(step, steps, lr=bench.training.lr, at=(0.5, 0.75))

        networks, kept = [], []
        for i, epochs in enumerate(shares(bench.budget, self.members, "members")):
            model = self.network(bench.build, derive(bench.seed, "weights", i)).to(bench.device)
            training = of(bench.training, epochs, nesterov=False)
            optimizer = supervised.make_optimizer(model, training)
            seed = derive(bench.seed, "mask", i)
            topology = self._explore(bench, model, optimizer, seed, [epochs])
            yield from bench.fit(
                model,
                training,
                seed=derive(bench.seed, "fit", i),
                topology=topology,
                optimizer=optimizer,
                rate=stepwise if own else None,
                density=topology.density,
            )
            networks.append(model)
            kept.append(topology.density)
        return Trained(networks=networks, kept=kept)


@dataclass(frozen=True, kw_only=True)
class EDST(DST):
    """One sparse training that leaves several networks: it explores, then refines and escapes.

    Published (WRN-28-10 on CIFAR): 150 epochs at rate 0.1; then for each network 50 at 0.01 and 50
    at 0.001, after which it is kept and 80 % of the weights of each layer are replaced at once. 3
    networks of density 0.2, or 7 of 0.1. The budget is divided in these proportions.
    """

    title: ClassVar[str] = "EDST ensemble"
    deviation: ClassVar[str] = (
        DST.deviation
        + "; the last network of each refinement is kept, there the best on validation"
    )
    method: Literal["edst"] = "edst"  # type: ignore[assignment]  # the tag of each class
    escape: Annotated[float, Gt(0), Lt(1)] = 0.8
    """fraction of a layer's weights that is replaced after a network was kept"""

    def phases(self, budget: int) -> tuple[int, list[int]]:
        """Epochs of exploration, and of each refinement.

        Raises:
            ValueError: the budget is too small.
        """
        if budget <= self.members:
            raise ValueError(
                f"members: {self.members} need {self.members + 1} epochs or more, "
                f"the budget is {budget}"
            )
        explore = round(budget * 150 / (150 + 100 * self.members))
        explore = min(max(1, explore), budget - self.members)
        return explore, shares(budget - explore, self.members, "members")

    def epochs(self, budget: int) -> int:
        self.phases(budget)
        return budget

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        explore, refine = self.phases(bench.budget)
        training = of(bench.training, bench.budget, nesterov=False)
        own = self.published_rate and training.schedule != "constant"

        def high(step: int, steps: int) -> float:
            return training.lr

        def low(step: int, steps: int) -> float:
            return 0.1 * schedules.steps(step, steps, lr=training.lr, at=(0.5,))

        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        optimizer = supervised.make_optimizer(model, training)
        keeps = [explore + sum(refine[: i + 1]) for i in range(self.members)]
        seed = derive(bench.seed, "mask", 0)
        topology = self._explore(bench, model, optimizer, seed, keeps, self.escape)
        networks, kept = [], []
        for i, epochs in enumerate([explore, *refine]):
            yield from bench.fit(
                model,
                of(training, epochs),
                seed=derive(bench.seed, "fit", i),
                topology=topology,
                optimizer=optimizer,
                rate=(low if i else high) if own else None,
                density=topology.density,
            )
            if i:
                networks.append(copy.deepcopy(model))
                kept.append(topology.density)
        return Trained(networks=networks, kept=kept)
