"""Asks a server of an ensemble for some seconds, in a process of its own, and checks every answer.

python -m analysis.benchmarks.serving_load URL SAMPLES.npz --seconds 20 --threads 4

SAMPLES.npz: `inputs`, float32 `(N, *shape)`, and the right `probabilities`, `(N, C)`. Prints JSON.
Needs neither torch nor this project.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-6
NPY, JSON = "application/x-npy", "application/json"


def bad_requests(inputs: NDArray[Any], max_bytes: int) -> list[tuple[str, str, bytes, str, int]]:
    """Method, path, body, type, and the status that is right for it."""
    one = inputs[:1]
    nan = one.copy()
    nan.flat[0] = np.nan
    return [
        ("POST", "/predict", b"{", JSON, 400),
        ("POST", "/predict", b'{"inputs": [[1, "a"]]}', JSON, 400),
        ("POST", "/predict", b'{"inputs": [[NaN]]}', JSON, 400),
        ("POST", "/predict", npy(one[0]), NPY, 400),
        ("POST", "/predict", npy(nan), NPY, 400),
        ("POST", "/predict", npy(one)[:-3], NPY, 400),
        ("POST", "/predict", b"a=1", "application/x-www-form-urlencoded", 415),
        ("POST", "/nothing", b"{}", JSON, 404),
        ("DELETE", "/predict", b"", JSON, 405),
        ("POST", "/predict", b" " * (max_bytes + 1), JSON, 413),
        ("POST", "/predict", b"\x00" * (3 * max_bytes), NPY, 413),
    ]


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@dataclass
class Tally:
    """What came of the requests; seconds of each that was answered."""

    right: int = 0
    samples: int = 0
    wrong: int = 0
    refused: int = 0
    """bad requests, with the right status"""
    later: int = 0
    """503: ask again"""
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name in ("right", "samples", "wrong", "refused", "later"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed.update(other.failed)
        self.seconds += other.seconds


class Client:
    """Asks one request after the other over one connection."""

    def __init__(self, url: str, inputs: NDArray[Any], right: NDArray[Any], seed: int) -> None:
        self._place = urlsplit(url).netloc
        self._inputs, self._right = inputs, right
        self._random = np.random.default_rng(seed)
        self._connection = http.client.HTTPConnection(self._place, timeout=120)
        self.tally = Tally()

    def _ask(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
        try:
            self._connection.request(method, path, body, {"Content-Type": kind})
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def good(self, count: int) -> None:
        """`count` samples at random, as text or as a file."""
        rows = self._random.integers(0, len(self._inputs), count)
        if self._random.random() < 0.5:
            body, kind = npy(self._inputs[rows]), NPY
        else:
            body, kind = json.dumps({"inputs": self._inputs[rows].tolist()}).encode(), JSON
        began = time.perf_counter()
        try:
            status, text = self._ask("POST", "/predict", body, kind)
        except (OSError, http.client.HTTPException) as error:
            self.tally.failed[type(error).__name__] += 1
            return
        took = time.perf_counter() - began
        if status == 503:
            self.tally.later += 1
            time.sleep(0.2)
        elif status != 200:
            self.tally.failed[f"status {status}"] += 1
        else:
            found = np.array(json.loads(text)["probabilities"])
            if np.abs(found - self._right[rows]).max() > TOLERANCE:
                self.tally.wrong += 1
            else:
                self.tally.right += 1
                self.tally.samples += count
                self.tally.seconds.append(took)

    def bad(self, method: str, path: str, body: bytes, kind: str, right: int) -> None:
        """A request that must be refused with this status, in one line."""
        try:
            status, text = self._ask(method, path, body, kind)
        except (OSError, http.client.HTTPException) as error:
            self.tally.failed[f"bad: {type(error).__name__}"] += 1
            return
        line = str(json.loads(text)["error"])
        if status == right and "\n" not in line and "Traceback" not in line:
            self.tally.refused += 1
        elif status == 503:
            self.tally.later += 1
        else:
            self.tally.failed[f"status {status} for {right}"] += 1

    def run(self, seconds: float, most: int, bad: list[tuple[str, str, bytes, str, int]]) -> None:
        end, i = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            if bad and i % 10 == 9:
                self.bad(*bad[self._random.integers(len(bad))])
            else:
                self.good(int(self._random.integers(1, most + 1)))
            i += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("samples")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--most", type=int, default=8, help="samples in a request")
    parser.add_argument("--bad", type=int, default=0, metavar="BYTES", help="bad requests too")
    options = parser.parse_args()
    with np.load(options.samples, allow_pickle=False) as file:
        inputs, right = file["inputs"], file["probabilities"]
    bad = bad_requests(inputs, options.bad) if options.bad else []
    clients = [Client(options.url, inputs, right, seed) for seed in range(options.threads)]
    threads = [
        threading.Thread(target=client.run, args=(options.seconds, options.most, bad))
        for client in clients
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Tally()
    for client in clients:
        total.add(client.tally)
    took = time.monotonic() - began
    p50, p99 = np.percentile(total.seconds, [50, 99]) if total.seconds else (np.nan, np.nan)
    print(
        json.dumps(
            {
                "right": total.right,
                "wrong": total.wrong,
                "refused": total.refused,
                "later": total.later,
                "failed": dict(total.failed),
                "requests_per_second": (total.right + total.refused) / took,
                "samples_per_second": total.samples / took,
                "p50_ms": 1000 * float(p50),
                "p99_ms": 1000 * float(p99),
                "max_ms": 1000 * max(total.seconds, default=float("nan")),
            }
        )
    )


if __name__ == "__main__":
    main()
