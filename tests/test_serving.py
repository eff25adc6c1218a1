"""`ray-subnets serve` for real: asked by other processes, bad requests, dying replicas."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import Command

import ray_subnets as rs
from analysis.benchmarks import serving
from analysis.benchmarks.serving_load import npy
from ray_subnets import datasets

SECONDS = float(os.environ.get("SERVING_SECONDS", "20"))
"""of load in each test; SERVING_SECONDS=180 for minutes"""
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    data = datasets.load("digits")
    return serving.seen(data, data.test)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> rs.Ensemble:
    return serving.trained(tmp_path_factory.mktemp("made") / "ensemble")


@pytest.fixture(scope="module")
def folder(ensemble: rs.Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "ensemble"
    ensemble.save(place)
    return place


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no such folder"),
        (["FOLDER", "--cascade"], "cascade.json"),
        (["FOLDER", "--model", "nowhere:build"], "--model: cannot import 'nowhere:build'"),
        (["FOLDER", "--port", "1", "--host", "203.0.113.1"], "--port: 203.0.113.1:1 cannot"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    command: Command, folder: Path, arguments: list[str], says: str
) -> None:
    answer = command("serve", *(str(folder) if one == "FOLDER" else one for one in arguments))
    assert answer.returncode == 2
    assert says in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "starting Ray" not in answer.stderr


def test_who_sent_what_networks_do_not_take_is_told_and_nobody_else(
    ensemble: rs.Ensemble, inputs: torch.Tensor
) -> None:
    """In this process: requests that a replica answers together."""
    from ray_subnets.distributed import serving as replicas
    from ray_subnets.serving.requested import Refused

    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x > 1e6).any():
                raise IndexError("index out of range in self\nand more")
            return x.flatten(1)[:, :3]

    one = object.__new__(replicas.Replica)
    one._batch, one._preprocess = 8, ensemble.preprocess
    one._what = rs.Ensemble([Picky()], ids=["a"], preprocess=ensemble.preprocess)
    good, bad = inputs[:2].numpy(), inputs[:1].numpy() + 1e7
    answers = one._answered([good, bad, good[:1]])
    assert [one["class"].tolist() for one in (answers[0], answers[2])] == [
        inputs[:2].flatten(1)[:, :3].argmax(1).tolist(),
        inputs[:1].flatten(1)[:, :3].argmax(1).tolist(),
    ]
    assert set(answers[1]) == {"refused"}

    async def ask(part: np.ndarray[Any, Any]) -> dict[str, Any]:
        return one._answered([part])[0]

    service = replicas.Service(handle=None, batch=8)
    service._ask = ask  # type: ignore[method-assign]
    assert asyncio.run(service.ask(good))["class"].shape == (2,)
    with pytest.raises(Refused, match=r"do not take them: index out of range in self$") as refused:
        asyncio.run(service.ask(bad))
    assert refused.value.status == 422


LISTENING = """
import psutil, sys
own = psutil.Process(int(sys.argv[1]))
for process in [own, *own.children(recursive=True)]:
    for place in process.net_connections("tcp"):
        if place.status == psutil.CONN_LISTEN:
            print(process.name().split()[0], place.laddr.ip)
