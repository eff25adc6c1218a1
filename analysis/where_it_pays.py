"""Where it pays: ensembles against the best-tuned single model of equal budget, over budgets.

    make map              # the runs, then: python -m analysis.where_it_pays runs/map-w*
    make map-lenet        # of a convolutional network: runs/map-lenet-*

A run of `map_singles` gives single models of many budgets and rates, a run of `map_children` groups
of children of one parent; both carry the network in their name: a width, or lenet. At a budget B
the opponent is the best single model of at most B epochs, chosen for each measure on validation
data: by NLL for NLL, by NLL after temperature scaling for scaled NLL, by accuracy for accuracy.
(The number of epochs that is best for one of them is far from it for another.) Choices are made for
each seed; test data are read once, at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.groups import frame
from analysis.seeds import cell, records
from ray_subnets import metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.figures import BLUE, GREEN, RED, SKY
from ray_subnets.summary import load_outputs

COLOURS = {"noisy": SKY, "sparse": BLUE, "stochastic": GREEN}


def networks(table: pd.DataFrame) -> pd.Series:
    """The part of a run's name that says which network it trained: map-w256-p20 -> w256."""
    return table["run"].str.split("-").str[1]


MEASURES = {  # of the test data -> which single model is chosen, on validation data
    "nll": ("validation_nll", 1),
    "nll_scaled": ("validation_nll_scaled", 1),
    "accuracy": ("validation_accuracy", -1),
}


def scaled_validation(run: str, id: str) -> float:
    """Validation NLL of a network of a run after temperature scaling, from its saved outputs."""
    outputs = load_outputs(RunFolder.open(run), [id], "validation")
    log_p = outputs.logits[0].double().log_softmax(1)
    temperature = metrics.fit_temperature(log_p, outputs.labels)
    return metrics.nll((log_p / temperature).softmax(1), outputs.labels)


def read(runs: Sequence[str]) -> pd.DataFrame:
    """`groups.frame` of the runs, with the scaled validation NLL of single models."""
    table = frame(records(runs))
    folders = {}
    for run in runs:
        record = RunFolder.open(run).read_json("result.json")
        folders[record["name"], record["seed"]] = run
    table["validation_nll_scaled"] = [
        scaled_validation(folders[row["run"], row["seed"]], row["group"])
        if row["kind"] == "single"
        else float("nan")
        for _, row in table.iterrows()
    ]
    return table


def _best(able: pd.DataFrame, measure: str) -> pd.Series:
    key, sign = MEASURES[measure]
    return able.loc[(sign * able[key]).idxmin()]


def opponents(table: pd.DataFrame) -> pd.DataFrame:
    """For every group of every run: itself minus the best single model of its network, seed and
    budget (`d_`), and how many epochs that has (`epochs_`), for each measure."""
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
        best = {measure: _best(able, measure) for measure in MEASURES}
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
            }
            | {measure: group[measure] for measure in MEASURES}
            | {f"d_{measure}": group[measure] - one[measure] for measure, one in best.items()}
            | {f"epochs_{measure}": one["epochs"] for measure, one in best.items()}
        )
    return pd.DataFrame(rows)


def markdown(found: pd.DataFrame) -> str:
    """Differences to the opponent, mean ± standard error over seeds, by budget."""
    lines = [
        "| network | parent | children | epochs in all | validation NLL | accuracy % | NLL | "
        "NLL, scaled | accuracy minus single's | NLL minus single's | scaled minus single's | n |",
        "|" + "---|" * 12,
    ]
    order = ["network", "budget", "parent", "group"]
    for key, rows in found.groupby(order, sort=True):
        network, budget, parent, group = key
        cells = [str(network), str(parent), str(group), str(budget)]
        cells.append(f"{rows['validation'].mean():.4f}")
        cells += [cell(rows["accuracy"], 100, 2)]
        cells += [cell(rows[key], 1, 4) for key in ("nll", "nll_scaled")]
        cells.append(cell(rows["d_accuracy"], 100, 2, sign=True))
        cells += [cell(rows[key], 1, 4, sign=True) for key in ("d_nll", "d_nll_scaled")]
        lines.append(f"| {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(lines)


def best_of_each_budget(found: pd.DataFrame) -> pd.DataFrame:
    """Of the groups of a network and budget only the one with the best mean validation NLL."""
    order = ["network", "budget", "parent", "group"]
    means = found.groupby(order)["validation"].mean().reset_index()
    chosen = means.loc[means.groupby(["network", "budget"])["validation"].idxmin(), order]
    return found.merge(chosen, on=order)


def _single_curve(axes: Axes, singles: pd.DataFrame, key: str, scale: float) -> None:
    """The opponent as its budget grows: what the best on validation data scores on test data."""
    budgets = sorted(singles["epochs"].unique())
    values = []
    for budget in budgets:
        able = singles[singles["epochs"] <= budget]
        best = pd.Series([_best(some, key)[key] for _, some in able.groupby("seed")])
        values.append((scale * best.mean(), scale * best.sem()))
    mean, error = zip(*values, strict=True)
    axes.errorbar(budgets, mean, error, color=RED, marker="s", ms=4, label="best single model")


def _title(network: str) -> str:
    return "LeNet-S" if network == "lenet" else f"MLP, {network[1:]} units a layer"


def draw(table: pd.DataFrame, found: pd.DataFrame, path: Path) -> None:
    """Test NLL (plain, scaled) and accuracy against the budget, a row for each network."""
    table = table.assign(network=networks(table))
    names = sorted(found["network"].unique(), key=lambda name: (len(name), name))
    markers = dict(zip(sorted(found["parent"].unique()), "vo^sD", strict=False))
    measures = (
        ("nll", "NLL, nats", 1.0),
        ("nll_scaled", "NLL after temperature scaling", 1.0),
        ("accuracy", "accuracy, %", 100.0),
    )
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(10, 2.9 * len(names) + 0.7), layout="constrained")
        grid = figure.subplots(len(names), 3, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            singles = table[(table["kind"] == "single") & (table["network"] == name)]
            mine = found[found["network"] == name]
            for axes, (key, label, scale) in zip(row, measures, strict=True):
                _single_curve(axes, singles, key, scale)
                for method, colour in COLOURS.items():
                    points = mine[mine["group"].str.startswith(method)]
                    for parent, some in points.groupby("parent"):
                        by = some.groupby("group")
                        axes.errorbar(
                            by["budget"].mean(),
                            scale * by[key].mean(),
                            scale * by[key].sem(),
                            fmt=markers[parent],
                            ms=4,
                            color=colour,
                            label=f"{method}, parent {parent} epochs",
                        )
                axes.set(xlabel="epochs in all", ylabel=label, xscale="log")
                ticks = [10, 20, 40, 80]
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.minorticks_off()
                axes.grid(alpha=0.25)
            row[0].set_title(_title(name), loc="left", fontsize=9)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Ensembles against the best single model of their budget: a table and a figure."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of `make map`")
    parser.add_argument("--figure", type=Path, help="also draw it into this .png")
    parser.add_argument(
        "--best", action="store_true", help="of each budget only the group best on validation data"
    )
    arguments = parser.parse_args()
    try:
        table = read(arguments.runs)
        found = opponents(table)
        if found.empty:
            raise ValueError("no groups with single models of their budget; run `make map` first")
    except ValueError as error:
        print(f"analysis.where_it_pays: {error}", file=sys.stderr)
        return 2
    print(markdown(best_of_each_budget(found) if arguments.best else found))
    if arguments.figure:
        draw(table, found, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
