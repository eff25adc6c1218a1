"""TensorBoard events: loss and rate of every network by epoch, and its validation numbers."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Note


def _record(event: Event) -> bytes:
    """An event in TensorBoard's file format: its length, itself, each with a checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + sums[0] + content + sums[1]


class Events:
    """Writes to `FOLDER/events/JOB`, one TensorBoard run per network.

    Where a file cannot grow (object stores) a network's events are written when it is done. Events
    that cannot be written are given up, and said so once; they never end a run.

    Args:
        say: called with a line of text.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None] = lambda line: None) -> None:
        self._folder, self._say = folder, say
        self._file = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._pending: dict[str, bytes] = {}
        self._begun: set[str] = set()
        self._grows = self._works = True

    def __call__(self, report: Report) -> None:
        if isinstance(report, Note):
            return
        if isinstance(report, Epoch):
            values, step = {"train/loss": report.loss, "train/lr": report.lr}, report.epoch
            values |= {f"train/{name}": value for name, value in report.numbers.items()}
        else:
            values = {f"validation/{name}": value for name, value in report.validation.items()}
            step = report.epochs
        now = time.time()
        new = [_record(Event(wall_time=now, step=step, summary=scalar(*v))) for v in values.items()]
        if report.id not in self._begun:
            self._begun.add(report.id)
            new.insert(0, _record(Event(wall_time=now, file_version="brain.Event:2")))
        self._pending[report.id] = self._pending.get(report.id, b"") + b"".join(new)
        self._write(report.id, done=not isinstance(report, Epoch))

    def _write(self, id: str, *, done: bool) -> None:
        if not self._works:
            return
        name = f"events/{id}/{self._file}"
        try:
            if self._grows:
                self._grows = self._folder.append(name, self._pending[id])
            if self._grows:
                self._pending[id] = b""
            elif done:
                self._folder.write(name, self._pending[id])
                self._pending[id] = b""
        except WriteFailed as error:
            self._works = False
            self._say(f"no TensorBoard events from here on: {str(error).split(';')[0]}")

    def close(self) -> None:
        """Write what is left: events of networks that are not done."""
        for id, content in self._pending.items():
            if content:
                self._write(id, done=True)
