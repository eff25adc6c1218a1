"""Decision boundaries (4.3.1): what noise, pruning and annealing do to them, as Fig 4.2.

    ray-subnets run spirals_boundaries
    python -m analysis.boundaries runs/spirals_boundaries

Any run whose inputs are points of the plane. A grid over the strength of the noise and the share of
weights that it leaves alone, made from the run's parent; beside it the run's own children.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from analysis.seeds import cell
from ray_subnets import metrics
from ray_subnets.combining import combine
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED, SKY
from ray_subnets.recipes import ChildSpec
from ray_subnets.spawning import spawn

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25)
SPARSITIES = (0.0, 0.3, 0.6, 0.9)
"""of the noise: the share of the weights that it leaves as they are"""
_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, "#cc79a7")
_SIDE = 90  # cells of a picture
_POINTS = 250  # drawn over it

Predict = Callable[[Tensor], Tensor]  # (N, 2) -> probabilities (N, C)


@dataclass(frozen=True)
class Map:
    """What a network says of the plane: `rgb` `(side, side, 3)`, and how good that is."""

    title: str
    rgb: np.ndarray
    accuracy: float


def check(run: Run) -> None:
    """Are the run's inputs points of the plane?

    Raises:
        ValueError: they are not.
    """
    shape = run.record.input_shape
    if shape != (2,):
        raise ValueError(
            f"RUN: {run.folder}: boundaries can be drawn of inputs with two numbers, not of shape "
            f"{tuple(shape)}; try a run of spirals_boundaries"
        )


def lattice(points: Tensor, side: int = _SIDE) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Points `(side * side, 2)` of the rectangle around the data, and its (left, right, low, high).

    Row by row from below, as `imshow(origin="lower")` wants them.
    """
    low, high = points.amin(0), points.amax(0)
    margin = 0.12 * (high - low)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    x, y = torch.linspace(left, right, side), torch.linspace(bottom, top, side)
    grid = torch.stack([x.repeat(side), y.repeat_interleave(side)], 1)
    return grid, (left, right, bottom, top)


def mixed(probabilities: Tensor) -> np.ndarray:
    """A colour for each answer `(N, C)` -> `(N, 3)`: the classes' colours mixed as it is sure."""
    colours = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _COLOURS])
    p = probabilities.double().numpy()
    own = colours[np.arange(p.shape[1]) % len(colours)]
    pale = 0.5 + 0.5 * own  # so that points in full colour can be seen on it
    return np.asarray(p @ pale)


@torch.no_grad()
def draw_map(title: str, predict: Predict, grid: Tensor, x: Tensor, y: Tensor) -> Map:
    side = round(len(grid) ** 0.5)
    rgb = mixed(predict(grid)).reshape(side, side, 3).clip(0, 1)
    return Map(title, rgb, metrics.accuracy(predict(x), y))


def alone(network: nn.Module) -> Predict:
    """The answers of one network, in evaluation mode."""
    network.eval()
    return lambda x: network(x).softmax(1)


def together(
    networks: Sequence[nn.Module], how: str, shares: Sequence[float] | None = None
) -> Predict:
    """The answers of several, combined."""
    return lambda x: combine(torch.stack([one(x) for one in networks]), how, shares).float()


def noise(sigma: float, sparsity: float, seed: int) -> ChildSpec:
    """Gaussian noise on a Bernoulli mask of every layer (4.3.1)."""
    return ChildSpec(
        id="noisy",
        method="noisy",
        seed=seed,
        density=1 - sparsity,
        draw="bernoulli",
        sigma=sigma,
        mask_classifier=True,
    )


@torch.no_grad()
def grid_table(
    parent: nn.Module,
    x: Tensor,
    y: Tensor,
    sigmas: Sequence[float],
    sparsities: Sequence[float],
    draws: int,
) -> Table:
    """Accuracy and KL from the parent over `draws` children of every cell, on test points."""
    base = parent(x)
    records = []
    for sparsity in sparsities:
        for sigma in sigmas:
            for seed in range(draws):
                child = spawn(parent, noise(sigma, sparsity, seed)).eval()
                logits = child(x)
                kl = metrics.kl_divergence(torch.stack([base, logits]))[0, 1]
                accuracy = metrics.accuracy(logits.softmax(1), y)
                records.append(
                    {"sparsity": sparsity, "sigma": sigma, "draw": seed}
                    | {"accuracy": accuracy, "kl": float(kl)}
                )
    frame = pd.DataFrame(records)
    rows = []
    for sparsity in sparsities:
        row = [f"{sparsity:g}"]
        for sigma in sigmas:
            some = frame[(frame["sparsity"] == sparsity) & (frame["sigma"] == sigma)]
            row.append(f"{cell(some['accuracy'], 100, 1)} ({some['kl'].mean():.3f})")
        rows.append([*row, str(draws)])
    return Table(
        "boundaries_grid",
        "Accuracy of perturbed networks on test points, per cent (KL from the parent, nats); "
        "sparsity: the share of the weights that noise leaves alone",
        ["sparsity of the noise", *(f"sigma {sigma:g}" for sigma in sigmas), "n"],
        rows,
        frame,
    )


