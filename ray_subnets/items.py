"""Samples of a `torch.utils.data.Dataset`, read when they are needed.

Whatever a data set does at random (cropping, flipping) it does anew in every epoch, and the same
again for the same (seed, epoch, position): torch's, NumPy's and Python's own generators are seeded
for each sample and put back after.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ray_subnets.recipes import derive

_CPU = torch.device("cpu")
Sample = tuple[int, int | None]
"""a row, and the seed of what is random in it (None: as for evaluation)"""


@contextmanager
def _generators_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _Seeded(Dataset[Any]):
    """Batches of samples, each read with generators of its own seed."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, samples: Sequence[Sample]) -> list[Any]:
        found = []
        with _generators_kept():
            for row, seed in samples:
                number = derive(0, "item", row) if seed is None else seed
                torch.default_generator.manual_seed(number)
                random.seed(number)
                np.random.seed(number % 2**32)  # noqa: NPY002
                found.append(self._dataset[row])
        return found


def _alone(found: list[Any]) -> list[Any]:
    return found


def read(dataset: Any, batches: Iterable[Sequence[Sample]], workers: int) -> Iterator[list[Any]]:
    """What the data set has for these samples, a batch at a time.

    Args:
        workers: processes that read; 0: this one.
    """
    loader: DataLoader[Any] = DataLoader(
        _Seeded(dataset),
        batch_sampler=list(batches),  # type: ignore[arg-type]  # rows with seeds
        num_workers=workers,
        collate_fn=_alone,
        generator=torch.Generator(),  # not the one that dropout draws from
    )
    return iter(loader)


@dataclass(frozen=True, eq=False)
class Items:
    """Inputs of a data set that look, as far as needed, like a tensor `(N, *shape)`."""

    dataset: Any
    """map-style: `dataset[i]` is an input and a label"""
    rows: Tensor
    """`(N,)` int64: which of its samples"""
    sample: torch.Size
    """shape of one input"""
    dtype: torch.dtype
    workers: int = 0
    """processes that read"""
    device: torch.device = _CPU

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.sample))

    def __getitem__(self, index: Tensor) -> Items:
        """These rows; nothing is read."""
        return replace(self, rows=self.rows[index.cpu()])

    def to(self, device: torch.device) -> Items:
        """The same samples; what is read goes to `device`."""
        return replace(self, device=device)

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All inputs in order as evaluation sees them, `(n, *shape)` on the device."""
        parts = torch.arange(len(self)).split(batch_size)
        return self.stream([(row, None) for row in part.tolist()] for part in parts)

    def stream(
        self, batches: Iterable[Sequence[Sample]], *, flip: bool = False
    ) -> Iterator[Tensor]:
        """These batches in order, `(n, *shape)` on the device.

        Raises:
            ValueError: an input has another shape than the first one.
        """
        assert not flip, "a data set augments by itself"
        rows = self.rows.tolist()
        own = ([(rows[row], seed) for row, seed in batch] for batch in batches)
        for found in read(self.dataset, own, self.workers):
            yield torch.stack([as_input(one[0], self.sample) for one in found]).to(self.device)


def as_input(value: Any, shape: torch.Size | None = None) -> Tensor:
    """One input as a tensor.

    Raises:
        ValueError: it is none, or has another shape.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"a sample's input is a {type(value).__name__}; give the data set a transform that "
            "makes tensors"
        )
    if shape is not None and value.shape != shape:
        raise ValueError(
            f"inputs of shape {tuple(shape)} and {tuple(value.shape)}; a transform that crops or "
            "resizes makes them equal"
        )
    return value
