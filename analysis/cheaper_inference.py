"""What an answer costs: cascades, subsets of members, one distilled network.

    make cheaper          # five runs, then: python -m analysis.cheaper_inference runs/RUN-*

Validation data put members in order, set thresholds, and choose where the student begins and how
much of its loss is the teacher's (`--weights`); test data say nothing before that. The distilled
network begins as the best member, and so does its opponent, which is tuned for as long, by the same
schedule and on the same batches, on the labels alone: a child trained alone. What was trained is
kept in `--keep` and not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure

from analysis.seeds import cell
from ray_subnets import cascade, driver, members, metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import combine, greedy, right_class
from ray_subnets.distilling import TEMPERATURE, WEIGHT, distilled
from ray_subnets.ensembles import Ensemble
from ray_subnets.figures import BLUE, GREEN, RED, SKY
from ray_subnets.methods import OneCycle
from ray_subnets.summary import load_outputs

LEVELS = (*(i / 50 for i in range(50)), 0.99, 0.999, cascade.NEVER)


Row = dict[str, Any]


def row(name: str, passes: float, p: torch.Tensor, labels: torch.Tensor) -> Row:
    """One way to answer: what it costs and how good it is on test data."""
    return {"what": name, "passes": passes, "accuracy": metrics.accuracy(p, labels)} | {
        "nll": metrics.nll(p, labels)
    }


def cheaper(folder: RunFolder, ids: Sequence[str]) -> tuple[list[Row], pd.DataFrame]:
    """Rows of the table, and the curve of the cascade, from a run's saved outputs."""
    validation, test = (load_outputs(folder, ids, split) for split in ("validation", "test"))
    right = torch.stack([right_class(one, validation.labels) for one in validation.logits])
    order = [index for index, _ in greedy(right, len(ids))]
    seen, asked = validation.logits[order], test.logits[order]
    whole = combine(asked)
    rows = [row(f"{len(ids)} members", len(ids), whole, test.labels)]
    full = metrics.accuracy(combine(seen), validation.labels)
    points = cascade.curve(seen, validation.labels)
    wanted: tuple[tuple[cascade.By, float], ...] = (
        ("agreement", 0.999),
        ("accuracy", 0.999 * full),
    )
    for by, least in wanted:
        point = cascade.cheapest(points, least, by)
        p, passes = cascade.replay(asked, point.threshold)
        found = row(f"cascade, 99.9 % by {by}", float(passes.double().mean()), p, test.labels)
        rows.append(found | {"share": found["passes"] / len(ids)})
    for count in range(len(ids) - 1, 0, -1):
        rows.append(row(f"{count} chosen", count, combine(asked[:count]), test.labels))
    children = [row("child", 1, one.double().softmax(1), test.labels) for one in test.logits]
    rows.append(pd.DataFrame(children).groupby("what").mean().reset_index().iloc[0].to_dict())
    for one in rows:
        one["of full"] = one["accuracy"] / rows[0]["accuracy"]
    curve = pd.DataFrame([p.to_json() for p in cascade.curve(asked, test.labels, LEVELS)])
    return rows, curve


@dataclass(frozen=True)
class Distillation:
    """How a student is tuned."""

    epochs: int
    lr: float
    temperature: float
    keep: Path
    """results that are there already are not made again"""


def student(ensemble: Ensemble, folder: RunFolder, how: Distillation, weight: float) -> Row:
    """A network tuned on its teacher and on labels; `weight` 0: on labels alone.

    Returns:
        Its row, with `validation`, and where it began.
    """
    seed = folder.read_json("result.json")["seed"]
    temperature = how.temperature if weight else 1.0
    settings = [str(folder), list(ensemble.ids), how.epochs, how.lr, temperature, weight, seed]
    tune = f"{how.epochs}-epochs-lr-{how.lr:g}-temperature-{temperature:g}-weight-{weight:g}"
    kept, file = RunFolder(how.keep), f"{folder.name}-{tune}.json"
    if kept.exists(file) and (found := kept.read_json(file))["settings"] == settings:
        return found["row"]
    made = distilled(
        ensemble,
        driver.load_data(driver.config_of(folder)),
        tune=OneCycle(epochs=how.epochs, lr=how.lr),
        temperature=temperature,
        weight=weight,
        seed=seed,
    )
    assert made.record is not None
    tested, best = made.record["distilled"]["test"], made.record["teacher"]["test"]["accuracy"]
    found = {
        "what": "distilled child" if weight else "child trained alone",
        "passes": 1,
        "accuracy": tested["accuracy"],
        "nll": tested["nll"],
        "of full": tested["accuracy"] / best,
        "start": made.record["settings"]["student"],
        "validation": made.record["distilled"]["validation"]["nll"],
    }
    how.keep.mkdir(parents=True, exist_ok=True)
    kept.write_json(file, {"settings": settings, "row": found})
    return found


