"""Perceptual hashes (7.3.1): do members see other things? The tables of Figs 7.3 and 7.4.

    ray-subnets benchmark benchmark_features
    python -m analysis.hashes runs/benchmark_features/cells/* --last 2

Pictures of every channel of the last convolution, and SmoothGrad maps of test images, hashed by
ImageHash; the distance of two members is the number of bits that differ, mean over pictures. Runs
of one name and several seeds are one row: mean ± standard error over seeds. `same network` is what
another seed of the visualisation alone gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from analysis import features, findings, folders, saliency
from analysis.features import Settings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from analysis.seeds import cell
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED

MEASURES = ("rmse", "average", "perceptual", "difference", "wavelet", "colour")
COLOURS = (BLUE, ORANGE, GREEN, RED)
SAME = "same network"


def _library() -> Any:
    """ImageHash, which the dissertation cites [14].

    Raises:
        ValueError: it is not installed.
    """
    try:
        import imagehash
    except ImportError:
        raise ValueError(
            "hashes needs ImageHash: pip install 'ray_subnets[analysis]', or imagehash"
        ) from None
    return imagehash


def functions() -> dict[str, Callable[[Image.Image], Any]]:
    """The five hashes; 64 bits each, but colour: 42."""
    library = _library()
    return {
        "average": library.average_hash,
        "perceptual": library.phash,
        "difference": library.dhash,
        "wavelet": library.whash,
        "colour": library.colorhash,
    }


def as_picture(image: Tensor) -> Image.Image:
    """`(H, W)` or `(colours, H, W)` from 0 to 1."""
    array = (255 * image.clamp(0, 1)).round().to(torch.uint8).numpy()
    if array.ndim == 3:
        array = array[0] if len(array) == 1 else np.moveaxis(array, 0, 2)
    return Image.fromarray(array)


def hashed(images: Tensor) -> dict[str, np.ndarray]:
    """Every hash of pictures `(N, [colours,] H, W)`: `(N, bits)` bool."""
    pictures = [as_picture(image) for image in images]
    return {
        name: np.stack([np.asarray(make(picture).hash).ravel() for picture in pictures])
        for name, make in functions().items()
    }


def distances(images: Tensor) -> list[dict[str, np.ndarray]]:
    """Of every two members how far each picture is apart: RMSE and Hamming distances, `(N,)`.

    Args:
        images: `(K, N, [colours,] H, W)` from 0 to 1.
    """
    bits = [hashed(one) for one in images]
    found = []
    for a, b in combinations(range(len(images)), 2):
        gap = (images[a] - images[b]).double().flatten(1)
        apart = {"rmse": gap.square().mean(1).sqrt().numpy()}
        apart |= {name: (bits[a][name] != bits[b][name]).sum(1) for name in bits[a]}
        found.append(apart)
    return found


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        last: only this many members, from the last; 0: all.
        channels: of the layer; 0: all.
        images: test images for saliency maps.
    """

    last: int = 0
    channels: int = 0
    images: int = 500
    settings: Settings = field(default_factory=Settings)
    layer: str | None = None


def _members(run: Run, plan: Plan) -> list[Any]:
    named = run.networks()
    chosen = named[-plan.last :] if plan.last else named
    if len(chosen) < 2:
        raise ValueError(f"RUN: {run.folder}: one network has nothing to be compared with")
    return [network for _, network in chosen]


