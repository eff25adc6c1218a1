"""A run on Ray: pool, selection actor and, for several devices, Ray Train, around `driver.run`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from ray_subnets import driver
from ray_subnets.blueprint import Blueprint
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.data import Data
from ray_subnets.distributed import selection as selecting
from ray_subnets.distributed.devices import has_gpus
from ray_subnets.distributed.instruments import Instruments
from ray_subnets.distributed.parent import RayTrainParent
from ray_subnets.distributed.pool import RayPool
from ray_subnets.distributed.sent import Sent
from ray_subnets.flops import Cost
from ray_subnets.population import Report, Worker
from ray_subnets.recipes import Result, Status
from ray_subnets.selection import Decision


def run(
    config: Config,
    data: Data,
    folder: RunFolder,
    *,
    cost: Cost,
    listen: driver.Listener = lambda report: None,
    notify: Callable[[str], None] = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
    growing: bool = False,
    network: Blueprint | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """`driver.run` on the Ray that this process is connected to; see there.

    Args:
        notify: called with a line of text when something happened that a person should know.
        watch: called with nodes and actors when they change.
        growing: the cluster may start nodes on demand.
        network: the run's network, if it is not built by name.
        weights: file in the run folder with the parent's initial weights; default: as the
            configuration says.
    """
    name = f"selection-{os.getpid()}-{time.time_ns()}"  # so that it can be found and watched
    selection = selecting.start(
        name, config.select.count, config.select.by, config.resources.retries
    )
    instruments = Instruments(folder.name)
    ended: Counter[bool] = Counter()
    task = driver.task_of(config, folder)
    task = replace(task, weights=weights or task.weights)

    def see(status: Status) -> None:
        instruments.status(status, ended[True], ended[False])
        watch(status)

    def hear(report: Report) -> None:
        if isinstance(report, Result):
            ended[report.error is None] += 1
        listen(report)

    trainer = None
    workers = config.parent.workers
    if workers > 1:
        gpus = has_gpus() and config.resources.gpus_per_actor != 0
        trainer = RayTrainParent(task, workers=workers, threads=config.resources.threads, gpus=gpus)
        _check_room(workers, "GPU" if gpus else "CPU", growing)
    pool = RayPool(
        task,
        data,
        config.resources,
        jobs=len(driver.jobs(config)),
        selection=selection,
        growing=growing,
        parent_trainer=trainer,
        parent_devices=workers if trainer else 0,
        notify=notify,
        watch=see,
        worker=Worker if network is None else _given(network),
    )
    if trainer:
        trainer.data, trainer.rest = pool.data, pool.rest

    def choose(results: Mapping[str, Result]) -> list[Decision]:
        decisions = selecting.decide(selection, results, notify)
        if decisions is None:
            decisions = driver.decide(results, config.select.count, config.select.by)
        return decisions

    try:
        return driver.run(config, data, folder, pool, cost=cost, listen=hear, choose=choose)
    finally:
        pool.close()
        ray.kill(selection)


def _given(network: Blueprint) -> Any:
    """Makes workers of a network that is not built by name."""
    return Sent(partial(Worker, network=network), "the model")


def _check_room(workers: int, kind: str, growing: bool) -> None:
    have = ray.cluster_resources().get(kind, 0)
    if have < workers and not growing:
        raise ValueError(
            f"parent.workers: {workers} workers need {workers} {kind}s; the cluster has {have:g}"
        )
