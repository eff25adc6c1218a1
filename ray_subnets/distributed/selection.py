"""The actor that hears of every child's fitness and says who becomes a member."""

from __future__ import annotations

from ray_subnets.recipes import ChildResult
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
