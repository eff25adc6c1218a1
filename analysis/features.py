"""Feature visualisation (7.3, 7.4): the image that a channel answers to most strongly.

    python -m analysis.features runs/fashion_mnist_sparse-0

Activation maximisation by Adam (rate .05, 1024 steps) over random jitter (8 pixels), scale (.95
to 1.05), rotation (5 degrees) and jitter again (4), many channels and members in one batch. The
picture of a channel is the same alone and in a batch: its random numbers are its own, and members
share them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from analysis import findings
from analysis.findings import Findings, Picture, Table
from analysis.folders import Run
from analysis.saliency import check
from ray_subnets.data import Preprocess
from ray_subnets.recipes import derive


@dataclass(frozen=True)
class Settings:
    """The dissertation's (7.4). Jitter of 8 is an offset within a window of 8 pixels, as in its
    source Lucid: up to 4 to either side."""

    steps: int = 1024
    lr: float = 0.05
    jitter: float = 8.0
    """pixels"""
    scale: float = 0.05
    """to either side of 1"""
    rotation: float = 5.0
    """degrees to either side"""
    jitter_after: float = 4.0
    """pixels"""
    start: float = 0.1
    """standard deviation of the noise that an image starts from, before the sigmoid"""


def layer_of(network: nn.Module, name: str | None = None) -> tuple[str, nn.Module, int]:
    """Name, module and number of channels of a layer; default: the last convolution, or the last
    hidden linear layer of a network without any.

    Raises:
        ValueError: there is no such layer, or it has no channels.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if name is None:
        convolutions = [n for n, m in layers.items() if isinstance(m, nn.Conv2d)]
        order = convolutions or list(layers)[:-1]
        if not order:
            raise ValueError("--layer: the network has no hidden layer")
        name = order[-1]
    if name not in layers:
        raise ValueError(f"--layer: no layer {name!r}; there are {', '.join(layers)}")
    module = layers[name]
    channels = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
    return name, module, int(channels)


def transforms(draws: Tensor, size: tuple[int, int], settings: Settings) -> Tensor:
    """Affine matrices `(N, 2, 3)`, from output to input in units of half an image.

    Args:
        draws: `(N, 6)`, uniform from -1 to 1: jitter (2), scale, rotation, jitter (2).
    """
    half = torch.tensor([size[1] / 2, size[0] / 2])
    first = draws[:, :2] * settings.jitter / 2 / half
    after = draws[:, 4:6] * settings.jitter_after / 2 / half
    scale = 1 + settings.scale * draws[:, 2]
    angle = torch.deg2rad(settings.rotation * draws[:, 3])
    rows = [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)]
    turn = torch.stack(rows, 1) / scale[:, None, None]
    offset = first + (turn @ after[:, :, None])[:, :, 0]
    return torch.cat([turn, offset[:, :, None]], 2)


