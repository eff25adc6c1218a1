"""Groups of children against each other, over seeds: the tables of the studies.

    python -m analysis.groups runs/study_tuning-0 runs/study_tuning-1 runs/study_tuning-2

One row per group of the config: its ensemble, and its average member. `--against NAME` adds the
difference to another group, paired over seeds (the runs of a study share parent and draws).
Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.seeds import cell, records

MEASURES = (
    ("accuracy %", "accuracy", 100.0, 2),
    ("NLL", "nll", 1.0, 4),
    ("NLL, scaled", "nll_scaled", 1.0, 4),
    ("Brier", "brier", 1.0, 4),
)


def frame(found: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run and predictor: parent, single models, groups (`kind` says which)."""
    rows = []
    for record in found:
        common = {"run": record["name"], "seed": record["seed"]}
        base = record["parent"]["epochs"]
        rows.append(
            common
            | {"kind": "parent", "group": "parent", "nets": 1, "epochs": base}
            | record["parent"]["test"]
            | _validation(record["parent"]["validation"])
        )
        singles = dict(record.get("singles", {}))
        if record["single"]:
            singles["single"] = record["single"]
        for name, single in singles.items():
            if single["error"] is None:
                rows.append(
                    common
                    | {"kind": "single", "group": name, "nets": 1, "epochs": single["epochs"]}
                    | single["test"]
                    | _validation(single["validation"])
                )
        epochs = {child["id"]: child["epochs"] for child in record["children"]}
        by_id = {child["id"]: child for child in record["children"]}
        for name, group in record["ensemble"]["groups"].items():
            children = [by_id[id] for id in group["members"]]
            member = {f"member_{key}": value for key, value in group["mean_member"].items()}
            rows.append(
                common
                | {
                    "kind": "group",
                    "group": name,
                    "nets": len(children),
                    "epochs": base + sum(epochs[id] for id in group["members"]),
                    "kept": sum(child["kept"] for child in children) / len(children),
                    "kl": sum(child["kl_from_parent"] for child in children) / len(children),
                    "disagreement": group["diversity"]["disagreement"],
                }
                | group["test"]
                | member
                | _validation(group["validation"])
            )
    return pd.DataFrame(rows)


def _validation(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"validation_{key}": value for key, value in numbers.items()}


def markdown(table: pd.DataFrame, against: str | None = None) -> str:
    """Mean ± standard error over seeds, in the order of the config."""
    headings = ["predictor", "nets", "epochs", *(name for name, *_ in MEASURES)]
    headings += ["ECE (floor)", "member accuracy %", "KL from parent", "n"]
    if against:
        headings.insert(-1, f"NLL minus {against}")
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    other = table[table["group"] == against].set_index("seed")["nll"] if against else None
    for name, rows in table.groupby("group", sort=False):
        first = rows.iloc[0]
        cells = [str(name), str(first["nets"]), str(int(first["epochs"]))]
        cells += [cell(rows[key], scale, digits) for _, key, scale, digits in MEASURES]
        cells.append(f"{cell(rows['ece'], 1, 4)} ({rows['ece_floor'].mean():.4f})")
        member = first["kind"] == "group"
        cells.append(cell(rows["member_accuracy"], 100, 2) if member else "")
        cells.append(cell(rows["kl"], 1, 4) if member else "")
        if other is not None:
            difference = (rows.set_index("seed")["nll"] - other).dropna()
            told = "" if name == against else cell(difference, 1, 4, sign=True)
            if len(difference) < len(rows):
                told += f" (n = {len(difference)})"
            cells.append(told)
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Groups of children over seeds, as a Markdown table."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders, one per seed")
    parser.add_argument("--against", metavar="GROUP", help="also the paired difference to it")
    arguments = parser.parse_args()
    try:
        table = frame(records(arguments.runs))
        if arguments.against and arguments.against not in set(table["group"]):
            known = ", ".join(dict.fromkeys(table["group"]))
            raise ValueError(
                f"--against: no {arguments.against!r} in these runs; there are {known}"
            )
    except ValueError as error:
        print(f"analysis.groups: {error}", file=sys.stderr)
        return 2
    print(markdown(table, arguments.against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
