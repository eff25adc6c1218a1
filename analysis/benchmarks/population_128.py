"""128 children over four Ray nodes on this machine, with the real command; and what it takes.

    make bench            # or: python -m analysis.benchmarks.population_128 [--children 16 64 128]

Memory is the sum over all processes of cluster, actors and driver, shared pages divided among those
who share them (PSS). The driver's own memory should not grow with the number of children.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis.benchmarks import processes
from ray_subnets.distributed.local_cluster import LocalCluster, local_cluster

# Ray starts workers at niceness 15: whatever else runs on the machine would slow only them.
os.environ.setdefault("RAY_worker_niceness", "0")


@dataclass
class Peak:
    """The most that was seen of each."""

    process: subprocess.Popen[bytes]
    processes: int = 0
    actors: int = 0
    pss: int = 0
    driver: int = 0
    actor: int = 0
    _actors: set[int] = field(default_factory=set)

    def look(self) -> None:
        found = {}
        for process in processes.family(os.getpid())[1:]:
            taken = processes.memory(process.pid)
            if taken["pss"]:
                found[process.pid] = taken
                if "ChildActor" in processes.command_line(process):
                    self._actors.add(process.pid)
        actors = [taken["private"] for pid, taken in found.items() if pid in self._actors]
        self.processes = max(self.processes, len(found))
        self.actors = max(self.actors, len(actors))
        self.pss = max(self.pss, sum(taken["pss"] for taken in found.values()))
        self.actor = max([self.actor, *actors])
        if self.process.pid in found:
            self.driver = max(self.driver, found[self.process.pid]["private"])


def run(cluster: LocalCluster, children: int, config: str, scratch: Path) -> list[str]:
    """One run of the real command; a row of the table."""
    folder = scratch / f"run-{children}"
    command = [sys.executable, "-m", "ray_subnets.launch", "run", config]
    command += [f"children.0.count={children}", f"select.count={min(32, children)}", "-q"]
    command += ["--out", str(folder), "--address", cluster.address]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = Peak(process)
    with processes.Sampler(peak.look, seconds=2.0):
        code = process.wait()
    wall = time.perf_counter() - began
    if code:
        raise SystemExit(code)
    record = json.loads((folder / "result.json").read_text())
    done = [child for child in record["children"] if child["error"] is None]
    nodes = {child.get("node") for child in record["children"]}
    return [
        f"{len(done)} of {children}",
        str(len(nodes)),
        str(peak.processes),
        str(peak.actors),
        f"{peak.pss / 1e6:,.0f}",
        f"{peak.actor / 1e6:,.0f}",
        f"{peak.driver / 1e6:,.0f}",
        f"{wall:.0f}",
        f"{record['cost']['wall_seconds']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--children", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--config", default="scale_128")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.config} on {arguments.nodes} nodes of one CPU each")
    headings = (
        *("children done", "nodes that worked", "processes", "actors", "PSS of all, MB"),
        *("largest actor, private MB", "driver, private MB", "command, s", "jobs, s"),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as scratch, local_cluster(arguments.nodes) as cluster:
        for children in arguments.children:
            table.add_row(*run(cluster, children, arguments.config, Path(scratch)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