def _show(axes: Axes, one: Map, extent: Sequence[float], x: Tensor, y: Tensor) -> None:
    axes.imshow(one.rgb, origin="lower", extent=tuple(extent), aspect="auto")  # type: ignore[arg-type]
    for label in range(int(y.max()) + 1):
        some = x[y == label][:_POINTS].numpy()
        axes.scatter(some[:, 0], some[:, 1], s=2.2, color=_COLOURS[label % 6], lw=0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _grid(
    figure: Figure,
    maps: Mapping[tuple[float, float], Map],
    extent: Sequence[float],
    x: Tensor,
    y: Tensor,
) -> None:
    sigmas = sorted({sigma for sigma, _ in maps})
    sparsities = sorted({sparsity for _, sparsity in maps})
    panels = figure.subplots(len(sparsities), len(sigmas), squeeze=False)
    for i, sparsity in enumerate(sparsities):
        for j, sigma in enumerate(sigmas):
            axes, one = panels[i, j], maps[sigma, sparsity]
            _show(axes, one, extent, x, y)
            above = f"sigma {sigma:g}\n" if i == 0 else ""
            axes.set_title(f"{above}{100 * one.accuracy:.1f} %", fontsize=8, pad=2)
            if j == 0:
                axes.set_ylabel(f"sparsity {sparsity:g}", fontsize=8)


def _row(
    figure: Figure, maps: Sequence[Map], extent: Sequence[float], x: Tensor, y: Tensor
) -> None:
    columns = min(5, len(maps))
    rows = -(-len(maps) // columns)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, one in zip(panels, maps, strict=False):
        _show(axes, one, extent, x, y)
        axes.set_title(f"{one.title}\n{100 * one.accuracy:.1f} %", fontsize=8, pad=2)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)


def children(run: Run, grid: Tensor, x: Tensor, y: Tensor) -> list[Map]:
    """The parent, two members of every kind (pruned ones before tuning too), and the ensemble."""
    maps = [draw_map("parent", alone(run.parent), grid, x, y)]
    networks = dict(run.networks())
    shown: dict[str, int] = {}
    for member in run.record.members:
        recipe = member.recipe
        done = shown.get(recipe.label, 0)
        if done == 2:
            continue
        shown[recipe.label] = done + 1
        if recipe.epochs and recipe.method == "sparse" and not done:
            before = alone(run.before_tuning(member))
            maps.append(draw_map(f"{recipe.id}, pruned", before, grid, x, y))
        after = f"{recipe.id}, tuned" if recipe.epochs else recipe.id
        maps.append(draw_map(after, alone(networks[recipe.id]), grid, x, y))
    everyone = together(list(networks.values()), run.combine, run.shares(list(networks)))
    maps.append(draw_map(f"ensemble of {len(networks)}", everyone, grid, x, y))
    return maps


def find(
    run: Run,
    *,
    sigmas: Sequence[float] = SIGMAS,
    sparsities: Sequence[float] = SPARSITIES,
    draws: int = 16,
    seed: int = 0,
) -> Findings:
    """Fig 4.2 from the run's parent, and the run's children.

    Raises:
        ValueError: the inputs are no points of the plane, or a file is missing.
    """
    check(run)
    x, y = run.images(1000)
    grid, extent = lattice(x)
    parent = run.parent
    maps = {}
    for sparsity in sparsities:
        for sigma in sigmas:
            child = spawn(parent, noise(sigma, sparsity, seed))
            maps[sigma, sparsity] = draw_map("", alone(child), grid, x, y)
    own = children(run, grid, x, y)
    rows = [[one.title, f"{100 * one.accuracy:.2f}"] for one in own]
    numbers = pd.DataFrame([{"network": m.title, "accuracy": m.accuracy} for m in own])
    size = (1.5 * len(sigmas) + 0.4, 1.5 * len(sparsities) + 0.4)
    lines = -(-len(own) // 5)
    return Findings(
        "boundaries",
        "Decision boundaries",
        [f"Accuracy on {len(y)} test points. One draw is shown, {draws} are in the table."],
        [
            grid_table(parent, x, y, sigmas, sparsities, draws),
            Table(
                "boundaries_children",
                "Networks of this run",
                ["network", "test accuracy %"],
                rows,
                numbers,
            ),
        ],
        [
            Picture(
                "boundaries_noise",
                "Boundaries under noise (Fig 4.2)",
                "The parent after one draw of noise. Columns: its strength. Rows: the share of "
                "weights that it leaves alone. Colour: the class, paler where less sure; dots: "
                "test points; above: accuracy on them.",
                size,
                partial(_grid, maps=maps, extent=extent, x=x, y=y),
            ),
            Picture(
                "boundaries_children",
                "Boundaries of parent, children and ensemble",
                "Members of each kind, sparse ones before and after tuning, and all members "
                "together.",
                (7.6, 1.75 * lines + 0.1),
                partial(_row, maps=own, extent=extent, x=x, y=y),
            ),
        ],
    )


def main() -> int:
    parser = findings.parser("Decision boundaries of a run on points, Fig 4.2.", several=False)
    parser.add_argument("--draws", type=int, default=16, help="children of each cell of the table")
    arguments = parser.parse_args()

    def do() -> Findings:
        if arguments.draws < 1:
            raise ValueError(f"--draws: must be 1 or more, not {arguments.draws}")
        return find(Run.open(arguments.runs[0]), draws=arguments.draws)

    return findings.main("boundaries", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
