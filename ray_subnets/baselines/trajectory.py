"""Members, or an average, along the path of one training: snapshots, fast geometric, SWA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt, MultipleOf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ray_subnets import schedules, supervised
from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of, shares
from ray_subnets.recipes import Count, Positive, derive


@dataclass(frozen=True, kw_only=True)
class Snapshot(Method):
    """One training whose rate falls by half a cosine and jumps back; a member at each end."""

    title: ClassVar[str] = "snapshot"
    source: ClassVar[str] = "Huang et al. 2017"
    method: Literal["snapshot"] = "snapshot"
    cycles: Count = 4
    """members: one each, all are kept"""

    def epochs(self, budget: int) -> int:
        return sum(shares(budget, self.cycles, "cycles"))

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        optimizer = supervised.make_optimizer(model, bench.training)  # not reset at a restart
        constant = bench.training.schedule == "constant"
        networks = []
        for i, epochs in enumerate(shares(bench.budget, self.cycles, "cycles")):
            cycle = of(bench.training, epochs, schedule="constant" if constant else "cosine")
            seed = derive(bench.seed, "fit", i)
            yield from bench.fit(model, cycle, seed=seed, optimizer=optimizer)
            networks.append(copy.deepcopy(model))
        return Trained(networks=networks)


@dataclass(frozen=True, kw_only=True)
class FastGeometric(Method):
    """Training stopped early, then short cycles of the rate; a member where it is lowest."""

    title: ClassVar[str] = "fast geometric"
    source: ClassVar[str] = "Garipov et al. 2018"
    deviation: ClassVar[str] = (
        "one run of cycles, from one checkpoint; rates from a half to a two-hundredth of the "
        "column's, which Table 5.2 does not state"
    )
    method: Literal["fge"] = "fge"
    members: Count = 4
    """networks, one for each cycle"""
    cycle: Annotated[int, Gt(0), MultipleOf(2)] = 2
    """epochs of a cycle; the rate is lowest half way"""
    high: Positive = 0.5
    """highest rate of a cycle, in units of the column's"""
    low: Positive = 0.005
    """lowest rate of a cycle, in units of the column's"""

    def _trunk(self, budget: int) -> int:
        trunk = budget - self.cycle // 2 - self.cycle * (self.members - 1)
        if trunk < 1:
            raise ValueError(
                f"members: {self.members} cycles of {self.cycle} epochs leave none of the budget "
                f"of {budget} for training before them; use fewer"
            )
        return trunk

    def epochs(self, budget: int) -> int:
        self._trunk(budget)
        return budget

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        training, trunk = (
            of(bench.training, bench.budget, nesterov=False),
            self._trunk(bench.budget),
        )
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        optimizer = supervised.make_optimizer(model, training)
        constant = training.schedule == "constant"

        def whole(step: int, steps: int) -> float:
            """The schedule of the whole budget, which is stopped at `trunk`."""
            return schedules.decay(step, steps * bench.budget // trunk, lr=training.lr)

        def down(step: int, steps: int) -> float:
            return training.lr * (self.high + (self.low - self.high) * step / steps)

        def up(step: int, steps: int) -> float:
            return training.lr * (self.low + (self.high - self.low) * step / steps)

        networks = []
        for i in range(self.members):
            first = i == 0
            legs = [(trunk, whole)] if first else [(self.cycle // 2, up)]
            for j, (epochs, rate) in enumerate([*legs, (self.cycle // 2, down)]):
                yield from bench.fit(
                    model,
                    of(training, epochs),
                    seed=derive(bench.seed, "fit", i, j),
                    optimizer=optimizer,
                    rate=None if constant else rate,
                )
            networks.append(copy.deepcopy(model))
        return Trained(networks=networks)


@dataclass(frozen=True, kw_only=True)
class SWA(Method):
    """One network: the mean of the weights after each epoch of the last part of training."""

    title: ClassVar[str] = "SWA"
    source: ClassVar[str] = "Izmailov et al. 2018"
    deviation: ClassVar[str] = "batch-norm statistics take one more pass without training"
    method: Literal["swa"] = "swa"
    start: Annotated[float, Gt(0), Lt(1)] = 0.75
    """fraction of the budget before averaging begins"""
    rate: Positive = 0.5
    """constant rate while averaging, in units of the column's"""

    def _trunk(self, budget: int) -> int:
        trunk = round(budget * self.start)
        if not 0 < trunk < budget:
            raise ValueError(f"start: leaves no epoch of the budget of {budget} to average")
        return trunk

    def epochs(self, budget: int) -> int:
        self._trunk(budget)
        return budget

    def walk(
        self, bench: Bench, collect: Callable[[nn.Module], None]
    ) -> Generator[Progress, None, None]:
        """Train for the whole budget; the network is shown after each epoch of the last part."""
        training, trunk = bench.training, self._trunk(bench.budget)
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        optimizer = supervised.make_optimizer(model, training)
        constant = training.schedule == "constant"

        def falling(step: int, steps: int) -> float:
            """To the averaging's rate, as the published training does."""
            low = self.rate
            return schedules.decay(step, steps, lr=training.lr, lr_final_fraction=low)

        def level(step: int, steps: int) -> float:
            return training.lr * self.rate

        seed = derive(bench.seed, "fit", 0)
        trunk_rate = None if constant else falling
        yield from bench.fit(
            model, of(training, trunk), seed=seed, optimizer=optimizer, rate=trunk_rate
        )
        for i in range(bench.budget - trunk):
            yield from bench.fit(
                model,
                of(training, 1),
                seed=derive(bench.seed, "fit", 1 + i),
                optimizer=optimizer,
                rate=None if constant else level,
            )
            collect(model)

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        mean = AveragedModel(model)  # the first network takes its place
        yield from self.walk(bench, mean.update_parameters)
        averaged: nn.Module = mean.module
        recompute_norm(averaged, bench)
        return Trained(networks=[averaged])


def recompute_norm(model: nn.Module, bench: Bench) -> None:
    """Batch-norm statistics of weights that were not trained, from one epoch of the bench's."""
    batches = bench.batches(bench.training.batch_size, derive(bench.seed, "norm"))
    supervised.recompute_norm(model, batches)
