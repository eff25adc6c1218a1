"""Members in one call: the same answers, the same memory."""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path

import pytest
import torch
from test_api import TUNE, VAL, Net, make
from test_ensembles import tensor_bytes
from torch import Tensor, nn

import ray_subnets as rs
from ray_subnets import batched
from ray_subnets.ensembles import Ensemble

X = VAL[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Two children of every method and their parent; batch-norm, dropout, an unsaved buffer."""
    torch.manual_seed(0)
    model = Net()
    place = tmp_path_factory.mktemp("batched") / "a"
    make(model, include_parent=True).save(place)
    return place, model


def load(saved: tuple[Path, nn.Module], how: bool | None, **more: bool) -> Ensemble:
    folder, model = saved
    return rs.load(folder, model=model, batched=how, **more)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 48])
def test_one_call_gives_the_logits_of_the_loop(saved: tuple[Path, nn.Module], n: int) -> None:
    loop, together = load(saved, False), load(saved, True)
    logits = together.logits(X[:n])
    assert together._together is not None
    assert logits.shape == (7, n, 3)
    assert close(logits, loop.logits(X[:n]))
    assert close(together(X[:n]), loop(X[:n]))
    assert torch.equal(together.logits(X[:n]), logits)
    assert not close(logits[0], logits[1])


def test_the_default_follows_the_rule(
    saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    default, loop = load(saved, None), load(saved, False)
    assert torch.equal(default.logits(X), loop.logits(X))
    assert default._together is None
    assert close(default(X[:1]), loop(X[:1]))
    assert default._together is not None
    assert torch.equal(default(X[:1]), load(saved, True)(X[:1]))
    # One member's bits do not depend on where its weights lie.
    assert torch.equal(default.logits(X), loop.logits(X))
    cpu = torch.device("cpu")
    assert batched.faster(cpu, 60_000, 1)
    assert batched.faster(cpu, 60_000, 4, threads=2)
    assert not batched.faster(cpu, 60_000, 4, threads=1)
    assert not batched.faster(cpu, 60_000, 16)
    assert not batched.faster(cpu, 11_000_000, 1)
    assert not batched.faster(torch.device("cuda"), 60_000, 1)


def test_the_clock_chooses(saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in turn; the slower one is not taken, whichever that is."""
    ensemble, logits = load(saved, None), Ensemble.logits
    expected = ensemble.logits(X[:1])
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for slow in (True, False):

        def slower(self: Ensemble, x: Tensor, slow: bool = slow) -> Tensor:
            now[0] += 2.0 if self.batched is slow else 1.0
            return logits(self, x)

        monkeypatch.setattr(Ensemble, "logits", slower)
        found = ensemble.choose_batched(X[:1], rounds=3)
        assert ensemble.batched is not slow
        assert found == {"one call": 1.0 + slow, "loop": 2.0 - slow}
        assert close(ensemble.logits(X[:1]), expected)
    monkeypatch.setattr(Ensemble, "logits", logits)
    demand = load(saved, None, on_demand=True)  # they cannot be called together
    assert list(demand.choose_batched(X[:1], rounds=1)) == ["loop"]
    assert demand.batched is False


def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4000), nn.ReLU(), nn.Linear(4000, 3))
    make(model, method=rs.Noisy(sigma=0.1), children=8, tune=None).save(tmp_path / "a")
    gc.collect()
    before = tensor_bytes()
    ensemble = rs.load(tmp_path / "a", model=model, batched=True)
    gc.collect()
    alone = tensor_bytes() - before
    ensemble(X[:1])
    gc.collect()
    assert ensemble._together is not None
    assert tensor_bytes() - before < 1.01 * alone


def test_moved_replaced_or_changed_weights_are_seen(saved: tuple[Path, nn.Module]) -> None:
    ensemble = load(saved, True)
    ensemble(X)
    with torch.no_grad():
        ensemble.members[2].get_parameter("head.bias").add_(1.0)
    assert close(ensemble.logits(X)[2], ensemble.members[2](X))
    ensemble.members[1] = copy.deepcopy(ensemble.members[3])
    assert close(ensemble.logits(X)[1], ensemble.logits(X)[3])
    ensemble.members[0].get_buffer("norm.running_mean").data = torch.ones(8)
    assert close(ensemble.logits(X)[0], ensemble.members[0](X))
    again = copy.deepcopy(ensemble)
    again.members[0].get_parameter("head.bias").data.zero_()
    assert close(again.logits(X)[0], again.members[0](X))
    assert not close(again.logits(X)[0], ensemble.logits(X)[0])
    few = ensemble.take(ensemble.ids[2:4])
    assert close(few.logits(X), ensemble.logits(X)[2:4])


def test_gradients_reach_inputs_and_weights(saved: tuple[Path, nn.Module]) -> None:
    grads = []
    for how in (True, False):
        x = X[:2].clone().requires_grad_()
        load(saved, how)(x)[:, 0].sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert close(*grads)
    ensemble = load(saved, True)
    ensemble.members.requires_grad_(True)
    ensemble(X[:2])[:, 0].sum().backward()
    grad = ensemble.members[3].get_parameter("head.weight").grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


class Reading(nn.Module):
    """Looks at its numbers in Python, which torch.func does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.layer = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.body(x.flatten(1))) * (2.0 if self.layer.bias[0].item() > 9 else 1.0)


def test_what_cannot_be_called_together(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batched: members made on demand are asked one by one"):
        load(saved, True, on_demand=True)(X)
    assert close(load(saved, None, on_demand=True)(X[:1]), load(saved, False)(X[:1]))
    torch.manual_seed(0)
    channels = rs.Sparse(sparsity=0.5, structure="channel")
    for model, method, says in [
        (Net(), channels, "members of different shapes"),
        (Reading(), rs.Sparse(sparsity=0.5), "torch.func cannot call the network.*item"),
    ]:
        place = tmp_path / type(model).__name__
        make(model, method=method, children=2, tune=TUNE, include_parent=True).save(place)
        wanted = rs.load(place, model=model, batched=False)(X[:1])
        assert torch.equal(rs.load(place, model=model)(X[:1]), wanted)
        with pytest.raises(ValueError, match=f"batched: {says}"):
            rs.load(place, model=model, batched=True)(X[:1])
