"""What a sweep costs on Ray Tune, beside the same grid as a plain loop in one process.

make bench            # or: python -m analysis.benchmarks.sweeps [--size 10] [--seeds 3]

LeNet-S on Fashion-MNIST: sigma by density, a few noisy children to a trial. Parents are trained
before the clock starts. "Beyond" is what a cell cost a worker beyond its trials' own work; wanted:
at most half a second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_subnets.checkpoints import RunFolder
from ray_subnets.distributed import cluster, sweeps
from ray_subnets.sweeps import sweepfile
from ray_subnets.sweeps.sweepmonitor import Monitor, run_here
from ray_subnets.sweeps.trials import Evaluator

BASE = """
name: bench
data: {{name: fashion_mnist, validation: {samples}, train_limit: 5000, flip: true}}
model: lenet_s
parent: {{epochs: 1, lr: 0.05}}
single: false
children:
  - {{method: noisy, count: {children}, sigma: 0.01}}
resources: {{threads: 1, actors: {actors}}}
sweep:
  keys: {{sigma: {sigmas}, density: {densities}}}
  seeds: {seeds}
"""


def settings(options: argparse.Namespace, actors: int) -> sweepfile.Sweep:
    n = options.size
    text = BASE.format(
        samples=options.samples,
        children=options.children,
        actors=actors,
        sigmas=[round(0.005 * 1.5**i, 6) for i in range(n)],
        densities=[round((i + 1) / n, 3) for i in range(n)],
        seeds=list(range(options.seeds)),
    )
    return sweepfile.parse(text, "bench")


def prepared(sweep: sweepfile.Sweep, root: str, name: str) -> RunFolder:
    """A sweep's folder with its parents already trained."""
    folder = RunFolder.create(Path(root) / name)
    evaluator = Evaluator(folder.root)
    cell = sweep.cells()[0]
    for seed in sweep.section.seeds:
        evaluator.evaluate(sweep.config(cell, seed))
    return folder


def row(name: str, record: dict[str, Any]) -> list[str]:
    seconds = record["seconds"]
    trials = len(record["trials"])
    return [
        name,
        f"{trials} x {len(record['seeds'])}",
        f"{seconds['trials']:.1f}",
        f"{seconds['work']:.1f}",
        f"{seconds['work'] / trials:.2f}",
        f"{seconds['beyond_per_trial']:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10, help="sigmas, and densities")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="validation images")
    parser.add_argument("--children", type=int, default=4)
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    table = Table(title="A sweep, seconds")
    for heading in (
        "how",
        "cells x seeds",
        "clock",
        "own work",
        "work per cell",
        "beyond, per cell",
    ):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    with tempfile.TemporaryDirectory() as root:
        sweep = settings(options, 1)
        folder = prepared(sweep, root, "here")
        here = run_here(sweep, folder, Monitor(folder, sweep))
        table.add_row(*row("a loop in one process", here))
        sweep = settings(options, options.actors)
        folder = prepared(sweep, root, "tune")
        with cluster.session(cpus=options.actors):
            there = sweeps.run(sweep, folder, Monitor(folder, sweep))
        table.add_row(*row(f"Ray Tune, {options.actors} warm actors", there))
    for one, two in zip(here["trials"], there["trials"], strict=True):
        assert one["mean"] == two["mean"], "the same numbers"
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
