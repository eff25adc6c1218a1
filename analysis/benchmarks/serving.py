"""A server of an ensemble under load: is every answer right, how long does it take?

make bench            # or: python -m analysis.benchmarks.serving [--seconds 60] [--replicas 2]

Starts `ray-subnets serve` on an ensemble of eight children (scikit-learn's digits, an MLP of 64 +
64 units), asks it from a second process, checks every answer against the same ensemble
in this process, and compares latency with one plain forward pass. Then the same with bad and huge
requests in between while a replica is killed. Exit code 1 if an answer was wrong or it fell.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

import ray_subnets as rs
from analysis.benchmarks.processes import command_line, family
from ray_subnets import datasets
from ray_subnets.data import Data, Split

MAX_BYTES = 2_000_000


def seen(data: Data, split: Split) -> torch.Tensor:
    """Images as the network sees them."""
    assert isinstance(split.images, torch.Tensor)
    return data.preprocess(split.images)


def trained(folder: Path) -> rs.Ensemble:
    """An ensemble of eight, four noisy and four sparse."""
    data = datasets.load("digits")
    made = rs.ensemble(
        {"name": "mlp", "hidden": [64, 64]},
        (seen(data, data.train), data.train.labels),
        (seen(data, data.validation), data.validation.labels),
        method=[rs.Noisy(sigma=0.02, count=4), rs.Sparse(sparsity=0.5, partition=2, count=4)],
        parent=rs.Training(epochs=5, lr=0.05),
        tune=rs.OneCycle(epochs=1, lr=0.05),
        progress=False,
    )
    made.save(folder)
    return made


@dataclass(frozen=True)
class Server:
    """`ray-subnets serve` in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    def health(self) -> int:
        """Replicas that can answer; -1 if the server does not."""
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request("GET", "/health")
            return int(json.loads(connection.getresponse().read())["replicas"])
        except (OSError, HTTPException):
            return -1
        finally:
            connection.close()

    def replicas(self) -> list[psutil.Process]:
        """Their processes."""
        return [p for p in family(self.process.pid) if "ServeReplica" in command_line(p)]


@contextmanager
def server(run: str | Path, *options: str, seconds: float = 240) -> Iterator[Server]:
    """A server for the length of a `with` block, ended as by Ctrl-C.

    Args:
        options: of the command.
        seconds: until it must be up, and must be gone.
    """
    command = [sys.executable, "-m", "ray_subnets.launch", "serve", str(run), "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert process.stdout
        try:
            line = process.stdout.readline()
            if not line.startswith("Serving: "):
                said.seek(0)
                raise RuntimeError(f"the server did not start: {said.read()}")
            yield Server(process, line.split()[1])
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def load(url: str, samples: Path, *options: str) -> subprocess.Popen[str]:
    """`serving_load` in a process of its own."""
    command = [sys.executable, "-m", "analysis.benchmarks.serving_load", url, str(samples)]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    found: dict[str, Any] = json.loads(text)
    return found


def under_faults(served: Server, samples: Path, seconds: float, replicas: int) -> dict[str, Any]:
    """Bad and huge requests beside good ones; a replica is killed after a third of the time.

    Adds `back_after`: seconds until as many replicas as before answered.
    """
    asking = load(
        served.url, samples, "--seconds", str(seconds), "--bad", str(MAX_BYTES), "--threads", "4"
    )
    time.sleep(seconds / 3)
    victim = served.replicas()[0]
    victim.kill()
    began = time.monotonic()
    while served.health() >= replicas and time.monotonic() - began < 30:
        time.sleep(0.2)  # until it is noticed
    while served.health() < replicas and time.monotonic() - began < 180:
        time.sleep(0.2)
    back = time.monotonic() - began
    return outcome(asking) | {"back_after": back}


def plain(ensemble: rs.Ensemble, x: torch.Tensor, repeats: int = 300) -> tuple[float, float]:
    """p50 and p99 of `ensemble.predict` of one sample in this process, milliseconds."""
    times = []
    for i in range(repeats):
        one = x[i % len(x)][None]
        began = time.perf_counter()
        ensemble.predict(one)
        times.append(1000 * (time.perf_counter() - began))
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


def samples_of(ensemble: rs.Ensemble, x: torch.Tensor, file: Path) -> None:
    """What `serving_load` reads."""
    right = ensemble.predict(x).probabilities
    np.savez(file, inputs=x.numpy(), probabilities=right.numpy())


def measure(options: argparse.Namespace, root: Path) -> bool:
    """Everything; did it hold?"""
    torch.set_num_threads(1)
    ensemble = trained(root / "ensemble")
    data = datasets.load("digits")
    inputs = seen(data, data.test)
    samples_of(ensemble, inputs, root / "samples.npz")
    console = Console(width=110)
    rows: list[tuple[str, dict[str, Any]]] = []
    alone = plain(ensemble, inputs)
    arguments = ["--replicas", str(options.replicas), "--max-mb", str(MAX_BYTES / 1e6)]
    with server(root / "ensemble", *arguments) as served:
        for threads, most in ((1, 1), (4, 1), (16, 1), (4, 64)):
            asked = load(
                *(served.url, root / "samples.npz", "--seconds", str(options.seconds / 6)),
                *("--threads", str(threads), "--most", str(most)),
            )
            what = f"{threads} client{'s' * (threads > 1)}, "
            what += "1 sample each" if most == 1 else f"1 to {most} samples each"
            rows.append((what, outcome(asked)))
        faults = under_faults(served, root / "samples.npz", options.seconds, options.replicas)
        rows.append(("4 clients, bad requests, a replica killed", faults))
        fell = served.process.poll() is not None
    left = served.process.returncode
    table = Table(title=f"{len(ensemble)} members, {options.replicas} replicas, one thread each")
    for column in ("load", "p50 ms", "p99 ms", "max ms", "samples/s", "right", "wrong", "refused"):
        table.add_column(column, justify="left" if column == "load" else "right")
    table.add_column("503")
    table.add_column("failed")
    for name, found in rows:
        table.add_row(
            name,
            *(f"{found[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms")),
            f"{found['samples_per_second']:.0f}",
            *(f"{found[key]:,}" for key in ("right", "wrong", "refused", "later")),
            ", ".join(f"{what}: {n}" for what, n in found["failed"].items()) or "0",
        )
    console.print(table)
    console.print(
        f"One plain forward of the ensemble in a process: p50 {alone[0]:.2f} ms, p99 "
        f"{alone[1]:.2f} ms. The killed replica was replaced after {faults['back_after']:.1f} s; "
        f"exit code after Ctrl-C: {left}."
    )
    whole = all(not found["wrong"] and not found["failed"] for _, found in rows)
    return whole and not fell and left == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sys.exit(not measure(options, Path(root)))


if __name__ == "__main__":
    main()
