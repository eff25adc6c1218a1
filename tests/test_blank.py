"""Networks for weights to be loaded into: built once, then copied without weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import equal, numbers, run_serial, tiny
from torch import Tensor, nn

from ray_subnets import driver, models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.population import Worker
from ray_subnets.recipes import Fit, Training
from ray_subnets.stored import checkpoint_name, load_checkpoint, save_checkpoint


class Held(nn.Module):
    """Its forward asks the module that it was made in, whatever it is copied to."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(64, 16), nn.Linear(16, num_classes)
        self.ask = lambda x: self.last(self.hidden(x.flatten(1)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.ask(x)


def worker(folder: Path, *overrides: str) -> Worker:
    config = tiny(*overrides)
    return Worker(driver.task_of(config, RunFolder.create(folder)), driver.load_data(config))


@pytest.mark.parametrize("network", ["{name: mlp, hidden: [16]}", "resnet18", "densenet121"])
def test_it_is_the_network_and_built_once(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(tmp_path / "run", f"model={network}")
    weights = one.build(seed=3).state_dict()
    built: list[str] = []
    build = models.build
    monkeypatch.setattr(models, "build", lambda *a, **k: built.append("") or build(*a, **k))
    asked = [one.blank() for _ in range(3)]
    assert len(built) == 1
    expected = one.build(seed=0)
    x = torch.randn(3, *one.data.input_shape)
    for model in [expected, *asked]:
        model.load_state_dict(weights)
        strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
        assert strides == {name: t.stride() for name, t in expected.state_dict().items()}
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected.eval()(x))
        assert all(parameter.requires_grad for parameter in model.parameters())
    asked[1].load_state_dict({name: torch.zeros_like(t) for name, t in weights.items()})
    assert equal(dict(asked[2].state_dict()), dict(weights))  # copies share nothing


def test_one_that_cannot_be_copied_is_built_each_time(tmp_path: Path) -> None:
    overrides = ("model=test_blank:Held", "select.count=2")
    one = worker(tmp_path / "run", *overrides)
    first, second = one.blank(), one.blank()
    assert first is not second
    zeros = {name: torch.zeros_like(t) for name, t in first.state_dict().items()}
    second.load_state_dict(zeros)
    x = torch.randn(2, *one.data.input_shape)
    assert not second(x).any()
    assert first(x).any()


def test_children_are_the_same_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = run_serial(tiny(), RunFolder.create(tmp_path / "copied"))
    monkeypatch.setattr(Worker, "blank", lambda self: self.build(seed=0))
    built = run_serial(tiny(), RunFolder.create(tmp_path / "built"))
    assert numbers(copied) == numbers(built)


def test_only_checkpoints_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has a checksum, and its job can start again; a result must be on the disk."""
    waited: list[str] = []
    sync, replace = os.fsync, os.replace
    pending: list[int] = []

    def replaced(source: str, target: Path) -> None:
        waited.extend([Path(target).name] if pending else [])
        pending.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: pending.append(handle) or sync(handle))
    monkeypatch.setattr(os, "replace", replaced)
    folder = RunFolder.create(tmp_path / "run")
    run_serial(tiny(), folder)
    assert {"result.json", "parent.safetensors", "parent.json", "config.yaml"} <= set(waited)
    job = Fit(id="parent", training=Training(epochs=2), seed=0)
    waited.clear()
    save_checkpoint(folder, job, {"w": torch.ones(3)}, 1, 64, 0.5)
    assert folder.exists(checkpoint_name(job))
    assert not waited
    found: list[Tensor] = []
    assert load_checkpoint(folder, job, lambda state: found.append(state["w"]))[0] == 1
    assert torch.equal(found[0], torch.ones(3))
