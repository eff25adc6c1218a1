"""Images that stay on disk are seen as torchvision would show them, and by seed alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.datasets.folder
from PIL import Image
from tiny import numbers, run_serial
from torchvision.transforms import v2

import ray_subnets
from ray_subnets import Data, configfile, datasets, driver, evaluation
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Batches
from ray_subnets.distributed.children import pack_data, unpack_data
from ray_subnets.pools import SerialPool
from ray_subnets.population import Worker
from ray_subnets.recipes import Result, derive
from ray_subnets.streaming import ImageFiles, crop_box, pack_names

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORDNET = ("n01440764", "n02102040", "n03000684")

PHOTOS = """
name: photos
data: {name: imagefolder, size: 16, flip: true, validation: 6, workers: 2}
model: {name: wide_resnet, depth: 10, width: 1}
parent: {epochs: 3, batch_size: 8, lr: 0.01}
children:
  - {method: noisy, count: 2, sigma: 0.01, partition: 2}
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 2, batch_size: 8, lr: 0.01}}
"""


def write_photos(folder: Path, classes: tuple[str, ...], count: int, seed: int) -> None:
    """`count` JPEG files for each class, of several shapes, every fourth of them grey."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = generator.integers(20, 50, 2)
            small = generator.integers(0, 100, (4, 4, 3)) + 70 * label
            image = Image.fromarray(small.astype(np.uint8)).resize((width, height))
            image = image.convert("L") if i % 4 == 3 else image
            image.save(folder / name / f"{i:03d}.jpg", quality=95)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 3 times 10 images, test/ with 3 times 5. Tests that change it copy it first."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "train", ("cat", "dog", "émeu"), 10, seed=0)
    write_photos(root / "test", ("cat", "dog", "émeu"), 5, seed=1)
    return root


def load(root: Path, **options: object) -> Data:
    return datasets.load("imagefolder", root=str(root), **({"size": 16} | options))  # type: ignore[arg-type]


def paths(images: object) -> list[str]:
    assert isinstance(images, ImageFiles)
    return [images.path(row) for row in range(len(images))]


def decoded(images: object) -> torch.Tensor:
    assert isinstance(images, ImageFiles)
    return torch.cat(list(images.split(4)))


def inputs(data: Data, epoch: int = 0, **how: int) -> torch.Tensor:
    return torch.cat([batch.x for batch in Batches(data, 8, seed=5, **how).epoch(epoch)])


# --- what is read -------------------------------------------------------------------------------


def test_an_image_folder_is_read(photos: Path) -> None:
    """Files, labels and classes are those of torchvision's ImageFolder; nothing is lost."""
    data = load(photos, validation=6)
    whole = torchvision.datasets.ImageFolder(str(photos / "train"))
    test = torchvision.datasets.ImageFolder(str(photos / "test"))
    assert data.input_shape == (3, 16, 16)
    assert (data.num_classes, data.crop) == (3, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 15)
    found = [
        (path, label)
        for split in (data.train, data.validation)
        for path, label in zip(paths(split.images), split.labels.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(whole.samples)
    assert (
        list(zip(paths(data.test.images), data.test.labels.tolist(), strict=True)) == test.samples
    )
    assert (data.preprocess.mean, data.preprocess.std) == (MEAN, STD)


@pytest.mark.parametrize(("given", "resize"), [({}, 18), ({"resize": 24}, 24)])
def test_evaluation_sees_the_centre(photos: Path, given: dict[str, int], resize: int) -> None:
    """Bit for bit what torchvision's own Resize and CenterCrop give, in the order of files."""
    data = load(photos, **given)
    view = v2.Compose([v2.Resize(resize), v2.CenterCrop(16), v2.PILToTensor()])
    expected = torchvision.datasets.ImageFolder(str(photos / "test"), view)
    assert torch.equal(decoded(data.test.images), torch.stack([image for image, _ in expected]))


@pytest.mark.parametrize("flip", [False, True])
def test_training_sees_random_crops(photos: Path, flip: bool) -> None:
    """Bit for bit what torchvision's own transforms give, seeded by epoch and position alone."""
    data = load(photos, flip=flip)
    steps = [v2.RandomResizedCrop(16), *[v2.RandomHorizontalFlip()] * flip, v2.PILToTensor()]
    view, files = v2.Compose(steps), paths(data.train.images)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(derive(5, "order", 3)))
    expected = []
    for position, row in enumerate(order.tolist()):
        torch.manual_seed(derive(5, "augment", 3, position))
        expected.append(view(Image.open(files[row]).convert("RGB")))
    x = data.preprocess(torch.stack(expected))
    batches = list(Batches(data, 8, seed=5).epoch(3))
    assert [len(batch.x) for batch in batches] == [8, 8, 8, 3]
    assert torch.equal(torch.cat([batch.x for batch in batches]), x)
    assert torch.equal(torch.cat([batch.y for batch in batches]), data.train.labels[order])
    assert torch.allclose(x, (torch.stack(expected) / 255 - _column(MEAN)) / _column(STD))


def _column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values)[None, :, None, None]


