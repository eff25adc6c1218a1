"""A benchmark: settings chosen without test data, budgets counted, cells that stop and go on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from conftest import Command
from test_errors import must_say
from tiny import numbers

import ray_subnets
from ray_subnets import baselines, evaluation
from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of
from ray_subnets.benchmark import benchmarkfile, cells
from ray_subnets.benchmark import run as benchmark
from ray_subnets.benchmark.benchmarkfile import Benchmark
from ray_subnets.benchmark.cells import CellWorker
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Data
from ray_subnets.pools import Pool, SerialPool
from ray_subnets.population import Report, Task
from ray_subnets.recipes import Epoch, Result, derive

TEXT = """
name: small
budget: 4
seeds: [0, 1]
tasks:
  - {name: digits, data: digits, model: {name: mlp, hidden: [16]}}
columns:
  constant: {optimizer: adam, lr: 0.003, schedule: constant, batch_size: 64}
  decayed: {batch_size: 64}
search:
  decayed: {lr: [0.0001, 0.1]}
rows:
  - independent
  - {method: dense, members: 2}
  - {method: dense, name: larger, members: 2, budget: 8, settings_of: independent}
  - {method: snapshot, cycles: 2}
  - {method: sparse, count: 2, partition: 2, parent_epochs: 2}
"""


def parse(*overrides: str, text: str = TEXT) -> Benchmark:
    return benchmarkfile.parse(text, "small", overrides)


@contextmanager
def serial(task: Task, data: Data, jobs: int) -> Generator[Pool, None, None]:
    yield SerialPool(CellWorker(task, data))


def make(settings: Benchmark, folder: RunFolder, **how: Any) -> dict[str, Any]:
    return benchmark.run(settings, benchmark.prepare(settings), folder, serial, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """A finished benchmark."""
    folder = RunFolder.create(tmp_path_factory.mktemp("benchmark") / "b")
    return folder, make(parse(), folder)


def still(record: dict[str, Any]) -> Any:
    """Without clocks and places."""
    return numbers(json.loads(json.dumps(record)))


def test_every_row_column_and_seed_is_there(whole: tuple[RunFolder, dict[str, Any]]) -> None:
    _, record = whole
    found = {(c["row"], c["column"], c["seed"]) for c in record["cells"]}
    rows = ("independent", "dense", "larger", "snapshot", "sparse")
    assert found == set(itertools.product(rows, ("constant", "decayed"), (0, 1)))
    assert all(c["error"] is None and 0 < c["test"]["accuracy"] <= 1 for c in record["cells"])
    assert [row["name"] for row in record["rows"]] == list(rows)


def test_the_budget_is_counted_in_images(whole: tuple[RunFolder, dict[str, Any]]) -> None:
    _, record = whole
    images = record["tasks"][0]["data"]["train"]
    for cell in record["cells"]:
        epochs = 8 if cell["row"] == "larger" else 4
        assert cell["cost"]["images"] == epochs * images
        assert cell["cost"]["epochs"] == epochs
        wanted = {"larger": 2.0, "sparse": None}.get(cell["row"], 1.0)
        if wanted:
            assert cell["cost"]["flops_vs_single"] == pytest.approx(wanted)
            assert cell["cost"]["flops_dense_vs_single"] == pytest.approx(wanted)
        else:  # half of the hidden weights in half of the epochs
            assert 0.6 < cell["cost"]["flops_vs_single"] < 0.85
        members = {"independent": 1, "larger": 2, "dense": 2, "snapshot": 2, "sparse": 2}
        assert cell["members"] == members[cell["row"]] == cell["cost"]["passes"]


def test_the_search_takes_what_is_better_on_validation_data(
    whole: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, record = whole
    for row, columns in record["chosen"]["digits"].items():
        assert columns["decayed"] == {"lr": 0.1}, row  # the other one learns nothing
        assert "constant" not in columns
    tried = [one for one in record["tried"] if one["row"] == "dense"]
    assert [one["settings"] for one in tried] == [{"lr": 0.0001}, {"lr": 0.1}]
    # A row that takes another one's settings is not tried itself.
    assert not [one for one in record["tried"] if one["row"] == "larger"]
    for place in (folder.root / "cells").glob("*-try*"):
        assert "test" not in json.loads((place / "cell.json").read_text())


def test_test_labels_decide_nothing(
    whole: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    settings = parse("seeds=[0]")
    data = benchmark.prepare(settings)["digits"]
    wrong = replace(data.test, labels=(data.test.labels + 1) % 10)
    folder = RunFolder.create(tmp_path / "b")
    record = benchmark.run(settings, {"digits": replace(data, test=wrong)}, folder, serial)
    assert record["chosen"] == whole[1]["chosen"]
    assert record["tried"] == whole[1]["tried"]
    same = [c for c in whole[1]["cells"] if c["seed"] == 0]
    assert [c["validation"] for c in record["cells"]] == [c["validation"] for c in same]
    assert all(c["test"]["accuracy"] < 0.3 for c in record["cells"])


@pytest.mark.parametrize("row", ["independent", "dense", "snapshot", "sparse"])
def test_a_cell_is_a_run_folder(whole: tuple[RunFolder, dict[str, Any]], row: str) -> None:
    """Its ensemble loads and gives the recorded numbers."""
    folder, record = whole
    cell = next(c for c in record["cells"] if c["row"] == row and c["column"] == "decayed")
    assert evaluation.evaluate(folder.root / "cells" / cell["id"]).difference < 1e-6
    ensemble = ray_subnets.load(folder.root / "cells" / cell["id"])
    data = benchmark.prepare(parse())["digits"]
    assert isinstance(data.test.images, torch.Tensor)
    with torch.no_grad():
        right = ensemble(data.test.images).argmax(1) == data.test.labels
    assert right.double().mean() == pytest.approx(cell["test"]["accuracy"], abs=1e-9)


class Stopped(Exception):
    """Stands for a killed driver."""


@pytest.mark.parametrize("after", [3, 17, 40])
def test_interrupted_is_not(
    whole: tuple[RunFolder, dict[str, Any]], tmp_path: Path, after: int
) -> None:
    folder = RunFolder.create(tmp_path / "b")
    seen: list[Report] = []

    def listen(report: Report) -> None:
        seen.append(report)
        if len(seen) == after:
            raise Stopped

    with pytest.raises(Stopped):
        make(parse(), folder, listen=listen)
    assert isinstance(seen[-1], Epoch | Result)
    again: list[Report] = []
    record = make(parse(), folder, listen=again.append)
    assert still(record) == still(whole[1])
    # What was done is not done again.
    finished = {report.id for report in seen[:-1] if isinstance(report, Result)}
    assert not finished & {report.id for report in again if isinstance(report, Epoch)}


def test_a_stage_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Stopped in the second cycle of a snapshot ensemble: the first is not trained again."""
    settings = parse("seeds=[0]", "rows=[{method: snapshot, cycles: 2}]", "search={}")
    expected = make(settings, RunFolder.create(tmp_path / "whole"))
    folder = RunFolder.create(tmp_path / "b")

    def listen(report: Report) -> None:
        if isinstance(report, Epoch) and report.epoch == 3:
            raise Stopped

    with pytest.raises(Stopped):
        make(settings, folder, listen=listen)
    epochs: list[int] = []
    record = make(
        settings,
        folder,
        listen=lambda r: epochs.append(r.epoch) if isinstance(r, Epoch) else None,
    )
    assert epochs == [4, 1, 2, 3, 4]  # the rest of the first cell, then the other column
    assert still(record) == still(expected)
    assert not list((folder.root / "checkpoints").glob("*"))


