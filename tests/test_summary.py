"""Reading outputs one network at a time: the same bits, and memory that does not grow."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import Mean, Running, combine
from ray_subnets.summary import LABELS, Scores


@pytest.mark.parametrize("shape", [(1, 10), (7, 3), (33, 1), (450, 10), (451, 10), (55, 100)])
@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 32, 40, 257])
def test_a_running_mean_is_torchs_mean(shape: tuple[int, int], count: int) -> None:
    """To the last bit, for every number of members and sizes that fill no vector."""
    x = torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = Mean()
    for one in x:
        mean.add(one)
    assert torch.equal(mean.mean(), x.mean(0))


@pytest.mark.parametrize("how", ["probabilities", "logits", "vote", "weighted"])
def test_combining_one_by_one_is_combining_all(how: str) -> None:
    """At every number of members; `weighted` to rounding."""
    logits = torch.randn(20, 45, 10, generator=torch.Generator().manual_seed(0))
    weights = [1.0 / (k + 1) for k in range(20)]
    running = Running(how)
    for k in range(20):
        running.add(logits[k], weights[k])
        expected = combine(logits[: k + 1], how, weights[: k + 1])
        if how == "weighted":
            torch.testing.assert_close(running.value(), expected, rtol=1e-14, atol=0)
        else:
            assert torch.equal(running.value(), expected)


def peak(root: Path, children: int, samples: int) -> int:
    """Most bytes that outputs take at once while the numbers of a record are made.

    Outputs are read into numpy arrays, which `tracemalloc` sees, and tensors share their memory.
    """
    folder, draw = RunFolder.create(root), np.random.default_rng(0)
    labels = {name: draw.integers(0, 10, samples) for name in ("validation", "test")}
    folder.save_arrays(LABELS, labels)
    ids = [f"c-{k:03}" for k in range(children)]
    for id in ["parent", *ids]:
        logits = {name: draw.normal(size=(samples, 10)).astype(np.float32) for name in labels}
        folder.save_arrays(f"outputs/{id}.npz", logits)
    scores = Scores(folder, "probabilities")
    tracemalloc.start()
    try:
        for id in ids[:4]:
            scores.test([id])
            scores.kl_from_parent(id)
        scores.test(ids)
        scores.validation(ids)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_children(tmp_path: Path) -> None:
    few = peak(tmp_path / "8", 8, 2000)
    many = peak(tmp_path / "64", 64, 2000)
    assert many <= 1.2 * few
    assert few < 8 * 2000 * 10 * 4 * 2  # the outputs of all eight
