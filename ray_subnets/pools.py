"""Where jobs are done: what every pool can do, and the one in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from ray_subnets.flat import Flat
from ray_subnets.population import Report, Worker
from ray_subnets.recipes import Fault, Job


class Pool(Protocol):
    """Where jobs are done. A driver submits and reads reports; it does not see who works."""

    def submit(self, job: Job) -> None:
        """Queue a job. Children need the parent: see `share`."""

    def share(self, parent: Flat) -> None:
        """Make the parent's weights available to jobs submitted from now on."""

    def reports(self) -> Iterator[Report]:
        """Reports as they come, until every job submitted (also meanwhile) has a result."""

    @property
    def faults(self) -> Sequence[Fault]:
        """What went wrong and was handled, in the order of time."""


class SerialPool:
    """Every job in this process, in the order submitted: the debugger, the notebook, the oracle."""

    faults: Sequence[Fault] = ()

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def share(self, parent: Flat) -> None:
        self._worker.load_parent(parent)

    def reports(self) -> Iterator[Report]:
        while self._queue:
            yield from self._worker.run(self._queue.popleft())
