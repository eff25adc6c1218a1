"""What happens to them, chapter 4: Gaussian noise on a subnetwork, mirrored and partitioned.

`W' = W + s * (N o M)` with N ~ Normal(mean, sigma^2) (eq. 3.15-3.17). One draw of (M, N) makes four
children: s = +1, -1 times M, 1 - M (eq. 4.8-4.11).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ray_subnets import draws


def perturb(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    sigma: float | Mapping[str, float] = 1.0,
    scale: Mapping[str, float] | None = None,
    sign: int = 1,
) -> dict[str, Tensor]:
    """New weights `W + sign * (N o M)` (eq. 4.2, 4.8-4.11); tensors without a mask are copied.

    The noise is drawn for every weight, masked or not, so siblings that share a generator state
    share N. Drawing, scaling, masking and adding go chunk by chunk, while a chunk is in the cache.

    Args:
        weights: CPU tensors.
        sigma: of all tensors, or name -> sigma of each.
        scale: name -> factor of mean and sigma, to make them relative (see `spread`).
    """
    assert sign in (1, -1)
    seed = draws.seed_from(generator)
    names = list(masks)  # a file may hold the weights in another order
    starts, total = {}, 0
    for name in names:
        starts[name] = total
        total += weights[name].numel()
    result = {name: tensor.clone() for name, tensor in weights.items() if name not in masks}
    # Float32 in one run of memory, whatever the weights' own type and memory format.
    summed = {
        name: weights[name]
        .detach()
        .to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name in names
    }
    flat = {name: summed[name].view(-1).numpy() for name in names}
    chosen = {name: masks[name].reshape(-1).numpy() for name in names}

    def add(chunk: int, where: slice) -> None:
        noise = draws.stream(seed, chunk).standard_normal(
            where.stop - where.start, dtype=np.float32
        )
        for name in names:
            start = starts[name]
            low, high = max(where.start, start), min(where.stop, start + flat[name].size)
            if low < high:
                n, here = (
                    noise[low - where.start : high - where.start],
                    slice(low - start, high - start),
                )
                factor = sign * (scale[name] if scale is not None else 1.0)
                own = sigma if isinstance(sigma, float | int) else sigma[name]
                n *= np.float32(own * factor)
                if mean:
                    n += np.float32(mean * factor)
                n *= chosen[name][here]
                flat[name][here] += n

    draws.in_chunks(total, add)
    for name in names:
        result[name] = summed[name].to(weights[name].dtype)
        if weights[name].dtype == torch.float64:  # what is not perturbed keeps all its digits
            result[name] = torch.where(masks[name], result[name], weights[name].detach())
    return {name: result[name] for name in weights}


def spread(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """Standard deviation of each named tensor: the unit of relative noise."""
    return {name: float(weights[name].double().std(correction=0)) for name in names}
