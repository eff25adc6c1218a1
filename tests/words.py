"""Rows of whole numbers (0 is padding) whose class is which of three groups has most; a network of
an embedding and a transformer that reads them. As a user's module: `words:build`, `words:load`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KNOWN, LENGTH = 20, 8


class Reader(nn.Module):
    def __init__(self, width: int = 16, num_classes: int = 3) -> None:
        super().__init__()
        self.word = nn.Embedding(KNOWN, width, padding_idx=0)
        self.place = nn.Parameter(torch.zeros(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != 0
        there[:, 0] = True  # attention to nothing is NaN
        x = self.body(self.word(ids) + self.place, src_key_padding_mask=~there)
        return self.out((x * there[..., None]).sum(1) / there.sum(1, keepdim=True))


def build(num_classes: int, width: int = 16) -> Reader:
    return Reader(width, num_classes)


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, KNOWN, (count, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    x[torch.arange(LENGTH) >= lengths] = 0
    groups = [((x % 3 == k) & (x > 0)).sum(1) for k in range(3)]
    return x, torch.stack(groups, 1).argmax(1)


def load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return rows(300, 0), rows(100, 1)
