"""Heat maps of pairs of members (Fig 7.1), accuracy against diversity, shared mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import errors
from analysis.findings import Picture
from analysis.measured import Measured
from ray_subnets import metrics
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED, SKY

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, "#cc79a7", "#666666", "#f0e442")
MARKERS = "osD^vP*X"
_MAX_HEAT = 16  # members; a larger matrix is a texture
_MAX_MAPS = 6  # kinds of ensembles in one figure


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
