"""What a run's schedules were, step by step: rate, momentum, who takes part (Figs 5.3, 6.1).

    python -m analysis.schedules runs/quickstart

From the recipes of the run, by the code that trained it: nothing is trained again. Children whose
curves are the same are one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from ray_subnets import acting, driver, spawning, stochastic, supervised
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED, SKY
from ray_subnets.recipes import ChildSpec, Fit, Training

_COLOURS, _DASHES = (BLUE, ORANGE, RED, GREEN, SKY), ("-", "--", ":", "-.")  # 20 pairs


def rates(training: Training, images: int) -> pd.DataFrame:
    """Learning rate and momentum of every optimizer step, over epochs.

    Args:
        images: of one epoch.
    """
    steps = -(-images // training.batch_size)
    optimizer = supervised.make_optimizer(torch.nn.Linear(1, 1), training)
    rows = []
    for step in range(steps * training.epochs):
        lr = supervised.set_rates(optimizer, training, step, steps * training.epochs)
        group = optimizer.param_groups[0]
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        rows.append({"step": step, "epoch": step / steps, "lr": lr, "momentum": momentum})
    return pd.DataFrame(rows)


def chances(run: Run, spec: ChildSpec, epochs: np.ndarray) -> pd.DataFrame:
    """Mean chance that a weight takes part in a forward pass, inside and outside the subnetwork.

    Args:
        epochs: when, `(T,)`, fractions allowed.

    Returns:
        A row for each: `temperature` (tau times what is left of it; empty where there is none),
        `inside`, `outside`.
    """
    temperature = np.full(len(epochs), np.nan)
    inside, outside = np.ones(len(epochs)), np.zeros(len(epochs))
    if spawning.anneals(spec):
        parent = run.parent
        body = spawning.anatomy(parent, spec, run.record.input_shape, run.record.dtype)
        sub = spawning.subnetwork(spec, body, parent.state_dict())
        start = acting.probabilities(spec, sub)
        mask = torch.cat([sub.target[name].flatten() for name in start])
        p = torch.cat([start[name].flatten() for name in start]).double()
        left = np.array(
            [
                stochastic.anneal(float(t), start=1.0, epochs=spec.anneal_epochs, shape=spec.anneal)
                for t in epochs
            ]
        )
        inside = 1 + left * (float(p[mask].mean()) - 1)
        outside = left * float(p[~mask].mean()) if not mask.all() else outside
        if spec.probabilities == "temperature":
            temperature = spec.tau * left
    elif spec.prune_epochs:  # in equal numbers at the start of each epoch
        outside = 1 - np.minimum(1, (np.floor(epochs) + 1) / spec.prune_epochs)
    return pd.DataFrame({"temperature": temperature, "inside": inside, "outside": outside})


def curves(run: Run) -> pd.DataFrame:
    """Every network's curves, one row a step: the parent's and each kind of child's.

    Raises:
        ValueError: the run has no parent, or a file is missing.
    """
    found: dict[str, pd.DataFrame] = {}
    result = run.folder.read_json("result.json")
    results = {"parent": result["parent"], **{child["id"]: child for child in result["children"]}}
    config = driver.config_of(run.folder)
    jobs: list[Fit | ChildSpec] = [config.parent_job(), *config.specs()]
    for job in jobs:
        training, done = job.training, results.get(job.id)
        if training is None or not training.epochs or not done or not done["epochs"]:
            continue
        table = rates(training, round(done["images"] / done["epochs"]))
        if isinstance(job, ChildSpec):
            more = chances(run, job, table["epoch"].to_numpy()).round(4)
            table = pd.concat([table, more], axis=1)
        name = job.label if isinstance(job, ChildSpec) else job.id
        if not any(table.equals(other) for other in found.values()):
            found[name if name not in found else job.id] = table
    return pd.concat(
        [table.assign(network=name) for name, table in found.items()], ignore_index=True
    )


def _draw(figure: Figure, table: pd.DataFrame) -> None:
    panels = figure.subplots(1, 3)
    columns = (
        ("lr", "learning rate"),
        ("momentum", "momentum"),
        ("outside", "chance of a weight outside"),
    )
    for axes, (key, label) in zip(panels, columns, strict=True):
        if key not in table:
            axes.set_axis_off()
            continue
        for i, (name, one) in enumerate(table.groupby("network", sort=False)):
            colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
            axes.plot(one["epoch"], one[key], dash, color=colour, lw=1.6, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.25)
    if table["network"].nunique() <= len(_COLOURS) * len(_DASHES):
        panels[0].legend(fontsize=6)


def find(run: Run) -> Findings:
    """Tables and the picture of a run's schedules.

    Raises:
        ValueError: see `curves`.
    """
    table = curves(run)
    rows, numbers = [], []
    for name, one in table.groupby("network", sort=False):
        outside = float(one["outside"].iloc[0]) if "outside" in one else np.nan
        fixed = one.loc[one["outside"] == 0, "epoch"].min() if "outside" in one else np.nan
        numbers.append(
            {
                "network": name,
                "steps": len(one),
                "first": one["lr"].iloc[0],
                "highest": one["lr"].max(),
                "last": one["lr"].iloc[-1],
                "outside": outside,
                "fixed": fixed,
            }
        )
        rows.append(
            [
                str(name),
                str(len(one)),
                *(f"{numbers[-1][key]:.2g}" for key in ("first", "highest", "last")),
                "" if np.isnan(outside) else f"{outside:.3f}",
                "" if np.isnan(fixed) else f"{fixed:.2f}",
            ]
        )
    return Findings(
        "schedules",
        "Schedules",
        [],
        [
            Table(
                "schedules",
                "Learning rates, the chance of a weight outside the subnetwork at first, and the "
                "epoch from which the subnetwork is fixed",
                ["network", "steps", "first", "highest", "last", "outside", "fixed from"],
                rows,
                pd.DataFrame(numbers),
            )
        ],
        [
            Picture(
                "schedules",
                "Schedules of parent and children (Figs 5.3 and 6.1)",
                "Learning rate and momentum of every step; mean chance that a weight outside the "
                "subnetwork takes part in a forward pass. Children of equal curves are one line.",
                (9.0, 2.8),
                partial(_draw, table=table),
            )
        ],
        [Table("schedule_steps", "Every step", [], [], table)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = findings.parser("Schedules that a run used, Figs 5.3 and 6.1.", several=False)
    given = parser.parse_args(arguments)
    return findings.main("schedules", lambda: find(Run.open(given.runs[0])), given)


if __name__ == "__main__":
    sys.exit(main())
