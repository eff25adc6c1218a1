"""What every method of the benchmark keeps to, and the simple ones in detail."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from bench import NETWORKS, MemoryBench, Skip, answers, loaded, trained
from test_errors import must_say
from torch import nn

from ray_subnets import baselines, schedules
from ray_subnets.baselines.dropout import Dropout, MCDropout
from ray_subnets.baselines.independent import Bagging, Dense, Independent
from ray_subnets.baselines.method import shares
from ray_subnets.baselines.trajectory import SWA, FastGeometric, Snapshot
from ray_subnets.recipes import derive

BUDGET = 6
SMALL: dict[str, dict[str, Any]] = {
    "dense": {"members": 2},
    "bagging": {"members": 2},
    "snapshot": {"cycles": 2},
    "fge": {"members": 2},
    "mc_dropout": {"passes": 4},
    "prune": {"members": 2},
    "mother_nets": {"members": 2},
    "edst": {"members": 2},
}
CHAINS = {"mother_nets"}
"""methods that only fit plain chains of layers"""


def small(name: str) -> baselines.Method:
    return baselines.parse({"method": name, **SMALL.get(name, {})}, "test")


@pytest.mark.parametrize("name", baselines.METHODS)
@pytest.mark.parametrize("network", ["mlp", "user"])
def test_laws(name: str, network: str) -> None:
    """Within the budget; the same again; members that answer, and are the same when loaded."""
    if name in CHAINS and network != "mlp":
        pytest.skip("told in its own test")
    method = small(name)
    assert method.title
    assert method.source
    bench = MemoryBench(network, budget=BUDGET, lr=0.02)
    result = trained(method, bench)
    assert 0 < bench.images <= BUDGET * len(bench.data.train)
    assert sum(stage.training.epochs for stage in bench.stages) <= method.epochs(BUDGET) <= BUDGET
    first = answers(method, result, bench)
    assert first.shape[1:] == (len(bench.data.test), bench.data.num_classes)
    assert first.isfinite().all()
    again = trained(method, MemoryBench(network, budget=BUDGET, lr=0.02))
    for a, b in zip(result.networks, again.networks, strict=True):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    copies = baselines.Trained(networks=[loaded(method, one, bench) for one in result.networks])
    assert torch.equal(answers(method, copies, bench), first)
    assert baselines.parse(asdict(method), "test") == method


@pytest.mark.parametrize("name", baselines.METHODS)
def test_interrupted_is_not(name: str) -> None:
    """Stages that were done are read, and the rest comes out the same."""
    method = small(name)
    whole = MemoryBench(budget=BUDGET, lr=0.02)
    expected = trained(method, whole)
    for done in range(1, len(whole.stages) + 1):
        bench = MemoryBench(budget=BUDGET, lr=0.02, saved=whole.saved[:done])
        result = trained(method, bench)
        for a, b in zip(result.networks, expected.networks, strict=True):
            for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
                assert torch.equal(x, y), done


@pytest.mark.parametrize(("total", "parts", "found"), [(16, 8, [2] * 8), (7, 3, [2, 2, 3])])
def test_shares(total: int, parts: int, found: list[int]) -> None:
    assert shares(total, parts, "members") == found


def test_too_few_epochs() -> None:
    for method in (Dense(members=5), Snapshot(cycles=5), FastGeometric(members=3)):
        with pytest.raises(ValueError, match=r".") as caught:
            method.epochs(4)
        must_say(str(caught.value), [r"members|cycles", r"budget"])


def test_the_single_model_is_the_plain_loop() -> None:
    bench = MemoryBench(budget=2)
    trained(Independent(), bench)
    assert [stage.training for stage in bench.stages] == [bench.training]
    assert bench.images == 2 * len(bench.data.train)


def test_bagging_sees_a_part_of_the_images() -> None:
    bench = MemoryBench(budget=4)
    trained(Bagging(members=2, fraction=0.5), bench)
    assert [stage.images for stage in bench.stages] == [2 * 24, 2 * 24]


def test_members_differ() -> None:
    bench = MemoryBench(budget=4)
    for method in (
        Dense(members=2),
        Bagging(members=2),
        Snapshot(cycles=2),
        FastGeometric(members=2),
    ):
        logits = answers(method, trained(method, MemoryBench(budget=4)), bench)
        assert len(logits) == 2
        assert not torch.allclose(logits[0], logits[1], atol=1e-3), method


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "densenet"])
def test_dropout_is_after_every_hidden_layer_and_off_in_answers(network: str) -> None:
    bench = MemoryBench(network)
    model = Dropout(rate=0.5).network(bench.build, 0)
    plain = bench.build(0)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = bench.data.test.images[:16]
    model.eval(), plain.eval()
    assert torch.equal(model(x), plain(x))
    zeros = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in dict(
            model.named_parameters()
        ):
            module.register_forward_hook(
                lambda m, i, o: zeros.append(float((o == 0).double().mean()))
            )
    torch.manual_seed(0)
    model.train()(x)
    assert len(zeros) > 1
    assert all(0.3 < share < 0.7 for share in zeros[:-1])  # half of each hidden layer's outputs
    assert zeros[-1] == 0  # the classifier's are whole


def test_own_dropout_layers() -> None:
    bench = MemoryBench("wide_resnet")
    model = Dropout(rate=0.3, own=True).network(bench.build, 0)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_passes_differ_and_repeat() -> None:
    bench = MemoryBench("lenet_s", budget=1)
    method = MCDropout(rate=0.5, passes=5)
    result = trained(method, bench)
    logits = answers(method, result, bench)
    assert len(logits) == 5
    assert not torch.allclose(logits[0], logits[1])
    assert torch.equal(logits, answers(method, result, bench))
    network = result.networks[0].eval()
    x = bench.data.test.images
    assert torch.equal(network(x), network(x))  # off again


def test_snapshots_are_ends_of_cosines() -> None:
    bench = MemoryBench(budget=4, lr=0.1)
    trained(Snapshot(cycles=2), bench)
    assert [stage.training.epochs for stage in bench.stages] == [2, 2]
    steps = 2 * bench.batches(16, 0).steps
    last = schedules.cosine(steps - 1, steps, lr=0.1)
    for stage in bench.stages:
        assert stage.rates[-1] == pytest.approx(last)
    assert last < 0.01
    constant = MemoryBench(budget=4, schedule="constant", lr=0.1)
    trained(Snapshot(cycles=2), constant)
    assert {rate for stage in constant.stages for rate in stage.rates} == {0.1}


def test_snapshots_keep_the_momentum() -> None:
    """The second cycle goes on with the optimizer of the first."""
    bench = MemoryBench(budget=2, lr=0.1)
    trained(Snapshot(cycles=2), bench)
    assert any(k.startswith("optimizer.") for k in bench.saved[0])
    fresh = MemoryBench(budget=2, lr=0.1, saved=[strip(bench.saved[0])])
    other = trained(Snapshot(cycles=2), fresh)
    same = trained(Snapshot(cycles=2), MemoryBench(budget=2, lr=0.1, saved=bench.saved[:1]))
    a, b = (next(r.networks[1].parameters()) for r in (other, same))
    assert not torch.equal(a, b)


def strip(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without momentum."""
    return {
        name: torch.zeros_like(tensor) if name.startswith("optimizer.") else tensor
        for name, tensor in saved.items()
    }


