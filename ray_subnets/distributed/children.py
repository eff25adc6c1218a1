"""The actor that owns a device and one child at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from ray_subnets import supervised
from ray_subnets.data import Data, Preprocess, Split
from ray_subnets.distributed.devices import granted, here
from ray_subnets.distributed.instruments import Instruments
from ray_subnets.distributed.sent import Sent
from ray_subnets.distributed.visible import check_mark
from ray_subnets.flat import Flat, flatten
from ray_subnets.items import Items
from ray_subnets.memory import keep_freed
from ray_subnets.population import Report, Task, Worker
from ray_subnets.recipes import ChildResult, Job, Training
from ray_subnets.regression import CRITERIA
from ray_subnets.streaming import ImageFiles

SPLITS = ("train", "validation", "test")


def pack_data(data: Data) -> tuple[Flat, dict[str, Any]]:
    """A data set as one flat array for the object store, and the rest of it."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, tuple[str, int, int, int]] = {}
    items: dict[str, Items] = {}
    same = data.test is data.validation
    for name in SPLITS[:-1] if same else SPLITS:
        split: Split = getattr(data, name)
        images = split.images
        if isinstance(images, ImageFiles):  # the names travel, the files must be on every node
            files[name] = (images.folder, images.size, images.resize, images.workers)
            images = images.names
        elif isinstance(images, Items):
            items[name] = replace(images, rows=images.rows[:0])
            images = images.rows
        tensors |= {f"{name}.images": images, f"{name}.labels": split.labels}
    rest = {
        "name": data.name,
        "num_classes": data.num_classes,
        "preprocess": (data.preprocess.mean, data.preprocess.std),
        "crop": data.crop,
        "flip": data.flip,
        "files": files,
        "items": Sent(items, "the data") if items else {},
    }
    return flatten(tensors), rest


def unpack_data(flat: Flat, rest: dict[str, Any]) -> Data:
    """Inverse of `pack_data`; the images are read where they lie, not copied."""
    tensors = flat.tensors()
    values = rest | {"preprocess": Preprocess(*rest["preprocess"])}
    files, items = values.pop("files"), values.pop("items")
    for name in SPLITS:
        if f"{name}.labels" not in tensors:
            values[name] = values["validation"]
            continue
        images: Tensor | ImageFiles | Items = tensors[f"{name}.images"]
        if name in items:
            images = replace(items[name], rows=tensors[f"{name}.images"])
        if name in files:
            folder, *view = files[name]
            images = ImageFiles(folder, tensors[f"{name}.images"], *view)
        values[name] = Split(images, tensors[f"{name}.labels"])
    return Data(**values)


def _warm(worker: Worker) -> None:
    """One training step of a network that is thrown away.

    The first one of a process takes seconds more than others: torch imports its compiler and makes
    kernels. Changes no generator and no number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(worker.task.threads)
    cuda = [worker.device] if worker.device.type == "cuda" else []
    try:
        # What is wrong with the network or the device is told by the job that meets it.
        with suppress(Exception), torch.random.fork_rng(devices=cuda):
            model, training = worker.blank(), Training(epochs=1)
            optimizer = supervised.make_optimizer(model, training)
            batch = next(iter(worker.batches(training.batch_size, 0).epoch(0)))
            criterion = CRITERIA.get(worker.task.head, torch.nn.functional.cross_entropy)
            criterion(model.train()(batch.x), batch.y).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)


class ChildActor:
    """A `Worker` in a Ray actor. References come in lists, so that Ray hands them over unread."""

    def __init__(self, selection: Any = None, worker: Callable[..., Worker] = Worker) -> None:
        self._selection, self._kind = selection, worker
        self._worker: Worker | None = None

    def setup(self, task: Task, data: Sequence[Any], rest: dict[str, Any], gpus: float) -> str:
        """Load everything that a first job would wait for. Returns the node's name.

        Args:
            gpus: this actor's share; below 1 it takes no more than that part of the GPU's memory.

        Raises:
            ValueError: Ray granted a GPU that torch cannot use, or this node does not see the run
                folder.
        """
        check_mark(task.folder)
        keep_freed()
        device = granted(gpus)
        self._worker = self._kind(task, unpack_data(ray.get(data[0]), rest), device, here())
        self._instruments = Instruments(self._worker.folder.name)
        _warm(self._worker)
        return self._worker.node

    def load(self, parent: Sequence[Any]) -> None:
        """Read the parent's weights from the object store."""
        assert self._worker
        self._worker.load_parent(ray.get(parent[0]))

    def run(self, job: Job, attempt: int) -> Iterator[Report]:
        """Do a job, streaming its reports; a child's result goes to the selection actor too."""
        assert self._worker
        for report in self._worker.run(job, attempt):
            self._instruments.report(report)
            if isinstance(report, ChildResult) and self._selection is not None:
                # If it died the driver ranks by itself, from the results in the folder.
                with suppress(RayActorError):
                    ray.get(self._selection.report.remote(report))
            yield report
