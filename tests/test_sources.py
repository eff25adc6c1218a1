"""Data in Python: tensors, data sets, loaders; what is random in them is drawn anew and again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from test_api import TRAIN, VAL, Noise, make, net
from torch import Tensor, nn
from torch.utils import data as torch_data

import ray_subnets as rs
from ray_subnets import sources
from ray_subnets.data import Batches, Data, Preprocess
from ray_subnets.items import Items

assert net  # a fixture
X, Y = TRAIN
SPARSE: dict[str, Any] = {"method": rs.Sparse(sparsity=0.5), "children": 1}


class Three(torch_data.Dataset[Any]):
    """Draws from three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        drawn = [torch.rand(()).item(), random.random(), float(np.random.rand())]  # noqa: NPY002
        return torch.tensor([row, *drawn]), row % 2


def data_of(dataset: Any, workers: int = 0) -> Data:
    loader = torch_data.DataLoader(dataset, batch_size=4, num_workers=workers)
    source = sources.source("train", loader, keep=False)
    return sources.assemble(
        source, source, None, num_classes=2, preprocess=None, crop=0, flip=False
    )


def inputs(data: Data, epoch: int, seed: int = 1) -> Tensor:
    """Those of an epoch, in the data set's order."""
    x = torch.cat([batch.x for batch in Batches(data, 4, seed).epoch(epoch)])
    return x[x[:, 0].argsort()]


def test_random_transforms_draw_anew_in_each_epoch_and_the_same_again() -> None:
    data = data_of(Three())
    assert isinstance(data.train.images, Items)
    first, second = inputs(data, 0), inputs(data, 1)
    assert torch.equal(first[:, 0], torch.arange(10.0))
    for column in (1, 2, 3):
        assert len(first[:, column].unique()) == 10
        assert not (first[:, column] == second[:, column]).any()
    assert torch.equal(first, inputs(data, 0))
    assert not torch.equal(first, inputs(data, 0, seed=2))


def test_processes_that_read_change_no_number() -> None:
    assert torch.equal(inputs(data_of(Three()), 0), inputs(data_of(Three(), workers=2), 0))


def test_reading_leaves_the_generators_alone() -> None:
    data = data_of(Three())
    states = []
    for read in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        if read:
            inputs(data, 0)
        states.append([torch.rand(1).item(), random.random(), np.random.rand()])  # noqa: NPY002
    assert states[0] == states[1]


def test_evaluation_sees_the_same_each_time() -> None:
    images = data_of(Three()).train.images
    once, again = (torch.cat(list(images.split(3))) for _ in range(2))
    assert torch.equal(once, again)
    some = images[torch.tensor([7, 2])]
    assert torch.equal(torch.cat(list(some.split(5))), once[[7, 2]])


