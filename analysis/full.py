"""All analyses of one run, in its report: `ray-subnets report RUN --full`.

Each also leaves its tables and pictures in `analysis` in the run folder. What a run cannot have,
pictures of a network that sees no images for one, is named in a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from analysis import (
    boundaries,
    clusters,
    diversity,
    features,
    findings,
    hashes,
    landscapes,
    saliency,
)
from analysis.features import Settings
from analysis.findings import Findings, Table
from analysis.folders import Run
from analysis.surfaces import Mapper
from ray_subnets import report
from ray_subnets.report import Section, SectionTable


@dataclass(frozen=True)
class Sizes:
    """How much is done of each: minutes for a small network."""

    members: int = 4
    """that are looked into"""
    samples: int = 600
    """of the test data, for clusters"""
    images: int = 100
    """for distances of saliency maps"""
    channels: int = 12
    steps: int = 1024
    """of each feature visualisation"""
    side: int = 13
    """points along each direction of a landscape"""


def sections(
    run: Run,
    say: Callable[[str], None] = lambda line: None,
    sizes: Sizes | None = None,
    mapper: Mapper = map,
) -> list[Section]:
    """Everything that can be said of this run, and what cannot.

    Args:
        say: is told what is being done.
        mapper: how rows of landscapes are made, see `surfaces.surface`.

    Raises:
        ValueError: the results cannot be written.
    """
    place = findings.place(None, [str(run.folder)])
    much = sizes or Sizes()
    how = Settings(steps=much.steps)
    plan = hashes.Plan(last=much.members, channels=much.channels, images=much.images, settings=how)
    steps: dict[str, Callable[[], Findings]] = {
        "diversity": lambda: diversity.find([run], groups=len(run.groups) > 1),
        "clusters": lambda: clusters.find(run, count=much.samples),
        "saliency": lambda: saliency.find(run, count=much.images, most=much.members),
        "features": lambda: features.find(
            run, shown=much.channels, most=much.members, settings=how
        ),
        "hashes": lambda: hashes.find([run], plan),
        "landscapes": lambda: landscapes.find(
            run, place, side=much.side, samples=300, mapper=mapper
        ),
        "boundaries": lambda: boundaries.find(run),
    }
    found, absent = [], []
    for name, find in steps.items():
        start = time.perf_counter()
        try:
            findings_ = find()
        except ValueError as error:
            reason = str(error).removeprefix(f"RUN: {run.folder}: ")
            absent.append(f"{name}: {reason}")
            say(f"{name}: not here ({reason})")
            continue
        findings_.write(place)
        found.append(_section(findings_))
        say(f"{name}: {time.perf_counter() - start:.0f} s")
    if absent:
        found.append(Section("Not for this run", absent))
    return found


def _section(found: Findings) -> Section:
    return Section(
        title=found.title,
        text=found.text,
        tables=[
            *(_table(table) for table in found.tables),
            *(replace(_table(table), rows=[]) for table in found.data),
        ],
        figures=[(one.title, one.svg(), one.caption) for one in found.pictures],
    )


def _table(table: Table) -> SectionTable:
    return SectionTable(
        title=table.title,
        headings=table.headings,
        rows=table.rows,
        file=f"{table.name}.csv",
        csv=table.csv(),
    )


def write(
    run: str | Path,
    say: Callable[[str], None] = lambda line: None,
    sizes: Sizes | None = None,
    mapper: Mapper = map,
) -> str:
    """`report.html` with all of it; returns where it is. Arguments: see `sections`.

    Raises:
        ValueError: not a finished run, or the results cannot be written.
    """
    opened = Run.open(run)
    return report.write(opened.folder, sections(opened, say, sizes, mapper))
