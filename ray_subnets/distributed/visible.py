"""Does every node see the run folder? Each actor asks before it works."""

from __future__ import annotations

import time
from contextlib import suppress

import ray

from ray_subnets.checkpoints import RunFolder

_PATIENCE = 5.0  # seconds: a shared file system may show a new file late


def leave_mark(root: str) -> None:
    """Called by the driver before it starts actors: a file that only they look for."""
    RunFolder(root).write(_mark(), b"")


def take_mark(root: str) -> None:
    """Called by the driver at the end."""
    with suppress(ValueError):  # nobody will look for it
        RunFolder(root).remove(_mark())


def check_mark(root: str) -> None:
    """Called by an actor: is the driver's mark there?

    Raises:
        ValueError: it is not; this node has something else under that name, or nothing.
    """
    deadline = time.monotonic() + _PATIENCE
    while not RunFolder(root).exists(_mark()):
        if time.monotonic() > deadline:
            raise ValueError(
                f"--out: node {ray.util.get_node_ip_address()} does not see the run folder {root}; "
                "all nodes must: name a folder that they share (NFS) or a bucket, by --out or by "
                "RAY_SUBNETS_RUNS (cluster/README.md)"
            )
        time.sleep(0.2)


def _mark() -> str:
    # Known on both sides without being sent: which Ray, and which driver's job on it.
    context = ray.get_runtime_context()
    return f".driver-{context.get_session_name()}-{context.get_job_id()}"
