"""`weights`: files and names, and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import equal, run_serial, tiny
from torch import Tensor, nn

import ray_subnets as rs
from analysis import pretrained_networks
from ray_subnets import configfile, datasets, driver, models, pretrained
from ray_subnets.checkpoints import RunFolder

MLP = models.build("mlp", (1, 8, 8), 10, {"hidden": [16]}, seed=7)
STATE = {name: tensor.clone() for name, tensor in MLP.state_dict().items()}
ONES = ("parent.epochs=0", "single=false", "children.1.count=2")


def saved(tensors: Any, path: Path) -> Path:
    torch.save(tensors, path)
    return path


def safe(tensors: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.safetensors", lambda path: safe(STATE, path)),
        ("a.pt", lambda path: saved(STATE, path)),
        ("a.pth", lambda path: saved({"state_dict": STATE, "epoch": 3, "best": 0.9}, path)),
        ("ddp.pt", lambda path: saved({f"module.{k}": v for k, v in STATE.items()}, path)),
        ("compiled.pt", lambda path: saved({f"_orig_mod.{k}": v for k, v in STATE.items()}, path)),
        ("double.pt", lambda path: saved({k: v.double() for k, v in STATE.items()}, path)),
    ],
)
def test_files(name: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert equal(pretrained.fitted(MLP, pretrained.read(str(path), "mlp"), "a"), STATE)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("no.pt", lambda path: None, r"no such file: .*no\.pt; give a \.safetensors file"),
        ("a.pt", lambda path: saved(Evil(), path), "more than tensors.*model.state_dict"),
        ("net.pt", lambda path: saved(MLP, path), "more than tensors.*model.state_dict"),
        ("text.pt", lambda path: path.write_text("hello"), "more than tensors, or is no file"),
        ("empty.pt", lambda path: path.write_text(""), "cannot read"),
        ("list.pt", lambda path: saved([1, 2], path), "holds a list, not a state dict"),
        ("number.pt", lambda path: saved({"lr": 0.1}, path), "'lr' is a float, not a tensor"),
        ("a.safetensors", lambda path: path.write_text("hello"), "cannot read"),
    ],
)
def test_files_that_are_none(
    name: str, write: Callable[[Path], Any], says: str, tmp_path: Path, capsys: Any
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"^weights: .*{says}") as caught:
        pretrained.read(str(tmp_path / name), "mlp")
    assert "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in STATE.items() if key != name}


FIRST, LAST = next(iter(STATE)), list(STATE)[-1]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (without(LAST), f"{LAST} is missing"),
        ({**STATE, "extra": torch.zeros(1)}, "extra is unexpected"),
        ({f"net.{k}": v for k, v in STATE.items()}, "none of its names are the network's"),
        ({**STATE, LAST: torch.zeros(7)}, rf"{LAST} is \(7,\) and must be \(10,\)"),
        ({**STATE, FIRST: STATE[FIRST] * torch.nan}, f"NaN or infinite numbers in {FIRST}$"),
    ],
)
def test_weights_of_another_network(weights: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=f"^weights: a.pt .*{says}"):
        pretrained.fitted(MLP, weights, "a.pt")


def test_a_run_begins_with_them_and_goes_on_without_the_file(tmp_path: Path) -> None:
    path = safe(STATE, tmp_path / "a.safetensors")
    settings = tiny(f"weights={path}", *ONES)
    folder = RunFolder.create(tmp_path / "run")
    record = run_serial(settings, folder)
    assert equal(folder.load_tensors("parent.safetensors"), STATE)
    assert record["cost"]["epochs"] == pytest.approx(2 * 4)
    path.unlink()
    again = run_serial(driver.config_of(folder), folder)
    assert again["ensemble"]["test"] == record["ensemble"]["test"]
    assert len(rs.load(tmp_path / "run")) == 6


def test_a_wrong_file_ends_the_command_before_anything_is_written(
    command: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: a\ndata: digits\nmodel: mlp\nweights: a.pt\nparent: {epochs: 0}\nsingle: false\n"
        "children: [{method: noisy, count: 2, sigma: 0.1}]\n"
    )
    saved(STATE, tmp_path / "a.pt")
    answer = command("run", "a.yaml", "--serial", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("ray-subnets: weights: a.pt does not fit the network: ")
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_sweep_begins_with_them(command: Any, tmp_path: Path) -> None:
    safe(STATE, tmp_path / "a.safetensors")
    (tmp_path / "s.yaml").write_text(
        "name: s\ndata: digits\nmodel: {name: mlp, hidden: [16]}\nweights: a.safetensors\n"
        "parent: {epochs: 0}\nsingle: false\n"
        "children: [{method: noisy, count: 2, sigma: 0.1}]\n"
        "sweep: {keys: {sigma: [0.001, 0.01]}}\n"
    )
    answer = command("sweep", "s.yaml", "--serial", "--quiet", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    parents = list((tmp_path / "runs/s").glob("parent*.safetensors"))
    assert len(parents) == 1
    assert equal(safetensors.torch.load_file(parents[0]), STATE)


def test_torchvisions_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's cache, as its download leaves it; the network is drawn at random here."""
    from urllib.error import URLError

    from torchvision.models import MobileNet_V3_Small_Weights, get_model

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision/mobilenet_v3_small"
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: raises(URLError("no network")))
    with pytest.raises(ValueError, match=r"^weights: https://.* could not be fetched \(.*network"):
        pretrained.read("IMAGENET1K_V1", name)
    torch.manual_seed(0)
    state = get_model("mobilenet_v3_small", weights=None).state_dict()
    place = tmp_path / "hub/checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    saved(dict(state), place / MobileNet_V3_Small_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    model = models.build(name, (3, 32, 32), 1000, {}, seed=0)
    for label in ("IMAGENET1K_V1", "DEFAULT"):
        assert equal(pretrained.fitted(model, pretrained.read(label, name), label), dict(state))
    with pytest.raises(ValueError, match=r"^weights: .* has no 'V9'.*IMAGENET1K_V1"):
        pretrained.read("V9", name)
    with pytest.raises(ValueError, match="no such file: IMAGENET1K_V1"):
        pretrained.read("IMAGENET1K_V1", "mlp")


