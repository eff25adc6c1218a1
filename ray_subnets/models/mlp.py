"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn


def mlp(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    hidden: Sequence[int] = (512, 512),
    activation: str = "relu",
) -> nn.Module:
    """Flatten, `hidden` layers, a linear classifier: `(N, *input_shape)` -> `(N, C)`.

    Args:
        activation: relu, or tanh as is usual for small policies.

    Raises:
        ValueError: a width is not positive, or the activation is unknown.
    """
    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
    if activation not in activations:
        raise ValueError(f"model.activation: {activation!r} is not one of {', '.join(activations)}")
    if any(width < 1 for width in hidden):
        raise ValueError(f"model.hidden: widths must be positive, not {list(hidden)}")
    widths = [prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activations[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
