"""Blurs of Hendrycks & Dietterich 2019, for whole batches of images.

Shapes, ranges and lengths as in `distortions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import ndimage

from ray_subnets.shifts.distortions import Array, Bytes, Draws, scale_of, smooth, to_bytes


def gaussian_blur(x: Array, draws: Draws, sigma: float) -> Array:
    return smooth(x, sigma * scale_of(x))


def glass_blur(x: Array, draws: Draws, setting: tuple[float, int, int]) -> Array:
    """Each pixel takes the value of one nearby, `rounds` times, between two blurs.

    The paper says that pixels change places; in the code that made the published files a pixel is
    copied (it swaps views of one array), and reaches up and to the left only. So it is done here.
    """
    sigma, reach, rounds = setting
    scale = scale_of(x)
    n, _, height, width = x.shape
    reach = round(reach * scale)
    image = to_bytes(smooth(x, sigma * scale))
    rows = np.arange(reach + 1, height - reach + 1)
    columns = np.arange(reach + 1, width - reach + 1)
    for _ in range(rounds):
        shift = np.stack([d.integers(-reach, reach, (2, len(rows), len(columns))) for d in draws])
        taken = image[
            np.arange(n)[:, None, None],
            :,
            rows[:, None] + shift[:, 0],
            columns + shift[:, 1],
        ]
        image[:, :, rows[:, None], columns] = taken.transpose(0, 3, 1, 2)
    return smooth(image / 255, sigma * scale)


def defocus_blur(x: Array, draws: Draws, setting: tuple[float, float]) -> Array:
    """A disk of `radius`, its edge softened by a Gaussian of 3 (5 if it is large) pixels."""
    radius, edge = setting
    radius *= scale_of(x)
    reach = math.ceil(radius) + 2
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    kernel = smooth(disk / disk.sum(), edge, truncate=(1 if radius <= 8 else 2) / edge)
    return ndimage.correlate(x, kernel[None, None], mode="mirror")


def motion_blur(x: Array, draws: Draws, setting: tuple[float, float]) -> Array:
    """Streaks within 45 degrees of the horizontal."""
    angles = [float(draw.uniform(-45, 45)) for draw in draws]
    return streak(to_bytes(x), angles, setting, scale_of(x))


def streak(
    image: Bytes, angles: Sequence[float], setting: tuple[float, float], scale: float
) -> Array:
    """ImageMagick's motion blur: half a Gaussian along a line, a pixel at a time, cut to 8 bits.

    Args:
        angles: of each image, in degrees.
        setting: the line has 1 + 2 `radius` pixels, the Gaussian a deviation of `sigma`.
    """
    radius, sigma = setting
    steps = np.arange(2 * math.ceil(radius * scale) + 1)
    weights = np.exp(-((steps / (sigma * scale)) ** 2) / 2)
    weights /= weights.sum()
    seen = weights > 1e-9
    radians = np.deg2rad(angles)[:, None]
    n, channels, height, width = image.shape
    batch, channel = np.arange(n)[:, None, None, None], np.arange(channels)[:, None, None]
    result = np.zeros(image.shape)
    for step, weight in zip(steps[seen], weights[seen], strict=True):
        down = np.ceil(step * np.sin(radians) - 0.5).astype(int) + np.arange(height)
        right = np.ceil(step * np.cos(radians) - 0.5).astype(int) + np.arange(width)
        rows = np.clip(down, 0, height - 1)[:, None, :, None]
        columns = np.clip(right, 0, width - 1)[:, None, None, :]
        result += weight * image[batch, channel, rows, columns]
    return to_bytes(result / 255) / 255


@cache
def _enlarging(size: int, factor: float) -> Array:
    """`(size, size)`: the matrix that enlarges the middle of a line of pixels, linearly."""
    kept = math.ceil(size / factor)
    start = (size - kept) // 2
    enlarged = ndimage.zoom(np.eye(size)[start : start + kept], (factor, 1), order=1)
    cut = (len(enlarged) - size) // 2
    return enlarged[cut : cut + size]


def enlarge(x: Array, factor: float) -> Array:
    """The middle of the images, `factor` times larger, at the same size."""
    height, width = x.shape[-2:]
    return _enlarging(height, factor) @ x @ _enlarging(width, factor).T


def zoom_blur(x: Array, draws: Draws, end: float) -> Array:
    """Mean of the image and of its enlargements by 1, 1.01, 1.02 and so on to `end`."""
    factors = [float(factor) for factor in np.arange(1, end, 0.01)]
    return (x + sum(enlarge(x, factor) for factor in factors)) / (len(factors) + 1)
