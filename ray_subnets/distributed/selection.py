"""The actor that hears of every child's fitness and says who becomes a member."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_subnets.recipes import ChildResult, Result
from ray_subnets.selection import Decision, select


class Selection:
    """Collects results of children; the ranking is `selection.select`. Imports no torch."""

    def __init__(self, count: int | None, by: str) -> None:
        self._count, self._by = count, by
        self._results: dict[str, ChildResult] = {}

    def report(self, result: ChildResult) -> None:
        """Take a child's result; a second one for the same child replaces the first."""
        self._results[result.id] = result

    def decide(self) -> list[Decision]:
        """A decision for every child reported so far, fittest first."""
        return select(
            {id: result.fitness for id, result in self._results.items()},
            self._count,
            by=self._by,
            errors={id: r.error for id, r in self._results.items() if r.error},
        )

    def restarted(self) -> bool:
        """Did it die and come back with nothing?"""
        return ray.get_runtime_context().was_current_actor_reconstructed


def start(name: str, count: int | None, by: str, restarts: int) -> Any:
    """The actor, on this process's node if it can be: a node that leaves would take it along.

    Ray starts it again when it dies, up to `restarts` times; a call that was under way is made
    again, which changes nothing, since a result replaces itself.
    """
    here = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(Selection).options(
        name=name,
        num_cpus=0,
        max_restarts=restarts,
        max_task_retries=restarts,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
    )
    return actor.remote(count, by)


def decide(
    actor: Any, results: Mapping[str, Result], notify: Callable[[str], None]
) -> list[Decision] | None:
    """Its decisions, after it was told of every result: those of a resumed run, or of one in which
    it died, it did not hear. None if it is dead for good."""
    try:
        if ray.get(actor.restarted.remote()):
            notify("the selection actor died; it was started again and told every stored result")
        children = [result for result in results.values() if isinstance(result, ChildResult)]
        ray.get([actor.report.remote(result) for result in children])
        decisions: list[Decision] = ray.get(actor.decide.remote())
    except RayActorError:
        notify("the selection actor died; its ranking was made again from the results")
        return None
    return decisions
