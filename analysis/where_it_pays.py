"""Where it pays: ensembles against the best-tuned single model of equal budget, over budgets.

    make map              # the runs, then: python -m analysis.where_it_pays runs/map-*

A run of `map_singles` gives single models of many budgets and rates, a run of `map_children` groups
of children of one parent; both carry the width of the network in their name. At a budget B the
opponent is the single model with the best validation NLL among those of at most B epochs. All
choices are made on validation data, for each seed; test data are read once, at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.groups import frame
from analysis.seeds import cell, records
from ray_subnets.figures import BLUE, GREEN, RED, SKY

COLOURS = {"noisy": SKY, "sparse": BLUE, "stochastic": GREEN}


def networks(table: pd.DataFrame) -> pd.Series:
    """The part of a run's name that says which network it trained: map-w256-p20 -> w256."""
    return table["run"].str.split("-").str[1]


def opponents(table: pd.DataFrame) -> pd.DataFrame:
    """For every group of every run: the best single model of its network, seed and budget."""
    table = table.assign(network=networks(table))
    singles = table[table["kind"] == "single"]
    rows = []
    for _, group in table[table["kind"] == "group"].iterrows():
        able = singles[
            (singles["network"] == group["network"])
            & (singles["seed"] == group["seed"])
            & (singles["epochs"] <= group["epochs"])
        ]
        if able.empty or group["run"].endswith("singles"):
            continue
        best = able.loc[able["validation_nll"].idxmin()]
        parent = int(group["run"].rsplit("-p", 1)[1])
        rows.append(
            {
                "network": group["network"],
                "parent": parent,
                "group": group["group"],
                "seed": group["seed"],
                "budget": group["epochs"],
                "nets": group["nets"],
                "validation": group["validation_nll"],
                "opponent": best["epochs"],
                "nll": group["nll"],
                "accuracy": group["accuracy"],
                "nll_scaled": group["nll_scaled"],
                "d_nll": group["nll"] - best["nll"],
                "d_accuracy": group["accuracy"] - best["accuracy"],
                "d_scaled": group["nll_scaled"] - best["nll_scaled"],
            }
        )
    return pd.DataFrame(rows)


def markdown(found: pd.DataFrame) -> str:
    """Differences to the opponent, mean ± standard error over seeds, by budget."""
    lines = [
        "| network | parent | children | budget | accuracy % | NLL | accuracy minus single's | "
        "NLL minus single's | both scaled | n |",
        "|" + "---|" * 10,
    ]
    order = ["network", "budget", "parent", "group"]
    for key, rows in found.groupby(order, sort=True):
        network, budget, parent, group = key
        cells = [str(network), str(parent), str(group), str(budget)]
        cells += [cell(rows["accuracy"], 100, 2), cell(rows["nll"], 1, 4)]
        cells.append(cell(rows["d_accuracy"], 100, 2, sign=True))
        cells += [cell(rows[key], 1, 4, sign=True) for key in ("d_nll", "d_scaled")]
        lines.append(f"| {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(lines)


def _single_curve(axes: Axes, singles: pd.DataFrame, key: str, scale: float) -> None:
    """The opponent as its budget grows: what the best on validation data scores on test data."""
    budgets = sorted(singles["epochs"].unique())
    values = []
    for budget in budgets:
        able = singles[singles["epochs"] <= budget]
        best = able.loc[able.groupby("seed")["validation_nll"].idxmin()]
        values.append((scale * best[key].mean(), scale * best[key].sem()))
    mean, error = zip(*values, strict=True)
    axes.errorbar(budgets, mean, error, color=RED, marker="s", ms=4, label="best single model")


def draw(table: pd.DataFrame, found: pd.DataFrame, path: Path) -> None:
    """Test NLL (plain, scaled) and accuracy against the budget, a row for each network."""
    table = table.assign(network=networks(table))
    names = sorted(found["network"].unique(), key=lambda name: int(name[1:]))
    measures = (
        ("nll", "NLL, nats", 1.0),
        ("nll_scaled", "NLL after temperature scaling", 1.0),
        ("accuracy", "accuracy, %", 100.0),
    )
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(10, 2.9 * len(names)), layout="constrained")
        grid = figure.subplots(len(names), 3, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            singles = table[(table["kind"] == "single") & (table["network"] == name)]
            mine = found[found["network"] == name]
            for axes, (key, label, scale) in zip(row, measures, strict=True):
                _single_curve(axes, singles, key, scale)
                for method, colour in COLOURS.items():
                    points = mine[mine["group"].str.startswith(method)]
                    mean = points.groupby(["parent", "group"])[["budget", key]].mean()
                    sem = points.groupby(["parent", "group"])[key].sem()
                    axes.errorbar(
                        mean["budget"],
                        scale * mean[key],
                        scale * sem,
                        fmt="o",
                        ms=4,
                        color=colour,
                        label=f"{method} ensembles",
                    )
                axes.set(xlabel="epochs in all", ylabel=label, xscale="log")
                ticks = [10, 20, 40, 80]
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.minorticks_off()
                axes.grid(alpha=0.25)
            row[0].set_title(f"MLP, {name[1:]} units a layer", loc="left", fontsize=9)
        grid[0][0].legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Ensembles against the best single model of their budget: a table and a figure."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of `make map`")
    parser.add_argument("--figure", type=Path, help="also draw it into this .png")
    arguments = parser.parse_args()
    try:
        table = frame(records(arguments.runs))
        found = opponents(table)
        if found.empty:
            raise ValueError("no groups with single models of their budget; run `make map` first")
    except ValueError as error:
        print(f"analysis.where_it_pays: {error}", file=sys.stderr)
        return 2
    print(markdown(found))
    if arguments.figure:
        draw(table, found, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
