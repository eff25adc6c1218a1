"""Several nodes: a population spread over them, counted beforehand; parents that nobody copies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Command
from tiny import numbers, run_serial, tiny

from ray_subnets import configfile, driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import ResourcesSection
from ray_subnets.placement import share

pytestmark = pytest.mark.cluster

OPTIONS = (
    *("children.1.count=16", "children.1.tune.epochs=60", "parent.epochs=100"),
    *("children.2.count=8", "single=false", "resources.actors=3"),
)
SHARES: tuple[tuple[int, dict[str, float]], ...] = (
    (6, {}),
    (6, {"gpus_per_actor": 0}),
    (6, {"gpus_per_actor": 0.25}),
    (12, {"gpus_per_actor": 0.5, "cpus_per_actor": 0.5}),
    (3, {"cpus_per_actor": 2, "gpus_per_actor": 0}),
    (3, {"gpus_per_actor": 2}),
)
"""actors on three nodes of two CPUs and two GPUs each"""


def test_a_population_over_three_nodes(command: Command, tmp_path: Path) -> None:
    """The plan's actors are Ray's; every node works; the numbers are those of one process."""
    from ray_subnets.distributed import cluster, devices
    from ray_subnets.distributed.devices import Share
    from ray_subnets.distributed.local_cluster import local_cluster

    with local_cluster(3, cpus=2, gpus=2) as nodes:
        with cluster.session(nodes.address):
            machines = devices.nodes()
            assert [(node.cpus, node.gpus) for node in machines] == [(2, 2)] * 3
            for room, options in SHARES:
                resources = ResourcesSection.model_validate(options)
                ours = Share.of(resources, growing=False)
                assert share(resources, machines) == (ours.cpus, ours.gpus)
                assert ours.fit() == room, options
        (tmp_path / "run.yaml").write_text(tiny(*OPTIONS).to_yaml())
        more = ("resources.gpus_per_actor=0", "--address", nodes.address)
        plan = command("run", "run.yaml", "--plan", *more, cwd=tmp_path)
        assert "3, 1 CPU each; 1 on 3 nodes" in plan.stdout, plan.stderr
        answer = command("run", "run.yaml", "--out", "run", *more, cwd=tmp_path, timeout=600)
    assert answer.returncode == 0, answer.stderr
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert len({child["node"] for child in record["children"]}) > 1  # a slow one may come too late
    config = tiny(*OPTIONS, "resources.gpus_per_actor=0")
    serial = run_serial(config, RunFolder.create(tmp_path / "serial"))
    assert [child["test"] for child in record["children"]] == [
        child["test"] for child in serial["children"]
    ]
    assert numbers(record)["ensemble"] == numbers(serial)["ensemble"]


LARGE = """
name: large
data: {name: digits, validation: 16, train_limit: 16}
model: {name: wide_resnet, depth: 28, width: 10}
parent: {epochs: 0}
single: false
children: [{method: sparse, count: 1, sparsity: 0.5, tune: {epochs: 2, lr: 0.01}}]
"""


def test_a_large_parent_is_read_without_a_private_copy(tmp_path: Path) -> None:
    """36.5 M weights, 146 MB: the actor's own memory grows when it spawns, not when it reads."""
    from analysis.benchmarks import processes
    from ray_subnets.distributed import cluster
    from ray_subnets.distributed.reading import life_of_a_child
    from ray_subnets.flat import flatten

    config = configfile.parse(LARGE, "large")
    data = driver.load_data(config)
    parent = flatten(driver.build(config, data).state_dict())
    assert parent.vector.nbytes > 145.9e6
    private: dict[str, int] = {}
    with cluster.session(cpus=1):
        task = config.task(str(RunFolder.create(tmp_path / "run")))
        for stands, pid, _ in life_of_a_child(task, data, parent, config.specs()[0]):
            assert pid != os.getpid()
            private[stands] = processes.memory(pid)["private"]
    assert private["parent read"] - private["ready"] < 0.05 * parent.vector.nbytes
    assert private["tuning"] - private["parent read"] > parent.vector.nbytes
