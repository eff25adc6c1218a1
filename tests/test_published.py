"""CIFAR-10-C and CIFAR-100-C as published: what is read, and what is said of damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_subnets import Split
from ray_subnets.shifts import corruptions


def write_published(folder: Path, name: str = "fog") -> None:
    """Files of the published shape, nearly all zeros, so that they take no room."""
    shape = (50_000, 32, 32, 3)
    images = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape)
    images[20_000, 1, 2] = [10, 20, 30]  # the first of severity 3
    images[29_999] = 7
    images.flush()
    np.save(folder / "labels.npy", np.tile(np.arange(10_000) % 10, 5).astype(np.uint8))


def test_published_files_are_read(tmp_path: Path) -> None:
    """Severity 3 is images 20,000 to 29,999, channels first."""
    write_published(tmp_path)
    split = corruptions.published(tmp_path, "fog", 3)
    assert isinstance(split.images, Tensor)
    assert split.images.shape == (10_000, 3, 32, 32)
    assert split.images[0, :, 1, 2].tolist() == [10, 20, 30]
    assert (split.images[-1] == 7).all()
    assert split.labels.tolist() == [i % 10 for i in range(10_000)]
    assert int(corruptions.published(tmp_path, "fog", 2).images.sum()) == 0  # type: ignore[union-attr]

    test = Split(torch.zeros(10_000, 3, 32, 32).byte(), torch.arange(10_000) % 10)
    ((name, severity, part),) = corruptions.splits(
        test, names=["fog"], severities=[3], limit=2, root=tmp_path
    )
    assert (name, severity, part.labels.tolist()) == ("fog", 3, [0, 0])
    assert part.images[torch.tensor([0])][0, :, 1, 2].tolist() == [10, 20, 30]  # type: ignore[index]
    other = Split(test.images, (test.labels + 1) % 10)
    with pytest.raises(ValueError, match="has not the labels of this test data"):
        next(corruptions.splits(other, names=["fog"], root=tmp_path))


def test_damaged_published_files(tmp_path: Path) -> None:
    """One line each, with the file and where to get it."""
    remedy = "zenodo.org/records/2535967 .*zenodo.org/records/3555552"
    with pytest.raises(ValueError, match=f"no fog.npy in {tmp_path}; .*{remedy}"):
        corruptions.published(tmp_path, "fog", 1)
    write_published(tmp_path)
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(ValueError, match=f"no labels.npy in .*{remedy}"):
        corruptions.published(tmp_path, "fog", 1)
    np.save(tmp_path / "labels.npy", np.zeros(10, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"labels.npy holds uint8 \(10,\), not uint8 \(50000,\)"):
        corruptions.published(tmp_path, "fog", 1)
    np.save(tmp_path / "labels.npy", np.array([{}] * 3), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot read .*labels.npy"):
        corruptions.published(tmp_path, "fog", 1)
    with (tmp_path / "fog.npy").open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(ValueError, match=r"cannot read .*fog.npy \(.*\); get") as caught:
        corruptions.published(tmp_path, "fog", 1)
    assert "\n" not in str(caught.value)
    (tmp_path / "fog.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*fog.npy"):
        corruptions.published(tmp_path, "fog", 1)
