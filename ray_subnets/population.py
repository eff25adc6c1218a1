"""One worker, one device, one job at a time; and a pool of them that is just this process.

`Worker` does the whole of a job: build or spawn, train, evaluate, store. Ray actors wrap it
(`distributed/children.py`); `SerialPool` calls it in place. Both give the same bits, because a
job's numbers depend on the job, the data and the number of threads, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ray_subnets import masks as masks_
from ray_subnets import metrics, models, sparse, stochastic, supervised
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Batches, Data
from ray_subnets.flat import Flat
from ray_subnets.recipes import ChildResult, ChildSpec, Epoch, Fit, Job, Result, Stored
from ray_subnets.selection import fitness_of
from ray_subnets.spawning import METHODS, masks_of, spawn_weights
from ray_subnets.supervised import Diverged

Report = Epoch | Result


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every worker of a run knows."""

    folder: str
    model: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    fitness: str = "nll"
    threads: int = 1
    """torch threads of a job: part of the numbers, since sums are split over threads"""
    import_from: str = ""
    """folder where the user's own modules lie (the driver's working folder)"""


class Pool(Protocol):
    """Where jobs are done. A driver submits and reads reports; it does not see who works."""

    def submit(self, job: Job) -> None:
        """Queue a job. Children need the parent: see `share`."""

    def share(self, parent: Flat) -> None:
        """Make the parent's weights available to jobs submitted from now on."""

    def reports(self) -> Iterator[Report]:
        """Reports as they come, until every job submitted (also meanwhile) has a result."""


class Worker:
    """Does jobs on one device.

    Args:
        data: on the CPU; moved to `device` once.
        device: `cpu` or `cuda:0`.
    """

    def __init__(self, task: Task, data: Data, device: str = "cpu") -> None:
        if task.import_from and task.import_from not in sys.path:
            sys.path.insert(0, task.import_from)
        self.task = task
        self.folder = RunFolder(task.folder)
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.parent: dict[str, Tensor] = {}
        self._earlier = 0.0  # seconds that earlier attempts spent on the job at hand
        self.name = f"{socket.gethostname()}/{os.getpid()}/{device}"
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one order of sums
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True, warn_only=True)

    def load_parent(self, parent: Flat) -> None:
        """Read the parent in place; nothing is copied until a child is spawned."""
        self.parent = parent.tensors()

    def run(self, job: Job, attempt: int = 1) -> Iterator[Report]:
        """Do a job: an `Epoch` after each epoch, at last its result, also written to the folder.

        Goes on from the job's last checkpoint if there is one. A child that diverges gives a
        result with an error; so does the single model. A diverging parent raises `Diverged`.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.task.threads)
        started = time.time()
        self._earlier = 0.0
        try:
            try:
                result = yield from self._run(job)
            except Diverged as error:
                if job.id == "parent":
                    raise
                kind = ChildResult if isinstance(job, ChildSpec) else Result
                result = kind(id=job.id, error=str(error))
            seconds = time.time() - started
            result = replace(
                result,
                started=started,
                seconds=seconds,
                device_seconds=self._earlier + seconds,
                worker=self.name,
                attempts=attempt,
            )
            if self.primary:
                store_result(self.folder, result)
                self.folder.remove(_checkpoint_name(job))
            yield result
        finally:
            torch.set_num_threads(threads)

    def build(self, seed: int) -> nn.Module:
        """The run's network with initial weights drawn from `seed`, on this device."""
        task, data = self.task, self.data
        model = models.build(
            task.model, data.input_shape, data.num_classes, task.model_options, seed
        )
        return model.to(self.device)

    def _run(self, job: Job) -> Generator[Epoch, None, Result]:
        """Train; the generator's return value is the result without its timing."""
        if isinstance(job, Fit):
            model = self.build(job.seed)
            images = yield from self._train(job, model, job.training, job.seed)
            if not self.primary:
                return Result(id=job.id)
            weights = self.folder.save_tensors(f"{job.id}.safetensors", model.state_dict())
            return self.finish(job, model, weights, images)
        assert self.parent, "a child was submitted before its parent was shared"
        model = self.build(seed=0)
        shapes = masks_.maskable(model, classifier=job.mask_classifier)
        child = spawn_weights(self.parent, shapes, job)
        model.load_state_dict(child.weights)
        method, images = METHODS[job.method], 0
        if job.training is not None and job.training.epochs:
            tau = None
            if method.stochastic:
                tau = partial(
                    stochastic.anneal, start=job.tau, epochs=job.anneal_epochs, shape=job.anneal
                )
            images = yield from self._train(
                job,
                model,
                job.training,
                job.training_seed,
                masks=child.masks if method.prunes else None,
                tau=tau,
            )
        stored = None
        if job.epochs or not method.prunes:
            final = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            if method.prunes:
                # A temperature above zero to the very end leaves weights outside the mask.
                final = sparse.prune(final, child.masks)
                model.load_state_dict(final)
            if job.epochs:
                packed = sparse.pack(final, child.masks) if method.prunes else final
                stored = self.folder.save_tensors(f"children/{job.id}.safetensors", packed)
        return self.finish(job, model, stored, images)

    def _train(
        self, job: Job, model: nn.Module, training: Any, seed: int, **how: Any
    ) -> Generator[Epoch, None, int]:
        """Train with a checkpoint after every epoch but the last; returns images seen."""
        optimizer = supervised.make_optimizer(model, training)
        start, images, self._earlier = load_checkpoint(self.folder, job, model, optimizer)
        began = time.time()
        loop = supervised.train(
            self.parallel(model),
            self.batches(training.batch_size, seed),
            training,
            optimizer,
            id=job.id,
            seed=seed,
            start_epoch=start,
            **how,
        )
        for local in loop:
            report = self.gather(local)
            images += report.images
            if self.primary and report.epoch < report.epochs:
                seconds = self._earlier + time.time() - began
                save_checkpoint(self.folder, job, model, optimizer, report.epoch, images, seconds)
            yield report
        return images

    # What differs when several workers share one job (`distributed/parent.py`).
    primary = True

    def batches(self, batch_size: int, seed: int) -> Batches:
        return Batches(self.data, batch_size, seed)

    def parallel(self, model: nn.Module) -> nn.Module:
        return model

    def gather(self, report: Epoch) -> Epoch:
        return report

    def finish(self, job: Job, model: nn.Module, weights: Stored | None, images: int) -> Result:
        """Evaluate on validation and test data and store the logits.

        Test logits are only written here; nobody looks at them before members are selected.

        Raises:
            Diverged: an output is not finite.
        """
        data = self.data
        logits = {
            name: supervised.predict(model, split.images, data.preprocess)
            for name, split in (("validation", data.validation), ("test", data.test))
        }
        if not all(tensor.isfinite().all() for tensor in logits.values()):
            raise Diverged(f"{job.id}: the trained network gives NaN or infinite outputs")
        outputs = self.folder.save_arrays(
            f"outputs/{job.id}.npz", {name: tensor.numpy() for name, tensor in logits.items()}
        )
        probabilities = logits["validation"].double().softmax(1)
        labels = data.validation.labels.cpu()
        validation = {
            "accuracy": metrics.accuracy(probabilities, labels),
            "nll": metrics.nll(probabilities, labels),
            "brier": metrics.brier(probabilities, labels),
        }
        common: dict[str, Any] = dict(
            id=job.id,
            validation=validation,
            weights=weights,
            outputs=outputs,
            epochs=job.epochs,
            images=images,
        )
        if isinstance(job, ChildSpec):
            return ChildResult(**common, fitness=fitness_of(validation, self.task.fitness))
        return Result(**common)


