"""Join a Ray cluster, or start one here."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Nothing is sent home, and a GPU is claimed only by who was given one.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray
from ray._private import ray_constants

_found = {"dashboard": ""}  # HOST:PORT, while a session lasts


def _answers(address: str) -> None:
    """Does anything listen at `HOST:PORT`? Ray itself tries for minutes before it says no.

    Raises:
        OSError: nothing does. (`auto` names no place and is left to Ray.)
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _loopback() -> Iterator[None]:
    """Whatever Ray starts in here listens on 127.0.0.1 only.

    Ray does this by itself on macOS and Windows. It takes no address of 127.0.0.1 from its caller,
    but replaces it by one that others can reach.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def session(
    address: str | None = None, *, cpus: int | None = None, dashboard: bool = False
) -> Iterator[None]:
    """A connection to Ray for the length of a `with` block.

    Args:
        address: a cluster to join (`auto`, `HOST:PORT`, `ray://HOST:10001`); default the
            environment's RAY_ADDRESS. Without either a local Ray is started, which listens on
            127.0.0.1 only and (Ray's default for a local one, unless RAY_AUTH_MODE says otherwise)
            demands a token, and is stopped at the end; a Ray that somebody left behind is never
            joined.
        cpus: cores of a local Ray; default all.
        dashboard: start Ray's own dashboard with a local Ray, on this machine only.

    Raises:
        ValueError: the cluster does not answer.
    """
    if ray.is_initialized():  # a notebook, or a test, has connected already
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    address = address or os.environ.get("RAY_ADDRESS") or None
    local = address in (None, "local")
    try:
        if local:
            with _loopback():
                context = ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=dashboard,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        else:
            _answers(address or "")
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--address: no Ray cluster at {address}: {reason}; start one with 'ray start --head', "
            "or use this machine with --address local. One that was started with "
            "RAY_AUTH_MODE=token is joined with RAY_AUTH_MODE=token and its token in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    if callable(ours) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)  # Ray's would end the process at once
    _found["dashboard"] = getattr(context, "dashboard_url", None) or ""
    try:
        yield
    finally:
        _found["dashboard"] = ""
        ray.shutdown()


def has_dashboard() -> bool:
    """Is Ray's dashboard installed (`ray[default]`, our extra `dashboard`)?"""
    return all(importlib.util.find_spec(name) for name in ("aiohttp_cors", "opencensus"))


def links() -> dict[str, str]:
    """Where else to look at the cluster of this session."""
    return {"Ray's dashboard": f"http://{_found['dashboard']}"} if _found["dashboard"] else {}
