"""`report.html`: one page, no network, everything from the run folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader

from ray_subnets import figures, metrics, table
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.regression import classifiers_only
from ray_subnets.summary import Scores

_MAX_HEAT = 40  # members; a larger matrix is a texture, not a picture


@dataclass(frozen=True)
class SectionTable:
    """A table of a section, and the file that a reader may take along."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    file: str
    csv: str

    @property
    def href(self) -> str:
        """The file itself, in the page."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv.encode()).decode()}"


@dataclass(frozen=True)
class Section:
    """More to show between diversity and time: what somebody else found out about the run.

    Attributes:
        figures: title, SVG in the page's text colour, caption.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[SectionTable] = ()
    figures: Sequence[tuple[str, str, str]] = ()


def write(folder: RunFolder, sections: Sequence[Section] = ()) -> str:
    """Write `report.html` of a finished run; returns where it is.

    Args:
        sections: more to show.

    Raises:
        ValueError: the run is not finished, or a file of it is damaged.
    """
    record = folder.read_json("result.json")
    classifiers_only(record.get("head", "classes"), "report")
    environment = Environment(
        loader=PackageLoader("ray_subnets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        page = environment.get_template("report.html").render(
            **_content(folder, record), sections=sections
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/result.json: incomplete or of another version ({error})"
        ) from None
    folder.write("report.html", page.encode())
    return folder.path("report.html")


def _content(folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    how = record["ensemble"]
    scores = Scores(folder, how["combine"], how.get("weighted_by", "nll"))
    return {
        "record": record,
        "config": folder.read(CONFIG).decode(),
        "rows": table.rows(record),
        "columns": table.COLUMNS,
        "legend": table.LEGEND,
        "verdict": table.verdict(record),
        "cost": table.cost_text(record),
        "trust": table.trust_text(record),
        "notes": table.notes(record),
        "children": sorted(
            record["children"], key=lambda child: (child["rank"] is None, child["rank"])
        ),
        "size": _size(record),
        "reliability": _reliability(record, scores),
        "diversity": _diversity(record, scores),
        "timeline": _timeline(record),
    }


def _single(record: dict[str, Any]) -> dict[str, Any] | None:
    single = record["single"]
    return single if single and single["error"] is None else None


def _size(record: dict[str, Any]) -> str:
    lines = {"parent": record["parent"]["test"]}
    single = _single(record)
    if single:
        lines["single"] = single["test"]
    return figures.by_size(record["ensemble"]["by_size"], lines)


def _reliability(record: dict[str, Any], scores: Scores) -> str:
    who = {"before, parent": ["parent"], "after, ensemble": record["ensemble"]["members"]}
    if _single(record):
        who = {"single model": ["single"]} | who
    diagrams = {}
    for name, ids in who.items():
        bins = metrics.reliability(scores.combined(ids, "test"), scores.labels["test"])
        diagrams[name] = (bins, bins.ece())
    return figures.reliability(diagrams)


def _diversity(record: dict[str, Any], scores: Scores) -> str:
    ids = ["parent", *[id for id in record["ensemble"]["members"] if id != "parent"]][:_MAX_HEAT]
    matrix = metrics.disagreement(scores.logits(ids, "test"))
    return figures.heat_map(torch.as_tensor(matrix).numpy(), ids, "disagreement")


def _timeline(record: dict[str, Any]) -> str:
    jobs = [{"id": "parent", "kind": "parent", **record["parent"]}]
    if record["single"]:
        jobs.append({"id": "single", "kind": "single", **record["single"]})
    for id, single in record.get("singles", {}).items():
        jobs.append({"id": id, "kind": "single", **single})
    jobs += [{"kind": child["method"], **child} for child in record["children"]]
    return figures.timeline([job for job in jobs if job["worker"]])
