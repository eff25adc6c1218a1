"""Rows of a landscape on Ray: the same numbers, in order, kept one by one, mistakes told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import landscapes, surfaces
from ray_subnets import models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.distributed import cluster, spreading

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with cluster.session(cpus=2):
        yield


@pytest.fixture
def landscape() -> Iterator[surfaces.Landscape]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task has: sums in the same order
    network = (
        models.build("mlp", (1, 12, 12), 3, {"hidden": [20]}, seed=0).eval().requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 1, 12, 12, generator=generator), torch.arange(40) % 3
    first, second = surfaces.directions(network, surfaces.kept(network, pruned=False), seed=0)
    yield surfaces.Landscape(network, x, y, first, second)
    torch.set_num_threads(threads)


def test_rows_are_the_same_and_made_elsewhere(landscape: surfaces.Landscape) -> None:
    here = surfaces.surface(landscape, 5, 1.0)
    there = surfaces.surface(landscape, 5, 1.0, mapper=spreading.spread)
    assert np.array_equal(here, there)
    who = set(spreading.spread(lambda item: os.getpid(), range(4)))
    assert os.getpid() not in who


def test_what_was_made_is_kept_when_it_is_stopped(
    landscape: surfaces.Landscape, tmp_path: Path
) -> None:
    place = RunFolder.create(tmp_path / "out")
    asked: list[int] = []

    def stopped(make, items):  # type: ignore[no-untyped-def]
        for i, row in enumerate(spreading.spread(make, items)):
            if i == 2:
                raise KeyboardInterrupt
            yield row

    def counted(make, items):  # type: ignore[no-untyped-def]
        items = list(items)
        asked.extend(items)
        return spreading.spread(make, items)

    with pytest.raises(KeyboardInterrupt):
        landscapes.kept_surface(place, "parent", landscape, 5, 1.0, 0, stopped)
    found = landscapes.kept_surface(place, "parent", landscape, 5, 1.0, 0, counted)
    assert asked == [2, 3, 4]
    assert np.array_equal(found, surfaces.surface(landscape, 5, 1.0))


def test_a_mistake_in_a_task_is_the_callers() -> None:
    def odd(item: int) -> int:
        if item == 2:
            raise ValueError("two is not odd")
        return item

    answers = spreading.spread(odd, [1, 2, 3])
    assert next(answers) == 1
    with pytest.raises(ValueError, match="two is not odd"):
        next(answers)
