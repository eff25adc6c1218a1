"""From a parent and a recipe to a child: eq. 3.2, `f_i(x) = F(x; theta; xi, phi)`.

`subnetwork` is phi, which weights; `METHODS` is the table of all xi, what happens to them;
`tests/test_laws.py` holds every entry to the same laws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ray_subnets import masks as masks_
from ray_subnets import noisy, sparse, structured
from ray_subnets.masks import Masks, Shapes
from ray_subnets.recipes import ChildSpec, derive
from ray_subnets.structured import Coupled, Kept

Weights = Mapping[str, Tensor]
KINDS = {
    "unit": structured.KINDS,
    "neuron": frozenset({"neuron"}),
    "channel": frozenset({"channel"}),
}


@dataclass(frozen=True)
class Anatomy:
    """What of a network a subnetwork may leave out."""

    shapes: Shapes
    """weights that may be masked"""
    parameters: Shapes
    """all parameters"""
    units: Sequence[Coupled] = ()
    """neurons and channels that can be removed; only for structured recipes"""


def anatomy(
    model: nn.Module,
    spec: ChildSpec,
    input_shape: Sequence[int] | None,
    input_dtype: torch.dtype = torch.float32,
) -> Anatomy:
    """Of `model`, as far as `spec` needs it.

    Raises:
        ValueError: nothing in it can be masked or removed, or `input_shape` is needed.
    """
    shapes = masks_.maskable(model, classifier=spec.mask_classifier, whole=spec.whole)
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    if spec.structure not in KINDS:
        return Anatomy(shapes, parameters)
    if input_shape is None:
        raise ValueError("input_shape: needed to find the units of a network; give it to spawn")
    units = structured.coupled_units(
        model, input_shape, input_dtype, classifier=spec.mask_classifier
    )
    if not any(one.kinds <= KINDS[spec.structure] for one in units):
        raise ValueError(
            f"structure: this network has no {spec.structure} that could be removed; use "
            "structure: weight"
        )
    return Anatomy(shapes, parameters, units)


@dataclass(frozen=True)
class Subnetwork:
    """Ones mark the perturbed (noisy) or kept (otherwise) part of a network."""

    masks: Masks
    """by parameter name; with `kept` also of biases and normalisation"""
    kept: Kept | None = None
    """units that stay, for structured recipes"""
    siblings: Sequence[Masks | Kept] = field(default=(), repr=False)
    """of k > 2 parts: the masks (or kept units) of all, in order"""

    @property
    def target(self) -> Masks | Kept:
        """What is drawn: units where there are units, else weights."""
        return self.masks if self.kept is None else self.kept


def subnetwork(spec: ChildSpec, body: Anatomy, parent: Weights) -> Subnetwork:
    """The subnetwork of a recipe: phi of eq. 3.2.

    With 2 parts the second sibling gets the complement of the first, whatever the density
    (eq. 4.9, 5.3); with more parts each holds `1 / parts` of every layer (eq. 3.11).

    Args:
        parent: read for the magnitude criterion only.
    """
    generator = torch.Generator().manual_seed(derive(spec.seed, "mask"))
    if spec.structure in KINDS:
        return _unit_subnetwork(spec, body, parent, generator)
    if spec.parts > 2:
        some = dict.fromkeys(body.shapes, torch.Size([1])) if spec.structure == "layer" else None
        sets = masks_.partition(
            some or body.shapes,
            spec.parts,
            generator,
            draw=spec.draw,
            scope="global" if some else spec.scope,
        )
        if some:
            sets = [
                {name: one[name].expand(shape).clone() for name, shape in body.shapes.items()}
                for one in sets
            ]
        return Subnetwork(sets[spec.part], siblings=sets)
    if spec.structure == "layer":
        sizes = None
        if spec.criterion == "magnitude":
            sizes = {name: float(parent[name].double().abs().mean()) for name in body.shapes}
        mask = masks_.layers(body.shapes, spec.density, generator, draw=spec.draw, sizes=sizes)
    elif spec.criterion == "magnitude":
        mask = masks_.magnitude(parent, body.shapes, spec.density, scope=spec.scope)
    elif spec.draw == "exact":
        mask = masks_.exact(body.shapes, spec.density, generator, scope=spec.scope)
    else:
        mask = masks_.bernoulli(body.shapes, spec.density, generator)
    return Subnetwork(masks_.complement(mask) if spec.part == 1 else mask)


def _unit_subnetwork(
    spec: ChildSpec, body: Anatomy, parent: Weights, generator: torch.Generator
) -> Subnetwork:
    kinds = KINDS[spec.structure]
    siblings: Sequence[Kept] = ()
    if spec.parts > 2:
        siblings = structured.split_units(body.units, spec.parts, generator, kinds=kinds)
        kept = siblings[spec.part]
    else:
        kept = structured.draw_units(
            body.units,
            spec.density,
            generator,
            kinds=kinds,
            scope=spec.scope,
            draw=spec.draw,
            criterion=spec.criterion,
            scores=structured.scores(parent, body.units) if spec.criterion == "magnitude" else None,
        )
        if spec.part == 1:
            kept = structured.complement_units(kept, body.units, kinds=kinds)
    masks = structured.unit_masks(body.parameters, body.units, kept)
    return Subnetwork(masks, kept, siblings)


# --- what happens to it: xi ---------------------------------------------------------------------


def _noisy(parent: Weights, sub: Subnetwork, body: Anatomy, spec: ChildSpec) -> dict[str, Tensor]:
    masks = {name: mask for name, mask in sub.masks.items() if name in body.shapes}
    assert spec.solved, f"{spec.id}: its sigma has not been solved for"
    if spec.sigmas and len(spec.sigmas) != len(body.shapes):
        raise ValueError(
            f"sigmas: {len(spec.sigmas)} of them, but {len(body.shapes)} layers can be perturbed"
        )
    sigmas = dict(zip(body.shapes, spec.sigmas, strict=True)) if spec.sigmas else None
    return noisy.perturb(
        parent,
        masks,
        torch.Generator().manual_seed(derive(spec.seed, "noise")),
        mean=spec.mean,
        sigma=sigmas or spec.sigma,
        scale=noisy.spread(parent, masks) if spec.relative else None,
        sign=spec.sign,
    )


def _sparse(parent: Weights, sub: Subnetwork, body: Anatomy, spec: ChildSpec) -> dict[str, Tensor]:
    if spec.epochs and spec.prune_epochs:
        return {name: tensor.clone() for name, tensor in parent.items()}
    return sparse.prune(parent, sub.masks)


def _stochastic(
    parent: Weights, sub: Subnetwork, body: Anatomy, spec: ChildSpec
) -> dict[str, Tensor]:
    # All weights are inherited: those outside the mask act until the temperature is zero.
    if anneals(spec):
        return {name: tensor.clone() for name, tensor in parent.items()}
    return sparse.prune(parent, sub.masks)


def anneals(spec: ChildSpec) -> bool:
    """Does the child begin with all of the parent's weights and a temperature?"""
    still = spec.method != "stochastic" or (spec.probabilities == "temperature" and spec.tau == 0)
    return bool(spec.epochs and spec.anneal_epochs) and not still


