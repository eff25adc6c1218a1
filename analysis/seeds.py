"""Mean and standard error over seeds: one table from several run folders.

    python -m analysis.seeds runs/fashion_mnist_sparse-0 runs/fashion_mnist_sparse-1 ...

Runs that differ only in their seed form one group, named by their config. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ray_subnets import table
from ray_subnets.checkpoints import RunFolder

METRICS = (("accuracy", 100.0, 2), ("nll", 1.0, 4), ("nll_scaled", 1.0, 4), ("brier", 1.0, 4))
HEADINGS = {"accuracy": "accuracy %", "nll": "NLL", "nll_scaled": "NLL, scaled", "brier": "Brier"}


def records(runs: Iterable[str]) -> list[dict[str, Any]]:
    """`result.json` of each finished run.

    Raises:
        ValueError: not a finished run, or two runs of one name share a seed.
    """
    found = [RunFolder.open(run, needs="result.json").read_json("result.json") for run in runs]
    seen = [(record["name"], record["seed"]) for record in found]
    for name, seed in seen:
        if seen.count((name, seed)) > 1:
            raise ValueError(
                f"{name}: seed {seed} was given twice; a repeated run is no new sample"
            )
    return found


def long_table(found: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run and predictor: config, seed, predictor, nets, epochs, test metrics."""
    rows = [
        {
            "config": record["name"],
            "seed": record["seed"],
            "predictor": row.name.strip(),
            "nets": row.passes,
            "epochs": row.epochs,
            **row.test,
        }
        for record in found
        for row in table.rows(record)
    ]
    return pd.DataFrame(rows)


def cell(values: pd.Series[float], scale: float, digits: int, *, sign: bool = False) -> str:
    """Mean ± standard error; the mean alone of a single value."""
    mean = f"{scale * values.mean():{'+' if sign else ''}.{digits}f}"
    if values.count() < 2:
        return mean
    return f"{mean} ± {scale * values.sem():.{digits}f}"


def markdown(frame: pd.DataFrame) -> str:
    """Mean ± standard error over seeds, predictors in the order of a run's own table."""
    lines = [
        "| config | predictor | nets | epochs | "
        + " | ".join(HEADINGS[name] for name, _, _ in METRICS)
        + " | ECE (floor) | n |",
        "|" + "---|" * (6 + len(METRICS)),
    ]
    for (config, predictor), group in frame.groupby(["config", "predictor"], sort=False):
        epochs = group["epochs"].iloc[0]
        cells = [cell(group[name], scale, digits) for name, scale, digits in METRICS]
        ece = f"{cell(group['ece'], 1, 4)} ({group['ece_floor'].mean():.4f})"
        nets = str(group["nets"].iloc[0])
        spent = "" if pd.isna(epochs) else str(int(epochs))
        row = [str(config), str(predictor), nets, spent, *cells, ece, str(len(group))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def paired(frame: pd.DataFrame, ours: str, other: str) -> list[str]:
    """For each config, the mean NLL and accuracy difference over seeds, with its standard error."""
    lines = []
    for config, group in frame.groupby("config", sort=False):
        by = group.pivot(index="seed", columns="predictor", values=["nll", "accuracy"])
        if other not in by["nll"]:
            continue
        nll = by["nll"][ours] - by["nll"][other]
        accuracy = by["accuracy"][ours] - by["accuracy"][other]
        lines.append(
            f"{config}: {ours} minus {other}: NLL {cell(nll, 1, 4)}, "
            f"accuracy {cell(accuracy, 100, 2)} points (n = {nll.count()})"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Mean and standard error over seeds, as a Markdown table."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    arguments = parser.parse_args()
    try:
        frame = long_table(records(arguments.runs))
    except ValueError as error:
        print(f"analysis.seeds: {error}", file=sys.stderr)
        return 2
    print(markdown(frame))
    print()
    for other in ("single, same budget", "parent"):
        print("\n".join(paired(frame, "selected ensemble", other)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
