"""A pool of child actors: the Ray counterpart of `pools.SerialPool`."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from ray_subnets.config import ResourcesSection
from ray_subnets.data import Data
from ray_subnets.distributed.children import ChildActor, pack_data
from ray_subnets.distributed.devices import Share, alive
from ray_subnets.distributed.visible import leave_mark, take_mark
from ray_subnets.flat import Flat
from ray_subnets.population import Report, Task, Worker
from ray_subnets.recipes import (
    ChildResult,
    Epoch,
    Fault,
    Fit,
    Job,
    Result,
    Status,
)
from ray_subnets.stored import kind_of

_WAIT = 1.0  # seconds between looks at what is not a report
_POLL = 0.2  # the same while the parent trains elsewhere
_LOOK = 2.0  # seconds between looks at the cluster
_PATIENCE = 60.0  # seconds without any actor before saying so
_UNNOTICED = 60.0  # seconds for which Ray may still send actors to a node that is dead
_PAUSE = 10.0  # seconds, at most, between an actor's death as it starts and the next start
_WARM = 300.0  # seconds before the parent's end at which a growing cluster is asked for the rest

ParentTrainer = Callable[[Fit], Iterator[Report | None]]


@dataclass
class _Slot:
    """One actor and what it is doing."""

    handle: Any
    dedicated: bool = False
    """for the parent only: it has a whole GPU where children share one"""
    setup: Any = None
    """reference that resolves when the actor is ready; None afterwards"""
    node: str = ""
    job: Job | None = None
    stream: Any = None
    has_parent: bool = False


class RayPool:
    """Jobs on Ray actors, each on its own device, the next job as soon as one is done.

    An actor that dies is replaced and its job given to another, which goes on from the job's last
    checkpoint, up to `retries` times. Actors start at once, so that they are warm when the parent
    is done; a cluster that grows on demand is asked for the children's only when that is near. An
    actor for which there is no room waits for a node to join; actors without work left are ended.

    Args:
        jobs: how many jobs there will be; there is no point in more actors.
        selection: actor that hears of finished children.
        growing: the cluster may start nodes on demand, so wait for what it does not have yet.
        parent_trainer: does the parent's job elsewhere (`distributed/parent.py`); called with the
            job, it yields reports, and None while there is nothing new.
        parent_devices: devices that it takes; so many fewer actors until the parent is done.
        notify: called with a line of text when something happened that a person should know.
        watch: called with nodes and actors when they change.
        worker: what does the jobs in each actor.
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
        watch: Callable[[Status], None] = lambda status: None,
        worker: Callable[..., Worker] = Worker,
    ) -> None:
        self._worker = worker
        self._task, self._resources, self._growing = task, resources, growing
        self._jobs = jobs
        self._share = Share.of(resources, growing=growing)
        leave_mark(task.folder)
        flat, self.rest = pack_data(data)
        self.data = ray.put(flat)
        self._rest = ray.put(self.rest)
        self._selection, self._notify, self._watch = selection, notify, watch
        self._trainer: Iterator[Report | None] | None = None
        self._parent_trainer, self._parent_devices = parent_trainer, parent_devices
        self._parent: Any = None
        self._parent_left = float("inf")  # seconds until the parent is done
        self._queue: deque[Job] = deque()
        self._attempts: dict[str, int] = {}
        self.faults: list[Fault] = []
        self._slots: list[_Slot] = []
        self._started = self._died_idle = 0
        self._died_since = self._not_before = 0.0  # of actors that die as they start
        self._nodes = {id: _name(node) for id, node in alive().items()}
        self._looked = 0.0
        self._status: Status | None = None
        # An actor that waits for room is how a cluster learns that it should grow.
        self.size = min(resources.actors or (jobs if growing else self._share.fit()), max(1, jobs))
        self._dedicate = 0 < self._share.gpus < 1 and parent_trainer is None
        if self._dedicate:
            self._slots.append(self._start(gpus=1.0, dedicated=True))
        if not growing:
            self._resize(self.size - parent_devices)

    def _start(self, *, gpus: float, dedicated: bool = False) -> _Slot:
        self._started += 1
        actor = ray.remote(ChildActor).options(
            name=f"child-actor-{id(self)}-{self._started}",  # to be found in Ray's dashboard
            num_cpus=self._share.cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        handle: Any = actor.remote(self._selection, self._worker)
        setup = handle.setup.remote(self._task, [self.data], self._rest, gpus)
        return _Slot(handle, dedicated, setup)

    # --- pools.Pool ---

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def share(self, parent: Flat) -> None:
        self._parent = ray.put(parent)
        for slot in self._slots:
            slot.has_parent = False

    def reports(self) -> Iterator[Report]:
        self._trainer = self._start_parent_trainer()
        alone_since = time.monotonic()
        while self._trainer or self._queue or any(slot.job for slot in self._slots):
            if self._trainer:
                report = next(self._trainer)
                if report is not None:
                    self._follow(report)
                    yield report
                if isinstance(report, Result):
                    self._trainer = None
            self._resize(self._wanted())
            self._assign()
            self._look()
            waiting = [slot.setup or slot.stream for slot in self._slots if slot.setup or slot.job]
            ready: list[Any] = []
            if waiting:
                wait = _POLL if self._trainer else _WAIT
                ready, _ = ray.wait(waiting, num_returns=1, timeout=wait)
            else:
                time.sleep(_POLL)
            for slot in list(self._slots):
                if (slot.setup or slot.stream) in ready:
                    yield from self._read(slot)
            if ready or self._trainer or any(slot.job for slot in self._slots):
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > _PATIENCE:
                alone_since = time.monotonic()
                self._notify(f"waiting for the cluster to give an actor {self._share}")

    def _start_parent_trainer(self) -> Iterator[Report | None] | None:
        """Take the parent's job off the queue if it is done elsewhere."""
        if self._parent_trainer is None:
            return None
        for job in self._queue:
            if isinstance(job, Fit) and job.id == "parent":
                self._queue.remove(job)
                return self._parent_trainer(job)
        return None  # the parent was done before

    # --- how many actors ---

    def _wanted(self) -> int:
        """Actors that there is work for, or soon will be."""
        if self._trainer:
            return self.size - self._parent_devices
        unfinished = len(self._queue) + sum(
            slot.job is not None for slot in self._slots if not slot.dedicated
        )
        if self._parent is None and (not self._growing or self._parent_left < _WARM):
            return self.size
        return min(self.size, unfinished)

    def _resize(self, wanted: int) -> None:
        """Start actors, or end ones without work: first those that still wait for room."""
        slots = [slot for slot in self._slots if not slot.dedicated]
        paused = time.monotonic() < self._not_before
        for _ in range(0 if paused else wanted - len(slots)):
            self._slots.append(self._start(gpus=self._share.gpus))
        idle = sorted((slot for slot in slots if slot.job is None), key=lambda s: s.setup is None)
        for slot in idle[: max(0, len(slots) - wanted)]:
            self._retire(slot)

    def _follow(self, report: Report) -> None:
        """How long will the parent take yet?"""
        if isinstance(report, Epoch) and report.id == "parent":
            self._parent_left = (report.epochs - report.epoch) * report.seconds

    def _look(self) -> None:
        """Say which nodes came and went, and how it stands."""
        if time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            now = {id: _name(node) for id, node in alive().items()}
            for id in self._nodes.keys() - now.keys():
                self._died_idle = 0  # that was why
                self._notify(f"node {self._nodes[id]} left; {len(now)} remain")
                self.faults.append(
                    Fault(id="", what="the node left", node=self._nodes[id], time=time.time())
                )
            for id in now.keys() - self._nodes.keys():
                self._notify(f"node {now[id]} joined; {len(now)} now")
                if not self._resources.actors:
                    self.size = max(self.size, min(self._share.fit(), self._jobs))
            self._nodes = now
        status = Status(
            nodes=len(self._nodes),
            actors=sum(slot.setup is None for slot in self._slots),
            starting=sum(slot.setup is not None for slot in self._slots),
            running=sum(slot.job is not None for slot in self._slots) + (self._trainer is not None),
            retried=sum(attempts - 1 for attempts in self._attempts.values()),
        )
        if status != self._status:
            self._status = status
            self._watch(status)

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
            if self._parent is not None and not slot.has_parent:
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
                slot.node = ray.get(slot.setup)
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
            if isinstance(error.cause, ValueError) and slot.setup is not None:
                self._refuse(slot, str(error.cause))
            elif isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from None
            elif isinstance(error.cause, AssertionError) or slot.job is None:
                raise
            else:
                yield from self._replace(slot, _reason(error))
            return
        except RayError as error:  # the actor, its node, or what it had put into the object store
            yield from self._replace(slot, _reason(error))
            return
        self._follow(report)
        yield report
        if isinstance(report, Result):
            slot.job = slot.stream = None
            if slot.dedicated:
                self._retire(slot)

    def _retire(self, slot: _Slot) -> None:
        """End an actor on purpose; what it owned is free for others."""
        self._slots.remove(slot)
        ray.kill(slot.handle)

    def _refuse(self, slot: _Slot, why: str) -> None:
        """Do without an actor that cannot work where it is, if there are others.

        Raises:
            ValueError: there are none.
        """
        self._retire(slot)
        if not any(other.setup is None for other in self._slots):
            raise ValueError(why)
        self.size -= 1
        self.faults.append(Fault(id="", what=why, time=time.time()))
        self._notify(f"an actor is not used: {why}")

    def _replace(self, slot: _Slot, what: str) -> Iterator[Report]:
        """A new actor for one that failed; its job goes to the front of the queue."""
        job, attempt = slot.job, self._attempts[slot.job.id] if slot.job else 0
        fault = Fault(
            id=job.id if job else "",
            what=f"its actor {what}",
            attempt=attempt,
            node=slot.node,
            time=time.time(),
        )
        self.faults.append(fault)
        if job is None:
            now = time.monotonic()
            self._died_idle += 1
            if self._died_idle == 1:
                self._died_since = now
            # Its node may have died, and Ray hears of that late: then it says so, see `_look`.
            unexplained = what in (_DIED, _SILENT)
            long = now - self._died_since > _UNNOTICED
            if self._died_idle > self._resources.retries and (long or not unexplained):
                self._refuse(slot, f"resources: actors die while they start: the last {what}")
                return
            if self._died_idle > 1:
                self._not_before = now + min(2.0 ** (self._died_idle - 2), _PAUSE)
        self._retire(slot)
        if slot.dedicated:
            self._slots.append(self._start(gpus=1.0, dedicated=True))
        if job is None:
            self._notify(f"an actor {what} while it started; another takes its place")
            return
        if attempt <= self._resources.retries:
            self._notify(f"{job.id}: its actor {what} (attempt {attempt}); another goes on")
            self._queue.appendleft(job)
            return
        line = f"its actor failed {attempt} times; the last one {what}"
        if job.id == "parent":
            raise ValueError(f"parent: {line}; continue with 'ray-subnets resume'")
        result = kind_of(job)(id=job.id, error=line, attempts=attempt, started=time.time())
        if isinstance(result, ChildResult) and self._selection is not None:
            with suppress(RayActorError):  # if it died the driver ranks by itself
                ray.get(self._selection.report.remote(result))
        yield result

    def close(self) -> None:
        """End all actors."""
        for slot in list(self._slots):
            self._retire(slot)
        take_mark(self._task.folder)


_DIED, _SILENT = "died", "does not answer"


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:8]}"


def _reason(error: RayError) -> str:
    """What became of an actor, as the end of a sentence."""
    text = " ".join(str(error).split())
    missing = re.search(r"No module named '[^']+'", text)
    if missing and "input arguments" in text:
        return f"cannot read what it was sent: {missing[0]} on its machine"
    if isinstance(error, RayTaskError):
        cause = error.cause
        name = type(cause).__name__
        if "OutOfMemory" in name:
            return (
                "ran out of GPU memory; lower batch_size, or give each actor more of a GPU "
                "(resources.gpus_per_actor)"
            )
        return f"raised {name}: {' '.join(str(cause).split())[:200]}"
    if "low on memory" in text or "OutOfMemory" in type(error).__name__:
        return "was ended because its node ran out of memory; use fewer (resources.actors)"
    return _SILENT if isinstance(error, ActorUnavailableError) else _DIED
