"""One worker, one device, one job at a time; and a pool of them that is just this process.

`Worker` does the whole of a job: build or spawn, train, evaluate, store. Ray actors wrap it
(`distributed/children.py`); `SerialPool` calls it in place. Both give the same bits, because a
job's numbers depend on the job, the data and the number of threads, and on nothing else.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import acting, masks, metrics, models, regression, sparse, supervised, trust_region
from ray_subnets.blueprint import Blueprint
from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.data import Batches, Data, bagged
from ray_subnets.flat import Flat
from ray_subnets.recipes import (
    ChildResult,
    ChildSpec,
    Epoch,
    Fit,
    Job,
    Note,
    Result,
    Solve,
    Stored,
    Training,
    derive,
)
from ray_subnets.recipes import Task as Task
from ray_subnets.selection import fitness_of
from ray_subnets.spawning import (
    METHODS,
    Anatomy,
    Made,
    anatomy,
    anneals,
    removable,
    spawn_weights,
    without_removed,
)
from ray_subnets.stored import (
    check_room,
    checkpoint_name,
    kept_fractions,
    kind_of,
    load_checkpoint,
    pack_child,
    save_checkpoint,
    store_result,
)
from ray_subnets.strangers import is_theirs, raised
from ray_subnets.supervised import Diverged
from ray_subnets.topology import Topology

Report = Epoch | Note | Result


class Worker:
    """Does jobs on one device.

    Args:
        data: on the CPU; moved to `device` once.
        device: `cpu` or `cuda:0`.
        node: what the machine is called in results; default the host's name.
        network: the run's network, if it is not built by name.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        device: str = "cpu",
        node: str = "",
        network: Blueprint | None = None,
    ) -> None:
        if task.import_from and task.import_from not in sys.path:
            sys.path.insert(0, task.import_from)
        self.task = task
        self.folder = RunFolder(task.folder)
        self.network = network
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.parent: dict[str, Tensor] = {}
        self._anatomies: dict[tuple[bool, str, tuple[str, ...]], Anatomy] = {}
        self._unexpected: tuple[str | None, list[str]] | None = None
        self._earlier: float | None = None  # seconds that earlier attempts spent on this job
        self._timings: dict[str, float] = {}
        self._started = 0.0
        self._busy = False  # has an epoch of this job been trained in this attempt?
        self._troubles: list[str] = []  # of the job at hand
        self._unsure = False  # is there room in the folder? The job before could not be written
        self.name = f"{socket.gethostname()}/{os.getpid()}/{device}"
        self.node = node or socket.gethostname()
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one order of sums
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True, warn_only=True)

    def load_parent(self, parent: Flat) -> None:
        """Read the parent in place; nothing is copied until a child is spawned."""
        self.parent = parent.tensors()

    def run(self, job: Job, attempt: int = 1) -> Iterator[Report]:
        """Do a job: an `Epoch` after each epoch, at last its result, also written to the folder.

        Goes on from the job's last checkpoint if there is one. A job that diverges is done once
        more from there: numbers that are not finite again are the recipe's doing, others were
        the machine's. A child that diverges gives a result with an error, and so does one that
        cannot be written; so does the single model. What could not be written is not in the
        folder, and is done when the run is resumed.

        Raises:
            ValueError: the parent diverged, or could not be written.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.task.threads)
        self._started, self._earlier, self._timings = time.time(), None, {}
        self._troubles, self._busy = [], False
        try:
            try:
                self._check_room(job)
                result = self._signed((yield from self._run_twice(job)), attempt)
                if self.primary:
                    store_result(self.folder, job, result)
            except (Diverged, WriteFailed) as error:
                if job.id == "parent":
                    raise
                self._unsure = isinstance(error, WriteFailed)
                result = self._signed(kind_of(job)(id=job.id, error=str(error)), attempt)
                if not self._unsure:
                    with suppress(WriteFailed):  # it will be found to diverge again
                        store_result(self.folder, job, result)
            except Exception as error:  # whatever a user's network or data set raises
                if isinstance(error, ValueError) or not is_theirs(error):
                    raise
                raise ValueError(f"{job.id}: your code raised {raised(error)}") from error
            if self.primary and not self._unsure:
                with suppress(WriteFailed):  # a checkpoint that stays takes space, no more
                    self.folder.remove(checkpoint_name(job))
            yield result
        finally:
            torch.set_num_threads(threads)

    def _run_twice(self, job: Job) -> Generator[Epoch | Note, None, Result]:
        """`_run`, once more if it diverges."""
        try:
            return (yield from self._run(job))
        except Diverged as error:
            once = f"done again from the last checkpoint, since {error}"
            result = yield from self._run(job)
            return replace(result, notes=(*result.notes, once))

    def _signed(self, result: Result, attempt: int) -> Result:
        """With who did it, and what it took until now."""
        seconds = time.time() - self._started
        return replace(
            result,
            started=self._started,
            seconds=seconds,
            device_seconds=(self._earlier or 0.0) + seconds,
            timings=self._timings,
            worker=self.name,
            node=self.node,
            attempts=attempt,
            troubles=tuple(self._troubles),
        )

    def _check_room(self, job: Job) -> None:
        """After a job that could not be written: would the outputs of this one find room?

        Asked before hours are spent on it.

        Raises:
            WriteFailed: no.
        """
        if self._unsure:
            data = self.data
            answers = len(data.validation) + len(data.test)
            check_room(self.folder, f"outputs/{job.id}.npz", 4 * data.num_classes * answers)
            self._unsure = False

    def _trouble(self, job: Job, line: str) -> Note:
        self._troubles.append(line)
        return Note(job.id, line)

    def build(self, seed: int) -> nn.Module:
        """The run's network with initial weights drawn from `seed`, on this device."""
        task, data = self.task, self.data
        if self.network is not None:
            model = self.network.build()
            return (models.in_fast_format(model) if task.channels_last else model).to(self.device)
        model = models.build(
            task.model,
            data.input_shape,
            data.num_classes,
            task.model_options,
            seed,
            channels_last=task.channels_last,
            input_dtype=data.input_dtype,
        )
        return model.to(self.device)

    def blank(self) -> nn.Module:
        """The run's network for a state dict to be loaded into, on this device.

        Drawing and checking initial weights takes most of the time of `build`, and here they are
        not wanted: only the first one is built, and copied without its weights.
        """
        outline = self._outline
        return self.build(seed=0) if outline is None else outline.build().to(self.device)

    @cached_property
    def _outline(self) -> Blueprint | None:
        """Of a network that is built by name, if that can be copied."""
        if self.network is not None:
            return None
        return Blueprint.tried(self.build(seed=0), self.data.input_shape, self.data.input_dtype)

    def _run(self, job: Job) -> Generator[Epoch | Note, None, Result]:
        """Train; the generator's return value is the result without its timing."""
        if isinstance(job, Fit):
            model = self.build(job.seed)
            if self.task.weights is not None:
                model.load_state_dict(self.folder.load_tensors(self.task.weights))
            images = yield from self.train(job, model, job.training, job.seed)
            if not self.primary:
                return Result(id=job.id)
            weights = self.folder.save_tensors(f"{job.id}.safetensors", model.state_dict())
            return self.finish(job, model, weights, images)
        assert self.parent, "a child was submitted before its parent was shared"
        if isinstance(job, Solve):
            model, first = self.blank(), job.draws[0]
            whole = self.batches(500, first.training_seed) if first.recompute_norm else None
            body = self.anatomy(model, first)
            return trust_region.search(job, self.parent, body, model, self.data, whole)
        assert isinstance(job, ChildSpec), job
        return (yield from self._run_child(job))

    def _run_child(self, spec: ChildSpec) -> Generator[Epoch | Note, None, Result]:
        made = yield from self.make(spec)
        model, method = made.model, METHODS[spec.method]
        stored = None
        packed = pack_child(model, spec, made.subnetwork, made.masks)
        if packed:
            stored = self.folder.save_tensors(f"children/{spec.id}.safetensors", packed)
        kept = kept_fractions(model, made.body, made.masks if method.prunes else {})
        notes = tuple(f"{name} is pruned to nothing" for name, left in kept.items() if left == 0)
        notes += self._masked_all_the_same(spec, made.body)
        result = self.finish(spec, model, stored, made.images)
        acted = {}
        if anneals(spec) or spec.prune_epochs:
            assert spec.training is not None
            steps = -(-made.images // (spec.epochs * spec.training.batch_size))
            acted = acting.shares(spec, made.subnetwork, made.body, steps)
        return replace(result, kept=kept, acting=acted, notes=notes)

    def make(self, spec: ChildSpec) -> Generator[Epoch | Note, None, Made]:
        """Spawn and tune; the generator's return value is the finished child."""
        model = self.blank()
        body = self.anatomy(model, spec)
        child = spawn_weights(self.parent, body, spec)
        sub, method, images = child.subnetwork, METHODS[spec.method], 0
        model.load_state_dict(child.weights)
        if not anneals(spec):
            model = without_removed(model, spec, sub, body)
        if spec.recompute_norm:
            supervised.recompute_norm(model, self.batches(500, spec.training_seed))
        masks = sub.masks
        if spec.training is not None and spec.training.epochs:
            parameters = dict(model.named_parameters())
            tuned = acting.topology(spec, sub, body, parameters)
            data = bagged(self.data, spec.bag, derive(spec.training_seed, "bag"))
            images = yield from self.train(
                spec, model, spec.training, spec.training_seed, data=data, topology=tuned
            )
            masks = tuned.masks if tuned is not None else masks
            if (method.prunes and not removable(spec, sub)) or anneals(spec):
                # A temperature above zero to the very end leaves weights outside the mask.
                masks = {name: mask.cpu() for name, mask in masks.items()}
                final = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
                model.load_state_dict(sparse.prune(final, masks))
            if anneals(spec):
                model = without_removed(model, spec, sub, body)
        return Made(model, sub, body, masks, images)

    def anatomy(self, model: nn.Module, spec: ChildSpec) -> Anatomy:
        """What may be left out of the run's network; found once for each kind of recipe."""
        key = (spec.mask_classifier, spec.structure, spec.whole)
        if key not in self._anatomies:
            data = self.data
            self._anatomies[key] = anatomy(model, spec, data.input_shape, data.input_dtype)
        return self._anatomies[key]

    def _masked_all_the_same(self, spec: ChildSpec, body: Anatomy) -> tuple[str, ...]:
        """What a user may not expect to be masked: the output layer, frozen weights."""
        if self._unexpected is None:
            model, images = self.blank(), self.data.validation.images
            first = next(iter(images[torch.arange(1)].split(1)))
            head = masks.output_layer(model, self.data.preprocess(first))
            grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            frozen = [name for name, learns in grads.items() if not learns]
            self._unexpected = head, frozen if any(grads.values()) else []
        head, frozen = self._unexpected
        found, units = [], bool(body.units)
        masked = {name for one in body.units for name in one.rows} if units else {*body.shapes}
        if head in masked and not spec.mask_classifier:
            # As the layer registered last is taken for it, that one is to be masked in its place.
            how = "" if units else f"; keep it: mask_classifier: true, whole: [{head}]"
            found.append(f"{head} gives the outputs and is masked{how}")
        frozen = [name for name in frozen if name in masked]
        if frozen:
            some = f"{frozen[0]}{f' and {len(frozen) - 1} more' if frozen[1:] else ''}"
            others = masked - {*frozen, head}
            how = "; keep them by whole: [PATTERN]" if others and not units else ""
            found.append(f"frozen weights are masked: {some}{how}")
        return tuple(found)

    def train(
        self,
        job: Job,
        model: nn.Module,
        training: Training,
        seed: int,
        *,
        data: Data | None = None,
        topology: Topology | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        rate: supervised.Rate | None = None,
        objective: supervised.Objective | None = None,
        stage: bool = False,
    ) -> Generator[Epoch | Note, None, int]:
        """Train with a checkpoint after every epoch but the last; returns images seen.

        Args:
            stage: more of this job follows, so there is one after the last epoch too.
        """
        optimizer = optimizer or supervised.make_optimizer(model, training)
        said: list[str] = []
        start, images, earlier = load_checkpoint(
            *(self.folder, job, partial(supervised.restore_training_state, model, optimizer)),
            *(said.append, topology),
        )
        for line in said:
            yield self._trouble(job, line)
        if not self._busy:  # not where a diverged job starts again: that time is counted
            self._earlier = max(earlier, self._earlier or 0.0)
        began, lost = time.time(), False
        self._timings["spawn"] = began - self._started
        loop = supervised.train(
            self.parallel(model),
            self.batches(training.batch_size, seed, data),
            training,
            optimizer,
            id=job.id,
            seed=seed,
            start_epoch=start,
            topology=topology,
            rate=rate,
            objective=objective,
            criterion=regression.CRITERIA.get(self.task.head),
        )
        for local in loop:
            report, self._busy = self.gather(local), True
            images += report.images
            if self.primary and (stage or report.epoch < report.epochs):
                seconds = (self._earlier or 0.0) + time.time() - self._started
                try:
                    state = supervised.training_state(model, optimizer)
                    save_checkpoint(
                        self.folder, job, state, report.epoch, images, seconds, topology
                    )
                except WriteFailed as error:  # the next may find room; training loses nothing
                    if not lost:
                        lost = True
                        why = str(error).split(";")[0]
                        yield self._trouble(job, f"no checkpoint: {why}; it goes on without")
            yield report
        self._timings["train"] = time.time() - began
        return images

    # What differs when several workers share one job (`distributed/parent.py`).
    primary = True

    def batches(self, batch_size: int, seed: int, data: Data | None = None) -> Batches:
        return Batches(data or self.data, batch_size, seed)

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
        data, began = self.data, time.time()
        logits = {"validation": supervised.predict(model, data.validation.images, data.preprocess)}
        if data.test is data.validation:
            logits["test"] = logits["validation"]
        else:
            logits["test"] = supervised.predict(model, data.test.images, data.preprocess)
        if not all(tensor.isfinite().all() for tensor in logits.values()):
            raise Diverged(f"{job.id}: the trained network gives NaN or infinite outputs")
        outputs = self.folder.save_arrays(
            f"outputs/{job.id}.npz", {name: tensor.numpy() for name, tensor in logits.items()}
        )
        self._timings["evaluate"] = time.time() - began
        labels = data.validation.labels.cpu()
        if self.task.head == "classes":
            validation = metrics.quality(logits["validation"].double().softmax(1), labels)
        else:
            validation = regression.scores(logits["validation"][None], labels, self.task.head)
            if not all(map(math.isfinite, validation.values())):
                raise Diverged(f"{job.id}: its validation scores are not finite: {validation}")
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
