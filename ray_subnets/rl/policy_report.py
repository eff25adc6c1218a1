"""`report.html` of a policy's run: one page, no network, everything from the run folder."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ray_subnets import figures, pages
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.recipes import Stored
from ray_subnets.rl import policy_figures, policy_table
from ray_subnets.rl.policy_recipes import Iteration
from ray_subnets.rl.policy_worker import read_curve

MOST = 40  # children in a figure or table of them


def write(folder: RunFolder) -> str:
    """Write `report.html` of a finished run; returns where it is.

    Raises:
        ValueError: the run is not finished, or a file of it is damaged.
    """
    record = folder.read_json("result.json")
    try:
        page = pages.render("policy.html", **_content(folder, record))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/result.json: incomplete or of another version ({error})"
        ) from None
    folder.write("report.html", page.encode())
    return folder.path("report.html")


def _content(folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    film = record["film"]["file"]
    return {
        "record": record,
        "config": folder.read(CONFIG).decode(),
        "headings": policy_table.headings(record),
        "tables": [
            (
                policy_table.title(one),
                [
                    (player, policy_table.cells(player))
                    for player in policy_table.shown(one["players"])
                ],
            )
            for one in record["evaluation"]
        ],
        "legend": policy_table.legend(record),
        "verdict": policy_table.verdict(record),
        "cost": policy_table.cost_text(record),
        "notes": policy_table.notes(record),
        "film": base64.b64encode(folder.read(film)).decode() if film else None,
        "curves": _curves(folder, record),
        "returns": _returns(folder, record),
        "differences": policy_figures.differences(_differences(record)),
        "timeline": _timeline(record),
        "children": _children(record),
        "most": MOST,
    }


def _table(one: Mapping[str, Any]) -> tuple[str, list[tuple[Mapping[str, Any], tuple[str, ...]]]]:
    """Title, and of each player the record and its cells."""
    shown = policy_table.shown(one["players"])
    return policy_table.title(one), [(player, policy_table.cells(player)) for player in shown]


def curve(folder: RunFolder, training: Mapping[str, Any]) -> list[Iteration]:
    """The learning curve of the parent, or of a tuned child."""
    if training.get("folder"):
        folder = RunFolder(training["folder"])
    return read_curve(folder.read(Stored(**training["curve"])))


def _curves(folder: RunFolder, record: Mapping[str, Any]) -> str:
    tuned: dict[str, list[Sequence[Iteration]]] = {}
    for child in record["children"]:
        if child["tuned"] and not child["tuned"]["error"]:
            own = tuned.setdefault(child["group"], [])
            if len(own) < MOST:
                own.append(curve(folder, child["tuned"]))
    return policy_figures.curves(curve(folder, record["parent"]), tuned)


def _title(one: Mapping[str, Any]) -> str:
    return f"{one['levels']}, {one['choose']}"


def _returns(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """Of those who chose the first way."""
    first = record["evaluation"][0]["choose"]
    wanted = [one for one in record["evaluation"] if one["choose"] == first]
    panels, rows = {}, {}
    for one in wanted:
        few = [
            p for p in policy_table.shown(one["players"]) if p["members"] or p["kind"] == "random"
        ]
        rows[_title(one)] = {player["name"]: player for player in few}
        panels[_title(one)] = {
            player["name"]: folder.load_arrays(Stored(**player["file"]))[
                f"{player['name']}/returns"
            ].reshape(-1)
            for player in few
        }
    return policy_figures.returns(panels, rows)


def _differences(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Children, at most `MOST`, and ensembles."""
    found = {}
    for one in record["evaluation"]:
        children = [p for p in one["players"] if p["kind"] == "child" and p["members"]][:MOST]
        others = [p for p in one["players"] if p["kind"] == "ensemble"]
        found[_title(one)] = {player["name"]: player for player in [*others, *children]}
    return found


def _timeline(record: Mapping[str, Any]) -> str:
    jobs = [{"id": "parent", "kind": "parent", **record["parent"]}]
    jobs += [
        {"id": child["id"], "kind": child["method"], **child["tuned"]}
        for child in record["children"]
        if child["tuned"]
    ]
    jobs += [{"kind": "play", **match} for match in record["matches"]]
    return figures.timeline([job for job in jobs if job["worker"]])


def _children(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each child its mean return in every evaluation."""
    played: dict[str, list[Any]] = {}
    for one in record["evaluation"]:
        for player in one["players"]:
            if player["kind"] == "child" and player["members"]:
                played.setdefault(player["name"], []).append(player)
    return [
        {"id": child["id"], "tuned": child["tuned"], "played": played.get(child["id"], [])}
        for child in record["children"][:MOST]
    ]
