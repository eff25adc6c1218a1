"""What processes take, from Linux's /proc: who descends from whom, memory, processor time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_PROC = Path("/proc")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (the second may hold spaces); empty if gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """`pid` and all that descends from it and is alive."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and stat[0] != "Z":
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def command_line(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def cpu_seconds(pid: int) -> float:
    """Of `pid`, its family, and those of them that ended and were waited for."""
    ticks = 0
    for one in family(pid):
        ticks += sum(int(value) for value in _stat(one)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, int]:
    """Bytes: `pss` (shared pages divided among those who share them), `private`, `shared`, `rss`.

    Zeros if the process is gone.
    """
    values: dict[str, int] = {}
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        lines = []
    for line in lines:
        name, _, rest = line.partition(":")
        values[name] = 1024 * int(rest.split()[0])
    return {
        "pss": values.get("Pss", 0),
        "private": values.get("Private_Clean", 0) + values.get("Private_Dirty", 0),
        "shared": values.get("Shared_Clean", 0) + values.get("Shared_Dirty", 0),
        "rss": values.get("Rss", 0),
    }


class Sampler:
    """Calls `look` every `seconds` in a thread, for the length of a `with` block."""

    def __init__(self, look: Callable[[], None], seconds: float) -> None:
        self._look, self._seconds = look, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self._look()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