@pytest.mark.parametrize(
    ("height", "width"), [(40, 30), (375, 500), (2, 2), (1, 3), (300, 5), (5, 300), (3, 2000)]
)
def test_crops_are_those_of_torchvision(height: int, width: int) -> None:
    """The same box for the same seed, also for shapes of which no part has an allowed ratio."""
    transform = v2.RandomResizedCrop(8)
    image = torch.zeros(3, height, width)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = transform.make_params([image])
        box = crop_box(height, width, torch.Generator().manual_seed(seed))
        assert dict(zip(("top", "left", "height", "width"), box, strict=True)) == expected


def test_names_of_any_length_and_script() -> None:
    names = ["a/b.jpg", "émeu/" + "x" * 200 + ".png", "c/\udcff.jpg", "日/本.jpg"]
    images = ImageFiles("/root", pack_names(names), 8, 8)
    assert paths(images) == [f"/root/{name}" for name in names]
    assert paths(images[torch.tensor([2, 0])]) == ["/root/c/\udcff.jpg", "/root/a/b.jpg"]


def test_val_takes_the_place_of_test(photos: Path, tmp_path: Path) -> None:
    """Alone it is the test part; beside test/ it is the validation part, and train/ stays whole."""
    root = tmp_path / "photos"
    (root / "test").mkdir(parents=True)
    (root / "train").symlink_to(photos / "train")
    (root / "test").rmdir()
    (root / "val").symlink_to(photos / "test")
    data = load(root, validation=6)
    assert torch.equal(decoded(data.test.images), decoded(load(photos).test.images))
    assert len(data.train) == 24
    write_photos(root / "test", ("cat", "dog", "émeu"), 2, seed=2)
    data = load(root)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 15, 6)
    with pytest.raises(ValueError, match=r"data\.validation_from: 'imagefolder' brings"):
        load(root, validation_from="test")


def test_imagenet_with_validation_from_its_test(tmp_path: Path) -> None:
    """train/ and val/ of WordNet ids; a fifth of val/ is set aside, by split_seed."""
    write_photos(tmp_path / "train", WORDNET, 4, seed=0)
    write_photos(tmp_path / "val", WORDNET, 10, seed=1)
    (tmp_path / "test").mkdir()  # ILSVRC2012's has no labels, and is not looked at

    def get(**options: object) -> Data:
        return datasets.load("imagenet", root=str(tmp_path), **options)  # type: ignore[arg-type]

    data = get(validation_from="test")
    assert data.input_shape == (3, 224, 224)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 24)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (data.preprocess.mean, data.preprocess.std) == (MEAN, STD)
    everything = sorted(map(str, tmp_path.glob("val/*/*.jpg")))
    assert sorted(paths(data.validation.images) + paths(data.test.images)) == everything
    again, another = (get(validation_from="test", split_seed=seed) for seed in (0, 1))
    assert paths(again.validation.images) == paths(data.validation.images)
    assert paths(another.validation.images) != paths(data.validation.images)
    (tmp_path / "train/n01440764").rename(tmp_path / "train/tench")
    with pytest.raises(ValueError, match="train/tench is not named by a WordNet id"):
        get()


# --- laws ---------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_epoch_and_position_only(photos: Path) -> None:
    """Not on the number of threads, nor on what was read or drawn before."""
    data = load(photos, flip=True, workers=1)
    x = inputs(data, epoch=1)
    torch.manual_seed(99)
    for workers in (1, 3, 16):
        other = load(photos, flip=True, workers=workers)
        assert torch.equal(inputs(other, epoch=1), x)
        assert torch.equal(decoded(other.test.images), decoded(data.test.images))
    assert not torch.equal(inputs(data, epoch=0), x)


