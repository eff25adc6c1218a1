"""A benchmark: settings chosen on validation data, then every method with every seed, one record.

The driver of a benchmark submits cells to a pool and reads reports, as that of a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ray_subnets import baselines, driver, environment
from ray_subnets.benchmark import cells
from ray_subnets.benchmark.benchmarkfile import Benchmark, Row, TaskSection
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.data import Data
from ray_subnets.pools import Pool
from ray_subnets.population import Report, Task
from ray_subnets.recipes import Cell, Job, Note, Result, Shifted
from ray_subnets.stored import stored_result

MakePool = Callable[[Task, Data, int], AbstractContextManager[Pool]]
"""(task, data, number of jobs) -> a pool whose workers are `cells.CellWorker`s."""
RECORD = "benchmark.json"
_TITLES = {
    "noisy": "noisy subnetworks",
    "sparse": "sparse subnetworks",
    "stochastic": "stochastic subnetworks",
}
_OURS = "this project's method, as `ray-subnets run` does it"


def prepare(benchmark: Benchmark) -> dict[str, Data]:
    """Load every task's data and try every method on its network, before anything is computed.

    Raises:
        ValueError: data that are not there, a network that does not fit data or method.
    """
    loaded: dict[str, Data] = {}
    for task in benchmark.tasks:
        config = benchmark.config(task)
        data = driver.load_data(config)
        if data.num_classes < 2:
            raise ValueError(f"tasks.{task.name}: {data.num_classes} class; a classifier needs two")
        driver.build(config, data)
        for row, column in benchmark.places():
            try:
                first = benchmark.finals(task, row, column, benchmark.grid(row, column)[0])[0]
                if "run" in first.method:
                    driver.build(benchmark.run_of(first), data)
                else:
                    method = baselines.parse(first.method, row.id)
                    method.network(lambda seed: driver.build(config, data), 0)  # noqa: B023
            except ValueError as error:
                raise ValueError(f"rows.{row.id} on {task.model.name}: {error}") from None
        loaded[task.name] = data
    return loaded


def expected(benchmark: Benchmark) -> list[Job]:
    """Every cell there will be, for progress; settings that are chosen later are not known yet."""
    jobs: list[Job] = []
    for task in benchmark.tasks:
        for row, column in benchmark.places():
            for tried in benchmark.searches(task, row, column):
                jobs += tried
            for cell in benchmark.finals(task, row, column, benchmark.grid(row, column)[0]):
                shifted = benchmark.shifted(cell)
                jobs += [cell, shifted] if shifted else [cell]
    return jobs


@dataclass
class _Place:
    """A row and column of a task, on its way."""

    row: Row
    column: str
    tried: list[list[Cell]]
    settings: dict[str, Any] | None = None
    finals: list[Cell] = field(default_factory=list)
    error: str = ""


def run(
    benchmark: Benchmark,
    data: dict[str, Data],
    folder: RunFolder,
    make_pool: MakePool,
    *,
    listen: Callable[[Report], None] = lambda report: None,
) -> dict[str, Any]:
    """Every cell that has no result yet; returns the content of `benchmark.json`.

    Args:
        data: by task, from `prepare`.
    """
    folder.write(CONFIG, benchmark.to_yaml().encode())
    folder.write_json("environment.json", environment.describe())
    results: dict[str, Result] = {}
    places: dict[str, list[_Place]] = {}
    for task in benchmark.tasks:
        places[task.name] = [
            _Place(row, column, benchmark.searches(task, row, column))
            for row, column in benchmark.places()
        ]
        work = benchmark.config(task).task(str(folder))
        jobs = sum(sum(map(len, place.tried)) + len(benchmark.seeds) for place in places[task.name])
        with make_pool(work, data[task.name], jobs) as pool:
            for report in _task(benchmark, task, places[task.name], folder, pool, results):
                listen(report)
                if isinstance(report, Result):
                    folder.write_json(RECORD, _record(benchmark, data, places, results, folder))
    record = _record(benchmark, data, places, results, folder)
    folder.write_json(RECORD, record)
    return record


def _task(
    benchmark: Benchmark,
    task: TaskSection,
    places: Sequence[_Place],
    folder: RunFolder,
    pool: Pool,
    results: dict[str, Result],
) -> Generator[Report, None, None]:
    """Search and then make every cell of a task, each row as soon as its settings are chosen."""

    wanted: dict[str, Cell] = {}

    def submit(job: Cell | Shifted) -> Generator[Report, None, None]:
        said: list[Note] = []
        known = stored_result(folder, job, lambda line: said.append(Note(job.id, line)))
        yield from said
        if known is None:
            pool.submit(job)
        else:
            yield from done(known)

    def done(result: Result) -> Generator[Report, None, None]:
        results[result.id] = result
        yield result
        if result.id in wanted and not result.error:
            job = benchmark.shifted(wanted[result.id])
            if job:
                yield from submit(job)

    def decide() -> Generator[Report, None, None]:
        # Rows that take another's settings come after it, wherever the file has them.
        for place in sorted(places, key=lambda place: bool(place.row.settings_of)):
            if place.settings is None and not place.error:
                settings = _choose(benchmark, place, places, results)
                if settings is None:
                    continue
                place.settings = settings
                place.finals = benchmark.finals(task, place.row, place.column, settings)
                for cell in place.finals:
                    wanted[cell.id] = cell
                    yield from submit(cell)

    for place in places:
        for group in place.tried:
            for cell in group:
                yield from submit(cell)
    yield from decide()
    for report in pool.reports():
        if isinstance(report, Result):
            yield from done(report)
            yield from decide()
        else:
            yield report


def _choose(
    benchmark: Benchmark, place: _Place, places: Sequence[_Place], results: dict[str, Result]
) -> dict[str, Any] | None:
    """The settings with the best mean validation NLL; None until all were tried."""
    if place.row.settings_of:
        for other in places:
            if (other.row.id, other.column) == (place.row.settings_of, place.column):
                place.error = other.error
                return other.settings
    grid = benchmark.grid(place.row, place.column)
    if not place.tried:
        return grid[0]
    if any(cell.id not in results for group in place.tried for cell in group):
        return None
    means: list[tuple[float, int]] = []
    for i, group in enumerate(place.tried):
        found = [results[cell.id] for cell in group]
        if not any(result.error for result in found):
            means.append((sum(one.validation["nll"] for one in found) / len(found), i))
    if means:
        return grid[min(means)[1]]
    first = results[place.tried[0][0].id].error
    place.error = f"no setting of its search worked; the first: {first}"
    return None


def _record(
    benchmark: Benchmark,
    data: dict[str, Data],
    places: dict[str, list[_Place]],
    results: dict[str, Result],
    folder: RunFolder,
) -> dict[str, Any]:
    """`benchmark.json`."""
    done: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    tried: list[dict[str, Any]] = []
    for task, of_task in places.items():
        for place in of_task:
            if place.settings:
                chosen.setdefault(task, {}).setdefault(place.row.id, {})[place.column] = (
                    place.settings
                )
            grid = benchmark.grid(place.row, place.column)
            for settings, group in zip(grid, place.tried, strict=False):
                for cell in group:
                    if cell.id in results:
                        tried.append(
                            {"task": task, "row": cell.row, "column": cell.column}
                            | {"seed": cell.seed, "settings": settings}
                            | _outcome(results[cell.id])
                        )
            where = {"task": task, "row": place.row.id, "column": place.column}
            for seed in benchmark.seeds if place.error else ():
                done.append({"id": "", **where, "seed": seed, "error": place.error})
            for cell in place.finals:
                if cell.id in results:
                    named = {"id": cell.id, **where, "seed": cell.seed}
                    done.append(named | _measured(benchmark, folder, cell, results))
    return {
        "name": benchmark.name,
        "budget": benchmark.budget,
        "seeds": list(benchmark.seeds),
        "columns": list(benchmark.columns),
        "tasks": [
            {
                "name": task.name,
                "data": driver.describe_data(data[task.name]),
                "model": task.model.name,
            }
            for task in benchmark.tasks
        ],
        "rows": [_describe(benchmark, row) for row in benchmark.rows],
        "chosen": chosen,
        "tried": tried,
        "cells": done,
        "environment": folder.read_json("environment.json"),
    }


def _outcome(result: Result) -> dict[str, Any]:
    return {"error": result.error, "validation": result.validation}


def _measured(
    benchmark: Benchmark, folder: RunFolder, cell: Cell, results: dict[str, Result]
) -> dict[str, Any]:
    """A cell's numbers; what it cost is in units of a single model of the benchmark's budget."""
    result = results[cell.id]
    if result.error:
        return {"error": result.error}
    try:
        found = cells.read(folder, cell)
    except ValueError as error:
        return {"error": str(error)}
    found.pop("cell")
    for key in ("flops_vs_single", "flops_dense_vs_single"):
        found["cost"][key] *= cell.budget / benchmark.budget
    shifted = benchmark.shifted(cell)
    failed = results[shifted.id].error if shifted and shifted.id in results else None
    return {"error": None, "shift": None, "ood": None, "shift_error": failed} | found


def _describe(benchmark: Benchmark, row: Row) -> dict[str, Any]:
    method = baselines.METHODS.get(row.method)
    return {
        "name": row.id,
        "title": row.title or (method.title if method else _TITLES.get(row.method, row.method)),
        "source": method.source if method else _OURS,
        "deviation": method.deviation if method else "",
        "note": row.note,
        "budget": row.budget or benchmark.budget,
    }
