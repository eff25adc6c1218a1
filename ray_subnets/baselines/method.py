"""What a method of the benchmark is given, and what it gives back.

A method trains ordinary networks by the same loop, on the same data, as everything else here. What
makes it this method is the network it builds from the user's own, the stages it trains in, and the
networks it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ray_subnets.data import Batches, Data
from ray_subnets.recipes import Epoch, Note, Training, derive
from ray_subnets.supervised import Objective, Rate
from ray_subnets.topology import Topology

Build = Callable[[int], nn.Module]
"""A seed -> the user's network with initial weights drawn from it, `(N, *shape)` -> `(N, C)`."""
Progress = Epoch | Note


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a method gives.

    Each network answers in evaluation mode with logits `(N, C)`, or `(K, N, C)` where one network
    is K members. It may say in an attribute `passes` how many passes through it an answer takes
    (default 1).
    """

    networks: Sequence[nn.Module]
    kept: Sequence[Mapping[str, float]] = ()
    """for each network the fraction of each weight that is not zero; whole ones left out"""


class Bench(Protocol):
    """Where a method is trained."""

    data: Data
    device: torch.device
    budget: int
    """epochs that the method may take in all"""
    training: Training
    """optimizer, rate and schedule of this column; its `epochs` are the budget"""
    seed: int

    def build(self, seed: int) -> nn.Module:
        """The run's network, see `Build`, on this bench's device."""

    def batches(self, batch_size: int, seed: int, data: Data | None = None) -> Batches:
        """Training batches, of `data` in place of all of it."""

    def fit(
        self,
        model: nn.Module,
        training: Training,
        *,
        seed: int,
        data: Data | None = None,
        topology: Topology | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        rate: Rate | None = None,
        objective: Objective | None = None,
        density: Mapping[str, float] | None = None,
    ) -> Generator[Progress, None, None]:
        """Train `model` in place, for `training.epochs` epochs: one stage of the method.

        The stages of a method come in a fixed order; one that was finished before is read from its
        checkpoint. Everything else that a method does must follow from the seed and the weights.

        Args:
            data: to train on a part of the images.
            topology: which weights act, see `supervised.train`.
            optimizer: to go on with; default: a new one, as `training` says.
            rate: learning rate in place of the schedule of `training`.
            objective: loss in place of cross-entropy, see `supervised.train`.
            density: fraction of each weight that is not zero, for counting FLOPs.
        """


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make an ensemble, or a single model to compare with. Subclasses are its options."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    title: ClassVar[str]
    """in tables"""
    source: ClassVar[str]
    """who described it"""
    deviation: ClassVar[str] = ""
    """how this differs from the source, beside what a budget changes"""

    def epochs(self, budget: int) -> int:
        """Passes over the training images that it takes of a budget.

        Raises:
            ValueError: the budget is too small for it; one line that names the option.
        """
        return budget

    def network(self, build: Build, seed: int) -> nn.Module:
        """The network that it trains, with initial weights; also the one that is loaded later.

        Raises:
            ValueError: the method does not fit this network; says why, and which ones fit.
        """
        return build(seed)

    def answering(self, network: nn.Module) -> nn.Module:
        """What answers, given a network of `network` with its weights; it has the same ones."""
        return network

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        """Make the networks.

        The default trains one `network` by the plain loop.
        """
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        yield from bench.fit(model, bench.training, seed=derive(bench.seed, "fit", 0))
        return Trained(networks=[model])


def shares(total: int, parts: int, what: str) -> list[int]:
    """`total` epochs in `parts` that differ by one at most, the longer ones last.

    Raises:
        ValueError: fewer epochs than parts; `what` names the option.
    """
    if total < parts:
        raise ValueError(f"{what}: {parts} need {parts} epochs or more, the budget is {total}")
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def of(training: Training, epochs: int, **changes: Any) -> Training:
    """The same training for another number of epochs."""
    return replace(training, epochs=epochs, **changes)
