"""`ensemble.json`: who is a member, and all that a member is made from again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from ray_subnets import baselines, blueprint, configfile, models
from ray_subnets.baselines.method import Method
from ray_subnets.blueprint import Blueprint
from ray_subnets.checkpoints import ENSEMBLE, RunFolder
from ray_subnets.config import Config, ModelSection
from ray_subnets.data import Data, Preprocess
from ray_subnets.ensembles import Ensemble, Members
from ray_subnets.groups import Section
from ray_subnets.recipes import ChildSpec, Positive, Result, Stored
from ray_subnets.regression import Head, classifiers_only
from ray_subnets.regressor import Regressor
from ray_subnets.selection import Decision, share_of
from ray_subnets.stored import load_weights, needs_parent, restore


class MemberRecord(Section):
    """One member in `ensemble.json`."""

    recipe: ChildSpec
    weights: Stored | None
    """None: the recipe and the parent are enough"""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """weight in a fitness-weighted mean, before all are made to sum to one"""


class Kind(Section):
    """What every `ensemble.json` says."""

    model: ModelSection
    input_shape: tuple[int, ...]
    input_dtype: Literal["float32", "int64"] = "float32"
    """of what networks see"""
    head: Head = "classes"
    num_classes: Annotated[int, Field(ge=1)]
    """outputs for each sample, if the head is for regression"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = True
    """memory format of networks that are not built by name"""

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.input_dtype)
        return found


def dtype_name(data: Data) -> Literal["float32", "int64"]:
    """As `Kind.input_dtype` has it."""
    return "float32" if data.input_dtype.is_floating_point else "int64"


class EnsembleRecord(Kind):
    """`ensemble.json` of a parent and its children."""

    format: Literal[1]
    combine: Literal["probabilities", "weighted", "logits", "vote"]
    include_parent: bool
    parent: Stored
    parent_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    members: Annotated[tuple[MemberRecord, ...], Field(min_length=1)]
    temperature: Positive | None = None
    """fitted on validation data to the members' common answer; not applied unless asked for"""


class MethodRecord(Kind):
    """`ensemble.json` of another method: networks of its own kind, combined by their mean."""

    format: Literal[2]
    method: dict[str, Any]
    """its name and options"""
    networks: Annotated[tuple[Stored, ...], Field(min_length=1)]
    temperature: Positive | None = None


Record = Annotated[EnsembleRecord | MethodRecord, Field(discriminator="format")]


def write(
    config: Config,
    data: Data,
    folder: RunFolder,
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    decisions: Sequence[Decision],
    temperature: float | None = None,
) -> None:
    """`ensemble.json`: all that `load` needs, with the hash of every file.

    Args:
        temperature: of the members' common answer.
    """
    selected = {decision.id for decision in decisions if decision.selected}
    parent = results["parent"].weights
    assert parent
    members = []
    for spec in specs:
        if spec.id in selected:
            result = results[spec.id]
            share = share_of(result.validation, config.select.by)
            members.append(MemberRecord(recipe=spec, weights=result.weights, share=share))
    record = EnsembleRecord(
        format=1,
        model=config.model,
        input_shape=data.input_shape,
        input_dtype=dtype_name(data),
        num_classes=data.num_classes,
        mean=data.preprocess.mean,
        std=data.preprocess.std,
        head=config.head,
        combine=config.combine,
        include_parent=config.include_parent,
        parent=parent,
        parent_share=share_of(results["parent"].validation, config.select.by),
        members=tuple(members),
        temperature=temperature,
        channels_last=config.resources.channels_last,
    )
    folder.write_json(ENSEMBLE, record.model_dump(mode="json"))


@dataclass(frozen=True)
class Saved:
    """The folder that an ensemble was read from."""

    folder: RunFolder
    record: EnsembleRecord | MethodRecord
    build: Callable[[], nn.Module]
    """a network of zeros, as the parent is"""
    keep: Any = None
    """lives as long as this does: a temporary folder goes when nobody needs it"""

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return self

    def save(self, folder: str | Path, ids: Sequence[str], temperature: float | None) -> None:
        """Copy the members `ids`, in this order, with all that they are made from.

        Raises:
            ValueError: the folder is in use, or a file is missing or damaged.
        """
        record = self.record
        if isinstance(record, EnsembleRecord):
            record = _some(record, ids, temperature)
            files = [member.weights for member in record.members]
            files += [record.parent] if _needs_parent(record) else []
        else:
            known = dict(zip(_numbers(record), record.networks, strict=True))
            files = [known[id] for id in ids]
            update = {"temperature": temperature, "networks": tuple(files)}
            record = record.model_copy(update=update)
        try:
            target = RunFolder.create(folder)
        except ValueError as error:
            reason = str(error).removeprefix("--out: ")
            raise ValueError(f"save: {reason.split('; choose')[0]}; name a new folder") from None
        for stored in files:
            if stored is not None:
                target.write(stored.file, self.folder.read(stored))
        target.write_json(ENSEMBLE, record.model_dump(mode="json"))


