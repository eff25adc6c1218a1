"""Storage that fails: named, no more lost than must be, and `resume` ends with the same numbers."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import numbers, run_serial, tiny

from ray_subnets import report, storage
from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.events import Events
from ray_subnets.recipes import Epoch, Note, Result

Finished = tuple[RunFolder, dict[str, Any]]
Refuse = Callable[[str], bool]


def slow(value: object) -> Any:
    """One of several alike: with `make test-cluster` only."""
    return pytest.param(value, marks=pytest.mark.cluster)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "tiny")
    return folder, run_serial(tiny(), folder)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def full(patch: pytest.MonkeyPatch, refuse: Refuse, code: int = errno.ENOSPC) -> None:
    """The disk has no room for files whose name `refuse` says yes to."""
    write = storage.LocalPlace.write

    def refusing(
        self: storage.LocalPlace, name: str, content: bytes, *, lasting: bool = True
    ) -> None:
        if refuse(name):
            raise OSError(code, os.strerror(code))
        write(self, name, content, lasting=lasting)

    patch.setattr(storage.LocalPlace, "write", refusing)


def test_a_checkpoint_without_room_costs_nothing(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, and it is said once for each network."""
    full(monkeypatch, lambda name: name.startswith("checkpoints/"))
    seen: list[Any] = []
    settings = tiny("parent.epochs=4")
    record = run_serial(settings, folder, listen=seen.append)
    notes = [report for report in seen if isinstance(report, Note)]
    tuned = {spec.id for spec in settings.specs() if spec.epochs}
    assert [note.id for note in notes[:2]] == ["parent", "single"]
    assert {note.id for note in notes} == {"parent", "single"} | tuned
    assert len(notes) == 2 + len(tuned)
    assert "checkpoints/parent.safetensors: cannot be written (the disk is full)" in notes[0].line
    assert record["parent"]["troubles"] == [notes[0].line]
    assert all(child["error"] is None for child in record["children"])