def _record(run: Run, what: str, apart: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Mean over pairs and pictures."""
    means = {name: float(np.mean([one[name] for one in apart])) for name in apart[0]}
    count = len(next(iter(apart[0].values())))
    return {"what": what, "ensemble": run.name, "seed": run.seed, "pictures": count} | means


def measure(run: Run, plan: Plan) -> list[dict[str, Any]]:
    """A row for features, one for the same network with another seed, one for saliency.

    Raises:
        ValueError: the inputs are no images, or a file or a library is missing.
    """
    saliency.check(run)
    networks = _members(run, plan)
    count = features.layer_of(networks[0], plan.layer)[2]
    channels = list(range(min(plan.channels, count) if plan.channels else count))
    seen = [
        features.of_run(
            run,
            networks[: None if seed == 0 else 1],
            channels,
            layer=plan.layer,
            settings=plan.settings,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    again = torch.stack([seen[0][0], seen[1][0]])
    x, _ = run.images(plan.images)
    maps = saliency.maps_of(networks, x)
    same = _record(run, "features", distances(again)) | {"ensemble": f"{run.name}: {SAME}"}
    return [
        _record(run, "features", distances(seen[0])),
        same,
        _record(run, "saliency", distances(maps)),
    ]


TITLES = {
    "features": "Distances of members' feature visualisations (Fig 7.3)",
    "saliency": "Distances of members' SmoothGrad maps (Fig 7.4)",
}


def table(frame: pd.DataFrame, what: str) -> Table:
    """Mean ± standard error over seeds, of one kind of picture."""
    mine = frame[frame["what"] == what]
    rows = []
    for name, some in mine.groupby("ensemble", sort=False):
        cells = [cell(some[key], 1, 4 if key == "rmse" else 2) for key in MEASURES]
        rows.append([str(name), str(some["pictures"].iloc[0]), *cells, str(len(some))])
    headings = ["ensemble", "pictures", "RMSE", *(f"{m} hash" for m in MEASURES[1:]), "n"]
    return Table(f"hashes_{what}", TITLES[what], headings, rows, mine)


def differences(frame: pd.DataFrame, ours: str, other: str) -> list[str]:
    """Paired over seeds, ours minus the other, for each kind of picture."""
    lines = []
    for what in TITLES:
        by = frame[frame["what"] == what].pivot(index="seed", columns="ensemble")
        parts = []
        for key in MEASURES:
            gap = (by[key][ours] - by[key][other]).dropna()
            parts.append(f"{key} {cell(gap, 1, 4 if key == 'rmse' else 2, sign=True)}")
        lines.append(f"{what}: {ours} minus {other}: {', '.join(parts)} (n = {len(gap)})")
    return lines


def _bars(figure: Figure, frame: pd.DataFrame) -> None:
    """Hamming distances of every ensemble, features and saliency."""
    panels = figure.subplots(1, 2)
    names = [name for name in dict.fromkeys(frame["ensemble"]) if SAME not in name]
    for axes, what in zip(panels, TITLES, strict=True):
        for i, name in enumerate(names):
            some = frame[(frame["what"] == what) & (frame["ensemble"] == name)]
            x = np.arange(len(MEASURES) - 1) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            values = some[list(MEASURES[1:])]
            axes.bar(
                x,
                values.mean(),
                0.8 / len(names) * 0.92,
                yerr=values.sem() if len(values) > 1 else None,
                color=COLOURS[i % len(COLOURS)],
                hatch=("", "//", "..", "xx")[i % 4],
                edgecolor="white",
                error_kw={"lw": 1.0},
                label=name,
            )
        axes.set_xticks(range(len(MEASURES) - 1), MEASURES[1:], rotation=25, fontsize=8)
        axes.set_title(what, fontsize=9)
        axes.set_ylabel("bits that differ")
        axes.grid(alpha=0.25, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), fontsize=7)


def find(runs: Sequence[Run], plan: Plan | None = None, *, progress: bool = False) -> Findings:
    """The tables of Figs 7.3 and 7.4 for these runs.

    Raises:
        ValueError: see `measure`.
    """
    how, records = plan or Plan(), []
    for run in runs:
        records += measure(run, how)
        if progress:
            print(f"{run.name}, seed {run.seed}: done", file=sys.stderr)
    frame = pd.DataFrame(records)
    names = list(dict.fromkeys(run.name for run in runs))
    text = [
        "Mean over pairs of members and pictures; ± is the standard error over seeds. Hashes have "
        f"64 bits, colour 42. {SAME}: pictures of one network that were started from other noise.",
    ]
    if "sparse" in names:
        for other in names:
            if other != "sparse":
                text += differences(frame, "sparse", other)
    return Findings(
        "hashes",
        "Perceptual hashes of what members see",
        text,
        [table(frame, what) for what in TITLES],
        [
            Picture(
                "hashes",
                "Distances of members by perceptual hashes",
                "Bits in which hashes of two members' pictures differ; bars: standard error over "
                "seeds.",
                (7.6, 3.0),
                partial(_bars, frame=frame),
            )
        ],
    )


def main() -> int:
    parser = findings.parser("Hash distances of members: the tables of Figs 7.3 and 7.4.")
    parser.add_argument("--last", type=int, default=0, help="only the last members, 2 or more")
    parser.add_argument("--layer", help="default: the last convolution")
    parser.add_argument("--channels", type=int, default=0, help="default: all of the layer")
    parser.add_argument("--images", type=int, default=500, help="test images for saliency maps")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of each visualisation")
    arguments = parser.parse_args()

    def do() -> Findings:
        if arguments.last == 1 or min(vars(arguments)[k] for k in ("last", "channels")) < 0:
            raise ValueError("--last, --channels: 0 for all; --last 2 or more")
        if arguments.images < 1 or arguments.steps < 1:
            raise ValueError("--images, --steps: 1 or more")
        plan = Plan(
            last=arguments.last,
            channels=arguments.channels,
            images=arguments.images,
            settings=Settings(steps=arguments.steps),
            layer=arguments.layer,
        )
        return find(folders.open_all(arguments.runs), plan, progress=True)

    return findings.main("hashes", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
