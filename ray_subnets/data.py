"""Data sets as tensors, and batches of them.

A data set that is small enough lives on the device (Fashion-MNIST 47 MB, CIFAR 150 MB as bytes):
images stay uint8, and crop, flip and normalisation run there, a batch at a time. A larger one stays
on disk (`streaming.ImageFiles`). A batch depends only on (seed, epoch, position), so an interrupted
epoch can be done again from its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ray_subnets.inputs import WHOLE, is_whole
from ray_subnets.items import Items
from ray_subnets.recipes import derive
from ray_subnets.streaming import ImageFiles, Sample


@dataclass(frozen=True)
class Split:
    """`images` `(N, *shape)`: uint8, floating point or whole numbers, or files of images, or
    samples of a torch data set; `labels` `(N,)`: int64, or float32 targets of regression."""

    images: Tensor | ImageFiles | Items
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


Loaded = tuple[Split, Split, dict[str, Any]]
"""training part, test part, and what the data set decides itself: `mean`, `std`, `splits`"""


@dataclass(frozen=True)
class Preprocess:
    """From stored images to network input.

    uint8 images are divided by 255, then `(x - mean) / std` per channel. Floating-point inputs are
    taken as they are: the network's own input, already normalised. So are whole numbers (of words,
    of categories), as int64.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images.float()
        if is_whole(images):
            return images.to(WHOLE)
        shape = (1, -1) + (1,) * (images.dim() - 2)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class Data:
    """A data set: three disjoint splits. Fitness and calibration use `validation`, never `test`."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    """for regression: outputs of the network for each sample"""
    preprocess: Preprocess
    crop: int = 0
    """pixels of zero padding before a random crop to the original size; 0: none"""
    flip: bool = False
    """random horizontal flip"""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.images.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """What the network sees: float32, or int64 of whole numbers."""
        stored = self.train.images.dtype
        return torch.float32 if stored.is_floating_point or stored == torch.uint8 else WHOLE

    @cached_property
    def content(self) -> str:
        """Tells stored samples apart: SHA-256 of labels, and of inputs; of those that are read when
        they are needed, of a few."""
        total = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            total.update(f"{tuple(split.images.shape)} {split.images.dtype}".encode())
            total.update(split.labels.cpu().numpy().tobytes())
            total.update(content_of(split.images))
        return total.hexdigest()

    def to(self, device: torch.device) -> Data:
        validation = self.validation.to(device)
        test = validation if self.test is self.validation else self.test.to(device)
        return replace(self, train=self.train.to(device), validation=validation, test=test)


def content_of(images: Tensor | ImageFiles | Items) -> bytes:
    """What tells inputs apart: all that are in memory, else eight of them, as evaluation sees them,
    if they are the same each time."""
    if isinstance(images, Tensor):
        return bytes_of(images)
    few = images[spread(len(images), 8)]
    if isinstance(few, Items):
        few = replace(few, workers=0)
    first, again = (b"".join(map(bytes_of, few.split(8))) for _ in range(2))
    return first if first == again else b""


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def check_split(name: str, split: Split, num_classes: int | None = None) -> None:
    """Is this split usable by itself?

    Raises:
        ValueError: empty, images and labels that do not fit together, labels outside the classes,
            NaN or infinite inputs or targets; the message names the split and the sample.
    """
    if len(split.images.shape) < 2 or split.labels.dim() != 1:
        raise ValueError(
            f"data: {name} images must be (N, ...) and labels (N,), not "
            f"{tuple(split.images.shape)} and {tuple(split.labels.shape)}"
        )
    if len(split.images) != len(split.labels):
        raise ValueError(
            f"data: {name} has {len(split.images)} images and {len(split.labels)} labels"
        )
    if len(split) == 0:
        raise ValueError(f"data: the {name} split is empty")
    if split.labels.is_floating_point():
        lost = ~split.labels.isfinite()
        if lost.any():
            raise ValueError(
                f"data: {name} has {int(lost.sum())} targets that are NaN or infinite, the first "
                f"is sample {int(lost.nonzero()[0])}; remove or repair them"
            )
        wrong = torch.zeros_like(lost)
    else:
        wrong = split.labels < 0
        if num_classes is not None:
            wrong |= split.labels >= num_classes
    if wrong.any():
        at = int(wrong.nonzero()[0])
        last = num_classes - 1 if num_classes else int(split.labels.max())
        raise ValueError(
            f"data: {name} label {int(split.labels[at])} (sample {at}) is outside the "
            f"{last + 1} classes 0 to {last}"
        )
    if isinstance(split.images, Tensor) and split.images.is_floating_point():
        bad = ~split.images.flatten(1).isfinite().all(1)
        if bad.any():
            raise ValueError(
                f"data: {name} has {int(bad.sum())} samples with NaN or infinite values, the "
                f"first is sample {int(bad.nonzero()[0])}; remove or repair them"
            )


def check_alike(name: str, split: Split, train: Split) -> None:
    """Do images of this split look like those of the training split?

    Raises:
        ValueError: another shape or type.
    """
    if split.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"data: {name} images are {tuple(split.images.shape[1:])}, "
            f"train images {tuple(train.images.shape[1:])}"
        )
    if split.images.dtype != train.images.dtype:
        raise ValueError(
            f"data: {name} images are {split.images.dtype}, train images {train.images.dtype}"
        )


def check(data: Data) -> Data:
    """The same data, once it is known to be usable.

    Raises:
        ValueError: see `check_split` and `check_alike`.
    """
    for name in ("train", "validation", "test"):
        split: Split = getattr(data, name)
        check_split(name, split, data.num_classes)
        check_alike(name, split, data.train)
    return data


def spread(total: int, limit: int) -> Tensor:
    """Rows, int64: `limit` of `total`, evenly spread, or all; not the first, since data may be
    sorted by class."""
    return torch.arange(total) if limit >= total else torch.arange(limit) * total // limit


def some(labels: Tensor, limit: int) -> Tensor:
    """Rows, int64, of `limit` samples: the first, unless classes are missing among them (data may
    be sorted by class), or targets are numbers: then evenly spread."""
    first = labels[:limit]
    if not labels.is_floating_point() and len(first.unique()) == len(labels.unique()):
        return torch.arange(len(first))
    return spread(len(labels), limit)


def farthest(data: Data) -> dict[str, Tensor]:
    """Split -> the samples `(n, *shape)` with its smallest and its largest whole number, by which a
    network shows whether it knows all; empty for other inputs, or those that are not in memory."""
    found = {}
    for name in ("train", "validation", "test"):
        images = getattr(data, name).images
        if isinstance(images, Tensor) and is_whole(images):
            flat = images.flatten(1)
            rows = torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()]).unique()
            found[name] = images[rows]
    return found


def bagged(data: Data, fraction: float, seed: int) -> Data:
    """The same data with a random `fraction` of its training samples (NP+BAG, chapter 5)."""
    if fraction == 1:
        return data
    n = len(data.train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    chosen = order[: max(1, round(fraction * n))].sort().values
    return replace(data, train=data.train.take(chosen.to(data.train.labels.device)))


@dataclass(frozen=True)
class Batch:
    """`x` network inputs `(n, *shape)`, `y` labels `(n,)`, `size` to divide the summed loss by."""

    x: Tensor
    y: Tensor
    size: float


def _random_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by its own random offset, zeros coming in (`(n, c, h, w)`)."""
    n, _, h, w = x.shape
    dy, dx = torch.randint(2 * padding + 1, (2, n), generator=generator, device=x.device)
    rows = dy[:, None] + torch.arange(h, device=x.device)
    columns = dx[:, None] + torch.arange(w, device=x.device)
    padded = pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    index = torch.arange(n, device=x.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Batches:
    """Shuffled, augmented, normalised training batches of one data set.

    `rank` of `world` takes every world-th sample of each global batch; the draws are those of the
    whole batch, so the union over ranks is the batch of a single process.
    """

    data: Data
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        last = len(self.data.train) % self.batch_size or self.batch_size
        if last < self.world:
            raise ValueError(
                f"parent.workers: {self.world} workers cannot share the last batch of {last} "
                "images; use another batch_size or fewer workers"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; the last batch may be smaller."""
        return -(-len(self.data.train) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch `epoch` (from 0).

        Raises:
            ValueError: an image file cannot be read.
        """
        train = self.data.train
        shuffle = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        order = torch.randperm(len(train), generator=shuffle)
        if isinstance(train.images, Tensor):
            inputs = self._augmented(train.images, order, epoch)
        else:
            inputs = self._decoded(train.images, order, epoch)
        for index, x in zip(
            order.to(train.images.device).split(self.batch_size), inputs, strict=True
        ):
            # DDP averages gradients over ranks, so each rank divides by its share of the batch.
            y = train.labels[index]
            yield Batch(x, y[self.rank :: self.world], len(index) / self.world)

    def _augmented(self, images: Tensor, order: Tensor, epoch: int) -> Iterator[Tensor]:
        """This rank's inputs, from images in memory."""
        device = images.device
        augment = torch.Generator(device).manual_seed(derive(self.seed, "augment", epoch))
        for index in order.to(device).split(self.batch_size):
            x = images[index]
            if self.data.crop:
                x = _random_crop(x, self.data.crop, augment)
            if self.data.flip:
                flipped = torch.rand(len(x), generator=augment, device=device) < 0.5
                x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
            yield self.data.preprocess(x)[self.rank :: self.world]

    def _decoded(self, images: ImageFiles | Items, order: Tensor, epoch: int) -> Iterator[Tensor]:
        """This rank's inputs, read when needed: a seed for each position, no other rank's."""

        def share(start: int, rows: Tensor) -> list[Sample]:
            mine = list(enumerate(rows.tolist(), start))[self.rank :: self.world]
            return [(row, derive(self.seed, "augment", epoch, position)) for position, row in mine]

        starts = range(0, len(order), self.batch_size)
        parts = map(share, starts, order.split(self.batch_size))
        return map(self.data.preprocess, images.stream(parts, flip=self.data.flip))
