"""Fig 4.3 from a sweep over sigma and density: KL, accuracy, ensembles by vote and by mean.

python -m analysis.trust_region runs/sweep_noise [--figure analysis/figures/trust_region.png]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"]

Trial = Mapping[str, Any]


def load(folder: str | Path) -> dict[str, Any]:
    """`sweep.json` of a sweep over sigma and density.

    Raises:
        ValueError: it is not there, or of other keys.
    """
    path = Path(folder) / "sweep.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no sweep.json; is it a sweep's folder?")
    record: dict[str, Any] = json.loads(path.read_text())
    if set(record["keys"]) != {"sigma", "density"}:
        raise ValueError(f"{folder}: a sweep over sigma and density is needed")
    return record


def by_density(record: Mapping[str, Any]) -> dict[float, list[Trial]]:
    """Finished cells of each density, by sigma."""
    cells = [t for t in record["trials"] if t["status"] == "done" and t["mean"]["kl"] is not None]
    found: dict[float, list[Trial]] = {}
    for trial in sorted(cells, key=lambda t: (t["values"]["density"], t["values"]["sigma"])):
        found.setdefault(trial["values"]["density"], []).append(trial)
    return found


def window(trials: Sequence[Trial], bound: float) -> float | None:
    """The sigma at which KL meets the bound, interpolated in logarithms; None if it does not."""
    for below, above in pairwise(trials):
        low, high = below["mean"]["kl"], above["mean"]["kl"]
        if low <= bound < high:
            share = math.log(bound / low) / math.log(high / low)
            a, b = below["values"]["sigma"], above["values"]["sigma"]
            return float(a * (b / a) ** share)
    return None


def table(record: Mapping[str, Any]) -> str:
    """What is seen, in a table and a sentence."""
    bound = record["kl_bound"] or 0.05
    lines = [
        f"| density | sigma at KL {bound:g} | best ensemble, mean % | by vote % | at sigma | KL |",
        "|---|---|---|---|---|---|",
    ]
    for density, trials in by_density(record).items():
        edge = window(trials, bound)
        best = max(trials, key=lambda t: (t["mean"]["mean_accuracy"], -t["mean"]["kl"]))
        mean, error = best["mean"], best["stderr"]
        lines.append(
            f"| {density:g} | {'beyond the grid' if edge is None else f'{edge:.4f}'} | "
            f"{100 * mean['mean_accuracy']:.2f} ± {100 * error['mean_accuracy']:.2f} | "
            f"{100 * mean['vote_accuracy']:.2f} ± {100 * error['vote_accuracy']:.2f} | "
            f"{best['values']['sigma']:g} | {mean['kl']:.4f} |"
        )
    some = record["trials"][0]["mean"]
    fit = record["fit"]
    lines.append(
        f"\nParent {100 * some['parent_accuracy']:.2f} %; {len(record['seeds'])} seeds, validation "
        f"data. Accuracy of the mean child, minus its parent's, against KL, cells within 1 nat: "
        f"{-100 * fit['slope']:.1f} points per nat, correlation {fit['correlation']:.3f}, "
        f"n = {fit['n']}."
    )
    return "\n".join(lines)


def draw(record: Mapping[str, Any], file: str) -> None:
    """The four panels of Fig 4.3."""
    bound = record["kl_bound"]
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(8.4, 6.4), layout="constrained")
        panels = figure.subplots(2, 2)
        kl, line, vote, mean = (panels[i, j] for i in (0, 1) for j in (0, 1))
        for colour, (density, trials) in zip(COLOURS, by_density(record).items(), strict=False):
            sigma = [t["values"]["sigma"] for t in trials]
            how: dict[str, Any] = {"color": colour, "label": f"density {density:g}"}
            kl.loglog(sigma, [t["mean"]["kl"] for t in trials], "o-", ms=3, **how)
            near = [t for t in trials if t["mean"]["kl"] <= 1]
            line.plot(
                [t["mean"]["kl"] for t in near],
                [100 * (t["mean"]["accuracy"] - t["mean"]["parent_accuracy"]) for t in near],
                "o",
                ms=4,
                **how,
            )
            for axes, key in ((vote, "vote_accuracy"), (mean, "mean_accuracy")):
                axes.errorbar(
                    sigma,
                    [100 * t["mean"][key] for t in trials],
                    [100 * t["stderr"][key] for t in trials],
                    fmt="o-",
                    ms=3,
                    **how,
                )
        _finish(record, kl, line, vote, mean, bound)
        figure.savefig(file, dpi=130)


def _finish(
    record: Mapping[str, Any], kl: Axes, line: Axes, vote: Axes, mean: Axes, bound: float | None
) -> None:
    """Axes, levels and the fitted line."""
    parent = 100 * record["trials"][0]["mean"]["parent_accuracy"]
    if bound:
        kl.axhline(bound, color="black", ls="--", lw=1)
        line.axvline(bound, color="black", ls="--", lw=1)
    if record["fit"]:
        ends = [0.0, 1.0]
        fit = record["fit"]
        line.plot(ends, [100 * (fit["intercept"] + fit["slope"] * x) for x in ends], "k-", lw=1)
    kl.set(xlabel="sigma", ylabel="KL from the parent, nats")
    line.set(
        xlabel="KL from the parent, nats",
        ylabel="accuracy of the mean child\nminus the parent's, points",
    )
    for axes, name in ((vote, "majority vote"), (mean, "mean of probabilities")):
        axes.set_xscale("log")
        axes.axhline(parent, color="black", ls=":", lw=1)
        axes.set(xlabel="sigma", ylabel="accuracy, %", title=f"ensemble by {name}")
        axes.set_ylim(max(0.0, parent - 12), parent + 2)
    kl.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", help="folder of a sweep over sigma and density")
    parser.add_argument("--figure", help="file to draw Fig 4.3 into")
    options = parser.parse_args()
    record = load(options.sweep)
    print(table(record))
    if options.figure:
        draw(record, options.figure)


if __name__ == "__main__":
    main()
