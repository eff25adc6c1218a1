"""BatchEnsemble: members of their own, at rank one; how they are trained and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from torch import nn

from ray_subnets.baselines.batch_ensemble import BatchEnsemble, Shared
from ray_subnets.data import Batch
from ray_subnets.flops import forward_cost
from ray_subnets.recipes import Training
from ray_subnets.supervised import make_optimizer


def shared(model: nn.Module) -> list[tuple[str, Shared]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Shared)]


@pytest.mark.parametrize("network", NETWORKS)
def test_members_disagree(network: str) -> None:
    method, bench = BatchEnsemble(members=3), MemoryBench(network)
    result = trained(method, bench)
    logits = answers(method, result, bench)
    assert logits.shape == (3, 48, 4)
    assert bench.images == 2 * 48
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((logits[a].softmax(-1) - logits[b].softmax(-1)).abs().mean()) > 0.001
    again = loaded(method, result.networks[0], bench)
    result.networks[0].eval()
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[0](x))


def test_every_member_learns() -> None:
    method, bench = BatchEnsemble(members=3), MemoryBench("lenet_s", budget=20)
    logits = answers(method, trained(method, bench), bench)
    assert (logits.argmax(-1) == bench.data.test.labels).float().mean(1).min() > 0.9


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_a_member_is_a_plain_network_with_rank_one_factors(network: str) -> None:
    method, bench = BatchEnsemble(members=3), MemoryBench(network)
    model = method.network(bench.build, 5).eval()
    for _, layer in shared(model):
        if layer.bias is not None:
            layer.bias.add_(0.1 * torch.randn_like(layer.bias))
    x = bench.data.test.images[:6]
    logits = model(x)
    for member in range(3):
        plain = bench.build(5).eval()
        for name, layer in shared(model):
            own = plain.get_submodule(name.removeprefix("network."))
            factor = torch.outer(layer.gamma[member], layer.alpha[member])
            weight = layer.layer.get_parameter("weight")
            own.weight.copy_(weight * factor.view(*factor.shape, *[1] * (weight.dim() - 2)))
            if layer.bias is not None:
                own.bias.copy_(layer.bias[member])
        torch.testing.assert_close(logits[member], plain(x), rtol=1e-5, atol=1e-5)


def test_every_layer_has_vectors_and_only_those_are_new() -> None:
    """By hand: LeNet-S on 3x16x16 images, 4 classes; 3 members."""
    model = BatchEnsemble(members=3).network(MemoryBench("lenet_s").build, 0)
    sizes = [(3, 16, 75), (16, 32, 400), (32, 256, 32), (256, 128, 256), (128, 4, 128)]
    kernels = sum(outputs * fan for _, outputs, fan in sizes)
    vectors = sum(inputs + 2 * outputs for inputs, outputs, _ in sizes)  # alpha, gamma, bias
    assert sum(p.numel() for p in model.parameters()) == kernels + 3 * vectors
    assert len(shared(model)) == 5
    assert (
        len(shared(BatchEnsemble().network(MemoryBench("wide_resnet").build, 0))) == 10
    )  # with shortcuts


def vectors(method: BatchEnsemble, seed: int) -> torch.Tensor:
    layers = shared(method.network(MemoryBench("lenet_s").build, seed))
    return torch.cat([t.detach().flatten() for _, one in layers for t in (one.alpha, one.gamma)])


def test_initial_vectors() -> None:
    drawn = vectors(BatchEnsemble(), 0)
    assert abs(float(drawn.mean()) - 1) < 0.05
    assert abs(float(drawn.std()) - 0.5) < 0.05
    assert not torch.equal(drawn, vectors(BatchEnsemble(), 1))
    assert vectors(BatchEnsemble(signs=True), 0).unique().tolist() == [-1, 1]


def gradients(method: BatchEnsemble, model: nn.Module) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    for _, layer in shared(model):
        layer.rate = method.fast_rate
    data = MemoryBench().data.train
    batch = Batch(data.images, data.labels, len(data))
    method.objective(Training(epochs=1))(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_vectors_have_half_the_gradient_and_no_decay() -> None:
    method, bench = BatchEnsemble(members=2), MemoryBench("lenet_s")
    model = method.network(bench.build, 0)
    whole = gradients(BatchEnsemble(members=2, fast_rate=1.0), model)
    half = gradients(method, model)
    assert len(whole) == 5 * 4  # weight, bias, alpha, gamma
    for name, gradient in whole.items():
        fast = name.endswith(("alpha", "gamma"))
        torch.testing.assert_close(half[name], gradient * (0.5 if fast else 1.0))
        assert gradient.abs().max() > 0

    training = Training(epochs=1, lr=0.1, weight_decay=0.5, momentum=0)
    optimizer = make_optimizer(model, training, method.groups(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if name.endswith(("alpha", "gamma")) else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


def test_the_loss_is_the_mean_over_members() -> None:
    method, bench = BatchEnsemble(members=2), MemoryBench("mlp")
    model = method.network(bench.build, 0)
    x, y = bench.data.train.images[:8], bench.data.train.labels[:8]
    loss = method.objective(bench.training)(model, Batch(x, y, 8))
    each = [nn.functional.cross_entropy(logits, y, reduction="sum") for logits in model(x)]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)


def test_a_split_batch_gives_each_member_its_rows_and_costs_one_pass() -> None:
    method, bench = BatchEnsemble(members=2, tile=False), MemoryBench("mlp")
    model = method.network(bench.build, 0)
    x, y = bench.data.train.images[:7], bench.data.train.labels[:7]  # 4 rows and 3
    loss = method.objective(bench.training)(model, Batch(x, y, 7))
    logits = torch.cat([model(x[:4])[0], model(x[4:])[1]])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, y, reduction="sum"))
    result = trained(method, bench)
    assert bench.images == 2 * 48
    assert answers(method, result, bench).shape == (2, 48, 4)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_answer_costs_a_pass_for_each_member(network: str) -> None:
    method, bench = BatchEnsemble(members=3), MemoryBench(network)
    model = method.network(bench.build, 0)
    shape = bench.data.input_shape
    assert forward_cost(model, shape).total == 3 * forward_cost(bench.build(0), shape).total
    assert model.passes == 3


def test_the_rate_warms_up_for_an_epoch_and_falls_in_steps() -> None:
    bench = MemoryBench("mlp", budget=10, lr=0.1, schedule="decay")
    trained(BatchEnsemble(members=2), bench)
    rates = bench.stages[0].rates  # of the last step of each epoch
    torch.testing.assert_close(
        rates, [0.1, 0.1, 0.1, 0.1, 0.02, 0.02, 0.02, 0.02, 0.004, 0.0008], rtol=1e-6, atol=0
    )
    constant = MemoryBench("mlp", optimizer="adam", schedule="constant", lr=0.001)
    trained(BatchEnsemble(members=2), constant)
    assert constant.stages[0].rates == [0.001, 0.001]


class Attention(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(1)
        return self.head(self.attention(x, x, x)[0].mean(1))


class Mixing(nn.Module):
    """Images see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)) - self.head(x.flatten(1)).mean(0)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda seed: Attention((3, 16, 16), 4), "attention"),
        (lambda seed: Mixing(), "images see each other"),
    ],
)
def test_networks_that_do_not_fit(build: object, says: str) -> None:
    bench = MemoryBench()
    bench.build = build  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=f"batch_ensemble.*{says}.*fit") as error:
        trained(BatchEnsemble(), bench)
    assert "\n" not in str(error.value)
