"""Weights that stay as they are: by name, frozen ones, and the layer that gives the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from torch import Tensor, nn

import ray_subnets as rs
from ray_subnets.masks import maskable, output_layer

X, Y = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
TUNE = rs.OneCycle(epochs=1)


class Backwards(nn.Module):
    """Its output layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.neck = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.neck(self.body(x).relu()).relu())
        return answer


class Frozen(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for layer in (self.body, self.neck)[:layers]:
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.neck(self.body(x).relu()).relu())
        return answer


def shares(network: nn.Module) -> dict[str, float]:
    """Weight -> fraction that is not zero."""
    return {
        name.removesuffix(".weight"): float((weight != 0).double().mean())
        for name, weight in network.named_parameters()
        if name.endswith("weight")
    }


def sparse(model: nn.Module, **how: Any) -> list[nn.Module]:
    method = rs.Sparse(sparsity=0.5, **how)
    made = rs.ensemble(model, (X, Y), (X, Y), method=method, children=2, tune=TUNE, progress=False)
    return list(made.members)


def test_the_layer_that_gives_the_outputs_is_found_by_asking() -> None:
    assert output_layer(Backwards(), X[:1]) == "head.weight"
    assert output_layer(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), X[:1]) == "1.weight"
    assert output_layer(nn.BatchNorm1d(6), X[:2]) is None


def test_a_head_that_was_registered_first_stays_whole() -> None:
    for member in sparse(Backwards()):
        assert shares(member) == {"head": 1.0, "body": 0.5, "neck": 0.5}
    for member in sparse(Backwards(), mask_classifier=True):
        assert shares(member) == {"head": 0.5, "body": 0.5, "neck": 0.5}


def test_frozen_weights_stay_as_they_are() -> None:
    model = Frozen()
    for member in sparse(model):
        assert shares(member) == {"body": 1.0, "neck": 0.5, "head": 1.0}
        assert torch.equal(member.get_parameter("body.weight"), model.body.weight)
    noisy = rs.ensemble(
        model, (X, Y), (X, Y), method=rs.Noisy(sigma=0.1), children=2, progress=False
    )
    for member in noisy.members:
        assert torch.equal(member.get_parameter("body.weight"), model.body.weight)
        assert not torch.equal(member.get_parameter("neck.weight"), model.neck.weight)


def test_where_all_but_the_head_is_frozen_that_is_what_there_is(tmp_path: Path) -> None:
    method = rs.Sparse(sparsity=0.5)
    made = rs.ensemble(
        *(Frozen(2), (X, Y), (X, Y)), method=method, children=2, tune=TUNE, progress=False
    )
    for member in made.members:
        assert shares(member) == {"body": 0.5, "neck": 0.5, "head": 1.0}
    assert made.record is not None
    (notes,) = {tuple(child["notes"]) for child in made.record["children"]}
    assert notes == ("frozen weights are masked: body.weight and 1 more",)


def test_names_and_patterns() -> None:
    model = Frozen(0)
    assert list(maskable(model, whole=["body.*"])) == ["neck.weight"]
    assert list(maskable(model, classifier=True, whole=["*ck.weight"])) == [
        "body.weight",
        "head.weight",
    ]
    with pytest.raises(ValueError, match=r"whole: no weight .* 'spine'; there are body\.weight, "):
        maskable(model, whole=["spine"])
    with pytest.raises(ValueError, match=r"whole: \* leaves no weight to mask"):
        maskable(model, whole=["*"])
    for member in sparse(model, whole=["neck.*"]):
        assert shares(member) == {"body": 0.5, "neck": 1.0, "head": 1.0}
    with pytest.raises(ValueError, match=r"whole: is for single weights and layers"):
        sparse(model, whole=["neck.*"], structure="neuron")


def test_what_is_kept_is_kept_when_it_is_loaded(tmp_path: Path) -> None:
    method = [rs.Sparse(sparsity=0.5), rs.Noisy(sigma=0.1), rs.Sparse(sparsity=0.5, prune_epochs=1)]
    made = rs.ensemble(
        *(Frozen(), (X, Y), (X, Y)), method=method, children=3, tune=TUNE, progress=False
    )
    made.save(tmp_path / "saved")
    again = rs.load(tmp_path / "saved", model=Frozen(0))  # recipes say it, not the network
    assert torch.equal(made(X), again(X))


MODULE = """
import torch
from torch import nn

class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 10), nn.Linear(64, 8)
        self.neck = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.neck(self.body(x.flatten(1)).relu()).relu())
"""
CONFIG = """
name: kept
data: {name: digits, train_limit: 100}
model: "mine:Backwards"
parent: {epochs: 1}
single: false
children: [{method: sparse, count: 2, sparsity: 0.5, tune: {epochs: 1}}]
"""


def test_on_the_command_line_it_is_told_and_set(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "kept.yaml").write_text(CONFIG)
    told = "head.weight gives the outputs and is masked; keep it: mask_classifier: "
    told += "true, whole: [head.weight]"
    done = command("run", "kept.yaml", "--serial", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told in " ".join(done.stdout.split())
    settings = ["children.0.whole=[head.weight]", "children.0.mask_classifier=true"]
    done = command("run", "kept.yaml", "--serial", "--overwrite", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told not in " ".join(done.stdout.split())


class TwoHeads(nn.Module):
    """The head that answers is asked before another, and was registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.body, self.aux = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        out: Tensor = self.main(x)
        self.aux(x)
        return out


def test_the_layer_whose_output_is_the_answer_is_the_classifier() -> None:
    assert output_layer(TwoHeads(), torch.ones(1, 6)) == "main.weight"
    behind = nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1))
    assert output_layer(behind, torch.ones(1, 6)) == "0.weight"
