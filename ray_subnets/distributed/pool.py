"""A pool of child actors: the Ray counterpart of `population.SerialPool`."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from ray_subnets.config import ResourcesSection
from ray_subnets.data import Data
from ray_subnets.distributed.children import ChildActor, pack_data
from ray_subnets.flat import Flat
from ray_subnets.population import Report, Task
from ray_subnets.recipes import ChildResult, Fit, Job, Result
from ray_subnets.stored import kind_of

_WAIT = 1.0  # seconds between looks at what is not a report
_POLL = 0.2  # the same while the parent trains elsewhere
_PATIENCE = 60.0  # seconds without any actor before saying so

ParentTrainer = Callable[[Fit], Iterator[Report | None]]


@dataclass(frozen=True)
class Share:
    """What one actor owns."""

    cpus: float
    gpus: float

    @staticmethod
    def of(resources: ResourcesSection, *, growing: bool) -> Share:
        """From the settings, with what the cluster has for what they leave open.

        Raises:
            ValueError: no node can hold even one actor, and the cluster is not `growing` (an
                autoscaler may still start such a node).
        """
        gpus = resources.gpus_per_actor
        cluster = ray.cluster_resources()
        if gpus is None:
            gpus = 1.0 if cluster.get("GPU", 0) else 0.0
        share = Share(resources.cpus_per_actor, gpus)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = any(
            node.get("CPU", 0) >= share.cpus and node.get("GPU", 0) >= share.gpus for node in nodes
        )
        if not fits and not growing:
            raise ValueError(
                f"resources: an actor needs {share.cpus:g} CPUs and {share.gpus:g} GPUs, and no "
                f"node has them; the cluster has {cluster.get('CPU', 0):g} CPUs and "
                f"{cluster.get('GPU', 0):g} GPUs in all"
            )
        return share

    def fit(self) -> int:
        """How many such actors the whole cluster holds now."""
        count = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                rooms = [has.get("CPU", 0) / self.cpus]
                if self.gpus:
                    rooms.append(has.get("GPU", 0) / self.gpus)
                count += math.floor(min(rooms) + 1e-9)
        return max(1, count)


@dataclass
class _Slot:
    """One actor and what it is doing."""

    handle: Any
    dedicated: bool = False
    """for the parent only: it has a whole GPU where children share one"""
    setup: Any = None
    """reference that resolves when the actor is ready; None afterwards"""
    job: Job | None = None
    stream: Any = None
    has_parent: bool = False


class RayPool:
    """Jobs on Ray actors, each on its own device, the next job as soon as one is done.

    An actor that dies is replaced and its job given to another, which goes on from the job's last
    checkpoint, up to `retries` times. Actors start at once, so that they are warm when the parent
    is done.

    Args:
        jobs: how many jobs there will be; there is no point in more actors.
        selection: actor that hears of finished children.
        growing: the cluster may start nodes on demand, so wait for what it does not have yet.
        parent_trainer: does the parent's job elsewhere (`distributed/parent.py`); called with the
            job, it yields reports, and None while there is nothing new.
        parent_devices: devices that it takes; so many fewer actors until the parent is done.
        notify: called with a line of text when something happened that a person should know.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        resources: ResourcesSection,
        *,
        jobs: int,
        selection: Any = None,
        growing: bool = False,
        parent_trainer: ParentTrainer | None = None,
        parent_devices: int = 0,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._task, self._resources = task, resources
        self._share = Share.of(resources, growing=growing)
        flat, self.rest = pack_data(data)
        self.data = ray.put(flat)
        self._selection, self._notify = selection, notify
        self._parent_trainer = parent_trainer
        self._parent: Any = None
        self._queue: deque[Job] = deque()
        self._attempts: dict[str, int] = {}
        self._slots: list[_Slot] = []
        self._died_idle = 0
        self.size = min(resources.actors or self._share.fit(), max(1, jobs))
        self._dedicate = 0 < self._share.gpus < 1 and parent_trainer is None
        if self._dedicate:
            self._slots.append(self._start(gpus=1.0, dedicated=True))
        self._grow(self.size - parent_devices)

    def _grow(self, size: int) -> None:
        """Start actors until there are `size`."""
        have = sum(not slot.dedicated for slot in self._slots)
        self._slots += [self._start(gpus=self._share.gpus) for _ in range(size - have)]

    def _start(self, *, gpus: float, dedicated: bool = False) -> _Slot:
        actor = ray.remote(ChildActor).options(
            num_cpus=self._share.cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        handle: Any = actor.remote(self._selection)
        setup = handle.setup.remote(self._task, [self.data], self.rest, gpus)
        return _Slot(handle, dedicated, setup)

    # --- population.Pool ---

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def share(self, parent: Flat) -> None:
        self._parent = ray.put(parent)
        for slot in self._slots:
            slot.has_parent = False

    def reports(self) -> Iterator[Report]:
        trainer = self._start_parent_trainer()
        alone_since = time.monotonic()
        while trainer or self._queue or any(slot.job for slot in self._slots):
            if trainer:
                report = next(trainer)
                if report is not None:
                    yield report
                if isinstance(report, Result):
                    trainer = None
                    self._grow(self.size)
            self._assign()
            waiting = [slot.setup or slot.stream for slot in self._slots if slot.setup or slot.job]
            ready: list[Any] = []
            if waiting:
                ready, _ = ray.wait(waiting, num_returns=1, timeout=_POLL if trainer else _WAIT)
            else:
                time.sleep(_POLL)
            for slot in list(self._slots):
                if (slot.setup or slot.stream) in ready:
                    yield from self._read(slot)
            if ready or trainer or any(slot.job for slot in self._slots):
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > _PATIENCE:
                alone_since = time.monotonic()
                self._notify(
                    f"waiting for the cluster to give an actor {self._share.cpus:g} CPUs and "
                    f"{self._share.gpus:g} GPUs"
                )

    def _start_parent_trainer(self) -> Iterator[Report | None] | None:
        """Take the parent's job off the queue if it is done elsewhere."""
        if self._parent_trainer is None:
            return None
        for job in self._queue:
            if isinstance(job, Fit) and job.id == "parent":
                self._queue.remove(job)
                return self._parent_trainer(job)
        self._grow(self.size)  # the parent was done before
        return None

    # --- one step ---

    def _assign(self) -> None:
        """Give the next jobs to actors that are free."""
        for slot in self._slots:
            if slot.setup is not None or slot.job is not None or not self._queue:
                continue
            parent_next = self._queue[0].id == "parent"
            if slot.dedicated != (self._dedicate and parent_next):
                continue
            job = self._queue.popleft()
            if not isinstance(job, Fit) and not slot.has_parent:
                # Calls of one actor run in order: the job starts after the weights are there.
                slot.handle.load.remote([self._parent])
                slot.has_parent = True
            self._attempts[job.id] = self._attempts.get(job.id, 0) + 1
            slot.job = job
            slot.stream = slot.handle.run.options(num_returns="streaming").remote(
                job, self._attempts[job.id]
            )

    def _read(self, slot: _Slot) -> Iterator[Report]:
        """One thing that an actor has to say: ready, a report, the end of a job, or its death."""
        try:
            if slot.setup is not None:
                ray.get(slot.setup)
                slot.setup = None
                self._died_idle = 0
                return
            try:
                reference = next(slot.stream)
            except StopIteration:
                slot.job = slot.stream = None
                return
            report: Report = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError):
                raise ValueError(str(cause)) from None
            raise
        except RayActorError as error:
            yield from self._replace(slot, error)
            return
        yield report
        if isinstance(report, Result):
            slot.job = slot.stream = None
            if slot.dedicated:
                self._retire(slot)

    def _retire(self, slot: _Slot) -> None:
        """End an actor on purpose; what it owned is free for others."""
        self._slots.remove(slot)
        ray.kill(slot.handle)

    def _replace(self, slot: _Slot, error: Exception) -> Iterator[Report]:
        """A new actor for one that died; its job goes to the front of the queue."""
        what = "died" if isinstance(error, ActorDiedError) else "does not answer"
        job = slot.job
        self._retire(slot)
        self._slots.append(
            self._start(gpus=1.0 if slot.dedicated else self._share.gpus, dedicated=slot.dedicated)
        )
        if job is None:
            self._died_idle += 1
            if self._died_idle > self._resources.retries:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"resources: actors die while they start: {reason}")
            self._notify(f"an actor {what} while it started; another takes its place")
            return
        attempts = self._attempts[job.id]
        if attempts <= self._resources.retries:
            self._notify(f"{job.id}: its actor {what} (attempt {attempts}); another goes on")
            self._queue.appendleft(job)
            return
        line = f"its actor died {attempts} times"
        if job.id == "parent":
            raise ValueError(f"parent: {line}; continue with 'ray-subnets resume'")
        result = kind_of(job)(id=job.id, error=line, attempts=attempts, started=time.time())
        if isinstance(result, ChildResult) and self._selection is not None:
            with suppress(RayActorError):  # if it died the driver ranks by itself
                ray.get(self._selection.report.remote(result))
        yield result

    def close(self) -> None:
        """End all actors."""
        for slot in list(self._slots):
            self._retire(slot)
