"""Records of a benchmark as the command writes them, with numbers made up for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METHODS: dict[str, tuple[str, float, float, int, float, float, int]] = {
    # name: title, accuracy, NLL, members, FLOPs, dense FLOPs, passes
    "independent": ("single model", 0.880, 0.345, 1, 1.0, 1.0, 1),
    "dropout": ("dropout", 0.884, 0.330, 1, 1.0, 1.0, 1),
    "mc_dropout": ("MC dropout", 0.885, 0.324, 30, 1.0, 1.0, 30),
    "bagging": ("bagging", 0.872, 0.362, 8, 0.9, 0.9, 8),
    "sparse_r": ("sparse, random", 0.881, 0.338, 6, 0.81, 1.0, 6),
    "sparse_np": ("sparse, partitioned", 0.882, 0.336, 6, 0.81, 1.0, 6),
    "stochastic": ("stochastic", 0.883, 0.3345, 6, 0.81, 1.0, 6),
    "noisy": ("noisy", 0.881, 0.341, 8, 1.0, 1.0, 8),
    "snapshot": ("snapshot", 0.884, 0.327, 5, 1.0, 1.0, 5),
    "fge": ("fast geometric", 0.883, 0.329, 6, 1.0, 1.0, 6),
    "swa": ("SWA", 0.882, 0.333, 1, 1.0, 1.0, 1),
    "batch_ensemble": ("BatchEnsemble", 0.879, 0.343, 4, 1.01, 1.01, 4),
    "mimo": ("MIMO", 0.876, 0.350, 3, 1.04, 1.04, 1),
    "treenet": ("TreeNet", 0.881, 0.339, 3, 1.52, 1.52, 2),
    "dst": ("FreeTickets, DST", 0.868, 0.378, 3, 0.21, 1.0, 3),
    "edst": ("FreeTickets, EDST", 0.861, 0.55, 3, 0.2, 1.0, 3),
    "dense_8x": ("deep ensemble", 0.896, 0.291, 8, 8.0, 8.0, 8),
}
BUDGET = 16


def cell(
    task: str, row: str, column: str, seed: int, *, shift: bool = True, **test: float
) -> dict[str, Any]:
    """One finished cell; what is not given in `test` is drawn around the row's figures."""
    _, accuracy, nll, members, flops, dense, passes = METHODS.get(row, METHODS["independent"])
    draw = np.random.default_rng([seed, sum(map(ord, task + row + column))]).normal
    worse = 0.01 if column == "adam" else 0.0
    together = np.random.default_rng(seed).normal() * 0.002  # of one seed: the same data, draws
    nll += 2 * worse + together + 0.0015 * draw()
    accuracy += -worse - together / 2 + 0.0008 * draw()
    found = {"accuracy": accuracy, "nll": nll, "brier": 1.4 * (1 - accuracy)}
    found |= {"ece": 0.03 + 0.002 * draw(), "ece_floor": 0.0053, "ece_floor_std": 0.001}
    found |= {"nll_scaled": nll - 0.004, "temperature": 1.1, **test}
    corrupted = {"accuracy": accuracy - 0.2, "nll": 2.4 * nll, "ece": 0.11 + 0.004 * draw()}
    by_severity = {
        str(k): {"accuracy": accuracy - 0.07 * k, "nll": nll * (1 + 0.5 * k), "ece": 0.03 * k}
        for k in range(1, 6)
    }
    score = {"auroc": 0.9 + 0.01 * draw(), "fpr95": 0.4}
    scores = dict.fromkeys(("maximum_probability", "entropy", "mutual_information"), score)
    return {
        "id": f"{task}-{row}-{column}-{seed}",
        "task": task,
        "row": row,
        "column": column,
        "seed": seed,
        "error": None,
        "members": members,
        "test": found,
        "validation": {key: found[key] for key in ("accuracy", "nll", "brier")},
        "mean_member": {**found, "nll": nll + 0.02},
        "diversity": {"disagreement": 0.06, "kl": 0.08, "correlation": 0.95}
        if members > 1
        else {"disagreement": 0.0, "kl": 0.0, "correlation": 0.0},
        "shift": {"samples": 1000, **corrupted, "pooled": corrupted, "severities": by_severity}
        if shift
        else None,
        "ood": {"data": "digits", **scores} if shift else None,
        "cost": {
            "epochs": BUDGET * (8 if row == "dense_8x" else 1),
            "images": 20_000 * BUDGET,
            "flops": 3.4e11 * flops,
            "flops_dense": 3.4e11 * dense,
            "flops_vs_single": flops,
            "flops_dense_vs_single": dense,
            "seconds": 14 * dense + 0.3 * draw(),
            "device": "cpu",
            "parameters": round(269_322 * members * flops / dense),
            "passes": passes,
            "inference_flops_vs_single": float(passes),
            "bytes": 4 * 269_322 * members,
        },
    }


def failed(task: str, row: str, column: str, seed: int, error: str) -> dict[str, Any]:
    id = f"{task}-{row}-{column}-{seed}"
    return {"id": id, "task": task, "row": row, "column": column, "seed": seed, "error": error}


def record(
    rows: Sequence[str] = tuple(METHODS),
    tasks: Sequence[str] = ("Fashion-MNIST, MLP",),
    columns: Sequence[str] = ("adam", "decayed"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    failures: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
    shift: bool = True,
) -> dict[str, Any]:
    """A whole record.

    Args:
        failures: cell's id -> error.
        missing: ids of cells that are not done yet.
    """
    errors = failures or {}
    cells = []
    for task in tasks:
        for column in columns:
            for row in rows:
                for seed in seeds:
                    one = cell(task, row, column, seed, shift=shift)
                    if one["id"] in errors:
                        one = failed(task, row, column, seed, errors[one["id"]])
                    if one["id"] not in missing:
                        cells.append(one)
    return {
        "name": "small_budget",
        "budget": BUDGET,
        "seeds": list(seeds),
        "columns": list(columns),
        "tasks": [
            {
                "name": task,
                "data": {
                    "name": "fashion_mnist",
                    "train": 18_000,
                    "validation": 2_000,
                    "test": 10_000,
                    "input_shape": [1, 28, 28],
                    "num_classes": 10,
                },
                "model": "mlp 256 256",
            }
            for task in tasks
        ],
        "rows": [
            {
                "name": row,
                "title": METHODS[row][0],
                "source": "Somebody et al. 2020",
                "deviation": "cycles of 2 epochs in place of 40" if row == "snapshot" else "",
                "note": "8 times the budget" if row == "dense_8x" else "",
                "budget": BUDGET * (8 if row == "dense_8x" else 1),
            }
            for row in rows
        ],
        "chosen": {
            task: {row: {column: {"lr": 0.05} for column in columns} for row in rows[:3]}
            for task in tasks
        },
        "cells": cells,
    }
