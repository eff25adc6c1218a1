"""Images of another data set in the shape of the first, for out-of-distribution detection."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_subnets import datasets
from ray_subnets.data import Data
from ray_subnets.shifts.corruptions import rows_of

EMBEDDED = ("digits", "patches")
"""always at hand, and made to fit any shape"""

_SAME_CLASSES = {"digits": ("digits", "mnist"), "mnist": ("digits", "mnist")}


def ood_split(
    name: str, data: Data, *, root: str | None = None, limit: int | None = None, seed: int = 0
) -> Tensor:
    """`(N, C, H, W)` uint8: test images of `name`, shaped as those of `data`.

    `digits` (scikit-learn's, 8 x 8, all 1,797) are resized to the images; `patches` are 2,000
    pieces cut at random from scikit-learn's two photographs. Any other data set of `datasets` must
    have images of the same size; grey ones become colour where needed. Normalise with
    `data.preprocess`, as the network expects.

    Args:
        root: where the files of `name` are, if not at their usual place.
        limit: at most so many images.
        seed: where patches are cut.

    Raises:
        ValueError: unknown name or missing files; the same data or classes; shapes do not fit.
    """
    shape = data.input_shape
    if data.train.images.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"outsiders: {data.name} has no uint8 images (C, H, W), grey or colour, but "
            f"{data.train.images.dtype} {shape}; leave out-of-distribution detection out"
        )
    if name in _SAME_CLASSES.get(data.name, (data.name,)):
        others = [other for other in EMBEDDED if other not in _SAME_CLASSES.get(data.name, ())]
        raise ValueError(
            f"outsiders: {name} has the classes of {data.name}; take another data set, for "
            f"instance {' or '.join(others)}"
        )
    if name == "patches":
        images = _patches(2000, shape, seed)
    elif name == "digits":
        digits = datasets.load("digits")
        parts = [part.images for part in (digits.train, digits.validation, digits.test)]
        images = _fitted(torch.cat([part for part in parts if isinstance(part, Tensor)]), shape)
    else:
        images = _test_images(name, root)
        if images.shape[2:] != shape[1:] or (images.shape[1] == 3 and shape[0] == 1):
            raise ValueError(
                f"outsiders: {name} images are {tuple(images.shape[1:])}, those of {data.name} "
                f"{shape}; take a data set of the same size, or one that is made to fit: "
                f"{' or '.join(EMBEDDED)}"
            )
        images = images.expand(-1, shape[0], -1, -1)
    return images[rows_of(len(images), limit)].contiguous()


def _test_images(name: str, root: str | None) -> Tensor:
    try:
        images = datasets.load(name, root=root).test.images
    except ValueError as error:
        raise ValueError(f"outsiders: cannot read {name}: {error}") from None
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"outsiders: {name} has no uint8 images in memory; take another data set, for instance "
            f"{' or '.join(EMBEDDED)}"
        )
    return images


def _fitted(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Grey images `(N, 1, H, W)` resized, with as many channels as needed."""
    resized = torch.nn.functional.interpolate(
        images.double(), shape[1:], mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).byte().expand(-1, shape[0], -1, -1)


def _patches(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Cut at random from photographs of a temple and of a flower, four times as large as the images
    if there is room, and reduced to their size.
    """
    from sklearn.datasets import load_sample_images

    channels, height, width = shape
    photographs = [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in load_sample_images().images]
    most = photographs[0].shape[1:]
    factor = min(4, most[0] // height, most[1] // width)
    if factor == 0:
        raise ValueError(
            f"outsiders: patches are at most {most[0]} x {most[1]} pixels, not {height} x {width}; "
            "take another data set"
        )
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([most[0] - factor * height, most[1] - factor * width]) + 1
    found = []
    for i in range(count):
        top, left = (torch.rand(2, generator=generator, dtype=torch.float64) * room).long()
        rows, columns = slice(top, top + factor * height), slice(left, left + factor * width)
        piece = photographs[i % 2][:, rows, columns].double()
        found.append(torch.nn.functional.avg_pool2d(piece, factor))
    images = torch.stack(found)
    if channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
        images = (images * weights[:, None, None]).sum(1, keepdim=True)
    return images.round().byte()
