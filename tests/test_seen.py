"""What members see: saliency, features, hashes; clusters of what they say."""

from __future__ import annotations

from collections.abc import Iterator

import imagehash
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from tiny import run_serial, tiny
from torch import Tensor, nn

from analysis import clusters, features, hashes, saliency
from analysis.features import Settings
from analysis.folders import Run
from ray_subnets import models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Preprocess

SHAPE = (1, 20, 20)
PREPROCESS = Preprocess((0.3,), (0.4,))


@pytest.fixture(autouse=True)
def nondeterministic() -> Iterator[None]:
    """The backward pass of grid_sample on a CPU is deterministic, but torch does not say so."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def lenet(seed: int = 0) -> nn.Module:
    return models.build("lenet_s", SHAPE, 10, {}, seed=seed).eval().requires_grad_(False)


def test_the_gradient_of_a_linear_network_is_its_weight() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    x, target = torch.randn(2, 1, 2, 3), torch.tensor([2, 0])
    weight = network[1].weight.detach()
    assert_allclose(saliency.gradient(network, x, target), weight[target].view(2, 1, 2, 3))


def test_saliency_is_a_second_implementations() -> None:
    """Our own loop: torch.autograd, the same noise in the same order."""
    network = lenet()
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    target = network(x).argmax(1)

    def plain(inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_(True)
        score = network(inputs).gather(1, target[:, None]).sum()
        (g,) = torch.autograd.grad(score, inputs)
        return g

    assert_allclose(saliency.gradient(network, x, target), plain(x), atol=1e-6)
    found = saliency.smooth_gradient(network, x, target, sigma=0.3, samples=4, seed=5)
    torch.manual_seed(5)
    total = torch.zeros_like(x)
    for _ in range(4):
        total += plain(torch.normal(x, torch.full_like(x, 0.3)))
    assert_allclose(found, total / 4, atol=1e-6)
    again = saliency.smooth_gradient(network, x, target, sigma=0.3, samples=4, seed=5)
    assert found.equal(again)


def test_the_global_generator_is_left_alone() -> None:
    network, x = lenet(), torch.randn(1, *SHAPE)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    saliency.smooth_gradient(network, x, torch.tensor([0]), sigma=0.1, samples=2)
    assert torch.get_rng_state().equal(state)


def test_maps_are_from_zero_to_one() -> None:
    g = torch.tensor([[[[0.0, -4.0]], [[2.0, 1.0]]]])  # two colours, one row, two columns
    top = np.quantile([2.0, 4.0], 0.99)
    assert_allclose(saliency.as_maps(g), [[[2 / top, 1.0]]], rtol=1e-6)
    assert saliency.as_maps(torch.zeros(1, 1, 2, 2)).max() == 0
    two = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    assert_allclose(saliency.rmse(two), [[0, 0.5**0.5], [0.5**0.5, 0]])


def test_a_picture_is_the_same_alone_and_in_a_batch() -> None:
    networks, how = [lenet(0), lenet(1)], Settings(steps=8)
    together = features.visualise(networks, [1, 4], SHAPE, PREPROCESS, settings=how)
    assert together.shape == (2, 2, *SHAPE)
    for k, network in enumerate(networks):
        for c, channel in enumerate((1, 4)):
            alone = features.visualise([network], [channel], SHAPE, PREPROCESS, settings=how)
            assert_allclose(together[k, c], alone[0, 0], atol=1e-4)
    other = features.visualise(networks, [1, 4], SHAPE, PREPROCESS, settings=how, seed=1)
    assert not together.equal(other)


def test_steps_drive_the_channel_up() -> None:
    network = lenet()
    name, module, count = features.layer_of(network)
    assert (name, count) == ("conv2", 32)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _m, _i, out: seen.append(out))

    def answer(steps: int) -> float:
        how = Settings(steps=steps, lr=0.05)
        image = features.visualise([network], [3], SHAPE, PREPROCESS, settings=how)[0]
        seen.clear()
        network((image - 0.3) / 0.4)
        return float(seen[0][0, 3].mean())

    assert answer(60) > answer(1) + 0.2


def test_the_transforms_by_hand() -> None:
    """No draw is no change; a jitter of 8 moves by 4 pixels at most; scale and rotation as said."""
    how = Settings()
    assert_allclose(features.transforms(torch.zeros(1, 6), (20, 20), how), [[[1, 0, 0], [0, 1, 0]]])
    shift = features.transforms(torch.tensor([[1.0, 0, 0, 0, 0, 0]]), (20, 20), how)
    assert_allclose(shift[0, 0, 2], 4 / 10)  # in halves of the image
    after = features.transforms(torch.tensor([[0.0, 0, 0, 0, 1, 0]]), (20, 20), how)
    assert_allclose(after[0, 0, 2], 2 / 10)
    scaled = features.transforms(torch.tensor([[0.0, 0, 1, 0, 0, 0]]), (20, 20), how)
    assert_allclose(scaled[0, 0, 0], 1 / 1.05)
    turned = features.transforms(torch.tensor([[0.0, 0, 0, 1, 0, 0]]), (20, 20), how)
    assert_allclose(turned[0, 1, 0], np.sin(np.deg2rad(5)), rtol=1e-5)


def test_layers_by_name() -> None:
    network = lenet()
    assert features.layer_of(network, "fc1")[2] == 256
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        features.layer_of(network, "conv9")
    with pytest.raises(ValueError, match="32 channels"):
        features.visualise([network], [32], SHAPE, PREPROCESS, settings=Settings(steps=1))


def test_hashes_are_the_librarys() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 3, 24, 24, generator=generator)
    made = [
        [Image.fromarray((255 * i).round().to(torch.uint8).permute(1, 2, 0).numpy()) for i in one]
        for one in images
    ]
    (found,) = hashes.distances(images)
    for name, make in (
        ("average", imagehash.average_hash),
        ("perceptual", imagehash.phash),
        ("difference", imagehash.dhash),
        ("wavelet", imagehash.whash),
        ("colour", imagehash.colorhash),
    ):
        expected = [make(a) - make(b) for a, b in zip(*made, strict=True)]
        assert found[name].tolist() == expected
    gap = (images[0] - images[1]).numpy()
    assert_allclose(found["rmse"], np.sqrt((gap**2).mean((1, 2, 3))), rtol=1e-6)
    (same,) = hashes.distances(torch.stack([images[0], images[0]]))
    assert all(not one.any() for one in same.values())


def test_bits_by_hand() -> None:
    """Left half white, then right half: every bit of the average hash differs."""
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    (found,) = hashes.distances(torch.stack([left, 1 - left]))
    assert found["average"].tolist() == [64]
    assert found["rmse"].tolist() == [1.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("seen") / "tiny"
    run_serial(tiny(), RunFolder.create(folder))
    return Run.open(folder)


def test_a_run_is_looked_into(run: Run) -> None:
    few = Settings(steps=3)
    plan = hashes.Plan(last=2, channels=2, images=3, settings=few)
    found = [
        saliency.find(run, shown=2, count=4, most=2),
        features.find(run, shown=3, most=2, settings=few),
        hashes.find([run], plan),
        clusters.find(run, count=40, most=2),
    ]
    for one in found:
        for table in one.tables:
            assert table.markdown().count("\n") >= 2
        for picture in one.pictures:
            assert picture.png().startswith(b"\x89PNG")
    assert found[0].tables[0].headings[1] == "parent"
    names = [row[0] for row in found[2].tables[0].rows]
    assert names == ["tiny", "tiny: same network"]
    places = found[3].tables[0].numbers
    assert len(places) == 40 * 3
    labels = run.outputs(["parent"]).labels
    assert all(places["class"] == labels.numpy()[places["sample"]])


def test_one_embedding_for_all() -> None:
    """Two networks that say the same lie in the same places, to what t-SNE can tell."""
    outputs = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(0)).softmax(2)
    places = clusters.embed(torch.cat([outputs, outputs]))
    span = np.ptp(places.reshape(-1, 2), axis=0).max()
    apart = np.linalg.norm(places[0] - places[1], axis=1)
    assert np.median(apart) < 0.05 * span