def test_serial_is_ray(whole: tuple[RunFolder, dict[str, Any]], tmp_path: Path) -> None:
    from ray_subnets.distributed import benchmarks, cluster

    settings = parse("resources.actors=2")
    folder = RunFolder.create(tmp_path / "b")
    with cluster.session():
        pools = benchmarks.pools(
            settings.resources, growing=False, notify=lambda _: None, watch=lambda _: None
        )
        record = benchmark.run(settings, benchmark.prepare(settings), folder, pools)
    assert still(record) == still(whole[1])


# --- methods that go wrong ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Greedy(Method):
    """Takes an epoch more than it says."""

    title: ClassVar[str] = "greedy"
    source: ClassVar[str] = "nobody"
    method: Literal["greedy"] = "greedy"

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        model = self.network(bench.build, derive(bench.seed, "weights", 0))
        yield from bench.fit(model, of(bench.training, bench.budget), seed=0)
        yield from bench.fit(model, of(bench.training, 1), seed=1)
        return Trained(networks=[model])


def test_a_method_that_exceeds_the_budget_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(baselines.METHODS, "greedy", Greedy)
    settings = parse("seeds=[0]", "rows=[greedy, independent]", "search={}")
    record = make(settings, RunFolder.create(tmp_path / "b"))
    errors = {c["row"]: c["error"] for c in record["cells"]}
    assert errors["independent"] is None
    must_say(errors["greedy"], [r"training images", r"budget of 4 epochs"])


