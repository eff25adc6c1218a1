"""What happens to them, chapter 4: Gaussian noise on a subnetwork, mirrored and partitioned.

`W' = W + s * (N o M)` with N ~ Normal(mean, sigma^2) (eq. 3.15-3.17). One draw of (M, N) makes four
children: s = +1, -1 times M, 1 - M (eq. 4.8-4.11).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ray_subnets.masks import Shapes


def normals(
    shapes: Shapes, generator: torch.Generator, *, mean: float = 0.0, sigma: float = 1.0
) -> dict[str, Tensor]:
    """Independent float32 draws from Normal(mean, sigma^2), one tensor per name (eq. 4.2).

    Drawn by numpy's SFC64 seeded from `generator`: `torch.randn` in float32 gives other last bits
    on processors with and without AVX2, and a recipe must give the same child on both. It takes
    about twice the time (`make bench`).
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    source = np.random.Generator(np.random.SFC64(seed))
    noise = {}
    for name, shape in shapes.items():
        tensor = torch.from_numpy(source.standard_normal(tuple(shape), dtype=np.float32))
        tensor.mul_(sigma)
        noise[name] = tensor.add_(mean) if mean else tensor
    return noise


def perturb(
    weights: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sign: int = 1,
) -> dict[str, Tensor]:
    """New weights `W + sign * (N o M)` (eq. 4.8-4.11); tensors without noise are copied."""
    assert sign in (1, -1)
    result = {}
    for name, weight in weights.items():
        if name in noise:
            n, m = noise[name].to(weight.dtype), masks[name].to(weight.dtype)
            result[name] = torch.addcmul(weight, n, m, value=sign)
        else:
            result[name] = weight.clone()
    return result
