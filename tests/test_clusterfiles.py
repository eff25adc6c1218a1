"""The shipped cluster files before Ray's own loader and our check; the check before broken ones."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from ray_subnets import configfile
from ray_subnets.distributed import clusterfile
from ray_subnets.distributed.clusterfile import PLACEHOLDER, problems

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHER = ["gpu", "gcp", "local"]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
PYTHON = "3.11"  # requirements.txt is made for it, and newer
Config = dict[str, Any]


def load(name: str) -> Any:
    documents = list(YAML(typ="safe").load_all((CLUSTER / f"{name}.yaml").read_text()))
    return documents if name == "kuberay" else documents[0]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token, the repository as current folder, and Python, as the files ask for."""
    monkeypatch.setattr(clusterfile, "PYTHON", PYTHON)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    return tmp_path


def found(config: Any, tmp_path: Path) -> list[str]:
    """What the check says of a file that is filled in."""
    file = tmp_path / "file.yaml"
    with file.open("w") as stream:
        YAML().dump_all(config if isinstance(config, list) else [config], stream)
    file.write_text(file.read_text().replace(PLACEHOLDER, "filled-in"))
    return problems(file)


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_loads_it(name: str) -> None:
    """As `ray up` does before it starts anything."""
    validate_config(prepare_config(copy.deepcopy(load(name))))


@pytest.mark.parametrize("name", [*LAUNCHER, "kuberay"])
def test_nothing_is_wrong_once_filled_in(name: str, tmp_path: Path) -> None:
    assert found(load(name), tmp_path) == []


@pytest.mark.parametrize(("name", "places"), [("gpu", 2), ("gcp", 3), ("local", 0), ("kuberay", 3)])
def test_what_is_to_be_filled_in_is_named(name: str, places: int) -> None:
    lines = problems(CLUSTER / f"{name}.yaml")
    assert len(lines) == places
    assert all(line.endswith(f"still {PLACEHOLDER}") for line in lines)


def _provider(config: Config) -> None:
    config["provider"]["regoin"] = config["provider"].pop("region")


def _instance(config: Config) -> None:
    node = config["available_node_types"]["worker.gpu"]["node_config"]
    node["InstanceTpe"] = node.pop("InstanceType")


def _ebs(config: Config) -> None:
    disk = config["available_node_types"]["head.cpu"]["node_config"]["BlockDeviceMappings"][0]
    disk["Ebs"]["VolumeSzie"] = 1


def _machine(config: Config) -> None:
    node = config["available_node_types"]["worker_gpu"]["node_config"]
    node["machinetype"] = node.pop("machineType")


def _scheduling(config: Config) -> None:
    node = config["available_node_types"]["worker_gpu"]["node_config"]
    node["scheduling"]["provisioningmodel"] = "SPOT"


def _mount(config: Config) -> None:
    config["file_mounts"]["~/data"] = "./no-such-folder"


def _no_token_file(config: Config) -> None:
    del config["file_mounts"]["~/.ray/auth_token"]


def _head_token(config: Config) -> None:
    commands = config["head_start_ray_commands"]
    commands[-1] = commands[-1].replace("RAY_AUTH_MODE=token", "A=b")


def _worker_token(config: Config) -> None:
    commands = config["worker_start_ray_commands"]
    commands[-1] = commands[-1].replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")


def _shell_token(config: Config) -> None:
    for lines in (config.get("docker", {}).get("run_options", []), config["setup_commands"]):
        lines[:] = [line.replace("RAY_AUTH_MODE=token", "A=b") for line in lines]


def _dashboard(config: Config) -> None:
    commands = config["head_start_ray_commands"]
    commands[-1] = commands[-1].replace("host=127.0.0.1", "host=0.0.0.0")


def _default_commands(config: Config) -> None:
    """Ray's own default opens the dashboard to all and sets no token."""
    del config["head_start_ray_commands"]


