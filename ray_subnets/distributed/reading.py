"""One child actor led through a child's life step by step, to look at it from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import ray

from ray_subnets.data import Data
from ray_subnets.distributed.children import ChildActor, pack_data
from ray_subnets.distributed.visible import leave_mark
from ray_subnets.flat import Flat
from ray_subnets.population import Task
from ray_subnets.recipes import ChildSpec, Result


def _pid(actor: ChildActor) -> int:
    return os.getpid()


def life_of_a_child(
    task: Task, data: Data, parent: Flat, spec: ChildSpec
) -> Iterator[tuple[str, int, float]]:
    """Where the actor stands, its process id, and seconds that this took it.

    Stands: `ready` (data read, no parent), `parent read` (put and read), `tuning` (an epoch is
    done), `spawned` (at the end; the seconds are those from the job's start to the first step).
    """
    flat, rest = pack_data(data)
    actor: Any = ray.remote(ChildActor).options(num_cpus=1).remote()
    try:
        began = time.perf_counter()
        leave_mark(task.folder)
        ray.get(actor.setup.remote(task, [ray.put(flat)], rest, 0))
        pid = ray.get(actor.__ray_call__.remote(_pid))
        yield "ready", pid, time.perf_counter() - began
        began = time.perf_counter()
        ray.get(actor.load.remote([ray.put(parent)]))
        yield "parent read", pid, time.perf_counter() - began
        stream = actor.run.options(num_returns="streaming").remote(spec, 1)
        report = ray.get(next(stream))
        yield "tuning", pid, report.seconds
        while not isinstance(report, Result):
            report = ray.get(next(stream))
        yield "spawned", pid, report.timings["spawn"]
    finally:
        ray.kill(actor)
