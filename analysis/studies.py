"""Figures of the studies: what Figs 4.3, 5.4, 5.5, 6.1 and Table 6.1 show, from our runs.

    python -m analysis.studies runs --figure analysis/figures/studies.png

Reads runs/study_NAME-SEED for each study that is there; `make study NAME=...` makes one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.groups import frame
from analysis.seeds import cell, records
from ray_subnets.checkpoints import RunFolder, runs
from ray_subnets.figures import BLUE, ORANGE, RED, SKY

METHODS = {"one_shot": ORANGE, "iterative": RED, "uniform": SKY, "temperature": BLUE}


def _runs(root: str, name: str) -> list[str]:
    return runs(root, f"study_{name}-*")


def _value(label: str, key: str) -> float:
    """The number behind `key=` in a group's name."""
    return float(label.split(f"{key}=")[1].split("-")[0])


def sparsity(axes: Axes, root: str) -> None:
    """Fig 5.4, right: accuracy against sparsity, connections and neurons."""
    table = frame(records(_runs(root, "sparsity")))
    groups = table[table["kind"] == "group"].copy()
    groups["sparsity"] = [_value(label, "sparsity") for label in groups["group"]]
    for structure, colour, name in (("weight", BLUE, "connections"), ("unit", ORANGE, "neurons")):
        mine = groups[groups["group"].str.contains(f"structure={structure}")].groupby("sparsity")
        mean, error = 100 * mine["accuracy"].mean(), 100 * mine["accuracy"].sem()
        axes.errorbar(mean.index, mean, error, color=colour, marker="o", ms=4, label=name)
    parent = 100 * table[table["kind"] == "parent"]["accuracy"].mean()
    axes.axhline(parent, color=RED, ls="--", lw=1, label="parent")
    axes.set(xlabel="sparsity", ylabel="ensemble accuracy, %", title="Fig 5.4: what is removed")


def size(axes: Axes, root: str) -> None:
    """Fig 5.5, left: accuracy against ensemble size."""
    curves = []
    for run in _runs(root, "size"):
        record = RunFolder.open(run).read_json("result.json")
        curves.append(
            [100 * k["accuracy"] for k in record["ensemble"]["groups"]["sparse"]["by_size"]]
        )
    values = np.array(curves)
    k = [1, 2, 4, 8, 16, 32, 64, 128]
    at = values[:, [n - 1 for n in k]]
    error = at.std(0, ddof=1) / len(at) ** 0.5 if len(at) > 1 else None
    axes.errorbar(k, at.mean(0), error, color=BLUE, marker="o", ms=4, label="ensemble")
    axes.set(xlabel="members", ylabel="accuracy, %", xscale="log", title="Fig 5.5: ensemble size")
    axes.set_xticks(k, [str(n) for n in k])
    axes.minorticks_off()


def noise(axes: Axes, root: str) -> None:
    """Fig 4.3, top right: a child's accuracy against its KL divergence from the parent."""
    rows = []
    for run in _runs(root, "noise"):
        record = RunFolder.open(run).read_json("result.json")
        parent = record["parent"]["test"]["accuracy"]
        rows += [
            (
                child["group"],
                child["recipe"]["density"],
                child["kl_from_parent"],
                100 * (child["test"]["accuracy"] - parent),
            )
            for child in record["children"]
        ]
    table = pd.DataFrame(rows, columns=["group", "density", "kl", "drop"])
    slope, _ = np.polyfit(table["kl"], table["drop"], 1)
    r = table["kl"].corr(table["drop"])
    print(
        f"noise: {len(table)} children; accuracy changes by {slope:.1f} points per nat of KL from "
        f"the parent; correlation {r:.3f}"
    )
    means = table.groupby(["density", "group"])[["kl", "drop"]].mean()
    for density, colour in zip(sorted(table["density"].unique()), METHODS.values(), strict=False):
        mine = means.loc[density].sort_values("kl")
        axes.plot(mine["kl"], mine["drop"], "o-", ms=4, color=colour, label=f"density {density:g}")
    axes.set(
        xlabel="KL from the parent, nats", ylabel="accuracy minus parent's", title="Fig 4.3: noise"
    )


def annealing(schedule: str) -> Callable[[Axes, str], None]:
    """Table 6.1: accuracy minus the one-shot child's, random targets, at one schedule."""

    def draw(axes: Axes, root: str) -> None:
        table = frame(records(_runs(root, "annealing")))
        groups = table[table["kind"] == "group"].copy()
        groups["sparsity"] = [_value(label, "sparsity") for label in groups["group"]]
        end = "-1C" if schedule == "one-cycle" else ""
        baseline = None
        for method, colour in METHODS.items():
            mine = groups[groups["group"].str.startswith(f"random-{method}{end}-sparsity")]
            grid = 100 * mine.pivot(index="sparsity", columns="seed", values="accuracy")
            baseline = grid if baseline is None else baseline
            gain = grid - baseline
            x = range(len(gain))
            axes.errorbar(
                x, gain.mean(axis=1), gain.sem(axis=1), color=colour, marker="o", ms=4, label=method
            )
        axes.set_xticks(range(len(gain)), [f"{100 * s:g} %" for s in gain.index])
        axes.set(
            xlabel="sparsity",
            ylabel="accuracy minus one-shot's",
            title=f"Table 6.1: {schedule} rate",
        )

    return draw


