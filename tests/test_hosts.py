"""`cluster/local.yaml` with Ray's real launcher, on three hosts made here (`cluster_hosts/`)."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from cluster_hosts.derive import for_hosts
from cluster_hosts.hosts import Hosts, why_not
from tiny import numbers, run_serial

from ray_subnets import configfile
from ray_subnets.checkpoints import RunFolder

ROOT = Path(__file__).parent.parent
REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(REASON is not None, reason=f"hosts on one machine: {REASON}"),
]

COUNT_NODES = """
import time, ray
ray.init("auto", log_to_driver=False)
for _ in range(120):
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if len(alive) == 3:
        break
    time.sleep(1)
print("alive:", *sorted(alive))
"""


# Children that last long enough for every host's actor to be up before they are all done.
LONG = ["single=false", *[f"children.{i}.tune.epochs=150" for i in (1, 2)]]


@dataclass
class Laptop:
    """Where a person sits: a home with a token, the repository, the `ray` command."""

    hosts: Hosts
    file: Path
    home: Path

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        return kept | {
            "HOME": str(self.home),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": str(self.home / "tmp"),
        }

    def ray(self, *arguments: str, timeout: float = 400, **changed: str) -> tuple[int, str]:
        """Exit status and everything printed by `ray ARGUMENTS`."""
        answer = subprocess.run(
            ["ray", *arguments],
            cwd=ROOT,
            env=self.env | changed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return answer.returncode, answer.stdout

    def submit(self, *arguments: str) -> tuple[int, str]:
        return self.ray("submit", str(self.file), "ray_subnets/launch.py", *arguments)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """Three hosts, and `ray up` done on them."""
    lab = tmp_path_factory.mktemp("hosts")
    home = lab / "laptop"
    home.mkdir()
    with Hosts(3, lab) as hosts:
        file = lab / "local.yaml"
        for_hosts(ROOT / "cluster/local.yaml", file, ips=hosts.ips, key=hosts.key, venv=sys.prefix)
        person = Laptop(hosts, file, home)
        assert person.ray("get-auth-token", "--generate")[0] == 0
        status, printed = person.ray("up", str(file), "-y", "--no-config-cache")
        assert status == 0, printed
        yield person


@pytest.fixture(scope="module")
def dashboard(laptop: Laptop) -> Iterator[str]:
    """`ray dashboard`: the head's dashboard through ssh."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tunnel = subprocess.Popen(
        ["ray", "dashboard", str(laptop.file), "--port", str(port)],
        cwd=ROOT,
        env=laptop.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(tunnel.pid, 15)
        tunnel.wait()


def serial(tmp_path: Path, *overrides: str) -> Any:
    """The same run in this process."""
    folder = RunFolder.create(tmp_path / "serial")
    run_serial(configfile.load("quickstart", overrides), folder)
    return numbers(record(folder.root))


def record(folder: Path) -> dict[str, Any]:
    return RunFolder(folder).read_json("result.json")


def nodes(result: dict[str, Any]) -> set[str]:
    return {child["node"].split("/")[0] for child in result["children"]}


def test_every_host_joins(laptop: Laptop) -> None:
    """All workers, by the file alone: no variable has to be set for `ray up`."""
    answer = laptop.hosts.ssh(laptop.hosts.ips[0], f"python -c '{COUNT_NODES}'", timeout=300)
    assert f"alive: {' '.join(laptop.hosts.ips)}" in answer.stdout, answer.stdout + answer.stderr


def test_submit_with_nothing_after_it(laptop: Laptop, tmp_path: Path) -> None:
    """The quickstart, on the cluster, in the shared folder, with the numbers of one process."""
    status, printed = laptop.submit()
    assert status == 0, printed
    assert "selected ensemble" in printed
    assert "More: ray submit CLUSTER.yaml ray_subnets/launch.py -- run" in printed
    result = record(laptop.hosts.shared / "runs/quickstart")
    assert nodes(result) <= set(laptop.hosts.ips)
    assert numbers(result) == serial(tmp_path)


