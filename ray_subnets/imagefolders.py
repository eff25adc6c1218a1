"""Photographs in a folder for each class, read into splits whose images stay on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_subnets.data import Split
from ray_subnets.streaming import ImageFiles, pack_names


@dataclass(frozen=True)
class View:
    """How images are seen; the fields are those of `streaming.ImageFiles`."""

    size: int
    resize: int
    workers: int


Reader = Callable[[str, View], tuple[Split, Split, Split | None]]
"""root and view -> training part, test part, validation part if there is one"""


def read_folders(root: str, view: View) -> tuple[Split, Split, Split | None]:
    """`root` has train/CLASS/*.jpg and test/CLASS/*.jpg. val/ takes the place of test/, or is the
    validation part where there is a test/ too.

    Raises:
        ValueError: a folder is missing or empty, or classes differ.
    """
    folder = _resolve(root)
    parts = [part for part in ("test", "val") if (folder / part).is_dir()]
    if not (folder / "train").is_dir() or not parts:
        missing = "test (or val)" if (folder / "train").is_dir() else "train"
        raise ValueError(
            f"data.root: no folder {missing} in {folder}; set data.root=FOLDER to the one that has "
            "train/CLASS/IMAGE.jpg and test/CLASS/IMAGE.jpg"
        )
    train, classes = _read(folder / "train", view)
    test, *validation = [_read_like(classes, folder / part, view) for part in parts]
    return train, test, validation[0] if validation else None


def read_imagenet(root: str, view: View) -> tuple[Split, Split, Split | None]:
    """`root` has ILSVRC2012 as torchvision unpacks it: train/ and val/, which is the test part, in
    folders named by WordNet ids. Any selection of the classes will do.

    Raises:
        ValueError: a folder is missing, empty or not named by a WordNet id, or classes differ.
    """
    folder = _resolve(root)
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"data.root: no folder {part} in {folder}; put the ILSVRC2012 archives there and "
                f"unpack them with torchvision.datasets.ImageNet({str(folder)!r}, {part!r}), or "
                "set data.root=FOLDER to where it is"
            )
    train, classes = _read(folder / "train", view)
    for name in classes:
        if not re.fullmatch(r"n\d{8}", name):
            raise ValueError(
                f"data.root: {folder}/train/{name} is not named by a WordNet id (n01440764); move "
                "it away, or use data.name=imagefolder for other images"
            )
    return train, _read_like(classes, folder / "val", view), None


def _resolve(root: str) -> Path:
    """The folder, absolute, because workers run elsewhere."""
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"data.root: no such folder: {folder}")
    return folder


def _read(folder: Path, view: View) -> tuple[Split, list[str]]:
    """The images of `folder`/CLASS, and the names of the classes in the order of labels."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"data.root: {folder}: {reason}; each class needs a folder of its own with images in it"
        ) from None
    start = len(str(folder)) + 1
    names = pack_names([path[start:] for path, _ in found.samples])
    images = ImageFiles(str(folder), names, view.size, view.resize, view.workers)
    return Split(images, torch.tensor(found.targets)), found.classes


def _read_like(classes: list[str], folder: Path, view: View) -> Split:
    """The images of `folder`, which must have the classes of the training part."""
    split, found = _read(folder, view)
    if found != classes:
        missing, new = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        says = f"no {missing[0]!r}" if missing else f"{new[0]!r}, which train has not"
        raise ValueError(
            f"data.root: {folder} has {says} ({len(missing)} classes missing, {len(new)} new); "
            "it must have the class folders of train"
        )
    return split
