"""Every data set gives the images and labels that are in its files, in three disjoint splits.

MNIST: `test_mnist.py`; spirals: `test_spirals.py`; images that stay on disk: `test_streaming.py`.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits
from tiny import TINY

from ray_subnets import Data, Preprocess, Split, configfile, datasets, driver, models
from ray_subnets.data import Batches


def rows(*splits: Split) -> list[bytes]:
    """Every image with its label, sorted: equal for equal collections of samples."""
    return sorted(
        image.tobytes() + bytes([label])
        for split in splits
        for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True)
    )


def same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- digits, and how splits are made ------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    """1,797 8x8 images in 10 classes, of which the last 540 are the test."""
    data = datasets.load("digits")
    source = load_digits()
    images = torch.from_numpy(source.images)[:, None]
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert (len(data.train), len(data.validation), len(data.test)) == (1132, 125, 540)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert torch.equal(data.test.images, (images[-540:] * 15).byte())
    assert data.test.labels.tolist() == source.target[-540:].tolist()


def test_splits_are_disjoint() -> None:
    """Training and validation together are the first 1,257 samples, each once."""
    data = datasets.load("digits", validation=200)
    source = load_digits()
    whole = Split(
        torch.from_numpy(source.images[:-540] * 15).byte()[:, None],
        torch.from_numpy(source.target[:-540]),
    )
    assert len(data.validation) == 200
    assert rows(data.train, data.validation) == rows(whole)


def test_the_split_depends_on_split_seed_only() -> None:
    """Every run of a study, whatever its other settings, has the same validation and test data."""
    data = datasets.load("digits")
    torch.manual_seed(1)
    others = [
        datasets.load("digits"),
        datasets.load("digits", crop=1, flip=True),
        datasets.load("digits", train_limit=50),
        datasets.load("digits", num_classes=12),
    ]
    for other in others:
        assert same(other.validation, data.validation)
        assert same(other.test, data.test)
    assert same(others[0].train, data.train)
    another = datasets.load("digits", split_seed=1)
    assert same(another.test, data.test)
    assert not same(another.validation, data.validation)
    assert rows(another.train, another.validation) == rows(data.train, data.validation)


def test_train_limit_takes_a_fixed_part() -> None:
    """As many training samples as asked, always the same, none of validation."""
    whole = datasets.load("digits")
    data = datasets.load("digits", train_limit=300)
    assert len(data.train) == 300
    assert same(data.train, datasets.load("digits", train_limit=300).train)
    left = rows(whole.train)
    for row in rows(data.train):
        left.remove(row)  # fails for a sample taken twice, or not of the training part
    assert same(datasets.load("digits", train_limit=5000).train, whole.train)


def test_preprocessing_standardises_training_images() -> None:
    """Mean 0 and standard deviation 1 over the training images."""
    data = datasets.load("digits")
    x = data.preprocess(data.train.images)
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_validation_from_the_test_part(name: str) -> None:
    """A fifth of the test part, by `split_seed`; the training part stays whole."""
    usual = datasets.load(name)
    data = datasets.load(name, validation_from="test")
    assert rows(data.train) == rows(usual.train, usual.validation)
    assert rows(data.test, data.validation) == rows(usual.test)
    assert len(data.validation) == len(usual.test) // 5
    assert same(data.validation, datasets.load(name, validation_from="test").validation)
    another = datasets.load(name, validation_from="test", split_seed=1)
    assert not same(data.validation, another.validation)
    assert len(datasets.load(name, validation_from="test", validation=7).validation) == 7
    with pytest.raises(ValueError, match=r"data\.validation: must leave test data; 9999 of"):
        datasets.load(name, validation_from="test", validation=9999)


# --- CIFAR --------------------------------------------------------------------------------------


def write_batch(file: Path, images: np.ndarray, labels: dict[str, list[int]]) -> list[str]:
    """One file in CIFAR's python format: red, green and blue plane of an image in a row.

    Returns:
        Its name and MD5, as torchvision lists them.
    """
    content = pickle.dumps({"data": images.reshape(len(images), 3072), **labels}, protocol=2)
    file.write_bytes(content)
    return [file.name, hashlib.md5(content).hexdigest()]


def write_meta(file: Path, key: str, classes: int) -> dict[str, str]:
    content = pickle.dumps({key: [f"class {i}" for i in range(classes)]}, protocol=2)
    file.write_bytes(content)
    return {"filename": file.name, "key": key, "md5": hashlib.md5(content).hexdigest()}


def check_cifar(data: Data, images: np.ndarray, labels: list[int], tests: int) -> None:
    """`data` has these images and labels, the last `tests` as its test."""
    tensor, target = torch.from_numpy(images), torch.tensor(labels)
    assert data.input_shape == (3, 32, 32)
    assert rows(data.train, data.validation) == rows(Split(tensor[:-tests], target[:-tests]))
    assert torch.equal(data.test.images, tensor[-tests:])
    assert torch.equal(data.test.labels, target[-tests:])
    # Scaled to [0, 1], then these, as in the dissertation's code.
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2471, 0.2435, 0.2616])
    expected = (images[-tests:] / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(data.preprocess(data.test.images).numpy(), expected, atol=1e-5)


def test_cifar10_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five training batches and a test batch, as CIFAR's own python version has them."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = random_images(0, 60, 3, 32, 32), [i % 10 for i in range(60)]
    names = [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch"]
    files = [
        write_batch(folder / name, images[i : i + 10], {"labels": labels[i : i + 10]})
        for i, name in zip(range(0, 60, 10), names, strict=True)
    ]
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", files[:5])
    monkeypatch.setattr(cifar, "test_list", files[5:])
    monkeypatch.setattr(cifar, "meta", write_meta(folder / "batches.meta", "label_names", 10))
    data = datasets.load("cifar10", root=str(tmp_path), validation=10, crop=4, flip=True)
    assert data.num_classes == 10
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 10)
    check_cifar(data, images, labels, tests=10)
    batch = next(Batches(data, batch_size=16, seed=0).epoch(0))
    assert batch.x.shape == (16, 3, 32, 32)

    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"data\.root: no intact CIFAR10 .*download=true"):
        datasets.load("cifar10", root=str(tmp_path))


def test_cifar100_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training and one test file; the fine labels, not the coarse ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images, fine = random_images(1, 220, 3, 32, 32), [i % 100 for i in range(220)]

    def write(name: str, part: slice) -> list[str]:
        coarse = [label // 5 for label in fine[part]]
        labels = {"fine_labels": fine[part], "coarse_labels": coarse}
        return write_batch(folder / name, images[part], labels)

    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [write("train", slice(200))])
    monkeypatch.setattr(cifar, "test_list", [write("test", slice(200, None))])
    monkeypatch.setattr(cifar, "meta", write_meta(folder / "meta", "fine_label_names", 100))
    data = datasets.load("cifar100", root=str(tmp_path), num_classes=100)
    assert data.num_classes == 100
    check_cifar(data, images, fine, tests=20)


def test_the_cifar10_config_is_a_wide_resnet_28_10() -> None:
    """The shipped config parses, and its network has 36.48 million weights."""
    settings = configfile.load("cifar10_wrn28x10_sparse")
    assert settings.data.name == "cifar10"
    assert settings.budget() == 200
    with torch.device("meta"):
        model = models.build(settings.model.name, (3, 32, 32), 10, settings.model.options, seed=0)
    assert 36.46e6 < sum(parameter.numel() for parameter in model.parameters()) < 36.5e6


# --- your own -----------------------------------------------------------------------------------


def save(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "my.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def test_images_as_a_trained_network_saw_them() -> None:
    plain = datasets.load("digits", mean=[0.0], std=[1.0])
    assert plain.preprocess == Preprocess((0.0,), (1.0,))
    seen = plain.preprocess(plain.train.images[:5])
    torch.testing.assert_close(seen, plain.train.images[:5].float() / 255)
    for bad in ({"mean": [0.0]}, {"mean": [0.0, 0.0], "std": [1.0, 1.0]}):
        with pytest.raises(ValueError, match=r"data\.(mean|std): a number for each of 1 channels"):
            datasets.load("digits", **bad)
    with pytest.raises(ValueError, match=r"data\.mean, data\.std: are for uint8 images"):
        datasets.load("spirals", mean=[0.0], std=[1.0])


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "seen"),
    [((5,), (5,)), ((6, 7), (1, 6, 7)), ((2, 6, 7), (2, 6, 7))],
    ids=["features", "greyscale", "channels"],
)
def test_npz_is_read(
    tmp_path: Path, kind: type, shape: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    """Features, greyscale images and images with channels; bytes are standardised, floats not."""
    images = random_images(2, 400, *shape).astype(kind)
    labels = np.arange(400) % 3
    root = save(
        tmp_path,
        train_images=images[:300],
        train_labels=labels[:300].astype(np.uint8),
        test_images=images[300:],
        test_labels=labels[300:],
    )
    data = datasets.load("npz", root=root)
    expected = torch.uint8 if kind is np.uint8 else torch.float32
    tensor = torch.from_numpy(images).to(expected).view(400, *seen)
    assert data.input_shape == seen
    assert data.num_classes == 3
    assert (len(data.train), len(data.validation), len(data.test)) == (270, 30, 100)
    assert data.train.images.dtype == expected
    whole = Split(tensor[:300], torch.from_numpy(labels[:300]))
    assert rows(data.train, data.validation) == rows(whole)
    assert torch.equal(data.test.images, tensor[300:])
    assert data.test.labels.tolist() == labels[300:].tolist()
    x = data.preprocess(data.train.images)
    if kind is np.uint8:
        channels = x.transpose(0, 1).flatten(1)
        assert torch.allclose(channels.mean(1), torch.zeros(seen[0]), atol=1e-4)
        assert torch.allclose(channels.std(1), torch.ones(seen[0]), atol=1e-4)
    else:
        assert torch.equal(x, data.train.images)


def test_npz_may_bring_its_validation_data(tmp_path: Path) -> None:
    """Then nothing is taken from the training part, and order is kept."""
    images, labels = random_images(3, 90, 5), np.arange(90) % 3
    parts = {"train": slice(50), "validation": slice(50, 70), "test": slice(70, None)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": labels[part] for name, part in parts.items()}
    data = datasets.load("npz", root=save(tmp_path, **arrays), validation=5)
    for name, part in parts.items():
        expected = Split(torch.from_numpy(images[part]), torch.from_numpy(labels[part]))
        assert same(getattr(data, name), expected)
    with pytest.raises(ValueError, match=r"data\.validation_from: 'npz' brings validation data"):
        datasets.load("npz", root=str(tmp_path / "my.npz"), validation_from="test")


MINE = """
import numpy as np
import torch
from ray_subnets import Data, Preprocess, Split