class SerialPool:
    """Every job in this process, in the order submitted: the debugger, the notebook, the oracle."""

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


# --- results and checkpoints in the folder ------------------------------------------------------


def store_result(folder: RunFolder, result: Result) -> None:
    folder.write_json(f"results/{result.id}.json", asdict(result))


def stored_result(folder: RunFolder, job: Job) -> Result | None:
    """The result of a job that was finished before; None if there is none that can be used.

    A damaged or missing file of it is as good as no result: the job is done again and gives the
    same bytes.
    """
    name = f"results/{job.id}.json"
    if not folder.exists(name):
        return None
    try:
        record = folder.read_json(name)
        for key in ("weights", "outputs"):
            record[key] = Stored(**record[key]) if record[key] else None
            if record[key]:
                folder.read(record[key])
        return (ChildResult if isinstance(job, ChildSpec) else Result)(**record)
    except (TypeError, KeyError, ValueError):
        return None


def _checkpoint_name(job: Job) -> str:
    return f"checkpoints/{job.id}.safetensors"


def _digest(job: Job) -> Tensor:
    """SHA-256 of the job, `(32,)` uint8: a checkpoint of another recipe is not continued."""
    text = json.dumps(job.to_json(), sort_keys=True).encode()
    return torch.from_numpy(np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint8).copy())


def save_checkpoint(
    folder: RunFolder,
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    images: int,
    seconds: float,
) -> None:
    """Everything needed to go on after `epoch` epochs, in one atomic file."""
    state = supervised.training_state(model, optimizer)
    state["job"] = _digest(job)
    state["progress"] = torch.tensor([epoch, images])
    state["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    folder.save_tensors(_checkpoint_name(job), state)


def load_checkpoint(
    folder: RunFolder, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, int, float]:
    """Restore the job's last checkpoint into model and optimizer.

    Returns:
        (epochs done, images seen, seconds spent); zeros if there is none, or none of this very
        job. An unreadable checkpoint is as good as none: the job starts again and gives the same
        numbers.
    """
    name = _checkpoint_name(job)
    if not folder.exists(name):
        return 0, 0, 0.0
    try:
        state = folder.load_tensors(name)
    except ValueError:
        return 0, 0, 0.0
    if "job" not in state or not torch.equal(state.pop("job"), _digest(job)):
        return 0, 0, 0.0
    epoch, images = state.pop("progress").tolist()
    seconds = float(state.pop("seconds"))
    supervised.restore_training_state(model, optimizer, state)
    return epoch, images, seconds


def restore(
    folder: RunFolder,
    model: nn.Module,
    parent: Mapping[str, Tensor],
    spec: ChildSpec,
    stored: Stored | None,
    source: str,
) -> None:
    """Load the finished child `spec` into `model`: from its file, or from the recipe alone.

    Args:
        source: who says so, for messages.

    Raises:
        ValueError: its file is damaged or does not belong to the recipe.
    """
    where = f"{source}: {stored.file if stored else spec.id}"
    packed = folder.load_tensors(stored) if stored else {}
    try:
        shapes = masks_.maskable(model, classifier=spec.mask_classifier)
        if stored is None:
            weights = spawn_weights(parent, shapes, replace(spec, training=None)).weights
        elif METHODS[spec.method].prunes:
            weights = sparse.unpack(packed, masks_of(spec, shapes))
        else:
            weights = packed
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{where}: does not fit the network ({error})") from None
    load_weights(model, weights, where)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict` whose mismatch is one line.

    Raises:
        ValueError: names or shapes differ.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: weights do not fit the network: {reason}") from None
