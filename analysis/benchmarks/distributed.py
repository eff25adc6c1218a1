"""What a run on Ray costs, against one process and against bare torch, in the same run.

    make bench            # or: python -m analysis.benchmarks.distributed [--only whole]

pool    16 children on two actors against the same 16 in one serial process; one thread each
whole   a run on one actor, from the pool's creation to result.json, against the same training in
        plain torch (`bare.py`); and the time from the parent's end to the first child's first step
memory  what an actor takes before it reads a parent of 36.5 M weights, after, and as it tunes

Images are random bytes of Fashion-MNIST's shape: only their number and size matters here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from analysis.benchmarks import bare, processes
from ray_subnets import configfile, driver, models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.flat import flatten
from ray_subnets.population import Report
from ray_subnets.recipes import Epoch

TRAIN, TEST = 5_000, 2_000
PARTS = ("pool", "whole", "memory")
SETTINGS = """
name: benchmark
data: {{name: npz, root: {data}, validation: {validation}, flip: true}}
model: lenet_s
parent: {{epochs: {parent}, lr: 0.1, batch_size: {batch}}}
single: false
children:
  - method: sparse
    count: {children}
    partition: 2
    tune: {{epochs: {epochs}, lr: 0.1, batch_size: {batch}}}
resources: {{threads: 1, actors: {actors}}}
"""


# Ray starts workers at niceness 15: whatever else runs on the machine would slow only them.
os.environ.setdefault("RAY_worker_niceness", "0")


def random_images(path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", TRAIN + bare.VALIDATION), ("test", TEST)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 10
    np.savez(path, **arrays)  # type: ignore[arg-type]


def settings(data: Path, *, parent: int, children: int, epochs: int, actors: int) -> Config:
    text = SETTINGS.format(
        data=data,
        validation=bare.VALIDATION,
        batch=bare.BATCH,
        parent=parent,
        children=children,
        epochs=epochs,
        actors=actors,
    )
    return configfile.parse(text, "benchmark", ())


def seconds_per_epoch(data: Path) -> float:
    """Of plain torch, on one thread of this machine as it is now."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = bare.Images(str(data))
    times = []
    for _ in range(2):  # the first allocates
        began = time.perf_counter()
        bare.fit(models.build("lenet_s", (1, 28, 28), 10, {}, seed=0), images, 1, {})
        times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return times[1]


