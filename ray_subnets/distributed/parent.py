"""The parent on several devices: the same loop under Ray Train, the same global batch.

Starting Ray Train takes 20 to 30 seconds, so one device uses a plain actor of the pool instead.
Sums run in another order than on one device, so the parent's last digits differ from it; for a
given number of workers they are reproducible. Batch normalisation is synchronised on GPUs and
local to each worker on CPUs, where torch has no synchronised version.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn

from ray_subnets import supervised
from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.data import Batches, Data
from ray_subnets.distributed.children import unpack_data
from ray_subnets.distributed.visible import check_mark
from ray_subnets.inputs import made_up
from ray_subnets.memory import keep_freed
from ray_subnets.population import Report, Task, Worker
from ray_subnets.recipes import Epoch, Fit
from ray_subnets.stored import stored_result

_EPOCHS = "results/parent.epochs.json"
_LOOK = 0.5  # seconds between looks at it: each may be a request to a server


class ParentWorker(Worker):
    """A `Worker` that sees every `world`-th image of each batch."""

    rank = 0
    world = 1

    def batches(self, batch_size: int, seed: int, data: Data | None = None) -> Batches:
        return Batches(data or self.data, batch_size, seed, rank=self.rank, world=self.world)

    def parallel(self, model: nn.Module) -> nn.Module:
        cuda = self.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(
            model,
            [self.device] if cuda else None,
            find_unused_parameters=self._has_unused(model),
        )

    def _has_unused(self, model: nn.Module) -> bool:
        """Are there parameters that the main output does not depend on, of auxiliary heads?"""
        probe = copy.deepcopy(model).train()
        parameters = [p for p in probe.parameters() if p.requires_grad]
        x = made_up(2, self.data.input_shape, self.data.input_dtype).to(self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            output = supervised.main_output(probe(x))
        found = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        return any(gradient is None for gradient in found)

    def build(self, seed: int) -> nn.Module:
        model = super().build(seed)
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def gather(self, report: Epoch) -> Epoch:
        """Mean loss and number of images over all workers."""
        sums = torch.tensor(
            [report.loss * report.images, report.images], dtype=torch.float64, device=self.device
        )
        torch.distributed.all_reduce(sums)
        loss, images = sums.tolist()
        whole = replace(report, loss=loss / images, images=int(images))
        supervised.check_loss(whole)  # here: all of them raise, or none, which others wait for
        return whole


def _loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    check_mark(config["task"].folder)
    keep_freed()
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    data = unpack_data(ray.get(config["data"][0]), config["rest"])
    worker = ParentWorker(config["task"], data, device)
    worker.rank, worker.world = context.get_world_rank(), context.get_world_size()
    worker.primary = worker.rank == 0
    epochs = []
    for report in worker.run(config["job"]):
        if isinstance(report, Epoch):
            epochs.append(asdict(report))
            if worker.primary:  # the driver follows this file
                with suppress(WriteFailed):  # the last one tells all; the result is another file
                    worker.folder.write_json(_EPOCHS, epochs)
            ray.train.report({"loss": report.loss})


class RayTrainParent:
    """Trains the parent with a `TorchTrainer`; pass it to `RayPool` as `parent_trainer`."""

    def __init__(self, task: Task, *, workers: int, threads: int, gpus: bool) -> None:
        self._task, self._workers, self._threads, self._gpus = task, workers, threads, gpus
        self.data: Any = None
        self.rest: dict[str, Any] = {}

    def __call__(self, job: Fit) -> Iterator[Report | None]:
        """Reports as they come, None while there is nothing new; at last the result.

        Raises:
            ValueError: training diverged.
        """
        folder = RunFolder(self._task.folder)
        folder.remove(_EPOCHS)
        outcome: list[BaseException | None] = []
        thread = threading.Thread(target=self._fit, args=(job, outcome), daemon=True)
        thread.start()
        seen, look = 0, 0.0
        while True:
            done = not thread.is_alive()
            if done or time.monotonic() >= look:
                look = time.monotonic() + _LOOK
                new = self._new_epochs(folder, seen)
                seen += len(new)
                yield from new
            if done:
                break
            yield None
        with suppress(WriteFailed):
            folder.remove(_EPOCHS)
        if outcome and outcome[0] is not None:
            raise _cause(outcome[0])
        result = stored_result(folder, job)
        assert result is not None
        yield result

    def _new_epochs(self, folder: RunFolder, seen: int) -> list[Epoch]:
        """Epochs after the first `seen`; none if storage does not say."""
        try:
            records = folder.read_json(_EPOCHS) if folder.exists(_EPOCHS) else []
        except ValueError:
            return []
        return [Epoch(**record) for record in records[seen:]]

    def _fit(self, job: Fit, outcome: list[BaseException | None]) -> None:
        per_worker: dict[str, float] = {"CPU": 1 if self._gpus else self._threads}
        if self._gpus:
            per_worker["GPU"] = 1
        with tempfile.TemporaryDirectory() as scratch:
            trainer = ray.train.torch.TorchTrainer(
                _loop,
                train_loop_config={
                    "job": job,
                    "task": self._task,
                    "data": [self.data],
                    "rest": self.rest,
                },
                scaling_config=ray.train.ScalingConfig(
                    num_workers=self._workers,
                    use_gpu=self._gpus,
                    resources_per_worker=per_worker,
                ),
                run_config=ray.train.RunConfig(name="parent", storage_path=scratch),
            )
            try:
                trainer.fit()
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)


def _cause(error: BaseException) -> BaseException:
    """The user's own error inside what Ray Train raised, if there is one."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner = getattr(failure, "_base_exc", failure)
        if isinstance(inner, ValueError):
            return ValueError(str(inner))
    return error
