r"""Public implementations of the benchmark's methods at its settings, to set beside our rows.

The network, images, flips, budget, batch size, schedule and search of `benchmark_fashion_mlp`; the
methods are those of torch-uncertainty (one loop around them, as its own trainer is) and of
torchensemble (its own loops). Neither is installed with the project:

    .venv/bin/uv pip install --python FOLDER -r requirements.txt \
        'torch-uncertainty[cpu]==0.13.0' torchensemble==0.2.0
    python -m analysis.benchmarks.public_methods mc_dropout batch_ensemble ... [--seeds 3]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from ray_subnets import datasets, metrics, schedules
from ray_subnets.data import Batches, Data

EPOCHS, BATCH, HIDDEN = 16, 128, (128, 128)
RATES = (0.02, 0.05, 0.1)
SEARCH_SEED = 1000
"""not one of the table's"""

Optimizer = dict[str, Any]
"""`name` and what torch's class of that name takes"""
Ask = Callable[[Tensor], Tensor]
"""inputs `(N, 784)` -> probabilities `(N, C)`"""
Fit = Callable[["Loader", Optimizer, bool], Ask]
"""training batches, optimizer, whether its rate is constant -> what answers"""


class Loader:
    """What both packages take for training batches: images as rows of 784 pixels."""

    def __init__(self, data: Data, seed: int) -> None:
        self.batches, self.passes = Batches(data, BATCH, seed), 0
        self.dataset = SimpleNamespace(classes=range(data.num_classes))

    def __len__(self) -> int:
        return self.batches.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches.epoch(self.passes):
            yield batch.x.flatten(1), batch.y
        self.passes += 1


class Rows(Dataset[Any]):
    """The same images, drawn by index: torchensemble's bagging makes its own loaders."""

    def __init__(self, data: Data) -> None:
        self.data, self.classes = data, range(data.num_classes)

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitems__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        images = self.data.train.images
        assert isinstance(images, Tensor)
        x = images[index]
        x = torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x)
        return self.data.preprocess(x).flatten(1), self.data.train.labels[index]


class Perceptron(nn.Sequential):
    """torchensemble makes members of a class."""

    def __init__(self, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        inputs = 784
        for width in HIDDEN:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, 10))


# --- torch-uncertainty: the method is a network; the loop is anybody's --------------------------


