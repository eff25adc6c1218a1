"""Data sets by name, read into `data.Data`. Nothing is downloaded unless asked."""

from __future__ import annotations

import gzip
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_subnets.data import Data, Preprocess, Split, check, check_alike, check_split
from ray_subnets.models import import_path

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

# Channel mean and standard deviation used by the dissertation's code for CIFAR-10 and CIFAR-100.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2471, 0.2435, 0.2616)


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """(rest, held out): `count` random samples set aside, the same for every run of a study.

    Raises:
        ValueError: `count` is not smaller than the split.
    """
    if not 0 < count < len(split):
        raise ValueError(
            f"data.validation: must leave training data; {count} of {len(split)} samples asked"
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[count:].sort().values), split.take(order[:count].sort().values)


def statistics(images: Tensor) -> Preprocess:
    """Per-channel mean and standard deviation of uint8 images `(N, C, ...)`, scaled to [0, 1]."""
    if images.is_floating_point():
        return Preprocess()
    channels = images.transpose(0, 1).flatten(1).double() / 255
    std = channels.std(1).clamp_min(1e-6)
    return Preprocess(tuple(channels.mean(1).tolist()), tuple(std.tolist()))


def _digits(root: str | None, download: bool) -> tuple[Split, Split, dict[str, Any]]:
    """1,797 8x8 images of handwritten digits that scikit-learn ships; the last 540 are the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(15).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    # The file is ordered by writer; its end holds other writers than its start, as a test should.
    return Split(images[:-540], labels[:-540]), Split(images[-540:], labels[-540:]), {}


def _read_idx(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    if path.suffix != ".gz":
        return read_sn3_pascalvincent_tensor(str(path))
    with gzip.open(path) as source, tempfile.NamedTemporaryFile() as plain:
        plain.write(source.read())
        plain.flush()
        return read_sn3_pascalvincent_tensor(plain.name)


def _fashion_mnist(root: str | None, download: bool) -> tuple[Split, Split, dict[str, Any]]:
    """70,000 28x28 images of clothes; `root` has the four idx files, gzipped or not."""
    folder = Path(root or DEBIAN_FASHION_MNIST)
    if download:
        from torchvision.datasets import FashionMNIST

        folder = Path(root or "data")
        for train in (True, False):
            FashionMNIST(str(folder), train=train, download=True)
    splits = []
    for part in ("train", "t10k"):
        tensors = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            names = [f"{part}-{kind}.gz", f"{part}-{kind}"]
            places = [folder, folder / "FashionMNIST" / "raw"]
            found = [place / name for place in places for name in names if (place / name).is_file()]
            if not found:
                raise ValueError(
                    f"data.root: no {names[0]} in {folder}; get Fashion-MNIST with "
                    "'apt-get install dataset-fashion-mnist' (Debian, Ubuntu), or set "
                    "data.root=FOLDER to where the files are, or data.download=true"
                )
            try:
                tensors.append(_read_idx(found[0]))
            except (OSError, EOFError, AssertionError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"data.root: cannot read {found[0]} ({str(error) or 'not an idx file'}); "
                    "replace it with a whole copy"
                ) from None
        splits.append(Split(tensors[0][:, None], tensors[1].long()))
    return splits[0], splits[1], {}


def _cifar(which: str) -> Callable[[str | None, bool], tuple[Split, Split, dict[str, Any]]]:
    def load(root: str | None, download: bool) -> tuple[Split, Split, dict[str, Any]]:
        """60,000 32x32 colour images, python version, read by torchvision from `root`."""
        import torchvision.datasets

        folder = root or "data"
        splits = []
        for train in (True, False):
            try:
                source = getattr(torchvision.datasets, which)(
                    folder, train=train, download=download
                )
            except RuntimeError:
                raise ValueError(
                    f"data.root: no intact {which} in {folder}; set data.root=FOLDER to the folder "
                    "that holds cifar-10-batches-py (or cifar-100-python), or data.download=true"
                ) from None
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
            splits.append(Split(images, torch.tensor(source.targets)))
        return splits[0], splits[1], {"mean": CIFAR_MEAN, "std": CIFAR_STD}

    return load


def _arrays(root: str | None, download: bool) -> tuple[Split, Split, dict[str, Any]]:
    """Your own: an .npz with train_images, train_labels, test_images, test_labels.

    Images `(N, H, W)`, `(N, C, H, W)` or features `(N, D)`; uint8, or floats that are already what
    the network should see. Optional validation_images and validation_labels.
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
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"data.root: {name}_images must be uint8 or float, not {images.dtype}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
            raise ValueError(f"data.root: {name}_labels must be a 1-D integer array")
        tensor = torch.from_numpy(images)
        if tensor.dim() == 3:
            tensor = tensor[:, None]
        if tensor.is_floating_point():
            tensor = tensor.float()
        return Split(tensor, torch.from_numpy(labels.astype(np.int64)))

    extra = {}
    if "validation_images" in arrays:
        extra["splits"] = {"validation": split("validation")}
    return split("train"), split("test"), extra


