"""Runs on Ray: the same bits as in one process, also when parts of it die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import Command
from tiny import TINY, equal, numbers, run_serial, tiny
from torch import nn

from ray_subnets import driver, table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.distributed import cluster
from ray_subnets.distributed import pool as pool_
from ray_subnets.distributed import run as ray_run
from ray_subnets.distributed.children import pack_data, unpack_data
from ray_subnets.distributed.devices import Share
from ray_subnets.distributed.parent import ParentWorker
from ray_subnets.distributed.pool import RayPool
from ray_subnets.distributed.visible import take_mark
from ray_subnets.population import Report, Worker
from ray_subnets.recipes import ChildResult, Epoch

# Long enough to be killed in the middle.
LONG = tiny("children.1.tune.epochs=60", "children.2.tune.epochs=40", "single=false")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with cluster.session(cpus=2):
        yield


@pytest.fixture(scope="module")
def long_serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_serial(LONG, RunFolder.create(tmp_path_factory.mktemp("runs") / "serial"))


def run_on_ray(settings: Config, folder: RunFolder, **how: Any) -> dict[str, Any]:
    data = driver.load_data(settings)
    cost = driver.prepare(settings, data, folder)
    return ray_run.run(settings, data, folder, cost=cost, **how)


def test_serial_and_ray_are_bitwise_equal(tmp_path: Path) -> None:
    """Children, outputs and every number in result.json."""
    serial = RunFolder.create(tmp_path / "serial")
    on_ray = RunFolder.create(tmp_path / "ray")
    assert numbers(run_serial(tiny(), serial)) == numbers(run_on_ray(tiny(), on_ray))
    for spec in tiny().specs():
        if spec.epochs:
            name = f"children/{spec.id}.safetensors"
            assert equal(serial.load_tensors(name), on_ray.load_tensors(name))
    for path in sorted((serial.root / "outputs").iterdir()):
        one, two = (folder.load_arrays(f"outputs/{path.name}") for folder in (serial, on_ray))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert serial.read("ensemble.json") == on_ray.read("ensemble.json")


def test_a_solved_sigma_is_the_same_on_ray(tmp_path: Path) -> None:
    """The search is a job like any other: same recipes, same children."""
    settings = tiny(
        *("children.0.sigma=null", "children.0.kl_target=0.02", "children.0.kl_draws=4"),
        *("children.1.count=2", "single=false"),
    )
    serial, on_ray = (RunFolder.create(tmp_path / name) for name in ("serial", "ray"))
    one, two = run_serial(settings, serial), run_on_ray(settings, on_ray)
    assert numbers(one) == numbers(two)
    assert one["trust_region"][0]["kl"] == pytest.approx(0.02, rel=0.02)
    assert serial.read("ensemble.json") == on_ray.read("ensemble.json")


def kill_worker_of(pool: RayPool, id: str) -> None:
    slot = next(slot for slot in pool._slots if slot.job is not None and slot.job.id == id)
    ray.kill(slot.handle)


@pytest.mark.parametrize("victim", ["parent", "sparse-000", "stochastic-001"])
def test_a_killed_actors_job_goes_on_elsewhere(
    victim: str, long_serial: dict[str, Any], tmp_path: Path
) -> None:
    """From the last epoch, to the same numbers; and the record says that it took two attempts."""
    folder = RunFolder.create(tmp_path / "run")
    data = driver.load_data(LONG)
    cost = driver.prepare(LONG, data, folder)
    notes: list[str] = []
    epochs: list[int] = []
    pool = RayPool(driver.task_of(LONG, folder), data, LONG.resources, jobs=9, notify=notes.append)

    def listen(report: Report) -> None:
        if report.id == victim and isinstance(report, Epoch):
            epochs.append(report.epoch)
            if len(epochs) == 1:
                kill_worker_of(pool, victim)

    try:
        record = driver.run(LONG, data, folder, pool, cost=cost, listen=listen)
    finally:
        pool.close()
    assert numbers(record) == numbers(long_serial)
    assert any(note.startswith(f"{victim}: its actor died (attempt 1)") for note in notes)
    (fault,) = record["faults"]
    assert (fault["id"], fault["what"], fault["attempt"]) == (victim, "its actor died", 1)
    assert fault["node"] == record["parent"]["node"] == record["children"][0]["node"]
    assert "handled on the way, no number changed by it: its actor died" in table.notes(record)
    tries = {child["id"]: child["attempts"] for child in record["children"]}
    tries["parent"] = record["parent"]["attempts"]
    assert tries.pop(victim) == 2
    assert set(tries.values()) == {1}
    assert epochs[-1] == next(job.epochs for job in driver.jobs(LONG) if job.id == victim)


def test_a_job_that_always_kills_its_actor_is_given_up(
    long_serial: dict[str, Any], tmp_path: Path
) -> None:
    """After the allowed retries the child is reported as failed, and the others are finished."""
    folder = RunFolder.create(tmp_path / "run")
    settings = LONG.model_copy(
        update={"resources": LONG.resources.model_copy(update={"retries": 1})}
    )
    data = driver.load_data(settings)
    cost = driver.prepare(settings, data, folder)
    pool = RayPool(driver.task_of(settings, folder), data, settings.resources, jobs=9)

    def listen(report: Report) -> None:
        if report.id == "sparse-000" and isinstance(report, Epoch) and report.epoch < 50:
            slot = next((s for s in pool._slots if s.job and s.job.id == "sparse-000"), None)
            if slot:
                ray.kill(slot.handle)

    try:
        record = driver.run(settings, data, folder, pool, cost=cost, listen=listen)
    finally:
        pool.close()
    lost = next(child for child in record["children"] if child["id"] == "sparse-000")
    assert lost["error"] == "its actor failed 2 times; the last one died"
    assert not lost["selected"]
    others = {c["id"]: c["fitness"] for c in record["children"] if c["id"] != "sparse-000"}
    assert others == {
        c["id"]: c["fitness"] for c in long_serial["children"] if c["id"] != "sparse-000"
    }


@pytest.mark.parametrize("deaths", [3, 9])
def test_actors_that_die_as_they_start(
    deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than a job may be retried: Ray may not yet know that their node is dead. But not
    for ever.
    """
    if deaths == 9:
        monkeypatch.setattr(pool_, "_UNNOTICED", 0.0)
    monkeypatch.setattr(pool_, "_PAUSE", 0.1)
    left = tmp_path / "deaths"
    left.mkdir()
    for number in range(deaths):
        (left / str(number)).touch()

    class Dying(Worker):
        def __init__(self, *arguments: Any) -> None:
            for one in left.iterdir():
                with suppress(FileNotFoundError):  # it was the other actor's
                    one.unlink()
                    os._exit(1)
            super().__init__(*arguments)

    folder = RunFolder.create(tmp_path / "run")
    settings = tiny("single=false", "resources.actors=1", "resources.retries=1")
    data = driver.load_data(settings)
    cost = driver.prepare(settings, data, folder)
    task, notes = driver.task_of(settings, folder), list[str]()
    pool = RayPool(task, data, settings.resources, jobs=9, notify=notes.append, worker=Dying)
    try:
        if deaths == 9:
            with pytest.raises(ValueError, match="actors die while they start: the last died"):
                driver.run(settings, data, folder, pool, cost=cost)
            assert len(list(left.iterdir())) == 9 - 2
            return
        record = driver.run(settings, data, folder, pool, cost=cost)
    finally:
        pool.close()
    assert notes.count("an actor died while it started; another takes its place") == deaths
    assert record["parent"]["attempts"] == 1
    assert not any(child["error"] for child in record["children"])


