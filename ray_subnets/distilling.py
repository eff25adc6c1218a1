"""Distillation: one network of a child's size, taught by the ensemble (Hinton et al. 2015).

The teacher is asked once for each batch, on the very images, augmented, that the student sees.

Shape legend: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_subnets import metrics, sources, students, supervised
from ray_subnets import progress as progress_
from ray_subnets.combining import Running
from ray_subnets.data import Batch, Batches, Data
from ray_subnets.ensembles import Ensemble
from ray_subnets.methods import OneCycle, training
from ray_subnets.recipes import Fit, Result, Training, derive
from ray_subnets.regression import classifiers_only
from ray_subnets.students import ID, Student
from ray_subnets.topology import Fixed

TUNE = OneCycle(epochs=10, lr=0.05)
TEMPERATURE, WEIGHT = 2.0, 0.5


def distill(
    ensemble: Ensemble,
    train: Any,
    val: Any,
    *,
    student: str | nn.Module | Mapping[str, Any] | None = None,
    tune: Training = TUNE,
    temperature: float = TEMPERATURE,
    weight: float = WEIGHT,
    test: Any = None,
    crop: int = 0,
    flip: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Ensemble:
    """Train one network on the ensemble's probabilities; it costs one pass for an answer.

    Args:
        ensemble: the teacher, on the device where to work. Load it without `on_demand`, since every
            batch asks every member.
        train, val: as for `rs.ensemble`: tensors `(x, y)`, a `Dataset` or a `DataLoader`.
        student: the id of a member, or `parent`: the network begins as that member, and what was
            pruned there stays pruned. An `nn.Module`, which is copied: it begins with the weights
            that it has. A name (and options) of a network as in a configuration: begins anew.
            Default: the member with the best validation NLL.
        tune: how it is trained, `OneCycle(epochs=10)` or `Training(...)`.
        temperature: of teacher and student in the loss, above 0; more than 1 shows what the teacher
            thinks of the wrong classes.
        weight: of the teacher's answers in the loss, 0 to 1; the rest is the labels'.
        test: as `val`; measured once, for `record`.
        crop, flip: augment image tensors, as for `rs.ensemble`.
        seed: of batches, augmentation and the new weights of a student by name.
        progress: show it.

    Returns:
        An `Ensemble` of one member, to be called, saved, loaded and exported like any; `record` has
        validation (and test) metrics of it and of its teacher.

    Raises:
        ValueError: one line that names the argument; or training diverged.

    Example:
        >>> small = rs.distill(ensemble, (x, y), (x_val, y_val))  # doctest: +SKIP
    """
    classifiers_only(ensemble.head, "distill")
    given = {
        "train": sources.source("train", train, keep=False),
        "val": sources.source("val", val, keep=True),
    }
    if test is not None:
        given["test"] = sources.source("test", test, keep=True)
    probe = given["val"].split.images[torch.arange(1)]
    with torch.no_grad():
        classes = ensemble(next(iter(probe.split(1))).to(ensemble.device)).shape[1]
    data = sources.assemble(
        given["train"],
        given["val"],
        given.get("test"),
        num_classes=classes,
        preprocess=ensemble.preprocess if ensemble.preprocess.mean else None,
        crop=crop,
        flip=flip,
    )
    return distilled(
        ensemble,
        data,
        student=student,
        tune=tune,
        temperature=temperature,
        weight=weight,
        seed=seed,
        show=progress,
    )


def distilled(
    ensemble: Ensemble,
    data: Data,
    *,
    student: str | nn.Module | Mapping[str, Any] | None = None,
    tune: Training = TUNE,
    temperature: float = TEMPERATURE,
    weight: float = WEIGHT,
    seed: int = 0,
    show: bool = True,
) -> Ensemble:
    """`distill` on a data set; arguments and errors as there."""
    settings = Training(**training(tune, "tune"))
    if not temperature > 0:
        raise ValueError(f"temperature: must be above 0, not {temperature}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: must be from 0 to 1, not {weight}")
    if settings.epochs < 1:
        raise ValueError("tune.epochs: a student must be trained; say 1 or more")
    best, taught = _teacher(ensemble, data)
    chosen = best if student is None else student
    begun = students.begin(ensemble, data, chosen, settings, seed)
    job = Fit(id=ID, training=settings, seed=derive(seed, "distill"))
    network = begun.network.to(ensemble.device).requires_grad_(True)
    here = data.to(ensemble.device)
    loop = supervised.train(
        network,
        Batches(here, settings.batch_size, job.seed),
        settings,
        supervised.make_optimizer(network, settings),
        id=ID,
        seed=job.seed,
        topology=Fixed(dict(network.named_parameters()), begun.masks) if begun.masks else None,
        objective=objective(ensemble, temperature, weight, settings.label_smoothing),
    )
    seconds = 0.0
    with progress_.view([job], Console(), quiet=not show) as view:
        for report in loop:
            seconds += report.seconds
            view(report)
        made, told = _finished(network.eval().requires_grad_(False), begun, data)
        view(Result(id=ID, validation=told["validation"], seconds=seconds))
    made.record = {
        "distilled": told,
        "teacher": taught | {"members": len(ensemble.ids)},
        "settings": {
            "student": begun.start,
            "temperature": temperature,
            "weight": weight,
            "tune": asdict(settings),
            "seed": seed,
        },
        "seconds": seconds,
    }
    return made


def _teacher(ensemble: Ensemble, data: Data) -> tuple[str, dict[str, Any]]:
    """The member with the best validation NLL, and the ensemble's metrics."""
    together, nlls = Running(ensemble.combine), []
    images: Any = data.validation.images
    labels = data.validation.labels.cpu()
    for i, answers in enumerate(ensemble.each(images)):
        for one in answers:
            together.add(one, ensemble.weights[i] if ensemble.weights else 1.0)
        nlls.append(metrics.nll(answers.double().softmax(2).mean(0), labels))
    best = ensemble.ids[min(range(len(nlls)), key=nlls.__getitem__)]
    found = {"validation": metrics.summary(ensemble.answer(together.value()), labels)}
    if data.test is not data.validation:
        tested: Any = data.test.images
        said = ensemble.predict(tested)
        found["test"] = metrics.summary(said.probabilities, data.test.labels.cpu())
    return best, found