TABLE_6_1 = {  # accuracy, %, at 50, 70, 90, 95, 98 % sparsity, ResNet-18 on CIFAR-100
    "random-one_shot": (64.0, 63.4, 55.3, 49.0, 40.1),
    "random-iterative": (65.5, 64.2, 57.8, 50.2, 42.2),
    "random-uniform": (65.5, 63.6, 59.1, 54.6, 45.7),
    "random-temperature": (65.8, 64.3, 59.5, 55.4, 46.3),
    "random-one_shot-1C": (70.2, 68.5, 62.0, 57.3, 49.3),
    "random-iterative-1C": (70.2, 69.2, 63.9, 57.3, 50.8),
    "random-uniform-1C": (70.3, 69.2, 64.6, 60.0, 52.7),
    "random-temperature-1C": (70.6, 69.6, 64.9, 60.2, 53.3),
    "magnitude-one_shot": (67.3, 66.8, 66.1, 63.5, 54.2),
    "magnitude-iterative": (68.2, 68.0, 66.0, 63.3, 56.4),
    "magnitude-temperature": (68.5, 68.2, 66.3, 63.5, 56.6),
    "magnitude-one_shot-1C": (70.9, 70.1, 69.7, 67.5, 60.4),
    "magnitude-iterative-1C": (71.1, 71.1, 70.0, 67.5, 60.6),
    "magnitude-temperature-1C": (71.4, 71.4, 70.2, 67.8, 61.5),
}


def annealing_table(root: str) -> str:
    """Table 6.1, ours with the dissertation's in brackets, as Markdown."""
    table = frame(records(_runs(root, "annealing")))
    levels = (0.5, 0.7, 0.9, 0.95, 0.98)
    lines = [
        "| target, method, rate | " + " | ".join(f"{100 * s:g} %" for s in levels) + " | n |",
        "|" + "---|" * (len(levels) + 2),
    ]
    for name, theirs in TABLE_6_1.items():
        cells, count = [], 0
        for level, there in zip(levels, theirs, strict=True):
            rows = table[table["group"] == f"{name}-sparsity={level:g}"]
            cells.append(f"{cell(rows['accuracy'], 100, 2)} ({there})")
            count = len(rows)
        what, how = name.removesuffix("-1C").split("-")
        rate = "one-cycle" if name.endswith("1C") else "constant"
        label = f"{what}, {how.replace('_', '-')}, {rate}"
        lines.append(f"| {label} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


def tau(schedule: str) -> Callable[[Axes, str], None]:
    """Fig 6.1: accuracy minus the one-shot child's against tau, a line for each length.

    Theirs was best at tau .4 to .6 and 5 or 10 of 20 epochs: 2.5 or 5 of our 10.
    """

    def draw(axes: Axes, root: str) -> None:
        table = frame(records(_runs(root, "tau")))
        end = "-1C" if schedule == "one-cycle" else ""
        base = table[table["group"] == f"one_shot{end}"].set_index("seed")["accuracy"]
        groups = table[table["group"].str.startswith(f"{schedule}-tau")].copy()
        for key in ("tau", "anneal_epochs"):
            groups[key] = [_value(label, key) for label in groups["group"]]
        groups["gain"] = 100 * (groups["accuracy"] - groups["seed"].map(base))
        for colour, (length, mine) in zip(
            METHODS.values(), groups.groupby("anneal_epochs"), strict=False
        ):
            by_tau = mine.groupby("tau")["gain"]
            mean, error = by_tau.mean(), by_tau.sem().fillna(0)
            label = f"{length:g} epochs" + (", theirs: best" if length <= 5 else "")
            axes.errorbar(mean.index, mean, error, color=colour, marker="o", ms=4, label=label)
        axes.axvspan(0.4, 0.6, color=BLUE, alpha=0.08, lw=0, label="theirs: best")
        axes.axhline(0, color=RED, ls="--", lw=1)
        axes.set(
            xlabel="initial temperature",
            ylabel="accuracy minus one-shot's",
            title=f"Fig 6.1: {schedule} rate",
        )
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend above the lines
        axes.legend(loc="upper right")

    return draw


PANELS: dict[str, list[Callable[[Axes, str], None]]] = {
    "sparsity": [sparsity],
    "size": [size],
    "noise": [noise],
    "annealing": [annealing("constant"), annealing("one-cycle")],
    "tau": [tau("constant"), tau("one-cycle")],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="One figure of all studies that were run.")
    parser.add_argument("root", metavar="RUNS", help="folder or URI that holds study_NAME-SEED")
    parser.add_argument("--figure", type=Path, required=True, help="the .png to write")
    arguments = parser.parse_args()
    try:
        found = [name for name in PANELS if _runs(arguments.root, name)]
    except ValueError as error:
        print(f"analysis.studies: {error}", file=sys.stderr)
        return 2
    panels = [draw for name in found for draw in PANELS[name]]
    if not panels:
        print(
            f"analysis.studies: no study_NAME-SEED in {arguments.root}; make study NAME=study_size",
            file=sys.stderr,
        )
        return 2
    if "annealing" in found:
        print(annealing_table(arguments.root))
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 7,
        }
    ):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
        grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes, draw in zip(grid, panels, strict=False):
            draw(axes, arguments.root)
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.25)
            if axes.get_legend() is None:
                axes.legend()
        for axes in grid[len(panels) :]:
            axes.remove()
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.figure, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
