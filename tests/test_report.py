"""The report and the other things a person looks at after a run."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny import run_serial, tiny

from ray_subnets import report, table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.events import Events

Finished = tuple[RunFolder, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "tiny")
    events = Events(folder)
    record = run_serial(tiny(), folder, listen=events)
    events.close()
    report.write(folder)
    return folder, record


def test_the_page_needs_no_network(finished: Finished) -> None:
    page = finished[0].read("report.html").decode()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", page)
    assert "@import" not in page
    assert "<script" not in page


def test_the_page_says_what_the_record_says(finished: Finished) -> None:
    folder, record = finished
    page = folder.read("report.html").decode()
    for row in table.rows(record):
        for _, key, render in table.COLUMNS:
            assert f"<td>{render(row.test[key])}</td>" in page
    for child in record["children"]:
        assert child["id"] in page
        assert child["why"].split(";")[0] in page


def test_the_page_reads_from_question_to_use(finished: Finished) -> None:
    folder, record = finished
    page = folder.read("report.html").decode()
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "What was asked",
        "What came out",
        "How sure that is",
        "Why: diversity",
        "What it cost",
        "What failed",
        "How to use it",
        "Every child",
    ]
    assert f'ray_subnets.load("{folder}")' in page.replace("&#34;", '"')
    assert "from it 8 children (4 noisy, 2 sparse, 2 stochastic), of which 6 are members" in page
    assert f"for {record['single']['epochs']} epochs, the budget of all" in page


def test_every_table_can_be_taken_along(finished: Finished) -> None:
    folder, record = finished
    page = folder.read("report.html").decode()
    tables = {
        name: base64.b64decode(content).decode()
        for name, content in re.findall(r'download="(.*?)" href="data:text/csv;base64,(.*?)"', page)
    }
    rows = {name: list(csv.DictReader(io.StringIO(text))) for name, text in tables.items()}
    assert [float(row["nll"]) for row in rows["result.csv"]] == [
        row.test["nll"] for row in table.rows(record)
    ]
    assert {row["id"] for row in rows["children.csv"]} == {c["id"] for c in record["children"]}
    assert len(rows["size.csv"]) == 6
    ensemble = record["ensemble"]["test"]
    for row in rows["sure.csv"]:  # mean of the samples' differences: the difference of the means
        other = record[row["name"]]["test"]
        assert float(row["nll"]) == pytest.approx(ensemble["nll"] - other["nll"], abs=1e-6)
        points = 100 * (ensemble["accuracy"] - other["accuracy"])
        assert float(row["points"]) == pytest.approx(points, abs=1e-6)
        assert float(row["nll_error"]) > 0
    assert {row["name"] for row in rows["sure.csv"]} == {"parent", "single"}


def test_figures_are_well_formed_and_their_ids_unique(finished: Finished) -> None:
    page = finished[0].read("report.html").decode()
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'xlink:href="#([^"]+)"', page):
        assert used in ids


def test_the_report_is_the_same_when_written_again(finished: Finished) -> None:
    folder = finished[0]
    before = folder.read("report.html")
    report.write(folder)
    assert folder.read("report.html") == before


def test_a_browser_shows_it_without_errors(finished: Finished, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --enable-logging=stderr"
    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    picture = tmp_path / "page.png"
    answer = subprocess.run(
        [
            browser,
            *options.split(),
            *quiet.split(),
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=400,900",
            f"--screenshot={picture}",
            f"file://{finished[0].root}/report.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in answer.stderr


def test_tensorboard_events(finished: Finished) -> None:
    """Every network has its loss by epoch and its validation numbers, readable as events."""
    folder, record = finished
    names = {path.name for path in (folder.root / "events").iterdir()}
    assert names == {"parent", "single"} | {child["id"] for child in record["children"]}
    scalars: dict[str, list[float]] = {}
    (path,) = (folder.root / "events" / "sparse-000").iterdir()
    content = path.read_bytes()
    while content:  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append(value.simple_value)
    assert len(scalars["train/loss"]) == 2
    fitness = next(c["fitness"] for c in record["children"] if c["id"] == "sparse-000")
    assert scalars["validation/nll"] == pytest.approx([-fitness], rel=1e-5)


def test_the_sentence_tells_the_sign(finished: Finished) -> None:
    record = finished[1]
    worse = {**record, "ensemble": {**record["ensemble"], "test": record["parent"]["test"]}}
    worse["parent"] = {**record["parent"], "test": {**record["parent"]["test"], "nll": 0.0}}
    assert "higher" in table.verdict(worse).split(";")[0]
    better = {**worse, "parent": {**record["parent"], "test": {**record["parent"]["test"]}}}
    better["parent"]["test"]["nll"] += 1.0
    assert "NLL 1.0000 lower" in table.verdict(better)
