"""Whole neurons and channels: the small network is the masked one, whatever connects its layers."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest
import torch
from tiny import equal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_subnets import models, sparse, structured
from ray_subnets.structured import Coupled, Kept

NETWORKS = {
    "mlp": ("mlp", (1, 8, 8), {"hidden": (16, 12)}),
    "lenet_s": ("lenet_s", (1, 20, 20), {}),  # 2x2 positions for each channel when flattened
    "resnet18": ("resnet18", (3, 8, 8), {"width": 16}),
    "resnet56": ("resnet56", (3, 8, 8), {"width": 4}),
    "wide_resnet": ("wide_resnet", (3, 8, 8), {"depth": 10, "width": 2}),
    "densenet": ("densenet121", (3, 8, 8), {"growth": 4}),
    "impala": ("impala", (3, 16, 16), {"channels": (4, 8), "hidden": 16}),
    "mobilenet": ("torchvision/mobilenet_v2", (3, 32, 32), {"width_mult": 0.25}),  # depthwise
    "regnet": ("torchvision/regnet_y_400mf", (3, 32, 32), {}),  # grouped, squeeze-and-excitation
}
every_network = pytest.mark.parametrize("network", NETWORKS)


@cache
def network_of(network: str) -> tuple[nn.Module, list[Coupled]]:
    """A network in double precision with arbitrary values everywhere, and its units."""
    name, shape, options = NETWORKS[network]
    model = models.build(name, shape, 5, options, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 1:  # biases, normalisation, running statistics
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 2)
                tensor += 0.7 if key.endswith(("weight", "var")) else 0
    for module in model.modules():  # it draws other numbers for other shapes
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double(), structured.coupled_units(model, shape)


def data(network: str, n: int = 6) -> Tensor:
    shape = NETWORKS[network][1]
    return torch.randn(n, *shape, generator=generator(2), dtype=torch.float64)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(model: nn.Module, units: list[Coupled], kept: Kept) -> nn.Module:
    result = copy.deepcopy(model)
    masks = structured.unit_masks(model, units, kept)
    result.load_state_dict(sparse.prune(model.state_dict(), masks))
    return result


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(a.abs().max())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every_network
def test_the_small_network_is_the_masked_one(network: str) -> None:
    model, units = network_of(network)
    before = copy.deepcopy(model.state_dict())
    kept = structured.draw_units(units, 0.5, generator())
    large, small = masked(model, units, kept), structured.remove(model, units, kept)
    x = data(network)
    with torch.no_grad():
        singles = [copy.deepcopy(one).float().eval()(x.float()) for one in (large, small)]
        assert close(*singles, 1e-5)
        assert not close(model.eval()(x), small.eval()(x), 1e-3)
        for training in (False, True):
            assert close(large.train(training)(x), small.train(training)(x), 1e-9)
    assert parameters(small) / parameters(model) < 0.5
    assert equal(model.state_dict(), before)
    taken = structured.take(large.state_dict(), units, kept)  # running statistics have moved
    assert taken.keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(taken[name], tensor, rtol=1e-9, atol=1e-9)
    structured.remove(model, units, kept).load_state_dict(taken)  # strict


@every_network
def test_training_the_small_network_is_training_the_masked_one(network: str) -> None:
    model, units = network_of(network)
    kept = structured.draw_units(units, 0.5, generator())
    masks = structured.unit_masks(model, units, kept)
    large = masked(model, units, kept).train()
    small = structured.remove(model, units, kept).train()
    labels = torch.arange(6) % 5
    for one in (large, small):
        weights = dict(one.named_parameters())
        optimizer = torch.optim.SGD(one.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(one(data(network)), labels).backward()
            optimizer.step()
            if one is large:
                sparse.hold_zero_([weights[name] for name in masks], [*masks.values()])
    taken = structured.take(large.state_dict(), units, kept)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(taken[name], tensor, rtol=1e-7, atol=1e-8)
    assert not equal(taken, structured.take(model.state_dict(), units, kept))


@every_network
def test_units(network: str) -> None:
    """Each set is named after its first producer and covers whole tensors' positions."""
    model, units = network_of(network)
    again = structured.coupled_units(model, NETWORKS[network][1])
    assert [one.name for one in again] == [one.name for one in units]
    order = list(dict(model.named_parameters()))
    assert [one.name for one in units] == sorted((one.name for one in units), key=order.index)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for one, other in zip(units, again, strict=True):
        assert one.name in one.rows
        assert one.count >= 2
        assert one.columns
        assert equal(dict(one.rows), dict(other.rows))
        assert equal(dict(one.columns), dict(other.columns))
        for dim, owners in ((0, one.rows), (1, one.columns)):
            for name, owner in owners.items():
                assert owner.shape == (shapes[name][dim],)
                assert set(owner.tolist()) - {-1} <= set(range(one.count))
        assert set(one.rows[one.name].tolist()) - {-1} == set(range(one.count))
        assert not any(name.startswith("classifier.") for name in one.rows)