def raises(error: Exception) -> None:
    raise error


def test_old_files_of_torchvision(tmp_path: Path) -> None:
    """DenseNet's have names of their own; those from before 2018 lack a counter."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.BatchNorm2d(2)

    model = nn.ModuleDict({"denselayer1": Layer()})
    state = model.state_dict()
    old = {
        name.replace("norm1", "norm.1"): tensor + 1
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    path = saved(old, tmp_path / "a.pth")
    found = pretrained.fitted(model, pretrained.read(str(path), "torchvision/densenet121"), "a")
    assert found.keys() == state.keys()
    assert torch.equal(found["denselayer1.norm1.weight"], torch.full((2,), 2.0))
    assert int(found["denselayer1.norm1.num_batches_tracked"]) == 0


def test_timm_by_name() -> None:
    pytest.importorskip("timm")
    model = models.build("timm/lcnet_050", (3, 32, 32), 5, {"drop_rate": 0.1}, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    for name, options, says in (
        ("timm/lcnet_05", {}, "timm has no network 'lcnet_05'; there are lcnet_050"),
        ("timm/lcnet_050", {"pretrained": True}, r"model\.pretrained: is given"),
        ("timm/lcnet_050", {"dropp": 1}, "timm/lcnet_050 cannot be built"),
    ):
        with pytest.raises(ValueError, match=says):
            models.build(name, (3, 32, 32), 5, options, seed=0)


def test_the_data_decides_the_shape_of_the_classifier() -> None:
    data = datasets.load("digits")
    settings = configfile.parse(
        "{name: a, data: digits, model: mlp, parent: {epochs: 0}, "
        "children: [{method: noisy, sigma: 1, count: 1}]}",
        "a",
    )
    assert driver.given_weights(settings, data, driver.build(settings, data)) is None


def test_a_part_of_the_classes_would_be_misnumbered(tmp_path: Path) -> None:
    """The fourth folder of ten is class 3 for us, whatever the weights call it."""
    pretrained_networks.generate(tmp_path)
    changed = pretrained_networks.overrides("squeezenet", str(tmp_path), generated=True)
    changed += [f"weights={safe(STATE, tmp_path / 'a.safetensors')}", "data.num_classes=10"]
    settings = configfile.load("imagenet_noisy_squeezenet", changed)
    data = driver.load_data(settings)
    with pytest.raises(ValueError, match=r"data\.num_classes: 10, but there are 4 class folders"):
        driver.given_weights(settings, data, MLP)
