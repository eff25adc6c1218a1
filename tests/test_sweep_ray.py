"""Sweeps on Ray Tune: the numbers of the loop in one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search.variant_generator import generate_variants
from test_sweep import FAILING, NOISE, TINY, numbers, parse, swept

from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Named
from ray_subnets.distributed import cluster, sweepgauges, sweeps
from ray_subnets.sweeps.sweepmonitor import Monitor


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with cluster.session(cpus=2):
        yield


def on_tune(folder: Path, *overrides: str, text: str = NOISE) -> dict[str, Any]:
    settings = parse(*overrides, text=text)
    target = RunFolder.create(folder)
    target.write("config.yaml", settings.to_yaml().encode())
    return sweeps.run(settings, target, Monitor(target, settings))


def plain(record: dict[str, Any]) -> Any:
    return numbers(json.loads(json.dumps(record)))


def test_tune_gives_the_numbers_of_the_loop(session: None, tmp_path: Path) -> None:
    """Also for a cell that fails; it does not end the sweep, and its actor goes on."""
    text = TINY.replace("keys: {children.0.sigma: [0.02, 0.2], density: [0.3, 1.0]}", FAILING)
    text = text.replace("  - {method: noisy, count: 4, sigma: 0.05}\n", "")
    settings = ("select.count=2",)
    here = swept(tmp_path / "here", *settings, text=text)
    there = on_tune(tmp_path / "there", *settings, text=text)
    assert plain(here) == plain(there)
    assert [trial["status"] for trial in there["trials"]] == ["done", "done", "failed", "failed"]
    assert "every child failed" in there["trials"][2]["error"]
    assert there["chosen"] == here["chosen"] is not None
    assert len(list((tmp_path / "there").glob("parent-*.safetensors"))) == 2
    workers = {trial["worker"] for trial in there["trials"]}
    assert all(worker for worker in workers)
    events = list((tmp_path / "there/tune").rglob("events.out.tfevents*"))
    assert len(events) == 4  # for TensorBoard


def test_names_of_searchers_and_schedulers() -> None:
    with pytest.raises(ValueError, match=r"'tpe' is none of Ray Tune's searchers; known: grid"):
        sweeps.searcher(Named(name="tpe"))
    with pytest.raises(ValueError, match=r"'best' is none of Ray Tune's schedulers; known: asha"):
        sweeps.scheduler(Named(name="best"), 3)
    with pytest.raises(ValueError, match=r"scheduler\.grace: asha has no such option; it has"):
        sweeps.scheduler(Named(name="asha", grace=1), 3)
    made = sweeps.scheduler(Named(name="asha", grace_period=1, reduction_factor=2), 8)
    assert made._max_t == 8
    assert sweeps.searcher(Named(name="grid")) is None


def test_a_searcher_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optuna", "ray.tune.search.optuna", "ray.tune.search.optuna.optuna_search"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"sweep\.search: optuna needs a package .* pip install"):
        sweeps.searcher(Named(name="optuna"))


def test_gauges_have_the_names_that_are_exported() -> None:
    assert all(name.startswith("ray_subnets_sweep_") for name in sweepgauges.NAMES)


@pytest.mark.cluster
def test_a_random_search_with_early_stopping(session: None, tmp_path: Path) -> None:
    """Ranges are drawn from, parents shared; ASHA stops cells before their last seed."""
    text = NOISE.replace("[0.02, 0.2]", "{low: 0.01, high: 1.0, log: true}")
    record = on_tune(
        tmp_path / "sweep",
        "sweep.search=random",
        "sweep.samples=8",
        "sweep.seeds=[0, 1, 2, 3]",
        "sweep.scheduler={name: asha, reduction_factor: 2}",
        text=text,
    )
    assert len(record["trials"]) == 8
    assert len({trial["values"]["children.0.sigma"] for trial in record["trials"]}) == 8
    status = [trial["status"] for trial in record["trials"]]
    assert "stopped" in status
    assert "done" in status
    assert len(list((tmp_path / "sweep").glob("parent-*.safetensors"))) == 4
    assert record["maps"] == []


@pytest.mark.cluster
def test_optuna(session: None, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    text = NOISE.replace("[0.02, 0.2]", "{low: 0.01, high: 1.0, log: true}")
    record = on_tune(tmp_path / "sweep", "sweep.search=optuna", "sweep.samples=4", text=text)
    assert [trial["status"] for trial in record["trials"]] == ["done"] * 4


@pytest.mark.cluster
def test_two_sweeps_on_one_ray(session: None, tmp_path: Path) -> None:
    """Side by side in one driver, each gives what it gives alone."""
    found: dict[str, dict[str, Any]] = {}
    overrides = {"one": ("parent.lr=0.05",), "two": ("parent.lr=0.02", "resources.actors=1")}

    def work(name: str) -> None:
        found[name] = on_tune(tmp_path / name, *overrides[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in overrides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, settings in overrides.items():
        assert plain(found[name]) == plain(swept(tmp_path / f"{name}-alone", *settings))


def test_cells_whose_values_are_lists_go_on() -> None:
    cells = [
        {"mixture": [0.1, 0.2], "tune": {"lr": 0.1}, "sigma": None},
        {"mixture": [0.1, 0.3], "tune": {"lr": 0.2}, "sigma": 0.5},
    ]
    variants = generate_variants(sweeps.some(cells))
    assert [sweeps.cell_of(config) for _, config in variants] == cells
    assert sweeps.cell_of({"sigma": 0.5}) == {"sigma": 0.5}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_grid_goes_on_elsewhere_and_reads_no_pickle(session: None, tmp_path: Path) -> None:
    """Of what is left of it; a cell that was lost with its process is done, one that failed not."""
    first = tmp_path / "first"
    whole = on_tune(first)
    for path in sorted((first / "trials").glob("*.json"))[:2]:
        path.unlink()
    moved = first.rename(tmp_path / "moved")
    (moved / "tune").mkdir(exist_ok=True)
    (moved / "tune" / "tuner.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    settings = parse(text=(moved / "config.yaml").read_text())
    monitor = Monitor(RunFolder(moved), settings)
    assert 1 <= len(monitor.left) <= 2
    record = sweeps.run(settings, RunFolder(moved), monitor)
    assert plain(record) == plain(whole)
    assert not (tmp_path / "evil").exists()
    found = json.loads((moved / "sweep.json").read_text())
    found["trials"][0] |= {"status": "failed", "error": "its process died", "lost": True}
    found["trials"][1] |= {"status": "failed", "error": "sigma: too large"}
    for trial in found["trials"][:2]:
        for path in (moved / "trials").glob("*.json"):
            if json.loads(path.read_text()).get("values") == trial["values"]:
                path.unlink()
    (moved / "sweep.json").write_text(json.dumps(found))
    again = Monitor(RunFolder(moved), settings)
    assert again.left == [found["trials"][0]["values"]]


@pytest.mark.cluster
def test_a_killed_sweep_goes_on_without_repeating(tmp_path: Path) -> None:
    """The driver is killed in the middle; finished trials keep their files, untouched."""
    (tmp_path / "tiny.yaml").write_text(
        NOISE.replace("[0.02, 0.2]", "[0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5]")
    )
    line = [sys.executable, "-m", "ray_subnets.launch", "sweep"]
    process = subprocess.Popen(
        [*line, "tiny.yaml"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder = tmp_path / "runs/tiny_sweep"
    until = time.monotonic() + 300
    while len(list(folder.glob("trials/*.json"))) < 8:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # its trials may still finish for a moment
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*.json")}
    assert 8 <= len(before) < 32
    done = subprocess.run([*line, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*.json")}
    assert len(after) == 32
    assert {path: after[path] for path in before} == before
    record = json.loads((folder / "sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["done"] * 16
    settings = (tmp_path / "tiny.yaml").read_text()
    assert plain(record) == plain(swept(tmp_path / "here", text=settings))