def _no_start(config: Config) -> None:
    config["worker_start_ray_commands"] = ["ray stop"]


def _image(config: Config) -> None:
    config["docker"]["image"] = "rayproject/ray:2.59.0-py311-gpu"


def _python(config: Config) -> None:
    config["docker"]["head_image"] = f"rayproject/ray:{ray.__version__}-py39-cpu"


def _autoscaler(config: Config) -> None:
    commands = config["head_start_ray_commands"]
    commands[-1] = commands[-1].replace("RAY_enable_autoscaler_v2=0", "")


def _ips(config: Config) -> None:
    config["provider"]["worker_ip"] = config["provider"].pop("worker_ips")


def _top_level(config: Config) -> None:
    config["max_wrokers"] = 1


BROKEN: list[tuple[str, Callable[[Config], None], str]] = [
    ("gpu", _provider, "provider.regoin: unknown; region?"),
    ("gpu", _instance, "available_node_types.worker.gpu.node_config.InstanceTpe: unknown; Insta"),
    ("gpu", _ebs, "BlockDeviceMappings.Ebs.VolumeSzie: unknown; VolumeSize?"),
    ("gcp", _machine, "node_config.machinetype: unknown; machineType?"),
    ("gcp", _scheduling, "scheduling.provisioningmodel: unknown; provisioningModel?"),
    *[(name, _mount, "file_mounts.~/data: no ./no-such-folder here") for name in LAUNCHER],
    *[(name, _no_token_file, "~/.ray/auth_token is not mounted") for name in LAUNCHER],
    *[(name, _head_token, "head_start_ray_commands: export RAY_AUTH") for name in LAUNCHER],
    *[(name, _worker_token, "worker_start_ray_commands: export RAY_AUTH") for name in LAUNCHER],
    *[(name, _shell_token, "is not set for the shells") for name in LAUNCHER],
    *[(name, _dashboard, "--dashboard-host=0.0.0.0") for name in LAUNCHER],
    ("gpu", _default_commands, "--dashboard-host=0.0.0.0"),
    ("gpu", _default_commands, "head_start_ray_commands: export RAY_AUTH_MODE=token"),
    ("gpu", _no_start, "worker_start_ray_commands: no 'ray start'"),
    ("gpu", _image, f"docker.image: Ray 2.59.0, but here is {ray.__version__}"),
    ("gpu", _python, "docker.head_image: Python 3.9, but here is"),
    ("local", _autoscaler, "RAY_enable_autoscaler_v2=0"),
    ("local", _ips, "Ray refuses it"),
    ("gpu", _top_level, "Ray refuses it: Additional properties are not allowed"),
]


@pytest.mark.parametrize(("name", "break_it", "line"), BROKEN)
def test_a_broken_copy_is_found(
    name: str, break_it: Callable[[Config], None], line: str, tmp_path: Path
) -> None:
    config = load(name)
    break_it(config)
    lines = found(config, tmp_path)
    assert any(line in said for said in lines), lines
    if break_it is not _default_commands:
        assert len(lines) == 1


def test_a_missing_token_says_how_to_make_one(home: Path, tmp_path: Path) -> None:
    (home / ".ray/auth_token").unlink()
    (line,) = found(load("gpu"), tmp_path)
    assert "no ~/.ray/auth_token here; make it: ray get-auth-token --generate" in line


def _head(job: Config) -> Config:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def _worker_container(job: Config) -> Config:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group["template"]["spec"]["containers"][0]


