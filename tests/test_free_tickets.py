"""Dynamic sparse training: how dense each layer is, what is replaced when, and what is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from tiny import equal
from torch import nn

from ray_subnets import masks, models
from ray_subnets.baselines.exploring import Exploring, draw, erk
from ray_subnets.baselines.free_tickets import DST, EDST
from ray_subnets.masks import Masks

# --- density of layers --------------------------------------------------------------------------


def test_erk_of_lenet_by_hand() -> None:
    """LeNet-S on 3x32x32, 252,848 weights, density 0.2: 50,569.6 of them.

    Sums of the shapes: 29, 58, 1056, 384, 138. All: 50,569.6 / 1665 = 30.37 per unit, which would
    give the classifier 30.37 * 138 / 1280 = 3.3; so it is whole, and the others have
    (50,569.6 - 1280) / 1527 = 32.279 per unit.
    """
    shapes = masks.maskable(models.build("lenet_s", (3, 32, 32), 10, {}, 0), classifier=True)
    unit = (0.2 * 252848 - 1280) / 1527
    found = erk(shapes, 0.2)
    assert list(found) == [f"{n}.weight" for n in ("conv1", "conv2", "fc1", "fc2", "classifier")]
    wanted = [29 / 1200, 58 / 12800, 1056 / 204800, 384 / 32768]
    assert list(found.values()) == pytest.approx([unit * one for one in wanted] + [1.0])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_erk_keeps_within_layers_and_to_the_whole(network: str, density: float) -> None:
    shapes = masks.maskable(MemoryBench(network).build(0), classifier=True)
    found = erk(shapes, density)
    assert all(0 < one <= 1 for one in found.values())
    total = sum(shape.numel() for shape in shapes.values())
    kept = sum(found[name] * shape.numel() for name, shape in shapes.items())
    assert kept == pytest.approx(density * total)
    drawn = draw(shapes, found, 0)
    for name, mask in drawn.items():
        assert int(mask.sum()) == max(1, round(found[name] * mask.numel()))
    assert not equal(draw(shapes, found, 1), drawn)


# --- updates ------------------------------------------------------------------------------------


class Play:
    """Two layers, one of them whole, and an optimizer; gradients are drawn."""

    def __init__(self, optimizer: str = "sgd", **how: object) -> None:
        self.generator = torch.Generator().manual_seed(1)
        sizes = {"a": (6, 10), "whole": (2, 3), "bias": (6,)}
        self.parameters = {
            n: nn.Parameter(torch.randn(s, generator=self.generator)) for n, s in sizes.items()
        }
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.parameters.values(), lr=0.01, momentum=0.9, weight_decay=0.1)
            if optimizer == "sgd"
            else torch.optim.Adam(self.parameters.values(), lr=0.01)
        )
        whole = {"a": self.parameters["a"].shape}
        drawn: Masks = masks.exact(whole, 0.4, self.generator)
        drawn["whole"] = torch.ones(2, 3, dtype=torch.bool)
        options: dict[str, object] = {"interval": 3, "keeps": [100]} | how
        self.topology = Exploring(self.parameters, drawn, self.optimizer, **options)  # type: ignore[arg-type]

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        self.optimizer.step()
        self.topology.after_step()

    def steps_that_replace(self, n: int) -> list[int]:
        found = []
        for step in range(1, n + 1):
            before = self.topology.masks["a"].clone()
            self.step()
            if not torch.equal(self.topology.masks["a"], before):
                found.append(step)
        return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_smallest_go_and_those_with_the_largest_gradient_come(optimizer: str) -> None:
    play = Play(optimizer, rate=0.5)
    weight = play.parameters["a"]
    assert int((weight != 0).sum()) == 24  # 0.4 of 60, from the start
    for _ in range(2):
        play.step()
    before = play.topology.masks["a"].clone()
    for parameter in play.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=play.generator)
    play.optimizer.step()
    moved = weight.detach() * before  # what is compared
    state = {k: v.clone() for k, v in play.optimizer.state[weight].items()}
    play.topology.after_step()
    after = play.topology.masks["a"]

    assert int(after.sum()) == 24
    active = moved[before].abs().sort().values
    stay = before & (moved.abs() > active[11])  # 12 of 24 go
    assert int(stay.sum()) == 12
    assert (after & stay).sum() == 12
    assert weight.grad is not None
    slopes = weight.grad.abs().masked_fill(stay, -1).flatten()
    best = torch.zeros(60, dtype=torch.bool)
    best[slopes.topk(12).indices] = True
    fresh = after & ~stay
    assert torch.equal(fresh, best.view(6, 10))
    assert (weight[fresh] == 0).all()
    assert torch.equal(weight[stay], moved[stay])
    assert (weight[~after] == 0).all()
    for name, value in play.optimizer.state[weight].items():
        if value.shape == weight.shape:
            assert (value[fresh] == 0).all()
            assert torch.equal(value[stay], state[name][stay])
    assert play.topology.masks["whole"].all()
    assert (play.parameters["whole"] != 0).all()
    assert (play.parameters["bias"] != 0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_counts_stay_and_what_is_left_out_is_zero(rate: float) -> None:
    play = Play(rate=rate, interval=1)
    for _ in range(20):
        play.step()
        assert int(play.topology.masks["a"].sum()) == 24
        assert (play.parameters["a"][~play.topology.masks["a"]] == 0).all()
    assert play.topology.density == {"a": 0.4}


def test_when_weights_are_replaced() -> None:
    """Every third step but in the last three before a network is kept; one escape after it."""
    assert Play(keeps=[12]).steps_that_replace(12) == [3, 6, 9]
    assert Play(keeps=[14]).steps_that_replace(14) == [3, 6, 9]
    assert Play(keeps=[10, 20], escape=0.8).steps_that_replace(20) == [3, 6, 11, 12, 15]


def test_an_escape_replaces_its_own_fraction() -> None:
    play = Play(keeps=[1, 20], interval=10, escape=0.75, rate=0.25)
    play.step()
    weights = play.parameters["a"]
    play.step()
    assert int((weights[play.topology.masks["a"]] == 0).sum()) == 18  # of 24


def test_masks_survive_a_checkpoint() -> None:
    """A new process with the weights, the optimizer and `state` goes on in the same way."""
    first, second = Play(interval=2), Play(interval=2)
    for _ in range(5):
        first.step()
    state = {name: tensor.clone() for name, tensor in first.topology.state().items()}
    with torch.no_grad():
        for name, parameter in second.parameters.items():
            parameter.copy_(first.parameters[name])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.topology.restore(state)
    second.generator.set_state(first.generator.get_state())
    assert equal(second.topology.masks, first.topology.masks)
    for _ in range(5):
        first.step()
        second.step()
        assert equal(second.topology.masks, first.topology.masks)
        assert all(torch.equal(second.parameters[n], p) for n, p in first.parameters.items())


# --- methods ------------------------------------------------------------------------------------


def ones(network: nn.Module, kept: Mapping[str, float]) -> dict[str, float]:
    parameters = dict(network.named_parameters())
    return {name: float((parameters[name] != 0).double().mean()) for name in kept}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", [DST(members=2), EDST(members=2)])
def test_every_network_is_as_dense_as_it_says(network: str, method: DST) -> None:
    bench = MemoryBench(network, budget=4)
    result = trained(method, bench)
    assert bench.images == 4 * 48
    assert len(result.networks) == len(result.kept) == 2
    for one, kept in zip(result.networks, result.kept, strict=True):
        shapes = masks.maskable(one, classifier=True)
        wanted = {n: d for n, d in erk(shapes, 0.2).items() if d < 1}
        assert kept.keys() == wanted.keys()
        for name, value in ones(one, kept).items():
            size = shapes[name].numel()
            assert value <= kept[name] == round(wanted[name] * size) / size
            assert value >= 0.4 * kept[name]  # new ones without a gradient are still zero
    assert all(stage.density == result.kept[0] for stage in bench.stages)
    logits = answers(method, result, bench)
    assert logits.shape == (2, 48, 4)
    assert not torch.equal(logits[0], logits[1])
    again = loaded(method, result.networks[1], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[1].eval()(x))


@pytest.mark.parametrize("method", [DST(members=2), EDST(members=2)])
def test_interrupted_between_stages_it_is_the_same(method: DST) -> None:
    whole = MemoryBench("lenet_s", budget=5)
    wanted = trained(method, whole)
    for done in range(1, len(whole.stages)):
        result = trained(method, MemoryBench("lenet_s", budget=5, saved=whole.saved[:done]))
        for one, other in zip(result.networks, wanted.networks, strict=True):
            assert equal(one.state_dict(), other.state_dict())
        assert result.kept == wanted.kept


def differ(a: nn.Module, b: nn.Module) -> float:
    """Fraction of weights that only one of two sparse networks has."""
    found = [
        ((p != 0) != (q != 0)).float().mean()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
        if p.dim() > 1
    ]
    return float(torch.stack(found).mean())


def test_tickets_of_one_training_have_masks_of_their_own() -> None:
    first, second = trained(EDST(members=2), MemoryBench("lenet_s", budget=6)).networks
    assert differ(first, second) > 0.05


def test_phases_and_rates_of_one_training() -> None:
    """150 + 3 x 100 of 450; a tenth of it and all of the rates."""
    assert EDST().phases(45) == (15, [10, 10, 10])
    assert EDST(members=7).phases(85) == (15, [10] * 7)
    assert EDST().phases(4) == (1, [1, 1, 1])
    with pytest.raises(ValueError, match="members: 3 need 4 epochs or more, the budget is 3"):
        EDST().epochs(3)
    bench = MemoryBench("mlp", budget=9, lr=0.1, schedule="decay")
    trained(EDST(), bench)
    rates = [stage.rates for stage in bench.stages]
    torch.testing.assert_close(rates[0], [0.1] * 3)
    for one in rates[1:]:
        torch.testing.assert_close(one, [0.01, 0.001])
    constant = MemoryBench("mlp", budget=4, optimizer="adam", schedule="constant", lr=0.001)
    trained(EDST(), constant)
    assert [stage.rates for stage in constant.stages] == [[0.001]] * 4


def test_rates_of_independent_trainings() -> None:
    bench = MemoryBench("mlp", budget=8, lr=0.1, schedule="decay")
    trained(DST(members=2), bench)
    for stage in bench.stages:
        torch.testing.assert_close(stage.rates, [0.1, 0.1, 0.01, 0.001])
        assert not stage.training.nesterov


def test_short_trainings_update_ten_times() -> None:
    """3 steps an epoch: each of them for 4 epochs; 1,000 as published where there are 10,000."""

    def interval(method: DST, budget: int) -> int:
        bench = MemoryBench("mlp", budget=budget)
        model = bench.build(0)
        optimizer = torch.optim.SGD(model.parameters())
        made = method._explore(bench, model, optimizer, 0, [budget])
        return made._interval

    assert interval(DST(), 4) == 1
    assert interval(DST(), 100) == 30
    assert interval(DST(), 5000) == 1000
    assert interval(DST(interval=7), 100) == 7


def test_a_layer_is_never_empty() -> None:
    shapes = {"a": torch.Size([100, 100]), "b": torch.Size([2, 2])}
    drawn = draw(shapes, {"a": 1e-9, "b": 1e-9}, 0)
    assert all(int(mask.sum()) == 1 for mask in drawn.values())
