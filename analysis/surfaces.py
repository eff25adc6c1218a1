"""The loss around a network's weights: directions, surfaces, lines, sharpness (5.3.2).

`f(a, b) = L(theta + a d + b e)` (eq. 5.6) with two directions that are orthogonal and, filter by
filter, as long as the weights (Li et al. 2018). Biases and norms stay as they are; so do pruned
weights, since the network has none there. Batch-norm statistics are those that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Weights = Mapping[str, Tensor]
Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


def kept(network: nn.Module, *, pruned: bool) -> dict[str, Tensor]:
    """Which weights may move: all, or of a pruned network those that are not zero."""
    return {
        name: (tensor != 0) if pruned else torch.ones_like(tensor, dtype=torch.bool)
        for name, tensor in network.named_parameters()
    }


def directions(
    network: nn.Module, masks: Mapping[str, Tensor], seed: int, count: int = 2
) -> list[dict[str, Tensor]]:
    """Random directions, orthogonal in every filter and so as a whole, filter-normalised.

    A filter is a row of a weight: what leads to one output unit or channel. One that has fewer free
    weights than directions gets zeros in the directions that are too many.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in network.named_parameters():
        if tensor.dim() < 2:
            for one in found:
                one[name] = torch.zeros_like(tensor)
            continue
        rows = tensor.detach().flatten(1).double()
        free = masks[name].flatten(1)
        length = rows.norm(dim=1, keepdim=True)
        earlier: list[Tensor] = []
        for one in found:
            drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * free
            size = drawn.norm(dim=1, keepdim=True)
            for unit in earlier + earlier:  # twice: what rounding left of the first time
                drawn = drawn - (drawn * unit).sum(1, keepdim=True) * unit
            left = drawn.norm(dim=1, keepdim=True)
            unit = torch.where(left > 1e-8 * size, drawn / left.clamp_min(1e-300), 0.0)
            earlier.append(unit)
            one[name] = (unit * length).to(tensor.dtype).view_as(tensor)
    return found


@dataclass(frozen=True)
class Landscape:
    """A network, samples to take its loss on, and two directions. Rows can be made anywhere."""

    network: nn.Module
    x: Tensor
    y: Tensor
    first: Weights
    second: Weights

    @torch.no_grad()
    def at(self, a: float, b: float) -> float:
        """Mean cross-entropy, in nats, of `theta + a d + b e`."""
        weights = {
            name: tensor + a * self.first[name] + b * self.second[name]
            for name, tensor in self.network.named_parameters()
        }
        return loss(self.network, weights, self.x, self.y)

    def row(self, side: int, span: float, index: int) -> np.ndarray:
        """Row `index` of the surface: b fixed, a from -span to span, `(side,)`."""
        steps = np.linspace(-span, span, side)
        return np.array([self.at(float(a), float(steps[index])) for a in steps])


@torch.no_grad()
def loss(network: nn.Module, weights: Weights, x: Tensor, y: Tensor, batch: int = 500) -> float:
    """Mean cross-entropy in nats with these weights in place of the network's; infinite if NaN."""
    network.eval()
    total = 0.0
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        logits = functional_call(network, dict(weights), (part,)).double()
        total += float(cross_entropy(logits, labels, reduction="sum"))
    return total / len(y) if np.isfinite(total) else float("inf")


def surface(
    landscape: Landscape,
    side: int,
    span: float,
    *,
    known: np.ndarray | None = None,
    keep: Callable[[np.ndarray], None] = lambda losses: None,
    mapper: Mapper = map,
) -> np.ndarray:
    """Losses `(side, side)`, rows b, columns a; rows that are known are not made again.

    Args:
        known: of an earlier call; NaN where nothing is known.
        keep: is given all losses after every new row.
        mapper: how rows are made: `map`, or one that spreads them over processes, in order.
    """
    losses = np.full((side, side), np.nan) if known is None else known.copy()
    missing = [i for i in range(side) if np.isnan(losses[i]).any()]
    made = mapper(partial(landscape.row, side, span), missing)
    for i, row in zip(missing, made, strict=True):
        losses[i] = row
        keep(losses)
    return losses


def line(
    a: nn.Module, b: nn.Module, x: Tensor, y: Tensor, steps: Sequence[float]
) -> list[tuple[float, float]]:
    """Loss and accuracy of `(1 - t) a + t b` for every t, buffers between the two as well.

    Raises:
        ValueError: the networks have other shapes.
    """
    one, two = a.state_dict(), b.state_dict()
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in two.items()}:
        raise ValueError("RUN: members have different shapes: there is no line between them")
    found = []
    for t in steps:
        mixed = {
            name: torch.lerp(one[name], two[name], t)
            if one[name].is_floating_point()
            else one[name]
            for name in one
        }
        with torch.no_grad():
            accuracy = (functional_call(a, mixed, (x,)).argmax(1) == y).double().mean()
        found.append((loss(a, mixed, x, y), float(accuracy)))
    return found


def sharpness(
    network: nn.Module,
    masks: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    radius: float = 0.25,
    draws: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """By how many nats the loss rises at `radius`, in units of the filters: mean, standard error.

    Mean over random filter-normalised directions, each there and back, which cancels the slope.
    """
    rises = []
    zero = {name: torch.zeros_like(t) for name, t in network.named_parameters()}
    for draw in range(draws):
        (direction,) = directions(network, masks, seed + draw, count=1)
        there = Landscape(network, x, y, direction, zero)
        rises.append((there.at(radius, 0) + there.at(-radius, 0)) / 2 - there.at(0, 0))
    values = np.array(rises)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(error)
