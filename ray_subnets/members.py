"""`ensemble.json`: who is a member, and all that a member is made from again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from ray_subnets import baselines, configfile, models
from ray_subnets.baselines.method import Method
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config, ModelSection
from ray_subnets.data import Data, Preprocess
from ray_subnets.ensemble import Ensemble
from ray_subnets.groups import Section
from ray_subnets.recipes import ChildSpec, Result, Stored
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
    num_classes: Annotated[int, Field(ge=2)]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class EnsembleRecord(Kind):
    """`ensemble.json` of a parent and its children."""

    format: Literal[1]
    combine: Literal["probabilities", "weighted", "logits", "vote"]
    include_parent: bool
    parent: Stored
    parent_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    members: Annotated[tuple[MemberRecord, ...], Field(min_length=1)]


class MethodRecord(Kind):
    """`ensemble.json` of another method: networks of its own kind, combined by their mean."""

    format: Literal[2]
    method: dict[str, Any]
    """its name and options"""
    networks: Annotated[tuple[Stored, ...], Field(min_length=1)]


Record = Annotated[EnsembleRecord | MethodRecord, Field(discriminator="format")]


def write(
    config: Config,
    data: Data,
    folder: RunFolder,
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    decisions: Sequence[Decision],
) -> None:
    """`ensemble.json`: all that `load` needs, with the hash of every file."""
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
        num_classes=data.num_classes,
        mean=data.preprocess.mean,
        std=data.preprocess.std,
        combine=config.combine,
        include_parent=config.include_parent,
        parent=parent,
        parent_share=share_of(results["parent"].validation, config.select.by),
        members=tuple(members),
    )
    folder.write_json("ensemble.json", record.model_dump(mode="json"))


def load(run: str | Path, device: str | torch.device = "cpu") -> Ensemble:
    """The ensemble of a finished run, ready to predict.

    Args:
        run: a run folder: a path, or a URI like `s3://bucket/runs/quickstart`.

    Returns:
        A module in evaluation mode: inputs `(N, *shape)` -> probabilities `(N, C)`.

    Raises:
        ValueError: not a finished run folder, or a file in it is damaged.

    Example:
        >>> ensemble = load("runs/quickstart")  # doctest: +SKIP
        >>> ensemble(images).argmax(1)  # doctest: +SKIP
    """
    folder = RunFolder.open(run, needs="ensemble.json")
    source = f"{folder}/ensemble.json"
    again = f"'ray-subnets resume {folder}' writes it again"
    try:
        record: EnsembleRecord | MethodRecord = TypeAdapter(Record).validate_json(
            folder.read("ensemble.json"), strict=True
        )
    except ValidationError as error:
        raise ValueError(f"{configfile.one_line(error, source)}; {again}") from None

    def build() -> nn.Module:
        try:
            name, options = record.model.name, record.model.options
            return models.build(name, record.input_shape, record.num_classes, options, seed=0)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; {again}") from None

    if isinstance(record, MethodRecord):
        networks = _of_method(record, folder, source, again, build)
        ids, shares, how = [f"{i:03d}" for i in range(len(networks))], None, "probabilities"
    else:
        networks, ids, shares = _of_recipes(record, folder, source, build)
        how = record.combine
    ensemble = Ensemble(
        networks,
        ids=ids,
        preprocess=Preprocess(record.mean, record.std),
        combine=how,
        weights=shares,
    )
    return ensemble.to(device).eval().requires_grad_(False)


def _of_recipes(
    record: EnsembleRecord, folder: RunFolder, source: str, build: Callable[[], nn.Module]
) -> tuple[list[nn.Module], list[str], list[float]]:
    """Members, their ids and shares: the parent, if it is one, and children."""
    wanted = record.include_parent or any(needs_parent(m.recipe, m.weights) for m in record.members)
    parent = folder.load_tensors(record.parent) if wanted else {}
    members, ids, shares = [], [], []
    if record.include_parent:
        network = build()
        load_weights(network, parent, f"{source}: {record.parent.file}")
        members.append(network)
        ids.append("parent")
        shares.append(record.parent_share)
    for member in record.members:
        shape = record.input_shape
        members.append(
            restore(folder, build(), parent, member.recipe, member.weights, source, shape)
        )
        ids.append(member.recipe.id)
        shares.append(member.share)
    return members, ids, shares


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
        num_classes=data.num_classes,
        mean=data.preprocess.mean,
        std=data.preprocess.std,
        method=asdict(method),
        networks=tuple(files),
    )
    folder.write_json("ensemble.json", record.model_dump(mode="json"))


def _of_method(
    record: MethodRecord,
    folder: RunFolder,
    source: str,
    again: str,
    build: Callable[[], nn.Module],
) -> list[nn.Module]:
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
