"""What the README says is there, is there; what it shows, runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command

import ray_subnets
from ray_subnets import configfile, models
from ray_subnets.benchmark import benchmarkfile
from ray_subnets.checkpoints import RunFolder
from ray_subnets.rl import policy_sweepfile, policyfile
from ray_subnets.sweeps import sweepfile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEC_LINE = (
    'spec = ray_subnets.ChildSpec(id="a", method="sparse", seed=1, density=0.5, draw="exact")'
)


def block(first_line: str) -> str:
    """The code block that starts with this line."""
    found = re.search(rf"```\w*\n({re.escape(first_line)}\n.*?)```", README, flags=re.DOTALL)
    assert found, first_line
    return found.group(1)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_map_names_every_module() -> None:
    map_ = block("ray_subnets/")
    for path in (ROOT / "ray_subnets").glob("*.py"):
        assert path.name in map_ or path.name == "__init__.py", path.name
    for path in (ROOT / "ray_subnets").glob("*/__init__.py"):
        assert f"  {path.parent.name}/" in map_, path.parent
    for name in re.findall(r"\b(\w+\.py)\b", map_):
        assert list((ROOT / "ray_subnets").rglob(name)), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z][a-z-]+)", README)):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    record = configfile.record_of(path.read_text(), path.name)
    if policy_sweepfile.is_policy_sweep(record):
        policies = policy_sweepfile.parse(path.read_text(), path.name)
        assert policies.name == path.stem
        assert policy_sweepfile.parse(policies.to_yaml(), "again").section == policies.section
        return
    if path.stem.startswith("sweep"):
        sweep = sweepfile.load(str(path))
        assert sweep.name == path.stem
        assert sweepfile.parse(sweep.to_yaml(), "again").section == sweep.section
        return
    if path.stem.startswith("benchmark"):
        benchmark = benchmarkfile.load(str(path))
        assert benchmark.name == path.stem
        assert benchmarkfile.parse(benchmark.to_yaml(), "again") == benchmark
        return
    if policyfile.is_policy(record):
        policy = policyfile.parse(path.read_text(), path.name)
        assert policy.name == path.stem
        assert policyfile.parse(policy.to_yaml(), "again") == policy
        return
    settings = configfile.load(str(path))
    assert settings.name == path.stem
    assert configfile.parse(settings.to_yaml(), "again") == settings


def test_the_large_network_has_the_published_size() -> None:
    """WideResNet-28-10 on 32x32: 36.46 M weights outside normalisation, 5.951 or 5.243 GMAC."""
    from ray_subnets.flops import forward_cost
    from ray_subnets.models.wide_resnet import WideResNet

    for stride_in, gmac in (("second", 5.951), ("first", 5.243)):
        with torch.device("meta"):
            model = WideResNet((3, 32, 32), 10, stride_in=stride_in)
            cost = forward_cost(model, (3, 32, 32))
        weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert round(weights / 1e6, 2) == 36.46
        assert round(cost.total / 2e9, 3) == gmac


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet_s", 253_290),  # the dissertation's own counts
        ("lenet_m", 1_007_306),
        ("lenet_l", 4_017_546),
        ("resnet18", 11_173_962),  # the usual ones of these networks for 32x32 images
        ("resnet56", 855_770),
        ("densenet121", 6_956_298),
    ],
)
def test_networks_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    model = models.build(name, (3, 32, 32), 10, {}, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_your_own_network_and_data(command: Command, tmp_path: Path) -> None:
    """The README's own example, as a newcomer would do it, in an empty folder."""
    (tmp_path / "my_nets.py").write_text(block("# my_nets.py"))
    (tmp_path / "my_run.yaml").write_text(block("# my_run.yaml"))
    generator = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 90), ("test", 40)):
        arrays[f"{split}_labels"] = np.arange(n) % 3
        noise = generator.integers(0, 60, (n, 12, 12))
        arrays[f"{split}_images"] = (noise + 60 * (np.arange(n) % 3)[:, None, None]).astype("uint8")
    np.savez(tmp_path / "my_data.npz", **arrays)
    answer = command("run", "my_run.yaml", "--serial", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "selected ensemble" in answer.stdout
    record = RunFolder(tmp_path / "runs/my_run").read_json("result.json")
    assert record["data"]["input_shape"] == [1, 12, 12]
    assert record["cost"]["parameters"]["parent"] == 144 * 128 + 128 + 128 * 3 + 3
    again = command("evaluate", "runs/my_run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "gives the recorded numbers" in again.stdout


def test_one_child_without_a_run() -> None:
    parent = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    scope: dict[str, object] = {"ray_subnets": ray_subnets, "parent": parent}
    lines = block(SPEC_LINE).splitlines()
    exec("\n".join(lines), scope)
    child = scope["child"]
    assert isinstance(child, torch.nn.Module)
    assert int((child.get_parameter("0.weight") == 0).sum()) == 30


def test_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example with a stranger's network; its every line gives what it says."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 6) + y[:, None]
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    scope: dict[str, object] = {"model": model, "x": x[:60], "y": y[:60], "images": x[100:]}
    scope |= {"x_val": x[60:100], "y_val": y[60:100]}
    code = block("import ray_subnets as rs")
    exec(code, scope)
    ensemble, said = scope["ensemble"], scope["said"]
    assert isinstance(ensemble, ray_subnets.Ensemble)
    assert len(ensemble) == 8
    assert isinstance(scope["asked"], torch.Tensor)
    assert scope["asked"].shape == (20,)
    for name in re.findall(r"\.(\w+)[,:]", code.splitlines()[7]):
        assert getattr(said, name).shape == (20,), name
    assert (tmp_path / "my_ensemble/ensemble.json").exists()
