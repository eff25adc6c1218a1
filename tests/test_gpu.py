"""What only a GPU shows (`make test-gpu`): the same recipes, repeatable numbers, shared devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_options import EVERY, HEAD
from tiny import numbers, run_serial, tiny

import ray_subnets
from ray_subnets import configfile, driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.pools import SerialPool
from ray_subnets.population import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def run_on_gpu(folder: RunFolder, settings: Config | None = None) -> dict[str, object]:
    settings = settings or tiny()
    data = driver.load_data(settings)
    cost = driver.prepare(settings, data, folder)
    pool = SerialPool(Worker(driver.task_of(settings, folder), data, "cuda:0"))
    return driver.run(settings, data, folder, pool, cost=cost)


def test_the_same_numbers_twice(tmp_path: Path) -> None:
    first = run_on_gpu(RunFolder.create(tmp_path / "a"))
    assert numbers(first) == numbers(run_on_gpu(RunFolder.create(tmp_path / "b")))


def test_a_gpu_run_is_used_on_a_cpu(tmp_path: Path) -> None:
    """Its ensemble loads there and gives the recorded probabilities to float tolerance."""
    folder = RunFolder.create(tmp_path / "run")
    record = run_on_gpu(folder)
    data = driver.load_data(tiny())
    on_cpu = ray_subnets.load(folder.root)(data.test.images)
    on_gpu = ray_subnets.load(folder.root, device="cuda:0")(data.test.images.cuda()).cpu()
    torch.testing.assert_close(on_cpu, on_gpu, rtol=0, atol=1e-4)
    assert record["ensemble"]


def test_a_cpu_run_has_the_same_recipes(tmp_path: Path) -> None:
    """Masks and noise are drawn on the CPU, so a recipe does not know where it is tuned."""
    cpu, gpu = RunFolder.create(tmp_path / "cpu"), RunFolder.create(tmp_path / "gpu")
    one = [c["recipe"] for c in run_serial(tiny(), cpu)["children"]]
    two = [c["recipe"] for c in run_on_gpu(gpu)["children"]]  # type: ignore[attr-defined]
    assert one == two


def test_every_option_on_a_gpu(tmp_path: Path) -> None:
    """Structured, annealed, iterative and half-precision children train there, and load here."""
    settings = configfile.parse(HEAD + EVERY, "every")
    folder = RunFolder.create(tmp_path / "run")
    record = run_on_gpu(folder, settings)
    assert not [child["error"] for child in record["children"] if child["error"]]  # type: ignore[attr-defined]
    data = driver.load_data(settings)
    assert ray_subnets.load(folder.root)(data.test.images).isfinite().all()


def test_children_share_a_gpu_on_ray(tmp_path: Path) -> None:
    """Half a GPU each: two actors on one device, the numbers of one process."""
    from ray_subnets.distributed import cluster
    from ray_subnets.distributed import run as ray_run

    settings = tiny("resources.gpus_per_actor=0.5")
    data = driver.load_data(settings)
    folder = RunFolder.create(tmp_path / "ray")
    cost = driver.prepare(settings, data, folder)
    with cluster.session():
        record = ray_run.run(settings, data, folder, cost=cost)
    assert numbers(record) == numbers(run_on_gpu(RunFolder.create(tmp_path / "serial")))
    assert "cuda" in record["children"][0]["worker"]


def test_a_network_that_is_on_a_gpu(tmp_path: Path) -> None:
    """It is tuned there and stays there; what is saved gives nearly the same on a CPU."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)
    ).cuda()
    y = torch.arange(120) % 3
    x = torch.randn(120, 6) + y[:, None]
    before = torch.are_deterministic_algorithms_enabled()
    ensemble = ray_subnets.ensemble(
        model,
        (x[:80].cuda(), y[:80].cuda()),
        (x[80:], y[80:]),
        method=[ray_subnets.Noisy(sigma=0.1, count=2), ray_subnets.Sparse(sparsity=0.5, count=2)],
        tune=ray_subnets.OneCycle(epochs=2, batch_size=16),
        progress=False,
    )
    assert torch.are_deterministic_algorithms_enabled() == before
    assert ensemble.device.type == "cuda"
    assert all(parameter.is_cuda for parameter in model.parameters())
    ensemble.save(tmp_path / "a")
    on_gpu = ray_subnets.load(tmp_path / "a", "cuda", model=model, on_demand=True)
    assert torch.equal(on_gpu(x.cuda()), ensemble(x.cuda()))
    on_cpu = ray_subnets.load(tmp_path / "a", model=model)
    torch.testing.assert_close(on_cpu(x), ensemble(x.cuda()).cpu(), rtol=0, atol=1e-5)