class Plain(torch_data.Dataset[Any]):
    """The samples themselves, NumPy labels."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.x[row], np.int64(self.y[row])


@pytest.mark.parametrize(
    "same",
    [
        lambda: (X.numpy(), Y.numpy()),
        lambda: (X.double(), Y.int()),
        lambda: [X, Y],
        lambda: torch_data.TensorDataset(X, Y),
        lambda: torch_data.Subset(torch_data.TensorDataset(*pad(X, Y)), range(len(Y))),
        lambda: torch_data.DataLoader(torch_data.TensorDataset(X, Y), 32, shuffle=True),
        lambda: Plain(X, Y),
        lambda: Plain(X.double(), Y),
        lambda: torch_data.DataLoader(Plain(X, Y), batch_size=32),
        lambda: torch_data.Subset(Plain(*pad(X, Y)), range(len(Y))),
    ],
)
def test_the_same_samples_give_the_same_children(net: nn.Module, same: Any) -> None:
    """However they are given: all but random transforms is one path."""
    expected = make(net, **SPARSE).logits(VAL[0])
    assert torch.equal(make(net, train=same(), **SPARSE).logits(VAL[0]), expected)


def pad(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x, x[:5]]), torch.cat([y, y[:5]])


def test_a_loader_brings_its_batch_size(net: nn.Module) -> None:
    loader = torch_data.DataLoader(torch_data.TensorDataset(X, Y), 48)
    usual = rs.OneCycle(epochs=2, lr=0.05)
    as_48 = make(net, tune=rs.OneCycle(epochs=2, lr=0.05, batch_size=48), **SPARSE)
    assert torch.equal(make(net, loader, tune=usual, **SPARSE)(VAL[0]), as_48(VAL[0]))
    with pytest.raises(ValueError, match=r"tune.batch_size: 32, but the DataLoader's is 48"):
        make(net, loader, **SPARSE)


def test_validation_that_draws_is_read_once(net: nn.Module) -> None:
    ensemble = make(net, val=Noise(VAL), **SPARSE)
    assert ensemble.record is not None
    kept = sources.source("val", Noise(VAL), keep=True).split.images
    assert isinstance(kept, Tensor)
    found = float((ensemble(kept).argmax(1) == VAL[1]).double().mean())
    assert found == ensemble.record["ensemble"]["validation"]["without_parent"]["accuracy"]


def test_large_validation_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "AT_ONCE", 47 * 64)
    assert isinstance(sources.source("val", Plain(*VAL), keep=True).split.images, Items)


def test_uint8_images_are_seen_as_the_network_was_trained(net: nn.Module) -> None:
    pixels = torch.randint(0, 256, X.shape, dtype=torch.uint8)
    preprocess = Preprocess((0.4,), (0.3,))
    for train in ((pixels, Y), Plain(pixels, Y)):
        ensemble = make(net, train, (pixels, Y), preprocess=preprocess, **SPARSE)
        normal = preprocess(pixels)
        assert torch.equal(ensemble(pixels), ensemble(normal))


def test_crop_and_flip_are_those_of_a_run(net: nn.Module) -> None:
    plain, augmented = make(net, **SPARSE), make(net, crop=1, flip=True, **SPARSE)
    assert not torch.equal(plain(VAL[0]), augmented(VAL[0]))


class Stream(torch_data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(X[0], 0)])


class Gives(torch_data.Dataset[Any]):
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Any:
        return self.samples[row]


TENSORS = torch_data.TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Stream(), "an IterableDataset has no order"),
        ({"x": X}, "must be tensors .* not dict"),
        (Gives(), "the data set is empty"),
        (Gives((X[0], 0, 1)), r"a sample must be \(input, label\), not tuple of 3"),
        (Gives({"image": X[0]}), r"a sample must be \(input, label\), not dict"),
        (Gives(("photo.png", 0)), "input is a str; give the data set a transform"),
        (Gives((X[0], 0), (X[0][..., :2], 1)), r"shape \(1, 4, 4\) and \(1, 4, 2\)"),
        (Gives((X[0], 0), (X[0] / 0, 1)), "sample 1 has NaN or infinite"),
        (Gives((X[0], 0.5)), "labels are torch.float32.*for regression say head="),
        (Gives((X[0], torch.tensor([0, 1]))), r"a label of shape \(2,\)"),
        (Gives((X[0] > 0, 1)), "inputs are torch.bool"),
        (torch_data.DataLoader(TENSORS, batch_size=None), "batches of its own"),
        (
            torch_data.DataLoader(
                TENSORS, sampler=torch_data.WeightedRandomSampler([1.0] * len(Y), 5)
            ),
            "a DataLoader with a WeightedRandomSampler",
        ),
        (torch_data.DataLoader(TENSORS, collate_fn=lambda x: x), "a collate_fn of its own"),
    ],
)
def test_data_that_cannot_be_used(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^train: .*{says}") as caught:
        sources.source("train", given, keep=False)
    assert "\n" not in str(caught.value)
