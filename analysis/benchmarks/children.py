"""What children weigh on disk, and how much faster a really smaller child is.

make bench            # or: python -m analysis.benchmarks.children
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from analysis.benchmarks.rounds import Ratios, medians, timed
from ray_subnets import models, spawning
from ray_subnets.flops import forward_cost
from ray_subnets.recipes import ChildSpec, Training
from ray_subnets.stored import pack_child

NETWORKS: dict[str, dict[str, Any]] = {
    "lenet_l": {},
    "resnet18": {},
    "wide_resnet": {"depth": 28, "width": 10},
}
SHAPE, BATCH, ROUNDS = (3, 32, 32), 128, 7
TRAINING = Training(epochs=1)


def on_disk() -> None:
    table = Table(title="Bytes on disk of one child (WRN-28-10, 36.5 M parameters, float32)")
    for heading in ("child", "bytes", "surviving weights", "ratio", "wanted"):
        table.add_column(heading, justify="left" if heading == "child" else "right")
    parent = models.build("wide_resnet", SHAPE, 10, NETWORKS["wide_resnet"], seed=0)
    noise = ChildSpec(id="n", method="noisy", seed=2**61, density=0.5, draw="bernoulli", sigma=0.01)
    recipe = len(json.dumps(noise.to_json()).encode())
    table.add_row("noisy: its recipe", f"{recipe:,}", "", "", "<= 1,024")
    for structure, density in (("weight", 0.5), ("weight", 0.1), ("unit", 0.5)):
        spec = ChildSpec(
            id="s",
            method="sparse",
            seed=1,
            density=density,
            draw="exact",
            structure=structure,  # type: ignore[arg-type]
            training=TRAINING,
        )
        body = spawning.anatomy(parent, spec, SHAPE)
        child = spawning.spawn_weights(parent.state_dict(), body, spec)
        model = models.build("wide_resnet", SHAPE, 10, NETWORKS["wide_resnet"], seed=0)
        model.load_state_dict(child.weights)
        model = spawning.without_removed(model, spec, child.subnetwork, body)
        packed = pack_child(model, spec, child.subnetwork, child.subnetwork.masks)
        size = len(safetensors.torch.save({key: t.contiguous() for key, t in packed.items()}))
        left = 4 * sum(int((tensor != 0).sum()) for tensor in child.weights.values())
        if structure == "unit":  # columns that read removed units have gone too
            left = 4 * sum(int((p != 0).sum()) for p in model.state_dict().values())
        name = f"sparse, {1 - density:.0%} of {structure}s removed"
        table.add_row(name, f"{size:,}", f"{left:,}", f"{size / left:.3f}", "<= 1.02")
    Console(width=120).print(table)


def _step(model: nn.Module) -> None:
    """Forward and backward of one batch, which is what a smaller network saves."""
    x = torch.zeros(BATCH, *SHAPE)
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()


def speed() -> None:
    table = Ratios(f"Half of the units removed against masked, forward and backward, batch {BATCH}")
    for name in ("lenet_l", "resnet18"):
        parent = models.build(name, SHAPE, 10, NETWORKS[name], seed=0)
        spec = ChildSpec(
            id="s", method="sparse", seed=1, density=0.5, draw="exact", structure="unit"
        )
        body = spawning.anatomy(parent, spec, SHAPE)
        child = spawning.spawn_weights(parent.state_dict(), body, spec)
        masked = models.build(name, SHAPE, 10, NETWORKS[name], seed=0)
        masked.load_state_dict(child.weights)
        small = spawning.without_removed(masked, spec, child.subnetwork, body)
        whole, left = forward_cost(parent, SHAPE), forward_cost(small, SHAPE)
        theory = f"{left.total / whole.total:.2f}x by FLOPs"
        pair = medians(timed(partial(_step, small)), timed(partial(_step, masked)), rounds=ROUNDS)
        parameters = f"{left.parameters / whole.parameters:.2f} of the parameters"
        table.add(f"{name}, {parameters}", "masked", pair, theory)
    table.show()


def main() -> None:
    torch.set_num_threads(2)
    on_disk()
    speed()


if __name__ == "__main__":
    main()