def _some(record: EnsembleRecord, ids: Sequence[str], temperature: float | None) -> EnsembleRecord:
    """A record of these members only."""
    members = {member.recipe.id: member for member in record.members}
    order = tuple(members[id] for id in ids if id in members)
    if not order:
        raise ValueError("save: the parent alone is no ensemble; keep a child")
    if "parent" in ids[1:]:
        raise ValueError("save: the parent is kept as the first member; take the ids in that order")
    return record.model_copy(
        update={
            "members": order,
            "include_parent": "parent" in ids,
            "temperature": temperature,
        }
    )


def _needs_parent(record: EnsembleRecord) -> bool:
    children = (needs_parent(member.recipe, member.weights) for member in record.members)
    return record.include_parent or any(children)


def load(
    run: str | Path,
    device: str | torch.device = "cpu",
    *,
    model: nn.Module | Blueprint | None = None,
    on_demand: bool = False,
    calibrated: bool = False,
    batched: bool | None = None,
    keep: Any = None,
) -> Ensemble:
    """The ensemble of a finished run, or one that was saved, ready to predict.

    Args:
        run: a run folder or what `Ensemble.save` wrote: a path, or a URI like
            `s3://bucket/runs/quickstart`.
        model: for an ensemble of a network that was given in Python: a network of that kind. Its
            weights do not matter and are not changed; buffers that it does not save are its own.
        on_demand: make each member when it is asked, and drop it after: in memory there are the
            parent and one child, whatever the number of members. Slower, by the time that it takes
            to read (sparse, stochastic) or draw (noisy) a child.
        calibrated: scale answers by the temperature that was fitted on validation data.
        batched: ask all members in one call of `torch.func`, or one after the other; None:
            whichever is faster for the device, the network and the inputs, by a fixed rule.
        keep: an object to keep for as long as the ensemble may read the folder.

    Returns:
        A module in evaluation mode: inputs `(N, *shape)` -> probabilities `(N, C)`; of regression
        networks a `Regressor`: mean and variance `(N, 2)`.

    Raises:
        ValueError: not a finished run folder, a file in it is damaged, or `model` is needed.

    Example:
        >>> ensemble = load("runs/quickstart")  # doctest: +SKIP
        >>> ensemble(images).argmax(1)  # doctest: +SKIP
    """
    folder, record = _opened(run)
    source = f"{folder}/{ENSEMBLE}"
    if calibrated:
        classifiers_only(record.head, "calibrated")
    build = _builder(record, model, folder, source)
    shares, how, temperature = None, "probabilities", record.temperature
    networks: Sequence[nn.Module] | Members
    if isinstance(record, MethodRecord):
        networks = _of_method(record, folder, source, build)
        ids = _numbers(record)
    else:
        ids = ["parent"] * record.include_parent + [m.recipe.id for m in record.members]
        shares = [record.parent_share] * record.include_parent + [m.share for m in record.members]
        how = record.combine
        parent = folder.load_tensors(record.parent) if _needs_parent(record) else {}
        make = partial(_member, record, folder, source, build, parent)
        networks = Members(make, range(len(ids)))
        if not on_demand:
            networks = list(map(make, range(len(ids))))
    ensemble = (Ensemble if record.head == "classes" else Regressor)(
        networks,
        ids=ids,
        preprocess=Preprocess(record.mean, record.std),
        combine=how,
        weights=shares,
        temperature=temperature,
        calibrated=calibrated,
        origin=Saved(folder, record, build, keep),
        input_shape=record.input_shape,
        input_dtype=record.dtype,
        batched=batched if isinstance(record, EnsembleRecord) else False,
        head=record.head,
    )
    if calibrated and temperature is None:
        raise ValueError(f"calibrated: {source} has no temperature; use Ensemble.calibrate(x, y)")
    return ensemble.to(device).eval().requires_grad_(False)


