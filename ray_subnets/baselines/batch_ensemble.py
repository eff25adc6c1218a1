"""BatchEnsemble: members that share every weight matrix up to a rank-one factor."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_subnets import masks, schedules, supervised
from ray_subnets.baselines.fitting import check_members
from ray_subnets.baselines.method import Bench, Build, Method, Progress, Trained
from ray_subnets.data import Batch
from ray_subnets.recipes import Count, NonNegative, Training, derive
from ray_subnets.supervised import Objective

STEPS = (0.4, 0.8, 0.9)
"""of the budget, where the rate falls: 100, 200 and 225 of 250 epochs"""
FITS = "networks of linear and convolution layers that keep images apart fit, all of ours do"


_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Shared(nn.Module):
    """A layer whose members see `W * outer(gamma, alpha)` and have biases of their own.

    Rows of a batch are those of the first member, then of the second, and so on; where they do not
    divide, some members have one more. Inputs and outputs are multiplied where they are vectors;
    where they are maps, each member's kernels are, which are smaller.

    Args:
        rate: factor of the gradient of `alpha` and `gamma`.
    """

    def __init__(self, layer: nn.Module, members: int, rate: float) -> None:
        super().__init__()
        assert isinstance(layer, masks.MASKABLE)
        if isinstance(layer, nn.Linear):
            inputs, outputs = layer.in_features, layer.out_features
        else:
            inputs, outputs = layer.in_channels, layer.out_channels
        self.members, self.rate = members, rate
        self.trailing = layer.weight.dim() - 2  # dimensions after the channels
        self.alpha = nn.Parameter(layer.weight.new_ones(members, inputs))
        self.gamma = nn.Parameter(layer.weight.new_ones(members, outputs))
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().expand(members, -1).clone())
            layer.bias = None
        self.layer = layer

    def draw(self, generator: torch.Generator, spread: float, signs: bool) -> None:
        """Initial fast weights."""
        for fast in (self.alpha, self.gamma):
            drawn = torch.randn(fast.shape, generator=generator)
            with torch.no_grad():
                fast.copy_(drawn.sign() if signs else 1 + spread * drawn)

    def forward(self, x: Tensor) -> Tensor:
        owner = torch.arange(len(x), device=x.device) * self.members // len(x)

        def slow(fast: Tensor) -> Tensor:
            """The same values; only a part of the gradient passes."""
            return fast.detach() + self.rate * (fast - fast.detach())

        alpha, gamma = slow(self.alpha), slow(self.gamma)
        if isinstance(self.layer, _Convolution) and self.layer.groups == 1:
            return self._convolved(x, owner, alpha, gamma)

        def rows(fast: Tensor, like: int) -> Tensor:
            """Each row's own, shaped to be multiplied with a tensor of `like` dimensions."""
            before = like - 2 - self.trailing
            shape = (len(x), *[1] * before, fast.shape[1], *[1] * self.trailing)
            return fast[owner].view(shape)

        y = self.layer(x * rows(alpha, x.dim()))
        y = y * rows(gamma, y.dim())
        return y if self.bias is None else y + rows(self.bias, y.dim())

    def _convolved(self, x: Tensor, owner: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
        """A convolution for each member's rows, by its own kernels."""
        layer = self.layer
        assert isinstance(layer, _Convolution)
        sizes = owner.bincount(minlength=self.members).tolist()
        answers = []
        for member, part in enumerate(x.split(sizes)):
            factor = torch.outer(gamma[member], alpha[member])
            kernels = layer.weight * factor.view(*factor.shape, *[1] * self.trailing)
            bias = None if self.bias is None else self.bias[member]
            answers.append(layer._conv_forward(part, kernels, bias))
        return torch.cat(answers)


class Members(nn.Module):
    """A network of `Shared` layers: `(N, *shape)` -> `(M, N, C)`."""

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network, self.passes = network, members

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x.repeat(self.passes, *[1] * (x.dim() - 1)))
        return logits.view(self.passes, len(x), -1)


def _layers(model: nn.Module) -> list[Shared]:
    return [module for module in model.modules() if isinstance(module, Shared)]


@dataclass(frozen=True, kw_only=True)
class BatchEnsemble(Method):
    """One network; each member multiplies what comes in and goes out of every layer by vectors.

    Published (Wen et al. 2020, WRN-28-10 on CIFAR): 4 members, vectors from N(1, 0.5), their
    gradients halved and not decayed, rate 0.1 after one epoch of warm-up, times 0.2 at 100, 200 and
    225 of 250 epochs, every member sees every image. Batch-norm is shared.
    """

    title: ClassVar[str] = "BatchEnsemble"
    source: ClassVar[str] = "Wen et al. 2020; settings of uncertainty-baselines"
    deviation: ClassVar[str] = "an epoch passes every image through every member: M times the cost"
    method: Literal["batch_ensemble"] = "batch_ensemble"
    members: Count = 4
    """networks in one"""
    spread: NonNegative = 0.5
    """standard deviation of the initial vectors about 1"""
    signs: bool = False
    """initial vectors of random signs in place of Gaussian ones"""
    fast_rate: NonNegative = 0.5
    """factor of the vectors' gradients"""
    tile: bool = True
    """every member sees every image; else a batch is split over the members, at a single model's
    cost"""
    published_rate: bool = True
    """warm-up and steps of the published training, where the column's rate is not constant"""

    def network(self, build: Build, seed: int) -> nn.Module:
        model = Members(build(seed), self.members)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                raise ValueError(f"batch_ensemble: attention hides its linear layers; {FITS}")
        shared = {
            module: Shared(module, self.members, self.fast_rate)
            for module in model.modules()
            if isinstance(module, masks.MASKABLE)
        }
        for parent in list(model.modules()):
            if not isinstance(parent, Shared):
                for name, child in list(parent._modules.items()):
                    if child in shared:
                        setattr(parent, name, shared[child])
        generator = torch.Generator().manual_seed(derive(seed, "fast"))
        for layer in _layers(model):
            layer.draw(generator, self.spread, self.signs)
        return model

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters for the optimizer: the vectors are not decayed."""
        fast = {id(tensor) for layer in _layers(model) for tensor in (layer.alpha, layer.gamma)}
        named = list(model.parameters())
        return [
            {"params": [one for one in named if id(one) not in fast]},
            {"params": [one for one in named if id(one) in fast], "weight_decay": 0.0},
        ]

    def objective(self, training: Training) -> Objective:
        """Mean over members of their cross-entropy, summed over images."""
        loss = partial(cross_entropy, reduction="sum", label_smoothing=training.label_smoothing)

        def split(model: nn.Module, batch: Batch) -> Tensor:
            """Every row is one member's."""
            return loss(model.get_submodule("network")(batch.x).float(), batch.y)

        def tiled(model: nn.Module, batch: Batch) -> Tensor:
            logits = model(batch.x).float().flatten(0, 1)
            return loss(logits, batch.y.repeat(self.members)) / self.members

        return tiled if self.tile else split

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        training = bench.training
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        check_members(model, self.members, bench.data, "batch_ensemble", FITS)

        def stepwise(step: int, steps: int) -> float:
            warm = min(1.0, (step + 1) * training.epochs / steps)  # one epoch
            return warm * schedules.steps(step, steps, lr=training.lr, at=STEPS, factor=0.2)

        own = self.published_rate and training.schedule != "constant"
        yield from bench.fit(
            model,
            training,
            seed=derive(bench.seed, "fit", 0),
            optimizer=supervised.make_optimizer(model, training, self.groups(model)),
            rate=stepwise if own else None,
            objective=self.objective(training),
        )
        return Trained(networks=[model])
