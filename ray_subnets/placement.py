"""Which devices hold actors: the arithmetic of a cluster, without a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_subnets.config import ResourcesSection


@dataclass(frozen=True)
class Node:
    """What a machine has for actors."""

    cpus: float
    gpus: float = 0.0


def share(resources: ResourcesSection, nodes: Sequence[Node]) -> tuple[float, float]:
    """CPUs and GPUs that one actor owns."""
    gpus = resources.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    return resources.cpus_per_actor, gpus


def places(node: Node, cpus: float, gpus: float) -> int:
    """How many actors of `cpus` and `gpus` each a node holds."""
    rooms = [node.cpus / cpus]
    if gpus:
        rooms.append(node.gpus / gpus)
    return math.floor(min(rooms) + 1e-9)


def missing(cpus: float, gpus: float, nodes: Sequence[Node]) -> str:
    best = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0))
    return (
        f"no node can hold an actor of {cpus:g} CPUs and {gpus:g} GPUs: the largest has "
        f"{best.cpus:g} CPUs and {best.gpus:g} GPUs; lower resources.cpus_per_actor or "
        "gpus_per_actor, or add such a node"
    )


def spread(room: Sequence[int], actors: int) -> tuple[int, ...]:
    """Actors by node, dealt out one at a time to the nodes that have room."""
    on = [0] * len(room)
    while sum(on) < min(actors, sum(room)):
        free = [i for i in range(len(room)) if on[i] < room[i]]
        on[min(free, key=lambda i: on[i])] += 1
    return tuple(on)