KUBE_BROKEN: list[tuple[Callable[[Config], Any], str]] = [
    (lambda job: job["spec"].pop("entrypoint"), "a RayJob needs 'entrypoint'"),
    (lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.59.0"), "rayVersion: 2.59.0"),
    (lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"), "authOptions.mode: token"),
    (lambda job: _worker_container(job)["env"].pop(0), "RAY_AUTH_MODE is not token in ray-worker"),
    (lambda job: _worker_container(job).update(image="other"), "images differ"),
    (lambda job: _head(job).update(serviceType="LoadBalancer"), "reachable from outside"),
    (lambda job: _head(job)["template"]["spec"].pop("volumes"), "mounts runs: no such volume"),
    (lambda job: job.update(kind="RayJbo"), "ray.io/v1 RayJob is expected"),
]


@pytest.mark.parametrize(("break_it", "line"), KUBE_BROKEN)
def test_a_broken_rayjob_is_found(
    break_it: Callable[[Config], Any], line: str, tmp_path: Path
) -> None:
    documents = load("kuberay")
    break_it(documents[0])
    lines = found(documents, tmp_path)
    assert any(line in said for said in lines), lines


def test_a_claim_that_nobody_makes(tmp_path: Path) -> None:
    lines = found(load("kuberay")[:1], tmp_path)
    assert len(lines) == 2
    assert all("no PersistentVolumeClaim ray-subnets-runs in this file" in line for line in lines)


def test_not_even_yaml(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    for text, line in (("a: [", "cannot be read"), ("", "no settings"), ("- a", "no settings")):
        file.write_text(text)
        assert line in problems(file)[0]
    assert "cannot be read" in problems(tmp_path / "absent.yaml")[0]


def test_the_command(tmp_path: Path) -> None:
    """What the files tell their users to run."""
    command = [sys.executable, "-m", "ray_subnets.distributed.clusterfile"]
    for arguments, status, text in (
        (["cluster/local.yaml"], 0, "cluster/local.yaml: nothing wrong found"),
        (["cluster/local.yaml", "cluster/gpu.yaml"], 2, f"ImageId: still {PLACEHOLDER}"),
        ([], 2, "usage: python -m ray_subnets.distributed.clusterfile"),
    ):
        answer = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert answer.returncode == status, answer.stderr
        assert text in answer.stdout + answer.stderr
        assert "Traceback" not in answer.stderr


def test_versions_are_those_of_requirements() -> None:
    assert PINS["ray"] == ray.__version__
    tag = f"{PINS['ray']}-py{PYTHON.replace('.', '')}"
    for name in ("gpu", "gcp"):
        docker = load(name)["docker"]
        assert docker["image"] == f"rayproject/ray:{tag}-gpu"
        assert docker["head_image"] == f"rayproject/ray:{tag}-cpu"
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG RAY={tag}\nFROM rayproject/ray:${{RAY}}-gpu\n" in dockerfile
    job = load("kuberay")[0]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    assert f"python{PYTHON} -m venv" in " ".join(load("local")["setup_commands"])
    # torch, and Ray where no image has it, come from requirements.txt itself.
    for name in LAUNCHER:
        installs = [line for line in load(name)["setup_commands"] if "pip install" in line]
        assert "-r ~/ray_subnets_src/requirements.txt" in installs[0]
        assert "--no-deps" in installs[1]
    assert "pip install --no-cache-dir -r /home/ray/ray_subnets_src/requirements.txt" in dockerfile
    for text in [path.read_text() for path in CLUSTER.iterdir()]:
        named = re.findall(r"\b(?:torch|ray)==([\d.]+)", text)
        assert set(named) <= {PINS["torch"], PINS["ray"]}


def test_what_the_image_copies_is_there() -> None:
    for line in re.findall(
        r"^COPY --chown=\S+ (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.M
    ):
        for name in line.split():
            assert (ROOT / name).exists(), name


def test_commands_in_files_and_readme_name_things_that_exist() -> None:
    for path in CLUSTER.iterdir():
        for named in re.findall(r"-- run (\S+)|launch run (\S+)", path.read_text()):
            config = (named[0] or named[1]).strip("`")
            if config != "CONFIG":
                configfile.load(config)
        for file in re.findall(r"cluster/[\w.]+\w", path.read_text()):
            assert (ROOT / file).exists(), f"{path.name}: {file}"