def test_what_is_coupled() -> None:
    """A residual stage is one set, a flattened channel takes all its positions along."""
    units = {one.name: one for one in network_of("resnet18")[1]}
    assert list(units["conv.weight"].rows) == [
        *["conv.weight", "bn.weight", "bn.bias"],
        *["blocks.0.conv2.weight", "blocks.0.bn2.weight", "blocks.0.bn2.bias"],
        *["blocks.1.conv2.weight", "blocks.1.bn2.weight", "blocks.1.bn2.bias"],
        *["bn.running_mean", "bn.running_var"],
        *["blocks.0.bn2.running_mean", "blocks.0.bn2.running_var"],
        *["blocks.1.bn2.running_mean", "blocks.1.bn2.running_var"],
    ]
    assert list(units["conv.weight"].columns) == [
        *["blocks.0.conv1.weight", "blocks.1.conv1.weight"],
        *["blocks.2.conv1.weight", "blocks.2.shortcut.0.weight"],
    ]
    assert len(units) == 4 + 8  # four streams, eight inner layers
    conv, fc = network_of("lenet_s")[1][1:3]
    assert torch.equal(conv.columns["fc1.weight"], torch.arange(32).repeat_interleave(4))
    assert (conv.kinds, fc.kinds) == (frozenset({"channel"}), frozenset({"neuron"}))
    grouped = {one.name: one for one in network_of("regnet")[1]}
    a, b = (f"trunk_output.block1.block1-0.f.{part}.0.weight" for part in "ab")
    assert torch.equal(grouped[a].rows[b], torch.arange(6).repeat_interleave(8))  # whole groups
    assert grouped[a].count == 6


