"""A cell of a benchmark: one method with one seed, trained, kept and measured in a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import baselines, driver, members, supervised
from ray_subnets.baselines.method import Method, Progress, Trained
from ray_subnets.benchmark.bench import WorkerBench, training_flops
from ray_subnets.benchmark.benchmarkfile import Benchmark
from ray_subnets.checkpoints import CELL, CONFIG, RunFolder
from ray_subnets.config import ModelSection
from ray_subnets.data import Data
from ray_subnets.flops import Cost, forward_cost
from ray_subnets.flops import training_flops as of_images
from ray_subnets.pools import SerialPool
from ray_subnets.population import Report, Worker
from ray_subnets.recipes import Cell, Epoch, Job, Result, Shifted
from ray_subnets.shifts.shifted import ShiftedData
from ray_subnets.storage import join
from ray_subnets.summary import LABELS, Scores
from ray_subnets.supervised import Diverged


def folder_of(folder: RunFolder, cell: Cell) -> RunFolder:
    """Where a cell's own run folder is in a benchmark's."""
    return RunFolder(join(str(folder), f"cells/{cell.id}"))


def with_training_only(data: Data) -> Data:
    """The same data, validation images in place of test images: for choosing settings."""
    return replace(data, test=data.validation)


class CellWorker(Worker):
    """A `Worker` that also does whole cells."""

    def __init__(self, *what: Any, **how: Any) -> None:
        super().__init__(*what, **how)
        self._shifts: dict[int | None, ShiftedData] = {}

    def _run(self, job: Job) -> Generator[Progress, None, Result]:
        if isinstance(job, Shifted):
            return self._shifted(job)
        if not isinstance(job, Cell):
            return (yield from super()._run(job))
        data = self.data
        if not job.final:
            self.data = with_training_only(data)
        try:
            folder = self.folder.within(f"cells/{job.id}")
            doing = self._our_own(job, folder) if "run" in job.method else self._method(job, folder)
            return (yield from doing)
        finally:
            self.data = data

    def run(self, job: Job, attempt: int = 1) -> Iterator[Report]:
        """A cell that fails is a result with an error: the others go on."""
        try:
            yield from super().run(job, attempt)
        except AssertionError:
            raise
        except Exception as error:
            if not isinstance(job, Cell | Shifted):
                raise
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            line = " ".join(str(error).split())[:300]
            yield self._signed(Result(id=job.id, error=f"{kind}{line}"), attempt)

    # --- our own methods: ordinary runs ---

    def _our_own(self, cell: Cell, folder: RunFolder) -> Generator[Progress, None, Result]:
        config = Benchmark.run_of(cell)
        worker = Worker(replace(self.task, folder=str(folder)), self.data, str(self.device))
        data = self.data
        if self.device.type != "cpu":  # what a driver does is on no device
            data = data.to(torch.device("cpu"))
        cost = driver.prepare(config, data, folder)
        doing = driver.steps(config, data, folder, SerialPool(worker), cost=cost)
        done: dict[str, int] = {}
        while True:
            try:
                report = next(doing)
            except StopIteration as end:
                record: dict[str, Any] = end.value
                break
            if isinstance(report, Result):
                done[report.id] = report.epochs
                continue
            if isinstance(report, Epoch):
                done[report.id] = report.epoch
                so_far = sum(done.values())
                report = replace(report, id=cell.id, epoch=so_far, epochs=cell.epochs)
            yield report
        spent = record["cost"]
        limit = cell.budget * len(self.data.train)
        if spent["images"] > limit:
            raise ValueError(
                f"{cell.row}: has seen {spent['images']:,} training images; the budget of "
                f"{cell.budget} epochs is {limit:,}"
            )
        single = self._single_cost()
        dense = of_images(single.total, limit)
        ensemble = record["ensemble"]
        return self._finish(
            cell,
            folder,
            scores={key: ensemble[key] for key in ("test", "mean_member", "diversity")},
            validation=ensemble["validation"][
                "with_parent" if config.include_parent else "without_parent"
            ],
            members=len(ensemble["members"]),
            cost={
                "epochs": spent["epochs"],
                "images": spent["images"],
                "flops": spent["flops"],
                "flops_dense": spent["flops_dense"],
                "flops_vs_single": spent["flops"] / dense,
                "flops_dense_vs_single": spent["flops_dense"] / dense,
                "parameters": spent["parameters"]["ensemble"],
                "passes": spent["inference_passes"],
                "inference_flops_vs_single": spent["inference_flops_vs_parent"],
                "bytes": spent["bytes_on_disk"],
            },
            seconds=spent["device_seconds"],
        )

    # --- every other method ---

    def _method(self, cell: Cell, folder: RunFolder) -> Generator[Progress, None, Result]:
        method = baselines.parse(cell.method, cell.row)
        bench = WorkerBench(self, cell)
        trained = yield from method.train(bench)
        model = ModelSection(name=self.task.model, **self.task.model_options)
        self._prepare(cell, folder)
        members.write_method(folder, model, self.data, method, trained.networks)
        answering = [method.answering(network).to(self.device) for network in trained.networks]
        ids = self._answers(cell, folder, answering)
        scores = Scores(folder, "probabilities")
        names = [f"networks/{i:03d}.safetensors" for i in range(len(answering))]
        result = self._finish(
            cell,
            folder,
            scores={
                "test": scores.test(ids),
                "mean_member": _mean([scores.test([id]) for id in ids]),
                "diversity": scores.diversity(ids),
            },
            validation=scores.validation(ids),
            members=len(ids),
            cost=self._cost(bench, method, trained, answering)
            | {"bytes": sum(folder.size(name) or 0 for name in names)},
            seconds=(self._earlier or 0.0) + time.time() - self._started,
        )
        bench.clean()
        return result

    def _prepare(self, cell: Cell, folder: RunFolder) -> None:
        """What a cell's folder says of itself before there are networks."""
        text = json.dumps(cell.to_json(), indent=1)  # JSON is YAML
        folder.write(CONFIG, f"{text}\n".encode())
        data = self.data
        labels = {"validation": data.validation.labels, "test": data.test.labels}
        folder.save_arrays(LABELS, {name: one.cpu().numpy() for name, one in labels.items()})

    def _answers(self, cell: Cell, folder: RunFolder, answering: Sequence[nn.Module]) -> list[str]:
        """Logits of every member to the folder; their ids."""
        ids = []
        for i, network in enumerate(answering):
            logits: dict[str, Tensor] = {}
            for name, split in (("validation", self.data.validation), ("test", self.data.test)):
                found = supervised.predict(network, split.images, self.data.preprocess)
                if not found.isfinite().all():
                    raise Diverged(f"{cell.id}: the trained network gives NaN or infinite outputs")
                logits[name] = found if found.dim() == 3 else found[None]
            for k in range(len(logits["test"])):
                many = len(logits["test"]) > 1
                id = f"{i:03d}.{k:02d}" if many else f"{i:03d}"
                parts = {name: found[k].numpy() for name, found in logits.items()}
                folder.save_arrays(f"outputs/{id}.npz", parts)
                ids.append(id)
        return ids

    def _single_cost(self) -> Cost:
        return forward_cost(self.build(0), self.data.input_shape, self.data.input_dtype)

    def _cost(
        self, bench: WorkerBench, method: Method, trained: Trained, answering: Sequence[nn.Module]
    ) -> dict[str, Any]:
        data = self.data
        single = self._single_cost()
        images = bench.budget * len(data.train)
        one_run = of_images(single.total, images)
        # Counted alike: the real backward pass needs no gradient of the input.
        counted = training_flops(self.build(0), None, data) * images
        kept = list(trained.kept) or [{}] * len(answering)
        costs = [forward_cost(network, data.input_shape, data.input_dtype) for network in answering]
        plain = [
            forward_cost(network, data.input_shape, data.input_dtype)
            for network in trained.networks
        ]
        left = [
            own.nonzero(density) / max(own.total, 1)
            for own, density in zip(plain, kept, strict=True)
        ]
        return {
            "epochs": bench.images / len(data.train),
            "images": bench.images,
            "flops": bench.flops / counted * one_run,
            "flops_dense": bench.flops_dense / counted * one_run,
            "flops_vs_single": bench.flops / counted,
            "flops_dense_vs_single": bench.flops_dense / counted,
            "parameters": round(
                sum(
                    own.nonzero_parameters(density)
                    for own, density in zip(plain, kept, strict=True)
                )
            ),
            "passes": sum(getattr(network, "passes", 1) for network in answering),
            "inference_flops_vs_single": sum(
                share * one.total for share, one in zip(left, costs, strict=True)
            )
            / max(single.total, 1),
        }

    def _shifted(self, job: Shifted) -> Result:
        """Load a finished cell's ensemble and measure it on shifted data: `shift.json` there."""
        folder = self.folder.within(f"cells/{job.cell}")
        ensemble = members.load(str(folder), self.device)
        if job.samples not in self._shifts:
            self._shifts[job.samples] = ShiftedData(self.data, job)
        record = self._shifts[job.samples].measure(ensemble)
        folder.write_json("shift.json", record)
        return Result(id=job.id)

    def _finish(
        self,
        cell: Cell,
        folder: RunFolder,
        *,
        scores: Mapping[str, Any],
        validation: Mapping[str, float],
        members: int,
        cost: Mapping[str, Any],
        seconds: float,
    ) -> Result:
        """`CELL`: all that the benchmark's tables are made from."""
        where = {"seconds": seconds, "device": str(self.device), "worker": self.name}
        record = {
            "cell": cell.to_json(),
            "threads": self.task.threads,
            "members": members,
            "validation": dict(validation),
            "cost": dict(cost) | where,
        }
        if cell.final:
            record |= dict(scores)
        folder.write_json(CELL, record)
        return Result(
            id=cell.id,
            validation=dict(validation),
            epochs=cell.epochs,
            images=int(cost["images"]),
        )


def _mean(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(record[key] for record in records) / len(records) for key in records[0]}


def read(folder: RunFolder, cell: Cell) -> dict[str, Any]:
    """What a finished cell's folder says.

    Raises:
        ValueError: it is missing or damaged.
    """
    own = folder_of(folder, cell)
    record: dict[str, Any] = own.read_json(CELL)
    if own.exists("shift.json"):
        record |= own.read_json("shift.json")
    return record
