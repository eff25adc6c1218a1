"""A policy's run on Ray: the same bits as in one process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import equal

pytest.importorskip("gymnasium")

from test_policy_run import curve_of, plain, run_policy

from ray_subnets.checkpoints import RunFolder
from ray_subnets.distributed import cluster
from ray_subnets.distributed import policies as on_ray
from ray_subnets.rl import policy_run, policyfile

CART = """
name: cart
env: {id: CartPole-v1, num_envs: 4, num_levels: 50, frame_stack: 1}
model: {name: mlp, hidden: [8], activation: tanh}
# Long enough for the second actor to have started when the parent is done.
ppo: {total_steps: 8192, num_steps: 32, num_minibatches: 2, gamma: 0.9, lr: 0.001}
children:
  - {method: noisy, count: 6, sigma: 0.1, density: 0.2}
  - {method: sparse, count: 2, partition: 2, tune: {total_steps: 128}}
evaluate: {episodes: 10, levels: [unseen], choose: [sample], per_job: 2, film: 0}
resources: {actors: 2}
"""


def test_serial_and_ray_are_bitwise_equal(tmp_path: Path) -> None:
    """Weights, curves, every episode, and so every number in result.json."""
    config = policyfile.parse(CART, "cart.yaml")
    serial, there = (RunFolder.create(tmp_path / name) for name in ("serial", "ray"))
    expected = run_policy(config, serial)
    with cluster.session(cpus=2):
        policy_run.prepare(config, there)
        found = on_ray.run(config, policy_run.check(config), there)
    assert plain(found) == plain(expected)
    assert len({match["worker"] for match in found["matches"]}) == 2, "both actors played"
    for name in ("parent.safetensors", "children/sparse-001.safetensors"):
        assert equal(serial.load_tensors(name), there.load_tensors(name))
    for id in ("parent", "sparse-000", "sparse-001"):
        assert curve_of(serial, id) == curve_of(there, id)


@pytest.mark.cluster
def test_killed_with_all_its_processes_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL to driver, Ray and actors while the parent learns, twice; each time one command."""
    settings = ["ppo.total_steps=600000", "evaluate.episodes=10", "evaluate.film=0"]

    def command(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "ray_subnets.launch", *words])

    def start(name: str) -> subprocess.Popen[bytes]:
        return command("run", "cartpole_noisy", *settings, "--out", str(tmp_path / name))

    def kill(driver: subprocess.Popen[bytes]) -> float:
        """Once there is a new checkpoint, whose time of writing is returned."""
        checkpoint = tmp_path / "killed/checkpoints/parent.safetensors"
        before = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
        while not checkpoint.exists() or checkpoint.stat().st_mtime == before:
            assert driver.poll() is None, "it ended before a checkpoint was written"
            time.sleep(0.1)
        mine = psutil.Process(driver.pid)
        for process in [mine, *mine.children(recursive=True)]:
            process.kill()
        driver.wait()
        return checkpoint.stat().st_mtime

    assert start("whole").wait() == 0
    first = kill(start("killed"))
    resume = ("resume", str(tmp_path / "killed"))
    assert kill(command(*resume)) > first
    assert command(*resume).wait() == 0
    whole, killed = (RunFolder.open(tmp_path / name) for name in ("whole", "killed"))
    assert plain(killed.read_json("result.json")) == plain(whole.read_json("result.json"))
    for id in ("parent", "sparse-000", "sparse-001", "stochastic-000", "stochastic-001"):
        assert curve_of(killed, id) == curve_of(whole, id)
        name = "parent.safetensors" if id == "parent" else f"children/{id}.safetensors"
        assert equal(killed.load_tensors(name), whole.load_tensors(name))
