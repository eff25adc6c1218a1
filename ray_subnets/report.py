"""`report.html`: one page, no network, everything from the run folder."""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_subnets import figures, metrics, pages, table
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
    """More to show after diversity: what somebody else found out about the run.

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
    try:
        page = pages.render("report.html", **_content(folder, record), sections=sections)
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
    sure = _sure(record, scores)
    return {
        "place": str(folder),
        "asked": _asked(record),
        "sure": sure,
        "downloads": _downloads(record, scores, sure),
        "record": record,
        "config": folder.read(CONFIG).decode(),
        "rows": table.rows(record),
        "measured_on": table.measured_on(record),
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


def _asked(record: Mapping[str, Any]) -> str:
    """One paragraph: the parent, its children, the ensemble, what it is compared with."""
    kinds = Counter(child["recipe"].get("group") or child["method"] for child in record["children"])
    few = [f"{count} {name}" for name, count in kinds.items()][:12]
    if len(kinds) > len(few):
        few.append(f"and {len(kinds) - len(few)} more groups")
    kept = len([id for id in record["ensemble"]["members"] if id != "parent"])
    single = _single(record)
    beside = (
        f" Beside it one network was trained for {single['epochs']} epochs, the budget of all."
        if single
        else ""
    )
    return (
        f"One parent, trained for {record['parent']['epochs']} epochs; from it "
        f"{len(record['children'])} children ({', '.join(few)}), of which {kept} are members of "
        "the ensemble. Is it better than its parent, and than one model of the same budget?"
        f"{beside}"
    )


def _sure(record: dict[str, Any], scores: Scores) -> list[dict[str, Any]]:
    """The ensemble minus parent and single model, sample by sample: mean and standard error."""
    labels = scores.labels["test"]
    ids = {"parent": ["parent"]} | ({"single": ["single"]} if _single(record) else {})

    def of(who: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        p = scores.combined(who, "test").double()
        right = (p.argmax(1) == labels).double()
        nll = -p.gather(1, labels.long()[:, None])[:, 0].clamp_min(1e-300).log()
        return 100 * right, nll

    right, nll = of(record["ensemble"]["members"])
    rows = []
    for name, who in ids.items():
        other_right, other_nll = of(who)
        row: dict[str, Any] = {"name": name}
        for key, values in (("points", right - other_right), ("nll", nll - other_nll)):
            row[key] = float(values.mean())
            row[f"{key}_error"] = float(values.std()) / len(values) ** 0.5
        rows.append(row)
    return rows


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _downloads(
    record: Mapping[str, Any], scores: Scores, sure: Sequence[Mapping[str, Any]]
) -> dict[str, SectionTable]:
    """Every table of the page, and the numbers behind its figures."""
    keys = [key for _, key, _ in table.COLUMNS]
    children = ("id", "method", "selected", "rank", "kept", "kl_from_parent", "epochs", "seconds")
    names, matrix = _disagreement(record, scores)
    found: dict[str, Sequence[Sequence[Any]]] = {
        "result": [
            ["name", "nets", "epochs", *keys],
            *(
                [row.name.strip(), row.passes, row.epochs, *(row.test[key] for key in keys)]
                for row in table.rows(record)
            ),
        ],
        "size": [
            ["members", "accuracy", "nll"],
            *([k["members"], k["accuracy"], k["nll"]] for k in record["ensemble"]["by_size"]),
        ],
        "sure": [list(sure[0]), *(list(row.values()) for row in sure)],
        "disagreement": [["", *names], *([n, *row] for n, row in zip(names, matrix, strict=True))],
        "children": [
            [*children, "validation_accuracy", "validation_nll", "why"],
            *(
                [
                    *(child[key] for key in children),
                    *((child["validation"] or {}).get(key) for key in ("accuracy", "nll")),
                    child["why"],
                ]
                for child in record["children"]
            ),
        ],
    }
    return {
        name: SectionTable(name, (), (), f"{name}.csv", _csv(rows)) for name, rows in found.items()
    }


def _single(record: Mapping[str, Any]) -> dict[str, Any] | None:
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


def _disagreement(record: Mapping[str, Any], scores: Scores) -> tuple[list[str], list[list[float]]]:
    ids = ["parent", *[id for id in record["ensemble"]["members"] if id != "parent"]][:_MAX_HEAT]
    matrix = metrics.disagreement(scores.logits(ids, "test"))
    return ids, torch.as_tensor(matrix).tolist()


def _diversity(record: Mapping[str, Any], scores: Scores) -> str:
    ids, matrix = _disagreement(record, scores)
    return figures.heat_map(np.array(matrix), ids, "disagreement")


def _timeline(record: dict[str, Any]) -> str:
    jobs = [{"id": "parent", "kind": "parent", **record["parent"]}]
    if record["single"]:
        jobs.append({"id": "single", "kind": "single", **record["single"]})
    for id, single in record.get("singles", {}).items():
        jobs.append({"id": id, "kind": "single", **single})
    jobs += [{"kind": child["method"], **child} for child in record["children"]]
    return figures.timeline([job for job in jobs if job["worker"]])
