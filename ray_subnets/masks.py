"""Which weights: the sampling process phi of eq. 3.2 as binary masks.

A mask set is a `dict[str, Tensor]` of bool tensors, keyed by parameter name and shaped like the
parameter; 1 (True) marks a weight that belongs to the subnetwork. `density` is always the fraction
of ones. Draws use an explicit CPU generator and integer or 24-bit uniform numbers only, so the same
generator state gives the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]

_MASKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def maskable(model: nn.Module, *, classifier: bool = False) -> dict[str, torch.Size]:
    """Names and shapes of the weights that a subnetwork may leave out.

    Convolution and linear weights; biases and normalisation parameters never. The last such layer
    in registration order, the classifier, stays dense unless `classifier` is set (convention of
    the dissertation's own code).

    Raises:
        ValueError: nothing is left to mask.
    """
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [
        weights[id(module.weight)] for module in model.modules() if isinstance(module, _MASKABLE)
    ]
    names = list(dict.fromkeys(names))  # a tied weight is one weight
    kept = names if classifier else names[:-1]
    if not kept:
        raise ValueError(
            "model: no convolution or linear layer to mask"
            + ("" if classifier else "; set mask_classifier to include the last layer")
        )
    parameters = dict(model.named_parameters())
    return {name: parameters[name].shape for name in kept}


def exact(shapes: Shapes, density: float, generator: torch.Generator) -> Masks:
    """Masks with exactly `round(density * n)` ones in each layer (local, unstructured, random)."""
    masks = {}
    for name, shape in shapes.items():
        order = torch.randperm(shape.numel(), generator=generator)
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[order[: round(density * shape.numel())]] = True
        masks[name] = mask.view(shape)
    return masks


def bernoulli(shapes: Shapes, density: float, generator: torch.Generator) -> Masks:
    """Masks whose entries are independently one with probability `density` (eq. 4.1, 5.1)."""
    return {
        name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()
    }


def complement(masks: Mapping[str, Tensor]) -> Masks:
    """The anti-mask M' = 1 - M of eq. 3.10."""
    return {name: ~mask for name, mask in masks.items()}


def partition(
    shapes: Shapes, parts: int, generator: torch.Generator, *, draw: str = "exact"
) -> list[Masks]:
    """`parts` disjoint mask sets that together cover every weight once (eq. 3.10, 3.11).

    `exact`: one random permutation of each layer cut into `parts` runs whose lengths differ by at
    most one. `bernoulli`: each weight joins one part, chosen uniformly.

    Returns:
        `parts` mask sets; for every weight exactly one of them is one.
    """
    assert parts >= 1
    assert draw in ("exact", "bernoulli")
    result: list[Masks] = [{} for _ in range(parts)]
    for name, shape in shapes.items():
        n = shape.numel()
        if draw == "exact":
            owner = torch.empty(n, dtype=torch.int16)
            order = torch.randperm(n, generator=generator)
            cuts = [n * part // parts for part in range(parts + 1)]
            for part, (start, stop) in enumerate(pairwise(cuts)):
                owner[order[start:stop]] = part
        else:
            owner = torch.randint(parts, (n,), generator=generator, dtype=torch.int16)
        for part, masks in enumerate(result):
            masks[name] = (owner == part).view(shape)
    return result


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of ones over all masked tensors together."""
    ones = sum(int(mask.sum()) for mask in masks.values())
    return ones / sum(mask.numel() for mask in masks.values())


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cartesian distance of two mask sets: sqrt(sum |a - b|) (eq. 3.13)."""
    return float(sum(int((a[name] ^ b[name]).sum()) for name in a)) ** 0.5


def total_distance(sets: Sequence[Mapping[str, Tensor]]) -> float:
    """Sum of `distance` over all ordered pairs, as eq. 3.14 writes it (each pair counts twice)."""
    return sum(distance(a, b) for a in sets for b in sets)
