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

import pandas as pd
import torch
from torch import Tensor

from analysis import errors, findings, folders
from analysis.diversity_figures import pictures
from analysis.findings import Findings, Table
from analysis.folders import Run
from analysis.measured import Measured, all_measured
from analysis.seeds import cell

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


def pairs(found: Sequence[Measured]) -> Table:
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
        [pairs(found)],
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
