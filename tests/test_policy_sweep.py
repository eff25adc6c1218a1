"""Sweeps of policies: cells that share parents, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_policy_run import PICTURE

import ray_subnets
from ray_subnets.checkpoints import RunFolder
from ray_subnets.pools import SerialPool
from ray_subnets.recipes import Result
from ray_subnets.rl import policy_report, policy_sweep, policy_sweepfile
from ray_subnets.rl.policy_cells import PolicyCellWorker
from ray_subnets.rl.policy_sweepfile import PolicySweep

SWEEP = (
    PICTURE
    + """
sweep:
  keys: {sigma: [0.1, 0.5], ppo.lr: [0.01, 0.02]}
  seeds: [0, 1]
"""
)


def parsed(*overrides: str) -> PolicySweep:
    small = ["children.1.count=2", "evaluate.levels=[unseen]", "evaluate.choose=[sample]"]
    return policy_sweepfile.parse(SWEEP, "sweep.yaml", [*small, *overrides])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sweep.keys={sigmas: [1.0]}", "sweep.keys.sigmas: neither the run nor a group"),
        ("sweep.keys={seed: [1]}", "sweep.keys.seed: list them under sweep.seeds"),
        ("sweep.keys={sigma: [-1.0]}", "children.0.sigma: input should be greater than 0"),
        ("sweep.keys={sigma: []}", "sweep.keys.sigma: "),
        ("sweep.seeds=[1, 1]", "sweep.seeds: each may occur once"),
        ("sweep.search=optuna", "sweep.search: unknown key; known: keys, seeds"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        parsed(override)
    assert len(str(error.value).splitlines()) == 1


def test_parents_are_shared_where_what_is_swept_does_not_touch_them() -> None:
    sweep = parsed()
    assert len(sweep.cells()) == 4
    assert len(sweep.parents()) == 4, "two rates, two seeds; noise shares them"
    assert len(policy_sweep.jobs(sweep)) == 4 + 8
    assert policy_sweepfile.parse(sweep.to_yaml(), "again").cells() == sweep.cells()


def run_here(sweep: PolicySweep, folder: RunFolder, **how: Any) -> dict[str, Any]:
    data = policy_sweep.check(sweep)
    task = sweep.config(sweep.cells()[0], 0).task(str(folder))
    return policy_sweep.run(sweep, folder, SerialPool(PolicyCellWorker(task, data)), **how)


def test_a_sweep_from_parents_to_its_page(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    folder, seen = RunFolder.create(tmp_path / "sweep"), list[Any]()
    sweep = parsed("sweep.keys={sigma: [0.1, 0.5]}", "sweep.seeds=[0, 1, 2]")
    record = run_here(sweep, folder, listen=seen.append)
    assert record["state"] == "finished"
    assert [trial["status"] for trial in record["trials"]] == ["done", "done"]
    for trial in record["trials"]:
        assert len(trial["runs"]) == 3
        (one,) = trial["evaluation"]
        row = next(row for row in one["players"] if row["name"] == "noisy, mean")
        assert row["episodes"] == row["difference"]["pairs"] == 3 * 12
        assert row["difference"]["mean"] == pytest.approx(sum(row["by_seed"]) / 3)
        assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
    first, second = (
        [row for row in trial["evaluation"][0]["players"] if row["name"] == "parent"]
        for trial in record["trials"]
    )
    assert first == second, "the same parents on the same levels"
    page = (folder.root / "sweep.html").read_text()
    assert "sigma=0.5" in page
    assert page.count("<svg") == 1
    run = folder.path(record["trials"][0]["runs"][0])
    assert len(ray_subnets.load_policy(run).actors) == 3
    assert Path(policy_report.write(RunFolder.open(run))).exists()

    seen.clear()
    again = run_here(sweep, folder, listen=seen.append)
    assert again["trials"] == record["trials"]
    assert {one.id for one in seen} == {job.id for job in policy_sweep.jobs(sweep)}
    assert all(isinstance(one, Result) and one.error is None for one in seen)


def test_a_cell_that_fails_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    folder = RunFolder.create(tmp_path / "sweep")
    sweep = parsed(
        "sweep.keys={evaluate.limit: [1, 1000]}", "sweep.seeds=[0]", "children.1.count=2"
    )
    record = run_here(sweep, folder)
    short, long = record["trials"]
    assert (short["status"], long["status"]) == ("failed", "done")
    assert "after 1 steps Picture-v0 has" in short["error"]
    assert "Failed: evaluate.limit=1" in (folder.root / "sweep.html").read_text()
