"""The main job: config -> parent -> recipes -> children -> selection -> ensemble, in a run folder.

The driver submits jobs to a pool and reads reports. It does not know whether the pool is this
process or a cluster, and nothing it computes depends on that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from ray_subnets import configfile, datasets, environment, models
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.config import Config, ModelSection
from ray_subnets.data import Data, Preprocess
from ray_subnets.ensemble import Ensemble, greedy, right_class
from ray_subnets.flat import flatten
from ray_subnets.flops import Cost, forward_cost
from ray_subnets.groups import Section
from ray_subnets.population import (
    Pool,
    Report,
    Task,
)
from ray_subnets.recipes import ChildResult, ChildSpec, Fit, Job, Note, Result, Stored
from ray_subnets.selection import Decision, joined, select, share_of
from ray_subnets.spawning import KINDS, anatomy
from ray_subnets.stored import load_weights, needs_parent, restore, stored_result
from ray_subnets.summary import LABELS, busy_seconds, load_outputs, summarise
from ray_subnets.trust_region import check_target, described

Listener = Callable[[Report], None]
Select = Callable[[Mapping[str, Result]], list[Decision]]


def load_data(config: Config) -> Data:
    """The run's data set, on the CPU.

    Raises:
        ValueError: see `datasets.load`.
    """
    options = config.data.model_dump()
    return datasets.load(options.pop("name"), **options)


def build(config: Config, data: Data) -> nn.Module:
    """The run's network, checked to fit data and recipes.

    Raises:
        ValueError: unknown network or option, or nothing in it to mask.
    """
    model = models.build(
        config.model.name,
        data.input_shape,
        data.num_classes,
        config.model.options,
        seed=0,
        channels_last=config.resources.channels_last,
    )
    for job in config.solve_jobs():
        check_target(job.kl_target, data.num_classes)
    seen = set()
    for spec in config.specs():
        key = (spec.mask_classifier, spec.structure if spec.structure in KINDS else "weight")
        if key not in seen:
            seen.add(key)
            anatomy(model, spec, data.input_shape)
    return model


def jobs(config: Config) -> list[Job]:
    """Every job of a run: parent, single model (if any), children."""
    single = config.single_job()
    return [
        config.parent_job(),
        *([single] if single else []),
        *config.singles_jobs(),
        *config.solve_jobs(),
        *config.specs(),
    ]


def prepare(config: Config, data: Data, folder: RunFolder) -> Cost:
    """Check that the run can be done, and write what does not depend on it.

    Raises:
        ValueError: the network does not fit.
    """
    cost = forward_cost(build(config, data), data.input_shape)
    folder.write(CONFIG, config.to_yaml().encode())
    folder.write_json("environment.json", environment.describe())
    labels = {"validation": data.validation.labels.numpy(), "test": data.test.labels.numpy()}
    folder.save_arrays(LABELS, labels)
    return cost


def task_of(config: Config, folder: RunFolder) -> Task:
    return config.task(str(folder))


def run(
    config: Config,
    data: Data,
    folder: RunFolder,
    pool: Pool,
    *,
    cost: Cost,
    listen: Listener = lambda report: None,
    choose: Select | None = None,
) -> dict[str, Any]:
    """Do every job that has no result yet; select; write `ensemble.json` and `result.json`.

    Args:
        listen: called with every report, for progress and logs.
        choose: decisions from results; default `selection.select`. (On Ray, the selection actor.)

    Returns:
        The content of `result.json`.

    Raises:
        ValueError: the parent diverged, or no child is left. What was computed stays in the folder.
    """
    began = time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads)
    try:
        results = _work(config, folder, pool, listen)
        specs = config.specs(results)
        decisions = (choose or _choose(config))({spec.id: results[spec.id] for spec in specs})
        trace = None
        if config.select.method == "greedy":
            trace = _greedy(config, folder, decisions)
            decisions = joined(decisions, trace)
        if not any(decision.selected for decision in decisions):
            raise ValueError(f"children: every child failed; the first: {decisions[0].why}")
        _write_members(config, data, folder, specs, results, decisions)
        start = min(result.started for result in results.values())
        record = summarise(
            folder,
            how=config.combine,
            by=config.select.by,
            include_parent=config.include_parent,
            specs=specs,
            results=results,
            decisions=decisions,
            cost=cost,
            times={"start": start, "wall_seconds": busy_seconds(results.values())},
        )
        if trace is not None:
            record["ensemble"]["trace"] = [{"id": id, "validation_nll": nll} for id, nll in trace]
        if config.solve_jobs():
            size = len(data.validation)
            record["trust_region"] = [
                described(job, results[job.id], size) for job in config.solve_jobs()
            ]
        record["faults"] = [asdict(fault) for fault in pool.faults]
        record["name"], record["seed"] = config.name, config.seed
        record["data"] = _describe_data(data)
        record["environment"] = folder.read_json("environment.json") | {
            "driver_seconds": time.time() - began
        }
        folder.write_json("result.json", record)
        return record
    finally:
        torch.set_num_threads(threads)


def _work(config: Config, folder: RunFolder, pool: Pool, listen: Listener) -> dict[str, Result]:
    """Run parent, single model and children; finished ones are read from the folder."""
    results: dict[str, Result] = {}
    solved = {job.id for job in config.solve_jobs()}
    submitted: set[str] = set()

    def submit(job: Job) -> None:
        submitted.add(job.id)
        known = stored_result(folder, job, lambda line: listen(Note(job.id, line)))
        if known is not None:
            results[job.id] = known
            listen(known)
        else:
            pool.submit(job)

    def spawn_children() -> None:
        stored = results["parent"].weights
        assert stored
        pool.share(flatten(folder.load_tensors(stored)))
        for job in config.solve_jobs():  # first: others wait for them
            submit(job)
        spawn_solved()

    def spawn_solved() -> None:
        """Submit the children whose recipes are whole."""
        specs = [s for s in config.specs(results) if s.solved and s.id not in submitted]
        # Longest first, so that the last child to finish is a short one.
        for spec in sorted(specs, key=lambda spec: (-spec.epochs, spec.id)):
            submit(spec)

    submit(config.parent_job())
    for job in jobs(config):
        if isinstance(job, Fit) and job.id != "parent":
            submit(job)
    if "parent" in results:
        spawn_children()
    for report in pool.reports():
        listen(report)
        if isinstance(report, Result):
            results[report.id] = report
            if report.id == "parent":
                spawn_children()
            elif report.id in solved:
                if report.error:
                    raise ValueError(f"{report.id}: {report.error}")
                spawn_solved()
    return results


def _choose(config: Config) -> Select:
    def choose(results: Mapping[str, Result]) -> list[Decision]:
        return decide(results, config.select.count, config.select.by)

    return choose


def _greedy(
    config: Config, folder: RunFolder, decisions: Sequence[Decision]
) -> list[tuple[str, float]]:
    """Forward selection among children that did not fail, on validation data.

    Any of them may join at any step, so every child's probabilities of the right class are kept
    in memory, `(K, N)`; of their outputs one child's at a time.
    """
    alive = sorted(decision.id for decision in decisions if decision.rank is not None)
    if not alive:
        return []
    right = []
    for id in alive:
        outputs = load_outputs(folder, [id], "validation")
        right.append(right_class(outputs.logits[0], outputs.labels))
    return [(alive[i], nll) for i, nll in greedy(torch.stack(right), config.select.count)]


def decide(results: Mapping[str, Result], count: int | None, by: str) -> list[Decision]:
    """`selection.select` of children's results."""
    return select(
        {id: r.fitness if isinstance(r, ChildResult) else None for id, r in results.items()},
        count,
        by=by,
        errors={id: r.error for id, r in results.items() if r.error},
    )


