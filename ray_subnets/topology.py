"""Which weights act while a child is tuned: fixed, removed step by step, or drawn each time.

A topology holds a network's own parameters and masks beside them. The training loop asks it three
things: at the start of an epoch, before a forward pass, and after an optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ray_subnets import sparse
from ray_subnets.masks import Masks


class Topology(Protocol):
    """What `supervised.train` needs to know of a child that is not dense."""

    masks: Masks
    """the subnetwork as it is now; at the end of training, the finished child's"""

    def start_epoch(self, epoch: int) -> None:
        """Epoch `epoch` (from 0) begins; weights may have been restored from a checkpoint."""

    def weights(self, epoch: float, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Weights that the next forward pass sees in place of the parameters; None: these."""

    def after_step(self) -> None:
        """The optimizer has changed the parameters; their gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and optimizer for training to go on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; weights were restored before."""


class Fixed:
    """Weights outside the masks stay zero (ch. 5)."""

    def __init__(self, parameters: Mapping[str, Tensor], masks: Masks) -> None:
        self._parameters = parameters
        self._use(masks)

    def _use(self, masks: Masks) -> None:
        device = next(iter(self._parameters.values())).device
        self.masks = {name: mask.to(device) for name, mask in masks.items()}
        self._held = [self._parameters[name] for name in masks]
        self._factors = [
            mask.to(weight.dtype)
            for mask, weight in zip(self.masks.values(), self._held, strict=True)
        ]

    def start_epoch(self, epoch: int) -> None:
        pass

    def weights(self, epoch: float, generator: torch.Generator) -> dict[str, Tensor] | None:
        return None

    def after_step(self) -> None:
        sparse.hold_zero_(self._held, self._factors)

    def state(self) -> dict[str, Tensor]:
        return {}  # follows from recipe, epoch and weights

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


class Iterative(Fixed):
    """Weights are removed in equal numbers at the start of each of the first `epochs` epochs, and
    stay zero from then on (the iterative pruning of section 6.3.1).

    Args:
        masks: the target.
        order: name -> rank of each weight, (0, 1], in which those outside the target go; None:
            the smallest of what is left go first, however large they were in the parent
            (`masks` then only says how many stay in each layer).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: Masks,
        epochs: int,
        order: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(parameters, {name: torch.ones_like(m) for name, m in masks.items()})
        self._target = {name: mask.to(self.masks[name].device) for name, mask in masks.items()}
        self._epochs = epochs
        self._order = order

    def start_epoch(self, epoch: int) -> None:
        done = min(1.0, (epoch + 1) / self._epochs)
        if epoch >= self._epochs:
            if self._order is None:  # after a restart the weights say which are left
                self._use({name: self._parameters[name].detach() != 0 for name in self._target})
            else:
                self._use(self._target)
            return
        self._use({name: self._left(name, done) for name in self._target})
        self.after_step()

    def _left(self, name: str, done: float) -> Tensor:
        """The mask of `name` when the fraction `done` of its removals is done."""
        target, weight = self._target[name], self._parameters[name].detach()
        if self._order is not None:
            return target | (self._order[name].to(target.device) > done)
        n = weight.numel()
        keep = n - round((n - int(target.sum())) * done)
        order = weight.abs().reshape(-1).argsort(descending=True, stable=True)
        mask = torch.zeros(n, dtype=torch.bool, device=weight.device)
        mask[order[:keep]] = True
        return mask.view(weight.shape)


class Draw(Protocol):
    """A fresh Bernoulli mask for every forward pass; None once annealing is over."""

    def to(self, device: torch.device) -> None:
        """Keep what is needed for drawing on this device."""

    def __call__(self, epoch: float, generator: torch.Generator) -> Masks | None: ...


class Annealed(Fixed):
    """Every forward pass draws its own mask (algorithm 3) and nothing is held at zero; when
    annealing is over weights outside the masks are pruned and held.

    Args:
        masks: the target.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masks: Masks, draw: Draw) -> None:
        super().__init__(parameters, masks)
        self._draw = draw
        draw.to(next(iter(self.masks.values())).device)
        self._annealing = True

    def weights(self, epoch: float, generator: torch.Generator) -> dict[str, Tensor] | None:
        drawn = self._draw(epoch, generator)
        self._annealing = drawn is not None
        if drawn is None:
            super().after_step()
            return None
        seen = {}
        for name, mask in drawn.items():
            weight = self._parameters[name]
            seen[name] = weight * mask.to(weight.device)
        return seen

    def after_step(self) -> None:
        if not self._annealing:
            super().after_step()