def students(
    teachers: Sequence[tuple[RunFolder, Ensemble]], how: Distillation, weights: Sequence[float]
) -> tuple[list[Row], list[str]]:
    """The distilled child of each run and its opponent; and how the weight was chosen."""
    tried = {
        weight: [student(ensemble, folder, how, weight) for folder, ensemble in teachers]
        for weight in (0.0, *weights)
    }
    validation = {
        weight: sum(one["validation"] for one in rows) / len(rows) for weight, rows in tried.items()
    }
    chosen = min(weights, key=lambda weight: validation[weight])
    said = ", ".join(f"{weight:g}: {validation[weight]:.4f}" for weight in (0.0, *weights))
    rows = [
        one | {"run": folder.name}
        for weight in (chosen, 0.0)
        for (folder, _), one in zip(teachers, tried[weight], strict=True)
    ]
    return rows, [f"validation NLL by the weight of the teacher: {said}; chosen: {chosen:g}"]


def markdown(table: pd.DataFrame) -> str:
    """Mean ± standard error over runs."""
    lines = ["| answer | passes | accuracy % | of the ensemble's, % | NLL | n |", "|" + "---|" * 6]
    for what in table["what"].unique():
        some = table[table["what"] == what]
        cells = [what, f"{some['passes'].mean():.2f}", cell(some["accuracy"], 100, 2)]
        cells += [cell(some["of full"], 100, 2), cell(some["nll"], 1, 4), str(len(some))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(table: pd.DataFrame) -> list[str]:
    """The claims, run by run."""
    lines = []
    for _, one in table[table["what"] == "cascade, 99.9 % by agreement"].iterrows():
        lines.append(
            f"{one['run']}: the cascade keeps {100 * one['of full']:.2f} % of the accuracy for "
            f"{100 * one['share']:.0f} % of the passes"
        )
    if (table["what"] == "distilled child").any():
        wide = table.pivot(index="run", columns="what")
        for measure, scale, unit in (("accuracy", 100, " points"), ("nll", 1, " nats")):
            gain = wide[measure]["distilled child"] - wide[measure]["child trained alone"]
            each = ", ".join(f"{scale * value:+.4g}" for value in gain)
            mean = cell(gain, scale, 4, sign=True)
            lines.append(f"distilled minus trained alone, {measure}: {mean}{unit} ({each})")
    return lines


def draw(table: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """Test accuracy and NLL against passes, mean over runs."""
    marks = {"distilled child": (RED, "*"), "child trained alone": (RED, "x"), "child": (SKY, "o")}
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        sides = zip(
            figure.subplots(1, 2),
            (("accuracy", "test accuracy, %", 100.0), ("nll", "test NLL, nats", 1.0)),
            strict=True,
        )
        for axes, (key, label, scale) in sides:
            mean = curves.groupby("threshold").mean(numeric_only=True).sort_values("passes")
            axes.plot(mean["passes"], scale * mean[key], color=BLUE, label="cascade")
            chosen = table[table["what"].str.endswith(("chosen", "members"))]
            by = chosen.groupby("passes")[key].mean()
            axes.plot(by.index, scale * by, "o--", ms=4, color=GREEN, label="members chosen")
            for what, (colour, mark) in marks.items():
                some = table[table["what"] == what]
                if len(some):
                    point = [some["passes"].mean()], [scale * some[key].mean()]
                    axes.plot(*point, mark, color=colour, label=what)
            axes.set(xlabel="members asked for an answer, mean", ylabel=label)
            axes.grid(alpha=0.25)
        figure.axes[0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of several seeds")
    parser.add_argument("--group", metavar="NAME", help="of which children; default: all members")
    parser.add_argument("--epochs", type=int, default=5, help="of distillation; 0: leave it out")
    parser.add_argument("--lr", type=float, default=0.1, help="its peak rate (default 0.1)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="default 2")
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[WEIGHT],
        metavar="WEIGHT",
        help="of the teacher in the loss; of several the best by validation NLL (default 0.5)",
    )
    parser.add_argument("--keep", type=Path, default=Path("runs/cheaper_inference"))
    parser.add_argument("--figure", type=Path, help="also draw it into this .png or .svg")
    arguments = parser.parse_args()
    rows: list[Row] = []
    curves, teachers = [], []
    said: list[str] = []
    try:
        for run in arguments.runs:
            folder = RunFolder.open(run, needs="result.json")
            torch.set_num_threads(driver.config_of(folder).resources.threads)
            ensemble = members.load(run)
            ids = [id for id in ensemble.ids if id != "parent"]
            if arguments.group:
                ids = [id for id in ids if id.rsplit("-", 1)[0] == arguments.group]
            if len(ids) < 2:
                raise ValueError(f"--group: {run} has no two members of {arguments.group}")
            found, curve = cheaper(folder, ids)
            teachers.append((folder, ensemble.take(ids)))
            rows += [one | {"run": folder.name} for one in found]
            curves.append(curve.assign(run=folder.name))
        if arguments.epochs:
            settings = (arguments.epochs, arguments.lr, arguments.temperature, arguments.keep)
            found, said = students(teachers, Distillation(*settings), arguments.weights)
            rows += found
    except ValueError as error:
        print(f"analysis.cheaper_inference: {error}", file=sys.stderr)
        return 2
    table = pd.DataFrame(rows)
    print(markdown(table), *verdicts(table), *said, sep="\n")
    if arguments.figure:
        draw(table, pd.concat(curves), arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
