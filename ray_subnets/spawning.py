"""From a parent and a recipe to a child: eq. 3.2, `f_i(x) = F(x; theta; xi, phi)`.

`METHODS` is the table of all methods; `tests/test_laws.py` holds every entry to the same laws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_subnets import masks as masks_
from ray_subnets import noisy, sparse
from ray_subnets.masks import Masks, Shapes
from ray_subnets.recipes import ChildSpec, derive

Weights = Mapping[str, Tensor]


def masks_of(spec: ChildSpec, shapes: Shapes) -> Masks:
    """The mask set of a recipe: ones mark the perturbed (noisy) or kept (otherwise) weights.

    With 2 parts the second sibling gets the complement of the first, whatever the density
    (eq. 4.9, 5.3); with more parts each holds `1 / parts` of every layer (eq. 3.11).
    """
    generator = torch.Generator().manual_seed(derive(spec.seed, "mask"))
    if spec.parts > 2:
        return masks_.partition(shapes, spec.parts, generator, draw=spec.draw)[spec.part]
    draw = {"exact": masks_.exact, "bernoulli": masks_.bernoulli}[spec.draw]
    mask = draw(shapes, spec.density, generator)
    return masks_.complement(mask) if spec.part == 1 else mask


def kept_fraction(spec: ChildSpec) -> float:
    """Fraction of each maskable weight that the finished child keeps; 1 if it has no zeros."""
    if not METHODS[spec.method].prunes:
        return 1.0
    return 1 - spec.density if spec.parts == 2 and spec.part == 1 else spec.density


def _noisy(parent: Weights, mask: Masks, shapes: Shapes, spec: ChildSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(derive(spec.seed, "noise"))
    noise = noisy.normals(shapes, generator, mean=spec.mean, sigma=spec.sigma)
    return noisy.perturb(parent, noise, mask, spec.sign)


def _sparse(parent: Weights, mask: Masks, shapes: Shapes, spec: ChildSpec) -> dict[str, Tensor]:
    return sparse.prune(parent, mask)


def _stochastic(parent: Weights, mask: Masks, shapes: Shapes, spec: ChildSpec) -> dict[str, Tensor]:
    # All weights are inherited: those outside the mask act until the temperature is zero.
    if spec.epochs == 0 or spec.tau == 0 or spec.anneal_epochs == 0:
        return sparse.prune(parent, mask)
    return {name: tensor.clone() for name, tensor in parent.items()}


@dataclass(frozen=True)
class Method:
    """One way to make children."""

    spawn: Callable[[Weights, Masks, Shapes, ChildSpec], dict[str, Tensor]]
    prunes: bool
    """weights outside the mask end at zero, and only the others need storing"""
    stochastic: bool = False
    """a temperature brings weights outside the mask back while it is above zero"""


METHODS: dict[str, Method] = {
    "noisy": Method(_noisy, prunes=False),
    "sparse": Method(_sparse, prunes=True),
    "stochastic": Method(_stochastic, prunes=True, stochastic=True),
}


@dataclass(frozen=True)
class Child:
    """A spawned child before tuning: its weights and the mask they were drawn with (CPU)."""

    weights: dict[str, Tensor]
    masks: Masks


def spawn_weights(parent: Weights, shapes: Shapes, spec: ChildSpec) -> Child:
    """Weights of the child `spec` of `parent`; the parent's tensors are read, never written.

    Args:
        parent: a state dict on the CPU (buffers included; they are copied).
        shapes: what may be masked, from `masks.maskable`.

    Raises:
        ValueError: unknown method.
    """
    if spec.method not in METHODS:
        raise ValueError(f"method: unknown method {spec.method!r}; known: {', '.join(METHODS)}")
    mask = masks_of(spec, shapes)
    return Child(METHODS[spec.method].spawn(parent, mask, shapes, spec), mask)


def spawn(parent: nn.Module, spec: ChildSpec) -> nn.Module:
    """A new network: the child `spec` of `parent`, before tuning, on the parent's device.

    Example:
        >>> parent = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> spec = ChildSpec(id="a", method="sparse", seed=1, density=0.5, draw="exact")
        >>> int((spawn(parent, spec)[0].weight == 0).sum())
        16
    """
    shapes = masks_.maskable(parent, classifier=spec.mask_classifier)
    weights = {name: tensor.detach().cpu() for name, tensor in parent.state_dict().items()}
    child = copy.deepcopy(parent)
    child.load_state_dict(spawn_weights(weights, shapes, spec).weights)
    return child
