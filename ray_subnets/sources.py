"""Data as a user has it in Python: tensors, a `torch.utils.data.Dataset` or a `DataLoader`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from ray_subnets.data import Data, Preprocess, Split, check_alike, check_split, content_of
from ray_subnets.inputs import WHOLE, is_whole
from ray_subnets.items import Items, as_input, read

AT_ONCE = 2**30  # bytes of validation or test inputs that are read once and kept in memory
_PART = 256  # samples that are looked at together


@dataclass(frozen=True)
class Source:
    """One split, and the batch size that came with it."""

    split: Split
    batch_size: int | None = None


def source(name: str, given: Any, *, keep: bool, real: bool = False) -> Source:
    """A split from what a user gave for `name`.

    Tensors `(x, y)` stay in memory. A data set is read sample by sample whenever it is needed, so
    that what it does at random is new in every epoch; with `keep` its samples are read once if they
    are not more than a gigabyte. A `DataLoader` is its data set and its batch size; order and
    batches are ours, so one with a sampler or collate function of its own is refused.

    Args:
        real: labels are targets of regression, one number each.

    Raises:
        ValueError: nothing that could be used; the message names `name`.
    """
    try:
        return _source(name, given, keep, real)
    except ValueError as error:
        text = str(error).removeprefix(f"data: {name} ").removeprefix("data: ")
        raise ValueError(text if text.startswith(f"{name}: ") else f"{name}: {text}") from None


def _source(name: str, given: Any, keep: bool, real: bool) -> Source:
    size, workers = None, 0
    if isinstance(given, torch_data.DataLoader):
        size, workers = _loader(given), given.num_workers
        given = given.dataset
    tensors = _tensors(given)
    if tensors is not None:
        split = _in_memory(*tensors, real)
    else:
        if isinstance(given, torch_data.IterableDataset):
            raise ValueError(
                "an IterableDataset has no order that could be shuffled; give a data set with "
                "__len__ and __getitem__, or tensors (x, y)"
            )
        if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")) or isinstance(
            given, Tensor | np.ndarray | dict | str | Sequence
        ):
            raise ValueError(
                f"must be tensors (x, y), a torch.utils.data.Dataset or a DataLoader, not "
                f"{_kind(given)}"
            )
        split = _scanned(given, workers, keep, real)
    check_split(name, split)
    return Source(split, size)


def _kind(given: Any) -> str:
    """`tuple of 3` or `str`."""
    sized = isinstance(given, tuple | list)
    return f"{type(given).__name__}{f' of {len(given)}' if sized else ''}"


def _loader(loader: torch_data.DataLoader[Any]) -> int | None:
    """The batch size of a loader whose batches could be ours."""
    plain = (torch_data.SequentialSampler, torch_data.RandomSampler)
    if loader.batch_size is None or type(loader.batch_sampler) is not torch_data.BatchSampler:
        raise ValueError("a DataLoader with batches of its own; give its data set")
    sampler = loader.sampler
    if not isinstance(sampler, plain) or getattr(sampler, "replacement", False):
        raise ValueError(
            f"a DataLoader with a {type(sampler).__name__}; samples are shuffled anew in every "
            "epoch, so give its data set"
        )
    if loader.collate_fn is not torch_data.default_collate:
        raise ValueError("a DataLoader with a collate_fn of its own; give its data set")
    return loader.batch_size


def _tensors(given: Any) -> tuple[Any, Any] | None:
    """Inputs and labels that are in memory already."""
    if isinstance(given, tuple | list) and len(given) == 2:
        if all(isinstance(part, Tensor | np.ndarray) for part in given):
            return given[0], given[1]
        return None
    if isinstance(given, torch_data.TensorDataset) and len(given.tensors) == 2:
        return given.tensors[0], given.tensors[1]
    if isinstance(given, torch_data.Subset):
        whole = _tensors(given.dataset)
        if whole is not None:
            index = torch.as_tensor(list(given.indices), dtype=torch.int64)
            return whole[0][index.to(getattr(whole[0], "device", "cpu"))], whole[1][
                index.to(getattr(whole[1], "device", "cpu"))
            ]
    return None


def _in_memory(x: Any, y: Any, real: bool) -> Split:
    x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
    return Split(_inputs(x), (_targets(y) if real else _labels(y)).to(x.device))


def _inputs(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.float()
    if is_whole(x):
        return x.to(WHOLE)
    if x.dtype != torch.uint8:
        raise ValueError(
            f"inputs are {x.dtype}; they must be floating point or whole numbers, as the network "
            "takes them, or uint8 images with preprocess=Preprocess(mean, std)"
        )
    return x


def _labels(y: Tensor) -> Tensor:
    if y.is_floating_point() or y.is_complex():
        raise ValueError(
            f"labels are {y.dtype}; they must be integers; for regression say head='gaussian' or "
            "head='mse'"
        )
    return y.long()


def _targets(y: Tensor) -> Tensor:
    """One number for each sample, `(N,)` or `(N, 1)` -> `(N,)` float32."""
    if y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"targets are {y.dtype}; they must be real numbers")
    if y.dim() == 2 and y.shape[1] > 1:
        raise ValueError(
            f"targets of shape {tuple(y.shape)}; one number for each sample, (N,) or (N, 1)"
        )
    return (y[:, 0] if y.dim() == 2 else y).float()


def _scanned(dataset: Any, workers: int, keep: bool, real: bool) -> Split:
    """A data set whose every sample was looked at once: shapes, labels, finite inputs."""
    count = len(dataset)
    if not count:
        raise ValueError("the data set is empty")
    labels: list[float] = []
    kept: list[Tensor] = []
    sample: torch.Size | None = None
    dtype = torch.float32
    order = [(row, None) for row in range(count)]
    parts = [order[at : at + _PART] for at in range(0, count, _PART)]
    for found in read(dataset, parts, workers):
        for one in found:
            if not isinstance(one, tuple | list) or len(one) != 2:
                raise ValueError(f"a sample must be (input, label), not {_kind(one)}")
            x = as_input(one[0], sample)
            if sample is None:
                sample, dtype = x.shape, _inputs(x).dtype
                keep = keep and count * x.nbytes <= AT_ONCE
            if not x.isfinite().all():
                raise ValueError(f"sample {len(labels)} has NaN or infinite values")
            labels.append(_target(one[1]) if real else _label(one[1]))
            if keep:
                kept.append(x)
    assert sample is not None
    y = torch.tensor(labels, dtype=torch.float32 if real else torch.int64)
    if keep:
        return Split(_inputs(torch.stack(kept)), y)
    return Split(Items(dataset, torch.arange(count), sample, dtype, workers), y)


def _label(value: Any) -> int:
    value = torch.as_tensor(value)
    if value.dim():
        raise ValueError(f"a label of shape {tuple(value.shape)}; it must be one integer")
    return int(_labels(value))


def _target(value: Any) -> float:
    value = torch.as_tensor(value)
    if value.numel() != 1:
        raise ValueError(f"a target of shape {tuple(value.shape)}; it must be one number")
    return float(_targets(value.reshape(1)))


def assemble(
    train: Source,
    validation: Source,
    test: Source | None,
    *,
    num_classes: int,
    preprocess: Preprocess | None,
    crop: int,
    flip: bool,
) -> Data:
    """A data set of splits that fit together; on the CPU.

    Args:
        test: None: validation data stand in for it, and nothing is measured elsewhere.

    Raises:
        ValueError: they do not; the message names the argument.
    """
    cpu = torch.device("cpu")
    splits = {"train": train.split.to(cpu), "val": validation.split.to(cpu)}
    splits |= {"test": test.split.to(cpu)} if test else {}
    for name, split in splits.items():
        try:
            check_split(name, split, num_classes)
            check_alike(name, split, splits["train"])
        except ValueError as error:
            text = str(error).removeprefix("data: ").removeprefix(f"{name} ")
            raise ValueError(f"{name}: {text}") from None
    inputs = splits["train"].images
    if inputs.dtype == torch.uint8 and preprocess is None:
        raise ValueError(
            "preprocess: inputs are uint8 images; say how the network was trained to see them, "
            "preprocess=Preprocess(mean, std) of each channel with pixels from 0 to 1"
        )
    if (crop or flip) and (not isinstance(inputs, Tensor) or inputs.dim() != 4):
        raise ValueError(
            "crop, flip: for image tensors (N, C, H, W); a data set augments by its own transform"
        )
    return Data(
        name="given",
        train=splits["train"],
        validation=splits["val"],
        test=splits.get("test", splits["val"]),
        num_classes=num_classes,
        preprocess=preprocess or Preprocess(),
        crop=crop,
        flip=flip,
    )


def digest(data: Data) -> str:
    """Tells data sets apart: SHA-256 of labels and of inputs, see `data.content_of`."""
    total = hashlib.sha256(repr((data.preprocess, data.crop, data.flip)).encode())
    for split in (data.train, data.validation, data.test):
        images = split.images
        total.update(f"{tuple(images.shape)} {images.dtype}".encode())
        total.update(split.labels.numpy().tobytes())
        total.update(content_of(images))
    return total.hexdigest()
