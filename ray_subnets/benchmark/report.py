"""`benchmark.html` and the files beside it: one page, no network, everything from the record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from ray_subnets import pages
from ray_subnets.benchmark import table as benchmarktable
from ray_subnets.benchmark.columns import (
    ACCURACY,
    BEST,
    LEGEND,
    NLL,
    PARTS,
    Shown,
    difference,
    lines_of,
    name,
    p_text,
    present,
    seeds_text,
)
from ray_subnets.benchmark.figures import Point, against_cost, by_severity
from ray_subnets.benchmark.frame import frames, progress, single, tables
from ray_subnets.benchmark.verdict import verdict
from ray_subnets.checkpoints import RunFolder

PAGE = "benchmark.html"


def write(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """Write the page, `benchmark.md`, `cells.csv`, `table.csv` and `table.tex`; where the page is.

    Raises:
        ValueError: the record lacks something, or a file cannot be written.
    """
    both = frames(record)
    try:
        page = pages.render(PAGE, **_content(record))
        files = {
            "cells.csv": both.cells.to_csv(index=False),
            "table.csv": both.table.to_csv(index=False),
            "benchmark.md": benchmarktable.markdown(record),
            "table.tex": benchmarktable.latex(record),
            PAGE: page,
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/benchmark.json: incomplete or of another version ({error})"
        ) from None
    for file, text in files.items():
        folder.write(file, text.encode())
    return folder.path(PAGE)


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    tasks = {task["name"]: task for task in record["tasks"]}
    sections = []
    for i, ((task, column, table), told) in enumerate(
        zip(tables(record), verdict(record), strict=True)
    ):
        sections.append(
            {
                "id": f"table-{i}",
                "task": task,
                "column": column,
                "data": tasks[task]["data"],
                "model": tasks[task]["model"],
                "verdict": told,
                "done": bool(table["n"].any()),
                **_table(table),
                "plots": list(_plots(record, table, f"plot-{i}")),
            }
        )
    return {
        "record": record,
        "progress": progress(record),
        "tables": sections,
        "failures": [
            f"{cell['task']}, {cell['column']}, {cell['row']}, seed {cell['seed']}: {cell['error']}"
            for cell in record["cells"]
            if cell["error"] is not None
        ],
        "notes": benchmarktable.notes(record),
        "settings": _settings(record),
        "legend": LEGEND,
    }


def _table(table: pd.DataFrame) -> dict[str, Any]:
    """Groups of columns with their headings, rows with their cells."""
    parts = {part: present(table, columns) for part, columns in PARTS.items()}
    parts = {part: columns for part, columns in parts.items() if columns}
    groups = [
        {"name": part, "heads": [one.heading for one in columns]} for part, columns in parts.items()
    ]
    groups.insert(1, {"name": BEST, "heads": ["NLL minus best", "points minus best"]})
    rows = []
    for row in lines_of(table):
        cells = [[_cell(row, one) for one in columns] for columns in parts.values()]
        cells.insert(1, [_gap(row, "nll", 1, 4), _gap(row, "accuracy", 100, 2)])
        rows.append(
            {
                "name": name(row),
                "over": row["over"],
                "why": f"{row['failed']} failed: {row['why']}" if row["failed"] else "",
                "winner": row["nll_stands"] == "best",
                "n": row["n"],
                "seeds": seeds_text(row),
                "groups": cells,
            }
        )
    return {"groups": groups, "rows": rows}


def _number(value: Any) -> float | None:
    """A number to sort by; None if there is none."""
    return None if value is None or math.isnan(value) else float(value)


def _cell(row: Mapping[str, Any], one: Shown) -> dict[str, Any]:
    error, behind = one.error(row), one.behind(row)
    return {
        "value": _number(row[one.key]),
        "text": one.mean(row),
        "mark": one.mark(row) if one.tested else None,
        "small": [part for part in (f"± {error}" if error else "", behind) if part],
        "best": bool(one.tested) and row[f"{one.tested}_stands"] == "best",
    }


def _gap(row: Mapping[str, Any], measure: str, scale: float, digits: int) -> dict[str, Any]:
    text, p = difference(row, measure, scale, digits), p_text(row, measure)
    best = row[f"{measure}_stands"] == "best"
    return {
        "value": 0.0 if best else _number(row[f"{measure}_difference"]),
        "text": text,
        "small": [p if "n =" in p else f"p {p}"] if p else [],
        "best": best,
    }


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(task, row, settings by column) of rows for which something was chosen."""
    found = []
    for task, rows in record["chosen"].items():
        for row, columns in rows.items():
            texts = [
                ", ".join(f"{key} {value}" for key, value in columns.get(column, {}).items())
                for column in record["columns"]
            ]
            found.append((task, row, texts))
    return found


def _plots(record: Mapping[str, Any], table: pd.DataFrame, id: str) -> Iterator[str]:
    """Quality against cost, and against severity where that was measured."""
    base = single(record)
    for cost, said in (
        ("cost_flops_vs_single", "training FLOPs, single model = 1"),
        ("cost_passes", "passes for an answer"),
    ):
        for one in (NLL, ACCURACY):
            points = list(_points(table, one, cost, base))
            if points:
                low = one is NLL
                yield against_cost(f"{id}-{cost}-{one.key}", points, said, one.heading, low=low)
    label = None if base is None else str(table.loc[base, "label"])
    for measure, said, scale in (
        ("nll", "NLL, corrupted", 1),
        ("accuracy", "accuracy %, corrupted", 100),
    ):
        severities, curves = _curves(table, measure, scale)
        if curves:
            unique, low = f"{id}-severity-{measure}", measure == "nll"
            yield by_severity(unique, severities, curves, said, low=low, single=label)


def _points(table: pd.DataFrame, one: Shown, cost: str, base: str | None) -> Iterator[Point]:
    for id, row in table.iterrows():
        x, y = row.get(cost, math.nan), row.get(one.key, math.nan)
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        error = row[f"{one.key}_se"]
        yield Point(
            label=row["label"],
            x=x,
            y=one.scale * y,
            error=one.scale * error if math.isfinite(error) else 0.0,
            kind="single" if id == base else "beyond" if row["over"] else "within",
        )


def _curves(
    table: pd.DataFrame, measure: str, scale: float
) -> tuple[list[int], dict[str, list[float]]]:
    """Severities that were run, and label -> mean at each; of rows that have them all."""
    found = [re.fullmatch(rf"shift_severities_(\d+)_{measure}", str(key)) for key in table]
    severities = sorted(int(match[1]) for match in found if match)
    keys = [f"shift_severities_{severity}_{measure}" for severity in severities]
    if len(keys) < 2:
        return severities, {}
    whole = table.dropna(subset=keys)
    curves = {str(row["label"]): [scale * row[key] for key in keys] for _, row in whole.iterrows()}
    return severities, curves