def bare_process(data: Path, *counts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "analysis.benchmarks.bare", str(data), *map(str, counts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def bare_seconds(process: subprocess.Popen[str]) -> float:
    answer, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(answer)["seconds"]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}


def children_phase(folder: Path) -> float:
    """Seconds from the first child's start to the last one's end."""
    done = [one for id, one in results(folder).items() if id != "parent"]
    return max(one["started"] + one["seconds"] for one in done) - min(
        one["started"] for one in done
    )


def pool(data: Path, scratch: Path, child_seconds: float, rounds: int, console: Console) -> None:
    """Two actors against one process; and what two processes of plain torch do on this machine."""
    each = seconds_per_epoch(data)
    epochs = max(2, round(child_seconds / each))
    config = settings(data, parent=max(2, round(8 / each)), children=16, epochs=epochs, actors=2)
    text = scratch / "pool.yaml"
    text.write_text(config.to_yaml())
    phases: dict[str, list[float]] = {"--serial": [], "": []}
    whole: dict[str, list[float]] = {"--serial": [], "": []}
    ceilings = []
    for turn in range(rounds):
        for how in phases:
            folder = scratch / f"pool{how}-{turn}"
            command = [sys.executable, "-m", "ray_subnets.launch", "run", str(text), "-q"]
            command += ["--out", str(folder), *([how] if how else [])]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            whole[how].append(time.perf_counter() - began)
            phases[how].append(children_phase(folder))
        one = bare_seconds(bare_process(data, 1, epochs, 1))
        two = [bare_process(data, 1, epochs, 1) for _ in range(2)]
        ceilings.append(2 * one / max(map(bare_seconds, two)))
    table = Table(
        title=f"16 children of {epochs} epochs ({epochs * each:.1f} s), medians of {rounds}"
    )
    for heading in ("what", "one process", "two actors", "ratio", "wanted"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, times, wanted in (
        ("first child's start to last one's end, s", phases, ">= 1.9x"),
        ("the whole command, s", whole, ""),
    ):
        one, two_ = statistics.median(times["--serial"]), statistics.median(times[""])
        table.add_row(what, f"{one:.1f}", f"{two_:.1f}", f"{one / two_:.2f}x", wanted)
    table.add_row(
        "plain torch, one process and two", "", "", f"{statistics.median(ceilings):.2f}x", ""
    )
    console.print(table)


def whole(data: Path, scratch: Path, child_seconds: float, children: int, console: Console) -> None:
    """One actor against plain torch."""
    from ray_subnets.distributed import cluster
    from ray_subnets.distributed import run as ray_run

    each = seconds_per_epoch(data)
    epochs = max(1, round(child_seconds / each))
    config = settings(data, parent=epochs, children=children, epochs=epochs, actors=1)
    arrays = driver.load_data(config)
    folder = RunFolder.create(scratch / "whole")
    cost = driver.prepare(config, arrays, folder)
    first_steps: list[float] = []

    def listen(report: Report) -> None:
        if isinstance(report, Epoch) and report.id != "parent" and not first_steps:
            first_steps.append(time.time() - report.seconds)

    began = time.perf_counter()
    with cluster.session():
        started = time.perf_counter() - began
        began_run, cpu_ray = time.perf_counter(), processes.cpu_seconds(os.getpid())
        record = ray_run.run(config, arrays, folder, cost=cost, listen=listen)
        run = time.perf_counter() - began_run
        cpu_run = processes.cpu_seconds(os.getpid()) - cpu_ray
    stopped = time.perf_counter() - began - started - run
    cpu_before = processes.cpu_seconds(os.getpid())
    plain = bare_seconds(bare_process(data, epochs, epochs, children))
    cpu_plain = processes.cpu_seconds(os.getpid()) - cpu_before

    parent = results(folder.root)["parent"]
    table = Table(title=f"Parent and {children} children of {epochs} epochs, one worker")
    for heading in ("what", "Ray", "plain torch", "ratio", "wanted"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row(
        "pool's creation to result.json, s",
        f"{run:.1f}",
        f"{plain:.1f}",
        f"{run / plain:.3f}x",
        "<= 1.05x",
    )
    table.add_row(
        "processor time of that (torch: and its import), s",
        f"{cpu_run:.1f}",
        f"{cpu_plain:.1f}",
        f"{cpu_run / cpu_plain:.3f}x",
        "",
    )
    table.add_row("Ray's start and stop beside it, s", f"{started:.1f} + {stopped:.1f}", "", "", "")
    busy = sum(one["seconds"] for one in results(folder.root).values())
    table.add_row("of it, jobs on the actor, s", f"{busy:.1f}", "", f"{busy / plain:.3f}x", "")
    seconds = statistics.median(child["seconds"] for child in record["children"])
    table.add_row("a child, s", f"{seconds:.1f}", "", "", ">= 10")
    gap = first_steps[0] - parent["started"] - parent["seconds"]
    table.add_row("parent's end to the first child's first step, s", f"{gap:.2f}", "", "", "<= 1")
    console.print(table)


LARGE = """
name: large
data: {{name: npz, root: {data}, validation: 16}}
model: {{name: wide_resnet, depth: 28, width: 10}}
parent: {{epochs: 0}}
single: false
children: [{{method: sparse, count: 1, partition: 1, sparsity: 0.5, tune: {{epochs: 2, lr: 0.01}}}}]
"""


def memory(scratch: Path, console: Console) -> None:
    """WRN-28-10 on a few small images: the weights are large, the work is not."""
    from ray_subnets.distributed import cluster
    from ray_subnets.distributed.reading import life_of_a_child

    file = scratch / "few.npz"
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = generator.integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(32) % 10
    np.savez(file, **arrays)  # type: ignore[arg-type]
    config = configfile.parse(LARGE.format(data=file), "benchmark", ())
    data = driver.load_data(config)
    folder = RunFolder.create(scratch / "large")
    network = driver.build(config, data)
    stored = folder.save_tensors("parent.safetensors", network.state_dict())
    began = time.perf_counter()
    parent = flatten(folder.load_tensors(stored))
    loaded = time.perf_counter() - began
    weights = sum(parameter.numel() for parameter in network.parameters())
    table = Table(title=f"An actor and a parent of {weights:,} weights, MB")
    for heading in ("actor", "private", "shared", "seconds"):
        table.add_column(heading, justify="left" if heading == "actor" else "right")
    taken, took = {}, {}
    with cluster.session():
        life = life_of_a_child(config.task(str(folder)), data, parent, config.specs()[0])
        for stands, pid, seconds in life:
            taken[stands], took[stands] = processes.memory(pid), seconds
    for stands, found in taken.items():
        private, shared = found["private"] / 1e6, found["shared"] / 1e6
        table.add_row(stands, f"{private:,.0f}", f"{shared:,.0f}", f"{took[stands]:.2f}")
    console.print(table)
    copied = (taken["parent read"]["private"] - taken["ready"]["private"]) / parent.vector.nbytes
    first = loaded + took["parent read"] + took["spawned"]
    console.print(
        f"Reading it adds {copied:.1%} of the parent's {parent.vector.nbytes / 1e6:.0f} MB to the "
        f"actor's private memory. From the parent's file to the child's first step {first:.2f} s: "
        f"{loaded:.2f} s to read and check the file, {took['parent read']:.2f} s to hand it over, "
        f"{took['spawned']:.2f} s to spawn.",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part (default all)")
    parser.add_argument("--rounds", type=int, default=2, help="of pool (default 2)")
    parser.add_argument("--pool-seconds", type=float, default=1.5, help="a child of pool")
    parser.add_argument("--child-seconds", type=float, default=11.0, help="a child of whole")
    parser.add_argument("--children", type=int, default=8, help="children of whole")
    arguments = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = scratch / "random.npz"
        random_images(data)
        if arguments.only in (None, "pool"):
            pool(data, scratch, arguments.pool_seconds, arguments.rounds, console)
        if arguments.only in (None, "whole"):
            whole(data, scratch, arguments.child_seconds, arguments.children, console)
        if arguments.only in (None, "memory"):
            memory(scratch, console)


if __name__ == "__main__":
    main()
