"""Figures of a policy's run, each a function from numbers to an SVG string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ray_subnets.figures import BLUE, INK, KIND, svg
from ray_subnets.rl.policy_recipes import Iteration

WINDOW = 100  # episodes of the moving mean


def _moving(curve: Sequence[Iteration]) -> tuple[list[float], list[float]]:
    """Steps, and the mean return of the last `WINDOW` episodes there."""
    steps, means, seen = list[float](), list[float](), list[float]()
    for one in curve:
        seen = [*seen, *one.returns][-WINDOW:]
        if seen:
            steps.append(one.steps)
            means.append(sum(seen) / len(seen))
    return steps, means


def curves(parent: Sequence[Iteration], tuned: Mapping[str, Sequence[Sequence[Iteration]]]) -> str:
    """Return against steps: the parent's training, and that of tuned children.

    Args:
        tuned: group -> a curve for each child.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if tuned else 1, sharey=True, squeeze=False)[0]
        left = panels[0]
        ended = [one for one in parent if one.returns]
        means = [float(np.mean(one.returns)) for one in ended]
        left.scatter([one.steps for one in ended], means, s=5, alpha=0.3, color=BLUE, lw=0)
        left.plot(*_moving(parent), color=BLUE, label=f"mean of {WINDOW} episodes")
        left.set_title("parent", fontsize=9)
        left.set_ylabel("return in training")
        for label, many in tuned.items():
            for i, curve in enumerate(many):
                colour = KIND.get(curve[0].id.rsplit("-", 1)[0], BLUE)
                name = label if i == 0 else None
                panels[-1].plot(*_moving(curve), color=colour, lw=1, alpha=0.8, label=name)
        if tuned:
            panels[-1].set_title("children, tuned", fontsize=9)
        for axes in panels:
            axes.set_xlabel("steps of the environments")
            axes.grid(alpha=0.25)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 5))
            axes.legend(loc="best", fontsize=7)

    width = 7.2 if tuned else 5.0
    return svg("curves", (width, 2.8), draw, "Learning curves")


def returns(
    panels: Mapping[str, Mapping[str, NDArray[np.float64]]],
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> str:
    """Every episode's return, with the mean and its interval, a panel for each set of levels.

    Args:
        panels: title -> player -> returns `(n,)`.
        rows: title -> player -> its record, with mean, low and high.
    """
    names = list(next(iter(panels.values())))

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (title, players) in zip(all_axes, panels.items(), strict=True):
            for at, name in enumerate(names):
                values, row = players[name], rows[title][name]
                spread = (np.arange(len(values)) * 0.618) % 1  # the same in every drawing
                axes.scatter(values, at + 0.5 * (spread - 0.5), s=7, color=BLUE, alpha=0.25, lw=0)
                off = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
                axes.errorbar(row["mean"], at, xerr=off, fmt="o", color=INK, ms=4, capsize=3)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("return of an episode")
            axes.grid(axis="x", alpha=0.25)
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].invert_yaxis()

    height = 1.1 + 0.34 * len(names)
    return svg("returns", (7.2, height), draw, "Returns of every episode")


def differences(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean difference from the parent in pairs of episodes, with its interval.

    Args:
        panels: title -> player -> its record.
    """
    names = list(next(iter(panels.values())))

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (title, players) in zip(all_axes, panels.items(), strict=True):
            axes.axvline(0, color=INK, lw=0.8, alpha=0.6)
            for at, name in enumerate(names):
                row = players[name]
                off = row["difference"]
                colour = KIND["parent"] if row["kind"] == "child" else BLUE
                reach = [[off["mean"] - off["low"]], [off["high"] - off["mean"]]]
                axes.errorbar(off["mean"], at, xerr=reach, fmt="o", color=colour, ms=4, capsize=3)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("return minus the parent's")
            axes.grid(axis="x", alpha=0.25)
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].invert_yaxis()

    height = 1.1 + 0.3 * len(names)
    return svg("differences", (7.2, height), draw, "Paired differences from the parent")


def sweep(keys: Mapping[str, Sequence[Any]], trials: Sequence[Mapping[str, Any]]) -> str:
    """What the first ensemble gains over its parent, against a swept number.

    Args:
        keys: what is swept; the number with most values is the axis, words make panels, and other
            numbers lines.
        trials: cells with an `evaluation`; its last entry with the first way to choose is drawn.
    """
    numeric = [key for key, values in keys.items() if not any(isinstance(v, str) for v in values)]
    along = max(numeric, key=lambda key: len(keys[key]), default=None)
    words = [key for key in keys if key not in numeric]
    others = [key for key in numeric if key != along]

    def label(trial: Mapping[str, Any], names: Sequence[str]) -> str:
        return " ".join(f"{name.split('.')[-1]} {trial['values'][name]}" for name in names)

    panels: dict[str, dict[str, list[tuple[float, Mapping[str, float]]]]] = {}
    for trial in trials:
        first = trial["evaluation"][0]["choose"]
        one = [one for one in trial["evaluation"] if one["choose"] == first][-1]
        row = next(row for row in one["players"] if row["kind"] == "ensemble")
        at = float(trial["values"][along]) if along else 0.0
        lines = panels.setdefault(label(trial, words), {})
        lines.setdefault(label(trial, others), []).append((at, row["difference"]))

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            axes.axhline(0, color=INK, lw=0.8, alpha=0.6)
            for name, points in lines.items():
                points = sorted(points, key=lambda point: point[0])
                means = [off["mean"] for _, off in points]
                reach = [
                    [off["mean"] - off["low"] for _, off in points],
                    [off["high"] - off["mean"] for _, off in points],
                ]
                xs = [at for at, _ in points]
                axes.errorbar(xs, means, yerr=reach, fmt="o-", ms=4, capsize=3, label=name)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel((along or "").split(".")[-1])
            axes.grid(alpha=0.25)
            if others:
                axes.legend(fontsize=7)
        all_axes[0].set_ylabel("return minus the parent's")

    return svg("sweep", (max(4.2, 3.4 * len(panels)), 3.0), draw, "Ensemble minus parent")
