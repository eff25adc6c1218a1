"""A benchmark's cells on Ray: the same actors as for children, one cell at a time each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_subnets.benchmark.cells import CellWorker
from ray_subnets.benchmark.run import MakePool
from ray_subnets.config import ResourcesSection
from ray_subnets.data import Data
from ray_subnets.distributed.pool import RayPool
from ray_subnets.pools import Pool
from ray_subnets.population import Task
from ray_subnets.recipes import Status


def pools(
    resources: ResourcesSection,
    *,
    growing: bool,
    notify: Callable[[str], None],
    watch: Callable[[Status], None],
) -> MakePool:
    """Pools on the Ray that this process is connected to; see `RayPool`."""

    @contextmanager
    def make(task: Task, data: Data, jobs: int) -> Iterator[Pool]:
        pool = RayPool(
            *(task, data, resources),
            jobs=jobs,
            growing=growing,
            notify=notify,
            watch=watch,
            worker=CellWorker,
        )
        try:
            yield pool
        finally:
            pool.close()

    return make
