"""Environments stepped in processes of their own: the same numbers, and who ends when."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not find_spec("gymnasium"):
    pytest.skip("gymnasium is not installed", allow_module_level=True)

import gymnasium
import played  # noqa: F401 (registers its environments)

from ray_subnets.rl import env_processes
from ray_subnets.rl.env_processes import ProcessesSimulator
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policies import play
from ray_subnets.rl.policy_recipes import Env


def env(id: str, processes: int, **settings: Any) -> Env:
    several: dict[str, Any] = {"num_envs": 5, "frame_stack": 2, "num_levels": 20}
    return Env(id=id, processes=processes, **several | settings)


def walk(envs: Environments, steps: int, seed: int = 0) -> list[Any]:
    """All that comes back from random actions."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        *arrays, infos = envs.step(rng.integers(envs.num_actions, size=envs.num_envs))
        rows.append([*(array.tolist() for array in arrays), repr(infos)])
    return rows


def pids(envs: Environments) -> list[int]:
    assert isinstance(envs.simulator, ProcessesSimulator)
    return [process._process.pid for process in envs.simulator._processes]


@pytest.mark.parametrize("id", ["CartPole-v1", "Corridor-v0", "Picture-v0", "Taxi-v4"])
@pytest.mark.parametrize("processes", [1, 2, 9])
def test_the_numbers_are_those_of_one_process(id: str, processes: int) -> None:
    alone, shared = (Environments(env(id, n), seed=3, gamma=0.9) for n in (0, processes))
    assert len(pids(shared)) == min(processes, 5)
    first = [envs.reset()[0] for envs in (alone, shared)]
    assert np.array_equal(*first)
    assert first[0].dtype == first[1].dtype
    assert type(first[1]) is np.ndarray
    rows = walk(shared, 60)
    assert walk(alone, 60) == rows
    if id in ("Corridor-v0", "Picture-v0"):
        assert any(re.search("final_obs': {4: ", row[-1]) for row in rows), "cut off after five"
    shared.close()


def test_a_state_goes_on_in_any_number_of_processes() -> None:
    one = Environments(env("CartPole-v1", 2), seed=3)
    one.reset()
    walk(one, 57)
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    goes_on = walk(one, 40, seed=1)
    one.close()
    for processes in (0, 1, 3):
        said = list[str]()
        other = Environments(env("CartPole-v1", processes), seed=3)
        other.restore(state, said.append)
        assert walk(other, 40, seed=1) == goes_on
        assert not said
        other.close()


def test_what_does_not_repeat_itself_is_found_in_every_process() -> None:
    settings = env("Corridor-v0", 2, options={"spontaneous": True})
    one, said = Environments(settings, seed=3), list[str]()
    one.reset()
    walk(one, 2)
    other = Environments(settings, seed=3)
    other.restore(one.state(), said.append)
    assert "5 of 5 episodes begin anew" in said[0]
    one.close()
    other.close()


def test_episodes_of_a_policy_are_the_same() -> None:
    def policy(observations: Any) -> Any:
        return observations.new_full((len(observations), 2), 0.5)

    one, other = (
        play(policy, env("CartPole-v1", n), seed=3, episodes=2, how="sample") for n in (0, 2)
    )
    assert one.returns.tolist() == other.returns.tolist()
    assert one.levels.tolist() == other.levels.tolist()


def test_observations_stay_where_they_were_written() -> None:
    envs = Environments(env("Corridor-v0", 2, frame_stack=1), seed=3)
    rows = np.zeros((3, *envs.reset()[0].shape), np.float32)
    for row in rows:
        assert envs.step(np.ones(5, np.int64), row)[0] is row
    assert rows[:, :, 0].tolist() == [[1.0] * 5, [2.0] * 5, [0.0] * 5]
    envs.close()


def test_pictures_come_from_all() -> None:
    envs = Environments(env("Picture-v0", 2), seed=3)
    envs.reset()
    envs.step(np.array([1, 0, 0, 0, 1]))
    pictures = envs.simulator.pictures()
    assert pictures is not None
    assert pictures[:, 0, 0, 0].tolist() == [10, 0, 0, 0, 10]
    envs.close()


def test_processes_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_processes, "_idle", [])
    one = Environments(env("CartPole-v1", 2), seed=0)
    before = pids(one)
    other = Environments(env("CartPole-v1", 2), seed=0)
    assert not set(before) & set(pids(other)), "two at once have none in common"
    one.close()
    third = Environments(env("Picture-v0", 2), seed=0)
    assert sorted(pids(third)) == sorted(before)
    other.close()
    third.close()


