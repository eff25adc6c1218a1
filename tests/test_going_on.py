"""Folders that somebody works in, and going on with what was changed meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from test_sweep import swept
from tiny import run_serial, tiny

import ray_subnets as rs
from ray_subnets import checkpoints, datasets
from ray_subnets.checkpoints import RunFolder
from ray_subnets.stored import _changed
from ray_subnets.sweeps.sweepmonitor import Monitor, run_here

from test_strangers import TUNE, X, Y, net  # isort: skip


@pytest.fixture
def busy(tmp_path: Path) -> RunFolder:
    """A finished run."""
    folder = RunFolder.create(tmp_path / "run")
    run_serial(tiny("single=false"), folder)
    return folder


def test_nobody_overwrites_a_folder_that_is_worked_in(busy: RunFolder) -> None:
    kept = sorted(path.name for path in busy.root.rglob("*"))
    with busy.alone():
        with pytest.raises(ValueError, match="another process works in"):
            RunFolder.create(str(busy), overwrite=True)
        assert sorted(p.name for p in busy.root.rglob("*") if p.name != ".lock") == kept
    RunFolder.create(str(busy), overwrite=True)
    assert not list(busy.root.iterdir())


def test_grow_changes_nothing_in_a_folder_that_is_worked_in(
    busy: RunFolder, command: Command
) -> None:
    config = busy.read("config.yaml")
    with busy.alone():
        done = command("grow", str(busy), "--to", "8", "--group", "noisy", "--serial")
    assert done.returncode == 2
    assert "another process works in" in done.stderr
    assert busy.read("config.yaml") == config


def test_a_call_from_python_waits_for_nobody_either(tmp_path: Path) -> None:
    how = {"method": rs.Noisy(sigma=0.1), "children": 2, "progress": False}
    rs.ensemble(net(), (X, Y), (X, Y), folder=tmp_path / "a", **how)
    with (
        RunFolder(tmp_path / "a").alone(),
        pytest.raises(ValueError, match="another process works in"),
    ):
        rs.ensemble(net(), (X, Y), (X, Y), folder=tmp_path / "a", **how)


def test_a_lock_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opens the file, the other that had it removes it: the first must not hold nothing."""
    folder = RunFolder.create(tmp_path / "run")
    flock, times = checkpoints.fcntl.flock, []

    def removed_before(file: object, how: int) -> None:
        if not times:
            (tmp_path / "run/.lock").unlink()
        times.append(how)
        flock(file, how)

    monkeypatch.setattr(checkpoints.fcntl, "flock", removed_before)
    with folder.alone():
        assert len(times) == 2
        monkeypatch.setattr(checkpoints.fcntl, "flock", flock)
        with pytest.raises(ValueError, match="another process"), folder.alone():
            pass


def test_settings_that_were_edited_are_refused(busy: RunFolder) -> None:
    edited = tiny("single=false", "children.0.sigma=0.4")
    told = r"noisy-000 was made with sigma 0\.\d+, not 0\.4; its settings were edited"
    with pytest.raises(ValueError, match=told):
        run_serial(edited, busy)
    run_serial(tiny("single=false"), busy)


def test_a_sweep_whose_data_changed_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = swept(tmp_path / "a")
    folder, settings = RunFolder(tmp_path / "a"), None
    next((tmp_path / "a/trials").glob("*.json")).unlink()
    from test_sweep import NOISE, parse

    settings = parse(text=NOISE)
    load = datasets.load

    def flipped(*args: object, **how: object) -> object:
        data = load(*args, **how)  # type: ignore[arg-type]
        data.train.labels.copy_(9 - data.train.labels)
        return data

    monkeypatch.setattr(datasets, "load", flipped)
    with pytest.raises(ValueError, match=r"data: digits is not what .* was made with"):
        run_here(settings, folder, Monitor(folder, settings))
    monkeypatch.undo()
    again = run_here(settings, folder, Monitor(folder, settings))
    assert [t["values"] for t in again["trials"]] == [t["values"] for t in whole["trials"]]


def test_times_of_a_finished_sweep_stay(tmp_path: Path) -> None:
    first = swept(tmp_path / "a")
    from test_sweep import NOISE, parse

    settings, folder = parse(text=NOISE), RunFolder(tmp_path / "a")
    again = run_here(settings, folder, Monitor(folder, settings))
    assert again["seconds"] == json.loads(json.dumps(first["seconds"]))


def test_weights_are_not_swept() -> None:
    from test_sweep import TINY, parse

    text = TINY[: TINY.index("sweep:")] + "sweep: {keys: {weights: [a.pt, b.pt]}}\n"
    with pytest.raises(ValueError, match=r"sweep\.keys\.weights: all cells begin with the same"):
        parse(text=text).settings({"weights": "a.pt"})


def test_two_calls_at_once_on_one_folder(tmp_path: Path) -> None:
    """One of them works, the other is told; nothing is mixed."""
    told: list[str] = []

    def work() -> None:
        try:
            rs.ensemble(
                *(net(), (X, Y), (X, Y)),
                method=rs.Sparse(sparsity=0.5),
                children=2,
                tune=TUNE,
                progress=False,
                folder=tmp_path / "a",
            )
        except ValueError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) <= 1
    found = rs.load(tmp_path / "a", model=net())
    assert np.isfinite(found(X).numpy()).all()


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": 1, "old": 2}, {"a": 1, "new": 3}, None),  # of another version of this program
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "new": 2}]}, None),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, "b 1, not 2"),
        ({"a": [1]}, {"a": [1, 2]}, "a [1], not [1, 2]"),
    ],
)
def test_what_counts_as_another_setting(before: Any, now: Any, told: str | None) -> None:
    assert _changed(before, now) == told
