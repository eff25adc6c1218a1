"""The outcome of a sweep for a terminal, from `sweep.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ray_subnets.sweeps.sweepfile import told
from ray_subnets.table import empty

MOST = 20  # rows
COLUMNS = (
    ("KL", "kl", "{:.4g}"),
    ("acc. %", "accuracy", None),
    ("ens. acc. %", "ensemble_accuracy", None),
    ("ens. NLL", "ensemble_nll", "{:.4f}"),
)


def table(record: Mapping[str, Any]) -> Table:
    """The best cells, best first; the chosen one bold."""
    by = record["by"]
    trials = [trial for trial in record["trials"] if trial["mean"]]
    trials.sort(key=lambda t: t["mean"][by] * (1 if by.endswith("nll") else -1))
    title = f"{record['name']}: validation data, mean over {len(record['seeds'])} seeds"
    result = empty(title, (heading for heading, _, _ in COLUMNS))
    for trial in trials[:MOST]:
        cells = []
        for _, key, form in COLUMNS:
            value = trial["mean"][key]
            shown = (
                "inf"
                if value is None
                else (form or "{:.2f}").format(value if form else 100 * value)
            )
            cells.append(shown)
        outside = "" if trial["inside"] else " (KL beyond the bound)"
        style = "bold" if trial["id"] == record["chosen"] else None
        result.add_row(told(trial["values"]) + outside, *cells, style=style)
    return result


def lines(record: Mapping[str, Any]) -> list[str]:
    """What was chosen, what failed, and what it cost."""
    found = []
    trials = {trial["id"]: trial for trial in record["trials"]}
    if record["chosen"]:
        bound = record["kl_bound"]
        among = f" among cells whose KL is within {bound:g} nats" if bound else ""
        found.append(
            f"Chosen: {told(trials[record['chosen']]['values'])}, by {record['by']}{among}."
        )
    else:
        found.append("No cell can be chosen: none is finished with a KL inside the bound.")
    if record["fit"]:
        fit = record["fit"]
        found.append(
            f"Accuracy of the mean child falls {-100 * fit['slope']:.1f} points per nat of KL "
            f"(correlation {fit['correlation']:.3f} over {fit['n']} cells within 1 nat)."
        )
    failed = [trial for trial in record["trials"] if trial["status"] == "failed"]
    for trial in failed[:5]:
        found.append(f"Failed: {told(trial['values'])}: {trial['error']}")
    if len(failed) > 5:
        found.append(f"and {len(failed) - 5} more failed, in sweep.json")
    seconds = record["seconds"]
    found.append(
        f"{len(trials)} cells; {seconds['clock']:.0f} s by the clock, {seconds['work']:.0f} s of "
        f"the trials' own work on {seconds['slots']} workers."
    )
    return found
