"""Policies on Ray, a run or a sweep: the same actors as for children, around the same drivers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Data
from ray_subnets.distributed.instruments import Instruments
from ray_subnets.distributed.pool import RayPool
from ray_subnets.population import Report
from ray_subnets.recipes import Result, Status
from ray_subnets.rl import policy_run, policy_sweep
from ray_subnets.rl.policy_cells import PolicyCellWorker
from ray_subnets.rl.policy_sweepfile import PolicySweep
from ray_subnets.rl.policy_worker import PolicyWorker
from ray_subnets.rl.policyfile import PolicyConfig


def run(
    config: PolicyConfig,
    data: Data,
    folder: RunFolder,
    *,
    listen: policy_run.Listener = lambda report: None,
    notify: Callable[[str], None] = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
    growing: bool = False,
) -> dict[str, Any]:
    """`policy_run.run` on the Ray that this process is connected to; see there.

    Args:
        notify: called with a line of text when something happened that a person should know.
        watch: called with nodes and actors when they change.
        growing: the cluster may start nodes on demand.
    """
    driven = _Driven(folder.name, listen, watch)
    pool = RayPool(
        *(config.task(str(folder)), data, config.resources),
        jobs=len(policy_run.jobs(config)),
        growing=growing,
        notify=notify,
        watch=driven.see,
        worker=PolicyWorker,
    )
    try:
        return policy_run.run(config, data, folder, pool, listen=driven.hear)
    finally:
        pool.close()


def sweep(
    settings: PolicySweep,
    data: Data,
    folder: RunFolder,
    *,
    listen: policy_run.Listener = lambda report: None,
    notify: Callable[[str], None] = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
    growing: bool = False,
) -> dict[str, Any]:
    """`policy_sweep.run` on the Ray that this process is connected to; as `run`."""
    driven = _Driven(folder.name, listen, watch)
    first = settings.config(settings.cells()[0], settings.section.seeds[0])
    pool = RayPool(
        *(first.task(str(folder)), data, first.resources),
        jobs=len(policy_sweep.jobs(settings)),
        growing=growing,
        notify=notify,
        watch=driven.see,
        worker=PolicyCellWorker,
    )
    try:
        return policy_sweep.run(settings, folder, pool, listen=driven.hear)
    finally:
        pool.close()


class _Driven:
    """Counts what ended, for Ray's metrics, and passes everything on."""

    def __init__(
        self, name: str, listen: policy_run.Listener, watch: Callable[[Status], None]
    ) -> None:
        self._instruments, self._ended = Instruments(name), Counter[bool]()
        self._listen, self._watch = listen, watch

    def see(self, status: Status) -> None:
        self._instruments.status(status, self._ended[True], self._ended[False])
        self._watch(status)

    def hear(self, report: Report) -> None:
        if isinstance(report, Result):
            self._ended[report.error is None] += 1
        self._listen(report)