def _finished(network: nn.Module, begun: Student, data: Data) -> tuple[Ensemble, dict[str, Any]]:
    """The student as an ensemble of one, with a temperature, and its metrics."""
    device = next(network.parameters()).device
    made = Ensemble(
        [network],
        ids=[ID],
        preprocess=data.preprocess,
        origin=begun.keep(network) if begun.keep else None,
        input_shape=data.input_shape,
        input_dtype=data.input_dtype,
    ).to(device)
    told = {}
    for name in ("validation", "test"):
        split = getattr(data, name)
        if name == "validation" or split is not data.validation:
            p = made.predict(split.images).probabilities
            told[name] = metrics.summary(p, split.labels.cpu())
            if name == "validation":
                made.temperature = metrics.temperature_of(p, split.labels.cpu())
    return made.eval(), told


def objective(
    teacher: nn.Module, temperature: float, weight: float, label_smoothing: float = 0.0
) -> supervised.Objective:
    """Cross-entropy to the teacher's tempered probabilities and to the labels, summed over images.

    The teacher's part is multiplied by the temperature squared, so that its gradients are as large
    as at 1 (Hinton et al. 2015, section 2).

    Args:
        teacher: network inputs -> probabilities `(N, C)`.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = supervised.main_output(model(batch.x)).float()
        told = cross_entropy(logits, batch.y, reduction="sum", label_smoothing=label_smoothing)
        if weight == 0:  # nobody needs to be asked
            return told
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            soft = metrics.scaled(teacher(batch.x), temperature).float()
        taught = cross_entropy(logits / temperature, soft, reduction="sum")
        return weight * temperature**2 * taught + (1 - weight) * told

    return loss


def lines(record: Mapping[str, Any]) -> list[str]:
    """What came of it, for a person."""
    found = []
    for split in ("validation", "test"):
        rows = [(name, record[name].get(split)) for name in ("distilled", "teacher")]
        for name, row in rows:
            if row:
                passes = 1 if name == "distilled" else record["teacher"]["members"]
                found.append(
                    f"{split} {name}: {passes} passes, accuracy {100 * row['accuracy']:.2f} %, "
                    f"NLL {row['nll']:.4f}, ECE {row['ece']:.4f}"
                )
    return found
