"""A user's own data: arrays in a file, or what a function of theirs returns."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_subnets.data import Data, Loaded, Split
from ray_subnets.inputs import WHOLE, is_whole
from ray_subnets.models import import_path
from ray_subnets.strangers import raised


def of_file(root: str | None) -> Loaded:
    """Your own: an .npz with train_images, train_labels, test_images, test_labels.

    Images `(N, H, W)`, `(N, C, H, W)` or features `(N, D)`; uint8, or floats that are already what
    the network should see, or whole numbers that it looks up: of words `(N, L)`, of categories.
    Optional validation_images and validation_labels.

    Raises:
        ValueError: there is no such file, or it has something else.
    """
    if root is None:
        raise ValueError("data.root: the path of the .npz file is needed for data set 'npz'")
    path = Path(root)
    if not path.is_file():
        raise ValueError(f"data.root: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.root: cannot read {path} as .npz: {error}") from None

    def split(name: str) -> Split:
        for kind in ("images", "labels"):
            if f"{name}_{kind}" not in arrays:
                raise ValueError(f"data.root: {path} has no array {name}_{kind!s}")
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if not (
            np.issubdtype(images.dtype, np.floating) or np.issubdtype(images.dtype, np.integer)
        ):
            raise ValueError(
                f"data.root: {name}_images must be uint8, float or whole numbers, not "
                f"{images.dtype}"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
            raise ValueError(f"data.root: {name}_labels must be a 1-D integer array")
        whole = np.issubdtype(images.dtype, np.integer) and images.dtype != np.uint8
        tensor = torch.from_numpy(images.astype(np.int64) if whole else images)
        if tensor.dim() == 3 and not whole:
            tensor = tensor[:, None]
        if tensor.is_floating_point():
            tensor = tensor.float()
        return Split(tensor, torch.from_numpy(labels.astype(np.int64)))

    extra = {}
    if "validation_images" in arrays:
        extra["splits"] = {"validation": split("validation")}
    return split("train"), split("test"), extra


def of_function(name: str, given: Mapping[str, Any]) -> Loaded | Data:
    """What the user's function returns.

    Args:
        name: `package.module:function`.
        given: settings that a function which returns `Data` decides itself.

    Raises:
        ValueError: it cannot be imported, raises, or returns something else.
    """
    try:
        loaded = import_path(name, "data")()
    except ValueError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise ValueError(f"data: {name!r} raised {raised(error)}") from error
    if isinstance(loaded, Data):
        for key, value in given.items():
            if value:
                raise ValueError(f"data.{key}: {name!r} returns Data, which decides that itself")
        return loaded
    try:
        (train_x, train_y), (test_x, test_y) = loaded
        arrays = [torch.as_tensor(one) for one in (train_x, train_y, test_x, test_y)]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"data: {name!r} must return ray_subnets.Data or "
            "((train_images, train_labels), (test_images, test_labels))"
        ) from None
    for labels in arrays[1::2]:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(
                f"data: {name!r} gives labels of {labels.dtype}; they must be integers; regression "
                "is done in Python: ray_subnets.ensemble(..., head=...)"
            )
    train, test = (Split(_given(name, x), y.long()) for x, y in (arrays[:2], arrays[2:]))
    return train, test, {}


def _given(name: str, x: Tensor) -> Tensor:
    """Whole numbers of any type as int64, grey images `(N, H, W)` with their channel."""
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"data: {name!r} gives inputs of {x.dtype}; they must be real numbers")
    if is_whole(x):
        return x.to(WHOLE)
    return x[:, None] if x.dtype == torch.uint8 and x.dim() == 3 else x