x = np.arange(300, dtype=np.float32).reshape(60, 5)
y = np.arange(60) % 3

def pairs():
    return (x[:40], y[:40].tolist()), (x[40:], y[40:])

def whole():
    def split(part):
        return Split(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    return Data("mine", split(slice(30)), split(slice(30, 40)), split(slice(40, 60)), 4,
                Preprocess())
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, importable as `my_data`."""
    (tmp_path / "my_data.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)


@pytest.mark.usefixtures("mine")
def test_a_function_may_return_two_pairs() -> None:
    """Training and test; validation samples are set aside as for any data set."""
    overrides = ["data=my_data:pairs", "data.validation=8"]
    data = driver.load_data(configfile.parse(TINY, "tiny", overrides))
    images = torch.arange(300, dtype=torch.float32).view(60, 5)
    labels = torch.arange(60) % 3
    assert data.name == "my_data:pairs"
    assert data.num_classes == 3
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 20)
    assert rows(data.train, data.validation) == rows(Split(images[:40], labels[:40]))
    assert same(data.test, Split(images[40:], labels[40:]))
    for key, value in (("size", 8), ("resize", 8), ("noise", 0.1)):
        with pytest.raises(ValueError, match=rf"data\.{key}: is only for .*leave it out"):
            datasets.load("my_data:pairs", **{key: value})  # type: ignore[arg-type]


@pytest.mark.usefixtures("mine")
def test_a_function_may_return_data() -> None:
    """Then it is taken as it is: splits, number of classes and all."""
    data = datasets.load("my_data:whole")
    images = torch.arange(300, dtype=torch.float32).view(60, 5)
    labels = torch.arange(60) % 3
    assert (data.name, data.num_classes, data.preprocess) == ("mine", 4, Preprocess())
    assert same(data.train, Split(images[:30], labels[:30]))
    assert same(data.validation, Split(images[30:40], labels[30:40]))
    assert same(data.test, Split(images[40:], labels[40:]))
    with pytest.raises(ValueError, match=r"data\.validation_from: .* returns Data, which decides"):
        datasets.load("my_data:whole", validation_from="test")
