"""Which weights: the sampling process phi of eq. 3.2 as binary masks.

A mask set is a `dict[str, Tensor]` of bool tensors, keyed by parameter name and shaped like the
parameter; 1 (True) marks a weight that belongs to the subnetwork. `density` is always the fraction
of ones. Draws use an explicit CPU generator and integers only, so the same generator state gives
the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import draws

Masks = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]

MASKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""layers with weights that a subnetwork may leave out"""


def maskable(
    model: nn.Module, *, classifier: bool = False, whole: Sequence[str] = ()
) -> dict[str, torch.Size]:
    """Names and shapes of the weights that a subnetwork may leave out.

    Convolution and linear weights; biases and normalisation parameters never. The last such layer
    in registration order, the classifier, stays dense unless `classifier` is set (convention of
    the dissertation's own code).

    Args:
        whole: names, or patterns, of weights that stay dense too.

    Raises:
        ValueError: nothing is left to mask, or there is no such weight.
    """
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    names = []
    for path, module in model.named_modules():
        if isinstance(module, MASKABLE):
            name = weights.get(id(module.weight))
            if name is None:
                raise ValueError(
                    f"model: {path}.weight is computed from other tensors (a parametrization, such "
                    "as weight_norm); make it a weight again first: "
                    "torch.nn.utils.parametrize.remove_parametrizations"
                )
            names.append(name)
    names = list(dict.fromkeys(names))  # a tied weight is one weight
    kept = names if classifier else names[:-1]
    for pattern in whole:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(
                f"whole: no weight that could be masked is named {pattern!r}; there are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    some = [name for name in kept if not any(_fits(name, one) for one in whole)]
    if kept and not some:
        raise ValueError(f"whole: {', '.join(whole)} leaves no weight to mask; name fewer")
    kept = some
    if not kept:
        raise ValueError(
            "model: no convolution or linear layer to mask"
            + ("" if classifier else "; set mask_classifier to include the last layer")
        )
    parameters = dict(model.named_parameters())
    return {name: parameters[name].shape for name in kept}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may have a `[`


@torch.no_grad()
def output_layer(model: nn.Module, x: Tensor) -> str | None:
    """The weight of the classifier, wherever it was registered: of the layer whose output is the
    answer, or else of the one that is asked last; None if no layer that may be masked is asked."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    asked: list[tuple[str, Tensor]] = []
    training = model.training
    with ExitStack() as hooks:
        for module in model.modules():
            name = names.get(id(module.weight)) if isinstance(module, MASKABLE) else None
            if name is not None:
                note = partial(_note, asked, name)
                hooks.callback(module.register_forward_hook(note).remove)
        model.eval()
        try:
            answer = model(x)
        finally:
            model.train(training)
    given = [name for name, output in asked if _equal(output, answer)]
    return given[-1] if given else asked[-1][0] if asked else None


def _equal(output: Tensor, answer: object) -> bool:
    return isinstance(answer, Tensor) and torch.equal(output, answer)


def _note(asked: list[tuple[str, Tensor]], name: str, *given: Any) -> None:
    asked.append((name, given[-1].clone()))


def _split(flat: Tensor, shapes: Shapes) -> Masks:
    """One flat vector over all layers, cut into tensors of their shapes."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _pool(shapes: Shapes, scope: str) -> list[Shapes]:
    """Which layers share one count: each its own (local) or all of them (global)."""
    assert scope in ("local", "global")
    return [shapes] if scope == "global" else [{name: shape} for name, shape in shapes.items()]


def _numel(shapes: Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())


def exact(
    shapes: Shapes, density: float, generator: torch.Generator, *, scope: str = "local"
) -> Masks:
    """Masks with exactly `round(density * n)` ones, at random places.

    `scope`: n is the size of each layer (local), or of all together (global; section 3.2.1).
    """
    masks: Masks = {}
    for pool in _pool(shapes, scope):
        n = _numel(pool)
        mask = torch.zeros(n, dtype=torch.bool)
        mask.numpy()[draws.shuffled(n, generator).numpy()[: round(density * n)]] = True
        masks |= _split(mask, pool)
    return masks


def bernoulli(shapes: Shapes, density: float, generator: torch.Generator) -> Masks:
    """Masks whose entries are independently one with probability `density` (eq. 4.1, 5.1)."""
    return _split(draws.coins(_numel(shapes), density, draws.seed_from(generator)), shapes)


def magnitude(
    weights: Mapping[str, Tensor], shapes: Shapes, density: float, *, scope: str = "local"
) -> Masks:
    """Masks of the `round(density * n)` largest |w| (L1 pruning keeps them; section 6.3.1).

    Of equal ones the first stays. `scope` as in `exact`.
    """
    masks: Masks = {}
    for pool in _pool(shapes, scope):
        size = torch.cat([weights[name].detach().abs().reshape(-1) for name in pool])
        order = size.argsort(descending=True, stable=True)
        mask = torch.zeros(len(size), dtype=torch.bool)
        mask[order[: round(density * len(size))].cpu()] = True
        masks |= _split(mask, pool)
    return masks


def layers(
    shapes: Shapes,
    density: float,
    generator: torch.Generator,
    *,
    draw: str = "exact",
    sizes: Mapping[str, float] | None = None,
) -> Masks:
    """Masks of whole layers: all ones or all zeros (layer-level structure, section 3.2.1).

    Args:
        density: fraction of layers kept (exact), or the chance of each (bernoulli).
        sizes: keep the layers of largest size (mean |w|) instead of random ones.
    """
    one = {name: torch.Size([1]) for name in shapes}
    if sizes is not None:
        chosen = magnitude(
            {name: torch.tensor([sizes[name]]) for name in one}, one, density, scope="global"
        )
    elif draw == "exact":
        chosen = exact(one, density, generator, scope="global")
    else:
        chosen = bernoulli(one, density, generator)
    return {name: chosen[name].expand(shape).clone() for name, shape in shapes.items()}


def complement(masks: Mapping[str, Tensor]) -> Masks:
    """The anti-mask M' = 1 - M of eq. 3.10."""
    return {name: ~mask for name, mask in masks.items()}


def partition(
    shapes: Shapes,
    parts: int,
    generator: torch.Generator,
    *,
    draw: str = "exact",
    scope: str = "local",
) -> list[Masks]:
    """`parts` disjoint mask sets that together cover every weight once (eq. 3.10, 3.11).

    `exact`: one random permutation of each layer (or of all together: `scope`) cut into `parts`
    runs whose lengths differ by at most one. `bernoulli`: each weight joins one part, chosen
    uniformly.

    Returns:
        `parts` mask sets; for every weight exactly one of them is one.
    """
    assert parts >= 1
    assert draw in ("exact", "bernoulli")
    result: list[Masks] = [{} for _ in range(parts)]
    for pool in _pool(shapes, scope):
        n = _numel(pool)
        if draw == "exact":
            owner = torch.empty(n, dtype=torch.int16)
            order = draws.shuffled(n, generator)
            cuts = [n * part // parts for part in range(parts + 1)]
            for part, (start, stop) in enumerate(pairwise(cuts)):
                owner[order[start:stop]] = part
        else:
            owner = torch.randint(parts, (n,), generator=generator, dtype=torch.int16)
        for part, masks in enumerate(result):
            masks |= _split(owner == part, pool)
    return result


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of layers of which nothing is left: no signal passes them."""
    return [name for name, mask in masks.items() if not mask.any()]


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
