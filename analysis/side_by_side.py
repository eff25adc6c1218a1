"""Two ways of training side by side: the table of a benchmark as Table 5.1 is read.

    python -m analysis.side_by_side runs/benchmark_digits [ANOTHER...]
    python -m analysis.side_by_side runs/benchmark_x --pair TASK/ROW TASK/ROW

The first prints a row per method: accuracy and NLL in the first column of the benchmark, and the
other measures too in its last. The second prints one row minus another of any task, paired over
seeds, as Fig 5.6 compares networks that were grown with ones that were pruned. Both print Markdown.
Several benchmarks are one table, where rows of one were run apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.seeds import cell
from ray_subnets.benchmark.frame import SLACK, cells
from ray_subnets.checkpoints import RunFolder

ACCURACY, NLL = ("test_accuracy", 100.0, 2), ("test_nll", 1.0, 3)


def read(*runs: str | Path) -> pd.DataFrame:
    """One line per cell that was done, see `frame.cells`.

    Raises:
        ValueError: no benchmark, none of its cells is done, or two have the same; one line.
    """
    tables = []
    for run in runs:
        found = cells(RunFolder.open(run, needs="benchmark.json").read_json("benchmark.json"))
        done = found[found["status"] == "done"]
        if done.empty:
            raise ValueError(f"{run}: no cell of this benchmark is done")
        tables.append(done)
    joined = pd.concat(tables, ignore_index=True)
    if (twice := joined.duplicated("id")).any():
        raise ValueError(f"{runs[-1]}: another has {joined['id'][twice].iloc[0]} too; leave it out")
    return joined


def markdown(found: pd.DataFrame, task: str) -> str:
    """The rows of a task: mean ± standard error over seeds in the first and last column.

    Args:
        found: as `read` gives it.
        task: its name.
    """
    mine = found[found["task"] == task]
    first, last = mine["column"].iloc[0], mine["column"].iloc[-1]
    columns = list(dict.fromkeys([first, last]))
    names = ["method", "nets", "training FLOPs"]
    names += [name for column in columns for name in (f"accuracy %, {column}", "NLL")]
    names += ["NLL, scaled", "Brier", "ECE (floor)", "corrupted accuracy %", "n"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row, title in labels(mine).items():
        parts = [mine[(mine["row"] == row) & (mine["column"] == column)] for column in columns]
        one = parts[-1]
        if one.empty:
            continue
        cost = one["cost_flops_vs_single"].mean()
        told = [title + (" \\*" if cost > SLACK else "")]
        told += [f"{one['members'].mean():.0f}", f"{cost:.2f}x"]
        told += [_said(part, *measure) for part in parts for measure in (ACCURACY, NLL)]
        told += [_said(one, "test_nll_scaled", 1.0, 3), _said(one, "test_brier", 1.0, 3)]
        told += [f"{one['test_ece'].mean():.3f} ({one['test_ece_floor'].mean():.3f})"]
        told += [_said(one, "shift_accuracy", 100.0, 2)]
        told += [", ".join(dict.fromkeys(str(len(part)) for part in parts))]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def _said(rows: pd.DataFrame, key: str, scale: float, digits: int) -> str:
    if key not in rows or rows[key].isna().all():
        return ""
    return cell(rows[key], scale, digits)


def labels(found: pd.DataFrame) -> dict[str, str]:
    """What to call each row: its title, with its name where two have one title."""
    titles = found.drop_duplicates("row").set_index("row")["title"]
    twice = titles.duplicated(keep=False)
    return {
        str(row): f"{title} ({row})" if twice[row] else str(title) for row, title in titles.items()
    }


def pair(found: pd.DataFrame, one: str, other: str) -> str:
    """`one` minus `other`, each `TASK/ROW`, paired over the seeds that both have, by column.

    Raises:
        ValueError: there is no such row; one line.
    """
    lines = ["| column | rows | accuracy % | NLL | n |", "|" + "---|" * 5]
    for column in found["column"].unique():
        mine = found[found["column"] == column]
        a, b = _row(mine, one), _row(mine, other)
        both = a.index.intersection(b.index)
        for name, rows, sign in (
            (one, a, False),
            (other, b, False),
            (f"{one} minus {other}", a.loc[both] - b.loc[both], True),
        ):
            numbers = [
                cell(rows[key], scale, digits, sign=sign) for key, scale, digits in (ACCURACY, NLL)
            ]
            lines.append(f"| {column} | {name} | {' | '.join(numbers)} | {len(rows)} |")
    return "\n".join(lines)


def _row(found: pd.DataFrame, name: str) -> pd.DataFrame:
    task, _, row = name.partition("/")
    mine = found[(found["task"] == task) & (found["row"] == row)]
    if mine.empty:
        pairs = found[["task", "row"]].drop_duplicates().itertuples(index=False)
        raise ValueError(
            f"--pair {name}: no such row; there are " + ", ".join(f"{t}/{r}" for t, r in pairs)
        )
    return mine.set_index("seed")[[ACCURACY[0], NLL[0]]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a benchmark")
    parser.add_argument("--pair", nargs=2, metavar="TASK/ROW", help="the first minus the second")
    chosen = parser.parse_args(arguments)
    try:
        found = read(*chosen.runs)
        if chosen.pair:
            print(pair(found, *chosen.pair))
            return 0
        for task in found["task"].unique():
            print(f"{task}, *: over {SLACK} of the single model's FLOPs\n\n{markdown(found, task)}")
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
