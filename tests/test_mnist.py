"""MNIST and Fashion-MNIST: four idx files, where Debian or torchvision puts them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from test_datasets import random_images, rows, same

from ray_subnets import Split, datasets

DEBIAN = Path(datasets.DEBIAN_FASHION_MNIST)


def idx(array: np.ndarray) -> bytes:
    """The IDX format: type and number of dimensions, sizes, bytes."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_idx(folder: Path, zipped: bool) -> tuple[Split, Split]:
    """The four files of an MNIST with 40 and 20 images, and what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = []
    for seed, (part, count) in enumerate({"train": 40, "t10k": 20}.items()):
        images, labels = random_images(seed, count, 28, 28), np.arange(count) % 10
        for kind, array in (
            ("images-idx3-ubyte", images),
            ("labels-idx1-ubyte", labels.astype(np.uint8)),
        ):
            content = idx(array)
            name = f"{part}-{kind}" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
        splits.append(Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels)))
    return splits[0], splits[1]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("fashion_mnist", "."),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("mnist", "."),
        ("mnist", "MNIST/raw"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read(tmp_path: Path, name: str, where: str, zipped: bool) -> None:
    """Gzipped or not, in Debian's flat folder or torchvision's."""
    train, test = write_idx(tmp_path / where, zipped)
    data = datasets.load(name, root=str(tmp_path), validation=10)
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == 10
    assert len(data.validation) == 10
    assert rows(data.train, data.validation) == rows(train)
    assert same(data.test, test)


def test_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST is not looked for where Fashion-MNIST is; a damaged file is named."""
    write_idx(tmp_path / "FashionMNIST" / "raw", zipped=True)
    with pytest.raises(ValueError, match=r"data\.root: no train-images.*set data\.root.*download"):
        datasets.load("mnist", root=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.root: no train-images-idx3-ubyte\.gz in data;"):
        datasets.load("mnist")
    write_idx(tmp_path / "MNIST" / "raw", zipped=False)
    damaged = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:12])
    with pytest.raises(ValueError, match=rf"data\.root: cannot read {damaged} .*whole copy"):
        datasets.load("mnist", root=str(tmp_path))


@pytest.mark.parametrize(("which", "name"), [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist")])
def test_download_is_torchvisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, name: str
) -> None:
    """Of the right set, both parts, into the folder asked for; read from there."""
    asked = []

    def download(root: str, *, train: bool, download: bool) -> None:
        asked.append((root, train, download))
        write_idx(Path(root) / which / "raw", zipped=True)

    monkeypatch.setattr(torchvision.datasets, which, download)
    data = datasets.load(name, root=str(tmp_path / "new"), download=True)
    assert asked == [(str(tmp_path / "new"), train, True) for train in (True, False)]
    assert len(data.test) == 20


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    """60,000 and 10,000 images, every class equally often; the first of the test are known."""
    data = datasets.load("fashion_mnist", validation=5000)
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert data.input_shape == (1, 28, 28)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    # The mean and deviation that are quoted for its 60,000 training images.
    assert data.preprocess.mean == pytest.approx((0.2860,), abs=2e-3)
    assert data.preprocess.std == pytest.approx((0.3530,), abs=2e-3)
