"""Accuracy against passes, from a run's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tiny import run_serial, tiny

from analysis import cheaper_inference
from ray_subnets import members
from ray_subnets.checkpoints import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder.create(tmp_path_factory.mktemp("cheaper") / "run")
    run_serial(tiny("single=false", "select.count=8"), folder)
    return folder


def test_costs_and_qualities_are_those_of_the_run(run: RunFolder) -> None:
    record = run.read_json("result.json")
    ids = record["ensemble"]["members"]
    rows, curve = cheaper_inference.cheaper(run, ids)
    by = {one["what"]: one for one in rows}
    whole = by["8 members"]
    expected = record["ensemble"]["test"]
    assert whole["accuracy"] == expected["accuracy"]
    assert whole["nll"] == pytest.approx(expected["nll"], rel=1e-9)
    assert whole["of full"] == 1
    children = [one["test"]["accuracy"] for one in record["children"]]
    assert by["child"]["accuracy"] == pytest.approx(sum(children) / 8)
    assert by["3 chosen"]["passes"] == 3
    cascade = by["cascade, 99.9 % by agreement"]
    assert 1 <= cascade["passes"] <= 8
    assert cascade["share"] == cascade["passes"] / 8
    assert curve["passes"].min() == 1
    assert float(curve.iloc[-1]["agreement"]) == 1


def test_the_command(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep, figure = tmp_path / "keep", tmp_path / "figure.svg"
    call = ["cheaper_inference", str(run), "--epochs", "1", "--keep", str(keep)]
    monkeypatch.setattr("sys.argv", [*call, "--figure", str(figure), "--group", "stochastic"])
    assert cheaper_inference.main() == 0
    said = capsys.readouterr().out
    assert "| 2 members | 2.00 |" in said
    assert "the cascade keeps" in said
    assert "distilled minus trained alone, nll:" in said
    assert figure.read_text().startswith("<?xml")
    files = sorted(keep.iterdir())
    assert len(files) == 2
    record = json.loads(files[0].read_text())
    record["row"]["accuracy"] = 0.125
    files[0].write_text(json.dumps(record))
    assert cheaper_inference.main() == 0  # what was trained is not trained again
    assert "| 12.50 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*call, "--group", "dense"])
    assert cheaper_inference.main() == 2
    assert "--group: " in capsys.readouterr().err


def test_the_weight_is_chosen_by_validation_data(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {0.0: 0.1, 0.3: 0.4, 0.6: 0.2, 0.9: 0.3}  # 0 is the opponent, never chosen

    def made(_: object, __: object, ___: object, weight: float) -> cheaper_inference.Row:
        better_on_test_data = {"accuracy": weight, "nll": -weight}
        return {"what": f"{weight}", "validation": validation[weight]} | better_on_test_data

    monkeypatch.setattr(cheaper_inference, "student", made)
    how = cheaper_inference.Distillation(1, 0.1, 2.0, Path("unused"))
    teachers = [(run, members.load(run.root))]
    rows, said = cheaper_inference.students(teachers, how, [0.3, 0.6, 0.9])
    assert [one["what"] for one in rows] == ["0.6", "0.0"]
    assert said[0].endswith("0: 0.1000, 0.3: 0.4000, 0.6: 0.2000, 0.9: 0.3000; chosen: 0.6")


def test_means_and_errors_by_hand() -> None:
    table = pd.DataFrame(
        {
            "run": ["a", "b"],
            "what": ["x", "x"],
            "passes": [1.0, 2.0],
            "accuracy": [0.5, 0.75],
            "of full": [1.0, 0.5],
            "nll": [1.0, 3.0],
        }
    )
    last = cheaper_inference.markdown(table).splitlines()[-1]
    assert last == "| x | 1.50 | 62.50 ± 12.50 | 75.00 ± 25.00 | 2.0000 ± 1.0000 | 2 |"
