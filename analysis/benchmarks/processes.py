"""What processes take: who descends from whom, memory, processor time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psutil


def family(pid: int) -> list[psutil.Process]:
    """`pid` and all that descends from it and is alive."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def cpu_seconds(pid: int) -> float:
    """Of `pid`, its family, and those of them that ended and were waited for."""
    total = 0.0
    for process in family(pid):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def memory(pid: int) -> dict[str, int]:
    """Bytes: `pss` (shared pages divided among those who share them), `private`, `shared`.

    Zeros if the process is gone.
    """
    try:
        found = psutil.Process(pid).memory_full_info()
    except psutil.Error:
        return {"pss": 0, "private": 0, "shared": 0}
    return {"pss": found.pss, "private": found.uss, "shared": found.rss - found.uss}


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
