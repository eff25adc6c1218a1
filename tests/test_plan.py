"""What `--plan` says is what a run then does and takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, run_serial, tiny
from typer.testing import CliRunner

from ray_subnets import configfile, driver, launch, plan_table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.flat import flatten
from ray_subnets.flops import forward_cost
from ray_subnets.placement import Node, places, share
from ray_subnets.plan import Plan, Work, _schedule, plan
from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Result
from ray_subnets.stored import checkpoint_name

TWO = (Node(2),)
MIXED = (
    TINY
    + """
  - {method: sparse, name: units, count: 3, sparsity: 0.4, structure: unit,
     tune: {epochs: 3, batch_size: 64}}
  - method: sparse
    name: steps
    count: 1
    sparsity: 0.7
    criterion: magnitude
    prune_epochs: 2
    tune: {epochs: 3, batch_size: 64, optimizer: adam, lr: 0.01}
  - {method: stochastic, name: parts, count: 3, partition: 3, anneal_epochs: 1, bag: 0.5,
     tune: {epochs: 2, batch_size: 64}}
"""
).replace("select: {count: 6}\n", "")


def planned(config: Config, *nodes: Node, serial: bool = False) -> Plan:
    data = driver.load_data(config)
    cost = forward_cost(driver.build(config, data), data.input_shape)
    return plan(config, data, cost, nodes, serial=serial)


def test_every_estimate_holds_in_a_real_run(tmp_path: Path) -> None:
    """Bytes, epochs, FLOPs and the order of work, for every kind of child."""
    config = configfile.parse(MIXED, "mixed", ["model.hidden=[64,32]"])
    expected = planned(config, *TWO)
    folder = RunFolder.create(tmp_path / "run")
    checkpoints: dict[str, int] = {}
    order: list[str] = []

    def listen(report: Report) -> None:
        file = folder.root / checkpoint_name_of(report.id)
        if isinstance(report, Epoch) and file.exists():
            checkpoints[report.id] = file.stat().st_size
        if isinstance(report, Result):
            order.append(report.id)

    def checkpoint_name_of(id: str) -> str:
        return checkpoint_name(next(job for job in driver.jobs(config) if job.id == id))

    record = run_serial(config, folder, listen=listen)

    def size(*patterns: str) -> int:
        return sum(f.stat().st_size for pattern in patterns for f in folder.root.glob(pattern))

    assert expected.kept_bytes == pytest.approx(
        size("*.safetensors", "children/*", "outputs/*"), rel=0.01
    )
    assert expected.output_bytes == pytest.approx(size("outputs/*"), rel=0.01)
    assert expected.parent_bytes == flatten(folder.load_tensors("parent.safetensors")).vector.nbytes
    assert expected.epochs == record["cost"]["epochs"]
    assert expected.flops == pytest.approx(record["cost"]["flops"], rel=1e-3)
    assert expected.flops_dense == record["cost"]["flops_dense"]
    assert [work.id for work in expected.jobs] == order
    images = {child["id"]: child["images"] for child in record["children"]}
    assert {work.id: work.images for work in expected.jobs if work.id in images} == images
    sizes = {work.id: work.checkpoint for work in expected.jobs if work.checkpoint}
    assert sizes.keys() == checkpoints.keys()
    for id, found in checkpoints.items():
        assert sizes[id] == pytest.approx(found, rel=0.05), id
    for work in expected.jobs:
        file = folder.root / f"children/{work.id}.safetensors"
        if work.group not in ("parent", "single"):
            assert work.weights == pytest.approx(
                file.stat().st_size if file.exists() else 0, rel=0.01
            )


def test_the_data_that_travels() -> None:
    from ray_subnets.distributed.children import pack_data

    assert planned(tiny(), *TWO).data_bytes == pack_data(driver.load_data(tiny()))[0].vector.nbytes


def works(*jobs: tuple[str, int]) -> list[Work]:
    return [
        Work(
            id=f"{group}-{i}",
            group=group,
            epochs=epochs,
            images=epochs * 10,
            flops=0,
            flops_dense=0,
            weights=0,
            checkpoint=0,
        )
        for i, (group, epochs) in enumerate(jobs)
    ]


def test_the_schedule_by_hand() -> None:
    """Parent 0-4 and children 4-6, 6-8, 8-10 on one actor, single 0-10 on the other, then one
    more child 10-12."""
    jobs = works(("parent", 4), ("single", 10), *[("child", 2)] * 4)
    assert _schedule(jobs, 2, 10, elsewhere=False, early=2) == ([12, 10], 12)
    # The parent on devices that are the actors' only afterwards: all begin at 4.
    assert _schedule(jobs, 2, 10, elsewhere=True, early=0) == ([10, 8], 14)


@pytest.mark.parametrize(
    ("node", "gpus", "count"),
    [(Node(4), 0, 4), (Node(4, 2), 0.25, 4), (Node(64, 4), 0.25, 16), (Node(1, 2), 1, 1)],
)
def test_places_on_a_node(node: Node, gpus: float, count: int) -> None:
    assert places(node, 1, gpus) == count


def test_actors_are_spread_over_nodes_and_gpus_taken_where_there_are_any() -> None:
    found = planned(tiny("single=false"), Node(8, 4), Node(8, 4))
    assert (found.gpus, found.actors, found.actors_on) == (1, 8, (4, 4))
    packed = planned(tiny("resources.gpus_per_actor=0.25"), Node(8, 1), Node(8, 1))
    assert (packed.actors, packed.actors_on) == (8, (4, 4))
    few = planned(tiny("resources.actors=3"), Node(1), Node(8), Node(8))
    assert few.actors_on == (1, 1, 1)
    assert share(tiny().resources, TWO) == (1, 0)
    assert planned(tiny(), Node(2, 2), serial=True).actors == 1


def test_what_is_missing_is_named() -> None:
    found = planned(tiny("resources.gpus_per_actor=2"), Node(8, 1), Node(4))
    assert found.actors == 0
    assert "actor of 1 CPUs and 2 GPUs: the largest has 8 CPUs and 1 GPUs" in found.missing
    assert "none" in str([text for _, text in plan_table._rows(found, None)])


def test_hints() -> None:
    whole = planned(tiny("single=false"), Node(8, 1))
    assert any("4 children are tuned by 1 actors" in line for line in whole.hints)
    long = planned(tiny(), Node(8))
    assert any("single: false" in line for line in long.hints)
    waiting = planned(tiny("resources.actors=5", "single=false"), Node(2))
    assert waiting.actors == 2
    assert any("5 are asked for and 2 fit" in line for line in waiting.hints)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # importing it raises
sys.argv = ["ray-subnets", "run", "quickstart", "--plan"]
from ray_subnets import launch
sys.exit(launch.main())
"""


def test_the_command_starts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", WITHOUT_RAY]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "70 of parent and children, 70 of single models" in answer.stdout
    assert "sparse (4 x 5), stochastic (4 x 5)" in " ".join(answer.stdout.split())
    none = CliRunner().invoke(
        launch.app, ["run", "quickstart", "--plan", "resources.cpus_per_actor=1000"]
    )
    assert none.exit_code == 1
    assert "Missing: no node can hold an actor of 1000 CPUs" in none.stdout
    assert not list(tmp_path.iterdir())
