"""Masks by number: the dissertation's 4x4 examples, exact counts, portable bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ray_subnets import draws, masks, models

# M and M' of eq. 3.10, and the three masks of eq. 3.11.
M = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool()
M_ANTI = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]).bool()
THREE = [
    torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool(),
    torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]).bool(),
    torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 0]]).bool(),
]
SHAPES = {"a": torch.Size([4, 4]), "b": torch.Size([30, 7])}


def test_complement_is_that_of_eq_3_10() -> None:
    assert torch.equal(masks.complement({"w": M})["w"], M_ANTI)


def test_distances_of_the_printed_masks() -> None:
    """Complements differ everywhere: sqrt(16). Eq. 3.11's masks have 6, 5 and 5 ones."""
    assert masks.distance({"w": M}, {"w": M_ANTI}) == 4
    assert masks.distance({"w": M}, {"w": M}) == 0
    assert sum(THREE).eq(1).all()  # type: ignore[attr-defined]
    expected = 2 * ((6 + 5) ** 0.5 + (6 + 5) ** 0.5 + (5 + 5) ** 0.5)
    assert masks.total_distance([{"w": mask} for mask in THREE]) == pytest.approx(expected)


def test_a_partition_is_further_apart_than_random_masks() -> None:
    """Why partition (section 3.2.2): two random halves share a quarter of the weights."""
    generator = torch.Generator().manual_seed(0)
    pair = masks.partition(SHAPES, 2, generator)
    independent = [masks.exact(SHAPES, 0.5, generator) for _ in range(2)]
    assert masks.total_distance(pair) > 1.2 * masks.total_distance(independent)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_exact_count_in_every_layer(density: float) -> None:
    drawn = masks.exact(SHAPES, density, torch.Generator().manual_seed(1))
    for name, mask in drawn.items():
        assert int(mask.sum()) == round(density * SHAPES[name].numel())


def test_bernoulli_density_within_chance() -> None:
    shapes = {"w": torch.Size([500, 400])}
    mask = masks.bernoulli(shapes, 0.2, torch.Generator().manual_seed(1))["w"]
    assert abs(float(mask.double().mean()) - 0.2) < 5 * (0.2 * 0.8 / mask.numel()) ** 0.5


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_partition_sizes(draw: str, parts: int) -> None:
    sets = masks.partition(SHAPES, parts, torch.Generator().manual_seed(2), draw=draw)
    for name, shape in SHAPES.items():
        sizes = [int(one[name].sum()) for one in sets]
        assert sum(sizes) == shape.numel()
        if draw == "exact":
            assert max(sizes) - min(sizes) <= 1


def test_what_may_be_masked() -> None:
    """Convolution and linear weights, the classifier only when asked."""
    model = models.build("lenet_s", (1, 28, 28), 10, {}, 0)
    assert list(masks.maskable(model)) == [
        "conv1.weight",
        "conv2.weight",
        "fc1.weight",
        "fc2.weight",
    ]
    assert list(masks.maskable(model, classifier=True))[-1] == "classifier.weight"
    with pytest.raises(ValueError, match="mask_classifier"):
        masks.maskable(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        masks.maskable(torch.nn.BatchNorm1d(3), classifier=True)


DIGEST = """
import hashlib, torch
from ray_subnets import draws, masks
shapes = {"w": torch.Size([1000, 301])}
generator = torch.Generator().manual_seed(11)
drawn = [masks.exact(shapes, 0.5, generator), masks.bernoulli(shapes, 0.2, generator),
         {"w": draws.normals(301_000, 5)}, {"w": draws.uniforms(301_000, 6)},
         *masks.partition(shapes, 3, generator)]
digest = hashlib.sha256()
for one in drawn:
    digest.update(one["w"].numpy().tobytes())
print(digest.hexdigest())
"""


def test_draws_do_not_depend_on_vector_instructions() -> None:
    """A recipe gives the same child on processors with and without AVX2.

    `torch.randn` does not: that is why noise is drawn by numpy.
    """
    digests = set()
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        answer = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        digests.add(answer.stdout.strip())
    assert len(digests) == 1


def test_draws_do_not_depend_on_the_number_of_threads() -> None:
    n, before = 3 * draws.CHUNK // 2, torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([draws.normals(n, 3), draws.uniforms(n, 3), draws.coins(n, 0.3, 3)])
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one[: n // 3], one[draws.CHUNK :][: n // 3])  # other streams


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("probability", [0.0, 0.001, 0.3, 1.0])
def test_coins_fall_as_often_as_they_should(bits: int, probability: float) -> None:
    n = 400_000
    coins = draws.coins(n, probability, 1, bits=bits)
    error = 5 * (probability * (1 - probability) / n) ** 0.5 + 2.0**-16
    assert abs(float(coins.double().mean()) - probability) <= error
    if probability in (0, 1):
        assert coins.unique().tolist() == [bool(probability)]


def test_global_scope_shares_one_count() -> None:
    shapes = {"small": torch.Size([50]), "large": torch.Size([20, 50])}
    counts = set()
    for seed in range(5):
        drawn = masks.exact(shapes, 0.1, torch.Generator().manual_seed(seed), scope="global")
        assert sum(int(mask.sum()) for mask in drawn.values()) == 105
        counts.add(int(drawn["small"].sum()))
    assert len(counts) > 1  # of a single layer it is left to chance


def test_magnitude_keeps_the_largest() -> None:
    weights = {"a": torch.tensor([[0.1, -4.0], [2.0, 0.3]]), "b": torch.tensor([-5.0, 0.2])}
    shapes = {name: weight.shape for name, weight in weights.items()}
    local = masks.magnitude(weights, shapes, 0.5)
    assert local["a"].tolist() == [[False, True], [True, False]]
    assert local["b"].tolist() == [True, False]
    everywhere = masks.magnitude(weights, shapes, 1 / 3, scope="global")
    assert everywhere["a"].tolist() == [[False, True], [False, False]]
    assert everywhere["b"].tolist() == [True, False]


def test_layers_are_kept_or_left_out_whole() -> None:
    shapes = {name: torch.Size([3, 2]) for name in "abcd"}
    drawn = masks.layers(shapes, 0.5, torch.Generator().manual_seed(0))
    assert sorted(int(mask.sum()) for mask in drawn.values()) == [0, 0, 6, 6]
    assert len(masks.empty_layers(drawn)) == 2
    sizes = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.5}
    largest = masks.layers(shapes, 0.5, torch.Generator(), sizes=sizes)
    assert masks.empty_layers(largest) == ["a", "d"]
