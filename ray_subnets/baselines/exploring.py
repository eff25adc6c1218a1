"""Sparse from the start, and looking for better weights while training: dynamic sparse training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ray_subnets import masks
from ray_subnets.masks import Masks, Shapes
from ray_subnets.topology import Fixed


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Density of each layer, in proportion to `sum(shape) / prod(shape)` (Erdos-Renyi-kernel).

    Layers that would have more than all their weights have all; the others share what is left, so
    that all layers together have `density`. Source: Evci et al. 2020, eq. 2 and its code.
    """
    assert 0 < density <= 1
    dense: set[str] = set()
    wanted = density * sum(shape.numel() for shape in shapes.values())
    while True:
        left = wanted - sum(shapes[name].numel() for name in dense)
        free = {name: shape for name, shape in shapes.items() if name not in dense}
        scale = left / sum(sum(shape) for shape in free.values()) if free else 0.0
        found = {name: scale * sum(shape) / shape.numel() for name, shape in free.items()}
        most = max(found.values(), default=0.0)
        if most <= 1:
            return {name: found.get(name, 1.0) for name in shapes}
        dense |= {name for name, value in found.items() if value == most}


def draw(shapes: Shapes, densities: Mapping[str, float], seed: int) -> Masks:
    """Random masks with exact counts, one weight or more in each layer."""
    generator = torch.Generator().manual_seed(seed)
    found: Masks = {}
    for name, shape in shapes.items():
        density = max(densities[name], 1 / shape.numel())
        found |= masks.exact({name: shape}, density, generator)
    return found


class Exploring(Fixed):
    """Every `interval` steps the smallest weights of each layer give way to as many others: those
    with the largest gradient of the current batch, which start from zero.

    Layers that are whole stay as they are. Counts of layers never change.

    Args:
        interval: optimizer steps between updates. There is none within one interval before a
            network is kept: weights that start from zero need time.
        rate: fraction of a layer's weights that is replaced.
        keeps: steps, counted from the start, after which a network is kept.
        escape: fraction that is replaced in the first step after one was kept.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: Masks,
        optimizer: torch.optim.Optimizer,
        *,
        interval: int,
        keeps: Sequence[int],
        rate: float = 0.5,
        escape: float = 0.0,
    ) -> None:
        super().__init__(parameters, masks)
        self._optimizer = optimizer
        self._interval, self._rate = interval, rate
        self._keeps, self._escape = sorted(keeps), escape
        self._steps = 0
        super().after_step()  # what is not in the masks is zero from the start

    @property
    def density(self) -> dict[str, float]:
        """Of each layer that is not whole."""
        parts = {name: int(mask.sum()) / mask.numel() for name, mask in self.masks.items()}
        return {name: part for name, part in parts.items() if part < 1}

    def after_step(self) -> None:
        super().after_step()
        self._steps += 1
        end = next((keep for keep in self._keeps if keep >= self._steps), self._steps)
        if self._steps - 1 in self._keeps:
            self._replace(self._escape)
        elif self._steps % self._interval == 0 and end - self._steps >= self._interval:
            self._replace(self._rate)

    @torch.no_grad()
    def _replace(self, rate: float) -> None:
        new = {}
        for name, mask in self.masks.items():
            weight, active = self._parameters[name], mask.reshape(-1)
            count = math.ceil(rate * int(active.sum()))
            if weight.grad is None or bool(active.all()):
                new[name] = mask
                continue
            size = weight.abs().reshape(-1).masked_fill(~active, math.inf)
            kept = active.clone()
            kept[size.argsort(stable=True)[:count]] = False
            slope = weight.grad.abs().reshape(-1).masked_fill(kept, -1.0)
            grown = torch.zeros_like(kept)
            grown[slope.argsort(descending=True, stable=True)[:count]] = True
            fresh = grown.view(mask.shape)
            new[name] = (kept | grown).view(mask.shape)
            weight[fresh] = 0.0
            for state in self._optimizer.state[weight].values():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    state[fresh] = 0.0  # of gradients that it did not follow
        self._use(new)
        super().after_step()

    def state(self) -> dict[str, Tensor]:
        held = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return held | {"steps": torch.tensor(self._steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._use({name: state[f"mask.{name}"].bool() for name in self.masks})
        self._steps = int(state["steps"])