def test_a_dead_selection_actor_costs_nothing(tmp_path: Path) -> None:
    """The ranking is a function of the results, and these are in the folder.

    It dies at the first child's result, so that all others report to a dead actor.
    """
    expected = run_serial(tiny(), RunFolder.create(tmp_path / "serial"))
    notes: list[str] = []
    killed: list[bool] = []

    def listen(report: Report) -> None:
        if isinstance(report, ChildResult) and not killed:
            for actor in ray.util.list_named_actors():
                if actor.startswith("selection-"):
                    ray.kill(ray.get_actor(actor))
                    killed.append(True)

    folder = RunFolder.create(tmp_path / "ray")
    record = run_on_ray(tiny(), folder, listen=listen, notify=notes.append)
    assert killed == [True]
    assert numbers(record) == numbers(expected)
    assert any("selection actor died" in note for note in notes)


def test_the_parent_on_two_workers(tmp_path: Path) -> None:
    """Ray Train, same global batch: the same network up to the order of sums."""
    alone = run_serial(tiny("single=false"), RunFolder.create(tmp_path / "one"))
    settings = tiny("parent.workers=2", "single=false")
    folder = RunFolder.create(tmp_path / "two")
    seen: list[Report] = []
    record = run_on_ray(settings, folder, listen=seen.append)
    assert [r.epoch for r in seen if isinstance(r, Epoch) and r.id == "parent"] == [1, 2]
    assert record["parent"]["images"] == alone["parent"]["images"]
    one = RunFolder(tmp_path / "one").load_tensors("parent.safetensors")
    two = folder.load_tensors("parent.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-4)


def test_too_many_workers_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parent\.workers: 9 workers need 9 CPUs"):
        run_on_ray(tiny("parent.workers=9"), RunFolder.create(tmp_path / "run"))


def test_more_than_a_node_has_is_one_line() -> None:
    with pytest.raises(ValueError, match="an actor needs 99 CPUs and 0 GPUs"):
        Share.of(tiny("resources.cpus_per_actor=99").resources, growing=False)


def test_gpus_that_an_autoscaler_may_start_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cluster that could have GPUs asks for them, instead of training on the CPU."""
    assert Share.of(tiny().resources, growing=True).gpus == 0
    monkeypatch.setattr(
        ray._private.state.state, "get_max_resources_from_cluster_config", lambda: {"GPU": 8}
    )
    assert Share.of(tiny().resources, growing=True).gpus == 1
    assert Share.of(tiny("resources.gpus_per_actor=0").resources, growing=True).gpus == 0


def test_a_node_that_does_not_see_the_run_folder(tmp_path: Path) -> None:
    """One line, before anything is trained: here the driver's mark is taken away."""
    folder = RunFolder.create(tmp_path / "run")
    data = driver.load_data(tiny())
    cost = driver.prepare(tiny(), data, folder)
    pool = RayPool(driver.task_of(tiny(), folder), data, tiny().resources, jobs=9)
    take_mark(str(folder))
    try:
        with pytest.raises(ValueError, match=r"--out: node \S+ does not see the run folder /"):
            driver.run(tiny(), data, folder, pool, cost=cost)
    finally:
        pool.close()
    assert not list(folder.root.glob("results/*"))
    assert not list(folder.root.glob(".driver-*"))


def test_a_diverging_parent_is_the_users_error(tmp_path: Path) -> None:
    settings = tiny("parent.lr=1e30", "single=false")
    with pytest.raises(ValueError, match="lower its lr"):
        run_on_ray(settings, RunFolder.create(tmp_path / "run"))


def test_data_is_read_where_it_lies() -> None:
    """From the object store without a copy: the arrays share memory and cannot be written."""
    data = driver.load_data(tiny())
    flat, rest = pack_data(data)
    stored = ray.get(ray.put(flat))
    again = unpack_data(stored, rest)
    assert not stored.vector.flags.writeable
    start = stored.vector.ctypes.data
    assert start <= again.train.images.data_ptr() < start + stored.vector.nbytes
    for name in ("train", "validation", "test"):
        assert equal(vars(getattr(data, name)), vars(getattr(again, name)))
    assert again.preprocess == data.preprocess


def test_the_script_joins_no_stale_ray(command: Command, tmp_path: Path) -> None:
    """launch.py as a plain script, as `ray submit` runs it, beside a Ray that is already up."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    script = Path(driver.__file__).parent / "launch.py"
    copied = tmp_path / "launch.py"  # ray submit copies this one file
    copied.write_bytes(script.read_bytes())
    before = {node["NodeID"] for node in ray.nodes()}
    for path, out in ((script, "a"), (copied, "b")):
        answer = subprocess.run(
            [sys.executable, str(path), "run", str(config), "--out", str(tmp_path / out)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
        assert answer.returncode == 0, answer.stderr
        assert "selected ensemble" in answer.stdout
        assert (tmp_path / out / "report.html").is_file()
    assert {node["NodeID"] for node in ray.nodes()} == before
    records = [RunFolder(tmp_path / out).read_json("result.json") for out in "ab"]
    serial = command("run", str(config), "--out", str(tmp_path / "c"), "--serial", cwd=tmp_path)
    assert serial.returncode == 0, serial.stderr
    records.append(RunFolder(tmp_path / "c").read_json("result.json"))
    assert numbers(records[0]) == numbers(records[1]) == numbers(records[2])


def test_an_address_where_nothing_listens(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    answer = command("run", str(config), "--address", "127.0.0.1:1", cwd=tmp_path)
    assert answer.returncode == 2
    assert "--address: no Ray cluster at 127.0.0.1:1" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()  # so that the corrected command is not refused


def test_heads_that_only_training_has_are_found(tmp_path: Path) -> None:
    """Several workers would wait for their gradients for ever."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.head = nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.body(x.flatten(1)).relu()
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    settings = tiny()
    worker = ParentWorker(settings.task(str(tmp_path)), driver.load_data(settings))
    assert worker._has_unused(Auxiliary())
    assert not worker._has_unused(worker.build(0))
