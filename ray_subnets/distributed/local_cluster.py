"""Several Ray nodes on this machine: for tests, for measuring, for looking at faults.

Each node is a raylet of its own with its own object store, as on a machine of its own; only the
processors and the disk are shared.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ray reads these when it is imported. Whoever talks to the cluster needs the token; commands that
# this process starts inherit it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}

from ray.cluster_utils import Cluster

STORE = 160 * 2**20
"""bytes of each node's object store"""
# A dead node is noticed after about two seconds instead of fifteen.
_PROMPT = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


class LocalCluster:
    """A head and other nodes, all on this machine; made by `local_cluster`."""

    def __init__(self, nodes: int, cpus: int, gpus: int, head_cpus: int | None, prompt: bool):
        self._cpus, self._gpus = cpus, gpus
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": cpus if head_cpus is None else head_cpus,
                "num_gpus": gpus if head_cpus is None else 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                **({"_system_config": _PROMPT} if prompt else {}),
            },
        )
        self.nodes: list[Any] = []
        """Ray's own record of each node but the head"""
        for _ in range(nodes - 1):
            self.add()

    @property
    def address(self) -> str:
        """What `--address` is given."""
        return str(self._cluster.address)

    def add(self) -> None:
        """One more node; returns when it is part of the cluster."""
        node = self._cluster.add_node(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            object_store_memory=STORE,
        )
        self.nodes.append(node)

    def kill(self, index: int = 0) -> None:
        """End a node other than the head without warning."""
        self._cluster.remove_node(self.nodes.pop(index), allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def local_cluster(
    nodes: int = 4,
    *,
    cpus: int = 1,
    gpus: int = 0,
    head_cpus: int | None = None,
    prompt: bool = False,
) -> Iterator[LocalCluster]:
    """A cluster for the length of a `with` block.

    It listens at this machine's address, since Ray refuses to join nodes at 127.0.0.1 by that name.

    Args:
        nodes: raylets, the head's included.
        cpus: what each claims to have; more than the machine has is possible.
        gpus: the same; claimed ones need no hardware.
        head_cpus: of the head, if it should differ; it has no GPUs then.
        prompt: notice a dead node within two seconds.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    made = LocalCluster(nodes, cpus, gpus, head_cpus, prompt)
    try:
        yield made
    finally:
        made.close()
