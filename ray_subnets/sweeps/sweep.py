"""From the trials of a sweep to `sweep.json`: means, trust region, the chosen cell. No Ray."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contourpy import contour_generator

from ray_subnets import configfile
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.config import Config
from ray_subnets.sweeps.sweepfile import Range, Sweep, cell_id, parse, told
from ray_subnets.sweeps.trials import stored_trial

RECORD = "sweep.json"
AVERAGED = (
    *("kl", "kl_std", "mse", "mse_std", "accuracy", "nll", "ensemble_accuracy", "ensemble_nll"),
    *("mean_accuracy", "vote_accuracy", "parent_accuracy", "parent_nll", "sigma_solved"),
)
SLICES = 24  # heat maps of two keys, at most


def objective(seeds: Sequence[Mapping[str, float]], by: str, kl_bound: float | None) -> float:
    """What a search maximises: the mean over seeds, minus how far KL is beyond its bound.

    An accuracy, or a negative NLL; a cell at twice the bound loses 1.
    """
    value = _mean(seeds, by) * (-1 if by.endswith("nll") else 1)
    if kl_bound is not None:
        value -= max(0.0, _mean(seeds, "kl") / kl_bound - 1)
    return value


def _mean(records: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def averaged(seeds: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over seeds and its standard error (0 for one seed), of every number."""
    means, errors = {}, {}
    for key in AVERAGED:
        if not seeds or not all(key in record for record in seeds):
            continue
        values = [float(record[key]) for record in seeds]
        means[key] = sum(values) / len(values)
        errors[key] = 0.0
        if len(values) > 1 and math.isfinite(means[key]):
            variance = sum((v - means[key]) ** 2 for v in values) / (len(values) - 1)
            errors[key] = math.sqrt(variance / len(values))
    return means, errors


