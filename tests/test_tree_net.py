"""TreeNet: one trunk, branches of their own, wherever a network can be cut."""

from __future__ import annotations

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained
from torch import Tensor, nn
from torch.nn.functional import dropout

from ray_subnets import models
from ray_subnets.baselines.tree_net import Tree, TreeNet
from ray_subnets.data import Batch
from ray_subnets.flops import forward_cost


def tree(network: str, method: TreeNet | None = None) -> Tree:
    model = (method or TreeNet()).network(MemoryBench(network).build, 5)
    assert isinstance(model, Tree)
    return model


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("network", NETWORKS)
def test_branches_disagree_and_are_loaded_again(network: str) -> None:
    method, bench = TreeNet(), MemoryBench(network)
    result = trained(method, bench)
    logits = answers(method, result, bench)
    assert logits.shape == (3, 48, 4)
    assert bench.images == 2 * 48
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((logits[a].softmax(-1) - logits[b].softmax(-1)).abs().mean()) > 0.001
    again = loaded(method, result.networks[0], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[0].eval()(x))


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_a_member_is_the_users_network_with_the_trunks_weights(network: str) -> None:
    bench, model = MemoryBench(network), tree(network).eval()
    plain = bench.build(5)
    assert names(model.trunk) | names(model.branches[0]) == names(plain)
    assert not names(model.trunk) & names(model.branches[0])
    x = bench.data.test.images[:4]
    logits = model(x)
    for member, branch in enumerate(model.branches):
        plain.load_state_dict(model.trunk.state_dict() | branch.state_dict())
        torch.testing.assert_close(logits[member], plain.eval()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[0], bench.build(5).eval()(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_only_branches_are_copied(network: str) -> None:
    """The trunk is there once, and every branch trains it."""
    bench, model = MemoryBench(network), tree(network)
    shape = bench.data.input_shape
    whole, got = forward_cost(bench.build(5), shape), forward_cost(model, shape)
    branch = sum(p.numel() for p in model.branches[0].parameters())
    trunk = sum(p.numel() for p in model.trunk.parameters())
    assert 0 < trunk < whole.parameters == trunk + branch
    assert got.parameters == trunk + 3 * branch
    in_trunk = sum(whole.by_weight.get(name, 0) for name in names(model.trunk))
    assert got.total == in_trunk + 3 * (whole.total - in_trunk)
    for m in range(3):
        model.zero_grad()
        model(bench.data.train.images[:8])[m].sum().backward()
        assert all(p.grad is not None for p in model.trunk.parameters())
        for other, one in enumerate(model.branches):
            grads = [p.grad for p in one.parameters()]
            assert any(g is not None and bool(g.any()) for g in grads) == (m == other)


def test_branches_start_from_weights_of_their_own() -> None:
    first, second, _ = (dict(branch.named_parameters()) for branch in tree("lenet_s").branches)
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])


@pytest.mark.parametrize(
    ("network", "split", "trunk"),
    [
        ("mlp", None, {"1"}),
        ("mlp", 0.7, {"1", "3"}),
        ("mlp", "3", {"1", "3"}),
        ("lenet_s", None, {"conv1", "conv2"}),
        ("lenet_s", "fc1", {"conv1", "conv2", "fc1"}),
        ("wide_resnet", "blocks.0", {"stem", "blocks.0"}),
        ("wide_resnet", None, {"stem", "blocks.0", "blocks.1", "blocks.2"}),
        ("user", "stem", {"stem"}),
    ],
)
def test_where_it_branches(network: str, split: float | str | None, trunk: set[str]) -> None:
    model = tree(network, TreeNet(split=split))
    found = {name for name in names(model.trunk)}
    assert all(any(name.startswith(f"{one}.") for one in trunk) for name in found)
    assert all(any(name.startswith(f"{one}.") for name in found) for one in trunk)


@pytest.mark.parametrize(("stride", "share"), [("first", 1.540), ("second", 1.476)])
def test_the_published_cost(stride: str, share: float) -> None:
    """WRN-28-10 on CIFAR, split after the first block of group 3; Table 5.2 has 1.52 networks."""

    def build(seed: int) -> nn.Module:
        with torch.device("meta"):
            return models.WideResNet((3, 32, 32), 10, stride_in=stride)

    model = TreeNet().network(build, 0)
    assert isinstance(model, Tree)
    blocks = {name.split(".")[1] for name in names(model.trunk) if name.startswith("blocks")}
    assert blocks == set(map(str, range(9)))
    with torch.device("meta"):
        costs = [forward_cost(one, (3, 32, 32)).total for one in (model, build(0))]
    assert abs(costs[0] / costs[1] - share) < 0.001


def test_the_loss_is_the_sum_over_branches() -> None:
    method, bench = TreeNet(members=2), MemoryBench("mlp")
    model = method.network(bench.build, 0)
    x, y = bench.data.train.images[:8], bench.data.train.labels[:8]
    loss = method.objective(bench.training)(model, Batch(x, y, 8))
    each = [nn.functional.cross_entropy(logits, y, reduction="sum") for logits in model(x)]
    torch.testing.assert_close(loss, each[0] + each[1])


class Forking(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(768, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.how == "looks" and x.sum() > 0:
            return self.b(self.a(x))
        if self.how == "drops":
            x = dropout(x, 0.5, self.training)
        if self.how == "skips":
            return self.b(self.a(x)) + x[:, :4]
        y = self.a(x)
        return self.b(y.relu_() if self.how == "in place" else y)


@pytest.mark.parametrize(
    ("how", "split", "says"),
    [
        ("looks", None, "tree_net: cannot trace this network .* fit"),
        ("drops", None, "tree_net: this network calls the function dropout; use its layer"),
        ("skips", None, "tree_net: this network has no place to branch; .* fit"),
        ("plain", "c", "split: 'c' is not a module"),
        ("plain", "b", "split: what follows 'b' .* possible: a"),
        ("in place", "a", "split: what follows changes its input in place"),
    ],
)
def test_networks_that_do_not_fit(how: str, split: str | None, says: str) -> None:
    bench = MemoryBench()
    bench.build = lambda seed: Forking(how)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=says) as error:
        trained(TreeNet(split=split), bench)
    assert "\n" not in str(error.value)
