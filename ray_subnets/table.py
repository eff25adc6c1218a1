"""The table at the end of a run: who is how good, from `result.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    name: str
    passes: int
    """networks asked for one answer"""
    epochs: int | None
    """training that this line stands for, its share of the parent included"""
    test: Mapping[str, float]
    strong: bool = False
    """the line that the run was made for"""


def rows(record: Mapping[str, Any]) -> list[Row]:
    """Parent, single model, mean child, each kind, the selected without and with the parent."""
    parent, ensemble = record["parent"], record["ensemble"]
    epochs = {child["id"]: child["epochs"] for child in record["children"]}
    base = parent["epochs"]
    lines = [Row("parent", 1, base, parent["test"])]
    single = record["single"]
    if single and single["error"] is None:
        lines.append(Row("single, same budget", 1, single["epochs"], single["test"]))
    if record.get("best_single"):
        best, count = record["singles"][record["best_single"]], len(record["singles"])
        lines.append(Row(f"single, best of {count}", 1, best["epochs"], best["test"]))
    lines.append(Row("child (mean)", 1, None, record["mean_child"]))
    for label, group in ensemble["groups"].items():
        spent = base + sum(epochs[id] for id in group["members"])
        lines.append(Row(f"{label} ensemble", len(group["members"]), spent, group["test"]))
    members = [id for id in ensemble["members"] if id != "parent"]
    spent = record["cost"]["epochs"]
    with_parent = ensemble["includes_parent"]
    lines += [
        Row("selected ensemble", len(members), spent, ensemble["without_parent"], not with_parent),
        Row("  with the parent", len(members) + 1, spent, ensemble["with_parent"], with_parent),
    ]
    return lines


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("acc. %", "accuracy", lambda value: f"{100 * value:.2f}"),
    ("NLL", "nll", lambda value: f"{value:.4f}"),
    ("scaled", "nll_scaled", lambda value: f"{value:.4f}"),
    ("Brier", "brier", lambda value: f"{value:.4f}"),
    ("ECE", "ece", lambda value: f"{value:.4f}"),
    ("floor", "ece_floor", lambda value: f"{value:.4f}"),
)
"""heading, key in a predictor's test metrics, how to print it"""

LEGEND = (
    "nets: networks asked for one answer. NLL in nats; scaled: NLL after temperature scaling on "
    "validation data. floor: ECE of a perfectly calibrated predictor on this many samples."
)


def empty(title: str, headings: Iterable[str]) -> Table:
    """A table for a terminal without rows yet: a name, then numbers."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("", overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def measured_on(record: Mapping[str, Any]) -> str:
    """What the numbers of a run are of: `test data`, if there were any."""
    alone = record["data"].get("test_is_validation")
    return "validation data, by which members were chosen" if alone else "test data"


def table(record: Mapping[str, Any]) -> Table:
    """The result table for a terminal; fits 80 columns."""
    title = f"{record['name']}: {record['data']['name']}, {measured_on(record)}"
    result = empty(title, ("nets", "epochs", *(name for name, _, _ in COLUMNS)))
    for row in rows(record):
        result.add_row(
            row.name,
            str(row.passes),
            "" if row.epochs is None else str(row.epochs),
            *(render(row.test[key]) for _, key, render in COLUMNS),
            style="bold" if row.strong else None,
        )
    return result


def verdict(record: Mapping[str, Any]) -> str:
    """One honest sentence: the ensemble kept against parent and single model, by test NLL."""
    ensemble, parent = record["ensemble"]["test"], record["parent"]["test"]
    single = record["single"] and record["single"].get("test")

    def against(name: str, other: Mapping[str, float]) -> str:
        gain = other["nll"] - ensemble["nll"]
        word = "lower" if gain > 0 else "higher"
        points = 100 * (ensemble["accuracy"] - other["accuracy"])
        return f"NLL {abs(gain):.4f} {word} and accuracy {points:+.2f} points than {name}"

    parts = [against("the parent", parent)]
    if single:
        parts.append(against("the single model of the same budget", single))
    return "The ensemble has " + "; ".join(parts) + ". One run is one sample: compare over seeds."


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a user should know: failed children, layers pruned to nothing, actors that died."""
    lines = []
    for child in record["children"]:
        lines += [f"{child['id']}: {note}" for note in child["notes"]]
        if child["error"]:
            lines.append(f"{child['error']} (not a member)")
    if len(lines) > 5:
        lines[5:] = [f"and {len(lines) - 5} more, in result.json"]
    counts = Counter(fault["what"] for fault in record.get("faults", []))
    if counts:
        what = ", ".join(f"{what} ({n} times)" if n > 1 else what for what, n in counts.items())
        lines.append(f"handled on the way, no number changed by it: {what}")
    return lines


def trust_text(record: Mapping[str, Any]) -> list[str]:
    """A line for each group whose noise was solved for."""
    lines = []
    for one in record.get("trust_region", ()):
        sigma = f"sigma {one['sigma']:.4g}"
        if one["sigmas"]:
            sigma = f"sigmas {min(one['sigmas']):.3g} to {max(one['sigmas']):.3g} by layer"
        lines.append(
            f"{one['group']}: {sigma} for a KL target of {one['kl_target']:g} nats; measured "
            f"{one['kl']:.4g} (spread {one['kl_std']:.2g} over {one['draws']} draws), squared "
            f"distance {one['mse']:.3g}, on {one['samples']:,} validation samples in "
            f"{one['passes']} passes."
        )
    return lines


def cost_text(record: Mapping[str, Any]) -> str:
    """One line of cost."""
    cost = record["cost"]
    passes = cost["inference_passes"]
    return (
        f"Cost: {cost['epochs']} epochs on {record['data']['train']:,} images, "
        f"{cost['device_seconds']:.0f} device-seconds, {cost['wall_seconds']:.0f} s by the clock; "
        f"{cost['flops_vs_single']:.2f}x the FLOPs of a dense network of that budget if zeros are "
        f"free; an answer takes {passes} pass{'es' if passes > 1 else ''}, "
        f"{cost['bytes_on_disk'] / 1e6:.2f} MB on disk."
    )
