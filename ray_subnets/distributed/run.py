"""A run on Ray: pool, selection actor and, for several devices, Ray Train, around `driver.run`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_subnets import driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.data import Data
from ray_subnets.distributed.parent import RayTrainParent
from ray_subnets.distributed.pool import RayPool
from ray_subnets.distributed.selection import Selection
from ray_subnets.flops import Cost
from ray_subnets.recipes import ChildResult, Result
from ray_subnets.selection import Decision


def run(
    config: Config,
    data: Data,
    folder: RunFolder,
    *,
    cost: Cost,
    listen: driver.Listener = lambda report: None,
    notify: Callable[[str], None] = lambda line: None,
    growing: bool = False,
) -> dict[str, Any]:
    """`driver.run` on the Ray that this process is connected to; see there.

    Args:
        notify: called with a line of text when something happened that a person should know.
        growing: the cluster may start nodes on demand.
    """
    name = (
        f"selection-{os.getpid()}-{time.time_ns()}"  # a name, so that it can be found and watched
    )
    actor: Any = ray.remote(Selection).options(num_cpus=0, name=name)
    selection = actor.remote(config.select.count, config.select.by)
    task = driver.task_of(config, folder)
    trainer = None
    workers = config.parent.workers
    if workers > 1:
        gpus = ray.cluster_resources().get("GPU", 0) > 0 and config.resources.gpus_per_actor != 0
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
    )
    if trainer:
        trainer.data, trainer.rest = pool.data, pool.rest

    def choose(results: Mapping[str, Result]) -> list[Decision]:
        try:
            # A resumed run has children that this actor did not hear of.
            ray.get(
                [
                    selection.report.remote(result)
                    for result in results.values()
                    if isinstance(result, ChildResult)
                ]
            )
            return ray.get(selection.decide.remote())
        except RayActorError:
            notify("the selection actor died; its ranking was made again from the results")
            return driver.decide(results, config.select.count, config.select.by)

    try:
        return driver.run(config, data, folder, pool, cost=cost, listen=listen, choose=choose)
    finally:
        pool.close()
        ray.kill(selection)


def _check_room(workers: int, kind: str, growing: bool) -> None:
    have = ray.cluster_resources().get(kind, 0)
    if have < workers and not growing:
        raise ValueError(
            f"parent.workers: {workers} workers need {workers} {kind}s; the cluster has {have:g}"
        )
