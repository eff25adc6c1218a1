"""Where a baseline is trained in tests: in memory, on images that a network learns in seconds."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import models, supervised
from ray_subnets.baselines.method import Method, Progress, Trained
from ray_subnets.data import Batches, Data, Preprocess, Split
from ray_subnets.recipes import Training
from ray_subnets.supervised import Objective, Rate
from ray_subnets.topology import Topology


def patterns(
    n: int = 48, shape: Sequence[int] = (3, 16, 16), classes: int = 4, noise: float = 1.0
) -> Data:
    """A random image for each class, under noise; as many for training as for each other split."""
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(classes, *shape, generator=generator)

    def split() -> Split:
        labels = torch.arange(n) % classes
        images = means[labels] + noise * torch.randn(n, *shape, generator=generator)
        return Split(images, labels)

    return Data("patterns", split(), split(), split(), classes, Preprocess())


class Skip(nn.Module):
    """A user's network: a convolution that is added to what it reads, batch-norm, a classifier."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.conv(x))
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"hidden": [16, 12]}),
    "lenet_s": ("lenet_s", {}),
    "resnet18": ("resnet18", {"width": 8}),
    "wide_resnet": ("wide_resnet", {"depth": 10, "width": 1}),
    "densenet": ("ray_subnets.models.densenet:DenseNet", {"layers": [2, 2], "growth": 4}),
    "user": ("bench:Skip", {}),
}
"""every kind that a baseline must work on"""


@dataclass(kw_only=True)
class Stage:
    """One call of `fit`."""

    network: nn.Module
    training: Training
    density: Mapping[str, float]
    images: int = 0
    rates: list[float] = field(default_factory=list)


class MemoryBench:
    """A `Bench` without files.

    Args:
        network: of `NETWORKS`.
        saved: what `saved` of another bench holds after each stage: such stages are not trained
            again, as when a run goes on after an interruption.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        network: str = "mlp",
        data: Data | None = None,
        *,
        budget: int = 2,
        seed: int = 3,
        saved: Sequence[dict[str, Tensor]] = (),
        **training: Any,
    ) -> None:
        self.data = patterns() if data is None else data
        self.name, self.options = NETWORKS[network]
        self.budget, self.seed = budget, seed
        chosen: dict[str, Any] = {"batch_size": 16, "lr": 0.05} | training
        self.training = Training(epochs=budget, **chosen)
        self.stages: list[Stage] = []
        self.saved = list(saved)

    @property
    def images(self) -> int:
        """Training images seen, in all stages."""
        return sum(stage.images for stage in self.stages)

    def build(self, seed: int) -> nn.Module:
        data = self.data
        return models.build(self.name, data.input_shape, data.num_classes, self.options, seed)

    def batches(self, batch_size: int, seed: int, data: Data | None = None) -> Batches:
        return Batches(data or self.data, batch_size, seed)

    def fit(
        self,
        model: nn.Module,
        training: Training,
        *,
        seed: int,
        data: Data | None = None,
        topology: Topology | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        rate: Rate | None = None,
        objective: Objective | None = None,
        density: Mapping[str, float] | None = None,
    ) -> Generator[Progress, None, None]:
        optimizer = optimizer or supervised.make_optimizer(model, training)
        stage = Stage(network=model, training=training, density=density or {})
        index = len(self.stages)
        self.stages.append(stage)
        if index < len(self.saved):
            saved = self.saved[index]
            supervised.restore_training_state(model, optimizer, saved)
            if topology:
                held = {k: v for k, v in saved.items() if k.startswith("topology.")}
                topology.restore({k.removeprefix("topology."): v for k, v in held.items()})
            return
        batches = self.batches(training.batch_size, seed, data)
        for report in supervised.train(
            model,
            batches,
            training,
            optimizer,
            seed=seed,
            topology=topology,
            rate=rate,
            objective=objective,
        ):
            stage.images += report.images
            stage.rates.append(report.lr)
            yield report
        held = topology.state() if topology else {}
        tensors = supervised.training_state(model, optimizer)
        tensors |= {f"topology.{name}": tensor for name, tensor in held.items()}
        self.saved.append({name: tensor.detach().clone() for name, tensor in tensors.items()})


def trained(method: Method, bench: MemoryBench) -> Trained:
    """What the method gives on this bench."""
    doing = method.train(bench)
    while True:
        try:
            next(doing)
        except StopIteration as end:
            result: Trained = end.value
            return result


@torch.no_grad()
def answers(method: Method, result: Trained, bench: MemoryBench) -> Tensor:
    """Logits of every member for the test images, `(K, N, C)`."""
    parts = []
    for network in result.networks:
        model = method.answering(network).eval()
        logits = model(bench.data.preprocess(bench.data.test.images))
        parts.append(logits if logits.dim() == 3 else logits[None])
    return torch.cat(parts)


def loaded(method: Method, network: nn.Module, bench: MemoryBench) -> nn.Module:
    """A network that was stored and is loaded in another process, with another seed."""
    again = method.network(bench.build, 12345)
    again.load_state_dict({k: v.clone() for k, v in network.state_dict().items()})
    return again
