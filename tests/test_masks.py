"""Masks by number: the dissertation's 4x4 examples, exact counts, portable bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ray_subnets import masks, models

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
from ray_subnets import masks, noisy
shapes = {"w": torch.Size([1000, 301])}
generator = torch.Generator().manual_seed(11)
drawn = [masks.exact(shapes, 0.5, generator), masks.bernoulli(shapes, 0.2, generator),
         noisy.normals(shapes, generator, mean=0.1, sigma=0.3),
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
