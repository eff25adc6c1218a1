"""The record of a benchmark as data frames: every cell, means over seeds, tests against the best.

Legend: a row is a method with its settings, a column a way of training (schedule), a task data and
network, a cell one row of one task and column with one seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ray_subnets.baselines.independent import Independent

TESTED = {"nll": "low", "accuracy": "high"}
"""test metrics by which rows are compared, and which end is better"""
LEVEL = 0.05
"""a Holm-corrected p below it tells two rows apart"""
MIN_SEEDS = 3
"""nothing is claimed from fewer pairs"""
SLACK = 1.05
"""a row that takes more than this times the single model's epochs or FLOPs is beyond the budget"""


class Frames(NamedTuple):
    """The two tables behind every other one."""

    cells: pd.DataFrame
    """one line per cell that was planned; `status` is done, failed or missing"""
    table: pd.DataFrame
    """one line per task, column and row, see `aggregate`"""


def frames(record: Mapping[str, Any]) -> Frames:
    """Both tables of a record.

    Raises:
        ValueError: the record lacks something.
    """
    found = cells(record)
    parts = [
        table.reset_index().assign(task=task, column=column)
        for task, column, table in _tables(record, found)
    ]
    whole = pd.concat(parts, ignore_index=True)
    first = ["task", "column"]
    return Frames(found, whole[first + [name for name in whole if name not in first]])


