"""Shifted test data: CIFAR-10-C and CIFAR-100-C as published, or the same done to any images.

Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019: 15 corruptions, 4 extra ones, 5 severities each. The settings below are
those of the CIFAR files (weaker than those for ImageNet). Frost is our own drawing, see
`weather.frost`; all other corruptions follow the code that made the files.

A grey image is treated as one channel; what has a colour (frost, spatter, tint) gives it the luma.
`saturate` leaves grey images as they are at severities 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_subnets.data import Split, spread
from ray_subnets.recipes import derive
from ray_subnets.shifts import blurs, distortions, weather
from ray_subnets.shifts.distortions import Array
from ray_subnets.streaming import ImageFiles

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8
"""pixels of a side"""

_AT_ONCE = 2**20  # values of the images that are worked on together

_Table = dict[str, tuple[Callable[..., Array], tuple[Any, Any, Any, Any, Any]]]

_STANDARD: _Table = {
    "gaussian_noise": (distortions.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (distortions.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (distortions.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        blurs.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        blurs.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (blurs.motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (blurs.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (weather.frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (weather.fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (distortions.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (distortions.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        distortions.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (distortions.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (distortions.jpeg_compression, (80, 65, 58, 50, 40)),
}
_EXTRA: _Table = {
    "speckle_noise": (distortions.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (blurs.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (
        weather.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": (distortions.saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}

NAMES = tuple(_STANDARD)
"""the 15 standard corruptions: their mean is the headline"""
EXTRA = tuple(_EXTRA)
"""the 4 that the authors left for validation"""


def _check_cell(name: str, severity: int) -> None:
    if name not in NAMES + EXTRA:
        raise ValueError(
            f"corruptions: unknown corruption {name!r}; known: {', '.join(NAMES + EXTRA)}"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"corruptions: severity must be 1 to 5, not {severity!r}")


def corrupt(
    images: Tensor, name: str, severity: int, seed: int = 0, *, rows: Sequence[int] | None = None
) -> Tensor:
    """Corrupted copies of images; they depend on `seed`, `name`, `severity` and the row, on nothing
    else, and are the same on every machine.

    Args:
        images: `(N, C, H, W)` uint8, C 1 or 3, sides of at least 8 pixels.
        name: one of `NAMES` or `EXTRA`.
        severity: 1 to 5.
        rows: of each image in its data set, if these are not its first N.

    Returns:
        `(N, C, H, W)` uint8, on the device of `images`.

    Raises:
        ValueError: unknown name or severity, or images that cannot be corrupted.
    """
    _check_cell(name, severity)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "corruptions: need uint8 images (N, C, H, W), grey (C=1) or colour (C=3), not "
            f"{images.dtype} {tuple(images.shape)}; use a data set of images"
        )
    if min(images.shape[2:]) < SMALLEST:
        raise ValueError(
            f"corruptions: need images of at least {SMALLEST} x {SMALLEST} pixels, not "
            f"{images.shape[2]} x {images.shape[3]}"
        )
    places = range(len(images)) if rows is None else rows
    assert len(places) == len(images)
    work, settings = {**_STANDARD, **_EXTRA}[name]
    source, result = images.cpu().numpy(), np.empty(tuple(images.shape), dtype=np.uint8)
    count = max(1, _AT_ONCE // max(1, source[0].size)) if len(source) else 1
    for start in range(0, len(source), count):
        part = slice(start, start + count)
        draws = [
            np.random.Generator(np.random.SFC64(derive(seed, name, severity, int(row))))
            for row in places[part]
        ]
        x = work(source[part] / 255, draws, settings[severity - 1])
        result[part] = distortions.to_bytes(x)
    return torch.from_numpy(result).to(images.device)


def rows_of(total: int, limit: int | None) -> Tensor:
    """`data.spread`, all rows without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"corruptions: the number of samples must be at least 1, not {limit}")
    return spread(total, total if limit is None else limit)


def splits(
    test: Split,
    *,
    names: Sequence[str] = NAMES + EXTRA,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    limit: int | None = None,
    root: str | Path | None = None,
) -> Iterator[tuple[str, int, Split]]:
    """(corruption, severity, split), one after another, so that one is in memory at a time.

    Args:
        test: the clean test images; `rows_of(len(test), limit)` are the rows that are used.
        limit: at most so many samples.
        root: the folder of CIFAR-10-C or CIFAR-100-C, to read instead of to generate.

    Raises:
        ValueError: see `corrupt` and `published`; or `root` has not the labels of `test`.
    """
    for name in names:
        for severity in severities:
            _check_cell(name, severity)
    rows = rows_of(len(test), limit)
    clean = test.take(rows.to(test.labels.device))
    if root is None and isinstance(clean.images, ImageFiles):
        clean = Split(torch.cat(list(clean.images.split(500))), clean.labels)
    for name in names:
        for severity in severities:
            if root is None:
                assert isinstance(clean.images, Tensor)
                images = corrupt(clean.images, name, severity, seed, rows=rows.tolist())
                yield name, severity, Split(images, clean.labels)
            else:
                whole = published(root, name, severity)
                if len(whole) != len(test) or not torch.equal(whole.labels, test.labels.cpu()):
                    raise ValueError(
                        f"corruptions: {root} has not the labels of this test data; give the "
                        "folder of its own data set (CIFAR-10-C or CIFAR-100-C), and take "
                        "validation data from the training part (data.validation_from=train)"
                    )
                yield name, severity, whole.take(rows)


# --- as published -------------------------------------------------------------------------------

_PER_SEVERITY = 10_000
_SHAPE = (5 * _PER_SEVERITY, 32, 32, 3)
_REMEDY = (
    "get CIFAR-10-C.tar from https://zenodo.org/records/2535967 or CIFAR-100-C.tar from "
    "https://zenodo.org/records/3555552, unpack it and name the folder that has the .npy files"
)


def published(root: str | Path, name: str, severity: int) -> Split:
    """One corruption and severity of CIFAR-10-C or CIFAR-100-C: 10,000 images.

    Args:
        root: the folder with `<corruption>.npy`, 50,000 images with severity 1 first, and
            `labels.npy`. Files are memory-mapped: only what is returned is read.

    Returns:
        images `(10000, 3, 32, 32)` uint8, labels `(10000,)` int64, in the order of the test part.

    Raises:
        ValueError: unknown name or severity; a file is missing or damaged.
    """
    _check_cell(name, severity)
    folder = Path(root).expanduser()
    part = slice((severity - 1) * _PER_SEVERITY, severity * _PER_SEVERITY)
    images = _mapped(folder / f"{name}.npy", _SHAPE)[part]
    labels = _mapped(folder / "labels.npy", _SHAPE[:1])[part]
    return Split(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not path.is_file():
        raise ValueError(f"corruptions: no {path.name} in {path.parent}; {_REMEDY}")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()) or "not an .npy file"
        raise ValueError(f"corruptions: cannot read {path} ({reason}); {_REMEDY}") from None
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(
            f"corruptions: {path} holds {array.dtype} {array.shape}, not uint8 {shape}; {_REMEDY}"
        )
    return array
