"""What happens to them, chapter 6: masks drawn again on every forward pass, then annealed.

P is the probability that a weight is **kept**: `W' = W o Bernoulli(P)` (eq. 3.21). With temperature
annealing the subnetwork M is always active and the rest comes back with probability tau, which
falls to zero: `P = M + tau * (1 - M)` (eq. 6.6). At tau = 0 the child is the sparse child of M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ray_subnets.masks import Masks


def temperature(masks: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """Keep-probabilities `M + tau * (1 - M)` in float32 (eq. 6.6, off-subnetwork variant)."""
    return {name: torch.where(mask, 1.0, tau) for name, mask in masks.items()}


def realise(masks: Mapping[str, Tensor], tau: float, generator: torch.Generator) -> Masks:
    """One Bernoulli draw of `temperature(masks, tau)`, without building P.

    `generator` lives on the masks' device. A kept weight stays kept whatever the draw, so the
    draw is `M or (u < tau)`.
    """
    return {
        name: mask | (torch.rand(mask.shape, generator=generator, device=mask.device) < tau)
        for name, mask in masks.items()
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