@dataclass(frozen=True)
class Method:
    """One way to make children."""

    spawn: Callable[[Weights, Subnetwork, Anatomy, ChildSpec], dict[str, Tensor]]
    prunes: bool
    """weights outside the mask end at zero, and only the others need storing"""


METHODS: dict[str, Method] = {
    "noisy": Method(_noisy, prunes=False),
    "sparse": Method(_sparse, prunes=True),
    "stochastic": Method(_stochastic, prunes=True),
}


# --- children -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A spawned child before tuning (CPU)."""

    weights: dict[str, Tensor]
    """of the whole network, zeros where weights are pruned"""
    subnetwork: Subnetwork


@dataclass(frozen=True)
class Made:
    """A finished child."""

    model: nn.Module
    subnetwork: Subnetwork
    body: Anatomy
    masks: Masks
    """as they are after tuning"""
    images: int
    """training images seen"""


def spawn_weights(parent: Weights, body: Anatomy, spec: ChildSpec) -> Child:
    """Weights of the child `spec` of `parent`; the parent's tensors are read, never written.

    Args:
        parent: a state dict on the CPU (buffers included; they are copied).

    Raises:
        ValueError: unknown method.
    """
    if spec.method not in METHODS:
        raise ValueError(f"method: unknown method {spec.method!r}; known: {', '.join(METHODS)}")
    sub = subnetwork(spec, body, parent)
    return Child(METHODS[spec.method].spawn(parent, sub, body, spec), sub)


def removable(spec: ChildSpec, sub: Subnetwork) -> bool:
    """Is the finished child a smaller network, without what its recipe leaves out?"""
    layers = spec.structure == "layer" and bool(masks_.empty_layers(sub.masks))
    return METHODS[spec.method].prunes and (sub.kept is not None or layers)


def without_removed(model: nn.Module, spec: ChildSpec, sub: Subnetwork, body: Anatomy) -> nn.Module:
    """A pruned network without the units or layers that its recipe leaves out; else `model`."""
    if not removable(spec, sub):
        return model
    if sub.kept is not None:
        return structured.remove(model, body.units, sub.kept)
    return structured.remove_layers(model, masks_.empty_layers(sub.masks))


def spawn(
    parent: nn.Module,
    spec: ChildSpec,
    input_shape: Sequence[int] | None = None,
    input_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A new network: the child `spec` of `parent`, before tuning, on the parent's device.

    Args:
        input_shape, input_dtype: of one sample; needed where neurons or channels are removed.

    Example:
        >>> parent = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> spec = ChildSpec(id="a", method="sparse", seed=1, density=0.5, draw="exact")
        >>> int((spawn(parent, spec)[0].weight == 0).sum())
        16
    """
    body = anatomy(parent, spec, input_shape, input_dtype)
    weights = {name: tensor.detach().cpu() for name, tensor in parent.state_dict().items()}
    child = copy.deepcopy(parent)
    spawned = spawn_weights(weights, body, spec)
    child.load_state_dict(spawned.weights)
    return child if anneals(spec) else without_removed(child, spec, spawned.subnetwork, body)
