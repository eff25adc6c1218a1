"""Saliency maps (7.3): what in an image a member's answer hangs on, eqs. 7.4 and 7.5.

    python -m analysis.saliency runs/fashion_mnist_sparse-0

Gradient and SmoothGrad by captum. Shown are the test images that members disagree about most.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from ray_subnets import metrics

NOISE = 0.15
"""of SmoothGrad, as a share of the inputs' range (Smilkov et al. 2017: 10 to 20 %)"""
SAMPLES = 25
"""noisy copies of an image"""


def _captum() -> Any:
    """captum's attributions.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from captum import attr
    except ImportError:
        raise ValueError(
            "saliency needs captum: pip install 'ray_subnets[analysis]', or captum"
        ) from None
    return attr


def gradient(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """`dY_c / dX` (eq. 7.4), `(N, *shape)`: of the target class's logit, with its sign.

    Args:
        x: network inputs `(N, *shape)`.
        target: classes `(N,)`; those that the network predicts, if it is asked for its own view.
    """
    inputs = x.detach().clone().requires_grad_(True)
    found = _captum().Saliency(network).attribute(inputs, target=target, abs=False)
    return found.detach()


def smooth_gradient(
    network: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    sigma: float,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Tensor:
    """SmoothGrad (eq. 7.5): the mean gradient over `samples` noisy copies, `(N, *shape)`.

    The same seed gives the same noise for every network, so that networks are compared, not draws.

    Args:
        sigma: standard deviation of the noise, in units of the network's input.
    """
    attr = _captum()
    tunnel = attr.NoiseTunnel(attr.Saliency(network))
    inputs = x.detach().clone().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = tunnel.attribute(
            inputs,
            nt_type="smoothgrad",
            nt_samples=samples,
            nt_samples_batch_size=1,
            stdevs=sigma,
            target=target,
            abs=False,
        )
    return found.detach()


def as_maps(gradients: Tensor) -> Tensor:
    """Gradients `(N, channels, H, W)` as pictures `(N, H, W)` from 0 to 1.

    The largest size over channels (Simonyan et al. 2014), divided by its 99th percentile.
    """
    size = gradients.abs().amax(1)
    top = size.flatten(1).quantile(0.99, dim=1).clamp_min(1e-12)
    return (size / top[:, None, None]).clamp(0, 1)


def check(run: Run) -> None:
    """Are the run's inputs images?

    Raises:
        ValueError: they are not.
    """
    shape = tuple(run.images(1)[0].shape[1:])
    if len(shape) != 3:
        raise ValueError(
            f"RUN: {run.folder}: needs images (channels, H, W), its inputs are {shape}"
        )


def maps_of(
    networks: Sequence[nn.Module], x: Tensor, *, smooth: bool = True, batch: int = 250
) -> Tensor:
    """Maps `(K, N, H, W)`, each network asked about the class that it predicts itself."""
    sigma = NOISE * float(x.max() - x.min())
    found = []
    for network in networks:
        parts = []
        for number, part in enumerate(x.split(batch)):
            with torch.no_grad():
                target = network(part).argmax(1)
            if smooth:
                g = smooth_gradient(network, part, target, sigma=sigma, seed=number)
            else:
                g = gradient(network, part, target)
            parts.append(as_maps(g))
        found.append(torch.cat(parts))
    return torch.stack(found)


def rmse(maps: Tensor) -> Tensor:
    """Root mean square difference of pictures of every two networks, mean over images, `(K, K)`."""
    flat = maps.double().flatten(2)
    each = [(flat - one).square().mean(2).sqrt().mean(1) for one in flat]
    return torch.stack(each)


def contested(run: Run, count: int, limit: int) -> list[int]:
    """Which of the images that `run.images(limit)` gives members disagree most about."""
    outputs = run.outputs(run.selected)
    logits = outputs.logits[:, run.rows(limit)]
    disputed = metrics.mutual_information(logits) if len(logits) > 1 else -logits.amax((0, 2))
    return disputed.argsort(descending=True)[:count].tolist()


def _draw(
    figure: Figure,
    images: Tensor,
    maps: Tensor,
    names: Sequence[str],
    said: Tensor,
    labels: Tensor,
) -> None:
    rows, columns = len(images), len(names) + 1
    panels = figure.subplots(rows, columns, squeeze=False)
    for i in range(rows):
        picture = images[i].permute(1, 2, 0)
        low, high = picture.min(), picture.max()
        shown = ((picture - low) / (high - low).clamp_min(1e-9)).numpy()
        panels[i, 0].imshow(shown if shown.shape[2] == 3 else shown[..., 0], cmap="gray")
        panels[i, 0].set_title(f"class {int(labels[i])}", fontsize=7, pad=2)
        for k in range(len(names)):
            panels[i, k + 1].imshow(maps[k, i].numpy(), cmap="magma", vmin=0, vmax=1)
            head = f"{names[k]}\n" if i == 0 else ""
            panels[i, k + 1].set_title(f"{head}says {int(said[k, i])}", fontsize=7, pad=2)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)


@torch.no_grad()
def _said(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([network(x).argmax(1) for network in networks])


def find(run: Run, *, shown: int = 5, count: int = 200, most: int = 5) -> Findings:
    """Pictures of contested images, and how far maps of members are apart on `count` images.

    Raises:
        ValueError: the inputs are no images, a file is missing, or captum is.
    """
    check(run)
    named = run.networks(most)
    names, networks = [id for id, _ in named], [network for _, network in named]
    if run.has_parent and "parent" not in names:
        names, networks = ["parent", *names], [run.parent, *networks]
    x, labels = run.images(2000)
    some = contested(run, shown, 2000)
    pictures = []
    for smooth, title in ((True, "SmoothGrad (eq. 7.5)"), (False, "Gradient (eq. 7.4)")):
        drawn = maps_of(networks, x[some], smooth=smooth)
        pictures.append(
            Picture(
                "saliency_smooth" if smooth else "saliency_gradient",
                f"Saliency: {title}",
                "The test images about which members disagree most; how much each pixel moves the "
                "class that the network says. Brighter is more.",
                (1.15 * (len(names) + 1), 1.28 * len(some) + 0.2),
                partial(
                    _draw,
                    images=x[some],
                    maps=drawn,
                    names=names,
                    said=_said(networks, x[some]),
                    labels=labels[some],
                ),
            )
        )
    distances = rmse(maps_of(networks, x[:count]))
    rows = [
        [a, *(f"{v:.4f}" for v in line)] for a, line in zip(names, distances.tolist(), strict=True)
    ]
    numbers = pd.DataFrame(distances.numpy(), columns=names)
    numbers.insert(0, "network", names)
    used = len(x[:count])
    return Findings(
        "saliency",
        "Saliency maps",
        [f"SmoothGrad: {SAMPLES} noisy copies, noise of {NOISE:.0%} of the inputs' range."],
        [
            Table(
                "saliency",
                f"RMSE between SmoothGrad maps of two networks, mean over {used} test images",
                ["", *names],
                rows,
                numbers,
            )
        ],
        pictures,
    )


def main() -> int:
    parser = findings.parser("Saliency maps of members, eqs. 7.4 and 7.5.", several=False)
    parser.add_argument("--shown", type=int, default=5, help="images in the picture")
    parser.add_argument("--images", type=int, default=200, help="images in the table")
    arguments = parser.parse_args()

    def do() -> Findings:
        run = Run.open(arguments.runs[0])
        return find(run, shown=max(1, arguments.shown), count=max(1, arguments.images))

    return findings.main("saliency", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
