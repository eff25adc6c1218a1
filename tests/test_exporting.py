"""One file that runs without this package: torch.export and ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from test_api import TRAIN, TUNE, VAL, Net, make
from torch import Tensor, nn

import ray_subnets as rs
from ray_subnets import exporting
from ray_subnets.ensembles import Ensemble

X = VAL[0]


@pytest.fixture(scope="module")
def mixed() -> Ensemble:
    """A parent and a child of every method; batch-norm, dropout and an unsaved buffer."""
    torch.manual_seed(0)
    ensemble = make(Net(), include_parent=True)
    return ensemble.take([ensemble.ids[i] for i in (0, 1, 3, 5)])


def of(network: nn.Module, shape: tuple[int, ...], **how: Any) -> Ensemble:
    """An ensemble of one network made by hand."""
    return Ensemble(
        [network], ids=["a"], preprocess=rs.Preprocess(), input_shape=shape, **how
    ).eval()


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {exporting.INPUTS: x.numpy()})
    return torch.from_numpy(answer)


ALONE = """
import sys, torch
torch.save(torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2])), sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] == "ray_subnets"]
"""


def test_pt2_runs_in_a_process_without_this_package(mixed: Ensemble, tmp_path: Path) -> None:
    written = mixed.export(tmp_path / "e.pt2")
    assert written.difference <= exporting.TOLERANCE
    assert written.bytes == (tmp_path / "e.pt2").stat().st_size
    torch.save(X, tmp_path / "x.pt")
    answer = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "e.pt2", tmp_path / "x.pt", tmp_path / "y.pt"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert torch.allclose(torch.load(tmp_path / "y.pt"), mixed(X), rtol=0, atol=1e-6)
    about = {exporting.ABOUT: ""}
    torch.export.load(tmp_path / "e.pt2", extra_files=about)
    assert json.loads(about[exporting.ABOUT]) == {
        "members": list(mixed.ids),
        "head": "classes",
        "combine": "probabilities",
        "temperature": None,
        "input": ["float32", 1, 4, 4],
    }


def test_onnx_takes_any_number_of_inputs(mixed: Ensemble, tmp_path: Path) -> None:
    written = mixed.export(tmp_path / "e.onnx", X)
    assert written.samples == len(X) + 8
    for n in (1, 2, 7, len(X)):
        assert torch.allclose(run_onnx(tmp_path / "e.onnx", X[:n]), mixed(X[:n]), rtol=0, atol=1e-5)
    graph = onnx.load(tmp_path / "e.onnx")
    onnx.checker.check_model(graph)
    assert [one.name for one in graph.graph.output] == ["probabilities"]
    (said,) = (one.value for one in graph.metadata_props if one.key == "ray_subnets")
    assert json.loads(said)["members"] == list(mixed.ids)


@pytest.mark.parametrize(
    "combine",
    ["weighted", *(pytest.param(how, marks=pytest.mark.slow) for how in ("logits", "vote"))],
)
def test_every_way_of_combining_and_the_temperature(
    mixed: Ensemble, combine: str, tmp_path: Path
) -> None:
    weights = [1.0 + i for i in range(len(mixed))]
    ensemble = Ensemble(
        list(mixed.members),
        ids=mixed.ids,
        preprocess=mixed.preprocess,
        combine=combine,
        weights=weights,
        temperature=1.7,
        calibrated=combine != "vote",
        input_shape=mixed.input_shape,
    ).eval()
    for kind in ("pt2", "onnx"):
        ensemble.export(tmp_path / f"e.{kind}", X)
    answer = torch.export.load(tmp_path / "e.pt2").module()(X)
    assert torch.allclose(answer, ensemble(X), rtol=0, atol=1e-6)
    assert not torch.allclose(answer, mixed(X), rtol=0, atol=1e-3)
    assert torch.allclose(run_onnx(tmp_path / "e.onnx", X), ensemble(X), rtol=0, atol=1e-5)


def test_uint8_images_are_normalised_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (96, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(96) % 3
    ensemble = make(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        (images, labels),
        (images, labels),
        preprocess=rs.Preprocess((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        method=rs.Noisy(sigma=0.1),
        children=2,
        tune=None,
        on_demand=True,
    )
    for kind in ("pt2", "onnx"):
        ensemble.export(tmp_path / f"e.{kind}")
    answer = torch.export.load(tmp_path / "e.pt2").module()(images)
    assert torch.allclose(answer, ensemble(images), rtol=0, atol=1e-6)
    assert torch.allclose(run_onnx(tmp_path / "e.onnx", images), ensemble(images), atol=1e-5)
    ensemble.export(tmp_path / "float.pt2", dtype=torch.float32)
    x = ensemble.preprocess(images)
    answer = torch.export.load(tmp_path / "float.pt2").module()(x)
    assert torch.allclose(answer, ensemble(x), rtol=0, atol=1e-6)


def test_the_ensemble_is_left_as_it_is(mixed: Ensemble, tmp_path: Path) -> None:
    strides = [p.stride() for p in mixed.parameters()]
    before = mixed(X)
    mixed.export(tmp_path / "e.pt2")
    assert [p.stride() for p in mixed.parameters()] == strides
    assert torch.equal(mixed(X), before)


class Changing(nn.Module):
    """Not a fixed graph: what it does depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool((x.sum() > 0).item()) else -self.layer(x)


