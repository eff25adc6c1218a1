"""Dropout as a single model, and as an ensemble of passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.functional import dropout

from ray_subnets import masks
from ray_subnets.baselines.method import Build, Method
from ray_subnets.recipes import Count, derive

_SEED = 0x5EED  # of the passes: the same question gets the same answer


class _Drop:
    """Forward hook: dropout of a layer's output; keeps every name of the network."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.always = False

    def __call__(self, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
        return dropout(output, self.rate, training=layer.training or self.always)


class Passes(nn.Module):
    """A network with dropout on that answers `passes` times: `(N, *shape)` -> `(K, N, C)`."""

    def __init__(self, network: nn.Module, passes: int) -> None:
        super().__init__()
        self.network, self.passes = network, passes

    def forward(self, x: Tensor) -> Tensor:
        drops = [hook for hook in _hooks(self.network)]
        own = [m for m in self.network.modules() if isinstance(m, nn.Dropout)]
        try:
            for drop in drops:
                drop.always = True
            for module in own:
                module.train()
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                answers = []
                for k in range(self.passes):
                    torch.manual_seed(derive(_SEED, k))
                    answers.append(self.network(x))
            return torch.stack(answers)
        finally:
            for drop in drops:
                drop.always = False
            for module in own:
                module.train(self.training)


def _hooks(network: nn.Module) -> list[_Drop]:
    return [
        hook
        for module in network.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, _Drop)
    ]


@dataclass(frozen=True, kw_only=True)
class Dropout(Method):
    """One network with dropout after every hidden layer; whole when it answers."""

    title: ClassVar[str] = "dropout"
    source: ClassVar[str] = "Srivastava et al. 2014; places and rate of Table 5.1"
    method: Literal["dropout"] = "dropout"
    rate: Annotated[float, Gt(0), Lt(1)] = 0.5
    """probability that an output is left out in training"""
    own: bool = False
    """use the dropout layers that the network has (in wide ResNets between the convolutions of a
    block) in place of one after every hidden layer"""

    def network(self, build: Build, seed: int) -> nn.Module:
        model = build(seed)
        if self.own:
            layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
            if not layers:
                raise ValueError(
                    "own: this network has no dropout layers of its own; leave own out, and they "
                    "come after every hidden layer"
                )
            for layer in layers:
                layer.p = self.rate
            return model
        for name in masks.maskable(model):
            module, _, _ = name.rpartition(".")
            model.get_submodule(module).register_forward_hook(_Drop(self.rate))
        return model


@dataclass(frozen=True, kw_only=True)
class MCDropout(Dropout):
    """The same network; dropout stays on, and passes are averaged."""

    title: ClassVar[str] = "MC dropout"
    source: ClassVar[str] = "Gal and Ghahramani 2016; 30 passes as in uncertainty-baselines"
    method: Literal["mc_dropout"] = "mc_dropout"  # type: ignore[assignment]  # the tag of each
    rate: Annotated[float, Gt(0), Lt(1)] = 0.1
    passes: Count = 30
    """answers that are averaged"""

    def answering(self, network: nn.Module) -> nn.Module:
        return Passes(network, self.passes)