@pytest.mark.parametrize("kind", ["children", slow("outputs"), slow("results")])
def test_a_child_without_room_is_left_out_and_made_by_resume(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as patch:
        full(patch, lambda name: name.startswith(f"{kind}/sparse-001."))
        record = run_serial(tiny(), folder)
    failed = {child["id"]: child["error"] for child in record["children"] if child["error"]}
    assert set(failed) == {"sparse-001"}
    line = failed["sparse-001"]
    assert f"{folder}/{kind}/sparse-001." in line
    assert "the disk is full" in line
    assert f"'ray-subnets resume {folder}'" in line
    assert "sparse-001" not in record["ensemble"]["members"]
    assert not folder.exists("results/sparse-001.json")
    seen: list[Any] = []
    assert numbers(run_serial(tiny(), folder, listen=seen.append)) == numbers(finished[1])
    # It went on from its last checkpoint, and nothing else was done again.
    assert [(r.id, r.epoch) for r in seen if isinstance(r, Epoch)] == [("sparse-001", 2)]


@pytest.mark.cluster
def test_no_time_is_spent_on_what_cannot_be_written(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one child the worker looks before it trains the next one; all are made by resume."""
    ids = [spec.id for spec in tiny().specs() if spec.epochs]
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        full(patch, lambda name: any(id in name for id in ids) and "checkpoints" not in name)
        record = run_serial(tiny(), folder, listen=seen.append)
    assert {child["id"] for child in record["children"] if child["error"]} == set(ids)
    assert {r.id for r in seen if isinstance(r, Epoch)} & set(ids) == {"sparse-000"}
    assert numbers(run_serial(tiny(), folder)) == numbers(finished[1])


@pytest.mark.cluster
def test_no_room_for_the_parent_ends_the_run(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full(patch, lambda name: name == "parent.safetensors", errno.EROFS)
        with pytest.raises(WriteFailed, match=r"parent\.safetensors: .*read-only.*resume") as line:
            run_serial(tiny(), folder)
        assert "\n" not in str(line.value)
    assert folder.exists("checkpoints/parent.safetensors")
    assert numbers(run_serial(tiny(), folder)) == numbers(finished[1])


@pytest.mark.parametrize("name", [slow("ensemble.json"), "result.json"])
def test_no_room_at_the_end_loses_nothing(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        full(patch, lambda other: other == name)
        with pytest.raises(WriteFailed, match=rf"{name}: cannot be written .the disk is full"):
            run_serial(tiny(), folder)
    seen: list[Any] = []
    assert numbers(run_serial(tiny(), folder, listen=seen.append)) == numbers(finished[1])
    assert not [report for report in seen if isinstance(report, Epoch)]


@pytest.mark.cluster
def test_no_room_for_events_is_said_once(
    folder: RunFolder, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: storage.LocalPlace, name: str, content: bytes) -> bool:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(storage.LocalPlace, "append", refuse)
    said: list[str] = []
    events = Events(folder, said.append)
    assert numbers(run_serial(tiny(), folder, listen=events)) == numbers(finished[1])
    events.close()
    assert len(said) == 1
    assert "no TensorBoard events from here on" in said[0]
    assert "the disk is full" in said[0]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 640 KiB."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_disk_that_is_really_full(small: Path, finished: Finished) -> None:
    """It fills up in the middle of a run and has room again for the record at its end."""
    folder = RunFolder.create(small / "run")
    ballast = small / "ballast"

    def fill(report: object) -> None:
        if isinstance(report, Result) and report.id == "sparse-000":
            left = os.statvfs(small)
            ballast.write_bytes(bytes(max(0, left.f_bavail * left.f_frsize - 16384)))
        if isinstance(report, Result) and report.id == "stochastic-001":
            ballast.unlink()

    record = run_serial(tiny(), folder, listen=fill)
    failed = [child for child in record["children"] if child["error"]]
    assert {child["id"] for child in failed} == {"sparse-001", "stochastic-000", "stochastic-001"}
    assert all("the disk is full" in child["error"] for child in failed)
    assert not [path for path in (small / "run").rglob(".*") if path.is_file()]
    assert numbers(run_serial(tiny(), folder)) == numbers(finished[1])


@pytest.mark.cluster
def test_a_mount_that_goes_away(small: Path, finished: Finished, tmp_path: Path) -> None:
    """Nothing is written under the mount point, where nobody would find it."""
    folder = RunFolder.create(small / "run")

    def unmount(report: object) -> None:
        if isinstance(report, Epoch) and (report.id, report.epoch) == ("sparse-000", 1):
            shutil.copytree(small / "run", tmp_path / "saved")
            subprocess.run(["umount", "-l", str(small)], check=True)

    with pytest.raises(ValueError, match=r"outputs/.*(cannot be read|cannot be written)|failed"):
        run_serial(tiny(), folder, listen=unmount)
    assert not list(small.iterdir())
    # Mounted again, it goes on.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    shutil.copytree(tmp_path / "saved", small / "run")
    assert numbers(run_serial(tiny(), folder)) == numbers(finished[1])


# --- files that are not what was written --------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit, in the middle of a number."""
    at = len(content) * 2 // 3
    while chr(content[at]).isspace():
        at += 1
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [slow(cut), flip, slow(lambda content: b"")])
@pytest.mark.parametrize(
    "name",
    [
        "results/sparse-000.json",
        slow("results/parent.json"),
        "children/sparse-000.safetensors",
        slow("outputs/sparse-000.npz"),
    ],
)
def test_a_damaged_result_is_said_and_made_again(
    finished: Finished, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(finished[0].root, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.write(name, damage(folder.read(name)))
    seen: list[Any] = []
    assert numbers(run_serial(tiny(), folder, listen=seen.append)) == numbers(finished[1])
    (note,) = [report for report in seen if isinstance(report, Note)]
    id = "parent" if "parent" in name else "sparse-000"
    assert note.id == id
    assert note.line.startswith(f"{folder}/{name}: ")
    assert note.line.endswith(f"{id} is done again")
    assert {report.id for report in seen if isinstance(report, Epoch)} == {id}
    assert folder.read(name)[:4] == finished[0].read(name)[:4]


@pytest.mark.parametrize("damage", [slow(cut), flip, slow(lambda content: b"")])
def test_a_damaged_checkpoint_is_said_and_not_used(
    finished: Finished, folder: RunFolder, damage: Callable[[bytes], bytes]
) -> None:
    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        if isinstance(report, Epoch) and (report.id, report.epoch) == ("sparse-000", 1):
            raise Stop

    with pytest.raises(Stop):
        run_serial(tiny(), folder, listen=stop)
    name = "checkpoints/sparse-000.safetensors"
    folder.write(name, damage(folder.read(name)))
    seen: list[Any] = []
    record = run_serial(tiny(), folder, listen=seen.append)
    assert numbers(record) == numbers(finished[1])
    (note,) = [report for report in seen if isinstance(report, Note)]
    assert note.line.startswith(f"{folder}/{name}: ")
    assert note.line.endswith("sparse-000 starts again")
    troubles = {child["id"]: child["troubles"] for child in record["children"]}
    assert troubles["sparse-000"] == [note.line]
    assert [r.epoch for r in seen if isinstance(r, Epoch) and r.id == "sparse-000"] == [1, 2]


def test_a_read_only_folder_is_one_line(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, lambda name: True, errno.EROFS)
    with pytest.raises(WriteFailed, match=r"report\.html: cannot be written \(it is read-only\)"):
        report.write(finished[0])