"""


def test_a_server_listens_on_this_machine_only_and_ends_when_asked_to(folder: Path) -> None:
    """Its replicas too: what Ray Serve is sent there it unpickles."""
    pytest.importorskip("psutil")
    line = [sys.executable, "-m", "ray_subnets", "serve", str(folder), "--model", "my_nets:build"]
    served = json.loads((folder / "ensemble.json").read_text())["model"]["name"]
    line = line[:-2] if served != "given" else line
    process = subprocess.Popen(
        [*line, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        while "Serving" not in said:
            said = process.stdout.readline()
            assert said or process.poll() is None
        answer = subprocess.run(
            [sys.executable, "-c", LISTENING, str(process.pid)], capture_output=True, text=True
        )
        places = [tuple(one.split()) for one in answer.stdout.splitlines()]
        assert any("Replica" in name for name, _ in places), places
        loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        assert not [one for one in places if one[1] not in loopback]
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=60)
    assert "Stopped." in rest


def test_what_a_cascade_says(ensemble: rs.Ensemble, inputs: torch.Tensor) -> None:
    """In this process: names and shapes are those of the README."""
    from ray_subnets.distributed.serving import predict

    whole = predict(ensemble, inputs[:5], 2)
    assert {name: value.shape for name, value in whole.items()} == {
        "class": (5,),
        "probabilities": (5, 10),
        "entropy": (5,),
        "mutual_information": (5,),
        "disagreement": (5,),
    }
    said = ensemble.predict(inputs[:5])
    np.testing.assert_allclose(whole["entropy"], said.entropy.numpy(), atol=1e-6)
    cascade = rs.Cascade(ensemble, 0.5)
    short = predict(cascade, inputs[:5], 2)
    assert list(short) == ["class", "probabilities", "entropy", "asked"]
    assert (short["asked"] <= len(ensemble)).all()


def test_a_network_that_the_folder_cannot_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--model` names a function that does, and replicas get the network without its weights."""
    from ray_subnets.commands.serve import _blueprint
    from ray_subnets.distributed.serving import What

    (tmp_path / "served_nets.py").write_text(
        "import torch\n\n\ndef build(num_classes):\n    return torch.nn.Linear(4, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    given = torch.nn.Linear(4, 3)
    made = rs.ensemble(
        given,
        (x, y),
        (x, y),
        method=rs.Noisy(sigma=0.1, mask_classifier=True),
        children=2,
        progress=False,
    )
    made.save(tmp_path / "saved")
    run = str(tmp_path / "saved")
    with pytest.raises(ValueError, match="given in Python"):
        What(run).load()
    served = What(run, model=_blueprint(run, "served_nets:build"), on_demand=True).load()
    assert torch.equal(served(x), made(x))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[serving.Server]:
    size = str(serving.MAX_BYTES / 1e6)
    options = ("--replicas", "2", "--max-batch", "16", "--max-mb", size)
    with serving.server(folder, *options) as server:
        yield server
    assert server.process.returncode == 0  # after Ctrl-C


def ask(url: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes]:
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=120)) as connection:
        headers = {"Content-Type": kind}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.cluster
def test_the_answers_are_those_of_the_ensemble(
    served: serving.Server, ensemble: rs.Ensemble, inputs: torch.Tensor
) -> None:
    said = ensemble.predict(inputs[:100])  # more than one batch
    status, text = ask(served.url, "/predict", npy(inputs[:100].numpy()), "application/x-npy")
    assert status == 200
    found = json.loads(text)
    assert found["class"] == said.classes.tolist()
    for name in ("probabilities", "entropy", "mutual_information", "disagreement"):
        np.testing.assert_allclose(found[name], getattr(said, name).numpy(), atol=1e-6)
    status, text = ask(served.url, "/info")
    about = json.loads(text)
    assert (about["input_shape"], about["classes"], len(about["members"])) == ([1, 8, 8], 10, 8)
    assert about["accepts"] == ["inputs"]
    assert json.loads(ask(served.url, "/health")[1]) == {"status": "ok", "replicas": 2}


@pytest.mark.cluster
def test_load_with_bad_requests_and_a_killed_replica(
    served: serving.Server, ensemble: rs.Ensemble, inputs: torch.Tensor, tmp_path: Path
) -> None:
    serving.samples_of(ensemble, inputs, tmp_path / "samples.npz")
    before = {replica.pid for replica in served.replicas()}
    found = serving.under_faults(served, tmp_path / "samples.npz", SECONDS, 2)
    print(found)
    assert found["wrong"] == 0
    assert found["failed"] == {}
    assert found["right"] > 5 * SECONDS
    assert found["refused"] > 0
    assert served.process.poll() is None
    assert served.health() == 2
    assert {replica.pid for replica in served.replicas()} != before


@pytest.mark.cluster
def test_no_replica_is_left_for_a_moment(
    served: serving.Server, ensemble: rs.Ensemble, inputs: torch.Tensor
) -> None:
    """All of them die: the answer is late, or a 503, and right again afterwards."""
    for replica in served.replicas():
        replica.kill()
    right = ensemble.predict(inputs[:1]).probabilities.numpy()
    for _ in range(600):
        status, text = ask(served.url, "/predict", npy(inputs[:1].numpy()), "application/x-npy")
        assert status in (200, 503), text
        if status == 200:
            break
    np.testing.assert_allclose(json.loads(text)["probabilities"], right, atol=1e-6)


@pytest.mark.cluster
def test_a_server_that_is_terminated_leaves_nothing(folder: Path) -> None:
    with serving.server(folder) as server:
        family = serving.family(server.process.pid)
        assert len(family) > 3
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        assert not [process for process in family if process.is_running()]


@pytest.mark.cluster
def test_the_benchmark_prints_its_table(folder: Path) -> None:
    command = [sys.executable, "-m", "analysis.benchmarks.serving", "--seconds", "9"]
    answer = subprocess.run(
        [*command, "--replicas", "1"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "One plain forward" in answer.stdout
