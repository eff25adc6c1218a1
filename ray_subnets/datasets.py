"""Data sets by name, read into `data.Data`. Nothing is downloaded unless asked."""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ray_subnets.data import Data, Loaded, Preprocess, Split, check, check_alike, check_split
from ray_subnets.imagefolders import Reader, View, read_folders, read_imagenet
from ray_subnets.inputs import is_whole
from ray_subnets.items import Items
from ray_subnets.own_data import of_file, of_function
from ray_subnets.streaming import ImageFiles

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

# Channel mean and standard deviation used by the dissertation's code for CIFAR-10 and CIFAR-100.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2471, 0.2435, 0.2616)
# The usual ones of ImageNet's training images; also for other photographs, as networks that were
# trained on ImageNet expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user said about where and how to read a data set; see `config.DataSection`."""

    root: str | None = None
    download: bool = False
    num_classes: int | None = None
    noise: float | None = None
    size: int | None = None
    resize: int | None = None
    workers: int = 4


def hold_out(split: Split, count: int, seed: int, name: str = "training") -> tuple[Split, Split]:
    """(rest, held out): `count` random samples set aside, the same for every run of a study.

    Args:
        name: of the split, for messages.

    Raises:
        ValueError: `count` is not smaller than the split.
    """
    if not 0 < count < len(split):
        raise ValueError(
            f"data.validation: must leave {name} data; {count} of {len(split)} samples asked"
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[count:].sort().values), split.take(order[:count].sort().values)


def statistics(images: Tensor | ImageFiles | Items) -> Preprocess:
    """Per-channel mean and standard deviation of uint8 images `(N, C, ...)`, scaled to [0, 1]."""
    assert isinstance(images, Tensor), "files come with their mean and standard deviation"
    if images.is_floating_point() or is_whole(images):
        return Preprocess()
    channels = images.transpose(0, 1).flatten(1).double() / 255
    std = channels.std(1)
    # What hardly changes in training, a pixel that is black nearly always, would explode elsewhere.
    std = torch.where(std < 1 / 255, 1.0, std)
    return Preprocess(tuple(channels.mean(1).tolist()), tuple(std.tolist()))


def _digits(options: Options) -> Loaded:
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


def _mnist(which: str, default: str, hint: str) -> Callable[[Options], Loaded]:
    """A reader of four idx files.

    Args:
        which: torchvision's class.
        default: folder if none is given.
        hint: where to get the files.
    """

    def load(options: Options) -> Loaded:
        """70,000 28x28 images; `root` has the four idx files, gzipped or not."""
        folder = Path(options.root or default)
        if options.download:
            import torchvision.datasets

            folder = Path(options.root or "data")
            for train in (True, False):
                getattr(torchvision.datasets, which)(str(folder), train=train, download=True)
        splits = []
        for part in ("train", "t10k"):
            images, labels = (
                _find_idx(folder, which, f"{part}-{kind}", hint)
                for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
            )
            splits.append(Split(images[:, None], labels.long()))
        return splits[0], splits[1], {}

    return load


def _find_idx(folder: Path, which: str, name: str, hint: str) -> Tensor:
    """The content of `name`, gzipped or not, in `folder` or where torchvision puts it."""
    names = [f"{name}.gz", name]
    places = [folder, folder / which / "raw"]
    found = [place / name for place in places for name in names if (place / name).is_file()]
    if not found:
        raise ValueError(f"data.root: no {names[0]} in {folder}; {hint}")
    try:
        return _read_idx(found[0])
    except (OSError, EOFError, AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data.root: cannot read {found[0]} ({str(error) or 'not an idx file'}); "
            "replace it with a whole copy"
        ) from None


