"""Where run folders lie: paths, URIs, a real S3 server; what is said when they cannot be used."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from s3 import BUCKET, Server, server
from test_run import Stop
from tiny import TINY, equal, numbers, run_serial, tiny

import ray_subnets
from analysis import seeds
from ray_subnets import evaluation, launch, report, storage
from ray_subnets.checkpoints import RunFolder, WriteFailed, runs
from ray_subnets.recipes import Epoch


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file; the environment says how to reach it."""
    with server(tmp_path_factory.mktemp("s3")) as one, pytest.MonkeyPatch.context() as patch:
        for name, value in one.environment.items():
            patch.setenv(name, value)
        yield one


@pytest.fixture(params=["path", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new place of every kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {
        "path": f"{tmp_path}/run",
        "file": f"file://{tmp_path}/run",
        "memory": f"fsspec+memory://{tmp_path.name}/run",
        "s3": f"s3://{BUCKET}/{tmp_path.name}/run",
    }[str(request.param)]


def test_a_folder_of_any_kind(root: str) -> None:
    """The same calls do the same everywhere."""
    folder = RunFolder.create(root)
    assert folder.name == "run"
    with pytest.raises(ValueError, match=r"no such folder|not a run folder"):
        RunFolder.open(root)
    stored = folder.write("children/a.bin", b"old")
    assert folder.write("children/a.bin", b"new" * 10**6).sha256 != stored.sha256
    assert folder.read("children/a.bin") == b"new" * 10**6
    with pytest.raises(ValueError, match=r"children/a\.bin.*SHA-256"):
        folder.read(stored)
    assert folder.size("children/a.bin") == 3 * 10**6
    assert not folder.exists("children")
    assert not folder.exists("children/b.bin")
    with pytest.raises(ValueError, match=r"children/b\.bin: cannot be read \(no such file|No such"):
        folder.read("children/b.bin")
    folder.remove("children/a.bin")
    folder.remove("children/a.bin")
    assert not folder.exists("children/a.bin")
    folder.write("config.yaml", b"name: a")
    assert RunFolder.open(root).read("config.yaml") == b"name: a"
    with pytest.raises(ValueError, match=r"already used.*--overwrite"):
        RunFolder.create(root)
    if root.startswith(("s3", "fsspec")):
        with pytest.raises(ValueError, match="needs a folder on this machine"):
            _ = RunFolder(root).root
    with pytest.raises(ValueError, match=r"not a run folder.*nothing was deleted"):
        RunFolder.create(root, overwrite=True)  # anybody may have a config.yaml
    folder.write_json("environment.json", {"packages": {"ray_subnets": "0.2.0"}})
    with pytest.raises(ValueError, match=r"a run's folder, not a sweep's; nothing was deleted"):
        RunFolder.create(root, overwrite=True, wanted="sweep")
    again = RunFolder.create(root, overwrite=True)
    assert not again.exists("config.yaml")
    again.write("mine.txt", b"years of work")
    with pytest.raises(ValueError, match=r"not a run folder.*nothing was deleted"):
        RunFolder.create(root, overwrite=True)
    parent, name = root.rsplit("/", 1)
    assert runs(parent, name) == []
    again.write("result.json", b"{}")
    assert runs(parent, "r*") == [str(again)]


def test_who_may_read_files_is_what_the_user_says(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o077)\n"
        "from ray_subnets.checkpoints import RunFolder\n"
        "RunFolder.create(sys.argv[1]).write('config.yaml', b'')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)
    assert (tmp_path / "run/config.yaml").stat().st_mode & 0o777 == 0o600


def test_a_query_stays_behind_the_path(s3: Server) -> None:
    """`?endpoint_override=...` instead of the environment; joined paths keep it at their end."""
    query = f"?endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    folder = RunFolder.create(f"s3://{BUCKET}/query/run/{query}")
    folder.write("config.yaml", b"x")
    assert folder.path("config.yaml") == f"s3://{BUCKET}/query/run/config.yaml{query}"
    assert str(folder) == f"s3://{BUCKET}/query/run{query}"
    assert folder.name == "run"
    assert RunFolder(str(folder)).read("config.yaml") == b"x"
    assert RunFolder(f"s3://{BUCKET}/query/run").read("config.yaml") == b"x"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("ftp://host/run", "unknown kind of storage; use a path, or s3://"),
        (f"s3://{BUCKET}/a b", "Cannot parse URI"),
        (f"s3://{BUCKET}/run?speed=high", "Unexpected query parameter.*speed"),
        ("s3:///run", "Missing bucket name"),
        ("s3://no-such-bucket/run", "no such bucket, create it first"),
    ],
)
def test_a_bad_address_is_one_line(s3: Server, uri: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        RunFolder.check_free(uri)
    assert uri.split("?")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_access_denied_is_one_line(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ValueError, match=r"access denied.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        RunFolder.check_free(f"s3://{BUCKET}/denied")
    with pytest.raises(WriteFailed, match=r"denied/a: cannot be written \(access denied"):
        RunFolder(f"s3://{BUCKET}/denied").write("a", b"")


def test_credentials_in_an_address_are_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    address = "s3://KEY:hush/hush@bucket/run"
    for line in (["run", "quickstart", "--serial", "--out", address], ["resume", address]):
        monkeypatch.setattr(sys, "argv", ["ray-subnets", *line])
        assert launch.main() == 2
        said = capsys.readouterr()
        assert "leave user and password out of the address" in said.err
        assert "hush" not in said.out + said.err
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"the server does not answer.*AWS_ENDPOINT_URL"):
        RunFolder.check_free(f"s3://{BUCKET}/run")
    assert time.monotonic() - began < 30


@pytest.mark.cluster
def test_a_server_that_says_nothing_is_given_up() -> None:
    """It accepts the connection; pyarrow's own limits would wait without end."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        where = f"endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=x"
        began = time.monotonic()
        with pytest.raises(ValueError, match="the server does not answer"):
            RunFolder.check_free(f"s3://{BUCKET}/run?{where}")
        assert time.monotonic() - began < 120


@pytest.mark.cluster
def test_a_whole_run_on_s3(s3: Server, tmp_path: Path) -> None:
    """Run, stop, resume, load, evaluate, report: the numbers of a local run."""
    local = RunFolder.create(tmp_path / "run")
    expected = run_serial(tiny(), local)
    folder = RunFolder.create(f"s3://{BUCKET}/runs/tiny")

    def stop(report: object) -> None:
        if isinstance(report, Epoch) and (report.id, report.epoch) == ("sparse-001", 1):
            raise Stop

    with pytest.raises(Stop):
        run_serial(tiny(), folder, listen=stop)
    assert folder.exists("checkpoints/sparse-001.safetensors")
    assert not folder.exists("result.json")
    seen: list[Any] = []
    assert numbers(run_serial(tiny(), folder, listen=seen.append)) == numbers(expected)
    assert next(r.epoch for r in seen if isinstance(r, Epoch) and r.id == "sparse-001") == 2
    assert folder.read_json("result.json")["ensemble"] == expected["ensemble"]
    for name in ("parent.safetensors", "children/stochastic-001.safetensors"):
        assert equal(folder.load_tensors(name), local.load_tensors(name))
    assert len(ray_subnets.load(str(folder))) == 6
    assert evaluation.evaluate(str(folder)).difference <= 1e-6
    assert report.write(folder) == f"s3://{BUCKET}/runs/tiny/report.html"
    assert folder.read("report.html").startswith(b"<!doctype html>")
    assert runs(f"s3://{BUCKET}/runs", "t*") == [str(folder)]
    assert seeds.records([str(folder)])[0]["name"] == "tiny"


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_line_on_s3_and_ray(
    s3: Server, tmp_path: Path, command: Command, workers: int
) -> None:
    """Actors write to S3; so do the workers of a parent on two devices."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    where = f"s3://{BUCKET}/cli-{workers}/tiny"
    settings = [f"parent.workers={workers}", "resources.actors=2"]

    def run(*line: str) -> subprocess.CompletedProcess[str]:
        done = command(*line, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    assert f"{where}/report.html" in run("run", "tiny.yaml", *settings, "--out", where).stdout
    run("run", "tiny.yaml", *settings, "--out", "local")
    record = RunFolder(where).read_json("result.json")
    assert numbers(record) == numbers(RunFolder(tmp_path / "local").read_json("result.json"))
    names = {"parent", "single", *(child["id"] for child in record["children"])}
    assert set(storage.place(f"{where}/events").folders()) == names
    if workers > 1:
        return
    assert "gives the recorded numbers" in run("evaluate", where).stdout
    assert run("report", where).stdout.strip() == f"{where}/report.html"
    used = command("run", "tiny.yaml", "--out", where, cwd=tmp_path)
    assert used.returncode == 2
    assert f"resume {where}" in used.stderr
    for folder in (where, "local"):
        run("grow", folder, "--to", "6", "--group", "sparse", "--serial", "-q")
    grown = RunFolder(where).read_json("result.json")
    assert len(grown["children"]) == 12
    assert numbers(grown) == numbers(RunFolder(tmp_path / "local").read_json("result.json"))
    run("run", "tiny.yaml", *settings, "--out", where, "--overwrite", "--serial", "-q")
    assert len(RunFolder(where).read_json("result.json")["children"]) == 8


@pytest.mark.cluster
def test_a_killed_driver_is_continued_on_s3(s3: Server, tmp_path: Path, command: Command) -> None:
    """kill -9 in the middle of a write or between: what is there is whole, and resume goes on."""
    expected = run_serial(tiny("parent.epochs=40"), RunFolder.create(tmp_path / "local"))
    (tmp_path / "tiny.yaml").write_text(TINY)
    where = f"s3://{BUCKET}/killed/tiny"
    line = [sys.executable, "-m", "ray_subnets.launch", "run", "tiny.yaml", "parent.epochs=40"]
    driver_ = subprocess.Popen(
        [*line, "--serial", "-q", "--out", where], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not RunFolder(where).exists("checkpoints/parent.safetensors"):
        assert time.monotonic() < until
        time.sleep(0.05)
    driver_.kill()
    assert driver_.wait() == -9
    done = command("resume", where, "--serial", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert RunFolder(where).read_json("result.json")["ensemble"] == expected["ensemble"]
