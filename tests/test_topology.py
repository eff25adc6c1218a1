"""Pruning at once and step by step: how many, which, held at zero, and after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import equal, tiny
from torch import Tensor, nn

from ray_subnets import ChildSpec, Training, driver, models, sparse
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Data
from ray_subnets.flat import flatten
from ray_subnets.masks import Masks
from ray_subnets.population import Worker
from ray_subnets.recipes import Epoch, Result
from ray_subnets.topology import Fixed, Iterative


def layers() -> tuple[dict[str, nn.Parameter], Masks]:
    """Two layers and what shall stay of them: 10 of 40 weights, 5 of 12."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"a": (5, 8), "b": (3, 4), "bias": (3,)}
    parameters = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in sizes.items()}
    masks = {}
    for name, keep in (("a", 10), ("b", 5)):
        n = parameters[name].numel()
        flat = torch.zeros(n, dtype=torch.bool)
        flat[torch.randperm(n, generator=generator)[:keep]] = True
        masks[name] = flat.view(parameters[name].shape)
    return parameters, masks


def optimizer_step(parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.5


def test_fixed_holds_the_pruned_at_zero_and_nothing_else() -> None:
    parameters, masks = layers()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    fixed = Fixed(parameters, masks)
    assert fixed.weights(0.0, torch.Generator()) is None
    optimizer_step(parameters)
    fixed.after_step()
    for name, mask in masks.items():
        assert torch.equal(parameters[name], torch.where(mask, before[name] + 0.5, 0))
    assert torch.equal(parameters["bias"], before["bias"] + 0.5)


def removal(order: str, masks: Masks) -> dict[str, Tensor] | None:
    return sparse.removal_order(masks, seed=3) if order == "random" else None


@pytest.mark.parametrize("order", ["random", "magnitude"])
def test_iterative_pruning_takes_equal_steps_to_the_target(order: str) -> None:
    """30 of 40 weights go in steps of 10, 7 of 12 by twos and threes; what is gone stays gone."""
    parameters, masks = layers()
    made = Iterative(parameters, masks, 3, removal(order, masks))
    before = {name: torch.ones_like(mask) for name, mask in masks.items()}
    second = 8 if order == "random" else 7  # two thirds of seven, rounded down or to nearest
    for epoch, left in enumerate([(30, 10), (20, second), (10, 5), (10, 5), (10, 5)]):
        made.start_epoch(epoch)
        for name, count in zip(masks, left, strict=True):
            now = made.masks[name]
            assert int(now.sum()) == count
            assert not (now & ~before[name]).any()  # nested
            assert (parameters[name][~now] == 0).all()
            before[name] = now
        optimizer_step(parameters)
        made.after_step()
        for name, now in made.masks.items():
            assert (parameters[name][~now] == 0).all()
    if order == "random":
        assert all(torch.equal(made.masks[name], mask) for name, mask in masks.items())


def test_random_removal_only_takes_what_is_outside_and_follows_its_seed() -> None:
    parameters, masks = layers()
    order = sparse.removal_order(masks, seed=3)
    for name, mask in masks.items():
        assert (order[name][mask] == 0).all()
        ranks = order[name][~mask].sort().values
        n = len(ranks)
        torch.testing.assert_close(ranks, torch.arange(1, n + 1, dtype=torch.float64) / n)
    assert equal(sparse.removal_order(masks, seed=3), order)
    assert not equal(sparse.removal_order(masks, seed=4), order)
    made = Iterative(parameters, masks, 3, order)
    made.start_epoch(0)
    assert all((made.masks[name] | ~mask).all() for name, mask in masks.items())


def test_magnitude_compares_weights_as_they_are_now() -> None:
    """A weight that was small in the parent and grew stays; one that shrank goes."""
    values = [8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0]
    weight = nn.Parameter(torch.tensor(values))
    target = {"w": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()}
    made = Iterative({"w": weight}, target, 2, None)
    made.start_epoch(0)
    assert weight.tolist() == [8, -7, 6, -5, 4, -3, 0, 0]
    with torch.no_grad():
        weight[5], weight[0] = -9.0, 0.5
    made.start_epoch(1)
    assert weight.tolist() == [0, -7, 6, -5, 0, -9, 0, 0]
    assert made.masks["w"].tolist() == [False, True, True, True, False, True, False, False]


@pytest.mark.parametrize("order", ["random", "magnitude"])
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_new_process_knows_which_are_gone(order: str, epoch: int) -> None:
    """From the weights of a checkpoint and the recipe: the masks of an uninterrupted run."""
    parameters, masks = layers()
    made = Iterative(parameters, masks, 3, removal(order, masks))
    for done in range(epoch):
        made.start_epoch(done)
        optimizer_step(parameters)
        made.after_step()
    restored = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in parameters.items()}
    again = Iterative(restored, masks, 3, removal(order, masks))
    for one in (made, again):
        one.start_epoch(epoch)
    assert equal(again.masks, made.masks)
    assert all(torch.equal(restored[name], parameters[name]) for name in parameters)


