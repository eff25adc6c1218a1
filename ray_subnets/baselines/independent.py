"""Networks trained each on its own: the single model, and the deep ensemble."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of, shares
from ray_subnets.data import bagged
from ray_subnets.recipes import Count, derive


@dataclass(frozen=True, kw_only=True)
class Independent(Method):
    """One network, trained for the whole budget."""

    title: ClassVar[str] = "single model"
    source: ClassVar[str] = "the same recipe as every row"
    method: Literal["independent"] = "independent"


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Networks from other initial weights, each trained for its share of the budget."""

    title: ClassVar[str] = "deep ensemble"
    source: ClassVar[str] = "Lakshminarayanan et al. 2017"
    method: Literal["dense"] = "dense"
    members: Count = 8
    """networks"""
    fraction: float = 1.0
    """of the training images that each is trained on, drawn for each"""

    def epochs(self, budget: int) -> int:
        return sum(shares(budget, self.members, "members"))

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        networks = []
        for i, epochs in enumerate(shares(bench.budget, self.members, "members")):
            model = self.network(bench.build, derive(bench.seed, "weights", i)).to(bench.device)
            part = bagged(bench.data, self.fraction, derive(bench.seed, "bag", i))
            yield from bench.fit(
                model, of(bench.training, epochs), seed=derive(bench.seed, "fit", i), data=part
            )
            networks.append(model)
        return Trained(networks=networks)


@dataclass(frozen=True, kw_only=True)
class Bagging(Dense):
    """`Dense`, each network on a random part of the images (Table 5.1)."""

    title: ClassVar[str] = "bagging"
    source: ClassVar[str] = "Breiman 1996; subsets without replacement as in Table 5.1"
    method: Literal["bagging"] = "bagging"  # type: ignore[assignment]  # the tag of each class
    fraction: float = 0.9
