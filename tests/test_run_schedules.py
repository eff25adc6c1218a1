"""`analysis.schedules` against what the recipes say, and Fig 6.1 from records written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from tiny import run_serial, tiny

from analysis import schedules, studies
from analysis.folders import Run
from ray_subnets import configfile, driver
from ray_subnets import schedules as schedules_
from ray_subnets.checkpoints import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    more = (
        "children.1.prune_epochs=2",
        "children.1.partition=1",
        "children.1.sparsity=0.5",
        "children.2.tau=0.4",
        "children.2.tune.lr=0.02",
    )
    run_serial(tiny(*more), RunFolder.create(folder))
    return Run.open(folder)


def test_curves_are_those_of_the_recipes(run: Run) -> None:
    table = schedules.curves(run)
    kinds = {str(name): one.reset_index() for name, one in table.groupby("network")}
    assert set(kinds) == {"parent", "sparse", "stochastic"}  # untuned ones have no schedule
    images = run.folder.read_json("result.json")["data"]["train"]
    steps = -(-images // 64)
    assert len(kinds["parent"]) == 2 * steps
    expected = [schedules_.decay(i, 2 * steps, lr=kinds["parent"]["lr"][0]) for i in (0, steps)]
    assert list(kinds["parent"]["lr"][[0, steps]]) == pytest.approx(expected)
    annealed = kinds["stochastic"]
    cycle = [schedules_.one_cycle(i, 2 * steps, lr_max=0.02) for i in range(2 * steps)]
    np.testing.assert_allclose(annealed[["lr", "momentum"]], cycle)
    linear = 0.4 * np.clip(1 - annealed["epoch"] / 1.5, 0, None)
    np.testing.assert_allclose(annealed["outside"], linear, atol=1e-4)
    np.testing.assert_allclose(annealed["temperature"], linear, atol=1e-4)
    assert (annealed["inside"] == 1).all()
    pruned = kinds["sparse"]  # half of the removals at the start of each of the two epochs
    assert set(pruned["outside"][:steps]) == {0.5}
    assert set(pruned["outside"][steps:]) == {0.0}


def test_uniform_chances_have_the_means_of_their_sets(run: Run) -> None:
    specs = driver.config_of(run.folder).specs()
    (spec, *_) = [spec for spec in specs if spec.method == "stochastic"]
    spec = replace(spec, probabilities="uniform", two_sided=True)
    found = schedules.chances(run, spec, np.array([0.0, 0.75, 1.5]))
    # U(0, 1) in two halves: means .75 and .25; a mean of 500 weights is within .03 of it.
    np.testing.assert_allclose(found["inside"], [0.75, 0.875, 1], atol=0.03)
    np.testing.assert_allclose(found["outside"], [0.25, 0.125, 0], atol=0.03)
    assert found["temperature"].isna().all()


def test_its_findings_can_be_drawn(run: Run, tmp_path: Path) -> None:
    found = schedules.find(run)
    assert "schedule_steps.csv" in found.write(RunFolder.create(tmp_path / "out"))
    fixed = {row[0]: row[-1] for row in found.tables[0].rows}
    assert float(fixed["stochastic"]) == pytest.approx(1.5, abs=0.05)
    assert fixed["parent"] == ""


def test_fig_6_1_is_a_difference_within_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: +1 and +3 points over one-shot in two seeds are 2 ± 1."""
    rows = [
        {"group": "one_shot", "seed": seed, "accuracy": base} for seed, base in ((0, 0.7), (1, 0.8))
    ] + [
        {"group": f"constant-tau={tau}-anneal_epochs=5", "seed": seed, "accuracy": base + gain}
        for tau, gains in ((0.2, (0.01, 0.03)), (1, (0.0, 0.0)))
        for seed, base, gain in zip((0, 1), (0.7, 0.8), gains, strict=True)
    ]
    monkeypatch.setattr(studies, "_runs", lambda root, name: [])
    monkeypatch.setattr(studies, "records", lambda runs: [])
    monkeypatch.setattr(studies, "frame", lambda found: pd.DataFrame(rows))
    axes = Figure().subplots()
    studies.tau("constant")(axes, "runs")
    (line, _, errors) = axes.containers[0]
    assert list(line.get_xdata()) == [0.2, 1]
    assert list(line.get_ydata()) == pytest.approx([2, 0])
    low, high = errors[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((1, 3))


def test_the_study_varies_both_from_the_same_masks() -> None:
    file = Path(__file__).parent.parent / "configs/study_tau.yaml"
    specs = configfile.parse(file.read_text(), str(file)).specs()
    grid = {(s.tau, s.anneal_epochs) for s in specs if s.label.startswith("one-cycle")}
    assert len(grid) == 20
    assert len({s.seed for s in specs}) == 1
    assert {s.training.schedule for s in specs if s.training} == {"constant", "one_cycle"}