# --- in a worker --------------------------------------------------------------------------------

MODEL = {"hidden": [16, 12]}


@pytest.fixture(scope="module")
def data() -> Data:
    return driver.load_data(tiny("data.train_limit=150", "data.validation=50"))


def worker_in(folder: Path, data: Data) -> Worker:
    settings = tiny("model.hidden=[16,12]")
    folder.mkdir(exist_ok=True)  # a worker never makes it: it may be a mount that is gone
    worker = Worker(driver.task_of(settings, RunFolder(folder)), data)
    worker.load_parent(flatten(models.build("mlp", (1, 8, 8), 10, MODEL, seed=1).state_dict()))
    return worker


def spec_of(**changes: Any) -> ChildSpec:
    training = Training(epochs=4, batch_size=32, lr=0.05, schedule="one_cycle")
    values: dict[str, Any] = dict(
        id="child-000", method="sparse", seed=5, density=0.25, draw="exact", training=training
    )
    return ChildSpec(**(values | changes))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"prune_epochs": 3}, id="iterative"),
        pytest.param({"prune_epochs": 3, "criterion": "magnitude"}, id="magnitude"),
        pytest.param({"prune_epochs": 3, "parts": 2, "part": 1}, id="complement"),
        pytest.param({"bag": 0.5, "scope": "global"}, id="bagged"),
        pytest.param(
            {"method": "stochastic", "probabilities": "uniform", "anneal_epochs": 2.5}, id="uniform"
        ),
        pytest.param({"method": "stochastic", "tau": 0.5, "anneal_epochs": 4.0}, id="to the end"),
        pytest.param(
            {"method": "stochastic", "tau": 0.5, "anneal_epochs": 2.0, "structure": "unit"},
            id="units",
        ),
    ],
)
def test_stopped_after_any_epoch_the_child_is_the_same(
    how: dict[str, Any], data: Data, tmp_path: Path
) -> None:
    """A new worker goes on from the checkpoint; weights and outputs are the same bytes."""
    spec = spec_of(**how)
    *_, whole = worker_in(tmp_path / "whole", data).run(spec)
    assert isinstance(whole, Result)
    assert whole.weights
    for stop in (1, 2, 3):
        folder = tmp_path / f"stopped-{stop}"
        reports = worker_in(folder, data).run(spec)
        for _ in range(stop):
            next(reports)
        reports.close()  # type: ignore[attr-defined]
        first, *_, result = worker_in(folder, data).run(spec)
        assert isinstance(first, Epoch | Result)
        if isinstance(first, Epoch):
            assert first.epoch == stop + 1
        assert isinstance(result, Result)
        assert (result.weights, result.outputs) == (whole.weights, whole.outputs)
        assert (result.kept, result.images) == (whole.kept, whole.images)


def test_iterative_children_end_at_their_density(data: Data, tmp_path: Path) -> None:
    """Both criteria leave a quarter of each layer; magnitudes choose after tuning, not before."""
    stored = {}
    for criterion in ("random", "magnitude"):
        spec = spec_of(prune_epochs=3, criterion=criterion)
        worker = worker_in(tmp_path / criterion, data)
        *_, result = worker.run(spec)
        assert isinstance(result, Result)
        assert result.kept == {"1.weight": 0.25, "3.weight": 0.25}
        assert result.weights
        stored[criterion] = worker.folder.load_tensors(result.weights)
        at_once = replace(spec, prune_epochs=0, id="child-001")
        *_, other = worker.run(at_once)
        assert isinstance(other, Result)
        assert other.weights
        assert not equal(worker.folder.load_tensors(other.weights), stored[criterion])
    assert stored["magnitude"]["1.weight.kept"].numel() == 64 * 16 // 8
    assert "1.weight.kept" not in stored["random"]  # its recipe draws it again
