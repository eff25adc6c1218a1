"""A run with a group of children of every option: made, stored, loaded and reported as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_serial
from torch import nn

import ray_subnets
from ray_subnets import configfile, driver, supervised, table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.data import Batches, Data, Preprocess, Split, bagged
from ray_subnets.ensembles import Ensemble
from ray_subnets.recipes import derive
from ray_subnets.summary import load_outputs

HEAD = """
name: options
data: {name: digits, train_limit: 200, validation: 60}
model: {name: mlp, hidden: [16, 12]}
parent: {epochs: 3, batch_size: 32}
single: false
"""
EVERY = """
singles: {epochs: [1, 3], lr: [0.1, 0.001]}
children:
  - {method: sparse, name: plain, count: 2, partition: 2, tune: &tune {epochs: 2, batch_size: 32}}
  - {method: sparse, name: unit, count: 2, partition: 2, structure: unit, tune: *tune}
  - {method: sparse, name: neuron, count: 1, sparsity: 0.25, structure: neuron, tune: *tune}
  - {method: sparse, name: layer, count: 1, sparsity: 0.5, structure: layer, tune: *tune}
  - {method: sparse, name: global, count: 1, sparsity: 0.8, scope: global, tune: *tune}
  - {method: sparse, name: large, count: 2, partition: 2, criterion: magnitude, tune: *tune}
  - {method: sparse, name: large-unit, count: 1, sparsity: 0.5, structure: unit,
     criterion: magnitude, tune: *tune}
  - {method: sparse, name: iterative, count: 1, sparsity: 0.75, prune_epochs: 2, tune: *tune}
  - {method: sparse, name: iterative-large, count: 1, sparsity: 0.75, prune_epochs: 1,
     criterion: magnitude, tune: *tune}
  - {method: sparse, name: classifier, count: 1, sparsity: 0.5, mask_classifier: true, tune: *tune}
  - {method: sparse, name: untuned, count: 1, sparsity: 0.5, tune: {epochs: 0}}
  - {method: sparse, name: bag, count: 1, sparsity: 0.5, bag: 0.25, tune: *tune}
  - {method: sparse, name: half, count: 1, sparsity: 0.5,
     tune: {epochs: 2, batch_size: 32, precision: bfloat16}}
  - {method: sparse, name: steps, count: 1, sparsity: 0.5,
     tune: {epochs: 2, batch_size: 32, schedule: steps, optimizer: adam, lr: 0.01}}
  - {method: noisy, name: relative, count: 4, sigma: 0.3, partition: 2, mirrored: true,
     relative: true}
  - {method: noisy, name: rows, count: 2, sigma: 0.1, partition: 2, structure: unit}
  - {method: stochastic, name: soft, count: 2, partition: 2, anneal_epochs: 1.5, tune: *tune,
     vary: {probabilities: [temperature, uniform, mixture], two_sided: [false, true]}}
  - {method: stochastic, name: soft-unit, count: 2, partition: 2, structure: unit,
     anneal_epochs: 1, tune: *tune}
  - {method: stochastic, name: three, count: 3, partition: 3, probabilities: uniform,
     anneal_epochs: 2, tune: *tune}