def test_fast_geometric_cycles() -> None:
    """Trunk, down, (up, down) for each further member; collected where the rate is lowest."""
    bench = MemoryBench(budget=6, lr=0.1)
    result = trained(FastGeometric(members=2, cycle=2), bench)
    assert [stage.training.epochs for stage in bench.stages] == [3, 1, 1, 1]
    assert len(result.networks) == 2
    steps = bench.batches(16, 0).steps
    low = 0.1 * (0.5 + (0.005 - 0.5) * (steps - 1) / steps)
    assert bench.stages[1].rates[-1] == pytest.approx(low)
    assert bench.stages[3].rates[-1] == pytest.approx(low)
    # The trunk is the beginning of a schedule of 6 epochs: constant for its first 3.
    assert bench.stages[0].rates == [0.1, 0.1, 0.1]
    assert not bench.stages[0].training.nesterov


def test_swa_is_the_mean_of_weights() -> None:
    bench = MemoryBench("user", budget=4, lr=0.05)
    result = trained(SWA(start=0.5), bench)
    assert [stage.training.epochs for stage in bench.stages] == [2, 1, 1]
    assert [stage.rates[-1] for stage in bench.stages[1:]] == [0.025, 0.025]
    (network,) = result.networks
    mean = (bench.saved[1]["model.conv.weight"] + bench.saved[2]["model.conv.weight"]) / 2
    assert torch.allclose(network.get_parameter("conv.weight"), mean, atol=1e-7)
    # Statistics of batch-norm are those of the mean network, not of the last one.
    model = Skip(bench.data.input_shape, bench.data.num_classes)
    model.load_state_dict(network.state_dict())
    seen: list[torch.Tensor] = []
    model.stem.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    for batch in bench.batches(16, derive(bench.seed, "norm")).epoch(0):
        model.eval()(batch.x)
    assert torch.allclose(
        network.get_buffer("norm.running_mean"),
        torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0),
        atol=1e-5,
    )


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        baselines.parse({"method": "dense", "member": 3}, "rows.x")
    must_say(str(caught.value), [r"rows\.x: dense: member"])
