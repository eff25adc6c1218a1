"""What networks take: numbers, or whole numbers such as those of words; and made-up ones to try a
network on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE = torch.int64
"""type of whole numbers (of words, categories), which a network looks up; others are float32"""


def is_whole(x: Tensor) -> bool:
    """Whole numbers that are to be looked up? uint8 are images."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype in (torch.uint8, torch.bool))


def made_up(
    count: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`(count, *shape)`: zeros; with a generator random ones. Of whole numbers 0 and 1 only, since
    nobody says how many a network knows; of uint8 all."""
    if generator is None:
        return torch.zeros(count, *shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(count, *shape, generator=generator, dtype=dtype)
    most = 256 if dtype == torch.uint8 else 2
    return torch.randint(0, most, (count, *shape), generator=generator, dtype=dtype)


def are_probabilities(outputs: Tensor) -> bool:
    """Do these `(N, C)` sum to one, as a softmax does?"""
    if outputs.is_meta:
        return False
    return bool((outputs >= 0).all() and ((outputs.double().sum(1) - 1).abs() < 1e-5).all())


def described(x: Tensor) -> str:
    """`inputs of shape (3, 32, 32)`, for messages."""
    whole = ", whole numbers (images are uint8 or float)" if is_whole(x) else ""
    return f"inputs of shape {tuple(x.shape[1:])}{whole}"