"""
TOTAL = 64 * 16 + 16 + 16 * 12 + 12 + 12 * 10 + 10

Finished = tuple[RunFolder, dict[str, Any], Ensemble]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "options")
    record = run_serial(configfile.parse(HEAD + EVERY, "options"), folder)
    return folder, record, ray_subnets.load(folder.root)


def children(record: dict[str, Any], group: str) -> list[dict[str, Any]]:
    found = [child for child in record["children"] if child["group"] == group]
    assert found, group
    return found


def test_every_child_loads_as_it_was(finished: Finished) -> None:
    """Each member's outputs are those that were saved when it was made."""
    folder, record, ensemble = finished
    assert not [child["error"] for child in record["children"] if child["error"]]
    assert set(ensemble.ids) == {child["id"] for child in record["children"]}
    data = driver.load_data(configfile.parse(HEAD + EVERY, "options"))
    x = data.preprocess(data.test.images)
    for id, member in zip(ensemble.ids, ensemble.members, strict=True):
        saved = load_outputs(folder, [id], "test").logits[0]
        torch.testing.assert_close(member(x), saved, rtol=1e-5, atol=1e-5, msg=id)
    answers = load_outputs(folder, ensemble.ids, "test").logits.flatten(1)
    assert len(answers.unique(dim=0)) == len(answers)  # no two children are the same


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ("plain", TOTAL - (64 * 16 + 16 * 12) / 2),
        ("unit", 64 * 8 + 8 + 8 * 6 + 6 + 6 * 10 + 10),
        ("neuron", 64 * 12 + 12 + 12 * 9 + 9 + 9 * 10 + 10),
        ("global", TOTAL - round(0.8 * (64 * 16 + 16 * 12))),
        ("large", TOTAL - (64 * 16 + 16 * 12) / 2),
        ("large-unit", 64 * 8 + 8 + 8 * 6 + 6 + 6 * 10 + 10),
        ("iterative", TOTAL - (64 * 16 + 16 * 12) * 3 / 4),
        ("iterative-large", TOTAL - (64 * 16 + 16 * 12) * 3 / 4),
        ("classifier", TOTAL - (64 * 16 + 16 * 12 + 12 * 10) / 2),
        ("untuned", TOTAL - (64 * 16 + 16 * 12) / 2),
        ("relative", TOTAL),
        ("rows", TOTAL),
        ("soft-probabilities=uniform-two_sided=True", TOTAL - (64 * 16 + 16 * 12) / 2),
        ("soft-unit", 64 * 8 + 8 + 8 * 6 + 6 + 6 * 10 + 10),
    ],
)
def test_kept_is_what_is_left(group: str, kept: float, finished: Finished) -> None:
    """By hand, and counted in the loaded network."""
    _, record, ensemble = finished
    for child in children(record, group):
        assert child["kept"] == pytest.approx(kept / TOTAL, abs=1e-9)
        member = ensemble.members[ensemble.ids.index(child["id"])]
        nonzero = sum(int((weight != 0).sum()) for weight in member.parameters())
        assert nonzero == pytest.approx(kept, abs=2)  # a weight may be zero by itself


def test_a_layer_pruned_to_nothing_is_told(finished: Finished) -> None:
    _, record, ensemble = finished
    (child,) = children(record, "layer")
    (note,) = child["notes"]
    layer = note.removesuffix(" is pruned to nothing")
    assert layer in ("1.weight", "3.weight")
    assert layer not in ensemble.members[ensemble.ids.index(child["id"])].state_dict()
    gone = 64 * 16 if layer == "1.weight" else 16 * 12
    assert child["kept"] == pytest.approx(1 - gone / TOTAL)
    assert f"layer-000: {note}" in table.notes(record)
    assert [c["id"] for c in record["children"] if c["notes"]] == ["layer-000"]


def test_global_scope_takes_more_from_some_layers(finished: Finished) -> None:
    folder, _, _ = finished
    kept = folder.read_json("results/global-000.json")["kept"]
    assert kept["1.weight"] * 64 * 16 + kept["3.weight"] * 16 * 12 == pytest.approx(243)
    assert kept["1.weight"] != pytest.approx(0.2, abs=1e-4)


def test_large_weights_make_the_subnetwork(finished: Finished) -> None:
    """The first keeps the larger half of each layer of the parent, the second the other."""
    folder, record, ensemble = finished
    parent = folder.load_tensors("parent.safetensors")
    masks = []
    for child in children(record, "large"):
        member = ensemble.members[ensemble.ids.index(child["id"])]
        masks.append(member.get_parameter("1.weight") != 0)
    size = parent["1.weight"].abs()
    assert size[masks[0]].min() >= size[masks[1]].max()
    assert (masks[0] ^ masks[1]).float().mean() > 0.999


