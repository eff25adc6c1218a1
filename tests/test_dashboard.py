"""The dashboard: what it lists and serves, to whom; and Grafana's panels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command
from test_errors import must_say, the_line

from ray_subnets.distributed import instruments, sweepgauges
from ray_subnets.sweeps.dashboard import Server, folders

GRAFANA = Path(__file__).parent.parent / "cluster/grafana.json"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for name in ("a run", "sweep"):
        (root / name / "results").mkdir(parents=True)
        (root / name / "config.yaml").write_text("name: x\n")
    (root / "a run/results/parent.json").write_text("{}")
    (root / "a run/parent.safetensors").write_text("weights")
    (root / "a run/report.html").write_text("<p>report</p>")
    links = {"Ray's dashboard": "http://127.0.0.1:8265", "bad": "javascript:alert(1)"}
    trials = [{"status": "done"}, {"status": "running"}, {"status": "done"}]
    record = {"state": "running", "links": links, "trials": trials}
    (root / "sweep/sweep.json").write_text(json.dumps(record))
    (root / "sweep/sweep.html").write_text("<p>live</p>")
    (root / "bench/cells/a").mkdir(parents=True)
    for name in ("config.yaml", "benchmark.json", "benchmark.html", "cells/a/ensemble.json"):
        (root / "bench" / name).write_text("{}")
    (root / "not one").mkdir()
    (tmp_path / "sweep.html").write_text("outside")
    return root


@pytest.fixture
def server(runs: Path) -> Iterator[Server]:
    with Server(runs, 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def get(server: Server, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(server.address + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_lists_runs_and_sweeps(runs: Path) -> None:
    found = {one["name"]: one for one in folders(runs)}
    assert found.keys() == {"a run", "sweep", "bench"}
    bench = found["bench"]
    assert (bench["kind"], bench["state"], bench["detail"]) == (
        "benchmark",
        "finished",
        "1 cells done",
    )
    assert bench["pages"] == ["benchmark.html"]
    assert (found["sweep"]["kind"], found["sweep"]["state"]) == ("sweep", "running")
    assert found["sweep"]["detail"] == "2 done, 1 running"
    assert found["sweep"]["links"] == {"Ray's dashboard": "http://127.0.0.1:8265"}
    assert (found["a run"]["state"], found["a run"]["pages"]) == ("not finished", ["report.html"])
    assert [one["at"] for one in folders(runs / "sweep")] == ["."]


def test_it_serves_their_pages_and_nothing_else(server: Server) -> None:
    status, page = get(server, "/")
    assert status == 200
    for target in re.findall(r'href="([^":]+\.html)"', page):
        assert get(server, "/" + target)[0] == 200
    assert "a%20run/report.html" in page
    assert "http://127.0.0.1:8265" in page
    assert "javascript" not in page
    assert get(server, "/sweep/sweep.json")[0] == 200
    for path in (
        "/a%20run/parent.safetensors",
        "/a%20run/config.yaml",
        "/../sweep.html",
        "/%2e%2e/sweep.html",
        "/sweep/..%2f..%2fsweep.html",
        "/nothing/sweep.html",
        "/a%20run/results/sweep.html",
    ):
        assert get(server, path)[0] == 404, path


def test_it_answers_this_machine_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/", Host="evil.example")[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_mistakes_are_one_line(server: Server, command: Command, tmp_path: Path) -> None:
    must_say(the_line(command("dashboard", "nothing", cwd=tmp_path)), ["FOLDER", "no such folder"])
    port = str(server.server_address[1])
    must_say(
        the_line(command("dashboard", str(server.root), "--port", port, cwd=tmp_path)),
        ["--port", port, "name another"],
    )


# --- Grafana ------------------------------------------------------------------------------------


def wanted() -> set[str]:
    """Metrics that the panels ask for."""
    board = json.loads(GRAFANA.read_text())
    text = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    text += " ".join(str(one.get("query", "")) for one in board["templating"]["list"])
    return set(re.findall(r"\bray_ray_subnets_\w+", text))


def test_panels_show_every_metric_and_no_other() -> None:
    """Ray exports a metric with `ray_` before its name, and a counter with `_total` after it."""
    ours = {*instruments.NAMES, *sweepgauges.NAMES, "ray_subnets_images_total"}
    assert wanted() == {f"ray_{name}" for name in ours}


EXPORT = """
import sys, time, urllib.request
import ray
from ray_subnets.distributed.instruments import Instruments
from ray_subnets.distributed.sweepgauges import SweepGauges
from ray_subnets.recipes import ChildResult, Epoch, Status
from ray_subnets.sweeps.sweep import AVERAGED
ray.init(num_cpus=1, include_dashboard=False, _metrics_export_port=int(sys.argv[1]))
one = Instruments("a")
one.report(Epoch(id="x", epoch=1, epochs=2, loss=0.5, lr=0.1, images=10, seconds=1.0))
one.report(ChildResult(id="x", fitness=0.5))
fields = {name: 1 for name in Status.__dataclass_fields__}
one.status(Status(**fields), 1, 0)
SweepGauges("b").update({"t": {"status": "done", "seeds": [dict.fromkeys(AVERAGED, 0.5)]}})
until = time.time() + 120
found = ""
while time.time() < until and "ray_ray_subnets_sweep_kl" not in found:
    time.sleep(2)
    try:
        found = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode()
    except OSError:
        pass
print(found)
"""


@pytest.mark.cluster
def test_the_panels_metrics_are_exported(tmp_path: Path) -> None:
    """By Ray's own exporter, as Prometheus would read it; needs the extra `dashboard`."""
    pytest.importorskip("opencensus")
    answer = subprocess.run(
        [sys.executable, "-c", EXPORT, "28271"],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert answer.returncode == 0, answer.stderr
    exported = set(re.findall(r"^(ray_ray_subnets_\w+)\{", answer.stdout, flags=re.MULTILINE))
    assert wanted() <= exported
