"""What a child costs while it is tuned: the weights that act, against those that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_subnets import ChildSpec, Training, acting, configfile, driver, models, spawning
from ray_subnets.checkpoints import RunFolder
from ray_subnets.flops import forward_cost, training_flops
from ray_subnets.placement import Node
from ray_subnets.plan import plan
from ray_subnets.pools import SerialPool
from ray_subnets.population import Worker

STEPS, EPOCHS = 25, 4
READS = (("1.weight", "3.weight"), ("3.weight", "5.weight"))


def spec(**how: Any) -> ChildSpec:
    training = Training(epochs=EPOCHS, batch_size=10, lr=0.01)
    plain: dict[str, Any] = {"id": "a", "method": "stochastic", "seed": 3, "density": 0.4}
    plain |= {"draw": "exact", "tau": 0.7, "anneal_epochs": 3, "training": training}
    return ChildSpec(**plain | how)


def parts(one: ChildSpec) -> tuple[nn.Module, spawning.Anatomy, spawning.Subnetwork]:
    model = models.build("mlp", (8,), 3, {"hidden": [64, 64]}, 0)
    body = spawning.anatomy(model, one, (8,))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return model, body, spawning.subnetwork(one, body, weights)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"probabilities": "uniform"},
        {"probabilities": "mixture"},
        {"two_sided": True},
        {"anneal": "cosine", "anneal_epochs": 2.5},
        {"anneal": "exponential"},
        {"parts": 3, "density": 1 / 3, "two_sided": True},
        {"structure": "neuron"},
        {"structure": "layer", "density": 0.5, "anneal_epochs": 2},
        {"method": "sparse", "prune_epochs": 2, "anneal_epochs": 0},
        {"method": "sparse", "prune_epochs": 2, "anneal_epochs": 0, "criterion": "magnitude"},
        {"method": "sparse", "anneal_epochs": 0},
        {"tau": 0.0},
    ],
)
def test_what_acts_is_what_is_drawn_on_average(how: dict[str, Any]) -> None:
    one = spec(**how)
    model, body, sub = parts(one)
    expected = acting.shares(one, sub, body, STEPS)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    topology = acting.topology(one, sub, body, parameters)
    assert topology is not None
    generator = torch.Generator().manual_seed(0)
    seen = dict.fromkeys(expected, 0.0)
    for epoch in range(EPOCHS):
        topology.start_epoch(epoch)
        for step in range(STEPS):
            weights = topology.weights(epoch + step / STEPS, generator)
            acts: dict[str, Tensor] = dict(topology.masks)
            if weights:
                acts = {name: weights[name] != 0 for name in acts}
            for before, after in READS if how.get("structure") == "neuron" else ():  # dead units
                alive = acts[before].any(1)
                acts[after] = acts.get(after, torch.ones(1, 1, dtype=torch.bool)) & alive
            for name in expected:
                seen[name] += float(acts[name].double().mean()) / (EPOCHS * STEPS)
    slack = {"neuron": 0.05, "layer": 0.1}.get(how.get("structure", ""), 0.012)  # few come and go
    for name, share in expected.items():
        if name.endswith("weight"):
            assert seen[name] == pytest.approx(share, abs=slack), name


def test_noise_leaves_all_weights_in_place() -> None:
    one = spec(method="noisy", sigma=0.1, training=None, anneal_epochs=0)
    _, body, sub = parts(one)
    assert acting.shares(one, sub, body, STEPS) == {}


CONFIG = """
name: acting
data: {name: digits, train_limit: 100}
model: {name: mlp, hidden: [32, 32]}
parent: {epochs: 2, lr: 0.05, batch_size: 50}
single: false
children:
  - {method: stochastic, count: 1, sparsity: 0.9, tau: 1.0, anneal_epochs: 4,
     tune: {epochs: 4, batch_size: 50}}
  - {method: sparse, count: 1, sparsity: 0.5, structure: neuron, tune: {epochs: 3}}
  - {method: sparse, count: 1, sparsity: 0.5, tune: {epochs: 3}}
"""


def test_a_run_counts_what_acted_and_what_was_computed(tmp_path: Path) -> None:
    config = configfile.parse(CONFIG, "acting.yaml")
    data = driver.load_data(config)
    folder = RunFolder.create(tmp_path / "run")
    cost = driver.prepare(config, data, folder)
    pool = SerialPool(Worker(driver.task_of(config, folder), data))
    record = driver.run(config, data, folder, pool, cost=cost)
    dense = forward_cost(driver.build(config, data), data.input_shape)
    small = models.build("mlp", data.input_shape, 10, {"hidden": [16, 16]}, 0)
    small_cost = forward_cost(small, data.input_shape).total
    weights = {"1.weight": 64 * 32, "3.weight": 32 * 32}
    masked = 2 * sum(weights.values())
    drawn = dense.total - masked * (1 - (0.1 + 0.9 * (8 + 1) / (2 * 8)))  # 8 steps, 1 to 1/8
    half = dense.total - masked * 0.5
    images = {"parent": 200, "stochastic": 400, "neuron": 300, "sparse": 300}
    acted = (
        *(dense.total * images["parent"], drawn * images["stochastic"]),
        *(small_cost * images["neuron"], half * images["sparse"]),
    )
    spent = record["cost"]
    assert spent["flops"] == pytest.approx(training_flops(sum(acted), 1), rel=2e-3)
    computed = dense.total * (200 + 400 + 300) + small_cost * 300
    assert spent["flops_dense"] == pytest.approx(training_flops(computed, 1), rel=1e-6)
    assert spent["flops_vs_single"] == pytest.approx(sum(acted) / (dense.total * 1200), rel=2e-3)
    planned = plan(config, data, cost, [Node(2, 0)], serial=True)
    assert planned.flops == pytest.approx(spent["flops"], rel=2e-3)
    assert planned.flops_dense == pytest.approx(spent["flops_dense"], rel=1e-6)