DATASETS: dict[str, Callable[[str | None, bool], tuple[Split, Split, dict[str, Any]]]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "npz": _arrays,
}


def load(
    name: str,
    *,
    root: str | None = None,
    download: bool = False,
    validation: int | None = None,
    split_seed: int = 0,
    train_limit: int | None = None,
    crop: int = 0,
    flip: bool = False,
    num_classes: int | None = None,
) -> Data:
    """Read a data set, set validation samples aside from its training part, and check it.

    Args:
        name: a key of `DATASETS`, or `package.module:function`; the function returns `data.Data`,
            or two `(images, labels)` pairs, training and test.
        validation: samples taken from the training part; default a tenth of it. Not used if the
            data set brings its own.
        split_seed: which samples; apart from the run's seed, so that all seeds of a study share it.
        train_limit: train on a fixed random subset of this size.

    Raises:
        ValueError: unknown name, files missing or damaged, or unusable contents.
    """
    if ":" in name:
        loaded = import_path(name, "data")()
        if isinstance(loaded, Data):
            given = {
                "validation": validation,
                "train_limit": train_limit,
                "num_classes": num_classes,
                "crop": crop,
                "flip": flip,
            }
            for key, value in given.items():
                if value:
                    raise ValueError(
                        f"data.{key}: {name!r} returns Data, which decides that itself"
                    )
            return check(loaded)
        try:
            (train_x, train_y), (test_x, test_y) = loaded
            train = Split(torch.as_tensor(train_x), torch.as_tensor(train_y).long())
            test = Split(torch.as_tensor(test_x), torch.as_tensor(test_y).long())
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"data: {name!r} must return ray_subnets.Data or "
                "((train_images, train_labels), (test_images, test_labels))"
            ) from None
        extra: dict[str, Any] = {}
    elif name in DATASETS:
        train, test, extra = DATASETS[name](root, download)
    else:
        raise ValueError(
            f"data: unknown data set {name!r}; known: {', '.join(DATASETS)}, or your own as "
            "package.module:function"
        )
    # Before any sample is set aside, so that numbers in messages are those of the user's file.
    if num_classes is None:
        check_split("train", train)
        num_classes = int(train.labels.max()) + 1
    if num_classes < 2:
        raise ValueError(f"data: {num_classes} class; a classifier needs at least 2")
    for part, split in {"train": train, "test": test, **extra.get("splits", {})}.items():
        check_split(part, split, num_classes)
        check_alike(part, split, train)
    for key, wanted in (("crop", crop), ("flip", flip)):
        if wanted and train.images.dim() != 4:
            raise ValueError(f"data.{key}: needs images of shape (N, C, H, W)")
    if "splits" in extra:
        held_out = extra["splits"]["validation"]
    else:
        count = validation if validation is not None else max(1, len(train) // 10)
        train, held_out = hold_out(train, count, split_seed)
    if train_limit is not None and train_limit < len(train):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(split_seed + 1))
        train = train.take(order[:train_limit].sort().values)
    preprocess = (
        Preprocess(extra["mean"], extra["std"]) if "mean" in extra else statistics(train.images)
    )
    return check(Data(name, train, held_out, test, num_classes, preprocess, crop=crop, flip=flip))
