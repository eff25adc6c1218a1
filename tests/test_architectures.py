"""Strangers' networks, without a change: all three methods spawn, tune a step, are saved, loaded.

Random weights, inputs as small as each network takes. The ten of the dissertation's Table 4.1 are
among torchvision's. What takes longer is marked `slow`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_subnets as rs
from ray_subnets import metrics
from ray_subnets.ensembles import Ensemble

METHODS = [
    rs.Noisy(sigma=0.01, count=1),
    rs.Sparse(sparsity=0.5, count=1),
    rs.Stochastic(sparsity=0.5, anneal_epochs=0.5, count=1),
]
TUNE = rs.OneCycle(epochs=1, batch_size=4, lr=0.001)
CLASSES = 5


def large(name: str, size: int, **options: Any) -> Any:
    return pytest.param(name, size, options, marks=pytest.mark.slow)


# Name, pixels of each side, options: of Table 4.1, then others.
TORCHVISION = [
    large("alexnet", 63),
    large("densenet121", 32),
    large("inception_v3", 299, aux_logits=True, init_weights=False),
    large("mobilenet_v2", 32),
    large("resnet18", 32),
    large("resnext50_32x4d", 32),
    large("shufflenet_v2_x1_0", 32),
    ("squeezenet1_1", 32, {}),
    large("vgg16", 32),
    large("wide_resnet50_2", 32),
    large("efficientnet_b0", 32),
    ("mobilenet_v3_small", 32, {}),
    large("regnet_y_400mf", 32),
    large("googlenet", 96, aux_logits=True, init_weights=False),
    large("convnext_tiny", 32),
    large("swin_t", 64),
    large("vit_b_16", 32, image_size=32),
]
TIMM = [
    ("lcnet_050", 32, {}),
    ("edgenext_xx_small", 64, {}),
    ("regnetx_002", 32, {}),
    large("resnet10t", 32),
    large("mobilenetv3_small_050", 32),
    large("efficientnet_lite0", 32),
    large("convnext_atto", 32),
    large("deit_tiny_patch16_224", 32, img_size=32),
    large("mixer_s32_224", 32, img_size=32),
    large("ghostnet_050", 32),
    large("hardcorenas_a", 32),
    large("mobilevit_xxs", 64),
    large("poolformerv2_s12", 32),
    large("repvgg_a0", 32),
]


def small_data(size: int, train: int, val: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % CLASSES)
        for n in (train, val)
    ]


def check(model: nn.Module, size: int, folder: Path) -> None:
    """The whole life of an ensemble of `model`."""
    train, val = small_data(size, 4, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ensemble = rs.ensemble(
        model, train, val, method=METHODS, tune=TUNE, progress=False, on_demand=True
    )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert ensemble.record is not None
    children = ensemble.record["children"]
    assert [child["error"] for child in children] == [None] * 3
    assert [child["images"] for child in children] == [0, 4, 4]
    for child in children[1:]:
        assert 0.4 < child["kept"] < 0.97
    ensemble.save(folder)
    again = rs.load(folder, model=model, on_demand=True)
    answers = ensemble.logits(val[0])
    assert answers.shape == (3, 2, CLASSES)
    assert torch.equal(again.logits(val[0]), answers)
    assert torch.equal(again(val[0]), ensemble(val[0]))
    assert float(metrics.kl_divergence(answers).max()) > 0


@pytest.mark.parametrize(("name", "size", "options"), TORCHVISION)
def test_torchvision(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    check(get_model(name, weights=None, num_classes=CLASSES, **options), size, tmp_path / "a")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(("name", "size", "options"), TIMM)
def test_timm(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    check(model, size, tmp_path / "a")


def exported(model: nn.Module, size: int, folder: Path) -> None:
    """To both kinds of files; they are compared with the network as they are written."""
    model.eval().requires_grad_(False)
    ensemble = Ensemble(
        [model], ids=["a"], preprocess=rs.Preprocess(), input_shape=(3, size, size)
    ).eval()
    for kind in ("pt2", "onnx"):
        assert ensemble.export(folder / f"a.{kind}").difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "options"), TORCHVISION)
def test_torchvision_is_exported(
    name: str, size: int, options: dict[str, Any], tmp_path: Path
) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    exported(get_model(name, weights=None, num_classes=CLASSES, **options), size, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(("name", "size", "options"), TIMM)
def test_timm_is_exported(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    exported(timm.create_model(name, num_classes=CLASSES, **options), size, tmp_path)


def test_the_table_has_a_dozen_of_each_and_table_4_1() -> None:
    ours = {one.values[0] if hasattr(one, "values") else one[0] for one in TORCHVISION}
    assert len(ours) >= 12
    assert len(TIMM) >= 12
    starts = "alexnet densenet121 inception_v3 mobilenet_v2 resnet18 resnext50 shufflenet_v2 "
    starts += "squeezenet vgg16 wide_resnet50"
    for start in starts.split():
        assert any(name.startswith(start) for name in ours), start


class Recurrent(nn.Module):
    """Its only layer beside the classifier is a kind that is not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(32, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x[:, 0])[0][:, -1])


class Words(nn.Module):
    """Takes numbers of words."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(1))


class Detection(nn.Module):
    """Gives a dictionary, as detectors and Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 32 * 32, CLASSES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x.flatten(1))}


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (Recurrent(), None, "model: no convolution or linear layer to mask; set mask_classifier"),
        (Words(), torch.zeros(4, 6, dtype=torch.int64), r"model: it does not take inputs of shape"),
        (Detection(), None, r"model: it gives dict for 2 inputs; it must return logits"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, CLASSES)),
            None,
            r"model: it does not take inputs of shape \(3, 32, 32\): .*mat1 and mat2",
        ),
    ],
    ids=["only an LSTM", "pictures for words", "a dictionary", "another size"],
)
def test_what_cannot_work_says_why(model: nn.Module, x: torch.Tensor | None, says: str) -> None:
    train, val = small_data(32, 4, 2)
    if x is not None:
        train = (x, train[1])
    with pytest.raises(ValueError, match=says):
        rs.ensemble(model, train, val, method=METHODS, tune=TUNE, progress=False)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_cannot_be_copied() -> None:
    model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES)))
    train, val = small_data(32, 4, 2)
    with pytest.raises(ValueError, match="model: TorchScript cannot be copied"):
        rs.ensemble(model, train, val, method=METHODS, tune=TUNE, progress=False)


def test_a_network_that_reads_the_version_of_its_weights() -> None:
    """torchvision's MNASNet asks a state dict for a version, which safetensors do not carry."""
    from torchvision.models import get_model

    train, val = small_data(32, 4, 2)
    model = get_model("mnasnet0_5", weights=None, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"model: plain tensors are not enough to load.*version"):
        rs.ensemble(model, train, val, method=METHODS, tune=TUNE, progress=False)
