"""`compile: true` gives the same networks, up to the last digits, for every kind of mask."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import run_serial
from torch import nn

import ray_subnets
from ray_subnets import configfile, driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.summary import load_outputs

CONFIG = """
name: compiled
data: {name: digits, train_limit: 100, validation: 60}
model: {name: mlp, hidden: [16]}
parent: {epochs: 1, batch_size: 50}
single: false
children:
  - {method: sparse, name: iterative, count: 1, sparsity: 0.5, prune_epochs: 2, tune: &tune
     {epochs: 2, batch_size: 50}}
  - {method: stochastic, name: soft, count: 1, sparsity: 0.5, anneal_epochs: 1.5, tune: *tune}
  - {method: stochastic, name: units, count: 1, sparsity: 0.5, anneal_epochs: 1, tune: *tune,
     structure: unit}
"""


# torch hides the first of these warnings of its own, which does not help where they are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings(r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning")
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_compiled_training_gives_the_same_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random masks stand in for the parameters on some steps and not on others."""
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda model, of=nn.Module.compile: compiled.append(of(model))
    )
    outputs = {}
    for compile in ("false", "true"):
        overrides = [f"children.{i}.tune.compile={compile}" for i in range(3)]
        settings = configfile.parse(CONFIG, "compiled", overrides)
        folder = RunFolder.create(tmp_path / compile)
        run_serial(settings, folder)
        ids = [spec.id for spec in settings.specs()]
        outputs[compile] = load_outputs(folder, ids, "test").logits
        data = driver.load_data(settings)
        loaded = ray_subnets.load(folder.root).logits(data.test.images)
        torch.testing.assert_close(loaded, outputs[compile], rtol=1e-4, atol=1e-4)
    assert len(compiled) == 3
    torch.testing.assert_close(outputs["true"], outputs["false"], rtol=1e-3, atol=1e-3)
