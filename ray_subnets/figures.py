"""The report's figures, each a function from numbers to an SVG string.

Colours are Okabe and Ito's, which people with colour-blindness tell apart; text and axes take the
page's text colour, so that one drawing serves light pages, dark pages and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_subnets.metrics import Bins

BLUE, ORANGE, GREEN, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00"
KIND = {"noisy": SKY, "sparse": BLUE, "stochastic": GREEN, "parent": ORANGE, "single": RED}
KIND["play"] = "#999999"
INK = "#010203"  # stands for the page's text colour until the SVG is written

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None], title: str) -> str:
    """Draw a figure of `size` inches; `title` is read out by screen readers."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):  # type: ignore[dict-item]
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Group names (`axes_1`) repeat in every figure, but an id may occur once on a page.
    text = re.sub(
        r'<g id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|'
        r'PathCollection|QuadMesh|LineCollection|PolyCollection)[^"]*"',
        "<g",
        text,
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def png(size: tuple[float, float], draw: Callable[[Figure], None], dpi: int = 150) -> bytes:
    """The same drawing on white, for print and for pages that show no SVG."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def by_size(curve: Sequence[Mapping[str, float]], lines: Mapping[str, Mapping[str, float]]) -> str:
    """Test accuracy and NLL against the number of members, fittest first.

    Args:
        curve: `members`, `accuracy`, `nll` for k = 1, 2, ...
        lines: level lines to compare with: `parent`, `single`.
    """

    def draw(figure: Figure) -> None:
        k = [point["members"] for point in curve]
        left, right = figure.subplots(1, 2)
        for axes, key, label, scale in (
            (left, "accuracy", "accuracy, %", 100),
            (right, "nll", "NLL, nats", 1),
        ):
            values = [scale * point[key] for point in curve]
            axes.plot(k, values, "o-", color=BLUE, label="ensemble")
            for name, test in lines.items():
                style = "--" if name == "parent" else ":"
                axes.axhline(scale * test[key], color=KIND[name], ls=style, lw=1.8, label=name)
            axes.set_xlabel("members")
            axes.set_ylabel(label)
            axes.set_xlim(0.5, max(k) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        right.legend(loc="best")

    return svg("size", (7.2, 2.8), draw, "Accuracy and NLL against ensemble size")


def reliability(diagrams: Mapping[str, tuple[Bins, float]]) -> str:
    """Accuracy against confidence in each bin, a panel per predictor.

    Args:
        diagrams: title -> (bins, ECE).
    """

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(diagrams), sharey=True))
        for axes, (title, (bins, ece)) in zip(panels, diagrams.items(), strict=True):
            used = bins.count > 0
            x, y = bins.confidence[used].numpy(), bins.accuracy[used].numpy()
            share = (bins.count[used] / bins.count.sum()).numpy()
            axes.plot([0, 1], [0, 1], color=INK, lw=0.8, alpha=0.6)
            axes.vlines(x, np.minimum(x, y), np.maximum(x, y), color=RED, lw=1.5)
            axes.scatter(
                x, y, s=12 + 320 * share, color=BLUE, alpha=0.85, lw=0, zorder=3, clip_on=False
            )
            axes.set_title(f"{title}: ECE {ece:.4f}", fontsize=9)
            axes.set_xlabel("confidence")
            axes.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
        panels[0].set_ylabel("accuracy")

    return svg("reliability", (2.5 * len(diagrams) + 0.2, 2.8), draw, "Reliability diagrams")


def heat_map(matrix: np.ndarray, names: Sequence[str], label: str) -> str:
    """A member-by-member matrix `(K, K)`; values are written in the cells while they fit."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        k = len(names)
        off = matrix[~np.eye(k, dtype=bool)]
        top = float(off.max()) if off.size and off.max() > 0 else 1.0
        mesh = axes.pcolormesh(matrix, cmap="cividis", vmin=0, vmax=top)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xticks(np.arange(k) + 0.5, names, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(np.arange(k) + 0.5, names, fontsize=7)
        axes.tick_params(length=0)
        for i, j in np.ndindex(k, k) if k <= 12 else ():
            value = matrix[i, j]
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{value:.3f}".lstrip("0") if value else "0",
                ha="center",
                va="center",
                color="white" if value < 0.55 * top else "black",
                fontsize=6.5,
            )
        figure.colorbar(mesh, ax=axes, shrink=0.8, label=label)

    side = min(6.4, 2.4 + 0.32 * len(names))
    return svg("heat", (side + 0.9, side), draw, f"{label} of every pair of members")


def timeline(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Who worked on what, when: a lane per worker.

    Args:
        jobs: `id`, `kind`, `worker`, `start` and `seconds` (from the start of the run).
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        first: dict[str, float] = {}
        for job in jobs:
            first[job["worker"]] = min(job["start"], first.get(job["worker"], job["start"]))
        lanes = sorted(first, key=lambda worker: first[worker])
        total = max(job["start"] + job["seconds"] for job in jobs)
        shown: set[str] = set()
        for job in jobs:
            kind, lane = job["kind"], lanes.index(job["worker"])
            axes.barh(
                lane,
                job["seconds"],
                left=job["start"],
                height=0.7,
                color=KIND.get(kind, BLUE),
                edgecolor="white",
                lw=0.5,
                label=None if kind in shown else kind,
            )
            shown.add(kind)
            if job["seconds"] > 0.09 * total:
                axes.text(
                    job["start"] + job["seconds"] / 2,
                    lane,
                    job["id"],
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if kind in ("sparse", "single") else "black",
                )
        axes.set_yticks(range(len(lanes)), [f"worker {i + 1}" for i in range(len(lanes))])
        axes.invert_yaxis()
        axes.set_xlabel("seconds since the first job started")
        axes.set_xlim(0, total)
        figure.legend(loc="outside upper center", ncols=5)

    lanes = len({job["worker"] for job in jobs})
    return svg("timeline", (7.2, 1.3 + 0.42 * lanes), draw, "Timeline of the run")
