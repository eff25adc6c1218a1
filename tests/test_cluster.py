"""Several raylets on this machine: whatever of them dies, the numbers are those of a serial run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from faults import chaos
from tiny import numbers, run_serial, tiny

from ray_subnets import driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.distributed import run as ray_run
from ray_subnets.distributed.local_cluster import LocalCluster
from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Result, Status

Setting = tuple[LocalCluster, Path, Path, Any]

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setting]:
    """A cluster of three nodes, the folder of faults, one for runs, and the unbroken numbers."""
    scratch = tmp_path_factory.mktemp("chaos")
    expected = chaos.reference(scratch / "reference")
    faults = scratch / "faults"
    faults.mkdir()
    os.environ |= {"CHAOS": str(faults), "CHAOS_PAUSE": "0.05"}
    try:
        with chaos.stage_of(3) as cluster:
            yield cluster, faults, scratch, expected
    finally:
        del os.environ["CHAOS"], os.environ["CHAOS_PAUSE"]


@pytest.mark.parametrize("scenario", chaos.SCENARIOS, ids=lambda scenario: scenario.kind)
def test_the_numbers_are_those_of_an_unbroken_run(scenario: chaos.Scenario, stage: Setting) -> None:
    cluster, faults, scratch, expected = stage
    out = scratch / scenario.kind.replace(" ", "-")
    outcome = chaos.play(scenario, cluster, faults, out, expected)
    chaos.restore(cluster, 3)
    assert outcome.finished, outcome.log[-3000:]
    assert outcome.injected == outcome.expected
    assert outcome.equal
    assert outcome.lost == 0


def test_a_late_node_is_used(tmp_path: Path) -> None:
    """By a session that joined the cluster by itself, as a notebook does; and the run says so."""
    settings = tiny("children.1.tune.epochs=80", "children.1.count=8", "single=false")
    expected = run_serial(settings, RunFolder.create(tmp_path / "serial"))
    data = driver.load_data(settings)
    folder = RunFolder.create(tmp_path / "run")
    cost = driver.prepare(settings, data, folder)
    notes: list[str] = []
    seen: list[Status] = []
    with chaos.stage_of(1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:

            def listen(report: Report) -> None:
                if isinstance(report, Result) and report.id == "parent":
                    cluster.add()

            record = ray_run.run(
                settings,
                data,
                folder,
                cost=cost,
                listen=listen,
                notify=notes.append,
                watch=seen.append,
            )
        finally:
            ray.shutdown()
    assert numbers(record) == numbers(expected)
    assert any("joined; 3 now" in note for note in notes)
    assert max(status.actors for status in seen) == 2
    assert len({child["node"] for child in record["children"]}) == 2


def test_a_node_that_leaves_is_named(tmp_path: Path) -> None:
    settings = tiny("children.1.tune.epochs=300", "single=false")
    data = driver.load_data(settings)
    folder = RunFolder.create(tmp_path / "run")
    cost = driver.prepare(settings, data, folder)
    killed: list[str] = []
    with chaos.stage_of(2) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:

            def listen(report: Report) -> None:
                if isinstance(report, Epoch) and report.id == "sparse-000" and not killed:
                    killed.append("node")
                    cluster.kill()

            record = ray_run.run(settings, data, folder, cost=cost, listen=listen)
        finally:
            ray.shutdown()
    left = [fault for fault in record["faults"] if fault["what"] == "the node left"]
    assert len(left) == 1
    assert left[0]["node"].startswith("127.") or "." in left[0]["node"]
    assert all(child["error"] is None for child in record["children"])
