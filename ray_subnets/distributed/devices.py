"""What a cluster has, and what one actor takes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch

from ray_subnets.config import ResourcesSection
from ray_subnets.placement import Node, places, share


def alive() -> dict[str, dict[str, Any]]:
    """Node id -> what Ray knows of the node, of all that are alive."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def here() -> str:
    """The node this process runs on, as results name it: address and start of its id."""
    node = ray.get_runtime_context().get_node_id()
    return f"{ray.util.get_node_ip_address()}/{node[:8]}"


def granted(gpus: float) -> str:
    """The device that Ray gave to this process: `cuda:0` or `cpu`.

    Args:
        gpus: its share; below 1 it takes no more than that part of the GPU's memory.

    Raises:
        ValueError: Ray granted a GPU that torch cannot use.
    """
    if not ray.get_gpu_ids():  # torch sees only what Ray granted, numbered from 0
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "resources.gpus_per_actor: Ray counts GPUs here, but torch finds none; install a CUDA "
            "build of torch, or set it to 0"
        )
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)
    return "cuda:0"


def nodes() -> list[Node]:
    """What every node that is alive has."""
    resources = (node["Resources"] for node in alive().values())
    return [Node(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in resources]


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
        machines = nodes()
        owned = Share(*share(resources, machines))
        if resources.gpus_per_actor is None and has_gpus():
            owned = Share(owned.cpus, 1.0)
        if not any(owned.on(node) for node in machines) and not growing:
            cpus, gpus = sum(node.cpus for node in machines), sum(node.gpus for node in machines)
            raise ValueError(
                f"resources: an actor needs {owned}, and no node has them; the cluster has "
                f"{cpus:g} CPUs and {gpus:g} GPUs in all"
            )
        return owned

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def on(self, node: Node) -> int:
        """How many such actors a node holds."""
        return places(node, self.cpus, self.gpus)

    def fit(self) -> int:
        """How many such actors the whole cluster holds now; at least 1."""
        return max(1, sum(map(self.on, nodes())))
