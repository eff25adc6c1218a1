"""One trial of a sweep in one process: a cell and a seed -> numbers, on validation data only.

A trial is a run without files: its parent is read from the sweep's folder (or trained into it), its
children live in memory, and what comes back is a small record.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_subnets import checks, driver, metrics, supervised, trust_region
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import combine, greedy, right_class
from ray_subnets.config import Config
from ray_subnets.data import Data
from ray_subnets.population import Worker
from ray_subnets.recipes import ChildSpec, Fit, Result, SolveResult
from ray_subnets.rl.policyfile import PolicyConfig
from ray_subnets.selection import fitness_of, select, share_of
from ray_subnets.stored import stored_result
from ray_subnets.supervised import Diverged
from ray_subnets.sweeps.sweepfile import cell_id, parent_job

KEPT_DATA, KEPT_PARENTS = 2, 8  # loaded at a time


def record_name(values: Mapping[str, Any], seed: int) -> str:
    """The file of a finished trial in the sweep's folder."""
    return f"trials/{cell_id(values)}-s{seed}.json"


def stored_trial(folder: RunFolder, values: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
    """What a trial gave that was finished before; None if there is none that can be read."""
    name = record_name(values, seed)
    if not folder.exists(name):
        return None
    try:
        found = folder.read_json(name)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kl" in found else None


def data_key(config: Config) -> str:
    return json.dumps(config.data.model_dump(mode="json"), sort_keys=True)


def device_here(config: Config | PolicyConfig) -> str:
    """Where this process works without Ray."""
    gpu = torch.cuda.is_available() and config.resources.gpus_per_actor != 0
    return "cuda:0" if gpu else "cpu"


class _Maker(Worker):
    """A worker that keeps what it makes."""

    primary = False  # no checkpoints, no results

    def child(self, spec: ChildSpec) -> Tensor:
        """Logits of the finished child on validation data, `(N, C)`.

        Raises:
            Diverged: its loss or its outputs are not finite.
        """
        steps = self.make(spec)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                model = end.value.model
                break
        logits = supervised.predict(model, self.data.validation.images, self.data.preprocess)
        if not logits.isfinite().all():
            raise Diverged(f"{spec.id}: it gives NaN or infinite outputs")
        return logits


class Evaluator:
    """Does trials one after another, with data, networks and parents kept loaded between them.

    Args:
        folder: of the sweep.
        data: by `data_key`, what is loaded already.
        import_from: folder of the user's own modules.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        data: Mapping[str, Data] | None = None,
        device: str = "cpu",
        import_from: str = "",
    ) -> None:
        self.folder = RunFolder(folder)
        self._device, self._import_from = device, import_from
        self._data = dict(data or {})
        self._workers: dict[str, _Maker] = {}
        self._parents: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def trial(self, config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a cell and seed: read if it was finished before, else made and stored.

        Raises:
            ValueError: these settings do not work; one line.
        """
        known = stored_trial(self.folder, values, config.seed)
        if known is not None:
            return known | {"seconds": 0.0, "again": True}
        record = {"values": dict(values)} | self.evaluate(config)
        self.folder.write_json(record_name(values, config.seed), record)
        return record

    def evaluate(self, config: Config) -> dict[str, Any]:
        """Make parent, children and ensemble of `config`; measure them on validation data.

        Raises:
            ValueError: see `trial`.
        """
        began = time.perf_counter()
        threads = torch.get_num_threads()
        torch.set_num_threads(config.resources.threads)
        try:
            record = self._evaluate(config)
        finally:
            torch.set_num_threads(threads)
        return record | {"seed": config.seed, "seconds": time.perf_counter() - began}

    def _evaluate(self, config: Config) -> dict[str, Any]:
        worker = self._worker(config)
        weights, parent_logits = self._parent(config, worker)
        worker.parent = weights
        solved: dict[str, Result] = {}
        for job in config.solve_jobs():
            trust_region.check_target(job.kl_target, worker.data.num_classes)
            for report in worker.run(job):
                if isinstance(report, Result):
                    solved[report.id] = report
        logits: dict[str, Tensor] = {}
        errors: dict[str, str] = {}
        specs = config.specs(solved)
        for spec in specs:
            try:
                logits[spec.id] = worker.child(spec)
            except Diverged as error:
                errors[spec.id] = str(error)
        if not logits:
            raise ValueError(f"children: every child failed; the first: {errors[specs[0].id]}")
        record = _scores(config, parent_logits, logits, errors, worker.data)
        sigmas = [found.sigma for found in solved.values() if isinstance(found, SolveResult)]
        return record | ({"sigma_solved": sigmas[0]} if len(sigmas) == 1 else {})

    def _worker(self, config: Config) -> _Maker:
        """One for each combination of network and data; the data are shared."""
        data = self.load(config)
        task = config.task(str(self.folder))
        key = json.dumps(
            [
                data_key(config),
                task.model,
                dict(task.model_options),
                task.threads,
                task.channels_last,
                task.fitness,
            ],
            sort_keys=True,
        )
        if key not in self._workers:
            self._workers = dict(list(self._workers.items())[-KEPT_PARENTS + 1 :])
            self._workers[key] = _Maker(task, data, self._device)
        return self._workers[key]

    def load(self, config: Config) -> Data:
        """The data of `config`.

        Raises:
            ValueError: they are not there, or others than when the sweep began.
        """
        key = data_key(config)
        if key not in self._data:
            data = driver.load_data(config)
            checks.same_data(data, self.folder, key)
            self._data = dict(list(self._data.items())[-KEPT_DATA + 1 :])
            self._data[key] = data
        return self._data[key]

    def _parent(self, config: Config, worker: _Maker) -> tuple[dict[str, Tensor], Tensor]:
        """Weights of the trained parent and its logits on validation data."""
        job = parent_job(config)
        if job.id not in self._parents:
            self._parents = dict(list(self._parents.items())[-KEPT_PARENTS + 1 :])
            result = stored_result(self.folder, job) or train_parent(
                job, Worker(worker.task, worker.data, self._device)
            )
            if result.error or not result.weights or not result.outputs:
                raise ValueError(f"parent: {result.error}")
            outputs = self.folder.load_arrays(result.outputs)
            self._parents[job.id] = (
                self.folder.load_tensors(result.weights),
                torch.from_numpy(outputs["validation"]),
            )
        return self._parents[job.id]


def train_parent(job: Fit, worker: Worker) -> Result:
    """Train a parent into the sweep's folder, from its last checkpoint if there is one."""
    for report in worker.run(job):
        if isinstance(report, Result):
            return report
    raise AssertionError("a job ends with its result")


def _scores(
    config: Config,
    parent: Tensor,
    logits: Mapping[str, Tensor],
    errors: Mapping[str, str],
    data: Data,
) -> dict[str, Any]:
    """The numbers of a trial, from logits `(N, C)` on validation data."""
    labels = data.validation.labels.cpu()
    reference = parent.double().log_softmax(1)
    validation, apart = {}, {}
    for id, one in logits.items():
        p = one.double().softmax(1)
        validation[id] = {
            "accuracy": metrics.accuracy(p, labels),
            "nll": metrics.nll(p, labels),
        }
        apart[id] = trust_region.divergence(reference, one)
    chosen = _members(config, logits, validation, errors, labels)
    stack = torch.stack([logits[id] for id in chosen])
    shares = [share_of(validation[id], config.select.by) for id in chosen]
    how = config.combine if len(chosen) > 1 else "probabilities"  # as in `Ensemble`
    together = combine(stack, how, shares if how == "weighted" else None)
    spread = trust_region.summary(
        [kl for kl, _ in apart.values()], [mse for _, mse in apart.values()]
    )
    own = parent.double().softmax(1)
    return {
        "kl": spread.kl,
        "kl_std": spread.kl_std,
        "mse": spread.mse,
        "mse_std": spread.mse_std,
        "accuracy": sum(one["accuracy"] for one in validation.values()) / len(validation),
        "nll": sum(one["nll"] for one in validation.values()) / len(validation),
        "ensemble_accuracy": metrics.accuracy(together, labels),
        "ensemble_nll": metrics.nll(together, labels),
        "mean_accuracy": metrics.accuracy(combine(stack, "probabilities", None), labels),
        "vote_accuracy": metrics.accuracy(combine(stack, "vote", None), labels),
        "parent_accuracy": metrics.accuracy(own, labels),
        "parent_nll": metrics.nll(own, labels),
        "members": len(chosen),
        "children": len(logits) + len(errors),
        "failed": len(errors),
    }


def _members(
    config: Config,
    logits: Mapping[str, Tensor],
    validation: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, str],
    labels: Tensor,
) -> list[str]:
    """Who would be a member, as in a run."""
    if config.select.method == "greedy":
        ids = sorted(logits)
        right = torch.stack([right_class(logits[id], labels) for id in ids])
        picked = greedy(right, config.select.count)
        return [ids[i] for i, _ in picked]
    fitness: dict[str, float | None] = {
        id: fitness_of(one, config.select.by) for id, one in validation.items()
    }
    decisions = select(
        fitness | dict.fromkeys(errors), config.select.count, by=config.select.by, errors=errors
    )
    assert all(math.isfinite(value) for value in fitness.values() if value is not None)
    return [decision.id for decision in decisions if decision.selected]