def record_of(run: str | Path) -> EnsembleRecord | MethodRecord:
    """What `ensemble.json` says: input shape, classes, members; nothing else is read.

    Raises:
        ValueError: not a finished run folder, or it is damaged.
    """
    return _opened(run)[1]


def _opened(run: str | Path) -> tuple[RunFolder, EnsembleRecord | MethodRecord]:
    folder = RunFolder.open(run, needs=ENSEMBLE, saved=True)
    try:
        text = folder.read(ENSEMBLE)
        return folder, TypeAdapter(Record).validate_json(text, strict=True)
    except ValidationError as error:
        line = configfile.one_line(error, f"{folder}/{ENSEMBLE}")
        raise ValueError(f"{line}; {folder.mend}") from None


def _builder(
    record: Kind, model: nn.Module | Blueprint | None, folder: RunFolder, source: str
) -> Callable[[], nn.Module]:
    """Makes networks of the right kind, of zeros, on the CPU."""
    if model is not None and not isinstance(model, Blueprint):
        model = Blueprint.of(blueprint.check(model))
        _check_kind(model, record, folder)
    if model is None:
        name, options = record.model.name, record.model.options
        if name == models.GIVEN:
            kind = f"{options.get('type', 'a network')}"
            raise ValueError(
                f"{folder}: made of a network that was given in Python ({kind}), which this folder "
                "cannot build; give load one of that kind, its weights do not matter: "
                "load(..., model=...)"
            )
        try:
            shape, classes = record.input_shape, record.num_classes
            made = models.build(
                *(name, shape, classes, options),
                seed=0,
                input_dtype=record.dtype,
                from_folder=True,
            )
            model = Blueprint.of(made)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; {folder.mend}") from None
        return model.build
    given = model

    def build() -> nn.Module:
        network = given.build()
        return models.in_fast_format(network) if record.channels_last else network

    return build


def _check_kind(model: Blueprint, record: Kind, folder: RunFolder) -> None:
    """Is a network that was given of the kind that the ensemble was made of?

    Raises:
        ValueError: names or shapes of its weights are others than the parent's.
    """
    if not isinstance(record, EnsembleRecord) or not folder.exists(record.parent.file):
        return
    here = {name: tuple(t.shape) for name, t in model.outline.state_dict().items()}
    there = {name: tuple(t.shape) for name, t in folder.load_tensors(record.parent).items()}
    for name in sorted(here.keys() | there.keys(), key=str):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"model: it is of another kind than {folder} was made of: {name} is "
                f"{here.get(name, 'not there')}, and was {there.get(name, 'not there')}"
            )


def _member(
    record: EnsembleRecord,
    folder: RunFolder,
    source: str,
    build: Callable[[], nn.Module],
    parent: Mapping[str, Tensor],
    number: int,
) -> nn.Module:
    """One member: the parent, if it is one, comes first."""
    network = build()
    if number < record.include_parent:
        load_weights(network, parent, f"{source}: {record.parent.file}")
        return network
    member = record.members[number - record.include_parent]
    recipe, takes = member.recipe, (record.input_shape, record.dtype)
    return restore(folder, network, parent, recipe, member.weights, source, *takes)


def write_method(
    folder: RunFolder,
    model: ModelSection,
    data: Data,
    method: Method,
    networks: Sequence[nn.Module],
) -> None:
    """Networks of another method, and `ensemble.json`."""
    files = [
        folder.save_tensors(f"networks/{i:03d}.safetensors", network.state_dict())
        for i, network in enumerate(networks)
    ]
    record = MethodRecord(
        format=2,
        model=model,
        input_shape=data.input_shape,
        input_dtype=dtype_name(data),
        num_classes=data.num_classes,
        mean=data.preprocess.mean,
        std=data.preprocess.std,
        method=asdict(method),
        networks=tuple(files),
    )
    folder.write_json(ENSEMBLE, record.model_dump(mode="json"))


def _numbers(record: MethodRecord) -> list[str]:
    """Ids of its networks."""
    return [Path(stored.file).stem for stored in record.networks]


def _of_method(
    record: MethodRecord,
    folder: RunFolder,
    source: str,
    build: Callable[[], nn.Module],
) -> list[nn.Module]:
    again = folder.mend
    try:
        method = baselines.parse(record.method, source)
        networks = []
        for stored in record.networks:
            network = method.network(lambda seed: build(), 0)
            load_weights(network, folder.load_tensors(stored), f"{source}: {stored.file}")
            networks.append(method.answering(network))
        return networks
    except ValueError as error:
        raise ValueError(error if again in str(error) else f"{error}; {again}") from None
