"""Metrics over corrupted test sets, a cell for each corruption and severity.

Two ways to one number, which differ: the mean over the cells of the standard corruptions, which is
the headline here, and the pool of all images of all corruptions (one ECE over the pool), which is
what the dissertation's code computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_subnets import metrics

Key = tuple[str, int]
"""corruption, severity"""


@dataclass(frozen=True)
class Cell:
    """Metrics of one corrupted test set, and what is needed to pool it with others. For JSON."""

    accuracy: float
    nll: float
    ece: float
    count: tuple[float, ...]
    """samples in each bin of confidence"""
    confidence: tuple[float, ...]
    """mean of each bin"""
    correct: tuple[float, ...]
    """accuracy of each bin"""


def cell(probabilities: Tensor, labels: Tensor) -> Cell:
    """`(N, C)`, `(N,)`"""
    bins = metrics.reliability(probabilities, labels)
    return Cell(
        accuracy=metrics.accuracy(probabilities, labels),
        nll=metrics.nll(probabilities, labels),
        ece=bins.ece(),
        count=tuple(bins.count.tolist()),
        confidence=tuple(bins.confidence.tolist()),
        correct=tuple(bins.accuracy.tolist()),
    )


def _chosen(
    cells: Mapping[Key, Cell], names: Sequence[str], severities: Sequence[int]
) -> list[Cell]:
    keys = [(name, severity) for name in names for severity in severities]
    missing = [key for key in keys if key not in cells]
    if missing or not keys:
        raise ValueError(
            f"shift: {len(missing)} of {len(keys)} corrupted test sets are missing"
            + (f", the first is {missing[0][0]} at severity {missing[0][1]}" if missing else "")
        )
    return [cells[key] for key in keys]


def mean_over_cells(
    cells: Mapping[Key, Cell], names: Sequence[str], severities: Sequence[int] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """Mean accuracy, NLL and ECE of the cells: the headline, with `corruptions.NAMES`.

    Raises:
        ValueError: a cell is missing.
    """
    chosen = _chosen(cells, names, severities)
    return {
        key: sum(getattr(one, key) for one in chosen) / len(chosen)
        for key in ("accuracy", "nll", "ece")
    }


def pooled(
    cells: Mapping[Key, Cell], names: Sequence[str], severities: Sequence[int] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """Accuracy, NLL and ECE of all images of the cells together.

    Raises:
        ValueError: a cell is missing.
    """
    chosen = _chosen(cells, names, severities)
    counts = torch.tensor([one.count for one in chosen], dtype=torch.float64)
    total = counts.sum()
    safe = counts.sum(0).clamp_min(1)

    def over(key: str) -> Tensor:
        values = torch.tensor([getattr(one, key) for one in chosen], dtype=torch.float64)
        return (values * counts).sum(0) / safe

    def mean(key: str) -> float:
        values = torch.tensor([getattr(one, key) for one in chosen], dtype=torch.float64)
        return float((values * counts.sum(1)).sum() / total)

    bins = metrics.Bins(counts.sum(0), over("confidence"), over("correct"))
    return {"accuracy": mean("accuracy"), "nll": mean("nll"), "ece": bins.ece()}
