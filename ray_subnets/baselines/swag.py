"""SWAG: networks drawn from a Gaussian about the mean of the last part of training."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ray_subnets.baselines.method import Bench, Progress, Trained
from ray_subnets.baselines.trajectory import SWA, recompute_norm
from ray_subnets.recipes import Count, NonNegative, derive


class Gaussian:
    """Mean, variance and the last `rank` deviations of vectors that come one by one."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.mean, self.squares = torch.zeros(()), torch.zeros(())
        self.deviations: list[Tensor] = []

    def add(self, vector: Tensor) -> None:
        self.count += 1
        before = vector - self.mean
        self.mean = self.mean + before / self.count
        after = vector - self.mean
        self.squares = self.squares + before * after  # about the mean (Welford 1962)
        self.deviations = [*self.deviations, after][-self.rank :]

    def draw(self, scale: float, generator: torch.Generator) -> Tensor:
        """Half of the covariance is diagonal, half of rank `rank` (eq. 1 of the paper)."""
        spread = (self.squares / self.count).sqrt()
        each = torch.randn(len(self.mean), generator=generator)
        shared = torch.randn(len(self.deviations), generator=generator)
        low = torch.stack(self.deviations, 1) @ shared / (len(self.deviations) - 1) ** 0.5
        return self.mean + scale * 0.5**0.5 * (spread * each + low)


@dataclass(frozen=True, kw_only=True)
class SWAG(SWA):
    """As `SWA`, but networks are drawn about the mean, with the covariance of the path.

    Published (Maddox et al. 2019): weights after each of the last 140 of 300 epochs, rank 20, 30
    networks, batch-norm statistics of each from all training images.
    """

    title: ClassVar[str] = "SWAG"
    source: ClassVar[str] = "Maddox et al. 2019"
    deviation: ClassVar[str] = (
        "10 networks, not 30; batch-norm statistics of each take a pass without training, which "
        "the budget does not count"
    )
    method: Literal["swag"] = "swag"  # type: ignore[assignment]  # the tag of each class
    samples: Count = 10
    """networks that are drawn"""
    rank: Annotated[int, Ge(2)] = 20
    """deviations that are kept"""
    scale: NonNegative = 1.0
    """factor of the deviations"""

    def _trunk(self, budget: int) -> int:
        trunk = super()._trunk(budget)
        if budget - trunk < 2:
            raise ValueError(
                f"start: leaves one epoch of the budget of {budget}, a covariance needs two"
            )
        return trunk

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        found = Gaussian(self.rank)

        def collect(model: nn.Module) -> None:
            weights = [parameter.detach().reshape(-1) for parameter in model.parameters()]
            found.add(torch.cat(weights).cpu())

        yield from self.walk(bench, collect)
        networks = []
        for i in range(self.samples):
            model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
            generator = torch.Generator().manual_seed(derive(bench.seed, "sample", i))
            weights = list(model.parameters())
            parts = found.draw(self.scale, generator).split([one.numel() for one in weights])
            with torch.no_grad():
                for weight, part in zip(weights, parts, strict=True):
                    weight.copy_(part.view(weight.shape))
            recompute_norm(model, bench)
            networks.append(model)
        return Trained(networks=networks)
