"""Where a method of the benchmark is trained: a worker's loop, with everything counted."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ray_subnets.baselines.method import Progress
from ray_subnets.data import Batch, Batches, Data
from ray_subnets.flops import forward_cost
from ray_subnets.population import Worker
from ray_subnets.recipes import Cell, Epoch, Fit, Training
from ray_subnets.stored import checkpoint_name
from ray_subnets.supervised import Objective, Rate
from ray_subnets.topology import Topology

_SAMPLES = 8  # of the batch that is counted; enough to be divided among members


def training_flops(model: nn.Module, objective: Objective | None, data: Data) -> float:
    """FLOPs of one optimizer step for each image of its batch, by torch's own counter.

    Forward and backward pass of a copy of the network; normalisation and activations not counted.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).train()
    x = torch.zeros(_SAMPLES, *data.input_shape, dtype=data.input_dtype, device=device)
    y = torch.arange(_SAMPLES, device=device) % data.num_classes
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, FlopCounterMode(display=False) as counter:
        if objective is not None:
            loss = objective(model, Batch(x, y, _SAMPLES))
        else:
            loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
    return counter.get_total_flops() / _SAMPLES


class WorkerBench:
    """`baselines.method.Bench` on a worker: stages with checkpoints; images and FLOPs counted."""

    def __init__(self, worker: Worker, cell: Cell) -> None:
        self._worker, self._cell = worker, cell
        self.data, self.device = worker.data, worker.device
        self.budget, self.seed = cell.budget, cell.seed
        self.training = replace(cell.training, epochs=cell.budget)
        self.images = 0
        """training images seen until now, counted in the loop"""
        self.flops = 0.0
        """of training until now, if zeros cost nothing"""
        self.flops_dense = 0.0
        """the same as the device did it"""
        self._stages: list[Fit] = []
        self._epochs = 0  # of stages that are done

    def build(self, seed: int) -> nn.Module:
        return self._worker.build(seed)

    def batches(self, batch_size: int, seed: int, data: Data | None = None) -> Batches:
        return self._worker.batches(batch_size, seed, data)

    def fit(
        self,
        model: nn.Module,
        training: Training,
        *,
        seed: int,
        data: Data | None = None,
        topology: Topology | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        rate: Rate | None = None,
        objective: Objective | None = None,
        density: Mapping[str, float] | None = None,
    ) -> Generator[Progress, None, None]:
        """See `baselines.method.Bench`."""
        job = Fit(id=f"{self._cell.id}.{len(self._stages):03d}", training=training, seed=seed)
        self._stages.append(job)
        loop = self._worker.train(
            *(job, model, training, seed),
            data=data,
            topology=topology,
            optimizer=optimizer,
            rate=rate,
            objective=objective,
            stage=True,
        )
        per_image = training_flops(model, objective, self.data)
        images = yield from self._told(loop)
        kept = 1.0
        if density:
            cost = forward_cost(model, self.data.input_shape, self.data.input_dtype)
            kept = cost.nonzero(density) / max(cost.total, 1)
        self.images += images
        self.flops_dense += per_image * images
        self.flops += kept * per_image * images
        self._epochs += training.epochs
        most = self.budget * len(self.data.train)
        if self.images > most:
            raise ValueError(
                f"{self._cell.row}: has seen {self.images:,} training images; the budget of "
                f"{self.budget} epochs is {most:,}"
            )

    def _told(self, loop: Generator[Progress, None, int]) -> Generator[Progress, None, int]:
        """Epochs of a stage as epochs of the cell."""
        while True:
            try:
                report = next(loop)
            except StopIteration as end:
                images: int = end.value
                return images
            if isinstance(report, Epoch):
                done = self._epochs + report.epoch
                report = replace(report, id=self._cell.id, epoch=done, epochs=self._cell.epochs)
            yield report

    def clean(self) -> None:
        """Remove the checkpoints of the stages."""
        for stage in self._stages:
            self._worker.folder.remove(checkpoint_name(stage))
