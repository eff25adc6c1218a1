"""Figures of a benchmark: quality against cost and against shift, every method by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_subnets.figures import BLUE, GREEN, INK, ORANGE, RED, svg


@dataclass(frozen=True)
class Point:
    """A method in a plot of quality against cost."""

    label: str
    x: float
    y: float
    error: float = 0.0
    """standard error of y; 0 for none"""
    kind: str = "within"
    """within the budget, beyond it, or single"""


_MARKS = {
    "within": ("o", BLUE, "within the budget"),
    "beyond": ("s", ORANGE, "beyond the budget"),
    "single": ("D", RED, "single model"),
}


def against_cost(
    name: str, points: Sequence[Point], x_label: str, y_label: str, *, low: bool
) -> str:
    """Quality against cost, a point per method, every one with its name.

    Args:
        name: unique on a page.
        low: whether a low y is the better one.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _limit(axes, points, low)
        bottom, top = axes.get_ylim()
        clipped = [min(max(point.y, bottom), top) for point in points]
        for kind, (marker, colour, told) in _MARKS.items():
            chosen = [i for i, point in enumerate(points) if point.kind == kind]
            if not chosen:
                continue
            axes.errorbar(
                [points[i].x for i in chosen],
                [clipped[i] for i in chosen],
                [points[i].error if clipped[i] == points[i].y else 0 for i in chosen],
                fmt=marker,
                color=colour,
                mfc="none" if kind == "beyond" else colour,
                ms=6,
                lw=1,
                clip_on=False,
                zorder=3,
                label=told,
            )
        _frontier(axes, points, low)
        _cost_axis(axes, [point.x for point in points])
        texts = [
            point.label if y == point.y else f"{point.label} ({point.y:.4g})"
            for point, y in zip(points, clipped, strict=True)
        ]
        _names(axes, [point.x for point in points], clipped, texts)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    size = (5.6, max(3.2, 0.9 + 0.17 * len(points)))
    return svg(name, size, draw, f"{y_label} against {x_label}")


def _limit(axes: Axes, points: Sequence[Point], low: bool) -> None:
    """Limits of y that one bad method does not stretch: it is drawn at their edge."""
    values = [point.y for point in points]
    best, worst = (min(values), max(values)) if low else (max(values), min(values))
    reach = 3 * abs(float(np.median(values)) - best)
    end = best + np.sign(worst - best) * reach if 0 < reach < abs(worst - best) else worst
    margin = 0.06 * abs(end - best) or 0.01
    bottom, top = min(best, end), max(best, end)
    shown = [point for point in points if bottom <= point.y <= top]
    bottom = min([bottom, *(point.y - point.error for point in shown)])
    top = max([top, *(point.y + point.error for point in shown)])
    axes.set_ylim(bottom - margin, top + margin)


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """By factors where costs differ by some; ticks are plain numbers."""
    if min(costs) > 0 and max(costs) > 3 * min(costs):
        axes.set_xscale("log")
        steps = [m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5)]
        shown = [step for step in steps if min(costs) / 1.5 <= step <= max(costs) * 1.5]
        axes.set_xticks(shown, [f"{step:g}" for step in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(costs) / 1.25, max(costs) * 1.25)
    else:
        spread = (max(costs) - min(costs)) or max(costs) or 1.0
        axes.set_xlim(min(costs) - 0.08 * spread, max(costs) + 0.08 * spread)


def _frontier(axes: Axes, points: Sequence[Point], low: bool) -> None:
    """A line of steps under which (or over which) no method is: none is cheaper and better."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y if low else -p.y)):
        if not best or (point.y < best[-1].y if low else point.y > best[-1].y):
            best.append(point)
    axes.step(
        [point.x for point in best],
        [point.y for point in best],
        where="post",
        color=INK,
        lw=0.8,
        alpha=0.5,
        zorder=1,
    )


def _names(axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
    """Names in a column right of the axes, none over another, each tied to its point."""
    at = (axes.transScale + axes.transLimits).transform(np.column_stack([x, y]))
    gap = 1 / max(18, len(texts))
    order = np.argsort(at[:, 1], kind="stable")
    places: list[float] = []
    for i in order:
        wanted = max(float(at[i, 1]), 0.0)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    ceiling = 1.0
    for k in reversed(range(len(places))):
        places[k] = min(places[k], ceiling)
        ceiling = places[k] - gap
    ties = [(tuple(at[i]), (1.02, place)) for i, place in zip(order, places, strict=True)]
    axes.add_collection(
        LineCollection(
            ties, colors=INK, lw=0.5, alpha=0.35, transform=axes.transAxes, clip_on=False
        ),
        autolim=False,
    )
    for i, place in zip(order, places, strict=True):
        axes.text(1.03, place, texts[i], transform=axes.transAxes, fontsize=8, va="center")


def by_severity(
    name: str,
    severities: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    y_label: str,
    *,
    low: bool,
    single: str | None,
) -> str:
    """A measure on corrupted data against severity; the three best and the single model stand out.

    Args:
        name: unique on a page.
        curves: label -> a value for each severity.
        single: label of the single model.
    """
    last = sorted(curves, key=lambda label: curves[label][-1] * (1 if low else -1))
    three = ((BLUE, "-", "o"), (GREEN, "--", "^"), (ORANGE, "-.", "s"))
    looks = dict(zip(last, three, strict=False))
    if single in curves:
        looks[str(single)] = (RED, ":", "D")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for label, values in curves.items():
            if label in looks:
                colour, line, marker = looks[label]
                axes.plot(severities, values, color=colour, ls=line, marker=marker, ms=4, lw=1.6)
            else:
                axes.plot(severities, values, color=INK, alpha=0.3, lw=0.8)
        axes.set_xlim(severities[0] - 0.1, severities[-1] + 0.1)
        axes.set_ylim(*axes.get_ylim())
        ends = [values[-1] for values in curves.values()]
        _names(axes, [severities[-1]] * len(ends), ends, list(curves))
        axes.set_xlabel("severity of the corruption")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)

    size = (5.6, max(3.2, 0.9 + 0.17 * len(curves)))
    return svg(name, size, draw, f"{y_label} against severity")