def test_a_failed_cell_is_a_line(tmp_path: Path) -> None:
    text = TEXT.replace(
        "  - independent", "  - {method: independent, columns: {decayed: {lr: 1.0e+30}}}"
    )
    settings = parse("seeds=[0]", text=text.replace(", settings_of: independent", ""))
    record = make(settings, RunFolder.create(tmp_path / "b"))
    bad = [c for c in record["cells"] if c["error"]]
    assert [(c["row"], c["column"]) for c in bad] == [("independent", "decayed")]
    must_say(bad[0]["error"], [r"loss is (nan|inf)"])


def test_a_resumed_benchmark_makes_rows_listed_before_the_row_they_follow(tmp_path: Path) -> None:
    rows = "[{method: dense, members: 2, settings_of: independent}, independent]"
    settings = parse("seeds=[0]", f"rows={rows}")
    folder = RunFolder.create(tmp_path / "b")
    before = make(settings, folder)
    assert len(before["cells"]) == 4
    for path in (tmp_path / "b" / "results").glob("*dense*"):
        path.unlink()
    after = make(settings, folder)
    assert [one["id"] for one in after["cells"]] == [one["id"] for one in before["cells"]]


def test_a_search_without_a_working_setting_fails_its_row(tmp_path: Path) -> None:
    settings = parse("seeds=[0]", "rows=[independent]", "search.decayed={lr: [1.0e+30, 1.0e+31]}")
    record = make(settings, RunFolder.create(tmp_path / "b"))
    bad = [c for c in record["cells"] if c["error"]]
    assert [(c["row"], c["column"]) for c in bad] == [("independent", "decayed")]
    must_say(bad[0]["error"], [r"no setting of its search worked"])


# --- shifted data ---------------------------------------------------------------------------------


def test_shifted_data(tmp_path: Path) -> None:
    settings = parse(
        "seeds=[0]",
        "rows=[independent, {method: dense, members: 2}]",
        "search={}",
        "shift={samples: 20, severities: [1, 5], ood: patches}",
    )
    record = make(settings, RunFolder.create(tmp_path / "b"))
    for cell in record["cells"]:
        assert cell["shift_error"] is None
        shift = cell["shift"]
        assert shift["samples"] == 20
        assert len(shift["cells"]) == 19 * 2
        assert shift["severities"]["5"]["nll"] > shift["severities"]["1"]["nll"]
        mean = sum(one["accuracy"] for one in shift["severities"].values()) / 2
        assert shift["accuracy"] == pytest.approx(mean)
        assert 0 <= cell["ood"]["maximum_probability"]["auroc"] <= 1
        assert ("mutual_information" in cell["ood"]) == (cell["row"] == "dense")


