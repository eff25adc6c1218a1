"""What happens to them, chapter 6: masks drawn again on every forward pass, then annealed.

P is the probability that a weight is **kept**: `W' = W o Bernoulli(P)` (eq. 3.21). P starts at P0
and moves to the target mask M as a scale s falls from 1 to 0: `P = M + s * (P0 - M)`. At s = 0 the
child is the sparse child of M. P0 is one of

    temperature   M + tau * (1 - M), or two-sided (1 - tau) * M + tau * (1 - M)   (eq. 6.6)
    uniform       U(0, 1), so that M = [P0 >= sparsity] ("random annealing", section 6.2.1)
    mixture       Normal(mean_M, std_M^2), clipped to [0, 1]                      (eq. 6.5)

The other half of a partitioned pair has P0' = 1 - P0 (eq. 6.1), k parts have P0 that sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ray_subnets import draws
from ray_subnets.masks import Masks

Matrices = dict[str, Tensor]


def temperature(
    masks: Mapping[str, Tensor], tau: float, *, two_sided: bool = False, parts: int = 1
) -> Matrices:
    """Keep-probabilities `M + tau * (1 - M)` in float32 (eq. 6.6): only others come and go.

    Args:
        two_sided: weights of the subnetwork are also left out, with chance tau (section 6.2.2).
        parts: of a partition; with more than two the others share tau, so that siblings' P sum
            to one for every weight (two-sided).
    """
    inside = 1 - tau if two_sided else 1.0
    outside = tau / (parts - 1) if two_sided and parts > 2 else tau
    return {name: torch.where(mask, inside, outside) for name, mask in masks.items()}


def _by_layer(names: Iterable[str], seed: int, make: Callable[[str, int], Tensor]) -> Matrices:
    """`make(name, seed)` for every layer, each with its own seed."""
    names = list(names)
    seeds = np.random.SeedSequence(seed).generate_state(len(names), np.uint64)
    return {name: make(name, int(seed)) for name, seed in zip(names, seeds, strict=True)}


def uniform(masks: Mapping[str, Tensor], seed: int, *, sparsity: float) -> Matrices:
    """U(0, 1) given that exactly the weights of `masks` are at or above `sparsity` (6.2.1).

    Over a mask of that sparsity this is the uniform distribution; a mask drawn by exact count or
    by magnitude can be its target as well.
    """

    def make(name: str, seed: int) -> Tensor:
        mask = masks[name]
        u = draws.uniforms(mask.numel(), seed).view(mask.shape)
        return torch.where(mask, sparsity + (1 - sparsity) * u, sparsity * u)

    return _by_layer(masks, seed, make)


def simplex(siblings: Sequence[Mapping[str, Tensor]], part: int, seed: int) -> Matrices:
    """P of one of k partitioned siblings, uniform on the simplex: they sum to one for each weight.

    The sibling that owns a weight has the largest. For two this is `uniform` at sparsity 0.5.

    Args:
        siblings: the k mask sets of the partition; all siblings use one seed.
    """
    k = len(siblings)

    def make(name: str, seed: int) -> Tensor:
        n = siblings[0][name].numel()
        streams = np.random.SeedSequence(seed).generate_state(k, np.uint64)
        # Normalised exponentials are uniform on the simplex.
        shares = torch.stack([-torch.log1p(-draws.uniforms(n, int(s))) for s in streams])
        shares /= shares.sum(0)
        largest, where = shares.max(0)
        shares.scatter_(0, where[None], shares[:1].clone())
        shares[0] = largest  # row 0 is the owner's, the others go in turn to those after it
        sets = torch.stack([sibling[name].reshape(-1) for sibling in siblings])
        owner = sets.int().argmax(0)
        own = shares.gather(0, ((part - owner) % k)[None])[0]
        return own.view(siblings[0][name].shape)

    return _by_layer(siblings[0], seed, make)


def mixture(
    masks: Mapping[str, Tensor],
    seed: int,
    *,
    outside: tuple[float, float],
    inside: tuple[float, float],
) -> Matrices:
    """Two Gaussians, one for each value of the mask, clipped to [0, 1] (eq. 6.5).

    Args:
        outside, inside: (mean, standard deviation) where the mask is zero, one.
    """

    def make(name: str, seed: int) -> Tensor:
        mask = masks[name]
        n = draws.normals(mask.numel(), seed).view(mask.shape)
        mean = torch.where(mask, inside[0], outside[0])
        std = torch.where(mask, inside[1], outside[1])
        return (mean + std * n).clamp(0, 1)

    return _by_layer(masks, seed, make)


def one_sided(start: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Matrices:
    """`start`, but weights of the subnetwork are always kept."""
    return {name: torch.where(masks[name], 1.0, p) for name, p in start.items()}


def realise(masks: Mapping[str, Tensor], tau: float, generator: torch.Generator) -> Masks:
    """One Bernoulli draw of `temperature(masks, tau)`, without building P.

    `generator` lives on the masks' device. A kept weight stays kept whatever the draw, so the
    draw is `M or coin(tau)`.
    """
    device = next(iter(masks.values())).device
    total = sum(mask.numel() for mask in masks.values())
    if device.type == "cpu":
        coins = draws.coins(total, tau, draws.seed_from(generator), bits=16)
    else:
        coins = torch.rand(total, generator=generator, device=device) < tau
    parts = coins.split([mask.numel() for mask in masks.values()])
    return {
        name: mask | part.view(mask.shape)
        for (name, mask), part in zip(masks.items(), parts, strict=True)
    }


def realise_matrix(
    start: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scale: float,
    generator: torch.Generator,
) -> Masks:
    """One Bernoulli draw of `M + scale * (P0 - M)`; P0 is `start`."""
    device = next(iter(masks.values())).device
    total = sum(mask.numel() for mask in masks.values())
    if device.type == "cpu":
        u = draws.uniforms(total, draws.seed_from(generator))
    else:
        u = torch.rand(total, generator=generator, device=device)
    parts = u.split([mask.numel() for mask in masks.values()])
    return {
        name: part.view(mask.shape) < torch.lerp(mask.to(start[name].dtype), start[name], scale)
        for (name, mask), part in zip(masks.items(), parts, strict=True)
    }


def anneal(epoch: float, *, start: float, epochs: float, shape: str = "linear") -> float:
    """Temperature after `epoch` (fractional) epochs of tuning; exactly 0 from `epochs` on.

    linear (eq. 6.2), cosine (eq. 6.3, with the pi that the equation misses), exponential
    (eq. 6.4 with k = 5, cut off at `epochs`).
    """
    if epochs <= 0 or epoch >= epochs:
        return 0.0
    t = epoch / epochs
    if shape == "linear":
        return start * (1 - t)
    if shape == "cosine":
        return start * 0.5 * (1 + math.cos(math.pi * t))
    assert shape == "exponential", shape
    return start * math.exp(-5 * t)