def test_submit_with_a_command(laptop: Laptop, tmp_path: Path) -> None:
    """A config named by its path in the repository, other settings, another folder."""
    out = "/mnt/ray_subnets/second"
    changed = ["seed=3", *LONG]
    status, printed = laptop.submit(
        *["--", "run", "configs/quickstart.yaml", *changed, "--quiet", "--out", out]
    )
    assert status == 0, printed
    assert f"Fetch it: ray rsync-down CLUSTER.yaml {out}/ runs/second/" in printed
    result = record(laptop.hosts.shared / "second")
    assert len(nodes(result)) > 1
    assert numbers(result) == serial(tmp_path, *changed)
    fetched = tmp_path / "fetched"
    assert laptop.ray("rsync-down", str(laptop.file), f"{out}/", f"{fetched}/")[0] == 0
    assert record(fetched) == result


def test_a_folder_that_other_nodes_do_not_see(laptop: Laptop) -> None:
    """The head sees it, so the run is done there alone, and says why; or, if an actor of another
    host is up before the head's, it ends with that line."""
    status, printed = laptop.submit(
        *["--", "run", "quickstart", *LONG, "--quiet", "--out", "/root/own"]
    )
    assert "Traceback" not in printed
    reason = r"--out: node [0-9.]+ does not see the run folder /root/own"
    if status != 0:
        assert re.search(f"ray-subnets: {reason}", printed)
        return
    head = laptop.hosts.ips[0]
    result = json.loads(laptop.hosts.ssh(head, "cat /root/own/result.json").stdout)
    assert nodes(result) == {head}
    assert any(re.search(reason, fault["what"]) for fault in result["faults"])
    assert ".driver-" not in laptop.hosts.ssh(head, "ls -A /root/own").stdout


def test_job_submit(laptop: Laptop, dashboard: str, tmp_path: Path) -> None:
    status, printed = laptop.ray(
        *["job", "submit", "--address", dashboard, "--"],
        *["python", "-m", "ray_subnets.launch", "run", "quickstart", "name=job", "--quiet"],
    )
    assert status == 0, printed
    result = record(laptop.hosts.shared / "runs/job")
    assert nodes(result) <= set(laptop.hosts.ips)
    assert numbers(result) == serial(tmp_path, "name=job")


def test_the_jobs_api_wants_the_token(laptop: Laptop, dashboard: str) -> None:
    """It runs whatever is sent to it."""
    token = (laptop.home / ".ray/auth_token").read_text()
    job = {"entrypoint": "touch /mnt/ray_subnets/was-here"}
    for headers in ({}, {"Authorization": f"Bearer {'0' * len(token)}"}):
        answer = requests.post(f"{dashboard}/api/jobs/", json=job, headers=headers, timeout=30)
        assert answer.status_code in (401, 403), answer.text
        assert requests.get(f"{dashboard}/api/jobs/", headers=headers, timeout=30).status_code in (
            401,
            403,
        )
    bearer = {"Authorization": f"Bearer {token}"}
    assert requests.get(f"{dashboard}/api/jobs/", headers=bearer, timeout=30).status_code == 200
    status, _ = laptop.ray(
        *["job", "submit", "--address", dashboard, "--", "touch", "/mnt/ray_subnets/was-here"],
        RAY_AUTH_MODE="disabled",
    )
    assert status != 0
    assert not (laptop.hosts.shared / "was-here").exists()


def test_the_dashboard_is_not_on_the_network(laptop: Laptop) -> None:
    with socket.socket() as probe:
        assert probe.connect_ex((laptop.hosts.ips[0], 8265)) != 0
        assert probe.connect_ex((laptop.hosts.ips[0], 22)) == 0  # the host is there


def test_the_cluster_wants_the_token(laptop: Laptop) -> None:
    """Its own port is on the network, since workers join there."""
    look = (
        "from ray._raylet import GcsClient; "
        f"print(GcsClient(address='{laptop.hosts.ips[0]}:6379').internal_kv_keys(b'', None))"
    )
    for mode, reads in (("token", True), ("disabled", False)):
        answer = subprocess.run(
            [sys.executable, "-c", look],
            env=laptop.env | {"RAY_AUTH_MODE": mode},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (answer.returncode == 0) == reads, answer.stderr
        if not reads:
            assert "auth" in answer.stderr.lower()


def test_down(laptop: Laptop) -> None:
    """Nothing of Ray is left: the head is stopped, workers leave when they miss it for a minute."""
    status, printed = laptop.ray("down", str(laptop.file), "-y")
    assert status == 0, printed
    deadline = time.monotonic() + 240
    for ip in laptop.hosts.ips:
        while "ray/core" in (left := laptop.hosts.ssh(ip, "pgrep -a 'raylet|gcs_server'").stdout):
            assert time.monotonic() < deadline, left
            time.sleep(2)