class Remembering(nn.Module):
    """Its trace is not what it does: it looks at a number of Python that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembering:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + torch.tensor([0.0, 0.0, 1.0 * self.calls])


class OneSize(nn.Module):
    """Only takes one number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(3, 4))


@pytest.mark.parametrize(
    ("network", "name", "says"),
    [
        (Changing(), "e.pt2", "export: torch.export cannot follow the network: .*data-dependent"),
        (
            Remembering(),
            "e.pt2",
            r"export: the \.pt2 file differs from the network by .*no file was",
        ),
        (OneSize(), "e.pt2", "export: the network does not take 1 inputs: shape"),
        (
            nn.Linear(4, 3),
            "e.torch",
            r"export: .*e.torch must end in .pt2 \(torch.export\) or .onnx",
        ),
        (nn.Linear(4, 3), "no/e.pt2", "export: .*no/e.pt2 cannot be written: "),
        (nn.Linear(2**29, 1, device="meta"), "e.onnx", "export: 2.1 GB of weights; one .onnx file"),
    ],
    ids=["control flow", "another answer", "one size", "ending", "folder", "large"],
)
def test_what_cannot_be_exported_says_why(
    network: nn.Module, name: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        of(network, (4,)).export(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_known_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(4, 3)
    ensemble = Ensemble([network], ids=["a"], preprocess=rs.Preprocess()).eval()
    with pytest.raises(ValueError, match="export: give inputs x"):
        ensemble.export(tmp_path / "e.pt2")
    x = torch.randn(4, 4)
    ensemble.export(tmp_path / "e.pt2", x)
    with pytest.raises(ValueError, match=r"export: inputs are torch\.uint8 or torch\.float32"):
        ensemble.export(tmp_path / "e.pt2", x.double())
    with pytest.raises(
        ValueError, match=r"export: x is torch\.float32 and dtype says torch\.uint8"
    ):
        ensemble.export(tmp_path / "e.pt2", x, dtype=torch.uint8)
    with pytest.raises(ValueError, match="export: it was not made of images"):
        ensemble.export(tmp_path / "e.pt2", x.byte())
    ensemble.calibrated = True
    with pytest.raises(ValueError, match="calibrated: no temperature was fitted"):
        ensemble.export(tmp_path / "e.pt2", x)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    ensemble.calibrated = False
    with pytest.raises(ValueError, match=r"needs the package onnx and onnxscript.*\[export\]"):
        ensemble.export(tmp_path / "e.onnx", x)


def test_a_structured_child_is_exported_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ensemble = make(
        Net(), method=rs.Sparse(sparsity=0.5, structure="channel"), children=2, tune=TUNE
    )
    assert ensemble.members[0].get_parameter("conv.weight").shape[0] == 4
    assert ensemble.export(tmp_path / "e.pt2", TRAIN[0]).difference <= 1e-5


def test_every_member_counts(mixed: Ensemble, tmp_path: Path) -> None:
    """The file of fewer members is another one, so equality above says something."""
    few = mixed.take(mixed.ids[:2])
    few.export(tmp_path / "few.pt2")
    answer = torch.export.load(tmp_path / "few.pt2").module()(X)
    assert torch.allclose(answer, few(X), rtol=0, atol=1e-6)
    assert float((answer - mixed(X)).abs().max()) > 1e-3
