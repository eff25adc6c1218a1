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
from ray_subnets import noisy, sparse, stochastic, structured
from ray_subnets.draws import seed_from
from ray_subnets.masks import Masks, Shapes
from ray_subnets.recipes import ChildSpec, derive
from ray_subnets.structured import Coupled, Kept
from ray_subnets.topology import Annealed, Fixed, Iterative, Topology

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


def probabilities(spec: ChildSpec, sub: Subnetwork) -> stochastic.Matrices:
    """P0 of a stochastic recipe, by parameter (or by set of units); see `stochastic`."""
    target, seed = sub.target, derive(spec.seed, "probabilities")
    if spec.probabilities == "temperature":
        return stochastic.temperature(target, spec.tau, two_sided=spec.two_sided, parts=spec.parts)
    if spec.parts > 2:
        start = stochastic.simplex(sub.siblings, spec.part, seed)
    else:
        # The second of a pair has 1 - P of the first, which was drawn for the first's mask.
        first = masks_.complement(target) if spec.part == 1 else target
        if spec.probabilities == "uniform":
            start = stochastic.uniform(first, seed, sparsity=1 - spec.density)
        else:
            a, b, c, d = spec.mixture
            start = stochastic.mixture(first, seed, outside=(a, b), inside=(c, d))
        if spec.part == 1:
            start = {name: 1 - p for name, p in start.items()}
    return start if spec.two_sided else stochastic.one_sided(start, target)


def topology(
    spec: ChildSpec, sub: Subnetwork, body: Anatomy, parameters: Mapping[str, Tensor]
) -> Topology | None:
    """Which of `parameters` act while the child is tuned; None: all, at all times."""
    if not METHODS[spec.method].prunes:
        return None
    if anneals(spec):
        return Annealed(parameters, sub.masks, _Draw(spec, sub, body))
    if removable(spec, sub):
        return None  # what is left out is gone already
    if spec.prune_epochs:
        order = None
        if spec.criterion == "random":
            generator = torch.Generator().manual_seed(derive(spec.seed, "removal"))
            order = sparse.removal_order(sub.masks, seed_from(generator))
        return Iterative(parameters, sub.masks, spec.prune_epochs, order)
    return Fixed(parameters, sub.masks)


class _Draw:
    """Bernoulli masks of a stochastic recipe at an epoch (algorithm 3)."""

    def __init__(self, spec: ChildSpec, sub: Subnetwork, body: Anatomy) -> None:
        self._spec, self._body, self._structured = spec, body, sub.kept is not None
        self._target = sub.target
        plain = spec.probabilities == "temperature" and not spec.two_sided
        self._start = None if plain else probabilities(spec, sub)

    def to(self, device: torch.device) -> None:
        self._target = {name: mask.to(device) for name, mask in self._target.items()}
        if self._start is not None:
            self._start = {name: p.to(device) for name, p in self._start.items()}

    def __call__(self, epoch: float, generator: torch.Generator) -> Masks | None:
        spec = self._spec
        scale = stochastic.anneal(epoch, start=1.0, epochs=spec.anneal_epochs, shape=spec.anneal)
        if scale == 0:
            return None
        if self._start is None:
            drawn = stochastic.realise(self._target, spec.tau * scale, generator)
        else:
            drawn = stochastic.realise_matrix(self._start, self._target, scale, generator)
        if not self._structured:
            return drawn
        # A unit comes back whole.
        drawn = {name: mask.cpu() for name, mask in drawn.items()}
        return structured.unit_masks(self._body.parameters, self._body.units, drawn)

    def density(self, epoch: float) -> dict[str, float]:
        """Weight -> fraction that is expected to act."""
        spec = self._spec
        scale = stochastic.anneal(epoch, start=1.0, epochs=spec.anneal_epochs, shape=spec.anneal)
        if self._structured:
            some = torch.Generator().manual_seed(derive(spec.seed, "density"))
            drawn = self(epoch, some)
            if drawn is None:
                units, parameters = self._body.units, self._body.parameters
                drawn = structured.unit_masks(parameters, units, self._target)
            return {name: _share(mask) for name, mask in drawn.items()}
        found = {}
        for name, mask in self._target.items():
            share = _share(mask)
            if self._start is None:
                begin = share + spec.tau * (1 - share)
            else:
                begin = float(self._start[name].double().mean())
            found[name] = share + scale * (begin - share)
        return found


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()


def acting(spec: ChildSpec, sub: Subnetwork, body: Anatomy, steps: int) -> dict[str, float]:
    """Weight -> fraction of it that acts while the child is tuned, the mean over all steps.

    Not what is left in the end: weights come and go, or go one after the other, before. Of drawn
    masks it is what is expected; of units that come and go it is the mean over 32 steps.

    Args:
        steps: of the optimizer in an epoch.
    """
    shares = {name: _share(mask) for name, mask in sub.masks.items()}
    if not METHODS[spec.method].prunes or not spec.epochs:
        return shares if METHODS[spec.method].prunes else {}
    if spec.prune_epochs and not anneals(spec):
        done = [min(1.0, (epoch + 1) / spec.prune_epochs) for epoch in range(spec.epochs)]
        mean = sum(done) / len(done)
        return {name: 1 - (1 - share) * mean for name, share in shares.items()}
    if not anneals(spec):
        return shares
    draw, total = _Draw(spec, sub, body), spec.epochs * steps
    seen = range(total)
    if sub.kept is not None and total > 32:
        seen = range(total // 64, total, -(-total // 32))
    each = [draw.density(step / steps) for step in seen]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def shrinks(spec: ChildSpec) -> bool:
    """Is the child a smaller network from the first step of its tuning on?"""
    pruned = METHODS[spec.method].prunes and not anneals(spec)
    return pruned and spec.structure != "weight"


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
