"""MotherNets: hatching keeps the function; members then go their own ways."""

from __future__ import annotations

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from tiny import equal
from torch import Tensor, nn

from ray_subnets import structured
from ray_subnets.baselines.mother_nets import MotherNets, core_units, hatch, parents


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [0.3, 0.5])
@torch.no_grad()
def test_hatching_keeps_the_function(network: str, width: float) -> None:
    bench = MemoryBench(network)
    whole = bench.build(0)
    units = structured.coupled_units(whole, bench.data.input_shape)
    kept = core_units(units, width)
    core = structured.remove(whole, units, kept)
    core.train()
    for start in range(0, 48, 16):  # batch-norm has seen something
        core(bench.data.train.images[start : start + 16])
    core.eval()
    chosen = parents(units, kept, 1)
    hatched = bench.build(2)
    hatched.load_state_dict(hatch(core.state_dict(), units, kept, chosen))
    x = bench.data.test.images
    wanted = core(x)
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(hatched.eval()(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hatched.train()(x), core.train()(x), rtol=1e-4, atol=1e-4)
    other = hatch(core.state_dict(), units, kept, parents(units, kept, 2))
    assert not equal(other, hatch(core.state_dict(), units, kept, chosen))


def test_widening_by_hand() -> None:
    """2 units to 3, the third a copy of the first; what reads it has halves of its weight."""
    wide = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    units = structured.coupled_units(wide, (2,))
    kept = {units[0].name: torch.tensor([True, True, False])}
    small = {
        "0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "0.bias": torch.tensor([5.0, 6.0]),
        "2.weight": torch.tensor([[10.0, 20.0], [30.0, 40.0]]),
        "2.bias": torch.tensor([7.0, 8.0]),
    }
    found = hatch(small, units, kept, {units[0].name: torch.tensor([0, 1, 0])})
    assert found["0.weight"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert found["0.bias"].tolist() == [5, 6, 5]
    assert found["2.weight"].tolist() == [[5, 20, 5], [15, 40, 15]]
    assert found["2.bias"].tolist() == [7, 8]


def test_every_unit_of_the_core_stays_and_all_are_copied_by_chance() -> None:
    whole = MemoryBench("mlp").build(0)
    units = structured.coupled_units(whole, (3, 16, 16))
    kept = core_units(units, 0.5)
    assert {name: int(stays.sum()) for name, stays in kept.items()} == {
        "1.weight": 8,
        "3.weight": 6,
    }
    chosen = parents(units, kept, 4)
    assert chosen["1.weight"][:8].tolist() == list(range(8))
    assert chosen["1.weight"].max() < 8
    assert all(int(one.sum()) == 1 for one in core_units(units, 1e-6).values())


@pytest.mark.parametrize("network", NETWORKS)
def test_members_share_a_core_and_disagree(network: str) -> None:
    method, bench = MotherNets(members=2), MemoryBench(network, budget=4)
    result = trained(method, bench)
    assert bench.images == 4 * 48
    sizes = [sum(p.numel() for p in stage.network.parameters()) for stage in bench.stages]
    assert [stage.training.epochs for stage in bench.stages] == [2, 1, 1]
    assert sizes[0] < sizes[1] == sizes[2] == sum(p.numel() for p in bench.build(0).parameters())
    logits = answers(method, result, bench)
    assert logits.shape == (2, 48, 4)
    assert not torch.equal(logits[0], logits[1])
    again = loaded(method, result.networks[1], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[1].eval()(x))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_noise_makes_copies_differ(noise: float) -> None:
    """Without it two copies of a unit get the same gradient and stay alike."""
    method, bench = MotherNets(members=1, noise=noise), MemoryBench("mlp", budget=2)
    (network,) = trained(method, bench).networks
    rows = network.get_parameter("1.weight").detach()
    alike = sum(
        bool(torch.allclose(rows[i], rows[j], atol=1e-6)) for i in range(16) for j in range(i)
    )
    assert (alike > 0) == (noise == 0)


def test_interrupted_between_stages_it_is_the_same() -> None:
    method, whole = MotherNets(members=2), MemoryBench("lenet_s", budget=3)
    wanted = trained(method, whole)
    for done in (1, 2):
        result = trained(method, MemoryBench("lenet_s", budget=3, saved=whole.saved[:done]))
        for one, other in zip(result.networks, wanted.networks, strict=True):
            assert equal(one.state_dict(), other.state_dict())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(768, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.flatten(1))))


def test_networks_and_budgets_that_do_not_fit() -> None:
    bench = MemoryBench(budget=8)
    bench.build = lambda seed: Normed()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"mother_nets: .* cannot be widened .* fit") as error:
        trained(MotherNets(), bench)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="members: 4 and their core need 5 epochs"):
        MotherNets().epochs(4)
