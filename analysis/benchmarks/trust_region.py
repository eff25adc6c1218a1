"""Passes and seconds of finding a KL target, against the 10 x 10 grid that brackets it.

make bench            # or: python -m analysis.benchmarks.trust_region [--samples 1000]

The grid is that of section 4.2.1: ten sigmas from a hundredth to a hundred times the answer and ten
densities, each with as many draws as the solver takes. (It tries ten densities, the solver one.)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ray_subnets import datasets, models, supervised
from ray_subnets.data import Batches, Data
from ray_subnets.recipes import ChildSpec, Training
from ray_subnets.spawning import anatomy
from ray_subnets.trust_region import Probe, Weights, solve

TARGET = 0.02
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [256, 256]},
    "lenet_s": {},
    "resnet18": {},
}
DENSITIES = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0]


def trained(name: str, data: Data, steps: int) -> torch.nn.Module:
    """A network after so many steps on a part of the training images."""
    model = models.build(name, data.input_shape, data.num_classes, NETWORKS[name], seed=0)
    part = replace(data, train=data.train.take(torch.arange(128 * steps)))
    training = Training(epochs=1, lr=0.05)
    optimizer = supervised.make_optimizer(model, training)
    for _ in supervised.train(model, Batches(part, 128, 0), training, optimizer):
        pass
    return model.eval()


def measure(name: str, data: Data, samples: int, steps: int, draws: int) -> list[list[str]]:
    """Rows of the table: three starts, and the grid."""
    model = trained(name, data, steps)
    parent = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    specs = [
        ChildSpec(id=f"{i}", method="noisy", seed=i, density=0.5, draw="bernoulli")
        for i in range(draws)
    ]
    body = anatomy(model, specs[0], data.input_shape)
    images = data.validation.images[torch.arange(samples)]

    def answers(weights: Weights) -> torch.Tensor:
        model.load_state_dict(dict(weights))
        return supervised.predict(model, images, data.preprocess)

    middle = solve(Probe(parent, body, answers), specs, TARGET).sigma
    probe = Probe(parent, body, answers)
    began = time.perf_counter()
    for i in range(10):
        sigma = middle * 10 ** (-2 + 4 * i / 9)
        for density in DENSITIES:
            probe.measure([replace(spec, sigma=sigma, density=density) for spec in specs])
    grid, grid_seconds = probe.passes, time.perf_counter() - began
    rows = [[name, "10 x 10 grid", "", "", str(grid), f"{grid_seconds:.1f}", "1.00"]]
    for label, factor in (("default", 0.0), ("/100", 0.01), ("x 100", 100.0)):
        began = time.perf_counter()
        probe = Probe(parent, body, answers)
        found = solve(probe, specs, TARGET, start=factor * middle if factor else None)
        seconds = time.perf_counter() - began
        rows.append(
            [
                name,
                f"solver, start {label}",
                f"{found.sigma:.5f}",
                f"{found.divergence.kl:.5f}",
                str(found.passes),
                f"{seconds:.1f}",
                f"{found.passes / grid:.2f}",
            ]
        )
    probe = Probe(parent, body, answers)
    began = time.perf_counter()
    found = solve(probe, specs, TARGET, per_layer=True)
    seconds = time.perf_counter() - began
    what = f"solver, {len(body.shapes)} layers each"
    kl, passes = f"{found.divergence.kl:.5f}", str(found.passes)
    share = f"{found.passes / grid:.2f}"
    return [*rows, [name, what, "", kl, passes, f"{seconds:.1f}", share]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="of the hold-out set")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=150, help="training before, of 128 images")
    parser.add_argument("--draws", type=int, default=4, help="of mask and noise")
    options = parser.parse_args()
    torch.set_num_threads(2)
    data = datasets.load("fashion_mnist", validation=5000)
    table = Table(title=f"KL target {TARGET}, {options.draws} draws, {options.samples} samples")
    for heading in ("network", "how", "sigma", "KL", "passes", "seconds", "of the grid's passes"):
        table.add_column(heading, justify="left" if heading in ("network", "how") else "right")
    for name in options.networks:
        for row in measure(name, data, options.samples, options.steps, options.draws):
            table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