def test_missing_corrupted_files_cost_no_training(tmp_path: Path) -> None:
    settings = parse(
        "seeds=[0]", "rows=[independent]", "search={}", f"shift={{root: {tmp_path / 'none'}}}"
    )
    record = make(settings, RunFolder.create(tmp_path / "b"))
    for cell in record["cells"]:
        assert cell["error"] is None
        assert cell["shift"] is None
        must_say(cell["shift_error"], [r"\.npy", r"zenodo"])


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    ("rows=[nonsense]", [r"unknown method 'nonsense'", r"independent"]),
    ("rows=[independent, independent]", [r"rows: name", r"independent", r"another name"]),
    ("rows=[{method: dense, membres: 3}]", [r"rows\.dense", r"membres"]),
    ("rows=[{method: dense, members: 5}]", [r"members", r"budget is 4"]),
    ("rows=[{method: dropout, rate: 1.5}]", [r"rows\.dropout", r"rate", r"less than 1"]),
    ("rows=[{method: independent, settings_of: other}]", [r"settings_of", r"other"]),
    (
        "rows=[{method: independent, settings_of: dense}, {method: dense, settings_of: dense}]",
        [r"settings_of", r"'dense' takes those of another row"],
    ),
    ("rows=[{method: sparse, count: 3, sparsity: 0.5}]", [r"rows\.sparse", r"tune_epochs"]),
    (
        "rows=[{method: sparse, count: 2, partition: 2, parent_epochs: 4, tune_epochs: 1}]",
        [r"rows\.sparse", r"takes 6 epochs", r"budget is 4"],
    ),
    ("rows=[]", [r"rows", r"at least 1"]),
    ("seeds=[]", [r"seeds", r"at least 1"]),
    ("seeds=[0, 0]", [r"seeds", r"twice"]),
    ("seeds=[0, 1000]", [r"search_seeds"]),
    ("columns={}", [r"columns", r"at least 1"]),
    ("columns.constant.lr=-1", [r"columns\.constant", r"lr", r"greater than 0"]),
    ("columns.decayed.lrr=1", [r"columns\.decayed", r"lrr"]),
    ("search={other: {lr: [1, 2]}}", [r"search", r"no column 'other'"]),
    ("search.decayed={lr: []}", [r"search\.decayed\.lr", r"at least 1"]),
    ("budget=0", [r"budget"]),
    ("tasks=[]", [r"tasks"]),
    ("shift={severities: [6]}", [r"shift\.severities"]),
    ("frobnicate=1", [r"frobnicate"]),
]


@pytest.mark.parametrize(("override", "words"), BAD)
def test_bad_settings_are_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(override)
    must_say(str(caught.value), words)


def test_a_network_that_does_not_fit_is_told_before_anything_is_done() -> None:
    settings = parse("tasks=[{name: digits, data: digits, model: lenet_s}]")
    with pytest.raises(ValueError, match=r".") as caught:
        benchmark.prepare(settings)
    must_say(str(caught.value), [r"LeNet needs images of 16x16"])
    settings = parse("rows=[{method: dropout, own: true}]")
    with pytest.raises(ValueError, match=r".") as caught:
        benchmark.prepare(settings)
    must_say(str(caught.value), [r"rows\.dropout on mlp", r"own"])


def test_the_command(command: Command, tmp_path: Path) -> None:
    """A benchmark, stopped by nothing; then the same folder again, which has nothing to do."""
    config = tmp_path / "small.yaml"
    config.write_text(TEXT)
    place = str(tmp_path / "b")
    plan = command("benchmark", str(config), "--plan")
    assert plan.returncode == 0
    assert "28 cells, 128 epochs" in plan.stdout
    options = ["seeds=[0]", "rows=[independent]", "search={}", "--serial", "--out", place]
    first = command("benchmark", str(config), *options)
    assert first.returncode == 0, first.stderr
    assert "benchmark.html" in first.stdout
    again = command("benchmark", place, "--serial")
    assert again.returncode == 0, again.stderr
    for name in ("benchmark.json", "benchmark.md", "benchmark.html"):
        assert os.path.getsize(f"{place}/{name}") > 500
    refused = command("benchmark", str(config), *options)
    assert refused.returncode == 2
    must_say(refused.stderr, [r"--out"])


def test_reading_a_cell_that_is_gone() -> None:
    cell = parse().finals(parse().tasks[0], parse().rows[0], "constant", {})[0]
    with pytest.raises(ValueError, match=r"cell\.json"):
        cells.read(RunFolder("/nowhere"), cell)