def stored_seeds(
    folder: RunFolder, sweep: Sweep, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What is in the folder of a cell, in the order of the sweep's seeds."""
    found = (stored_trial(folder, values, seed) for seed in sweep.section.seeds)
    return [record for record in found if record is not None]


def collect(sweep: Sweep, cells: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record of every cell.

    Args:
        cells: id -> `values`, `seeds` (records that are there), `status` (waiting, running, done,
            stopped, failed), `error`, `worker`.
    """
    trials = []
    bound = sweep.section.kl_bound
    for id, cell in cells.items():
        means, errors = averaged(cell["seeds"])
        trials.append(
            {
                "id": id,
                "values": dict(cell["values"]),
                "status": cell["status"],
                "error": cell.get("error"),
                "worker": cell.get("worker"),
                **({"lost": True} if cell.get("lost") else {}),
                "seeds": [{k: v for k, v in one.items() if k != "values"} for one in cell["seeds"]],
                "mean": means,
                "stderr": errors,
                "inside": (bound is None or means["kl"] <= bound) if means else None,
            }
        )
    return trials


def choose(trials: Sequence[Mapping[str, Any]], by: str) -> str | None:
    """The best finished cell whose KL is inside the bound; ties go to the lower ensemble NLL.

    A cell that a scheduler stopped is not compared: it has fewer seeds than the others.
    """
    sign = 1 if by.endswith("nll") else -1
    fit = [t for t in trials if t["status"] == "done" and t["inside"] and not _failures(t)]
    best = min(
        fit,
        key=lambda t: (sign * t["mean"][by], t["mean"]["ensemble_nll"], t["id"]),
        default=None,
    )
    return best["id"] if best else None


def _failures(trial: Mapping[str, Any]) -> int:
    return sum(seed["failed"] for seed in trial["seeds"])


def line_of_fit(trials: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Accuracy of the mean child minus its parent's, against KL: least squares within 1 nat.

    Section 4.2.1: "roughly linear". None with fewer than three cells, or without any spread.
    """
    points = [
        (t["mean"]["kl"], t["mean"]["accuracy"] - t["mean"]["parent_accuracy"])
        for t in trials
        if t["mean"] and t["mean"]["kl"] <= 1.0
    ]
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    if len(points) < 3 or x.std() == 0 or y.std() == 0:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "correlation": float(np.corrcoef(x, y)[0, 1]),
        "n": len(points),
    }


def contour(kl: np.ndarray, bound: float) -> list[list[list[float]]]:
    """Where KL is `bound`: lines of (column, row) in cells, interpolated in log KL.

    Args:
        kl: `(rows, columns)`; NaN where there is no number.
    """
    if min(kl.shape) < 2:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(np.where(kl > 0, kl, np.where(kl == 0, 1e-12, np.nan)))
    level[~np.isfinite(level)] = np.nan
    found = contour_generator(z=np.ma.masked_invalid(level)).lines(math.log(bound))
    return [np.asarray(line).round(4).tolist() for line in found]


def maps(sweep: Sweep, trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Slices of the grid along its two longest keys: which trial is where, and the contour."""
    grid = {k: list(v) for k, v in sweep.section.keys.items() if not isinstance(v, Range)}
    if len(grid) < len(sweep.section.keys) or sweep.section.search.name != "grid":
        return []
    order = sorted(grid, key=lambda key: -len(grid[key]))
    x, y = order[0], order[1] if len(order) > 1 else None
    others = [key for key in grid if key not in (x, y)]
    by_id = {trial["id"]: trial for trial in trials}
    slices = []
    for values in itertools.islice(itertools.product(*(grid[key] for key in others)), SLICES):
        fixed = dict(zip(others, values, strict=True))
        cells = [
            [cell_id(fixed | {x: column} | ({y: row} if y else {})) for column in grid[x]]
            for row in (grid[y] if y else [None])
        ]
        kl = np.array([[by_id[id]["mean"].get("kl", math.nan) for id in row] for row in cells])
        bound = sweep.section.kl_bound
        slices.append(
            {
                "x": x,
                "y": y,
                "columns": grid[x],
                "rows": grid[y] if y else [],
                "fixed": fixed,
                "title": told(fixed),
                "cells": cells,
                "contour": contour(kl, bound) if bound else [],
            }
        )
    return slices


def summarise(
    sweep: Sweep, cells: Mapping[str, Mapping[str, Any]], *, state: str, **more: Any
) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        state: training parents, running, finished or stopped.
        more: `seconds`, `links`, `environment`, ...
    """
    trials = collect(sweep, cells)
    section = sweep.section
    chosen = choose(trials, section.by)
    by_id = {trial["id"]: trial for trial in trials}
    values = by_id[chosen]["values"] if chosen else None
    return {
        "format": 1,
        "name": sweep.name,
        "state": state,
        "keys": {
            key: {"values": None if isinstance(v, Range) else list(v), "paths": sweep.paths(key)}
            for key, v in section.keys.items()
        },
        "seeds": list(section.seeds),
        "search": section.search.name,
        "scheduler": section.scheduler.name,
        "by": section.by,
        "kl_bound": section.kl_bound,
        "chosen": chosen,
        "chosen_settings": sweep.settings(values) if values else None,
        "trials": trials,
        "fit": line_of_fit(trials),
        "maps": maps(sweep, trials),
        **more,
    }


def write(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """`sweep.json`: strict JSON, so that a browser reads it; infinite numbers are null."""
    folder.write(RECORD, (json.dumps(_strict(record), allow_nan=False) + "\n").encode())


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_sweep(root: str) -> tuple[RunFolder, Sweep]:
    """The folder of a sweep that was begun.

    Raises:
        ValueError: it is none, or damaged.
    """
    folder = RunFolder(root)
    if not folder.exists(CONFIG):
        raise ValueError(f"SWEEP: {root} is not a sweep's folder (no {CONFIG} in it)")
    return folder, parse(folder.read(CONFIG).decode(), f"{folder}/{CONFIG}")


def chosen_overrides(root: str) -> dict[str, Any]:
    """The settings that a finished sweep chose: path -> value.

    Raises:
        ValueError: no such sweep, it is not finished, or none of its cells can be chosen.
    """
    folder = RunFolder(root)
    if not folder.exists(RECORD):
        raise ValueError(f"--from-sweep: {root} has no {RECORD}; is it a sweep's folder?")
    record = folder.read_json(RECORD)
    found = record.get("chosen_settings")
    if not isinstance(found, dict):
        bound = record.get("kl_bound")
        why = f" with a KL within {bound:g}" if bound else ""
        raise ValueError(
            f"--from-sweep: {root} chose nothing: no cell is finished{why}; finish it with "
            f"'ray-subnets sweep {root}', or sweep smaller values"
        )
    left = sum(trial["status"] in ("waiting", "running") for trial in record.get("trials", ()))
    if left:
        raise ValueError(
            f"--from-sweep: {root} is not finished, {left} cells are left, and another may be "
            f"better; go on with 'ray-subnets sweep {root}'"
        )
    return found


def run_config(name: str, root: str, overrides: Sequence[str] = ()) -> Config:
    """A run's configuration with the settings that a sweep chose; `overrides` come last.

    Args:
        name: a run's file, or the sweep's own; of the latter the run is called NAME-chosen.

    Raises:
        ValueError: see `chosen_overrides`; or the settings have no place in this run.
    """
    path = configfile.find(name)
    record = configfile.record_of(configfile.text_of(path), path.name)
    if record.pop("sweep", None) is not None:
        record["name"] = f"{record.get('name')}-chosen"
    for key, value in chosen_overrides(root).items():
        try:
            configfile.assign(record, key, value)
        except ValueError as error:
            raise ValueError(f"--from-sweep: {path.name} has no place for {key}: {error}") from None
    configfile.override(record, overrides)
    return configfile.checked(record, path.name)
