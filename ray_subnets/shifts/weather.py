"""Fog, frost, snow and spatter of Hendrycks & Dietterich 2019, for whole batches of images.

Shapes, ranges and lengths as in `distortions`. What has a colour gives a grey image its luma.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ray_subnets.shifts.blurs import enlarge, streak
from ray_subnets.shifts.distortions import (
    Array,
    Bytes,
    Draws,
    luma,
    normals,
    scale_of,
    smooth,
    to_bytes,
    uniforms,
)

# Mean colour and contrast (standard deviation within 32 x 32 pixels) of the five photographs that
# the published files are made of, at the size used there; two of them are the same.
_FROSTS = (
    ((78, 149, 166), 15),
    ((201, 205, 214), 18),
    ((201, 205, 214), 18),
    ((138, 153, 166), 26),
    ((112, 123, 135), 35),
)
_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)


def _coloured(amount: Array, colour: tuple[float, ...], channels: int) -> Array:
    """`amount` `(N, 1, H, W)` of a colour, `(N, channels, H, W)`."""
    painted = amount * np.array(colour)[:, None, None]
    return painted if channels == 3 else luma(painted)


def plasma(draws: Draws, size: int, decay: float) -> Array:
    """`(N, size, size)` clouds in [0, 1] by the diamond-square algorithm, without borders.

    Args:
        size: a power of two.
        decay: by how much disturbances shrink from one scale to the next half as large.
    """
    values = uniforms(draws, (size * size,)) * 2 - 1
    field, used = np.zeros((len(values), size, size)), 1
    step, amplitude = size, 100.0

    def disturb(mean: Array) -> Array:
        nonlocal used
        count = mean[0].size
        noise = values[:, used : used + count].reshape(mean.shape)
        used += count
        return mean + amplitude**2 * noise

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        middles = disturb((pairs + np.roll(pairs, -1, 2)) / 4)
        field[:, half::step, half::step] = middles
        # An edge has a corner on either side along it and a middle on either side across.
        across = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 2)
        field[:, ::step, half::step] = disturb(across / 4)
        down = middles + np.roll(middles, 1, 2) + corners + np.roll(corners, -1, 1)
        field[:, half::step, ::step] = disturb(down / 4)
        step, amplitude = half, amplitude / decay
    field -= field.min((1, 2), keepdims=True)
    return field / field.max((1, 2), keepdims=True)


def _clouds(draws: Draws, height: int, width: int, decay: float) -> Array:
    """`(N, 1, height, width)`"""
    size = 2 ** math.ceil(math.log2(max(height, width)))
    return plasma(draws, size, decay)[:, None, :height, :width]


def fog(x: Array, draws: Draws, setting: tuple[float, float]) -> Array:
    """Clouds are added, then all is scaled back to the brightest pixel."""
    strength, decay = setting
    clouds = _clouds(draws, x.shape[2], x.shape[3], decay)
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + strength * clouds) * brightest / (brightest + strength)


def frost(x: Array, draws: Draws, setting: tuple[float, float]) -> Array:
    """A picture of frost over the image.

    The published files use photographs that are not ours to pass on. Here the frost is drawn:
    crossed needles on clouds, with mean colour and contrast of one of those photographs. So this
    corruption deviates from the published one.
    """
    image, ice = setting
    scale, (height, width) = scale_of(x), x.shape[2:]
    kinds = [int(draw.integers(len(_FROSTS))) for draw in draws]
    clouds = plasma(draws, 2 ** math.ceil(math.log2(max(height, width))), 2)[
        :, None, :height, :width
    ]
    needles = np.zeros((len(x), 1, height, width))
    for _ in range(2):
        dots = to_bytes(0.5 + 0.2 * normals(draws, (1, height, width)))
        angles = [float(draw.uniform(0, 360)) for draw in draws]
        needles = np.maximum(needles, streak(dots, angles, (3, 1.5), scale))
    # Three quarters of the variance in needles: neighbours differ as much as in the photographs.
    pattern = math.sqrt(0.75) * _standardised(needles) + 0.5 * _standardised(clouds)
    colour = np.array([_FROSTS[kind][0] for kind in kinds]) / 255
    contrast = np.array([_FROSTS[kind][1] for kind in kinds]) / 255
    layer = colour[:, :, None, None] + contrast[:, None, None, None] * pattern
    layer = np.clip(layer, 0, 1)
    return image * x + ice * (layer if x.shape[1] == 3 else luma(layer))


def _standardised(x: Array) -> Array:
    """Mean 0 and standard deviation 1 of each image."""
    x = x - x.mean((1, 2, 3), keepdims=True)
    return x / np.maximum(x.std((1, 2, 3), keepdims=True), 1e-6)


def snow(
    x: Array, draws: Draws, setting: tuple[float, float, float, float, float, float, float]
) -> Array:
    """Flakes, blurred as they fall, and the same turned by 180 degrees; the image whitened.

    `setting`: mean and deviation of the noise, by how much it is enlarged, what is left of it;
    radius and sigma of the blur; how much of the image stays as it is.
    """
    mean, deviation, factor, threshold, radius, sigma, stays = setting
    scale, (height, width) = scale_of(x), x.shape[2:]
    flakes = enlarge(mean + deviation * normals(draws, (1, height, width)), factor * scale)
    flakes[flakes < threshold] = 0
    angles = [float(draw.uniform(-135, -45)) for draw in draws]
    flakes = streak(to_bytes(flakes), angles, (radius, sigma), scale)
    grey = x if x.shape[1] == 1 else luma(x)
    x = stays * x + (1 - stays) * np.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + flakes[:, :, ::-1, ::-1]


def spatter(
    x: Array, draws: Draws, setting: tuple[float, float, float, float, float, bool]
) -> Array:
    """Drops of water (the first three severities) or of mud (the last two).

    `setting`: mean and deviation of the noise, its blur, what of it is liquid; strength of water or
    blur of mud; is it mud.
    """
    mean, deviation, blur, threshold, strength, mud = setting
    liquid = smooth(mean + deviation * normals(draws, x.shape[2:]), blur)
    liquid = enlarge(liquid, scale_of(x))  # drops grow with the image
    if mud:
        cover = smooth((liquid > threshold).astype(np.float64), strength)[:, None]
        cover[cover < 0.8] = 0
        return x * (1 - cover) + _coloured(cover, _MUD, x.shape[1])
    liquid[liquid < threshold] = 0
    # Beyond 255 levels start again at 0: so they do in the published files.
    drops = (np.floor(liquid * 255 + 1e-6) % 256).astype(np.uint8)
    shine = drops * _relief(drops)
    shine /= np.maximum(shine.max((1, 2), keepdims=True), 1)
    return x + _coloured(strength * shine[:, None], _WATER, x.shape[1])


def _relief(drops: Bytes) -> Array:
    """`(N, H, W)` How light falls on drops: the distance to their edges, embossed."""
    distance = _mean_of_nine(_distance(_edges(drops)))
    even = _equalised(np.floor(distance + 1e-6).astype(np.uint8)).astype(np.float64)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])[None]
    lit = ndimage.correlate(even, emboss, mode="mirror")
    return np.floor(_mean_of_nine(np.clip(lit, 0, 255)) + 0.5 + 1e-6)


def _distance(marked: NDArray[np.bool_], most: float = 20.0) -> Array:
    """`(N, H, W)` pixels to the nearest marked one, at most `most`, as a path of short steps.

    Steps and their lengths are OpenCV's, and the result with them: to the side 1, across 1.4, a
    knight's move 2.1969.
    """
    lengths = {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}
    moves = [(rows, columns) for rows in range(-2, 3) for columns in range(-2, 3)]
    distance = np.where(marked, 0.0, most)
    _, height, width = marked.shape
    while True:
        around = np.pad(distance, ((0, 0), (2, 2), (2, 2)), constant_values=most)
        shorter = distance.copy()
        for rows, columns in moves:
            length = lengths.get((min(abs(rows), abs(columns)), max(abs(rows), abs(columns))))
            if length is not None:
                there = around[:, 2 + rows : 2 + rows + height, 2 + columns : 2 + columns + width]
                np.minimum(shorter, there + length, out=shorter)
        if np.array_equal(shorter, distance):
            return distance
        distance = shorter


def _mean_of_nine(x: Array) -> Array:
    return ndimage.correlate(x, np.ones((1, 3, 3)), mode="mirror") / 9


def _edges(image: Bytes, low: int = 50, high: int = 150) -> NDArray[np.bool_]:
    """Canny's edges `(N, H, W)`: ridges of the Sobel gradient (sum of magnitudes) above `low` that
    are connected to one above `high`.
    """
    signed = image.astype(np.int64)
    right, down = _sobel(signed, 2), _sobel(signed, 1)
    size = np.abs(right) + np.abs(down)
    padded = np.pad(size, ((0, 0), (1, 1), (1, 1)))

    def neighbour(rows: int, columns: int) -> NDArray[np.int64]:
        _, height, width = size.shape
        return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    steep = np.abs(down) / np.maximum(np.abs(right), 1e-9)
    flat, tall = steep < math.tan(math.pi / 8), steep > math.tan(3 * math.pi / 8)
    along = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    upright = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    slanted = np.where(np.sign(right) * np.sign(down) < 0, rising, falling)
    ridge = np.where(flat, along, np.where(tall, upright, slanted)) & (size > low)
    eight = np.ones((1, 3, 3), dtype=bool)
    return ndimage.binary_propagation(ridge & (size > high), eight, ridge)


def _sobel(image: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Sobel's derivative along `axis` of `(N, H, W)`."""
    steps = ndimage.correlate1d(image, [-1, 0, 1], axis, mode="nearest")
    return ndimage.correlate1d(steps, [1, 2, 1], 3 - axis, mode="nearest")


def _equalised(image: Bytes) -> Bytes:
    """Levels spread so that their histogram is even, image by image; the lowest becomes 0."""
    results = np.empty_like(image)
    for row, pixels in enumerate(image):
        counts = np.bincount(pixels.ravel(), minlength=256)
        total, lowest = counts.cumsum(), counts[pixels.min()]
        left = pixels.size - lowest
        table = np.rint((total - lowest) * (255 / left)) if left else np.arange(256)
        results[row] = np.clip(table, 0, 255).astype(np.uint8)[pixels]
    return results
