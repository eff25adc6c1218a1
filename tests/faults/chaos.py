"""Runs that are broken on purpose, and their numbers beside those of an unbroken one.

    python tests/faults/chaos.py             every scenario; minutes
    python tests/faults/chaos.py NODE NAN    those whose names contain one of these words

The runs are the real command on a cluster of several raylets; the faults happen inside its
processes (`faulty.py`) or to them from here. A driver that dies is continued by `resume`. Every
number of result.json, clocks and places aside, must equal that of a serial run without faults.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

os.environ.pop("RAY_ADDRESS", None)
# At Ray's 15 anything else on the machine starves the workers.
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil
from tiny import numbers

from ray_subnets.distributed.local_cluster import LocalCluster, local_cluster

COMMAND = [sys.executable, "-m", "ray_subnets.launch"]
LIMIT = 600.0  # seconds for one scenario
Act = Callable[["Stage"], None]


@dataclass(frozen=True)
class Scenario:
    """Faults of one kind, in one run."""

    kind: str
    early: tuple[str, ...] = ()
    """faults (see faulty.py) from the start on"""
    later: tuple[str, ...] = ()
    """faults from the parent's end on"""
    acts: tuple[tuple[int, Act], ...] = ()
    """what is done from outside, once so many jobs have a result; 0: once the parent is trained
    for an epoch"""


@dataclass
class Outcome:
    """What became of a scenario."""

    kind: str
    injected: int = 0
    expected: int = 0
    resumed: int = 0
    finished: bool = False
    lost: int = 0
    retried: int = 0
    equal: bool = False
    seconds: float = 0.0
    log: str = ""

    @property
    def survived(self) -> bool:
        happened = self.injected == self.expected
        return happened and self.finished and self.equal and self.lost == 0


@dataclass
class Stage:
    """A scenario under way."""

    cluster: LocalCluster
    folder: Path
    process: subprocess.Popen[str]

    def results(self) -> int:
        found = len(list((self.folder / "results").glob("[!.]*.json")))
        return found or (0 if (self.folder / "checkpoints/parent.safetensors").is_file() else -1)


# --- what is done from outside ---


def kill_node(stage: Stage) -> None:
    stage.cluster.kill()


def add_node(stage: Stage) -> None:
    stage.cluster.add()


def kill_driver(stage: Stage) -> None:
    stage.process.kill()


def kill_selection(stage: Stage) -> None:
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::Selection"):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise LookupError("there is no selection actor")


SCENARIOS = [
    Scenario("actor killed in spawn", later=("spawn.1", "spawn.1.1", "spawn.2", "spawn.3")),
    Scenario(
        "actor killed in tuning",
        early=("tune.30",),
        later=("tune.2", "tune.5", "tune.5.1", "tune.23", "tune.40"),
    ),
    Scenario(
        "actor killed in writing a checkpoint",
        early=("write-checkpoints.2",),
        later=tuple(f"write-checkpoints.{n}" for n in ("1", "1.1", "1.2", "2", "3")),
    ),
    Scenario(
        "actor killed in writing a result",
        early=("write-parent.safetensors.1", "write-parent.json.1"),
        later=("write-results.1", "write-results.1.1", "write-children.1", "write-outputs.1"),
    ),
    Scenario(
        "actor killed in evaluation",
        later=("evaluate.1", "evaluate.1.1", "evaluate.1.2", "evaluate.2"),
    ),
    Scenario(
        "checkpoint cut in half",
        early=("cut-checkpoints.3",),
        later=tuple(f"cut-checkpoints.{n}" for n in ("1", "1.1", "2", "2.1")),
    ),
    Scenario("NaN loss", early=("nan.50",), later=("nan.3", "nan.30")),
    Scenario(
        "disk full in writing a checkpoint",
        early=("full-checkpoints.2",),
        later=tuple(f"full-checkpoints.{n}" for n in ("1", "1.1", "2", "3")),
    ),
    Scenario("node killed", acts=((2, kill_node), (6, kill_node), (6, add_node), (10, add_node))),
    Scenario(  # whichever node it was on: all of them
        "all nodes killed under the parent",
        acts=(*[(0, kill_node)] * 3, *[(0, add_node)] * 2, (9, kill_node)),
    ),
    Scenario("node added late", acts=((0, add_node), (5, add_node))),
    Scenario("selection actor killed", acts=((3, kill_selection), (8, kill_selection))),
    Scenario("driver killed, parent", acts=((0, kill_driver),)),
    Scenario("driver killed, children", acts=((3, kill_driver), (8, kill_driver))),
    Scenario(
        "driver killed, end of the run",
        early=("write-ensemble.json.1", "write-result.json.1", "write-report.html.1"),
    ),
    Scenario(
        "all together",
        early=("tune.44", "write-checkpoints.5"),
        later=(
            "spawn.1",
            "tune.12",
            "nan.25",
            "cut-checkpoints.2",
            "evaluate.1",
            "write-results.2",
        ),
        acts=((4, kill_selection), (6, kill_node), (7, add_node), (9, kill_driver)),
    ),
]


