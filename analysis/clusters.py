"""Prediction clusters (7.2.1): t-SNE of outputs, by class, by prediction, mistakes, as Fig 7.2.

    python -m analysis.clusters runs/quickstart

One embedding of the outputs of all networks together, so that a place means the same in every
picture.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from ray_subnets.figures import BLUE, GREEN, ORANGE, RED, SKY

_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, "#cc79a7", "#f0e442", "#666666", "#8c564b", "#332288")
_MARKERS = "osD^vP*Xd<"


def embed(outputs: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Outputs `(K, N, C)` -> places `(K, N, 2)` of one t-SNE of all K * N points."""
    k, n, c = outputs.shape
    flat = outputs.reshape(k * n, c).double().numpy()
    tsne = TSNE(perplexity=min(perplexity, (k * n - 1) / 3), init="pca", random_state=seed)
    return np.asarray(tsne.fit_transform(flat)).reshape(k, n, 2)


def _draw(
    figure: Figure, places: np.ndarray, predicted: Tensor, labels: Tensor, names: Sequence[str]
) -> None:
    """Rows: class, prediction, mistakes; a column for each network."""
    panels = figure.subplots(3, len(names), squeeze=False, sharex=True, sharey=True)
    for k, name in enumerate(names):
        for row, (shown, some) in enumerate(
            (
                (labels, torch.ones_like(labels).bool()),
                (predicted[k], torch.ones_like(labels).bool()),
                (predicted[k], predicted[k] != labels),
            )
        ):
            axes = panels[row, k]
            if row == 2:
                right = places[k][~some.numpy()]
                axes.scatter(*right.T, s=1, color="#999999", alpha=0.25, lw=0, rasterized=True)
            for label in range(int(labels.max()) + 1):
                mine = (some & (shown == label)).numpy()
                axes.scatter(
                    *places[k][mine].T,
                    s=9 if row == 2 else 4,
                    color=_COLOURS[label % 10],
                    marker=_MARKERS[label % 10],
                    lw=0,
                    rasterized=True,
                )
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_alpha(0.3)
        wrong = int((predicted[k] != labels).sum())
        panels[0, k].set_title(name, fontsize=8)
        panels[2, k].set_xlabel(f"{wrong} of {len(labels)} wrong", fontsize=7)
    for row, title in enumerate(("true class", "prediction", "mistakes")):
        panels[row, 0].set_ylabel(title, fontsize=8)


def find(run: Run, *, count: int = 600, most: int = 3, seed: int = 0) -> Findings:
    """Fig 7.2 for the parent and the first members.

    Raises:
        ValueError: a file is missing.
    """
    ids = [id for id in run.selected if id != "parent"][:most]
    names = ["parent", *ids] if run.has_parent else ids
    outputs = run.outputs(names)
    order = torch.randperm(len(outputs.labels), generator=torch.Generator().manual_seed(seed))
    some = order[:count].sort().values
    logits, labels = outputs.logits[:, some], outputs.labels[some]
    places = embed(logits.double().softmax(2), seed=seed)
    predicted = logits.argmax(2)
    frame = pd.DataFrame(
        [
            {
                "network": name,
                "sample": int(some[i]),
                "x": float(places[k, i, 0]),
                "y": float(places[k, i, 1]),
                "class": int(labels[i]),
                "prediction": int(predicted[k, i]),
            }
            for k, name in enumerate(names)
            for i in range(len(some))
        ]
    )
    mistakes = predicted != labels
    rows = []
    for k, name in enumerate(names):
        only = mistakes[k] & (mistakes.sum(0) == 1)
        rows.append([name, str(int(mistakes[k].sum())), str(int(only.sum()))])
    return Findings(
        "clusters",
        "Prediction clusters",
        [f"t-SNE of the probabilities of {len(names)} networks on {len(some)} test samples."],
        [
            Table(
                "clusters",
                f"Mistakes on these {len(some)} test samples",
                ["network", "mistakes", "that no other of them makes"],
                rows,
                frame,
            )
        ],
        [
            Picture(
                "clusters",
                "Prediction clusters (Fig 7.2)",
                "One t-SNE of all outputs together: a place means the same in every panel. Colour "
                "and shape: the true class (above), the prediction (middle), the prediction where "
                "it is wrong (below, all others grey).",
                (1.9 * len(names) + 0.3, 5.6),
                partial(_draw, places=places, predicted=predicted, labels=labels, names=names),
            )
        ],
    )


def main() -> int:
    parser = findings.parser("t-SNE of the outputs of parent and members, Fig 7.2.", several=False)
    parser.add_argument("--samples", type=int, default=600, help="test samples")
    parser.add_argument("--members", type=int, default=3, help="beside the parent")
    arguments = parser.parse_args()

    def do() -> Findings:
        run = Run.open(arguments.runs[0])
        if arguments.samples < 10 or arguments.members < 1:
            raise ValueError("--samples: 10 or more; --members: 1 or more")
        return find(run, count=arguments.samples, most=arguments.members)

    return findings.main("clusters", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
