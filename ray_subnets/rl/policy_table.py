"""The outcome of a policy's run for a terminal and its page, from `result.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ray_subnets.table import empty

LEGEND = (
    "nets: networks asked for one action. Brackets: 95 % bootstrap intervals of the mean over "
    "episodes. - parent: mean difference in pairs of episodes, on the same levels with the same "
    "random numbers; +/-: pairs in which the return was larger, and smaller. A child: the mean "
    "over the children of a kind."
)
NORMALISED = "scaled: 0 and 1 are the returns named in appendix C of the ProcGen paper."


def shown(players: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that a table has room for: not each child, but their mean; ensembles last."""
    order = ["random", "parent", "child", "ensemble"]
    few = [one for one in players if one["kind"] != "child" or not one["members"]]
    return sorted(few, key=lambda one: order.index(one["kind"]))


def headings(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a table's columns, after the name."""
    scaled = ("scaled",) if _scaled(record) else ()
    return ("nets", "return", "95 %", *scaled, "- parent", "95 %", "+/-")


def _scaled(record: Mapping[str, Any]) -> bool:
    return record["evaluation"][0]["players"][0]["normalised"] is not None


def cells(player: Mapping[str, Any]) -> tuple[str, ...]:
    """One player's numbers, as `headings`."""
    scaled, off = player["normalised"], player["difference"]
    return (
        str(player["members"]) if player["members"] else "",
        f"{player['mean']:.2f}",
        f"[{player['low']:.2f}, {player['high']:.2f}]",
        *((f"{scaled['mean']:.3f}",) if scaled else ()),
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
        table = empty(f"{record['name']}: {record['env']['id']}, {title(one)}", headings(record))
        for player in shown(one["players"]):
            style = "bold" if player["kind"] == "ensemble" else None
            table.add_row(player["name"], *cells(player), style=style)
        found.append(table)
    return found


def legend(record: Mapping[str, Any]) -> str:
    return f"{LEGEND} {NORMALISED}" if _scaled(record) else LEGEND


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
        levels = off.get("levels", off["pairs"])  # folders of before have none
        of = f" on {levels} levels" if 2 * levels <= off["pairs"] else ""
        interval = f"[{off['low']:+.2f}, {off['high']:+.2f}], {off['pairs']} pairs{of}"
        lines.append(
            f"{one['levels']} levels, {one['choose']}: {first['name']} of {first['members']}, is "
            f"{word} its parent ({off['mean']:+.2f} {interval})."
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
