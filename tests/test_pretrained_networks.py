"""Table 4.1: solved noise and pruning on each of the ten networks, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import run_serial

import ray_subnets as rs
from analysis import pretrained_networks as table
from ray_subnets import configfile
from ray_subnets.checkpoints import RunFolder

QUICK = ("squeezenet", "shufflenet_v2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    table.generate(root)
    return root


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in table.NETWORKS
    ],
)
def test_noise_and_pruning_work(name: str, images: Path, tmp_path: Path) -> None:
    changed = table.overrides(name, str(images), generated=True)
    settings = configfile.load(f"imagenet_noisy_{name}", changed)
    folder = RunFolder.create(tmp_path / name)
    record = run_serial(settings, folder)
    assert [child["error"] for child in record["children"]] == [None] * 3
    assert record["trust_region"][0]["kl"] == pytest.approx(0.002, rel=0.05)
    pruned = record["children"][2]
    assert 0.88 < pruned["kept"] < 0.93
    assert record["cost"]["epochs"] == 0
    ensemble = rs.load(folder.root, on_demand=True)
    assert len(ensemble) == 2
    assert len(table.line(record)) == 8


def test_the_settings_with_pretrained_weights() -> None:
    for name in table.NETWORKS:
        settings = configfile.load(f"imagenet_noisy_{name}", table.overrides(name, "/data"))
        assert (settings.weights, settings.parent.epochs) == ("IMAGENET1K_V1", 0)
        assert settings.data.root == "/data"
        assert settings.model.name.startswith("torchvision/")
        file = configfile.load(f"imagenet_noisy_{name}", table.overrides(name, "a", weights="b.pt"))
        assert file.weights == "b.pt"
    assert len(set(table.NETWORKS)) == 10


def test_weights_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "resnet18-f37072fd.pth").touch()
    found = table.weights_in(str(tmp_path), "resnet18")
    assert found == str(tmp_path / "resnet18-f37072fd.pth")
    assert table.weights_in(None, "alexnet") is None
    with pytest.raises(ValueError, match=r"^--weights: no file alexnet\.safetensors"):
        table.weights_in(str(tmp_path), "alexnet")


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--generated", "--only", "squeezenet", "--out", str(tmp_path), "--serial"]
    assert table.main(arguments) == 0
    said = capsys.readouterr().out
    assert "generated images: that it works, no result" in said
    assert "squeezenet" in said
    done = (tmp_path / "squeezenet/result.json").stat().st_mtime_ns
    assert table.main(arguments) == 0  # nothing is done twice
    assert (tmp_path / "squeezenet/result.json").stat().st_mtime_ns == done
    with pytest.raises(SystemExit):
        table.main([])