def test_the_matrix_of_eq_3_5() -> None:
    """Neurons 2 and 4 of a 4x4 layer left out: rows of zeros, then no rows."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    (one,) = structured.coupled_units(model, (4,))
    assert (one.name, one.count, one.kinds) == ("0.weight", 4, frozenset({"neuron"}))
    kept = {"0.weight": torch.tensor([1, 0, 1, 0]).bool()}
    masks = structured.unit_masks({"0.weight": torch.Size([4, 4])}, [one], kept)
    expected = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert torch.equal(masks["0.weight"], torch.tensor(expected).bool())
    small = structured.remove(model, [one], kept)
    assert torch.equal(small.get_parameter("0.weight"), model.get_parameter("0.weight")[[0, 2]])
    assert torch.equal(small.get_parameter("0.bias"), model.get_parameter("0.bias")[[0, 2]])
    assert torch.equal(small.get_parameter("2.weight"), model.get_parameter("2.weight")[:, [0, 2]])
    assert structured.scores(
        {"0.weight": torch.arange(16.0).view(4, 4) - 8, "0.bias": torch.ones(4)}, [one]
    )["0.weight"].tolist() == [6.5, 2.5, 1.5, 5.5]


def sets(*counts: int) -> list[Coupled]:
    kinds = (frozenset({"channel"}), frozenset({"neuron"}))
    return [Coupled(f"{i}.weight", n, kinds[i % 2], {}, {}) for i, n in enumerate(counts)]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_draws(scope: str, draw: str, density: float) -> None:
    units = sets(100, 7, 30, 2)
    kept, again = (
        structured.draw_units(units, density, generator(), scope=scope, draw=draw) for _ in range(2)
    )
    assert equal(kept, again)
    counts = [int(kept[one.name].sum()) for one in units]
    assert min(counts) >= 1
    if draw == "bernoulli":
        assert abs(sum(counts) - 139 * density) <= 3 * (139 * density * (1 - density)) ** 0.5 + 4
    elif scope == "local":
        assert counts == [max(1, round(density * one.count)) for one in units]
    else:
        assert sum(counts) == max(4, round(density * 139))
    if 0 < density < 1:
        other = structured.draw_units(units, density, generator(4), scope=scope, draw=draw)
        assert not equal(kept, other)


def test_magnitude_keeps_the_largest() -> None:
    units = sets(4, 3)
    values = {"0.weight": torch.tensor([3.0, 9, 8, 3]), "1.weight": torch.tensor([1.0, 2, 2])}

    def kept(density: float, scope: str) -> list[list[int]]:
        answer = structured.draw_units(
            units, density, generator(), scope=scope, criterion="magnitude", scores=values
        )
        return [stays.int().tolist() for stays in answer.values()]

    assert kept(0.75, "local") == [[1, 1, 1, 0], [0, 1, 1]]  # the first of equals
    assert kept(3 / 7, "global") == [[0, 1, 1, 0], [0, 1, 0]]  # one of each set stays
    assert kept(5 / 7, "global") == [[1, 1, 1, 1], [0, 1, 0]]


def test_only_the_kinds_asked_for() -> None:
    units = [*sets(10, 10), Coupled("2.weight", 10, structured.KINDS, {}, {})]
    channel = frozenset({"channel"})
    kept = structured.draw_units(units, 0.3, generator(), kinds=channel)
    assert [int(stays.sum()) for stays in kept.values()] == [3, 10, 10]
    other = structured.complement_units(kept, units, kinds=channel)
    assert [int(stays.sum()) for stays in other.values()] == [7, 10, 10]
    assert torch.equal(other["0.weight"], ~kept["0.weight"])
    for part in structured.split_units(units, 2, generator(), kinds=channel):
        assert [int(stays.sum()) for stays in part.values()] == [5, 10, 10]
    with pytest.raises(ValueError, match=r"no unit of 1\.weight"):
        structured.complement_units(kept)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_partition_has_each_unit_once(parts: int) -> None:
    units = sets(100, 7, 30)
    split = structured.split_units(units, parts, generator())
    for one in units:
        assert (torch.stack([kept[one.name].int() for kept in split]).sum(0) == 1).all()
        sizes = [int(kept[one.name].sum()) for kept in split]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
    assert equal(split[0], structured.split_units(units, parts, generator())[0])
    with pytest.raises(ValueError, match=r"1\.weight has 7 units, too few for 8 parts"):
        structured.split_units(units, 8, generator())


def test_memory_format_is_kept_where_it_is_safe() -> None:
    for network in ("lenet_s", "mobilenet", "densenet"):
        model, units = network_of(network)
        small = structured.remove(model, units, structured.draw_units(units, 0.5, generator()))
        for name, weight in small.named_parameters():
            if weight.dim() == 4 and min(weight.shape[1:3]) > 1:
                assert weight.is_contiguous(memory_format=torch.channels_last), name
    model, units = network_of("resnet18")  # strided 1x1 convolutions, 16 inputs
    assert model.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)
    small = structured.remove(model, units, structured.draw_units(units, 0.5, generator()))
    assert not structured.channels_last_is_safe(small)
    assert all(parameter.is_contiguous() for parameter in small.parameters())
    assert small.get_parameter("blocks.2.shortcut.0.weight").stride() == (8, 1, 1, 1)


@every_network
def test_a_layer_without_weights(network: str) -> None:
    """A third of the layers at once, in both modes."""
    model, units = network_of(network)
    weights = model.state_dict()
    names = [name for one in units for name in one.rows if weights[name].dim() > 1][::3]
    large = copy.deepcopy(model)
    for name in names:
        large.get_parameter(name).data.zero_()
    small = structured.remove_layers(model, names)
    assert not set(names) & set(small.state_dict())
    assert set(small.state_dict()) == set(weights) - set(names)
    for training in (False, True):
        large.train(training)
        small.train(training)
        with torch.no_grad():
            assert close(large(data(network)), small(data(network)), 1e-9)
    assert model.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_has_the_shape_of_its_layer(bias: bool) -> None:
    layers: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Linear(4, 3, bias=bias), (2, 5, 4)),
        (nn.Conv1d(4, 6, 3, 2, 1, bias=bias), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 3), 2, bias=bias), (2, 4, 11, 9)),
        (nn.Conv2d(4, 6, (4, 3), padding="same", bias=bias), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, padding="valid", bias=bias), (4, 7, 8)),
        (nn.Conv3d(4, 2, 2, bias=bias), (2, 4, 3, 4, 5)),
    ]
    for layer, shape in layers:
        layer.weight.data.zero_()  # type: ignore[operator, union-attr]
        x = torch.randn(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about padding an even kernel
            wanted = layer(x)
        assert torch.equal(structured.Constant(layer)(x), wanted)
    with pytest.raises(ValueError, match=r"^0\.bias: is not the weight"):
        structured.remove_layers(nn.Sequential(nn.Linear(2, 2)), ["0.bias"])


class Halves(nn.Module):
    """Cuts its channels into two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu().chunk(2, 1)
        return self.last(a - b)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)), (4,)),  # f(0) = 0.5
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (4,)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)), (1, 8, 8)),
        (nn.Linear(4, 3), (4,)),  # nothing but the output
        (nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)), (4,)),  # one must stay
        (Halves(), (4,)),
        (Tied(), (4,)),
        (models.build("torchvision/shufflenet_v2_x0_5", (3, 32, 32), 5, {}, 0), (3, 32, 32)),
    ],
    ids=["sigmoid", "layernorm", "groupnorm", "one", "narrow", "halves", "tied", "shufflenet"],
)
def test_what_does_not_fall_into_units_is_told(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^structure: .*; use structure: weight$") as caught:
        structured.coupled_units(model, shape)
    assert "\n" not in str(caught.value)


class Backwards(nn.Module):
    """Registers its output layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.hidden = nn.Linear(6, 3), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu())


def test_the_last_layer_stays_whole() -> None:
    """Where it is not the output: as `masks.maskable` has it, unless the classifier is included."""
    with pytest.raises(ValueError, match="nothing is removable"):
        structured.coupled_units(Backwards(), (4,))
    (one,) = structured.coupled_units(Backwards(), (4,), classifier=True)
    assert (one.name, one.count) == ("hidden.weight", 6)