def _describe_data(data: Data) -> dict[str, Any]:
    return {
        "name": data.name,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
        "input_shape": list(data.input_shape),
        "num_classes": data.num_classes,
    }


# --- the ensemble on disk -----------------------------------------------------------------------


class MemberRecord(Section):
    """One member in `ensemble.json`."""

    recipe: ChildSpec
    weights: Stored | None
    """None: the recipe and the parent are enough"""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """weight in a fitness-weighted mean, before all are made to sum to one"""


class EnsembleRecord(Section):
    """`ensemble.json`."""

    format: Literal[1]
    model: ModelSection
    input_shape: tuple[int, ...]
    num_classes: Annotated[int, Field(ge=2)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    combine: Literal["probabilities", "weighted", "logits", "vote"]
    include_parent: bool
    parent: Stored
    parent_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    members: Annotated[tuple[MemberRecord, ...], Field(min_length=1)]


def _write_members(
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
        record = EnsembleRecord.model_validate_json(folder.read("ensemble.json"), strict=True)
    except ValidationError as error:
        raise ValueError(f"{configfile.one_line(error, source)}; {again}") from None

    def build() -> nn.Module:
        try:
            name, options = record.model.name, record.model.options
            return models.build(name, record.input_shape, record.num_classes, options, seed=0)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; {again}") from None

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
    preprocess = Preprocess(record.mean, record.std)
    ensemble = Ensemble(
        members, ids=ids, preprocess=preprocess, combine=record.combine, weights=shares
    )
    return ensemble.to(device).eval().requires_grad_(False)


def config_of(folder: RunFolder, overrides: Sequence[str] = ()) -> Config:
    """The configuration a run folder was made with.

    Raises:
        ValueError: it is damaged.
    """
    source = f"{folder}/{CONFIG}"
    try:
        text = folder.read(CONFIG).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{source}: not a text file; restore it from a copy") from None
    return configfile.parse(text, source, overrides)
