"""What a cluster has, and what one actor takes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray

from ray_subnets.config import ResourcesSection


def alive() -> dict[str, dict[str, Any]]:
    """Node id -> what Ray knows of the node, of all that are alive."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def here() -> str:
    """The node this process runs on, as results name it: address and start of its id."""
    node = ray.get_runtime_context().get_node_id()
    return f"{ray.util.get_node_ip_address()}/{node[:8]}"


def has_gpus() -> bool:
    """Has the cluster any, or may its autoscaler start nodes that have?"""
    # None without an autoscaler. Ray offers it to its own libraries only.
    could = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return max(ray.cluster_resources().get("GPU", 0), could.get("GPU", 0)) > 0


@dataclass(frozen=True)
class Share:
    """What one actor owns."""

    cpus: float
    gpus: float

    @staticmethod
    def of(resources: ResourcesSection, *, growing: bool) -> Share:
        """From the settings, with what the cluster has for what they leave open.

        Raises:
            ValueError: no node can hold even one actor, and the cluster is not `growing` (an
                autoscaler may still start such a node).
        """
        gpus = resources.gpus_per_actor
        cluster = ray.cluster_resources()
        if gpus is None:
            gpus = 1.0 if has_gpus() else 0.0
        share = Share(resources.cpus_per_actor, gpus)
        if not any(share.on(node["Resources"]) for node in alive().values()) and not growing:
            raise ValueError(
                f"resources: an actor needs {share}, and no node has them; the cluster has "
                f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs in all"
            )
        return share

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def on(self, node: dict[str, float]) -> int:
        """How many such actors a node with these resources holds."""
        rooms = [node.get("CPU", 0) / self.cpus]
        if self.gpus:
            rooms.append(node.get("GPU", 0) / self.gpus)
        return math.floor(min(rooms) + 1e-9)

    def fit(self) -> int:
        """How many such actors the whole cluster holds now; at least 1."""
        return max(1, sum(self.on(node["Resources"]) for node in alive().values()))
