"""Prune and fine-tune: global magnitude, held at zero, a small constant rate."""

from __future__ import annotations

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from tiny import equal

from ray_subnets import masks
from ray_subnets.baselines.prune import Prune


@pytest.mark.parametrize("network", NETWORKS)
def test_members_have_the_density_over_all_layers(network: str) -> None:
    method, bench = Prune(members=2, density=0.4), MemoryBench(network, budget=4)
    result = trained(method, bench)
    assert bench.images == 4 * 48
    for i, (one, kept) in enumerate(zip(result.networks, result.kept, strict=True)):
        shapes = masks.maskable(one, classifier=True)
        weights = dict(one.named_parameters())
        total = sum(shape.numel() for shape in shapes.values())
        nonzero = {name: int((weights[name] != 0).sum()) for name in shapes}
        assert sum(nonzero.values()) == round(0.4 * total)
        assert len({round(part, 3) for part in kept.values()}) > 1  # not alike in all layers
        for name, part in kept.items():
            assert nonzero[name] == round(part * shapes[name].numel())
        before, after = bench.stages[2 * i : 2 * i + 2]
        assert before.density == {}
        assert after.density == kept
    logits = answers(method, result, bench)
    assert not torch.equal(logits[0], logits[1])
    again = loaded(method, result.networks[1], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[1].eval()(x))


def test_the_largest_stay() -> None:
    """What is left after tuning is what was largest in the dense network."""
    method, bench = Prune(members=1, density=0.3), MemoryBench("lenet_s", budget=2)
    (network,) = trained(method, bench).networks
    dense = bench.saved[0]
    names = list(masks.maskable(network, classifier=True))
    size = torch.cat([dense[f"model.{name}"].abs().flatten() for name in names])
    left = torch.cat([network.get_parameter(name).detach().flatten() != 0 for name in names])
    assert float(size[left].min()) >= float(size[~left].max())


def test_phases_and_rates() -> None:
    bench = MemoryBench("mlp", budget=9, lr=0.1, schedule="decay")
    trained(Prune(members=2), bench)
    assert [stage.training.epochs for stage in bench.stages] == [3, 1, 4, 1]
    for stage in bench.stages[1::2]:
        torch.testing.assert_close(stage.rates, [0.001])
    assert bench.stages[0].rates[0] == 0.1
    constant = MemoryBench("mlp", budget=2, optimizer="adam", schedule="constant", lr=0.001)
    trained(Prune(members=1), constant)
    assert [stage.rates for stage in constant.stages] == [[0.001], [0.001]]
    with pytest.raises(ValueError, match="members: 3 networks need 6 epochs or more"):
        Prune().epochs(5)


def test_a_layer_without_weights_is_told() -> None:
    bench = MemoryBench("lenet_s", budget=6)
    with pytest.raises(ValueError, match=r"density: at 1e-05 nothing is left of .*; use more"):
        trained(Prune(density=1e-5), bench)


def test_local_scope_has_the_density_in_every_layer() -> None:
    (kept,) = trained(Prune(members=1, scope="local"), MemoryBench("lenet_s", budget=2)).kept
    assert list(kept.values()) == pytest.approx([0.2] * 5, abs=0.01)


def test_interrupted_between_stages_it_is_the_same() -> None:
    method, whole = Prune(members=2, density=0.5), MemoryBench("lenet_s", budget=4)
    wanted = trained(method, whole)
    for done in (1, 2, 3):
        result = trained(method, MemoryBench("lenet_s", budget=4, saved=whole.saved[:done]))
        for one, other in zip(result.networks, wanted.networks, strict=True):
            assert equal(one.state_dict(), other.state_dict())
        assert result.kept == wanted.kept