def test_relative_noise_is_as_large_as_each_layer(finished: Finished) -> None:
    folder, record, ensemble = finished
    parent = folder.load_tensors("parent.safetensors")
    first = ensemble.members[ensemble.ids.index(children(record, "relative")[0]["id"])]
    for name in ("1.weight", "3.weight"):
        moved = first.get_parameter(name) - parent[name]
        noise = float(moved[moved != 0].std())
        assert noise == pytest.approx(0.3 * float(parent[name].std()), rel=0.25)


def test_a_bagged_child_sees_fewer_images(finished: Finished) -> None:
    _, record, _ = finished
    assert [child["images"] for child in children(record, "bag")] == [2 * 50]
    assert [child["images"] for child in children(record, "plain")] == [2 * 200] * 2


def test_precision_schedule_and_optimizer_change_the_child(finished: Finished) -> None:
    """Lower precision does, a little; weights stay float32."""
    folder, record, ensemble = finished
    for group in ("half", "steps"):
        (child,) = children(record, group)
        assert child["validation"]["nll"] < np.log(10)
        member = ensemble.members[ensemble.ids.index(child["id"])]
        assert {weight.dtype for weight in member.parameters()} == {torch.float32}
    full = configfile.parse(
        HEAD + EVERY, "options", ["children.12.tune.precision=float32", "singles="]
    )
    assert full.children[12].label == "half"
    assert children(record, "half")[0]["recipe"]["training"]["precision"] == "bfloat16"
    other = retrained(folder, full, "half-000")
    saved = load_outputs(folder, ["half-000"], "test").logits[0]
    gap = (other - saved).abs().max()
    assert 1e-4 < gap < 0.1 * saved.abs().max()


def retrained(folder: RunFolder, config: Config, id: str) -> torch.Tensor:
    """Test logits of one child of another config, from the same parent."""
    from ray_subnets.flat import flatten
    from ray_subnets.population import Worker

    other = RunFolder.create(folder.root.parent / f"again-{config.name}-{id}")
    worker = Worker(driver.task_of(config, other), driver.load_data(config))
    worker.load_parent(flatten(folder.load_tensors("parent.safetensors")))
    (spec,) = [spec for spec in config.specs() if spec.id == id]
    list(worker.run(spec))
    return torch.from_numpy(other.load_arrays(f"outputs/{id}.npz")["test"])


def test_the_best_single_is_chosen_on_validation_data(finished: Finished) -> None:
    _, record, _ = finished
    singles = record["singles"]
    assert set(singles) == {f"single-{e}-{lr}" for e in (1, 3) for lr in ("0.1", "0.001")}
    by_nll = sorted(singles, key=lambda id: singles[id]["validation"]["nll"])
    assert record["best_single"] == by_nll[0]
    assert [singles[f"single-{e}-0.1"]["images"] for e in (1, 3)] == [200, 600]
    row = next(row for row in table.rows(record) if row.name == "single, best of 4")
    assert row.test == singles[by_nll[0]]["test"]
    assert record["single"] is None


# --- batch-norm ---------------------------------------------------------------------------------

