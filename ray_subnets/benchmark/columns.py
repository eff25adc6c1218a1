"""The columns of a benchmark's tables: what is shown of a row, and how it is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ray_subnets.benchmark.frame import LEVEL, MIN_SEEDS, SLACK


@dataclass(frozen=True)
class Shown:
    """A column of the tables people read."""

    heading: str
    key: str
    """of `aggregate`"""
    scale: float = 1.0
    digits: int = 4
    spread: bool = True
    """with its standard error"""
    floor: str = ""
    """key of a number printed in brackets behind"""
    tested: str = ""
    """measure by which rows are told apart here"""
    unit: str = ""

    def mean(self, row: Mapping[str, Any]) -> str:
        """The mean; empty if there is none."""
        value = row.get(self.key, math.nan)
        return "" if _none(value) else f"{self.scale * value:,.{self.digits}f}{self.unit}"

    def error(self, row: Mapping[str, Any]) -> str:
        """The standard error; empty of a single seed."""
        value = row.get(f"{self.key}_se", math.nan)
        shown = self.spread and not _none(value)
        return f"{self.scale * value:.{self.digits}f}" if shown else ""

    def behind(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.floor, math.nan) if self.floor else math.nan
        return "" if _none(value) else f"({self.scale * value:.{self.digits}f})"

    def text(self, row: Mapping[str, Any]) -> str:
        """Mean ± standard error (floor), and the mark of rows that tie with the best."""
        mean, error = self.mean(row), self.error(row)
        parts = [f"{mean} ± {error}" if error else mean, self.behind(row), self.mark(row)]
        return " ".join(part for part in parts if part)

    def mark(self, row: Mapping[str, Any]) -> str:
        return SAME if self.tested and row[f"{self.tested}_stands"] == "same" else ""

    def short(self, row: Mapping[str, Any]) -> str:
        """0.2339(35): the standard error in units of the last digit."""
        mean, error = self.mean(row), self.error(row)
        digits = error.replace(".", "").lstrip("0") or "0"
        return f"{mean}({digits}){self.mark(row)}" if error else mean


def _none(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


SAME = "≈"
ACCURACY = Shown("accuracy %", "test_accuracy", 100, 2, tested="accuracy")
NLL = Shown("NLL", "test_nll", tested="nll")
ECE = Shown("ECE (floor)", "test_ece", floor="test_ece_floor")
FLOPS = Shown("FLOPs, non-zero", "cost_flops_vs_single", 1, 2, False, unit="x")
PASSES = Shown("passes", "cost_passes", 1, 0, False)
QUALITY = (
    Shown("nets", "members", 1, 0, False),
    ACCURACY,
    NLL,
    Shown("NLL, scaled", "test_nll_scaled"),
    Shown("Brier", "test_brier"),
    ECE,
)
SHIFT = (
    Shown("accuracy %, corrupted", "shift_accuracy", 100, 2),
    Shown("NLL, corrupted", "shift_nll"),
    Shown("ECE, corrupted", "shift_ece"),
    Shown("AUROC, other data", "ood_maximum_probability_auroc"),
    Shown("disagreement", "diversity_disagreement"),
    Shown("KL", "diversity_kl"),
)
COST = (
    Shown("epochs", "cost_epochs", 1, 0, False),
    FLOPS,
    Shown("FLOPs, dense", "cost_flops_dense_vs_single", 1, 2, False, unit="x"),
    Shown("seconds", "cost_seconds", 1, 1),
    Shown("parameters", "cost_parameters", 1, 0, False),
    PASSES,
    Shown("FLOPs of an answer", "cost_inference_flops_vs_single", 1, 2, False, unit="x"),
    Shown("MB", "cost_bytes", 1e-6, 2, False),
)
PARTS = {"Quality": QUALITY, "Shift, other data, diversity": SHIFT, "Cost": COST}
BEST = "Against the best"

LEGEND = (
    "Mean ± standard error over seeds, test data. NLL in nats; scaled: NLL after temperature "
    "scaling on validation data. ECE has a floor: in brackets, what a perfectly calibrated "
    "predictor of the same confidences would score on as many samples.",
    "Corrupted: mean over the 15 standard corruptions at the severities that were run. AUROC: "
    "telling test data from other data by the largest probability. Disagreement and KL (nats): "
    "mean over pairs of members.",
    "FLOPs of training as a multiple of the single model's: non-zero counts only weights that are "
    "not zero, dense what the kernels compute; seconds are measured, on the device named in "
    "cells.csv. Parameters: non-zero, of all members. Passes: through the network, for one answer.",
    f"Bold: the best mean among rows within the budget. {SAME}: not distinguishable from it, by a "
    f"paired t-test over the same seeds (Holm-corrected p of {LEVEL:g} or more); that is not to "
    f"say equal, least of all with few seeds. Fewer than {MIN_SEEDS} pairs are not tested. The "
    "best is picked by the same numbers that it is tested on, which favours it.",
    f"*: takes more than {SLACK:g} times the single model's epochs or FLOPs, and cannot be the "
    "best.",
)


def lines_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def present(table: pd.DataFrame, columns: Sequence[Shown]) -> list[Shown]:
    """Those columns for which some row has a number."""
    return [one for one in columns if one.key in table and table[one.key].notna().any()]


def name(row: Mapping[str, Any]) -> str:
    """A row's label, with a star if it is beyond the budget."""
    return f"{row['label']} *" if row["over"] else str(row["label"])


def difference(row: Mapping[str, Any], measure: str, scale: float, digits: int) -> str:
    """A row minus the best, over the seeds that both have: "+0.0012 ± 0.0010"."""
    if row[f"{measure}_stands"] == "best":
        return "best"
    value, error = row[f"{measure}_difference"], row[f"{measure}_difference_se"]
    if _none(value):
        return ""
    text = f"{scale * value:+.{digits}f}"
    return text if _none(error) else f"{text} ± {scale * error:.{digits}f}"


def p_text(row: Mapping[str, Any], measure: str) -> str:
    """Holm-corrected p of a row against the best; how many pairs, if too few to test."""
    p, count = row[f"{measure}_p_holm"], int(row[f"{measure}_pairs"])
    if row[f"{measure}_stands"] == "best" or not count:
        return ""
    if _none(p):
        return f"not tested, n = {count}"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seeds_text(row: Mapping[str, Any]) -> str:
    """How many seeds: "3", or "2 of 3"."""
    whole = row["n"] + row["failed"] + row["missing"]
    return str(row["n"]) if row["n"] == whole else f"{row['n']} of {whole}"


def troubles(table: pd.DataFrame) -> list[str]:
    """A line for each row with failed cells, and for each that is beyond the budget."""
    found = []
    for row in lines_of(table):
        if row["failed"]:
            why = f"{seeds_text(row)}, {row['failed']} failed: {row['why']}"
            found.append(f"{row['label']}: {why}")
        if row["over"]:
            found.append(f"{name(row)}: beyond the budget, {row['over']}")
    return found