class Falls(gymnasium.Env[Any, Any]):
    """Raises at the second step."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, error: type[BaseException]) -> None:
        self._error, self._steps = error, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == 2:
            raise self._error("the floor is wet")
        return np.zeros(1, np.float32), 0.0, False, False, {}


gymnasium.register("Falls-v0", Falls)


@pytest.mark.parametrize("raised", [KeyError, ValueError, SystemExit])
@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_in_an_environment_is_one_line(
    raised: type[BaseException], processes: int
) -> None:
    envs = Environments(env("Falls-v0", processes, options={"error": raised}), seed=0)
    envs.reset()
    walk(envs, 1)
    words = rf"env\.id: step of Falls-v0 raised {raised.__name__}: .*the floor is wet.*"
    with pytest.raises(ValueError, match=words + r"test_env_processes\.py, line \d+\)") as error:
        walk(envs, 1)
    assert "\n" not in str(error.value)
    envs.close()


def test_bad_input_is_told_as_without_processes() -> None:
    for settings in ({"id": "Cartpole-v9"}, {"id": "Graph-v0"}, {"options": {"wings": 2}}):
        lines = []
        for processes in (0, 2):
            with pytest.raises(ValueError, match=r"env\.id") as caught:
                Environments(replace(env("CartPole-v1", processes), **settings), seed=0)
            lines.append(str(caught.value))
        assert lines[0] == lines[1]
    envs = Environments(env("Corridor-v0", 2, options={"bad": float("nan")}), seed=0)
    envs.reset()
    envs.step(np.array([0, 0, 0, 1, 0]))
    with pytest.raises(ValueError, match="the reward nan in environment 3, step 2"):
        envs.step(np.array([0, 0, 0, 1, 0]))
    envs.close()


def test_a_process_that_was_killed_is_named_and_not_used_again() -> None:
    envs = Environments(env("CartPole-v1", 2), seed=0)
    envs.reset()
    killed = pids(envs)[0]
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"env\.processes: .* exit code -9"):
        walk(envs, 1)
    envs.close()
    again = Environments(env("CartPole-v1", 2), seed=0)
    assert killed not in pids(again)
    again.reset()
    walk(again, 1)
    again.close()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# As people write scripts: no main guard, and an environment of their own.
SCRIPT = """
import os, signal, sys, time
import gymnasium, numpy as np
from ray_subnets.rl import env_processes
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import Env

class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    def reset(self, *, seed=None, options=None):
        return np.full(1, 7, np.float32), {}
    def step(self, action):
        if action == 2:
            time.sleep(600)
        return np.full(1, 8, np.float32), 1.0, False, False, {}

gymnasium.register("Mine-v0", Mine)
envs = Environments(Env(id="Mine-v0", num_envs=2, frame_stack=1, processes=2), 0)
print(envs.reset()[0].tolist(), envs.step(np.array([0, 1]))[0].tolist())
print(*(process._process.pid for process in envs.simulator._processes), flush=True)
if sys.argv[1] == "hanging":
    for process in envs.simulator._processes:
        process.ask_step(np.array([2]))
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "closed":
    envs.close()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["closed", "forgotten", "killed", "hanging"])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, end: str) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    answer = subprocess.run(
        [sys.executable, "-W", "error", script, end], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == (-9 if end in ("killed", "hanging") else 0), answer.stderr
    seen, numbers = answer.stdout.splitlines()
    assert seen == "[[7.0], [7.0]] [[8.0], [8.0]]"
    until = time.monotonic() + 20
    while any(alive(int(pid)) for pid in numbers.split()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in numbers.split())
    assert answer.stderr == ""


def test_without_linux_a_file_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(env_processes.os, "memfd_create", raising=False)
    envs = Environments(env("CartPole-v1", 2), seed=0)
    envs.reset()
    alone = Environments(env("CartPole-v1", 0), seed=0)
    alone.reset()
    assert walk(envs, 20) == walk(alone, 20)
    envs.close()


def test_a_process_that_died_while_idle_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_processes, "_idle", [])
    one = Environments(env("CartPole-v1", 2), seed=0)
    before = pids(one)
    one.close()
    os.kill(before[0], signal.SIGKILL)
    until = time.monotonic() + 10
    while all(process.alive for process in env_processes._idle) and time.monotonic() < until:
        time.sleep(0.01)
    other = Environments(env("CartPole-v1", 2), seed=0)
    assert before[0] not in pids(other)
    assert before[1] in pids(other)
    other.close()


@pytest.mark.filterwarnings("ignore:.*Using the latest versioned")
def test_an_id_without_a_version_is_the_newest() -> None:
    envs = Environments(env("CartPole", 2), seed=0)
    alone = Environments(env("CartPole-v1", 0), seed=0)
    assert np.array_equal(envs.reset()[0], alone.reset()[0])
    envs.close()
