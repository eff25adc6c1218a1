"""What a benchmark found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from ray_subnets.benchmark.columns import ACCURACY, NLL, Shown, difference, lines_of, p_text
from ray_subnets.benchmark.frame import MIN_SEEDS, single, tables

_FEW = 4  # names that a sentence takes


def _listed(labels: Sequence[str]) -> str:
    if any("," in label for label in labels):
        return "; ".join(labels)
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def verdict(record: Mapping[str, Any]) -> list[str]:
    """For each task and column: which row is best, which ones tie, where the single model stands.

    Raises:
        ValueError: the record lacks something.
    """
    found = []
    for task, column, table in tables(record):
        base = single(record)
        where = f"{task}, {column}"
        best = table[table["nll_stands"] == "best"]
        if best.empty:
            found.append(f"{where}: no cell is finished yet.")
            continue
        sentences = [_best(record, table, best.iloc[0])]
        if base is not None:
            sentences += _single(table, base)
        beyond = [
            f"{row['label']} ({row['over']}) {NLL.mean(row)}, {_apart(row, 'nll')}"
            for row in lines_of(table)
            if row["over"] and row["n"] and row["nll_stands"] != "best"
        ]
        if beyond:
            sentences.append(f"NLL beyond the budget: {'; '.join(beyond)}.")
        found.append(f"{where}: " + " ".join(sentences))
    return found


def _best(record: Mapping[str, Any], table: pd.DataFrame, best: pd.Series[Any]) -> str:
    within = table[(table["over"] == "") & (table["n"] > 0)]
    among = f"within {record['budget']} epochs" if len(within) else "of all (none within budget)"
    text = (
        f"{best['label']} has the lowest NLL {among}, {_pm(NLL, best)} (n = {best['n']}), with "
        f"{_pm(ACCURACY, best)} % accuracy."
    )
    others = within[within["nll_stands"] != "best"] if len(within) else table.drop(best.name)
    stands = {kind: list(rows["label"]) for kind, rows in others.groupby("nll_stands")}
    same, apart = stands.get("same", []), stands.get("apart", [])
    if len(same) > len(apart) > 0:  # the shorter list says as much
        text += f" Worse: {_listed(apart)}. Not distinguishable from it: the {len(same)} others."
    elif same and not apart and len(same) > _FEW:
        text += f" Not distinguishable from it: all {len(same)} others."
    elif same:
        text += f" Not distinguishable from it: {_listed(same)}."
    elif apart:
        text += f" Every other that could be tested ({len(apart)}) is worse."
    few = [row["label"] for row in lines_of(others) if row["n"] and row["nll_stands"] == "untested"]
    if ahead := stands.get("ahead"):
        text += f" Better on the seeds that both have: {_listed(ahead)}."
    if few:
        text += f" Fewer than {MIN_SEEDS} seeds in common with it, nothing claimed: {_listed(few)}."
    return text


def _single(table: pd.DataFrame, base: str) -> list[str]:
    """Where the single model stands."""
    row = table.loc[base]
    if not row["n"]:
        return [f"The {row['label']} has no finished cell."]
    ranked = table[(table["over"] == "") & table["test_nll"].notna()]
    rank = int(ranked["test_nll"].rank(method="min")[base]) if base in ranked.index else None
    text = f"The {row['label']}: NLL {_pm(NLL, row)}, {_pm(ACCURACY, row)} % accuracy"
    if rank is not None and len(ranked) > 1:
        text += f", number {rank} of {len(ranked)} by NLL"
    if row["nll_stands"] != "best":
        text += f"; {_apart(row, 'nll')}"
    return [text + "."]


def _apart(row: Mapping[str, Any], measure: str) -> str:
    told = "not distinguishable" if row[f"{measure}_stands"] == "same" else ""
    gap = difference(row, measure, 1, 4)
    if not gap:
        return "no seed in common with the best"
    text = f"{gap} against the best"
    p = p_text(row, measure)
    reasons = ", ".join(part for part in (told, f"p {p}" if "n =" not in p else p) if part)
    return f"{text} ({reasons})" if reasons else text


def _pm(shown: Shown, row: Mapping[str, Any]) -> str:
    """Mean ± standard error alone."""
    return replace(shown, tested="", floor="").text(row)