NORM = """
name: norm
data: {name: npz, root: %s, validation: 20}
model: {name: wide_resnet, depth: 10, width: 1}
parent: {epochs: 2, batch_size: 16}
single: false
children:
  - {method: noisy, name: old, count: 1, sigma: 0.2, density: 0.5}
  - {method: noisy, name: new, count: 1, sigma: 0.2, density: 0.5, draws_of: 0,
     recompute_norm: true}
  - {method: sparse, name: pruned, count: 1, sparsity: 0.5, recompute_norm: true,
     structure: unit, tune: {epochs: 0}}
  - {method: sparse, name: tuned, count: 1, sparsity: 0.5, recompute_norm: true,
     tune: {epochs: 1, batch_size: 16}}
"""


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def test_batch_norm_statistics_are_made_anew_and_stored(tmp_path: Path) -> None:
    """Those of the child's own activations on training images; nothing else is stored of it."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 80), ("test", 30)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 3
    np.savez(tmp_path / "images.npz", **arrays)
    settings = configfile.parse(NORM % (tmp_path / "images.npz"), "norm")
    folder = RunFolder.create(tmp_path / "run")
    run_serial(settings, folder)
    ensemble = ray_subnets.load(folder.root)
    data = driver.load_data(settings)
    members = dict(zip(ensemble.ids, ensemble.members, strict=True))
    for id, member in members.items():
        saved = load_outputs(folder, [id], "test").logits[0]
        found = supervised.predict(member, data.test.images, data.preprocess)
        torch.testing.assert_close(found, saved, rtol=1e-4, atol=1e-5, msg=id)

    parent = folder.load_tensors("parent.safetensors")
    old, new = members["old-000"], members["new-000"]
    for name, weight in old.named_parameters():
        assert torch.equal(new.get_parameter(name), weight)
    for name, buffer in norms(old).items():
        assert torch.equal(buffer, parent[name])
    assert all(not torch.allclose(norms(new)[name], parent[name]) for name in norms(new))
    # The first layer's input does not depend on other statistics: its mean by hand.
    first = next(module for module in new.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    supervised.predict(new, data.train.images, data.preprocess)
    hook.remove()
    (activations,) = seen
    assert first.running_mean is not None
    torch.testing.assert_close(first.running_mean, activations.mean((0, 2, 3)))
    # In place, and nothing else of a network changes.
    state, chance = torch.get_rng_state(), first.momentum
    supervised.recompute_norm(new, Batches(data, 500, 1))
    torch.testing.assert_close(first.running_mean, activations.mean((0, 2, 3)))
    assert (first.momentum, new.training) == (chance, False)
    assert torch.equal(torch.get_rng_state(), state)
    stored = folder.load_tensors("children/new-000.safetensors")
    assert set(stored) == {n for n, _ in new.named_buffers()}
    assert not (folder.root / "children/old-000.safetensors").exists()


def test_statistics_are_computed_where_one_sample_is_left_over() -> None:
    """501 samples in batches of 500: the last one has no variance."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(501, 3, generator=generator), torch.zeros(501, dtype=torch.int64)
    split = Split(x, y)
    data = Data("given", split, split, split, 2, Preprocess())
    norm = nn.BatchNorm1d(3)
    supervised.recompute_norm(norm, Batches(data, 500, 1))
    assert norm.running_mean is not None
    order = torch.randperm(501, generator=torch.Generator().manual_seed(derive(1, "order", 0)))
    torch.testing.assert_close(norm.running_mean, x[order[:500]].mean(0))


# --- bags ---------------------------------------------------------------------------------------


def test_a_bag_is_a_part_of_the_training_images_only() -> None:
    data = driver.load_data(configfile.parse(HEAD + EVERY, "options"))
    half = bagged(data, 0.3, seed=1)
    assert len(half.train) == 60
    assert (half.validation, half.test) == (data.validation, data.test)
    rows = {tuple(image.flatten().tolist()): int(label) for image, label in zip_of(data)}
    drawn = [tuple(image.flatten().tolist()) for image, _ in zip_of(half)]
    assert all(rows[image] == int(y) for image, (_, y) in zip(drawn, zip_of(half), strict=True))
    assert len(set(drawn)) == 60  # without putting back
    assert torch.equal(bagged(data, 0.3, seed=1).train.images, half.train.images)
    assert not torch.equal(bagged(data, 0.3, seed=2).train.images, half.train.images)
    assert bagged(data, 1.0, seed=1) is data
    assert len(bagged(data, 1e-6, seed=1).train) == 1


def zip_of(data: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(data.train.images, data.train.labels, strict=True))
