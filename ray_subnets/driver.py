"""The main job: config -> parent -> recipes -> children -> selection -> ensemble, in a run folder.

The driver submits jobs to a pool and reads reports. It does not know whether the pool is this
process or a cluster, and nothing it computes depends on that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import checks, configfile, datasets, environment, members, models, pretrained
from ray_subnets.blueprint import Blueprint
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.combining import greedy, right_class
from ray_subnets.config import GIVEN, Config
from ray_subnets.data import Data
from ray_subnets.flat import flatten
from ray_subnets.flops import Cost, forward_cost
from ray_subnets.pools import Pool
from ray_subnets.population import Report, Task
from ray_subnets.recipes import ChildResult, Fit, Job, Note, Result, RunJob
from ray_subnets.regression_scores import RegressionScores
from ray_subnets.selection import Decision, joined, select
from ray_subnets.stored import stored_result
from ray_subnets.summary import LABELS, Scores, busy_seconds, load_outputs, summarise
from ray_subnets.trust_region import described

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
        input_dtype=data.input_dtype,
    )
    checks.fits(config, data, model)
    return model


def given_weights(config: Config, data: Data, model: nn.Module) -> dict[str, Tensor] | None:
    """What `weights` names, checked to fit; None if nothing.

    Raises:
        ValueError: it cannot be read, or is of another network or of other classes.
    """
    if config.weights is None:
        return None
    folders = len(data.train.labels.unique())
    if config.data.name in ("imagenet", "imagefolder") and folders != data.num_classes:
        raise ValueError(
            f"data.num_classes: {data.num_classes}, but there are {folders} class folders, whose "
            "numbers are the labels: trained weights would mean other classes; give all folders"
        )
    found = pretrained.read(config.weights, config.model.name)
    return pretrained.fitted(model, found, config.weights)


def jobs(config: Config) -> list[RunJob]:
    """Every job of a run: parent, single model (if any), children."""
    single = config.single_job()
    return [
        config.parent_job(),
        *([single] if single else []),
        *config.singles_jobs(),
        *config.solve_jobs(),
        *config.specs(),
    ]


def prepare(
    config: Config,
    data: Data,
    folder: RunFolder,
    network: Blueprint | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Cost:
    """Check that the run can be done, and write what does not depend on it.

    Args:
        network: the run's network, if it is not built by name.
        weights: `given_weights`, if they were read already. A run that goes on has them in its
            folder.

    Raises:
        ValueError: the network does not fit.
    """
    if network is None:
        model = build(config, data)
    else:
        checks.fits(config, data, model := network.build())
    cost = forward_cost(model, data.input_shape, data.input_dtype)
    if config.weights is not None and not folder.exists(GIVEN):
        folder.save_tensors(GIVEN, weights or given_weights(config, data, model) or {})
    checks.same(data, folder, model)
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
    """`steps` to the end.

    Args:
        listen: called with every report, for progress and logs.
    """
    return heard(steps(config, data, folder, pool, cost=cost, choose=choose), listen)


def heard(doing: Generator[Report, None, dict[str, Any]], listen: Listener) -> dict[str, Any]:
    """Do all of it, and tell every report; returns what it returns."""
    while True:
        try:
            report = next(doing)
        except StopIteration as end:
            record: dict[str, Any] = end.value
            return record
        listen(report)


def steps(
    config: Config,
    data: Data,
    folder: RunFolder,
    pool: Pool,
    *,
    cost: Cost,
    choose: Select | None = None,
) -> Generator[Report, None, dict[str, Any]]:
    """Do every job that has no result yet; select; write `ensemble.json` and `result.json`.

    Yields reports; the generator's return value is the content of `result.json`.

    Args:
        choose: decisions from results; default `selection.select`. (On Ray, the selection actor.)

    Raises:
        ValueError: the parent diverged, or no child is left. What was computed stays in the folder.
    """
    began = time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads)
    try:
        results = yield from _work(config, folder, pool)
        specs = config.specs(results)
        decisions = (choose or _choose(config))({spec.id: results[spec.id] for spec in specs})
        trace = None
        if config.select.method == "greedy":
            trace = _greedy(config, folder, decisions)
            decisions = joined(decisions, trace)
        if not any(decision.selected for decision in decisions):
            raise ValueError(f"children: every child failed; the first: {decisions[0].why}")
        start = min(result.started for result in results.values())
        scores: Scores
        if config.head == "classes":
            scores = Scores(folder, config.combine, config.select.by)
        else:
            scores = RegressionScores(folder, config.head, config.select.by)
        record = summarise(
            folder,
            scores=scores,
            include_parent=config.include_parent,
            specs=specs,
            results=results,
            decisions=decisions,
            cost=cost,
            times={"start": start, "wall_seconds": busy_seconds(results.values())},
        )
        temperature = record["ensemble"]["test"].get("temperature")
        members.write(config, data, folder, specs, results, decisions, temperature)
        if trace is not None:
            record["ensemble"]["trace"] = [{"id": id, "validation_nll": nll} for id, nll in trace]
        if config.solve_jobs():
            size = len(data.validation)
            record["trust_region"] = [
                described(job, results[job.id], size) for job in config.solve_jobs()
            ]
        record["faults"] = [asdict(fault) for fault in pool.faults]
        record["name"], record["seed"], record["head"] = config.name, config.seed, config.head
        record["data"] = describe_data(data)
        record["environment"] = folder.read_json("environment.json") | {
            "driver_seconds": time.time() - began
        }
        folder.write_json("result.json", record)
        return record
    finally:
        torch.set_num_threads(threads)


def _work(
    config: Config, folder: RunFolder, pool: Pool
) -> Generator[Report, None, dict[str, Result]]:
    """Run parent, single model and children; finished ones are read from the folder."""
    results: dict[str, Result] = {}
    solved = {job.id for job in config.solve_jobs()}
    submitted: set[str] = set()

    def submit(job: Job) -> Iterator[Report]:
        submitted.add(job.id)
        said: list[Note] = []
        known = stored_result(folder, job, lambda line: said.append(Note(job.id, line)))
        yield from said
        if known is not None:
            results[job.id] = known
            yield known
        else:
            pool.submit(job)

    def spawn_children() -> Iterator[Report]:
        stored = results["parent"].weights
        assert stored
        pool.share(flatten(folder.load_tensors(stored)))
        for job in config.solve_jobs():  # first: others wait for them
            yield from submit(job)
        yield from spawn_solved()

    def spawn_solved() -> Iterator[Report]:
        """Submit the children whose recipes are whole."""
        specs = [s for s in config.specs(results) if s.solved and s.id not in submitted]
        # Longest first, so that the last child to finish is a short one.
        for spec in sorted(specs, key=lambda spec: (-spec.epochs, spec.id)):
            yield from submit(spec)

    yield from submit(config.parent_job())
    for job in jobs(config):
        if isinstance(job, Fit) and job.id != "parent":
            yield from submit(job)
    if "parent" in results:
        yield from spawn_children()
    for report in pool.reports():
        yield report
        if isinstance(report, Result):
            results[report.id] = report
            if report.id == "parent":
                yield from spawn_children()
            elif report.id in solved:
                if report.error:
                    raise ValueError(f"{report.id}: {report.error}")
                yield from spawn_solved()
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


def describe_data(data: Data) -> dict[str, Any]:
    """What a data set is, in a record."""
    return {
        "name": data.name,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
        "input_shape": list(data.input_shape),
        **({"test_is_validation": True} if data.test is data.validation else {}),
        **({} if data.input_dtype.is_floating_point else {"input_dtype": "int64"}),
        ("outputs" if data.train.labels.is_floating_point() else "num_classes"): data.num_classes,
    }


def config_of(folder: RunFolder, overrides: Sequence[str] = ()) -> Config:
    """The configuration a run folder was made with.

    Raises:
        ValueError: it is damaged.
    """
    return configfile.parse(config_text(folder), f"{folder}/{CONFIG}", overrides)


def config_text(folder: RunFolder) -> str:
    """The YAML of a run folder.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return folder.read(CONFIG).decode()
    except UnicodeDecodeError:
        source = f"{folder}/{CONFIG}"
        raise ValueError(f"{source}: not a text file; restore it from a copy") from None
