"""Diversity of outputs (7.2): Table 7.1 for any number of runs, and heat maps as Fig 7.1.

    python -m analysis.diversity runs/quickstart
    python -m analysis.diversity runs/study_tuning-* --groups            # Fig 7.1: R, NP, NP + BAG
    python -m analysis.diversity runs/benchmark_digits/cells/*-decayed-s?     # Table 7.1

Correlation (eq. 7.1), KL divergence (7.2), disagreement (7.3) of every pair of members, who shares
mistakes, the split of the error into bias, variance and covariance (2.10 to 2.13), and the plane of
accuracy against diversity. Runs of one name and several seeds are one row: mean ± standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import errors, findings, folders
from analysis.findings import Findings, Picture, Table
from analysis.folders import SELECTED, Run
from analysis.seeds import cell
from ray_subnets import metrics
from ray_subnets.combining import combine
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED, SKY

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, "#cc79a7", "#666666", "#f0e442")
MARKERS = "osD^vP*X"
_MAX_HEAT = 16  # members; a larger matrix is a texture
_MAX_MAPS = 6  # kinds of ensembles in one figure


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


def measure(logits: Tensor, labels: Tensor, how: str = "probabilities") -> dict[str, float]:
    """The means that Table 7.1 shows, and what goes with them, of `(K, N, C)` and `(N,)`."""
    p = logits.double().softmax(2)
    mistakes = errors.wrong(logits, labels)
    together = combine(logits, "probabilities" if how == "weighted" else how)
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
        numbers=measure(logits, labels, run.combine),
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


# --- tables -------------------------------------------------------------------------------------

COLUMNS = (
    ("disagreement", "disagreement (7.3)", 1.0, 4),
    ("kl", "KL, nats (7.2)", 1.0, 4),
    ("correlation", "correlation (7.1)", 1.0, 4),
    ("error_overlap", "error overlap", 1.0, 3),
    ("member_accuracy", "member accuracy %", 100.0, 2),
    ("accuracy", "accuracy %", 100.0, 2),
    ("nll", "NLL", 1.0, 4),
)
PAIRED = ("disagreement", "kl", "correlation", "error_overlap")


def table_7_1(found: Sequence[Measured]) -> Table:
    """Mean disagreement and KL of every ensemble, with accuracy; least diverse first."""
    frame = pd.DataFrame([{"ensemble": m.label, "seed": m.seed} | m.numbers for m in found])
    rows = []
    by = frame.groupby("ensemble", sort=False)
    order = by["disagreement"].mean().sort_values().index
    for label in order:
        some = by.get_group(label)
        alone = bool((some["members"] < 2).all())
        cells = [
            "" if alone and key in PAIRED else cell(some[key], scale, digits)
            for key, _, scale, digits in COLUMNS
        ]
        rows.append([str(label), f"{some['members'].mean():g}", *cells, str(len(some))])
    return Table(
        "diversity",
        "Diversity of outputs (Table 7.1): mean over pairs of members, test data",
        ["ensemble", "members", *(heading for _, heading, *_ in COLUMNS), "n"],
        rows,
        frame,
    )


def _runs_alike(some: Sequence[Measured]) -> Tensor | None:
    """`(R, K, N, C)` of runs over seeds whose members answer to one another; else None."""
    labels = some[0].labels
    alike = {m.probabilities.shape for m in some}
    if len(some) < 2 or len(alike) > 1 or any(not m.labels.equal(labels) for m in some):
        return None
    return torch.stack([m.probabilities for m in some])


def splits(found: Sequence[Measured]) -> Table:
    """Eq. 2.13 for every ensemble: over samples, and over runs where there are several."""
    rows, numbers = [], []
    for label in dict.fromkeys(m.label for m in found):
        some = [m for m in found if m.label == label]
        ways = [("samples", errors.over_samples(m.probabilities, m.labels)) for m in some]
        together = _runs_alike(some)
        if together is not None:
            ways.append((f"{len(some)} runs", errors.over_runs(together, some[0].labels)))
        numbers += [{"ensemble": label, "over": over, **vars(split)} for over, split in ways]
        for over in dict.fromkeys(over for over, _ in ways):
            mine = [split for way, split in ways if way == over]
            cells = [
                cell(pd.Series([getattr(split, key) for split in mine]), 1, 4)
                for key in ("bias_squared", "variance", "covariance", "mse")
            ]
            rows.append([label, over, str(mine[0].members), *cells, str(len(some))])
    return Table(
        "bias_variance_covariance",
        "The error of the mean answer (eqs. 2.10 to 2.13): MSE = bias² + variance / M + "
        "(1 - 1 / M) covariance",
        ["ensemble", "expectation over", "M", "bias²", "variance", "covariance", "MSE", "n"],
        rows,
        pd.DataFrame(numbers),
    )


def matrices(found: Sequence[Measured]) -> Table:
    """Every matrix of every run, a row per ordered pair."""
    rows = [
        {
            "ensemble": m.label,
            "seed": m.seed,
            "member": m.ids[i],
            "other": m.ids[j],
            "correlation": float(m.correlation[i, j]),
            "kl": float(m.kl[i, j]),
            "disagreement": float(m.disagreement[i, j]),
            "error_overlap": float(m.overlap[i, j]),
        }
        for m in found
        for i in range(len(m.ids))
        for j in range(len(m.ids))
    ]
    frame = pd.DataFrame(rows)
    cells = [[str(v) if isinstance(v, str) else f"{v:g}" for v in row.values()] for row in rows]
    return Table("pairs", "Every pair of members, test data", list(frame.columns), cells, frame)


# --- figures ------------------------------------------------------------------------------------


def _heat(figure: Figure, kinds: Sequence[Measured], what: str) -> None:
    """Fig 7.1: a matrix for each kind of ensemble, one scale for all."""
    panels = np.atleast_1d(figure.subplots(1, len(kinds)))
    some = [getattr(m, what)[:_MAX_HEAT, :_MAX_HEAT].numpy() for m in kinds]
    off = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in some])
    low, high = (float(off.min()), float(off.max())) if len(off) else (0.0, 1.0)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    digits = 3 if high - low < 0.05 else 2
    for axes, one, matrix in zip(panels, kinds, some, strict=True):
        k = len(matrix)
        mesh = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high)
        ticks = range(k) if k <= 9 else range(0, k, 2)
        axes.set_xticks(ticks, [str(i) for i in ticks])
        axes.set_yticks(ticks, [str(i) for i in ticks])
        axes.tick_params(length=0)
        axes.set_title(f"{one.label}\nmean {metrics.mean_off_diagonal(getattr(one, what)):.4f}")
        axes.title.set_fontsize(8)
        for i, j in np.ndindex(k, k) if k <= 9 else ():
            value = matrix[i, j]
            dark = value < low + 0.55 * (high - low)
            text = "1" if i == j and value > 0.5 else f"{value:.{digits}f}".lstrip("0")
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(mesh, ax=list(panels), shrink=0.75, label=what)


def _plane(figure: Figure, found: Sequence[Measured]) -> None:
    """A dot per member: its accuracy against how often it differs from the others."""
    axes = figure.subplots()
    for i, label in enumerate(dict.fromkeys(m.label for m in found)):
        some = [m for m in found if m.label == label and len(m.ids) > 1]
        if not some:
            continue
        x = [m.disagreement.sum(1) / (len(m.ids) - 1) for m in some]
        axes.scatter(
            torch.cat(x).numpy(),
            100 * torch.cat([m.member_accuracy for m in some]).numpy(),
            s=18,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            lw=0,
            alpha=0.8,
            label=label,
        )
        for m in some:
            axes.scatter(
                metrics.mean_off_diagonal(m.disagreement),
                100 * m.numbers["accuracy"],
                s=46,
                facecolors="none",
                edgecolors=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                lw=1.3,
            )
    axes.set(xlabel="disagreement with the other members", ylabel="accuracy, %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=7, handletextpad=0.2)


def _wrong(figure: Figure, kinds: Sequence[Measured]) -> None:
    """On how many samples are how many members wrong; who shares mistakes."""
    axes = figure.subplots()
    for i, m in enumerate(kinds):
        mistakes = m.probabilities.argmax(2) != m.labels
        share = errors.how_many_wrong(mistakes)[1:]
        x = np.arange(1, len(share) + 1) / len(share)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, 100 * share.numpy(), ms=4, lw=1.2, label=m.label, color=colour, marker=marker)
    axes.set(xlabel="share of the members that are wrong", ylabel="of the test samples, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)


def pictures(found: Sequence[Measured]) -> list[Picture]:
    """Heat maps of the first seed of each kind, the plane, shared mistakes."""
    kinds = list({m.label: m for m in reversed(found) if len(m.ids) > 1}.values())[::-1]
    few = kinds[:_MAX_MAPS]
    wide = 0.9 + 2.0 * len(few)
    drawn = [
        Picture(
            f"heat_{what}",
            f"Pairwise {name}",
            f"{name[0].upper()}{name[1:]} of every pair of members on test data, as Fig 7.1; "
            f"{note}. One seed.",
            (wide, 2.5),
            partial(_heat, kinds=few, what=what),
        )
        for what, name, note in (
            ("correlation", "correlation (eq. 7.1)", "lower is more diverse"),
            ("kl", "KL divergence (eq. 7.2)", "row from column, in nats"),
            ("disagreement", "disagreement (eq. 7.3)", "share of samples"),
            ("overlap", "overlap of mistakes", "both wrong among either wrong"),
        )
    ]
    plane = Picture(
        "accuracy_diversity",
        "Accuracy against diversity",
        "Filled: a member, against its mean disagreement with the others. Hollow: the ensemble of "
        "its run, against the mean of all pairs. Test data.",
        (7.0, 3.6),
        partial(_plane, found=found),
    )
    shared = Picture(
        "shared_mistakes",
        "Shared mistakes",
        "Samples on which a share of the members is wrong; what is at 1 no vote mends. One seed.",
        (5.6, 3.0),
        partial(_wrong, kinds=few),
    )
    return [*drawn, plane, shared]


def find(runs: Sequence[Run], *, groups: bool = False) -> Findings:
    """All of it.

    Raises:
        ValueError: nothing to compare, or a file is missing.
    """
    found = all_measured(runs, groups=groups)
    return Findings(
        "diversity",
        "Diversity of outputs",
        [
            "Mean over pairs of members. Error overlap: of the samples on which either of two is "
            "wrong, the share on which both are. Accuracy and NLL are of the combined answer."
        ],
        [table_7_1(found), splits(found)],
        pictures(found),
    )


def main() -> int:
    parser = findings.parser("Diversity of outputs: Table 7.1, Fig 7.1, eqs. 2.10-2.13, 7.1-7.3.")
    parser.add_argument("--groups", action="store_true", help="each group of children by itself")
    arguments = parser.parse_args()

    def do() -> Findings:
        return find(folders.open_all(arguments.runs), groups=arguments.groups)

    return findings.main("diversity", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