def test_reading_draws_from_no_shared_generator(photos: Path) -> None:
    """Dropout of a network sees the same numbers, whatever is decoded beside it."""
    state = torch.get_rng_state()
    inputs(load(photos, flip=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_share_a_batch(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they see the batches of a single process, and each decodes its share only."""
    data = load(photos, flip=True, validation=4)  # 26 images: the last batch has 2
    whole = list(Batches(data, 8, seed=1).epoch(0))
    opened = count_opened(monkeypatch)
    shares = [list(Batches(data, 8, seed=1, rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    assert sorted(opened) == sorted(paths(data.train.images))
    for i, batch in enumerate(whole):
        parts = [share[i] for share in shares]
        x, y = torch.empty_like(batch.x), torch.empty_like(batch.y)
        for rank, part in enumerate(parts):
            x[rank::2], y[rank::2] = part.x, part.y
        assert torch.equal(x, batch.x)
        assert torch.equal(y, batch.y)
        assert sum(part.size for part in parts) == batch.size


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is decoded from now on."""
    opened: list[str] = []
    read: Callable[[str], object] = torchvision.datasets.folder.pil_loader

    def pil_loader(path: str) -> object:
        opened.append(path)
        return read(path)

    monkeypatch.setattr(torchvision.datasets.folder, "pil_loader", pil_loader)
    return opened


def test_images_are_never_all_in_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading opens none; an epoch is at most two batches ahead, and stops when it is left."""
    opened = count_opened(monkeypatch)
    threads = threading.active_count()
    data = load(photos, workers=3)
    assert not opened
    epoch = Batches(data, 2, seed=0).epoch(0)
    for seen in range(1, 4):
        next(epoch)
        assert 2 * seen <= len(opened) <= 2 * (seen + 2)
    assert threading.active_count() > threads
    del epoch
    assert threading.active_count() == threads
    assert len(opened) <= 10


def test_large_images_are_evaluated_in_small_batches(photos: Path) -> None:
    """As many values at once as 111 images of 224x224 have."""
    images = load(photos).test.images
    assert isinstance(images, ImageFiles)
    assert [len(part) for part in images.split(6)] == [6, 6, 3]
    large = ImageFiles(images.folder, images.names, size=1500, resize=1500)
    assert len(next(large.split(500))) == 2


def test_data_travels_by_name(photos: Path) -> None:
    """What Ray's object store gets is file names; an actor sees the same images and batches."""
    data = load(photos, flip=True)
    flat, rest = pack_data(data)
    assert flat.vector.nbytes < 4000
    again = unpack_data(flat, rest)
    for name in ("train", "validation", "test"):
        one, two = getattr(data, name), getattr(again, name)
        assert paths(one.images) == paths(two.images)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(decoded(one.images), decoded(two.images))
    assert torch.equal(inputs(again), inputs(data))


def test_an_interrupted_run_gives_the_same_numbers(photos: Path, tmp_path: Path) -> None:
    """A whole run; again, stopped within the parent and a child; and evaluated from its files."""
    settings = configfile.parse(PHOTOS, "photos", [f"data.root={photos}"])
    whole = RunFolder.create(tmp_path / "whole")
    record = run_serial(settings, whole)
    assert record["data"]["input_shape"] == [3, 16, 16]
    assert record["ensemble"]["test"]["accuracy"] > 0.5
    assert evaluation.evaluate(whole.root).difference <= 1e-6
    images = decoded(driver.load_data(settings).test.images)
    assert ray_subnets.load(whole.root)(images).shape == (15, 3)

    folder = RunFolder.create(tmp_path / "stopped")
    data = driver.load_data(settings)
    worker = Worker(driver.task_of(settings, folder), data)
    reports = worker.run(settings.parent_job())
    assert not isinstance(next(reports), Result)
    reports.close()  # type: ignore[attr-defined]
    assert folder.exists("checkpoints/parent.safetensors")
    cost = driver.prepare(settings, data, folder)
    pool = SerialPool(Worker(driver.task_of(settings, folder), data))
    resumed = driver.run(settings, data, folder, pool, cost=cost)
    assert numbers(resumed) == numbers(record)
