"""Noise, colour and digital faults of Hendrycks & Dietterich 2019, for whole batches of images.

Shape legend: N images, C channels (1 or 3), H rows, W columns. Images are float64 in [0, 1]; a
result may leave that range, `corruptions` clips it. Every image has a random generator of its own.

Lengths in pixels are those published for 32 x 32 (CIFAR-C). They stay as they are for smaller
images and grow in proportion for larger ones; at 224 pixels they come near those of ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Draws = Sequence[Generator]
"""one source of random numbers for each image"""

LUMA = np.array([0.299, 0.587, 0.114])
"""grey value of red, green and blue (ITU-R BT.601)"""

# A value this little below a level counts as that level when fractions are cut off, so that
# rounding errors, which differ between processors, change nothing.
_ROUNDING = 1e-4


def to_bytes(x: Array) -> Bytes:
    """[0, 1] to 0..255; fractions are cut off, as in the published files."""
    return np.floor(np.clip(x, 0, 1) * 255 + _ROUNDING).astype(np.uint8)


def scale_of(x: Array) -> float:
    """What a length in pixels is multiplied by."""
    return max(1.0, min(x.shape[2:]) / 32)


def normals(draws: Draws, shape: tuple[int, ...]) -> Array:
    """`(N, *shape)` from Normal(0, 1)."""
    return np.stack([draw.standard_normal(shape) for draw in draws])


def uniforms(draws: Draws, shape: tuple[int, ...]) -> Array:
    """`(N, *shape)` from [0, 1)."""
    return np.stack([draw.random(shape) for draw in draws])


def smooth(x: Array, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """A Gaussian over the last two axes."""
    sigmas = (0.0,) * (x.ndim - 2) + (sigma, sigma)
    return ndimage.gaussian_filter(x, sigmas, mode=mode, truncate=truncate)


# --- noise --------------------------------------------------------------------------------------


def gaussian_noise(x: Array, draws: Draws, deviation: float) -> Array:
    return x + deviation * normals(draws, x.shape[1:])


def shot_noise(x: Array, draws: Draws, photons: float) -> Array:
    """Poisson: a white pixel counts `photons` on average."""
    return (
        np.stack([d.poisson(image * photons) for d, image in zip(draws, x, strict=True)]) / photons
    )


def impulse_noise(x: Array, draws: Draws, amount: float) -> Array:
    """A fraction `amount` of all values, channel by channel, becomes 0 or 1."""
    salt = (uniforms(draws, x.shape[1:]) < 0.5).astype(np.float64)
    return np.where(uniforms(draws, x.shape[1:]) < amount, salt, x)


def speckle_noise(x: Array, draws: Draws, deviation: float) -> Array:
    return x + x * deviation * normals(draws, x.shape[1:])


# --- colour -------------------------------------------------------------------------------------


def contrast(x: Array, draws: Draws, factor: float) -> Array:
    """Distance from the mean of each channel, times `factor`."""
    mean = x.mean((2, 3), keepdims=True)
    return (x - mean) * factor + mean


def brightness(x: Array, draws: Draws, more: float) -> Array:
    """`more` is added to the value in hue-saturation-value; hue and saturation stay."""
    value = x.max(1, keepdims=True)
    brighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def saturate(x: Array, draws: Draws, setting: tuple[float, float]) -> Array:
    """Saturation in hue-saturation-value, times `factor` plus `more`.

    Grey has the hue of red, so `more` tints it; a grey image becomes the luma of that.
    """
    factor, more = setting
    value = x.max(1, keepdims=True)
    distance = value - x
    saturation = distance.max(1, keepdims=True) / np.where(value > 0, value, 1)
    target = np.clip(saturation * factor + more, 0, 1)
    red = np.stack([np.zeros_like(value), value, value], 1)[:, :, 0] * target
    grey = value - (red if x.shape[1] == 3 else luma(red))
    ratio = target / np.where(saturation > 0, saturation, 1)
    return np.where(saturation > 0, value - distance * ratio, grey)


def luma(x: Array) -> Array:
    """`(N, 3, H, W)` -> `(N, 1, H, W)`"""
    return np.tensordot(x, LUMA, (1, 0))[:, None]


# --- digital ------------------------------------------------------------------------------------


def _by_pillow(x: Array, change: Callable[[Image.Image], Image.Image]) -> Array:
    """Each image through Pillow, as 8-bit grey or RGB."""
    results = []
    for image in to_bytes(x).transpose(0, 2, 3, 1):
        grey = image.shape[2] == 1
        changed = change(Image.fromarray(image[:, :, 0] if grey else image))
        results.append(np.atleast_3d(np.asarray(changed)))
    return np.stack(results).transpose(0, 3, 1, 2) / 255


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def jpeg_compression(x: Array, draws: Draws, quality: int) -> Array:
    return _by_pillow(x, partial(_through_jpeg, quality=quality))


def _coarse(image: Image.Image, factor: float) -> Image.Image:
    size = int(image.width * factor), int(image.height * factor)
    small = image.resize(size, Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def pixelate(x: Array, draws: Draws, factor: float) -> Array:
    """Box-averaged to `factor` of its size and back."""
    return _by_pillow(x, partial(_coarse, factor=factor))


def elastic_transform(x: Array, draws: Draws, setting: tuple[float, float, float]) -> Array:
    """A random affine map, then a smooth random displacement.

    `setting`, each a fraction of the shorter side: `strength` and `sigma` of the displacement, a
    uniform field that is blurred and multiplied; how far each of three corners moves.
    """
    height, width = (int(side) for side in x.shape[2:])
    strength, sigma, corners = (part * min(height, width) for part in setting)
    middle, half = np.array([width // 2, height // 2]), min(height, width) // 3
    old = middle + half * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    new = old + corners * (2 * uniforms(draws, (3, 2)) - 1)
    corners_now = np.concatenate([new, np.ones((len(x), 3, 1))], 2)
    back: Array = np.linalg.solve(corners_now, np.broadcast_to(old, new.shape))
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    place: Array = np.stack([columns, rows, np.ones((height, width))], 2)
    x = _sample(x, place @ back[:, None], edge_pixels_twice=False)
    if strength == 0:
        return x
    push = smooth(2 * uniforms(draws, (2, height, width)) - 1, sigma, "reflect", truncate=3)
    where: Array = place[..., :2] + strength * push.transpose(0, 2, 3, 1)
    return _sample(x, where, edge_pixels_twice=True)


def _sample(x: Array, where: Array, *, edge_pixels_twice: bool) -> Array:
    """Bilinear values of `x` at `where`, `(N, H, W, 2)`: column and row in pixels.

    Beyond the border the image is mirrored: at its edge, or at the middle of its last pixels.
    """
    size = np.array([x.shape[3], x.shape[2]])
    grid = (2 * where + 1) / size - 1 if edge_pixels_twice else 2 * where / (size - 1) - 1
    return torch.nn.functional.grid_sample(
        torch.from_numpy(x),
        torch.from_numpy(grid),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=not edge_pixels_twice,
    ).numpy()