def play(
    scenario: Scenario, cluster: LocalCluster, chaos: Path, out: Path, expected: Any
) -> Outcome:
    """Run it to its end, resuming as often as its driver dies."""
    for old in chaos.iterdir():
        old.unlink()
    for name in scenario.early:
        (chaos / name).touch()
    outcome = Outcome(scenario.kind)
    outcome.expected = len(scenario.early) + len(scenario.later) + len(scenario.acts)
    began = time.monotonic()
    command = ["run", "chaos.yaml", "--out", str(out)]
    later, acts = list(scenario.later), list(scenario.acts)
    log = open(out.with_suffix(".log"), "w")  # noqa: SIM115
    while True:
        process = subprocess.Popen(
            [*COMMAND, *command, "--address", cluster.address],
            cwd=HERE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stage = Stage(cluster, out, process)
        while process.poll() is None:
            if time.monotonic() - began > LIMIT:
                process.kill()
            done = stage.results()
            if later and done >= 1:
                for name in later:
                    (chaos / name).touch()
                later = []
            while acts and done >= acts[0][0]:
                acts.pop(0)[1](stage)
                outcome.injected += 1
            time.sleep(0.02)
        if process.returncode == 0 or time.monotonic() - began > LIMIT:
            break
        if process.returncode > 0:  # it ended by itself, with a word about why
            break
        outcome.resumed += 1
        command = ["resume", str(out)]
    log.close()
    outcome.seconds = time.monotonic() - began
    outcome.injected += len(list(chaos.glob("*.done-*")))
    outcome.finished = process.returncode == 0
    outcome.log = out.with_suffix(".log").read_text()
    if outcome.finished:
        record = json.loads((out / "result.json").read_text())
        outcome.equal = plain(record) == plain(expected)
        outcome.lost = sum(child["error"] is not None for child in record["children"])
        outcome.retried = sum(
            network["attempts"] - 1 for network in [record["parent"], *record["children"]]
        )
    return outcome


def plain(record: Any) -> Any:
    """`numbers`, without the notes: they tell of NaNs that went away."""
    if isinstance(record, dict):
        return {key: plain(value) for key, value in numbers(record).items() if key != "notes"}
    return [plain(value) for value in record] if isinstance(record, list) else record


def reference(out: Path) -> Any:
    """The serial run without faults."""
    subprocess.run(
        [*COMMAND, "run", "chaos.yaml", "--serial", "--quiet", "--out", str(out)],
        cwd=HERE,
        check=True,
        stdout=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "CHAOS"},
    )
    return json.loads((out / "result.json").read_text())


def stage_of(nodes: int) -> AbstractContextManager[LocalCluster]:
    """A head that holds no child, and nodes that hold one each."""
    return local_cluster(nodes + 1, head_cpus=0, prompt=True)


def restore(cluster: LocalCluster, nodes: int) -> None:
    """As many nodes as there were."""
    while len(cluster.nodes) < nodes:
        cluster.add()
    while len(cluster.nodes) > nodes:
        cluster.kill()


def perform(scenarios: Sequence[Scenario], scratch: Path, nodes: int = 3) -> list[Outcome]:
    """All of them, one after the other, on one cluster."""
    chaos = scratch / "chaos"
    chaos.mkdir()
    expected = reference(scratch / "reference")
    os.environ |= {"CHAOS": str(chaos), "CHAOS_PAUSE": "0.05"}
    try:
        outcomes = []
        with stage_of(nodes) as cluster:
            for number, scenario in enumerate(scenarios):
                outcome = play(scenario, cluster, chaos, scratch / f"run-{number}", expected)
                outcomes.append(outcome)
                print(row(outcome), flush=True)
                restore(cluster, nodes)
        return outcomes
    finally:
        del os.environ["CHAOS"], os.environ["CHAOS_PAUSE"]


HEAD = (
    "| fault | injected | networks done again | driver resumed | run finished | children lost "
    "| numbers bitwise equal | seconds |\n|---|---|---|---|---|---|---|---|"
)


def row(outcome: Outcome) -> str:
    injected = str(outcome.injected)
    if outcome.injected != outcome.expected:
        injected += f" of {outcome.expected}"
    return (
        f"| {outcome.kind} | {injected} | {outcome.retried} | {outcome.resumed} "
        f"| {'yes' if outcome.finished else 'NO'} | {outcome.lost} "
        f"| {'yes' if outcome.equal else 'NO'} | {outcome.seconds:.0f} |"
    )


def main() -> int:
    words = [word.lower() for word in sys.argv[1:]]
    scenarios = [
        scenario
        for scenario in SCENARIOS
        if not words or any(word in scenario.kind.lower() for word in words)
    ]
    if not scenarios:
        known = ", ".join(scenario.kind for scenario in SCENARIOS)
        print(f"chaos: no fault is called {' or '.join(words)}; there are {known}", file=sys.stderr)
        return 2
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = perform(scenarios, Path(scratch))
        total = sum(outcome.injected for outcome in outcomes)
        survived = sum(outcome.survived for outcome in outcomes)
        print(f"\n{total} faults in {len(outcomes)} runs; {survived} runs as if nothing had been.")
        for outcome in outcomes:
            if not outcome.survived:
                print(f"\n--- {outcome.kind}\n{outcome.log[-3000:]}")
    return 0 if survived == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
