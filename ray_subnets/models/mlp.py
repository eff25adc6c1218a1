"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F


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


def without_modules(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same function of its inputs, bit for bit, with the weights that it has now.

    To call the modules of a small network takes as long as its arithmetic. What is not such a chain
    as `mlp` makes, or has hooks, is returned as it is.
    """
    hooks = (part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    if type(network) is not nn.Sequential or any(hooks):
        return network
    steps: list[Callable[[Tensor], Tensor]] = []
    for layer in network:
        if type(layer) is nn.Linear:
            steps.append(partial(F.linear, weight=layer.weight, bias=layer.bias))
        elif type(layer) in (nn.Flatten, nn.ReLU, nn.Tanh):
            steps.append(layer.forward)
        else:
            return network
    return lambda x: reduce(lambda y, step: step(y), steps, x)
