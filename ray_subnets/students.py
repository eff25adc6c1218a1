"""Where a student of distillation begins, and how it is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from ray_subnets import models, networks
from ray_subnets.baselines.independent import Independent
from ray_subnets.checkpoints import ENSEMBLE, RunFolder
from ray_subnets.config import ModelSection
from ray_subnets.data import Data
from ray_subnets.ensembles import Ensemble
from ray_subnets.masks import Masks
from ray_subnets.members import (
    EnsembleRecord,
    MemberRecord,
    MethodRecord,
    Saved,
    dtype_name,
)
from ray_subnets.recipes import Stored, Training, derive
from ray_subnets.sources import Source
from ray_subnets.spawning import METHODS, anatomy, removable, subnetwork
from ray_subnets.stored import needs_parent, pack_child, stores_masks

ID = "distilled"
PARENT = "parent"
_FILE = f"children/{ID}.safetensors"


@dataclass(frozen=True)
class Distilled:
    """A network that was distilled, ready to be written: the `Origin` of its ensemble."""

    record: Callable[[Stored, float | None], EnsembleRecord | MethodRecord]
    """of its file and temperature"""
    tensors: Mapping[str, Tensor]
    parent: tuple[RunFolder, Stored] | None = None
    """that its recipe reads"""

    def __deepcopy__(self, memo: dict[int, Any]) -> Distilled:
        return self

    def save(self, folder: Any, ids: Any, temperature: float | None) -> None:
        """Write it into a new folder.

        Raises:
            ValueError: the folder is in use, or the parent is gone.
        """
        parent = self.parent[0].read(self.parent[1]) if self.parent else None
        try:
            target = RunFolder.create(folder)
        except ValueError as error:
            reason = str(error).removeprefix("--out: ")
            raise ValueError(f"save: {reason.split('; choose')[0]}; name a new folder") from None
        if self.parent and parent is not None:
            target.write(self.parent[1].file, parent)
        record = self.record(target.save_tensors(_FILE, self.tensors), temperature)
        target.write_json(ENSEMBLE, record.model_dump(mode="json"))


@dataclass(frozen=True)
class Student:
    """A network before it is distilled."""

    start: str
    """a member's id, or what kind of network it is"""
    network: nn.Module
    """on the CPU, a copy"""
    masks: Masks
    """weights outside them stay zero; none: all are trained"""
    keep: Callable[[nn.Module], Distilled] | None
    """None: it comes from networks made by hand, and cannot be saved"""


def begin(
    ensemble: Ensemble,
    data: Data,
    student: str | nn.Module | Mapping[str, Any],
    training: Training,
    seed: int,
) -> Student:
    """The student that `distill` is asked for.

    Raises:
        ValueError: no such member, no such network, or one that does not fit.
    """
    if isinstance(student, str) and student in (PARENT, *ensemble.ids):
        return _member(ensemble, data, student, training, seed)
    if isinstance(student, nn.Module):
        try:
            outline, weights, name, classes = networks.examined(
                student, Source(data.validation), data.num_classes, data.preprocess, None
            )
        except ValueError as error:
            raise ValueError(str(error).replace("model:", "student:", 1)) from None
        assert outline is not None
        if classes != data.num_classes:
            raise ValueError(
                f"student: it has {classes} outputs and the ensemble {data.num_classes}"
            )
        network = models.in_fast_format(outline.build())
        network.load_state_dict(weights or {})
    elif isinstance(student, str | Mapping):
        name = networks.named(student, "student")
        options = {key: value for key, value in name.items() if key != "name"}
        try:
            network = models.build(
                *(name["name"], data.input_shape, data.num_classes, options),
                seed=derive(seed, "student"),
                input_dtype=data.input_dtype,
            )
        except ValueError as error:
            text = str(error).removeprefix("model: ")
            known = ", ".join(ensemble.ids)
            raise ValueError(f"student: {text}; or a member's id: {known}") from None
    else:
        raise ValueError(f"student: must be a member's id, a network or its name, not {student!r}")
    kind = str(name.get("type", name["name"]))
    return Student(kind, network, {}, _whole(ModelSection.model_validate(name), data, True))


def _copied(network: nn.Module) -> nn.Module:
    """With memory of its own: members may lie side by side in one piece."""
    made = copy.deepcopy(network).cpu()
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.data = tensor.data.clone()
    return made


def _member(ensemble: Ensemble, data: Data, id: str, training: Training, seed: int) -> Student:
    """A member, or the parent even if it is none."""
    origin = ensemble.origin
    if origin is None:
        if id not in ensemble.ids:
            raise ValueError(f"student: {id} is not known; members are {', '.join(ensemble.ids)}")
        return Student(id, _copied(ensemble.members[ensemble.ids.index(id)]), {}, None)
    if not isinstance(origin, Saved) or not isinstance(origin.record, EnsembleRecord):
        raise ValueError(
            "student: these members are not children of a parent; name a network, as "
            "student='lenet_s'"
        )
    record, folder = origin.record, origin.folder
    if id in ensemble.ids:
        network = _copied(ensemble.members[ensemble.ids.index(id)])
    else:
        network = origin.build()
        network.load_state_dict(folder.load_tensors(record.parent))
    found = [one.recipe for one in record.members if one.recipe.id == id]
    if not found or not METHODS[found[0].method].prunes:
        return Student(id, network, {}, _whole(record.model, data, record.channels_last))
    spec = replace(
        found[0], id=ID, training=training, training_seed=derive(seed, "distill"), bag=1.0
    )
    body = anatomy(origin.build(), spec, record.input_shape, record.dtype)
    magnitudes = spec.criterion == "magnitude"
    sub = subnetwork(spec, body, folder.load_tensors(record.parent) if magnitudes else {})
    masks = sub.masks
    if removable(spec, sub):
        masks = {}
    elif stores_masks(spec):
        weights = dict(network.named_parameters())
        masks = {name: weights[name].detach() != 0 for name in body.shapes}

    def written(stored: Stored, temperature: float | None) -> EnsembleRecord:
        only = MemberRecord(recipe=spec, weights=stored)
        return record.model_copy(
            update={
                "members": (only,),
                "include_parent": False,
                "combine": "probabilities",
                "temperature": temperature,
            }
        )

    def keep(network: nn.Module) -> Distilled:
        packed = pack_child(network, spec, sub, masks)
        needed = needs_parent(spec, Stored(file=_FILE, sha256=""))
        return Distilled(written, packed, (folder, record.parent) if needed else None)

    return Student(id, network, masks, keep)


def _whole(
    model: ModelSection, data: Data, channels_last: bool
) -> Callable[[nn.Module], Distilled]:
    """A network of its own, with all of its weights."""

    def written(stored: Stored, temperature: float | None) -> MethodRecord:
        return MethodRecord(
            format=2,
            model=model,
            input_shape=data.input_shape,
            input_dtype=dtype_name(data),
            num_classes=data.num_classes,
            mean=data.preprocess.mean,
            std=data.preprocess.std,
            channels_last=channels_last,
            method=asdict(Independent()),
            networks=(stored,),
            temperature=temperature,
        )

    def keep(network: nn.Module) -> Distilled:
        weights = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
        return Distilled(written, weights)

    return keep