def loop(
    model: nn.Module,
    loader: Loader,
    optimizer: Optimizer,
    constant: bool,
    *,
    formatted: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None,
    level_from: int | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train for the whole budget.

    Args:
        formatted: what the method makes of a batch.
        level_from: epoch after which the rate is a half of the peak (SWA).
    """
    how = dict(optimizer)
    stepper = getattr(torch.optim, how.pop("name"))(model.parameters(), **how)
    steps, total = len(loader), len(loader) * EPOCHS
    model.train()
    for epoch in range(EPOCHS):
        for i, batch in enumerate(loader):
            rate = optimizer["lr"]
            if not constant and level_from is not None:
                until = level_from * steps
                step = min(epoch * steps + i, until)
                rate = schedules.decay(step, until, lr=rate, lr_final_fraction=0.5)
            elif not constant:
                rate = schedules.decay(epoch * steps + i, total, lr=rate)
            for group in stepper.param_groups:
                group["lr"] = rate
            x, y = formatted(batch) if formatted else batch
            stepper.zero_grad()
            cross_entropy(model(x), y).backward()
            stepper.step()
        if after_epoch:
            after_epoch(epoch)


def averaged(model: nn.Module, members: int) -> Ask:
    """Mean over members that the network puts one after the other in the batch."""
    model.eval()

    def ask(x: Tensor) -> Tensor:
        return model(x).softmax(-1).view(members, len(x), -1).mean(0)

    return ask


def single(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    model = Perceptron()
    loop(model, loader, optimizer, constant)
    return averaged(model, 1)


def mc_dropout(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torch_uncertainty.methods import mc_dropout

    model = mc_dropout(Perceptron(0.1), num_estimators=30)
    loop(model, loader, optimizer, constant)
    return averaged(model, 30)


def batch_ensemble(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torch_uncertainty.methods import batch_ensemble
    from torch_uncertainty.transforms import RepeatTarget

    model = batch_ensemble(Perceptron(), 4, repeat_training_inputs=True, convert_layers=True)
    loop(model, loader, optimizer, constant, formatted=RepeatTarget(4))
    return averaged(model, 4)


def mimo(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torch_uncertainty.models.mlp import mimo_mlp
    from torch_uncertainty.transforms import MIMOBatchFormat

    model = mimo_mlp(784, 10, list(HIDDEN), num_estimators=3)
    loop(model, loader, optimizer, constant, formatted=MIMOBatchFormat(3))
    return averaged(model, 3)


def swa(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torch_uncertainty.methods import SWA

    trunk = EPOCHS * 3 // 4
    model = SWA(Perceptron(), cycle_start=trunk, cycle_length=1)
    after = model.update_wrapper
    loop(model, loader, optimizer, constant, level_from=trunk, after_epoch=after)
    return averaged(model, 1)


# --- torchensemble: its own loops ---------------------------------------------------------------


def prepared(kind: Any, members: int, optimizer: Optimizer) -> Any:
    how = dict(optimizer)
    ensemble = kind(estimator=Perceptron, n_estimators=members, cuda=False)
    ensemble.set_optimizer(how.pop("name"), **how)
    return ensemble


def by_epoch(ensemble: Any, epochs: int) -> None:
    """The decayed schedule in its steps of an epoch."""
    ensemble.set_scheduler("LambdaLR", lr_lambda=partial(schedules.decay, total=epochs, lr=1.0))


def answers(ensemble: Any) -> Ask:
    ensemble.eval()
    return ensemble


def snapshot(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torchensemble import SnapshotEnsembleClassifier

    ensemble = prepared(SnapshotEnsembleClassifier, 4, optimizer)  # its rate is never constant
    ensemble.fit(loader, epochs=EPOCHS, log_interval=10**9, save_model=False)
    return answers(ensemble)


def fge(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torchensemble import FastGeometricClassifier

    ensemble, rate = prepared(FastGeometricClassifier, 4, optimizer), optimizer["lr"]
    high, low = (1.0, 1.0) if constant else (0.5, 0.005)
    if not constant:
        by_epoch(ensemble, EPOCHS)
    ensemble.fit(
        loader,
        epochs=9,  # then 1 + 2 + 2 + 2 for four members
        cycle=2,
        lr_1=high * rate,
        lr_2=low * rate,
        log_interval=10**9,
        save_model=False,
    )
    assert len(ensemble) == 4
    return answers(ensemble)


def bagging(loader: Loader, optimizer: Optimizer, constant: bool) -> Ask:
    from torchensemble import BaggingClassifier

    ensemble = prepared(BaggingClassifier, 8, optimizer)
    if not constant:
        by_epoch(ensemble, EPOCHS // 8)
    rows: Any = Rows(loader.batches.data)
    batches = DataLoader(rows, batch_size=BATCH, collate_fn=lambda batch: batch)
    ensemble.fit(batches, epochs=EPOCHS // 8, log_interval=10**9, save_model=False)
    return answers(ensemble)


METHODS: dict[str, tuple[str, Fit]] = {
    "single": ("torch", single),
    "mc_dropout": ("torch-uncertainty", mc_dropout),
    "batch_ensemble": ("torch-uncertainty", batch_ensemble),
    "mimo": ("torch-uncertainty", mimo),
    "swa": ("torch-uncertainty", swa),
    "snapshot": ("torchensemble", snapshot),
    "fge": ("torchensemble", fge),
    "bagging": ("torchensemble", bagging),
}


@torch.no_grad()
def measured(ask: Ask, data: Data, test: bool) -> tuple[float, float]:
    """(accuracy, NLL in nats) on test or validation images."""
    split = data.test if test else data.validation
    assert isinstance(split.images, Tensor)
    parts = [ask(data.preprocess(part).flatten(1)) for part in split.images.split(500)]
    probabilities = torch.cat(parts)
    return metrics.accuracy(probabilities, split.labels), metrics.nll(probabilities, split.labels)


def rows(method: str, data: Data, seeds: int) -> Iterator[str]:
    """A line for each way to train: settings chosen on validation data, then test data once."""
    package, fit = METHODS[method]

    def run(seed: int, optimizer: Optimizer, constant: bool, test: bool) -> tuple[float, float]:
        torch.manual_seed(seed)
        loader = Loader(data, seed)
        with redirect_stdout(StringIO()):  # torchensemble says every epoch
            answer = fit(loader, optimizer, constant)
        assert loader.passes <= EPOCHS, "over the budget"
        return measured(answer, data, test)

    def sgd(lr: float) -> Optimizer:
        return {"name": "SGD", "lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}

    nll = {lr: run(SEARCH_SEED, sgd(lr), False, False)[1] for lr in RATES}
    best = min(nll, key=nll.__getitem__)
    ways = (
        ("constant", {"name": "Adam", "lr": 0.001}, True),
        (f"decayed {best}", sgd(best), False),
    )
    for name, optimizer, constant in ways:
        found = np.array([run(seed, optimizer, constant, True) for seed in range(seeds)])
        mean, error = found.mean(0), found.std(0, ddof=1) / seeds**0.5
        yield (
            f"{method:15} {package:18} {name:13} {100 * mean[0]:.2f} ± {100 * error[0]:.2f}   "
            f"{mean[1]:.3f} ± {error[1]:.3f}   {seeds}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="2 or more")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"{unknown[0]}: unknown; known are {', '.join(METHODS)}")
    warnings.filterwarnings("ignore", module="torchensemble|torch_uncertainty")
    torch.set_num_threads(1)
    data = datasets.load("fashion_mnist", flip=True)
    print("method          package            training      accuracy %     NLL            n")
    for method in options.methods or METHODS:
        for line in rows(method, data, options.seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
