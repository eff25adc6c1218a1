"""Several raylets on this machine: a cluster whose nodes can be killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

STORE = 80_000_000  # bytes of each node's object store

# A node that is gone is noticed within seconds, so that minutes suffice for fifty faults.
HEALTH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}


class Raylets:
    """A head without room for actors, and `nodes` nodes with `cpus` each."""

    def __init__(self, nodes: int, cpus: int = 1) -> None:
        self._cpus = cpus
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "_system_config": HEALTH,
                "include_dashboard": False,
            },
        )
        self._nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def size(self) -> int:
        """Nodes that can hold actors."""
        return len(self._nodes)

    def add(self) -> None:
        """One more node."""
        self._nodes.append(self._cluster.add_node(num_cpus=self._cpus, object_store_memory=STORE))

    def kill(self) -> None:
        """The oldest node that can hold actors, without a word, and all that runs on it."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def restore(self, nodes: int) -> None:
        """As many nodes as there were."""
        while self.size < nodes:
            self.add()
        while self.size > nodes:
            self.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to this cluster."""
        found: dict[int, psutil.Process] = {}
        for node in [self._cluster.head_node, *self._nodes]:
            for infos in node.all_processes.values():
                for info in infos:
                    try:
                        process = psutil.Process(info.process.pid)
                        for each in [process, *process.children(recursive=True)]:
                            found[each.pid] = each
                    except psutil.NoSuchProcess:
                        continue
        return list(found.values())

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def raylets(nodes: int, cpus: int = 1) -> Iterator[Raylets]:
    """A cluster for the length of a `with` block; set the workers' environment before."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    cluster = Raylets(nodes, cpus)
    try:
        yield cluster
    finally:
        cluster.close()
