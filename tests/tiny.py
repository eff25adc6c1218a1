"""A run that takes a second: small data, small network, every kind of child."""

from __future__ import annotations

from typing import Any

import torch

from ray_subnets import configfile, driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.pools import SerialPool
from ray_subnets.population import Worker

TINY = """
name: tiny
data: digits
model: {name: mlp, hidden: [16]}
parent: {epochs: 2, batch_size: 64}
children:
  - {method: noisy, count: 4, sigma: 0.05, partition: 2, mirrored: true}
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 2, batch_size: 64}}
  - method: stochastic
    count: 2
    partition: 2
    anneal_epochs: 1.5
    tune: {epochs: 2, batch_size: 64}
select: {count: 6}
"""


def tiny(*overrides: str) -> Config:
    return configfile.parse(TINY, "tiny", overrides)


def run_serial(settings: Config, folder: RunFolder, **how: Any) -> dict[str, Any]:
    """A whole run in this process."""
    data = driver.load_data(settings)
    cost = driver.prepare(settings, data, folder)
    pool = SerialPool(Worker(driver.task_of(settings, folder), data))
    return driver.run(settings, data, folder, pool, cost=cost, **how)


def numbers(record: Any) -> Any:
    """`result.json` without clocks, places and versions: what must be the same everywhere."""
    moving = {
        "seconds",
        "start",
        "timings",
        "worker",
        "node",
        "attempts",
        "troubles",
        "faults",
        "wall_seconds",
        "device_seconds",
        "environment",
    }
    if isinstance(record, dict):
        return {key: numbers(value) for key, value in record.items() if key not in moving}
    if isinstance(record, list):
        return [numbers(value) for value in record]
    return record


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
