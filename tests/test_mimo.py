"""MIMO: heads of their own, trained on different images, at about the cost of one network."""

from __future__ import annotations

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from torch import Tensor, nn

from ray_subnets.baselines.mimo import MIMO, Heads
from ray_subnets.data import Batch
from ray_subnets.flops import forward_cost


def heads(bench: MemoryBench, method: MIMO) -> Heads:
    model = method.network(bench.build, 5)
    assert isinstance(model, Heads)
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_heads_disagree_and_are_loaded_again(network: str) -> None:
    method, bench = MIMO(), MemoryBench(network)
    result = trained(method, bench)
    logits = answers(method, result, bench)
    assert logits.shape == (3, 48, 4)
    assert bench.images == 2 * 48
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((logits[a].softmax(-1) - logits[b].softmax(-1)).abs().mean()) > 0.001
    again = loaded(method, result.networks[0], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[0].eval()(x))


def test_every_head_learns_its_own_input() -> None:
    """Given three different images at once, each head answers for its own."""
    method, bench = MIMO(members=2), MemoryBench("resnet18", budget=40)
    (model,) = trained(method, bench).networks
    assert isinstance(model, Heads)
    split = bench.data.test
    other = split.labels.roll(1)
    model.eval()
    with torch.no_grad():
        own = model.separate([split.images, split.images.roll(1, 0)]).argmax(-1)
        same = model(split.images).argmax(-1)
    assert float((own[0] == split.labels).float().mean()) > 0.6  # chance is 1 in 4
    assert float((own[1] == other).float().mean()) > 0.6
    assert float((own[0] == other).float().mean()) < 0.3
    assert float((same == split.labels).float().mean(1).min()) > 0.8


@pytest.mark.parametrize("network", NETWORKS)
def test_only_the_first_and_the_last_layer_cost_more(network: str) -> None:
    bench = MemoryBench(network)
    shape, plain = bench.data.input_shape, bench.build(5)
    model = heads(bench, MIMO())
    layers = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    before, after = forward_cost(plain, shape), forward_cost(model, shape)
    ends = sum(before.by_weight[f"{name}.weight"] for name in (layers[0], layers[-1]))
    assert after.total == before.total + 2 * ends
    sizes = {name: p.numel() for name, p in plain.named_parameters()}
    first, last = sizes[f"{layers[0]}.weight"], sizes[f"{layers[-1]}.weight"]
    grown = 2 * (first + last + sizes.get(f"{layers[-1]}.bias", 0))
    assert after.parameters == before.parameters + grown
    assert getattr(model, "passes", 1) == 1


def test_parameters_by_hand() -> None:
    """LeNet-S on 3x16x16 images and 4 classes, with 2 members."""
    model = heads(MemoryBench("lenet_s"), MIMO(members=2))
    shapes = {name: tuple(p.shape) for name, p in model.network.named_parameters()}
    assert shapes["conv1.weight"] == (16, 6, 5, 5)
    assert shapes["conv1.bias"] == (16,)
    assert shapes["conv2.weight"] == (32, 16, 5, 5)
    assert shapes["classifier.weight"] == (8, 128)
    assert shapes["classifier.bias"] == (8,)


def test_initial_weights_are_those_of_a_layer_so_wide() -> None:
    """torch draws linear weights uniformly within 1 / sqrt(inputs)."""
    model = heads(MemoryBench("mlp"), MIMO())
    first = model.network.get_parameter("1.weight")
    assert first.shape == (16, 3 * 768)
    bound = (3 * 768) ** -0.5
    assert 0.99 * bound < float(first.detach().abs().max()) <= bound
    parts = first.detach().split(768, 1)
    assert not torch.equal(parts[0], parts[1])


def test_each_head_has_a_permutation_of_its_own() -> None:
    torch.manual_seed(0)
    seen = MIMO().inputs(50)
    assert seen.shape == (3, 50)
    for head in seen:
        assert head.sort().values.tolist() == list(range(50))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (seen[a] == seen[b]).sum() < 10
    repeated = MIMO(batch_repetition=4).inputs(50)
    assert repeated.shape == (3, 200)
    assert (repeated[1].bincount() == 4).all()


@pytest.mark.parametrize(("probability", "same"), [(1.0, 50), (0.6, 30)])
def test_input_repetition_shows_all_heads_the_same_image(probability: float, same: int) -> None:
    torch.manual_seed(0)
    seen = MIMO(input_repetition=probability).inputs(50)
    alike = (seen == seen[0]).all(0)
    assert same <= int(alike.sum()) <= same + 2
    assert (seen.sort(1).values == torch.arange(50)).all()


@pytest.mark.parametrize("times", [1, 4])
def test_the_loss_sums_over_heads_of_different_images(times: int) -> None:
    """By hand, with the same draws."""
    method, bench = MIMO(batch_repetition=times), MemoryBench("mlp")
    model = heads(bench, method)
    x, y = bench.data.train.images[:8], bench.data.train.labels[:8]
    torch.manual_seed(1)
    loss = method.objective(bench.training)(model, Batch(x, y, 8))
    torch.manual_seed(1)
    seen = method.inputs(8)
    wanted = torch.zeros(())
    for row in range(8 * times):
        images: list[Tensor] = [x[seen[head, row]] for head in range(3)]
        logits = model.network(torch.cat(images, 0)[None])[0]
        for head in range(3):
            own = logits[4 * head : 4 * head + 4]
            wanted = wanted + nn.functional.cross_entropy(own, y[seen[head, row]])
    torch.testing.assert_close(loss, wanted / times)


def test_repeated_batches_take_as_many_epochs() -> None:
    method, bench = MIMO(batch_repetition=4), MemoryBench("mlp", budget=9)
    trained(method, bench)
    assert bench.images == 2 * 48 == method.epochs(9) * 48
    with pytest.raises(ValueError, match=r"batch_repetition: 4 passes .* budget is 3"):
        method.epochs(3)


class Late(nn.Module):
    """The layer that is registered first is not the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.stem = nn.Linear(768, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.flatten(1)))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), "two layers or more"),
        (lambda seed: Late(), "does not run as several members .* fit"),
        (
            lambda seed: nn.Sequential(
                nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(3 * 14 * 14, 4)
            ),
            "must not have groups.* fit",
        ),
    ],
)
def test_networks_that_do_not_fit(build: object, says: str) -> None:
    bench = MemoryBench()
    bench.build = build  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=f"mimo: .*{says}") as error:
        trained(MIMO(), bench)
    assert "\n" not in str(error.value)
