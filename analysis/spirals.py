"""The binary interleaved spirals of section 4.3.1, as a data set: `data: analysis.spirals:load`.

2,500 points to train on, 250 held out for the test, as there; 250 more for validation. How many
turns the spirals have, and their noise, it does not say: one turn and 0.03 of the radius here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ray_subnets.data import Data, Preprocess, Split

TURNS = 1.0
NOISE = 0.03
"""standard deviation in both coordinates; the radius goes from 0.1 to 1"""


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`(N, 2)` float32 and `(N,)` int64, the two arms in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    along = torch.rand(count, generator=generator, dtype=torch.float64)
    angle = 2 * math.pi * TURNS * along + math.pi * labels
    radius = 0.1 + 0.9 * along
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    x += NOISE * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return x.float(), labels


def load() -> Data:
    """Training, validation and test points."""
    train, validation, test = (
        Split(*points(count, seed)) for seed, count in enumerate((2500, 250, 250))
    )
    return Data("spirals of 4.3.1", train, validation, test, 2, Preprocess())
