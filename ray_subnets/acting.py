"""Which weights of a child act while it is tuned, and which of them in the mean.

Legend: P0, probabilities of weights to act (algorithm 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ray_subnets import masks as masks_
from ray_subnets import sparse, stochastic, structured
from ray_subnets.draws import seed_from
from ray_subnets.masks import Masks
from ray_subnets.recipes import ChildSpec, derive
from ray_subnets.spawning import METHODS, Anatomy, Subnetwork, anneals, removable
from ray_subnets.topology import Annealed, Fixed, Iterative, Topology
from ray_subnets.units import Kept, staying


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
        self._layers = {}  # that come and go whole: one coin for each
        if spec.structure == "layer":
            self._layers = {name: mask.shape for name, mask in self._target.items()}
            self._target = _first(self._target)
            self._start = None if self._start is None else _first(self._start)

    def to(self, device: torch.device) -> None:
        self._target = {name: mask.to(device) for name, mask in self._target.items()}
        if self._start is not None:
            self._start = {name: p.to(device) for name, p in self._start.items()}

    def __call__(self, epoch: float, generator: torch.Generator) -> Masks | None:
        drawn = self._drawn(epoch, generator)
        if drawn is not None and self._layers:
            return {name: drawn[name].expand(shape) for name, shape in self._layers.items()}
        if drawn is None or not self._structured:
            return drawn
        # A unit comes back whole.
        return structured.unit_masks(self._body.parameters, self._body.units, drawn)

    def _drawn(self, epoch: float, generator: torch.Generator) -> Masks | Kept | None:
        """Of weights, layers or units; None: the recipe's own."""
        spec = self._spec
        scale = stochastic.anneal(epoch, start=1.0, epochs=spec.anneal_epochs, shape=spec.anneal)
        if scale == 0:
            return None
        if self._start is None:
            drawn = stochastic.realise(self._target, spec.tau * scale, generator)
        else:
            drawn = stochastic.realise_matrix(self._start, self._target, scale, generator)
        return {name: mask.cpu() for name, mask in drawn.items()} if self._structured else drawn

    def density(self, epoch: float) -> dict[str, float]:
        """Weight -> fraction that is expected to act."""
        spec = self._spec
        scale = stochastic.anneal(epoch, start=1.0, epochs=spec.anneal_epochs, shape=spec.anneal)
        if self._structured:
            some = torch.Generator().manual_seed(derive(spec.seed, "density"))
            drawn = self._drawn(epoch, some)
            return _left(self._target if drawn is None else drawn, self._body)
        found = {}
        for name, mask in self._target.items():
            share = _share(mask)
            if self._start is None:
                begin = share + spec.tau * (1 - share)
            else:
                begin = float(self._start[name].double().mean())
            found[name] = share + scale * (begin - share)
        return found


def _first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One value of each, which stands for all of its layer: `(1, ..., 1)`."""
    return {name: t.reshape(-1)[:1].view([1] * t.dim()) for name, t in tensors.items()}


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()


def _left(kept: Kept, body: Anatomy) -> dict[str, float]:
    """Parameter -> fraction of it that is left with these units, and what reads them."""
    (rows, columns), whole = staying(body.units, kept), torch.ones(1)
    return {
        name: _share(rows.get(name, whole)) * _share(columns.get(name, whole))
        for name in rows.keys() | columns.keys()
    }


def shares(spec: ChildSpec, sub: Subnetwork, body: Anatomy, steps: int) -> dict[str, float]:
    """Weight -> fraction of it that acts while the child is tuned, the mean over all steps.

    Not what is left in the end: weights come and go, or go one after the other, before. Of drawn
    masks it is what is expected; of units that come and go it is the mean over 32 steps.

    Args:
        steps: of the optimizer in an epoch.
    """
    kept = {name: _share(mask) for name, mask in sub.masks.items()}
    if sub.kept is not None:
        kept = _left(sub.kept, body)
    if not METHODS[spec.method].prunes or not spec.epochs:
        return kept if METHODS[spec.method].prunes else {}
    if spec.prune_epochs and not anneals(spec):
        done = [min(1.0, (epoch + 1) / spec.prune_epochs) for epoch in range(spec.epochs)]
        mean = sum(done) / len(done)
        return {name: 1 - (1 - share) * mean for name, share in kept.items()}
    if not anneals(spec):
        return kept
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
