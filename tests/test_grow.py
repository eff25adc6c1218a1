"""Growing a run: new children, and nothing that exists is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from tiny import numbers, run_serial

from ray_subnets import configfile, members
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config

SMALL = """
name: small
data: digits
model: {name: mlp, hidden: [16]}
parent: {epochs: 2, batch_size: 64}
children:
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 1, batch_size: 64}}
  - {method: noisy, count: 2, sigma: 0.05, density: 0.5}
"""


def small(*overrides: str) -> Config:
    return configfile.parse(SMALL, "small", overrides)


def test_a_grown_run_is_the_run_of_that_size(tmp_path: Path, command: Command) -> None:
    """Same numbers as with six children from the start; the first two are not done again."""
    folder = RunFolder.create(tmp_path / "grown")
    run_serial(small(), folder)
    files = ["parent.safetensors", "children/sparse-000.safetensors", "results/sparse-001.json"]
    before = {name: (folder.root / name).stat().st_mtime_ns for name in files}
    single = folder.read("results/single.json")
    answer = command(
        "grow", str(folder.root), "--to", "6", "--group", "sparse", "--serial", "--quiet"
    )
    assert answer.returncode == 0, answer.stderr
    assert {name: (folder.root / name).stat().st_mtime_ns for name in files} == before
    assert folder.read("results/single.json") != single  # the budget is larger now
    whole = run_serial(small("children.0.count=6"), RunFolder.create(tmp_path / "whole"))
    grown = folder.read_json("result.json")
    assert numbers(grown) == numbers(json.loads(json.dumps(whole)))
    assert len(members.load(folder.root)) == 8


def test_untrained_children_leave_the_single_model(tmp_path: Path, command: Command) -> None:
    folder = RunFolder.create(tmp_path / "grown")
    run_serial(small(), folder)
    single = folder.read("results/single.json")
    answer = command("grow", str(folder.root), "--to", "5", "--group", "noisy", "--serial", "-q")
    assert answer.returncode == 0, answer.stderr
    assert folder.read("results/single.json") == single
    assert len(folder.read_json("result.json")["children"]) == 7


@pytest.mark.parametrize(
    ("to", "label", "message"),
    [
        (4, None, "--group: this run has several; name one of sparse, noisy"),
        (4, "dense", "--group: this run has no 'dense'; it has sparse, noisy"),
        (2, "sparse", "--to: sparse has 2 children already; name a larger number"),
        (3, "sparse", "3 children do not make whole partitions of 2; use a multiple of 2"),
    ],
)
def test_mistakes_are_named(to: int, label: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configfile.grown(small(), to, label)


def test_groups_of_one_name_grow_at_their_end() -> None:
    two = small("children.1.method=noisy")
    record = two.model_dump(mode="json")
    record["children"].append(record["children"][0])
    config = Config.model_validate_json(json.dumps(record), strict=True)
    after = configfile.grown(config, 8, "sparse")
    assert [group.count for group in after.children] == [2, 2, 6]
    ids = [spec.id for spec in after.specs() if spec.method == "sparse"]
    assert ids == [f"sparse-{i:03d}" for i in range(8)]
