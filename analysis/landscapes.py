"""Loss landscapes (5.3.2): parent, pruned child, tuned child, in 2-D and 3-D, as Fig 5.7.

    python -m analysis.landscapes runs/fashion_mnist_sparse-0
    python -m analysis.landscapes runs/fashion_mnist_sparse-?      # sharpness over runs

Also the line between parent and child and between two members, and how sharp each place is. Rows of
surfaces are kept as they are made: the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from analysis.seeds import cell
from analysis.surfaces import Landscape, Mapper, directions, kept, line, sharpness, surface
from ray_subnets.checkpoints import RunFolder
from ray_subnets.figures import BLUE, ORANGE, RED

_LINE = tuple(np.linspace(-0.25, 1.25, 25).round(4).tolist())


def stages(run: Run) -> list[tuple[str, nn.Module, bool]]:
    """Parent, child before tuning, child after it; the last says whether weights are gone.

    The child is the first sparse member, or the first one of another kind.

    Raises:
        ValueError: the run has no parent, or a file is missing.
    """
    members = list(run.record.members)
    sparse = [member for member in members if member.recipe.method == "sparse"]
    member = (sparse or members)[0]
    pruned = member.recipe.method in ("sparse", "stochastic")
    network = dict(run.networks())[member.recipe.id]
    found = [("parent", run.parent, False)]
    if member.recipe.epochs and member.recipe.method == "sparse":
        found.append(("pruned", run.before_tuning(member), pruned))
    found.append(("tuned" if member.recipe.epochs else member.recipe.id, network, pruned))
    return found


def _key(network: nn.Module, x: Tensor, y: Tensor, *settings: float) -> str:
    """Of all that a surface depends on."""
    digest = hashlib.sha256(json.dumps([*settings, len(y)]).encode())
    for tensor in (*network.state_dict().values(), x, y):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def kept_surface(
    place: RunFolder,
    name: str,
    landscape: Landscape,
    side: int,
    span: float,
    seed: int,
    mapper: Mapper = map,
) -> np.ndarray:
    """`surface`, with its rows in `landscape_NAME.npz`: those that are there are not made again."""
    key = _key(landscape.network, landscape.x, landscape.y, side, span, seed)
    file, known = f"landscape_{name}.npz", None
    if place.exists(file):
        saved = place.load_arrays(file)
        if str(saved.get("key")) == key and saved["losses"].shape == (side, side):
            known = saved["losses"]

    def keep(losses: np.ndarray) -> None:
        place.save_arrays(file, {"losses": losses, "key": np.array(key)})

    return surface(landscape, side, span, known=known, keep=keep, mapper=mapper)


def _norm(surfaces: Mapping[str, np.ndarray]) -> LogNorm:
    every = np.concatenate([one[np.isfinite(one)] for one in surfaces.values()])
    low = max(float(every.min()), 1e-4)
    return LogNorm(low, max(float(every.max()), 1.01 * low))


def _flat(figure: Figure, surfaces: Mapping[str, np.ndarray], span: float) -> None:
    """Contours, one scale for all."""
    norm = _norm(surfaces)
    levels = np.geomspace(norm.vmin or 1e-4, norm.vmax or 1.0, 13)
    panels = np.atleast_1d(figure.subplots(1, len(surfaces), sharey=True))
    for axes, (name, losses) in zip(panels, surfaces.items(), strict=True):
        steps = np.linspace(-span, span, len(losses))
        shown = losses.clip(levels[0], levels[-1])
        filled = axes.contourf(steps, steps, shown, levels=levels, norm=norm, cmap="cividis")
        axes.contour(
            steps, steps, shown, levels=levels[::2], norm=norm, colors="white", linewidths=0.4
        )
        axes.plot(0, 0, "+", color="white", ms=7)
        centre = losses[len(losses) // 2, len(losses) // 2]
        axes.set_title(f"{name}: {centre:.3f} nats", fontsize=9)
        axes.set_aspect("equal")
        axes.set_xlabel("a")
    panels[0].set_ylabel("b")
    bar = figure.colorbar(filled, ax=list(panels), shrink=0.85, label="loss, nats")
    ticks = [float(level) for level in levels[::3]]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])


def _solid(figure: Figure, surfaces: Mapping[str, np.ndarray], span: float) -> None:
    """The same as surfaces, the height logarithmic."""
    norm = _norm(surfaces)
    low, high = np.log10(norm.vmin or 1e-4), np.log10(norm.vmax or 1.0)
    for i, (name, losses) in enumerate(surfaces.items()):
        axes = figure.add_subplot(1, len(surfaces), i + 1, projection="3d")
        steps = np.linspace(-span, span, len(losses))
        a, b = np.meshgrid(steps, steps)
        height = np.log10(losses.clip(10**low, 10**high))
        axes.plot_surface(
            a,
            b,
            height,
            cmap="cividis",
            vmin=low,
            vmax=high,
            rstride=1,
            cstride=1,
            lw=0.1,
            rasterized=True,
        )
        axes.set_zlim(low, high)
        axes.set_title(name, fontsize=9, pad=-4)
        axes.tick_params(labelsize=6, pad=-3)
        axes.set_zticks([low, high], [f"{10**low:.2g}", f"{10**high:.2g}"])
        axes.set_xticks([-span, 0, span])
        axes.set_yticks([-span, 0, span])
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.pane.set_alpha(0.0)


def _lines(figure: Figure, frame: pd.DataFrame) -> None:
    left, right = figure.subplots(1, 2)
    for axes, key, label, scale in (
        (left, "loss", "loss, nats", 1),
        (right, "accuracy", "accuracy, %", 100),
    ):
        styles = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (RED, ":", "^"))
        for (name, some), (colour, style, marker) in zip(
            frame.groupby("line", sort=False), styles, strict=False
        ):
            axes.plot(
                some["t"],
                scale * some[key],
                ls=style,
                color=colour,
                marker=marker,
                ms=3,
                label=name,
            )
        axes.set(xlabel="t: from the first (0) to the second (1)", ylabel=label)
        axes.grid(alpha=0.25)
    left.legend(fontsize=7)


def lines(run: Run, child: nn.Module, x: Tensor, y: Tensor) -> pd.DataFrame:
    """Loss and accuracy from the parent to the child, and between the first two like members."""
    pairs = [("parent to tuned child", run.parent, child)]
    members = [(m.recipe.label, dict(run.networks())[m.recipe.id]) for m in run.record.members]
    labels = [label for label, _ in members]
    several = [label for label in labels if labels.count(label) > 1]
    double = next((label for label in several if "sparse" in label), next(iter(several), None))
    like = [network for label, network in members if label == double]
    if double:
        pairs.append((f"{double} member to its sibling", like[0], like[1]))
    rows = [
        {"line": name, "t": t, "loss": value, "accuracy": accuracy}
        for name, a, b in pairs
        for t, (value, accuracy) in zip(_LINE, line(a, b, x, y, _LINE), strict=True)
    ]
    return pd.DataFrame(rows)


def find(
    run: Run,
    place: RunFolder,
    *,
    side: int = 17,
    span: float = 1.0,
    samples: int = 400,
    seed: int = 0,
    mapper: Mapper = map,
) -> Findings:
    """Fig 5.7 of a run, the lines, and the sharpness of each stage.

    Args:
        mapper: how rows of surfaces are made, see `surfaces.surface`.

    Raises:
        ValueError: the run has no parent, its data set is not here, or a file is missing.
    """
    x, y = run.images(samples, "train")
    surfaces, rows, records = {}, [], []
    with torch.no_grad():
        made = stages(run)
        for name, network, pruned in made:
            masks = kept(network, pruned=pruned)
            first, second = directions(network, masks, seed)
            landscape = Landscape(network, x, y, first, second)
            surfaces[name] = kept_surface(place, name, landscape, side, span, seed, mapper)
            rise, error = sharpness(network, masks, x, y)
            centre = landscape.at(0, 0)
            low = float((surfaces[name] < centre + 0.5).mean())
            records.append(
                {"network": name, "loss": centre, "sharpness": rise, "error": error, "flat": low}
            )
            rows.append([name, f"{centre:.4f}", f"{rise:.4f} ± {error:.4f}", f"{100 * low:.0f} %"])
        between = lines(run, made[-1][1], x, y)
    worst = between.groupby("line", sort=False)["loss"].max()
    heights = "; ".join(f"{name}: at most {value:.3f} nats" for name, value in worst.items())
    return Findings(
        "landscapes",
        "Loss landscapes",
        [f"Loss on {len(y)} training samples. Along the line, {heights}."],
        [
            Table(
                "sharpness",
                "How the loss rises around each network: mean rise at a distance of 0.25 of the "
                "filters' lengths, over ten random directions; share of the square within 0.5 nats "
                "of the middle",
                ["network", "loss, nats", "sharpness, nats", "within 0.5 nats"],
                rows,
                pd.DataFrame(records),
            )
        ],
        [
            Picture(
                "landscape_2d",
                "Loss around parent, pruned and tuned child (Fig 5.7)",
                "Two orthogonal, filter-normalised random directions (eq. 5.6); one scale for all, "
                "logarithmic. The cross is the network itself.",
                (2.5 * len(surfaces) + 1.0, 2.8),
                partial(_flat, surfaces=surfaces, span=span),
            ),
            Picture(
                "landscape_3d",
                "The same in 3-D",
                "Height: the loss, logarithmic.",
                (2.6 * len(surfaces) + 0.4, 2.7),
                partial(_solid, surfaces=surfaces, span=span),
            ),
            Picture(
                "landscape_lines",
                "Lines between networks",
                "Loss and accuracy on the line through two networks' weights.",
                (7.2, 2.8),
                partial(_lines, frame=between),
            ),
        ],
    )


def _checked(value: int, name: str, least: int) -> int:
    if value < least:
        raise ValueError(f"--{name}: {least} or more, not {value}")
    return value


def over_runs(found: Mapping[str, pd.DataFrame]) -> Table:
    """Sharpness of each network over runs, and its difference to the parent's, paired.

    Args:
        found: by run, the numbers behind the table `sharpness` of each.

    Returns:
        Mean and standard error over runs.
    """
    whole = pd.concat([frame.assign(run=run) for run, frame in found.items()])
    wide = whole.pivot(index="run", columns="network", values="sharpness")
    losses = whole.pivot(index="run", columns="network", values="loss")
    names = list(dict.fromkeys(whole["network"]))
    rows = []
    for name in names:
        count = str(int(wide[name].count()))
        more = "" if name == names[0] else cell(wide[name] - wide[names[0]], 1, 4, sign=True)
        rows.append([name, cell(losses[name], 1, 4), cell(wide[name], 1, 4), more, count])
    headings = ["network", "loss, nats", "sharpness, nats", f"minus {names[0]}'s", "n"]
    title = "Sharpness over runs, mean ± standard error; differences are paired"
    return Table("sharpness_over_runs", title, headings, rows, whole)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = findings.parser("Loss landscapes of parent and child, Fig 5.7.")
    parser.add_argument("--side", type=int, default=17, help="points along each direction")
    parser.add_argument("--samples", type=int, default=400, help="training samples")
    parser.add_argument("--span", type=float, default=1.0, help="in lengths of the filters")
    given = parser.parse_args(arguments)

    def one(name: str, place: RunFolder) -> Findings:
        side = _checked(given.side, "side", 3)
        samples = _checked(given.samples, "samples", 1)
        return find(Run.open(name), place, side=side, samples=samples, span=given.span)

    def do() -> Findings:
        if len(given.runs) == 1:
            return one(given.runs[0], findings.place(given.out, given.runs))
        found = {}
        for name in given.runs:
            place = findings.place(None, [name])
            made = one(name, place)
            made.write(place)
            found[name] = made.tables[0].numbers
        return Findings("landscapes", "Loss landscapes", tables=[over_runs(found)])

    return findings.main("landscapes", do, given)


if __name__ == "__main__":
    sys.exit(main())