def tables(record: Mapping[str, Any]) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(task, column, `aggregate`) for every one, in the record's order.

    Raises:
        ValueError: the record lacks something.
    """
    return _tables(record, cells(record))


def _tables(
    record: Mapping[str, Any], found: pd.DataFrame
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for task, column in product(record["tasks"], record["columns"]):
        yield task["name"], column, _aggregate(record, found, task["name"], column)


def cells(record: Mapping[str, Any]) -> pd.DataFrame:
    """One line per planned cell; what is nested in the record is joined by `_`: `test_nll`.

    Raises:
        ValueError: the record lacks something, or has a cell twice.
    """
    try:
        planned = pd.DataFrame(
            [
                {
                    "task": task["name"],
                    "data": task["data"]["name"],
                    "model": task["model"],
                    "column": column,
                    "row": row["name"],
                    "title": row["title"],
                    "seed": seed,
                }
                for task, column, row, seed in product(
                    *(record[key] for key in ("tasks", "columns", "rows", "seeds"))
                )
            ]
        )
        done = [cell for cell in record["cells"] if cell["error"] is None]
        for cell in done:
            _ = cell["test"]["nll"], cell["test"]["accuracy"], cell["cost"]["epochs"]
        numbers = pd.json_normalize(list(record["cells"]), sep="_")
    except (KeyError, TypeError) as error:
        raise ValueError(f"benchmark.json: incomplete or of another version ({error})") from None
    key = ["task", "column", "row", "seed"]
    always = [*key, "error", *(f"test_{measure}" for measure in TESTED)]  # though none is done
    numbers = numbers.reindex(columns=list(dict.fromkeys([*always, *numbers.columns])))
    twice = numbers[numbers.duplicated(key)]
    if len(twice):
        told = ", ".join(str(value) for value in twice.iloc[0][key])
        raise ValueError(f"benchmark.json: the cell {told} is in it twice")
    if planned.empty:
        raise ValueError("benchmark.json: no tasks, columns, rows or seeds in it")
    # Where a part is null, like `shift`, its name is a column beside those of its numbers.
    numbers = numbers.drop(columns=[part for part in ("shift", "ood") if part in numbers])
    result = planned.merge(numbers, on=key, how="left", indicator="status")
    wrong, absent = result["error"].notna(), result["status"] == "left_only"
    result["status"] = np.select([absent, wrong], ["missing", "failed"], "done")
    result["error"] = result["error"].astype(object).where(wrong, "")
    if "members" in result:  # one network differs from nobody: that is no number, and not 0
        pairwise = [name for name in result if name.startswith("diversity_")]
        result[pairwise] = result[pairwise].where(result["members"] > 1)
    first = [*planned.columns, "status", "error"]
    return result[first + [name for name in result if name not in first]]


def aggregate(record: Mapping[str, Any], task: str, column: str) -> pd.DataFrame:
    """Mean and standard error over seeds of each row, and how it compares with the best.

    Returns:
        Indexed by row, in the record's order: `title`, `label` (unique), `n`, `failed`, `missing`,
        `why` (of the first failure), `over` (by what it exceeds the budget; empty if it does not);
        every number of the cells as its mean, and as `..._se` its standard error (NaN of one
        seed); and for `nll` and `accuracy`, `nll_difference` (mean of this row minus the best, over
        the seeds that both have), `..._difference_se`, `nll_pairs`, `nll_p` (paired t-test, two
        sides), `nll_p_holm`, `nll_stands`: best, same (not distinguishable from the best), apart
        (worse), ahead (better: beyond the budget, or on the seeds that both have), untested.

    Raises:
        ValueError: the record lacks something.
    """
    return _aggregate(record, cells(record), task, column)


def _aggregate(
    record: Mapping[str, Any], found: pd.DataFrame, task: str, column: str
) -> pd.DataFrame:
    here = found[(found["task"] == task) & (found["column"] == column)]
    done = here[here["status"] == "done"]
    names = [row["name"] for row in record["rows"]]
    titles = [row["title"] for row in record["rows"]]
    result = pd.DataFrame({"title": titles}, index=pd.Index(names, name="row"))
    result["label"] = [
        title if titles.count(title) == 1 else f"{title} ({name})"
        for name, title in zip(names, titles, strict=True)
    ]
    counts = here.groupby(["row", "status"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=names, columns=["done", "failed", "missing"], fill_value=0)
    result["n"], result["failed"], result["missing"] = (counts[name] for name in counts)
    failures = here[here["status"] == "failed"].groupby("row")["error"].first()
    result["why"] = failures.reindex(names, fill_value="")
    kinds = done.drop(columns="seed").select_dtypes("number").columns
    grouped = done.groupby("row", sort=False)[list(kinds)]
    spread = grouped.sem().add_suffix("_se")
    order = [f"{name}{end}" for name in kinds for end in ("", "_se")]
    numbers = grouped.mean().join(spread)[order].reindex(names)
    result = result.join(numbers)
    result["over"] = [_over(record, row, result.loc[row["name"]]) for row in record["rows"]]
    for measure, better in TESTED.items():
        values = done.pivot(index="seed", columns="row", values=f"test_{measure}")
        result = result.join(
            compare(values.reindex(columns=names), _rivals(result), better, measure)
        )
    return result


def _over(record: Mapping[str, Any], row: Mapping[str, Any], means: Mapping[str, Any]) -> str:
    """By what a row exceeds the single model: "8.0x the epochs"; empty if by less than 5 %."""
    spent = np.nanmax([row["budget"], means.get("cost_epochs", np.nan)])
    flops = [means.get(f"cost_{name}", np.nan) for name in _RATIOS]
    known = [value for value in flops if not np.isnan(value)]
    ratios = {"epochs": spent / record["budget"], "FLOPs": max(known, default=0.0)}
    return ", ".join(f"{x:.2g}x the {what}" for what, x in ratios.items() if x > SLACK)


_RATIOS = ("flops_vs_single", "flops_dense_vs_single")


def _rivals(result: pd.DataFrame) -> Sequence[str]:
    """Rows among which the best is looked for: within the budget (all, if none is), with as many
    seeds as a test needs, or as there are."""
    among = result[result["n"] > 0]
    within = among[among["over"] == ""]
    among = within if len(within) else among
    return list(among.index[among["n"] >= min(MIN_SEEDS, among["n"].max())])


def compare(values: pd.DataFrame, rivals: Sequence[str], better: str, measure: str) -> pd.DataFrame:
    """Each row against the best one of `rivals`, paired over seeds.

    Args:
        values: a number per seed (index) and row; NaN where there is none.
        better: "low" or "high".

    Returns:
        Per row the columns `MEASURE_difference`, ... of `aggregate`.
    """
    common = values[list(rivals)].dropna()  # seeds that all have
    means = (common if len(common) >= MIN_SEEDS else values[list(rivals)]).mean()
    lines = {}
    best = None
    if means.notna().any():
        best = means.idxmin() if better == "low" else means.idxmax()
    for row in values:
        line: dict[str, Any] = {"stands": "untested", "pairs": 0}
        if best is not None:
            difference = (values[row] - values[best]).dropna()
            line["pairs"] = len(difference)
            if row == best:
                line["stands"] = "best"
            elif len(difference):
                line["difference"] = difference.mean()
                line["difference_se"] = _sem(difference)
                line["p"] = paired_p(values[row], values[best])
        lines[row] = line
    keys = ["difference", "difference_se", "pairs", "p", "p_holm", "stands"]
    result = pd.DataFrame.from_dict(lines, orient="index").reindex(columns=keys)
    result["p_holm"] = holm(result["p"].astype(float))
    tested = result["p_holm"].notna()
    ahead = result["difference"].astype(float) * (1 if better == "low" else -1) < 0
    stands = np.where(ahead, "ahead", "apart")
    result.loc[tested, "stands"] = np.where(result["p_holm"] < LEVEL, stands, "same")[tested]
    return result.add_prefix(f"{measure}_")


def _sem(values: pd.Series[float]) -> float:
    return float(values.sem()) if np.isfinite(values).all() else float("nan")


def paired_p(one: Iterable[float], other: Iterable[float]) -> float:
    """p of a two-sided paired t-test over the seeds that both have; NaN of fewer than three."""
    pairs = np.column_stack([np.fromiter(one, float), np.fromiter(other, float)])
    pairs = pairs[~np.isnan(pairs).any(1)]
    if len(pairs) < MIN_SEEDS or not np.isfinite(pairs).all():
        return float("nan")
    if (pairs[:, 0] == pairs[:, 1]).all():
        return 1.0
    with warnings.catch_warnings():  # of differences that are all but equal: p is near 0, rightly
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue)


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """Holm's step-down correction (1979) for as many tests as there are p values; NaN stays.

    The i-th smallest of m is multiplied by m - i + 1; none may fall below the one before it.
    """
    known = p.dropna().sort_values()
    factors = np.arange(len(known), 0, -1)
    corrected = (known * factors).cummax().clip(upper=1.0)
    return corrected.reindex(p.index)


def progress(record: Mapping[str, Any]) -> str:
    """How many cells are done, failed and missing, in a line."""
    status = cells(record)["status"].value_counts()
    text = f"{status.get('done', 0)} of {status.sum()} cells done"
    rest = [f"{status[kind]} {kind}" for kind in ("failed", "missing") if kind in status]
    return ", ".join([text, *rest]) + "."


def single(record: Mapping[str, Any]) -> str | None:
    """The row of one ordinary network with the whole budget, if there is one."""
    for row in record["rows"]:
        ours = row["title"] == Independent.title or row["name"] == "independent"
        if ours and row["budget"] <= SLACK * record["budget"]:
            return str(row["name"])
    return None
