"""`ray-subnets dashboard`: what runs and sweeps write about themselves, for this machine only.

The pages are files that they rewrite; this serves them, lists them, and starts TensorBoard beside
them where it is installed. Standard library only; nothing is written and nothing is run from here.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ray_subnets import pages

PORT = 8271
FILES = {
    "sweep.html": "text/html; charset=utf-8",
    "sweep.json": "application/json",
    "benchmark.html": "text/html; charset=utf-8",
    "report.html": "text/html; charset=utf-8",
}
"""what may be asked for, nothing else"""
_PAGES = [name for name in FILES if name.endswith(".html")]
_NAMES = ("localhost", "127.0.0.1")


def folders(root: Path) -> list[dict[str, Any]]:
    """Runs, sweeps and benchmarks in a folder, the newest first: name, kind, state and pages.

    Args:
        root: a folder of them, or one of them.
    """
    found = []
    inside = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for path in [root, *inside]:
        if not (path / "config.yaml").is_file():
            continue
        sweep = _record(path / "sweep.json")
        kind = "sweep" if sweep else "run"
        if (path / "benchmark.json").is_file():
            kind = "benchmark"
        done = any((path / name).is_file() for name in ("result.json", "benchmark.html"))
        state = str(sweep.get("state", "?")) if sweep else "finished" if done else "not finished"
        what, where = (
            ("cells", "cells/*/ensemble.json")
            if kind == "benchmark"
            else ("networks", "results/*.json")
        )
        found.append(
            {
                "name": path.name,
                "at": "." if path == root else quote(path.name),
                "kind": kind,
                "state": state,
                "detail": _counted(sweep)
                if sweep
                else f"{len(list(path.glob(where)))} {what} done",
                "links": _web(sweep.get("links", {})),
                "pages": [page for page in _PAGES if (path / page).is_file()],
                "time": max(
                    (file.stat().st_mtime for file in path.iterdir() if file.is_file()), default=0
                ),
            }
        )
    return sorted(found, key=lambda one: -one["time"])


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _counted(sweep: Mapping[str, Any]) -> str:
    statuses = [trial["status"] for trial in sweep.get("trials", ())]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trials yet"


def _web(links: Mapping[str, str]) -> dict[str, str]:
    return {name: url for name, url in links.items() if url.startswith(("http://", "https://"))}


def _page(root: Path, links: Mapping[str, str]) -> bytes:
    page = pages.render("dashboard.html", root=str(root), folders=folders(root), links=links)
    return page.encode()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in _NAMES:  # another site's name that points here
            self._answer(403, b"this page answers to localhost only\n", "text/plain")
            return
        parts = [part for part in unquote(urlsplit(self.path).path).split("/") if part != ""]
        if not parts:
            page = _page(self.server.root, self.server.links)
            self._answer(200, page, "text/html; charset=utf-8")
            return
        *above, name = parts
        inside = not above or above == ["."] or (len(above) == 1 and above[0] not in ("..", "~"))
        path = self.server.root.joinpath(*above, name)
        if name in FILES and inside and path.resolve().is_relative_to(self.server.root.resolve()):
            try:
                self._answer(200, path.read_bytes(), FILES[name])
                return
            except OSError:
                pass
        self._answer(404, b"no such page\n", "text/plain")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


class Server(ThreadingHTTPServer):
    """The pages of a folder, on this machine only.

    Args:
        port: 0 for any that is free.

    Raises:
        ValueError: there is no such folder, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, root: str | Path, port: int = PORT) -> None:
        self.root, self.links = Path(root), dict[str, str]()
        if not self.root.is_dir():
            raise ValueError(f"FOLDER: no such folder: {root}")
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"--port: {port} cannot be used ({reason}); name another") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def tensorboard(root: Path, port: int) -> Iterator[str | None]:
    """TensorBoard over a folder while a `with` block lasts; its address, None if not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        yield None
        return
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(root)),
            *("--host", "127.0.0.1", "--port", str(port), "--reload_interval", "5"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
