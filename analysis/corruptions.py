"""One test image under every corruption and severity, as a picture.

    python -m analysis.corruptions --data fashion_mnist corruptions.png

A row per corruption, severities 1 to 5 after the clean image.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from ray_subnets import datasets
from ray_subnets.items import Items
from ray_subnets.shifts.corruptions import EXTRA, NAMES, SEVERITIES, splits
from ray_subnets.streaming import ImageFiles


def draw(name: str, row: int, path: str, root: str | None = None, seed: int = 0) -> None:
    """Write the picture of test image `row` of a data set.

    Raises:
        ValueError: the data cannot be read or corrupted, or has no such row.
    """
    test = datasets.load(name, root=root).test
    if not 0 <= row < len(test):
        raise ValueError(f"--row: {name} has test images 0 to {len(test) - 1}, not {row}")
    one = test.take(test.labels.new_tensor([row]))
    names = NAMES + EXTRA
    figure, axes = plt.subplots(
        10, 12, figsize=(13, 11.5), layout="constrained", subplot_kw={"xticks": [], "yticks": []}
    )
    blocks = {name: axes[i % 10, i // 10 * 6 : i // 10 * 6 + 6] for i, name in enumerate(names)}
    for axis in axes.flat[-6:]:
        axis.set_visible(False)
    for corruption, severity, split in splits(one, names=names, seed=seed):
        axis = blocks[corruption]
        if severity == SEVERITIES[0]:
            _show(axis[0], one.images)
            axis[0].set_ylabel(corruption.replace("_", "\n"), fontsize=8)
        _show(axis[severity], split.images)
        if corruption in (names[0], names[10]):
            axis[0].set_title("clean", fontsize=8)
            axis[severity].set_title(f"{severity}", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axis: Axes, images: Tensor | ImageFiles | Items) -> None:
    image = next(iter(images.split(1)))[0]
    axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)


def main() -> int:
    parser = argparse.ArgumentParser(description="A test image under every corruption, as a PNG.")
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("--data", default="digits", help="name of the data set")
    parser.add_argument("--root", help="where its files are")
    parser.add_argument("--row", type=int, default=0, help="which test image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        draw(arguments.data, arguments.row, arguments.out, arguments.root, arguments.seed)
    except (ValueError, OSError) as error:
        print(f"analysis.corruptions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
