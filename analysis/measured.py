"""Ensembles of run folders, measured: matrices over pairs of members, and their means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from analysis import errors
from analysis.folders import SELECTED, Run
from ray_subnets import metrics
from ray_subnets.combining import combine


@dataclass(frozen=True)
class Measured:
    """One ensemble of one run: matrices `(K, K)` and numbers."""

    label: str
    seed: int
    ids: tuple[str, ...]
    correlation: Tensor
    kl: Tensor
    disagreement: Tensor
    overlap: Tensor
    member_accuracy: Tensor
    probabilities: Tensor
    labels: Tensor
    numbers: dict[str, float]


def measure(
    logits: Tensor,
    labels: Tensor,
    how: str = "probabilities",
    shares: Sequence[float] | None = None,
) -> dict[str, float]:
    """The means that Table 7.1 shows, and what goes with them, of `(K, N, C)` and `(N,)`.

    Args:
        shares: of the members in a weighted mean.
    """
    p = logits.double().softmax(2)
    mistakes = errors.wrong(logits, labels)
    together = combine(logits, how, shares)
    split = errors.over_samples(p, labels)
    pairs = metrics.mean_off_diagonal
    return {
        "members": len(logits),
        "disagreement": pairs(metrics.disagreement(logits)),
        "kl": pairs(metrics.kl_divergence(logits)),
        "correlation": pairs(metrics.correlation(p)),
        "error_overlap": pairs(errors.overlap(mistakes)),
        "same_mistake": errors.same_mistake(logits, labels),
        "all_wrong": float(mistakes.all(0).double().mean()),
        "member_accuracy": float((~mistakes).double().mean()),
        "accuracy": metrics.accuracy(together, labels),
        "nll": metrics.nll(together, labels),
        "bias_squared": split.bias_squared,
        "variance": split.variance,
        "covariance": split.covariance,
        "brier": split.mse,
    }


def measured(run: Run, group: str, label: str) -> Measured:
    """One ensemble from its saved test outputs."""
    outputs = run.outputs(run.groups[group])
    logits, labels = outputs.logits, outputs.labels
    p = logits.double().softmax(2)
    mistakes = errors.wrong(logits, labels)
    return Measured(
        label=label,
        seed=run.seed,
        ids=outputs.ids,
        correlation=metrics.correlation(p),
        kl=metrics.kl_divergence(logits),
        disagreement=metrics.disagreement(logits),
        overlap=errors.overlap(mistakes),
        member_accuracy=(~mistakes).double().mean(1),
        probabilities=p,
        labels=labels,
        numbers=measure(logits, labels, run.combine, run.shares(outputs.ids)),
    )


def all_measured(runs: Sequence[Run], *, groups: bool) -> list[Measured]:
    """Every ensemble of every run: the selected members, or each group of children."""
    columns = {str(run.cell["column"]) for run in runs if run.cell}
    several = len({run.name for run in runs}) > 1
    found = []
    for run in runs:
        base = run.name
        if run.cell and len(columns) > 1:
            base = f"{run.name} {run.cell['column']}"
        if groups:
            if len(run.groups) < 2:
                raise ValueError(f"--groups: {run.folder} has no groups of children")
            for group in run.groups:
                if group != SELECTED:
                    label = f"{base}: {group}" if several else group
                    found.append(measured(run, group, label))
        else:
            found.append(measured(run, SELECTED, base))
    if all(len(one.ids) < 2 for one in found):
        raise ValueError(
            "RUN: a single network has no diversity; name runs with two or more members"
        )
    return found
