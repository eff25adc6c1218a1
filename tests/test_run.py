"""Whole runs in this process: numbers, files, interruption, loading."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny import TINY, equal, numbers, run_serial, tiny

import ray_subnets
from ray_subnets import driver, metrics, models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import combine
from ray_subnets.config import ModelSection
from ray_subnets.pools import SerialPool
from ray_subnets.population import Report, Worker
from ray_subnets.recipes import Epoch
from ray_subnets.summary import load_outputs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "tiny")
    return folder, run_serial(tiny(), folder)


def test_result_has_what_the_design_promises(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, record = finished
    test = {"accuracy", "nll", "ece", "ece_floor", "brier"}
    assert test <= record["parent"]["test"].keys()
    assert test <= record["single"]["test"].keys()
    assert len(record["children"]) == 8
    for child in record["children"]:
        assert {"id", "method", "recipe", "fitness", "selected", "why", "seconds", "test"} <= set(
            child
        )
    ensemble = record["ensemble"]
    assert {"members", "includes_parent", "combine", "test", "diversity"} <= ensemble.keys()
    assert ensemble["diversity"].keys() == {"disagreement", "kl", "correlation"}
    assert {
        "epochs",
        "wall_seconds",
        "device_seconds",
        "flops",
        "flops_vs_single",
        "parameters",
        "inference_passes",
        "bytes_on_disk",
    } <= record["cost"].keys()
    assert set(ensemble["groups"]) == {"noisy", "sparse", "stochastic"}
    assert len(ensemble["by_size"]) == 6
    assert folder.read_json("result.json") == json.loads(json.dumps(record))


def test_an_end_that_was_asked_for_is_ctrl_c(tmp_path: Path) -> None:
    """SIGTERM, as container and batch systems send it: one line, and what was computed is kept."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = [sys.executable, "-m", "ray_subnets", "run", "tiny.yaml", "--serial"]
    process = subprocess.Popen(
        [*line, "parent.epochs=100000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not (tmp_path / "runs/tiny/checkpoints").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert told.strip().splitlines()[-1].startswith("Stopped. What was computed is kept")
    assert "Traceback" not in told


def test_the_budget_is_what_was_seen_not_what_was_asked(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    """Images are counted in the loop: parent and children together see what the single one does."""
    _, record = finished
    train = record["data"]["train"]
    assert record["cost"]["epochs"] == 2 + 4 * 2
    assert record["cost"]["images"] == (2 + 4 * 2) * train == record["single"]["images"]
    # 64x16 of 64x16 + 16x10 weights are maskable. In 4 of 10 epochs half of them are gone; in 4 the
    # other half acts with a chance of 0.5 that falls to 0 in 27 of 36 steps.
    dense = 3 * 2 * (64 * 16 + 16 * 10)
    sparse = 3 * 2 * (64 * 16 / 2 + 16 * 10)
    assert (-(-train // 64), 2 * 18) == (18, 36)
    chance = 0.5 * sum(1 - k / 27 for k in range(27)) / 36
    drawn = 3 * 2 * (64 * 16 / 2 * (1 + chance) + 16 * 10)
    assert record["cost"]["flops_dense"] == dense * 10 * train
    assert record["cost"]["flops"] == pytest.approx((2 * dense + 4 * sparse + 4 * drawn) * train)


def test_same_seed_same_numbers_other_seed_others(
    finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    folder, record = finished
    again = RunFolder.create(tmp_path / "again")
    assert numbers(run_serial(tiny(), again)) == numbers(record)
    for spec in tiny().specs():
        one = folder.load_arrays(f"outputs/{spec.id}.npz")
        two = again.load_arrays(f"outputs/{spec.id}.npz")
        assert all(np.array_equal(one[name], two[name]) for name in one)
        if spec.epochs:
            name = f"children/{spec.id}.safetensors"
            assert equal(folder.load_tensors(name), again.load_tensors(name))
    other = run_serial(tiny("seed=1"), RunFolder.create(tmp_path / "other"))
    assert other["parent"]["test"]["nll"] != record["parent"]["test"]["nll"]


class Stop(Exception):
    """Stands for a killed driver."""


@pytest.mark.parametrize("stop_at", ["parent", "single", "sparse-001", "stochastic-000"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    stop_at: str, finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped in the middle of a job, then continued from its last epoch: not one bit differs."""
    _, record = finished
    folder = RunFolder.create(tmp_path / "stopped")
    seen: list[Report] = []

    def stop(report: Report) -> None:
        if isinstance(report, Epoch) and (report.id, report.epoch) == (stop_at, 1):
            raise Stop

    with pytest.raises(Stop):
        run_serial(tiny(), folder, listen=stop)
    assert folder.exists(f"checkpoints/{stop_at}.safetensors")
    assert numbers(run_serial(tiny(), folder, listen=seen.append)) == numbers(record)
    # It went on; it did not start again.
    assert next(r.epoch for r in seen if isinstance(r, Epoch) and r.id == stop_at) == 2
    assert not folder.exists(f"checkpoints/{stop_at}.safetensors")


class Once(torch.nn.Module):
    """Its given training step, counted over all instances, gives NaN; no other does."""

    steps, broken = 0, frozenset[int]()

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(x)
        if not self.training:
            return logits
        Once.steps += 1
        return logits * float("nan") if Once.steps in Once.broken else logits


def test_a_nan_that_goes_away_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails once is done again from the last checkpoint; the record says so."""

    def build(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        return Once(models.MODELS["mlp"](input_shape, num_classes, hidden=[16]))

    monkeypatch.setitem(models.MODELS, "once", build)
    settings = tiny("single=false")
    settings = settings.model_copy(update={"model": ModelSection(name="once")})
    expected = run_serial(settings, RunFolder.create(tmp_path / "plain"))
    assert Once.steps > 100
    steps, Once.steps = Once.steps, 0
    # In the parent's second epoch, and near the end, in a child.
    monkeypatch.setattr(Once, "broken", frozenset({30, steps - 10}))
    record = run_serial(settings, RunFolder.create(tmp_path / "broken"))
    assert Once.steps > steps
    told = [child["id"] for child in record["children"] if child["notes"]]
    assert len(told) == 1
    assert "done again from the last checkpoint" in record["parent"]["notes"][0]
    for part in (record, expected):
        for network in [part["parent"], *part["children"]]:
            del network["notes"]
    assert numbers(record) == numbers(expected)


def test_a_damaged_checkpoint_only_costs_time(
    finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "damaged")
    for id in ("parent", "sparse-000"):
        folder.write(f"checkpoints/{id}.safetensors", b"half a file")
    # A whole one, but of another recipe.
    worker = Worker(driver.task_of(tiny("seed=5"), folder), driver.load_data(tiny()))
    reports = worker.run(tiny("seed=5").parent_job())
    next(reports)
    reports.close()  # type: ignore[attr-defined]
    assert numbers(run_serial(tiny(), folder)) == numbers(finished[1])


def test_load_gives_the_recorded_probabilities(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, record = finished
    ensemble = ray_subnets.load(folder.root)
    assert isinstance(ensemble, torch.nn.Module)
    assert list(ensemble.ids) == record["ensemble"]["members"]
    data = driver.load_data(tiny())
    p = ensemble(data.test.images)
    assert p.shape == (len(data.test), 10)
    saved = load_outputs(folder, record["ensemble"]["members"], "test")
    torch.testing.assert_close(p.double(), combine(saved.logits), rtol=0, atol=1e-6)
    assert metrics.nll(p, data.test.labels) == pytest.approx(
        record["ensemble"]["test"]["nll"], abs=1e-6
    )
    # Normalised inputs give what uint8 images give.
    assert torch.equal(ensemble(data.preprocess(data.test.images)), p)


def test_with_the_parent_as_a_member(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "with")
    record = run_serial(tiny("include_parent=true", "single=false"), folder)
    assert record["ensemble"]["members"][0] == "parent"
    assert record["ensemble"]["test"] == record["ensemble"]["with_parent"]
    assert record["single"] is None
    assert len(ray_subnets.load(folder.root)) == 7 == record["cost"]["inference_passes"]


def test_selection_uses_validation_data_and_says_why(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, record = finished
    ids = [child["id"] for child in record["children"]]
    saved = load_outputs(folder, ids, "validation")
    members = [saved.ids.index(id) for id in record["ensemble"]["members"]]
    assert record["ensemble"]["validation"]["without_parent"]["nll"] == pytest.approx(
        metrics.nll(combine(saved.logits[members]), saved.labels)
    )
    nll = {
        id: metrics.nll(logits.double().softmax(1), saved.labels)
        for id, logits in zip(ids, saved.logits, strict=True)
    }
    best = sorted(ids, key=lambda id: nll[id])[:6]
    assert {child["id"] for child in record["children"] if child["selected"]} == set(best)
    for child in record["children"]:
        assert child["fitness"] == pytest.approx(-nll[child["id"]])
        assert f"rank {child['rank']} of 8" in child["why"]


def test_what_is_on_disk(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    """Noisy children have no file; a sparse one is as large as its surviving weights."""
    folder, record = finished
    assert not list((folder.root / "children").glob("noisy*"))
    assert not list((folder.root / "checkpoints").glob("*"))
    packed = safetensors.numpy.load_file(str(folder.root / "children/sparse-000.safetensors"))
    values = sum(array.size for array in packed.values())
    assert values == 64 * 16 // 2 + 16 + 16 * 10 + 10
    recipe = json.dumps(next(c["recipe"] for c in record["children"] if c["method"] == "noisy"))
    assert len(recipe) < 1024


def test_batch_norm_networks_and_images(tmp_path: Path) -> None:
    """A convolutional network with batch normalisation, crop and flip, goes the whole way."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 80), ("test", 30)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
        arrays[f"{split}_labels"] = generator.integers(0, 3, n)
        arrays[f"{split}_labels"][:3] = [0, 1, 2]
    np.savez(tmp_path / "images.npz", **arrays)
    settings = tiny(
        "data.name=npz",
        f"data.root={tmp_path}/images.npz",
        "data.crop=2",
        "data.flip=true",
        "data.validation=20",
        "model=wide_resnet",
        "model.depth=10",
        "model.width=1",
        "parent.batch_size=16",
    )
    folder = RunFolder.create(tmp_path / "run")
    record = run_serial(settings, folder)
    assert record["data"]["num_classes"] == 3
    p = ray_subnets.load(folder.root)(torch.from_numpy(arrays["test_images"]))
    labels = torch.from_numpy(arrays["test_labels"])
    assert metrics.nll(p, labels) == pytest.approx(record["ensemble"]["test"]["nll"], abs=1e-6)


def test_a_pool_takes_jobs_while_it_reports(tmp_path: Path) -> None:
    """The driver submits children while reading the parent's reports."""
    settings = tiny()
    data = driver.load_data(settings)
    folder = RunFolder.create(tmp_path / "run")
    pool = SerialPool(Worker(driver.task_of(settings, folder), data))
    pool.submit(settings.parent_job())
    reports = pool.reports()
    first = next(reports)
    single = settings.single_job()
    assert single
    pool.submit(single)
    ids = {first.id} | {report.id for report in reports}
    assert ids == {"parent", "single"}
