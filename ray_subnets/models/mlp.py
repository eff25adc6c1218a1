"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn


def mlp(
    input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (512, 512)
) -> nn.Module:
    """Flatten, `hidden` ReLU layers, a linear classifier: `(N, *input_shape)` -> `(N, C)`.

    Raises:
        ValueError: a width is not positive.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"model.hidden: widths must be positive, not {list(hidden)}")
    widths = [prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
