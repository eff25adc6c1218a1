"""Who joins the ensemble, and why: a pure function of fitness values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FITNESS = {"nll": "validation NLL", "accuracy": "validation accuracy", "rmse": "validation RMSE"}


@dataclass(frozen=True)
class Decision:
    """The verdict on one candidate."""

    id: str
    selected: bool
    rank: int | None
    """1 is the fittest; None if the candidate failed"""
    why: str


def fitness_of(validation: Mapping[str, float], by: str) -> float:
    """Fitness, larger is better, from validation metrics."""
    return validation["accuracy"] if by == "accuracy" else -validation[by]


def share_of(validation: Mapping[str, float], by: str) -> float:
    """Weight of a member in a fitness-weighted mean (eq. 3.24): between 0 and 1.

    The accuracy, or `exp(-NLL)`: the geometric mean of the probability it gave the right class.
    Regression networks, which have no accuracy, count alike: 1.
    """
    if "accuracy" not in validation and "rmse" in validation:
        return 1.0
    return math.exp(-validation["nll"]) if by == "nll" else validation["accuracy"]


def joined(decisions: Sequence[Decision], trace: Sequence[tuple[str, float]]) -> list[Decision]:
    """Decisions of a greedy forward selection, from those of `select` and its trace.

    Args:
        trace: (id, validation NLL of the ensemble with it), in the order of joining.
    """
    taken = {id: (place, nll) for place, (id, nll) in enumerate(trace, start=1)}
    result = [
        Decision(id, True, place, f"joined as number {place}: validation NLL {nll:.5f}")
        for id, (place, nll) in taken.items()
    ]
    rank = len(result)
    for decision in decisions:
        if decision.id in taken:
            continue
        if decision.rank is None:
            result.append(decision)
            continue
        rank += 1
        why = f"alone number {decision.rank}; not taken by greedy selection"
        result.append(Decision(decision.id, False, rank, why))
    return result


def select(
    fitness: Mapping[str, float | None], count: int | None, *, by: str, errors: Mapping[str, str]
) -> list[Decision]:
    """The `count` fittest candidates (algorithm 1); all that did not fail if `count` is None.

    Ties go to the id that sorts first, so the outcome does not depend on who finished first.

    Args:
        fitness: candidate id -> fitness, None for a failed one.
        errors: id -> reason, for those that failed.

    Returns:
        One decision per candidate, fittest first, failed ones last.
    """
    ranked = sorted(
        (id for id, value in fitness.items() if value is not None),
        key=lambda id: (-(fitness[id] or 0.0), id),
    )
    take = len(ranked) if count is None else min(count, len(ranked))
    decisions = []
    for rank, id in enumerate(ranked, start=1):
        if count is None:
            why = f"rank {rank} of {len(ranked)}; all are members"
        elif rank <= take:
            why = f"rank {rank} of {len(ranked)}; the best {take} are members"
        else:
            gap = (fitness[ranked[take - 1]] or 0.0) - (fitness[id] or 0.0)
            why = f"rank {rank} of {len(ranked)}; {gap:.5f} {FITNESS[by]} short of rank {take}"
        decisions.append(Decision(id, rank <= take, rank, why))
    for id in sorted(id for id, value in fitness.items() if value is None):
        decisions.append(Decision(id, False, None, f"failed: {errors.get(id, 'unknown reason')}"))
    return decisions
