"""TensorBoard events: loss and rate of every network by epoch, and its validation numbers."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter

from ray_subnets.population import Report
from ray_subnets.recipes import Epoch


class Events:
    """Writes to `FOLDER/events/JOB`, one TensorBoard run per network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "events"
        self._writers: dict[str, SummaryWriter] = {}

    def __call__(self, report: Report) -> None:
        writer = self._writers.get(report.id)
        if writer is None:
            writer = SummaryWriter(str(self._folder / report.id))
            self._writers[report.id] = writer
        if isinstance(report, Epoch):
            writer.add_scalar("train/loss", report.loss, report.epoch)
            writer.add_scalar("train/lr", report.lr, report.epoch)
            return
        for name, value in report.validation.items():
            writer.add_scalar(f"validation/{name}", value, report.epochs)
        writer.close()
        del self._writers[report.id]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
