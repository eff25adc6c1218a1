"""Take turns, take medians, print ratios: what all benchmarks share."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

T = TypeVar("T")
Measure = Callable[[], float]
"""one measurement, in seconds"""


def timed(work: Callable[[], object]) -> Measure:
    """A measurement of one call of `work`."""

    def measure() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return measure


def medians(*alternatives: Measure, rounds: int) -> list[float]:
    """Median seconds of each. They take turns inside a round, so that a machine that slows down
    slows all of them."""
    times: list[list[float]] = [[] for _ in alternatives]
    for measure in alternatives:
        measure()  # first calls allocate
    for _ in range(rounds):
        for measure, found in zip(alternatives, times, strict=True):
            found.append(measure())
    return [statistics.median(found) for found in times]


def apart(make: Callable[[], Callable[[], T]]) -> Callable[[], T]:
    """`make()` in a process of its own, for settings that a process cannot take back.

    Args:
        make: of a module, or a `partial` of one, so that it can be sent.

    Returns:
        What asks it once more, and waits for the answer.
    """
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(theirs, make, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()

    def ask() -> T:
        mine.send(None)
        answer: T = mine.recv()
        return answer

    return ask


def _answer(asked: Connection, make: Callable[[], Callable[[], T]], threads: int) -> None:
    torch.set_num_threads(threads)
    measure = make()
    with suppress(EOFError):  # nobody will ask again
        while True:
            asked.recv()
            asked.send(measure())


class Ratios:
    """A table of ratios, printed as a whole."""

    def __init__(self, title: str) -> None:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        self._table = Table(
            title=f"{title}; {torch.get_num_threads()} threads, torch {torch.__version__}, {where}"
        )
        for heading in ("what", "alternative", "ms", "ms alternative", "ratio", "wanted"):
            left = heading in ("what", "alternative")
            self._table.add_column(heading, justify="left" if left else "right")

    def add(self, what: str, other: str, times: Sequence[float], wanted: str = "") -> None:
        """`times`: seconds of ours and of the alternative."""
        ours, theirs = times
        self._table.add_row(
            what,
            other,
            f"{1000 * ours:.1f}",
            f"{1000 * theirs:.1f}",
            f"{ours / theirs:.2f}x",
            wanted,
        )

    def show(self) -> None:
        Console(width=120).print(self._table)
