"""What a benchmark found, to read: tables as Markdown, LaTeX and for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from ray_subnets.benchmark.columns import (
    ACCURACY,
    BEST,
    ECE,
    FLOPS,
    LEGEND,
    NLL,
    PARTS,
    PASSES,
    SAME,
    SHIFT,
    difference,
    lines_of,
    name,
    p_text,
    present,
    seeds_text,
    troubles,
)
from ray_subnets.benchmark.frame import progress, tables
from ray_subnets.benchmark.verdict import verdict as verdict
from ray_subnets.table import empty


def _printed(table: pd.DataFrame, part: str) -> pd.DataFrame:
    """A part of a table as text, for the writers; without rows if there is nothing to tell."""
    shown = present(table, PARTS[part]) if part in PARTS else []
    if not shown and (part != BEST or not table["n"].any()):
        return pd.DataFrame()
    lines = []
    for row in lines_of(table):
        line = {"": name(row)} | {one.heading: one.text(row) for one in shown}
        if part == BEST:
            line["NLL minus best"] = difference(row, "nll", 1, 4)
            line["p, NLL"] = p_text(row, "nll")
            line["accuracy minus best, points"] = difference(row, "accuracy", 100, 2)
            line["p, accuracy"] = p_text(row, "accuracy")
        lines.append(line | {"n": seeds_text(row)})
    return pd.DataFrame(lines)


def _bold(table: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a printed part are the best of their column."""
    result = pd.DataFrame(False, index=printed.index, columns=printed.columns)
    for one in (ACCURACY, NLL):
        if one.heading in printed:
            result[one.heading] = (table[f"{one.tested}_stands"] == "best").to_numpy()
    return result


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"([\\|*_`<\[])", r"\\\1", " ".join(text.split()))


def markdown(record: Mapping[str, Any]) -> str:
    """All tables, verdict, notes and legend.

    Raises:
        ValueError: the record lacks something.
    """
    lines = [f"# {_cell(record['name'])}", "", progress(record), ""]
    lines += [f"- {_cell(line)}" for line in verdict(record)]
    for task, column, table in tables(record):
        lines += ["", f"## {_cell(task)}, {_cell(column)}"]
        for part in (*PARTS, BEST):
            printed = _printed(table, part)
            if printed.empty:
                continue
            bold = _bold(table, printed)
            lines += ["", "| " + " | ".join(printed.columns) + " |"]
            lines.append("|---" * len(printed.columns) + "|")
            for texts, strong in zip(printed.to_numpy(), bold.to_numpy(), strict=True):
                cells = [
                    f"**{_cell(text)}**" if best and text else _cell(text)
                    for text, best in zip(texts, strong, strict=True)
                ]
                lines.append("| " + " | ".join(cells) + " |")
        if not table["n"].any():
            lines += ["", "No cell is finished."]
        told = troubles(table)
        lines += ["", *(f"- {_cell(line)}" for line in told)] if told else []
    lines += ["", "## Rows", ""]
    lines += [
        f"- **{_cell(row['title'])}** ({_cell(row['name'])}): {_cell(told)}"
        for row, told in notes(record)
    ]
    lines += ["", "## How to read it", "", *(f"- {_cell(line)}" for line in LEGEND)]
    return "\n".join(lines) + "\n"


def notes(record: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """Each row with its source, budget and deviation in a line."""
    found = []
    for row in record["rows"]:
        parts = [row["source"], f"{row['budget']} epochs"]
        parts += [f"deviation: {row['deviation']}"] if row["deviation"] else []
        parts += [row["note"]] if row["note"] else []
        found.append((row, "; ".join(part for part in parts if part)))
    return found


_TEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", SAME: r"$\approx$", "<": r"$<$"}
)


def _tex(text: str) -> str:
    """Text for a cell of a LaTeX table."""
    return " ".join(text.split()).translate(_TEX)


def latex(record: Mapping[str, Any]) -> str:
    """All tables for a document that uses booktabs; a few for each task and column.

    Raises:
        ValueError: the record lacks something.
    """
    found = ["% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"]
    for task, column, table in tables(record):
        for part in (*PARTS, BEST):
            printed = _printed(table, part)
            if printed.empty:
                continue
            css = _bold(table, printed).map(lambda best: "textbf:--rwrap;" if best else "")
            css.columns = css.columns.map(_tex)
            label = "-".join([record["name"], task, column, part.split(",")[0]])
            style = printed.map(_tex).rename(columns=_tex).style.hide(axis="index")
            text = style.apply(lambda _, css=css: css, axis=None).to_latex(
                hrules=True,
                caption=_tex(f"{record['name']}: {task}, {column}. {part}."),
                label="tab:" + re.sub(r"[^a-z0-9]+", "-", label.lower()),
                position="tb",
                position_float="centering",
                column_format="l" + "r" * (len(printed.columns) - 1),
            )
            text = text.replace("\\begin{tabular}", "\\resizebox{\\textwidth}{!}{\\begin{tabular}")
            found.append(text.replace("\\end{tabular}", "\\end{tabular}}"))
    return "\n".join(found)


def terminal(record: Mapping[str, Any]) -> list[Table]:
    """What matters most, for 80 columns: a table per task and column, a second one if there is
    shift or diversity to tell. The rest is in the files.

    Raises:
        ValueError: the record lacks something.
    """
    found = []
    for task, column, table in tables(record):
        for title, part in (("test data", _FIRST), ("shift and diversity", _SECOND)):
            shown = present(table, part)
            if not shown and part is _SECOND:
                continue
            headings = [_BRIEF.get(one.heading, one.heading) for one in shown]
            grid = empty(escape(f"{record['name']}: {task}, {column}, {title}"), [*headings, "n"])
            for row in lines_of(table):
                grid.add_row(
                    escape(name(row)),
                    *(one.short(row) for one in shown),
                    seeds_text(row),
                    style="bold" if row["nll_stands"] == "best" else None,
                )
            found.append(grid)
    return found


_FIRST = (ACCURACY, NLL, replace(ECE, heading="ECE", floor=""), FLOPS, PASSES)
_SECOND = tuple(
    replace(one, digits=min(one.digits, 4 if "corrupted" in one.heading else 3))
    for one in SHIFT
    if one.heading != "KL"
)
_BRIEF = {
    "accuracy %": "acc. %",
    "FLOPs, non-zero": "FLOPs",
    "accuracy %, corrupted": "acc. %",
    "NLL, corrupted": "NLL",
    "ECE, corrupted": "ECE",
    "AUROC, other data": "AUROC",
    "disagreement": "disagr.",
}
"""headings for a terminal"""