def _draws(channels: Sequence[int], steps: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of every channel: start `(channels, count)` and transforms `(channels, steps, 6)`."""
    starts, moves = [], []
    for channel in channels:
        generator = torch.Generator().manual_seed(derive(seed, "channel", channel))
        starts.append(torch.randn(count, generator=generator))
        moves.append(2 * torch.rand(steps, 6, generator=generator) - 1)
    return torch.stack(starts), torch.stack(moves)


def visualise(
    networks: Sequence[nn.Module],
    channels: Sequence[int],
    shape: Sequence[int],
    preprocess: Preprocess,
    *,
    layer: str | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> Tensor:
    """An image for every network and channel, `(K, channels, colours, H, W)` from 0 to 1.

    Maximises the mean of the channel's output, before its activation function.

    Args:
        networks: in evaluation mode, with the same layer.
        shape: of one network input, (colours, H, W).

    Raises:
        ValueError: there is no such layer or channel, or networks differ in it.
    """
    how = settings or Settings()
    found = [layer_of(network, layer) for network in networks]
    if len({(name, count) for name, _, count in found}) > 1:
        raise ValueError(
            "RUN: members have a different number of channels (neurons were removed): their "
            "features cannot be compared one by one"
        )
    if max(channels) >= found[0][2]:
        raise ValueError(f"--channels: {found[0][0]} has {found[0][2]} channels")
    colours, high, wide = shape
    k, c = len(networks), len(channels)
    start, moves = _draws(channels, how.steps, colours * high * wide, seed)
    free = (how.start * start).view(c, colours, high, wide).repeat(k, 1, 1, 1).requires_grad_(True)
    mean = torch.tensor(preprocess.mean).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std).view(1, -1, 1, 1)
    optimizer = torch.optim.Adam([free], lr=how.lr)
    index = torch.arange(c), torch.tensor(channels)
    answers: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, output: answers.append(output))
        for _, module, _ in found
    ]
    try:
        for step in range(how.steps):
            matrix = transforms(moves[:, step], (high, wide), how).repeat(k, 1, 1)
            grid = affine_grid(matrix, [k * c, colours, high, wide], align_corners=False)
            moved = grid_sample(free.sigmoid() - 0.5, grid, align_corners=False) + 0.5
            inputs = ((moved - mean) / std).split(c)
            answers.clear()
            for network, part in zip(networks, inputs, strict=True):
                network(part)
            loss = -sum(
                output.flatten(2).mean(2)[index].sum() if output.dim() > 2 else output[index].sum()
                for output in answers
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return free.detach().sigmoid().view(k, c, colours, high, wide)


def of_run(
    run: Run,
    networks: Sequence[nn.Module],
    channels: Sequence[int],
    *,
    layer: str | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> Tensor:
    """`visualise` in the run's own units.

    Raises:
        ValueError: see there; or the run's inputs are not images.
    """
    check(run)
    preprocess = run.ensemble.preprocess
    if not preprocess.mean:
        raise ValueError(f"RUN: {run.folder}: its inputs are not images from 0 to 255")
    shape = tuple(run.images(1)[0].shape[1:])
    return visualise(
        networks, channels, shape, preprocess, layer=layer, settings=settings, seed=seed
    )


def _draw(figure: Figure, images: Tensor, names: Sequence[str], channels: Sequence[int]) -> None:
    panels = figure.subplots(len(names), len(channels), squeeze=False)
    for k, name in enumerate(names):
        for c, channel in enumerate(channels):
            axes = panels[k, c]
            picture = images[k, c].permute(1, 2, 0).numpy()
            axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if k == 0:
                axes.set_title(f"{channel}", fontsize=7, pad=2)
            if c == 0:
                axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")


def find(
    run: Run,
    *,
    shown: int = 12,
    most: int = 5,
    layer: str | None = None,
    settings: Settings | None = None,
) -> Findings:
    """Pictures of the first channels in the parent and members, and how far they are apart.

    Raises:
        ValueError: the inputs are no images, the layer is not there, or a file is missing.
    """
    named = run.networks(most)
    names, networks = [id for id, _ in named], [network for _, network in named]
    if run.has_parent and "parent" not in names:
        names, networks = ["parent", *names], [run.parent, *networks]
    name, _, count = layer_of(networks[0], layer)
    channels = list(range(min(shown, count)))
    images = of_run(run, networks, channels, layer=layer, settings=settings)
    flat = images.double().flatten(2)
    distances = torch.stack([(flat - one).square().mean(2).sqrt().mean(1) for one in flat])
    pairs = zip(names, distances.tolist(), strict=True)
    rows = [[a, *(f"{v:.4f}" for v in line)] for a, line in pairs]
    numbers = pd.DataFrame(distances.numpy(), columns=names)
    numbers.insert(0, "network", names)
    steps = (settings or Settings()).steps
    return Findings(
        "features",
        "Feature visualisation",
        [f"Layer {name}, {steps} steps of Adam."],
        [
            Table(
                "features",
                f"RMSE between pictures of a channel in two networks, mean over {len(channels)} "
                f"channels of {name}",
                ["", *names],
                rows,
                numbers,
            )
        ],
        [
            Picture(
                "features",
                f"What channels of {name} answer to",
                "A column is one channel, a row one network: the image that drives its output "
                "highest, from the same start for all (Fig 7.3).",
                (0.72 * len(channels) + 1.0, 0.76 * len(names) + 0.2),
                partial(_draw, images=images, names=names, channels=channels),
            )
        ],
    )


def main() -> int:
    parser = findings.parser("Feature visualisation of members (7.3, Fig 7.3).", several=False)
    parser.add_argument("--layer", help="default: the last convolution")
    parser.add_argument("--channels", type=int, default=12, help="how many, from the first")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    arguments = parser.parse_args()

    def do() -> Findings:
        return find(
            Run.open(arguments.runs[0]),
            shown=max(1, arguments.channels),
            layer=arguments.layer,
            settings=Settings(steps=max(1, arguments.steps)),
        )

    return findings.main("features", do, arguments)


if __name__ == "__main__":
    sys.exit(main())
