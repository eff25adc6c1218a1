"""The outcome of a policy's run for a terminal and its page, from `result.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ray_subnets.table import empty

LEGEND = (
    "nets: networks asked for one action. Brackets: 95 % bootstrap intervals of the mean over "
    "episodes. Minus parent: in pairs of episodes, on the same levels with the same random "
    "numbers; then in how many the return was larger, and in how many smaller."
)
NORMALISED = "scaled: 0 and 1 are the returns named in appendix C of the ProcGen paper."
HEADINGS = ("nets", "return", "95 %", "scaled", "minus parent", "95 %", "more/less")


def shown(players: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that a table has room for: not each child, but their mean; ensembles last."""
    order = ["random", "parent", "child", "ensemble"]
    few = [one for one in players if one["kind"] != "child" or not one["members"]]
    return sorted(few, key=lambda one: order.index(one["kind"]))


def cells(player: Mapping[str, Any]) -> tuple[str, ...]:
    """One player's numbers, as `HEADINGS`."""
    scaled, off = player["normalised"], player["difference"]
    nets = str(player["members"]) if player["members"] else "0" * (player["kind"] == "random")
    return (
        nets,
        f"{player['mean']:.2f}",
        f"[{player['low']:.2f}, {player['high']:.2f}]",
        f"{scaled['mean']:.3f}" if scaled else "",
        *(
            (
                f"{off['mean']:+.2f}",
                f"[{off['low']:+.2f}, {off['high']:+.2f}]",
                f"{off['better']}/{off['worse']}",
            )
            if off
            else ("", "", "")
        ),
    )


def title(one: Mapping[str, Any]) -> str:
    """Of one set of levels and one way to choose."""
    episodes = one["players"][0]["episodes"]
    how = {"sample": "actions drawn", "argmax": "most probable actions"}[one["choose"]]
    return f"{one['levels']} levels, {how}, {episodes} episodes"


def tables(record: Mapping[str, Any]) -> list[Table]:
    """One for each set of levels and way to choose."""
    found = []
    for one in record["evaluation"]:
        table = empty(f"{record['name']}: {record['env']['id']}, {title(one)}", HEADINGS)
        for player in shown(one["players"]):
            style = "bold" if player["kind"] == "ensemble" else None
            table.add_row(player["name"], *cells(player), style=style)
        found.append(table)
    return found


def legend(record: Mapping[str, Any]) -> str:
    scaled = any(p["normalised"] for one in record["evaluation"] for p in one["players"])
    return f"{LEGEND} {NORMALISED}" if scaled else LEGEND


def verdict(record: Mapping[str, Any]) -> list[str]:
    """For each set of levels and way to choose, what the first ensemble is beside its parent."""
    lines = []
    for one in record["evaluation"]:
        first = next(player for player in one["players"] if player["kind"] == "ensemble")
        off = first["difference"]
        if off["low"] > 0:
            word = "higher than"
        elif off["high"] < 0:
            word = "lower than"
        else:
            word = "within chance of"
        lines.append(
            f"{one['levels']} levels, {one['choose']}: {first['name']} is {word} its parent "
            f"({off['mean']:+.2f} [{off['low']:+.2f}, {off['high']:+.2f}], {off['pairs']} pairs)."
        )
    return lines


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a user should know: children that failed, a film that could not be made, faults."""
    lines = [
        f"{child['id']}: {child['tuned']['error']} (does not play)"
        for child in record["children"]
        if child["tuned"] and child["tuned"]["error"]
    ]
    if record["film"]["error"]:
        lines.append(f"no film: {record['film']['error']}")
    if record["faults"]:
        lines.append(
            f"{len(record['faults'])} faults were handled on the way, no number changed by them"
        )
    return lines


def cost_text(record: Mapping[str, Any]) -> str:
    """One line of cost."""
    cost = record["cost"]
    return (
        f"Cost: {cost['parent_steps']:,} steps for the parent, {cost['tuning_steps']:,} to tune "
        f"children, {cost['playing_steps']:,} played; {cost['device_seconds']:.0f} device-seconds, "
        f"{cost['wall_seconds']:.0f} s by the clock; {cost['parameters']:,} parameters of actor "
        f"and critic; {cost['bytes_on_disk'] / 1e6:.2f} MB on disk."
    )
