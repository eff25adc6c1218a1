"""Strictness for the whole suite, and the runs that many tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports ray: no tokens written to the user's home, nothing sent home.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# At Ray's 15 anything else on the machine starves them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ.pop("RAY_ADDRESS", None)

import torch

torch.use_deterministic_algorithms(True)

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Command:
    """The real command line in a process of its own: `command("run", "quickstart", cwd=path)`."""

    def run(
        *args: str, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray_subnets.launch", *args],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        )

    return run
