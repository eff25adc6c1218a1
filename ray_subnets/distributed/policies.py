"""A policy's run on Ray: the same actors as for children, around `policy_run.run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ray_subnets import policy_run
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Data
from ray_subnets.distributed.instruments import Instruments
from ray_subnets.distributed.pool import RayPool
from ray_subnets.policy_worker import PolicyWorker
from ray_subnets.policyfile import PolicyConfig
from ray_subnets.population import Report
from ray_subnets.recipes import Result, Status


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
    instruments, ended = Instruments(folder.name), Counter[bool]()

    def see(status: Status) -> None:
        instruments.status(status, ended[True], ended[False])
        watch(status)

    def hear(report: Report) -> None:
        if isinstance(report, Result):
            ended[report.error is None] += 1
        listen(report)

    pool = RayPool(
        *(config.task(str(folder)), data, config.resources),
        jobs=len(policy_run.jobs(config)),
        growing=growing,
        notify=notify,
        watch=see,
        worker=PolicyWorker,
    )
    try:
        return policy_run.run(config, data, folder, pool, listen=hear)
    finally:
        pool.close()