def _cifar(which: str) -> Callable[[Options], Loaded]:
    def load(options: Options) -> Loaded:
        """60,000 32x32 colour images, python version, read by torchvision from `root`."""
        import torchvision.datasets

        folder = options.root or "data"
        splits = []
        for train in (True, False):
            try:
                source = getattr(torchvision.datasets, which)(
                    folder, train=train, download=options.download
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


def _spirals(options: Options) -> Loaded:
    """`num_classes` (default 3) arms, each one turn from the middle to radius 3; 2,000 points of
    the plane for training and 1,000 for the test, `noise` added to both coordinates.
    """
    arms = options.num_classes or 3
    noise = 0.15 if options.noise is None else options.noise
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % arms
    along = torch.rand(3000, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * (along + labels / arms)
    points = 3 * along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points += noise * torch.randn(3000, 2, dtype=torch.float64, generator=generator)
    x = points.float()
    return Split(x[:2000], labels[:2000]), Split(x[2000:], labels[2000:]), {}


def _photographs(name: str, read: Reader) -> Callable[[Options], Loaded]:
    """A data set whose images stay on disk, see `imagefolders`."""

    def load(options: Options) -> Loaded:
        if options.root is None:
            raise ValueError(f"data.root: the folder of the images is needed for data set {name!r}")
        if options.download:
            raise ValueError(f"data.download: {name!r} cannot be fetched; put it into data.root")
        size = options.size or 224
        resize = options.resize or round(size * 256 / 224)
        if resize < size:
            raise ValueError(f"data.resize: must be at least data.size, {size}, not {resize}")
        view = View(size, resize, options.workers)
        train, test, validation = read(options.root, view)
        extra: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        if validation is not None:
            extra["splits"] = {"validation": validation}
        return train, test, extra

    return load


DATASETS: dict[str, Callable[[Options], Loaded]] = {
    "digits": _digits,
    "fashion_mnist": _mnist(
        "FashionMNIST",
        DEBIAN_FASHION_MNIST,
        "get Fashion-MNIST with 'apt-get install dataset-fashion-mnist' (Debian, Ubuntu), or set "
        "data.root=FOLDER to where the files are, or data.download=true",
    ),
    "spirals": _spirals,
    "mnist": _mnist(
        "MNIST",
        "data",
        "set data.root=FOLDER to where MNIST's four files are, or data.download=true",
    ),
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "npz": lambda options: of_file(options.root),
    "imagefolder": _photographs("imagefolder", read_folders),
    "imagenet": _photographs("imagenet", read_imagenet),
}


_ONLY = {
    "noise": ("spirals",),
    "size": ("imagefolder", "imagenet"),
    "resize": ("imagefolder", "imagenet"),
}
"""options that would be ignored by all other data sets"""


def load(
    name: str,
    *,
    root: str | None = None,
    download: bool = False,
    validation: int | None = None,
    validation_from: Literal["train", "test"] = "train",
    split_seed: int = 0,
    train_limit: int | None = None,
    crop: int = 0,
    flip: bool = False,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    noise: float | None = None,
    size: int | None = None,
    resize: int | None = None,
    workers: int = 4,
) -> Data:
    """Read a data set, set validation samples aside, and check it.

    Args:
        name: a key of `DATASETS`, or `package.module:function`; the function returns `data.Data`,
            or two `(images, labels)` pairs, training and test.
        validation: samples to set aside; default a tenth of the training part or a fifth of the
            test part. Not used if the data set brings its own.
        validation_from: which part they are taken from.
        split_seed: which samples; apart from the run's seed, so that all seeds of a study share it.
        train_limit: train on a fixed random subset of this size.
        mean, std, noise, size, resize, workers: see `config.DataSection`.

    Raises:
        ValueError: unknown name, files missing or damaged, or unusable contents.
    """
    for key, value in {"noise": noise, "size": size, "resize": resize}.items():
        if value is not None and name not in _ONLY[key]:
            raise ValueError(f"data.{key}: is only for {' and '.join(_ONLY[key])}; leave it out")
    options = Options(
        root=root,
        download=download,
        num_classes=num_classes,
        noise=noise,
        size=size,
        resize=resize,
        workers=workers,
    )
    given = {
        "validation": validation,
        "validation_from": validation_from != "train",
        "train_limit": train_limit,
        "num_classes": num_classes,
        "crop": crop,
        "flip": flip,
        "mean": mean is not None,
        "std": std is not None,
    }
    source = _read(name, options, given)
    if isinstance(source, Data):
        return check(source)
    train, test, extra = source
    # Before any sample is set aside, so that numbers in messages are those of the user's file.
    if num_classes is None:
        check_split("train", train)
        num_classes = int(train.labels.max()) + 1
    if num_classes < 2:
        raise ValueError(f"data: {num_classes} class; a classifier needs at least 2")
    for part, split in {"train": train, "test": test, **extra.get("splits", {})}.items():
        check_split(part, split, num_classes)
        check_alike(part, split, train)
    _check_augmentation(train, crop, flip)
    if "splits" in extra:
        if validation_from != "train":
            raise ValueError(f"data.validation_from: {name!r} brings validation data; leave it out")
        held_out = extra["splits"]["validation"]
    elif validation_from == "test":
        count = validation if validation is not None else max(1, len(test) // 5)
        test, held_out = hold_out(test, count, split_seed, "test")
    else:
        count = validation if validation is not None else max(1, len(train) // 10)
        train, held_out = hold_out(train, count, split_seed)
    if train_limit is not None and train_limit < len(train):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(split_seed + 1))
        train = train.take(order[:train_limit].sort().values)
    if mean is not None or std is not None:
        preprocess = _normalised(mean, std, train)
    elif "mean" in extra:
        preprocess = Preprocess(extra["mean"], extra["std"])
    else:
        preprocess = statistics(train.images)
    return check(Data(name, train, held_out, test, num_classes, preprocess, crop=crop, flip=flip))


def _normalised(
    mean: Sequence[float] | None, std: Sequence[float] | None, train: Split
) -> Preprocess:
    """As the user says."""
    channels = train.images.shape[1]
    if train.images.dtype != torch.uint8:
        raise ValueError("data.mean, data.std: are for uint8 images; these are network inputs")
    for key, values in (("mean", mean), ("std", std)):
        if values is None or len(values) not in (1, channels):
            raise ValueError(
                f"data.{key}: a number for each of {channels} channels, or one for all; give both "
                "mean and std"
            )
    assert mean is not None
    assert std is not None
    full = [tuple(v) * (channels if len(v) == 1 else 1) for v in (mean, std)]
    return Preprocess(*full)


def _read(name: str, options: Options, given: Mapping[str, Any]) -> Loaded | Data:
    """A data set by name, or what the user's function returns.

    Args:
        given: settings that a function which returns `Data` decides itself.
    """
    if name in DATASETS:
        return DATASETS[name](options)
    if name == "given":
        raise ValueError(
            "data: they were given in Python and are not known by name; go on from there, with the "
            "same ray_subnets.ensemble(..., folder=...)"
        )
    if ":" not in name:
        raise ValueError(
            f"data: unknown data set {name!r}; known: {', '.join(DATASETS)}, or your own as "
            "package.module:function"
        )
    return of_function(name, given)


def _check_augmentation(train: Split, crop: int, flip: bool) -> None:
    for key, wanted in (("crop", crop), ("flip", flip)):
        if wanted and len(train.images.shape) != 4:
            raise ValueError(f"data.{key}: needs images of shape (N, C, H, W)")
    if crop and isinstance(train.images, ImageFiles):
        raise ValueError("data.crop: images from files are cropped at random anyway; leave it out")
