"""Functions that a folder names, and what users' code raises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import run_serial, tiny
from torch import nn

import ray_subnets as rs
from ray_subnets import own_code, strangers
from ray_subnets.checkpoints import RunFolder

MINE = """
from os import system
from torch import nn
from torch.nn import Sequential as Chain

def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize("module", ["os", "os.path", "builtins", "torch", "torch.hub", "numpy"])
def test_installed_code_is_nobodys_own(module: str) -> None:
    assert not own_code.is_own(module)


def test_code_beside_the_user_is_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_own.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert own_code.is_own("mine_own")
    assert own_code.is_own("__main__")
    assert own_code.is_own("no.such.module"), "the import says what is wrong"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("own")
    (place / "mine_named.py").write_text(MINE)
    sys.path.insert(0, str(place))
    folder = RunFolder.create(place / "run")
    run_serial(tiny("single=false", "model=mine_named:build"), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("os:system", {"command": "touch PLACE"}),
        ("mine_named:system", {"command": "touch PLACE"}),
        ("subprocess:getoutput", {"cmd": "touch PLACE"}),
        ("torch:load", {"f": "PLACE", "weights_only": False}),
        ("mine_named:Chain", {}),
    ],
)
def test_a_folder_cannot_call_installed_code(
    finished: RunFolder, tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    assert len(rs.load(str(finished))) > 0
    record = json.loads(finished.read("ensemble.json"))
    before = finished.read("ensemble.json")
    evil = tmp_path / "evil"
    text = json.dumps({"name": name, **options}).replace("PLACE", str(evil))
    finished.write("ensemble.json", json.dumps(record | {"model": json.loads(text)}).encode())
    try:
        with pytest.raises(ValueError, match=rf"model: '{name}' is not code of yours.*model="):
            rs.load(str(finished))
        assert not evil.exists()
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        assert rs.load(str(finished), model=model)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    finally:
        finished.write("ensemble.json", before)


class Fails(nn.Module):
    """Raises while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise KeyError("only in training")
        out: torch.Tensor = self.head(self.layer(x).relu())
        return out


def test_what_a_network_raises_in_training_is_a_line() -> None:
    x, y = torch.zeros(30, 4), torch.arange(30) % 3
    with pytest.raises(
        ValueError, match=r"sparse-000: your code raised KeyError: 'only .*test_own_code.py, line"
    ):
        rs.ensemble(
            *(Fails(), (x, y), (x, y)),
            method=rs.Sparse(sparsity=0.5),
            children=2,
            tune=rs.OneCycle(epochs=1),
            progress=False,
        )


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RuntimeError("CUDA error: x")])
def test_the_machines_troubles_are_not_the_users(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    assert not strangers.is_theirs(caught.value)
