"""Who can reach a Ray that we start, and what it says to strangers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# In processes of their own: the suite has token authentication off, and these must start with it.
LOCAL = """
import json, sys, ray
from ray_subnets.distributed import cluster

with cluster.session(cpus=1):
    import psutil  # Ray brings it along

    @ray.remote
    class Worker:
        def ready(self):
            return True

    worker = Worker.remote()
    assert ray.get(worker.ready.remote())
    own = psutil.Process()
    sockets = sorted(
        (process.name(), place.laddr.ip)
        for process in [own, *own.children(recursive=True)]
        for place in process.net_connections("tcp")
        if place.status == psutil.CONN_LISTEN
    )
    gcs = ray.get_runtime_context().gcs_address
    print(json.dumps({"sockets": sockets, "gcs": gcs}), flush=True)
    sys.stdin.readline()
"""

DASHBOARD = """
import json, sys, ray
from ray_subnets.distributed.cluster import _loopback

with _loopback():
    context = ray.init("local", num_cpus=1, include_dashboard=True, log_to_driver=False)
print(json.dumps({"url": context.dashboard_url}), flush=True)
sys.stdin.readline()
"""

ASK_GCS = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None))
"""


class Started:
    """A script in a process; what it printed first; ended at the end."""

    def __init__(self, script: str, home: Path) -> None:
        unset = ("RAY_AUTH_MODE", "RAY_ADDRESS")
        self.env = {k: v for k, v in os.environ.items() if k not in unset} | {"HOME": str(home)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.communicate("\n", timeout=60)


def ask_gcs(address: str, env: dict[str, str], mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ASK_GCS, address],
        env=env | {"RAY_AUTH_MODE": mode},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_local_ray_listens_on_this_machine_only_and_wants_its_token(tmp_path: Path) -> None:
    started = Started(LOCAL, tmp_path)
    with started as said:
        names = {name for name, _ in said["sockets"]}
        assert {"gcs_server", "raylet"} <= names, said
        loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        assert not [socket for socket in said["sockets"] if socket[1] not in loopback]
        assert (tmp_path / ".ray/auth_token").stat().st_size > 30
        stranger = ask_gcs(said["gcs"], started.env, "disabled")
        assert stranger.returncode != 0
        assert "auth" in stranger.stderr.lower()
        owner = ask_gcs(said["gcs"], started.env, "token")
        assert owner.returncode == 0, owner.stderr


@pytest.mark.cluster
def test_the_jobs_api_refuses_who_has_no_token(tmp_path: Path) -> None:
    """It runs what is sent to it, so this is the lock on the door."""
    import requests

    with Started(DASHBOARD, tmp_path) as said:
        host, _, _ = said["url"].partition(":")
        assert host == "127.0.0.1"
        jobs = f"http://{said['url']}/api/jobs/"
        token = (tmp_path / ".ray/auth_token").read_text()
        witness = tmp_path / "was-here"
        job = {"entrypoint": f"touch {witness}"}
        for headers in ({}, {"Authorization": f"Bearer {'0' * len(token)}"}):
            answers = (
                requests.post(jobs, json=job, headers=headers, timeout=60),
                requests.get(jobs, headers=headers, timeout=60),
            )
            assert {answer.status_code for answer in answers} <= {401, 403}
        bearer = {"Authorization": f"Bearer {token}"}
        owner = requests.get(jobs, headers=bearer, timeout=60)
        assert [job["type"] for job in owner.json()] == ["DRIVER"]  # the script itself
        assert not witness.exists()
