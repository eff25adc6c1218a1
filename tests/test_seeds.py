"""The table over seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis import seeds
from ray_subnets.checkpoints import RunFolder

REPOSITORY = Path(__file__).parent.parent


def record(seed: int, nll: float, single: float) -> dict[str, object]:
    def test(value: float) -> dict[str, float]:
        names = ("accuracy", "brier", "nll_scaled", "ece", "ece_floor", "ece_floor_std")
        return {"nll": value} | dict.fromkeys(names, 0.5)

    return {
        "name": "study",
        "seed": seed,
        "parent": {"epochs": 4, "test": test(0.9)},
        "single": {"epochs": 6, "error": None, "test": test(single)},
        "children": [{"id": "sparse-000", "epochs": 2}],
        "mean_child": test(0.8),
        "ensemble": {
            "members": ["sparse-000"],
            "includes_parent": False,
            "without_parent": test(nll),
            "with_parent": test(nll),
            "groups": {},
        },
        "cost": {"epochs": 6},
    }


def test_mean_standard_error_and_paired_difference() -> None:
    """By hand: 0.1, 0.2, 0.6 have mean 0.3 and standard error 0.1528; paired with +0.1 each."""
    frame = seeds.long_table([record(i, v, v + 0.1) for i, v in enumerate((0.1, 0.2, 0.6))])
    text = seeds.markdown(frame)
    assert "| study | selected ensemble | 1 | 6 | 50.00 ± 0.00 | 0.3000 ± 0.1528 |" in text
    (line,) = seeds.paired(frame, "selected ensemble", "single, same budget")
    assert "NLL -0.1000 ± 0.0000" in line
    assert "n = 3" in line


def test_pairs_are_counted_where_both_are() -> None:
    runs = [record(i, v, v + 0.1) for i, v in enumerate((0.1, 0.2, 0.6, 0.4))]
    for run in runs[2:]:
        run["single"] = None
    frame = seeds.long_table(runs)
    (line,) = seeds.paired(frame, "selected ensemble", "single, same budget")
    assert line.endswith("(n = 2)")
    runs[1]["single"] = None
    (line,) = seeds.paired(seeds.long_table(runs), "selected ensemble", "single, same budget")
    assert "nan" not in line
    assert line.endswith("(n = 1)")


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for name in "ab":
        folder = RunFolder.create(tmp_path / name)
        folder.write("config.yaml", b"")
        folder.write_json("result.json", record(0, 0.1, 0.2))
    with pytest.raises(ValueError, match="seed 0 was given twice"):
        seeds.records([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_missing_run_is_one_line(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "analysis.seeds", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "no such folder" in answer.stderr
