"""Environments: levels, stacked frames, rewards in proportion, states, bad input."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from ray_subnets.rl.envs import Environments, RunningReturn, unseen
from ray_subnets.rl.policy_recipes import Env
from ray_subnets.rl.procgen_games import GAMES
from ray_subnets.rl.simulators import LAST_LEVEL

if find_spec("gymnasium"):
    import played  # noqa: F401 (registers its environments)

gymnasium_only = pytest.mark.skipif(not find_spec("gymnasium"), reason="gymnasium is not installed")
procgen_only = pytest.mark.skipif(not find_spec("procgen"), reason="procgen is not installed")


def env(id: str = "Corridor-v0", **settings: Any) -> Env:
    return Env(**{"id": id, "num_envs": 2, "frame_stack": 1} | settings)


def walk(envs: Environments, steps: int, seed: int = 0) -> list[tuple[Any, ...]]:
    """All that comes back from random actions."""
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(envs.num_actions, size=envs.num_envs))[:4] for _ in range(steps)]


def learn(envs: Environments, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """What would be learnt from random actions."""
    _, rewards, terminated, truncated = zip(*walk(envs, steps, seed), strict=True)
    return envs.scaled(np.stack(rewards), np.stack(terminated) | np.stack(truncated))


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    return all(
        np.array_equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return() -> None:
    norm = RunningReturn(2, gamma=0.5)
    rewards, ended = np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[False, True], [False, False]])
    scaled = norm(rewards, ended)
    # Returns 1 and 3, and 1e-4 of a prior with mean 0 and variance 1.
    variance = (1e-4 * 1 + 2.0 + 4 * 1e-4 * 2 / 2.0001) / 2.0001
    np.testing.assert_allclose(scaled[0], rewards[0] / np.sqrt(variance + 1e-8), rtol=1e-12)
    # The second episode ended: its return starts from nothing. 0.5 + 2 and 0 + 4.
    np.testing.assert_allclose(norm.returns, [2.5, 4.0])
    deviation = np.std([1.0, 3.0, 2.5, 4.0])
    np.testing.assert_allclose(scaled[1], rewards[1] / deviation, rtol=1e-3)
    huge = norm(np.array([[1e6, 0.0]]), ended[1:])
    assert huge[0, 0] <= 10.0
    again = RunningReturn(2, gamma=0.5)
    again.restore(norm.state())
    one = np.ones((1, 2))
    assert np.array_equal(again(one, ended[1:]), norm(one, ended[1:]))


def test_a_rollout_at_once_and_step_by_step_are_divided_alike() -> None:
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(3, 2, (50, 4)), rng.random((50, 4)) < 0.2
    at_once, by_step = RunningReturn(4, gamma=0.9), RunningReturn(4, gamma=0.9)
    parts = [by_step(rewards[t : t + 1], ended[t : t + 1]) for t in range(50)]
    assert np.array_equal(at_once(rewards, ended), np.concatenate(parts))


@gymnasium_only
def test_frames_are_stacked_and_begin_anew_with_an_episode() -> None:
    envs = Environments(env(frame_stack=3, num_levels=1, start_level=7), seed=0)
    seen, _ = envs.reset()
    assert seen.tolist() == [[0, 7] * 3] * 2
    seen, rewards, terminated, truncated, infos = envs.step(np.array([1, 0]))
    assert seen.tolist() == [[0, 7, 0, 7, 1, 7], [0, 7] * 3]
    assert rewards.tolist() == [1.0, 0.0]
    assert not infos
    envs.step(np.array([1, 0]))
    seen, _, terminated, truncated, infos = envs.step(np.array([1, 0]))
    assert terminated.tolist() == [True, False]
    assert seen[0].tolist() == [0, 7] * 3, "the first of the next episode"
    assert infos["ended"].tolist() == [0]
    assert infos["return"].tolist() == [3.0]
    assert infos["length"].tolist() == [3]
    assert infos["level"].tolist() == [7]
    assert infos["final_obs"] == {}
    envs.step(np.array([0, 0]))
    _, _, terminated, truncated, infos = envs.step(np.array([0, 1]))
    assert truncated.tolist() == [False, True], "the limit is five steps"
    assert infos["return"].tolist() == [1.0]
    assert infos["final_obs"][1].tolist() == [0, 7, 0, 7, 1, 7]


@gymnasium_only
def test_images_come_with_channels_first_and_numbers_one_hot() -> None:
    envs = Environments(env("Picture-v0", frame_stack=2), seed=0)
    seen, _ = envs.reset()
    assert (seen.shape, seen.dtype) == ((2, 2, 5, 4), np.uint8)
    seen = envs.step(np.array([1, 0]))[0]
    assert seen[:, :, 0, 0].tolist() == [[0, 10], [0, 0]]
    envs = Environments(env("Numbered-v0"), seed=0)
    assert envs.reset()[0].tolist() == [[1, 0, 0, 0]] * 2
    assert envs.step(np.array([1, 0]))[0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@gymnasium_only
@pytest.mark.parametrize(
    ("id", "stack"), [("Corridor-v0", 1), ("Corridor-v0", 3), ("Picture-v0", 2)]
)
def test_observations_are_written_where_they_are_wanted(id: str, stack: int) -> None:
    one, other = (Environments(env(id, frame_stack=stack), seed=3) for _ in range(2))
    first, _ = one.reset()
    other.reset()
    rows = np.full((20, *first.shape), 77, first.dtype)
    rng = np.random.default_rng(0)
    for row in rows:
        actions = rng.integers(one.num_actions, size=2)
        kept, seen = one.step(actions, row), other.step(actions)
        assert kept[0] is row
        assert all(map(np.array_equal, kept[:4], seen[:4]))
        assert str(kept[4]) == str(seen[4])
    before = rows.copy()
    assert np.array_equal(one.observations, rows[-1])  # type: ignore[arg-type]
    one.step(actions)
    assert np.array_equal(rows, before), "left alone from then on"


@gymnasium_only
def test_levels_follow_from_the_seed_and_stay_in_their_range() -> None:
    def levels(seed: int, **settings: Any) -> list[int]:
        envs, found = Environments(env(num_envs=5, **settings), seed), []
        envs.reset()
        for _ in range(30):
            found += envs.step(np.ones(5, np.int64))[4].get("level", np.array([])).tolist()
        return found

    few = levels(0, start_level=100, num_levels=3)
    assert len(few) == 50
    assert set(few) == {100, 101, 102}
    assert (
        few == levels(0, start_level=100, num_levels=3) != levels(1, start_level=100, num_levels=3)
    )
    assert len(set(levels(0))) == 50
    training = env(start_level=100, num_levels=3)
    test = unseen(training)
    assert (test.start_level, test.start_level + test.num_levels) == (103, LAST_LEVEL)
    assert min(levels(0, start_level=103, num_levels=test.num_levels)) > 102
    with pytest.raises(ValueError, match=r"env\.num_levels.*none is unseen"):
        unseen(env())


@gymnasium_only
@pytest.mark.parametrize("id", ["CartPole-v1", "Corridor-v0", "Acrobot-v1", "Taxi-v4"])
def test_restored_environments_go_on_as_if_they_had_not_stopped(id: str) -> None:
    settings, said = env(id, frame_stack=2), list[str]()
    one = Environments(settings, seed=3, gamma=0.9)
    one.reset()
    learn(one, 57)
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    other = Environments(settings, seed=3, gamma=0.9)
    other.restore(state, said.append)
    assert np.array_equal(one.observations, other.observations)  # type: ignore[arg-type]
    assert np.array_equal(learn(one, 80, seed=1), learn(other, 80, seed=1))
    assert same(walk(one, 80, seed=2), walk(other, 80, seed=2))
    assert not said


@gymnasium_only
def test_an_environment_that_does_not_repeat_itself_is_named_and_begins_anew() -> None:
    settings, said = env(options={"spontaneous": True}), list[str]()
    one = Environments(settings, seed=3)
    one.reset()
    one.step(np.array([1, 0]))
    other = Environments(settings, seed=3)
    other.restore(one.state(), said.append)
    assert len(said) == 1
    assert "Corridor-v0 does not repeat itself" in said[0]
    assert other.observations is not None
    assert other.observations[:, 0].tolist() == [0, 0]
    assert walk(other, 20)[0][0].shape == (2, 2)


@gymnasium_only
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"id": "Cartpole-v9"}, ["env.id", "Cartpole-v9"]),
        ({"id": "nonsense"}, ["env.id", "nonsense"]),
        ({"id": "Graph-v0"}, ["Graph-v0", "observations Dict", "FlattenObservation"]),
        ({"id": "Steering-v0"}, ["Steering-v0", "actions Box", "Discrete"]),
        ({"id": "Pendulum-v1"}, ["Pendulum-v1", "Discrete"]),
        ({"num_envs": 0}, ["env.num_envs", "at least 1", "0"]),
        ({"frame_stack": 0}, ["env.frame_stack", "at least 1"]),
        ({"start_level": 5}, ["env.start_level", "num_levels"]),
        ({"start_level": LAST_LEVEL, "num_levels": 1}, ["env.start_level", "end"]),
        ({"options": {"wings": 2}}, ["env.id", "wings"]),
        ({"id": "procgen/pong"}, ["env.id", "'pong'", "starpilot"]),
    ],
)
def test_what_cannot_be_played_is_one_line(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"env") as caught:
        Environments(env(**settings), seed=0)
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word.lower() in said.lower(), said


@gymnasium_only
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad: float) -> None:
    envs = Environments(env(options={"bad": bad}), seed=0, gamma=0.9)
    envs.reset()
    envs.step(np.array([0, 1]))
    with pytest.raises(
        ValueError, match=rf"Corridor-v0 gave the reward {bad} in environment 1, step 2"
    ):
        envs.step(np.array([0, 1]))


@gymnasium_only
def test_episodes_counted_at_once_are_those_of_each_step() -> None:
    one, other = (Environments(env("CartPole-v1", num_envs=3, frame_stack=2), 0) for _ in range(2))
    for envs in (one, other):
        envs.reset()
    rng = np.random.default_rng(0)
    actions = rng.integers(2, size=(90, 3))
    returns, lengths, kept = list[float](), list[int](), []
    for action in actions:
        *arrays, infos = one.step(action)
        returns += infos.get("return", np.array([])).tolist()
        lengths += infos.get("length", np.array([])).tolist()
        stepped = other.advance(action)
        assert all(map(np.array_equal, arrays, stepped[:4]))
        kept.append((stepped.rewards, stepped.terminated | stepped.truncated))
    for part in (kept[:50], kept[50:]):  # episodes reach from one into the other
        rewards, ended = (np.stack(rows) for rows in zip(*part, strict=True))
        found = other.count(rewards, ended)
        assert found == (returns[: len(found[0])], lengths[: len(found[1])])
        returns, lengths = returns[len(found[0]) :], lengths[len(found[1]) :]
    assert not returns
    rewards[7, 1] = np.nan
    with pytest.raises(ValueError, match=r"CartPole-v1 gave the reward nan .* 1, step 58;"):
        other.count(rewards, ended)


@gymnasium_only
def test_an_observation_that_is_not_finite_is_named() -> None:
    envs = Environments(env("Lost-v0"), seed=0)
    first, _ = envs.reset()
    rows = torch.zeros(3, *first.shape)
    for row in rows:
        row.copy_(torch.from_numpy(envs.observations))
        envs.step(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"Lost-v0 gave an observation .* environment 1, step 1;"):
        envs.check(rows)
    envs.check(rows[:1])
    envs.check(torch.zeros(3, 2, 1, 4, 4, dtype=torch.uint8))


@gymnasium_only
@pytest.mark.parametrize("processes", [0, 2])
def test_an_episode_that_ends_elsewhere_when_played_again_begins_anew(processes: int) -> None:
    stopped = Environments(env("Strict-v0", processes=processes), seed=0)
    stopped.reset()
    walk(stopped, 7)
    again, told = Environments(env("Strict-v0", processes=processes), seed=0), list[str]()
    again.restore(stopped.state(), told.append)
    assert again.observations is not None
    walk(again, 7)
    for envs in (stopped, again):
        envs.close()


@gymnasium_only
@pytest.mark.parametrize(("id", "shape"), [("Narrow-v0", "1"), ("Unsaid-v0", "3")])
def test_an_observation_of_another_shape_is_named(id: str, shape: str) -> None:
    envs = Environments(env(id), seed=0)
    told = rf"env\.id: {id} gave an observation of shape \({shape},\), where .* has \(2,\)"
    begin = [lambda: envs.reset(), lambda: envs.step(np.array([0, 1]))]
    if id == "Narrow-v0":
        begin.pop(0)()
    with pytest.raises(ValueError, match=told):
        begin[0]()


@gymnasium_only
def test_a_reward_that_is_too_large_to_learn_from_is_named() -> None:
    envs = Environments(env(options={"bad": 1e300}), seed=0)
    envs.reset()
    envs.step(np.array([1, 0]))
    with pytest.raises(ValueError, match=r"the reward 1e\+300 in environment 0, step 2"):
        envs.step(np.array([1, 0]))


@gymnasium_only
def test_settings_of_the_other_kind_are_refused() -> None:
    for setting, line in (
        ({"threads": 2}, r"env\.threads: is for ProcGen"),
        ({"distribution_mode": "hard"}, r"env\.distribution_mode: is for ProcGen"),
    ):
        with pytest.raises(ValueError, match=line):
            Environments(env(**setting), seed=0)
    with pytest.raises(ValueError, match=r"env\.processes: ProcGen has threads"):
        Environments(env("procgen/coinrun", processes=2), seed=0)
    with pytest.raises(ValueError, match=r"env\.distribution_mode: coinrun has no memory; .* maze"):
        Environments(env("procgen/coinrun", distribution_mode="memory"), seed=0)


@gymnasium_only
def test_channels_are_the_smallest_side() -> None:
    envs = Environments(env("Wide-v0"), seed=0)
    assert envs.observation_shape == (2, 8, 8)
    envs.reset()
    assert envs.step(np.array([1, 0]))[0][:, :, 0, 0].tolist() == [[1, 50], [0, 50]]


@gymnasium_only
def test_who_looks_for_an_environment_of_their_own_is_told_how() -> None:
    with pytest.raises(ValueError, match="my_module:MyEnv-v0"):
        Environments(env("Nowhere-v0"), seed=0)


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)")
sys.meta_path.insert(0, Absent())
import ray_subnets.rl.ppo, ray_subnets.rl.policies
from ray_subnets.rl.envs import Environments, Env
for id in ("procgen/coinrun", "CartPole-v1"):
    try:
        print(Environments(Env(id=id, num_envs=1), 0).num_actions)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("absent", [["procgen"], ["procgen", "gymnasium"]])
def test_without_the_packages_the_error_says_what_to_install(absent: list[str]) -> None:
    if "gymnasium" not in absent and not find_spec("gymnasium"):
        pytest.skip("gymnasium is not installed")
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT, *absent], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    game, classic = answer.stdout.splitlines()
    for word in ("ray_subnets[rl]", "3.11 and 3.12", "x86-64 Linux", "numpy < 2"):
        assert word in game
    assert classic == "2" if "gymnasium" not in absent else "ray_subnets[rl]" in classic


@procgen_only
@pytest.mark.parametrize("game", GAMES)
def test_every_game_goes_on_from_its_state(game: str) -> None:
    settings = env(f"procgen/{game}", num_envs=3, num_levels=5, start_level=10, frame_stack=2)
    one = Environments(settings, seed=3, gamma=0.99)
    seen, _ = one.reset()
    assert (seen.shape, seen.dtype, one.num_actions) == ((3, 6, 64, 64), np.uint8, 15)
    assert np.array_equal(seen[:, :3], seen[:, 3:])
    before = walk(one, 60)
    assert np.array_equal(before[-1][0][:, :3], before[-2][0][:, 3:]) or before[-1][2].any()
    learn(one, 20, seed=2)  # so that the scale of rewards has a state too
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    other = Environments(settings, seed=3, gamma=0.99)
    other.restore(state)
    assert same(walk(one, 80, seed=1), walk(other, 80, seed=1))
    assert np.array_equal(learn(one, 20, seed=3), learn(other, 20, seed=3))
    one.close()
    other.close()


@procgen_only
def test_levels_of_procgen_do_not_depend_on_the_actions() -> None:
    def levels(seed: int, actions: int) -> list[list[int]]:
        settings = env("procgen/bigfish", num_levels=50, start_level=20, threads=1)
        envs, found = Environments(settings, seed), list[list[int]]([[], []])
        envs.reset()
        rng = np.random.default_rng(actions)
        for _ in range(1500):
            infos = envs.step(rng.integers(15, size=2))[4]
            for n, i in enumerate(infos.get("ended", ())):
                found[i].append(int(infos["level"][n]))
        envs.close()
        return found

    one, other, third = levels(0, 1), levels(0, 2), levels(1, 1)
    for a, b, c in zip(one, other, third, strict=True):
        n = min(len(a), len(b), len(c))
        assert n > 3
        assert a[:n] == b[:n] != c[:n]
        assert all(20 <= level < 70 for level in a)


@procgen_only
def test_procgen_prints_nothing_and_names_what_it_cannot_play() -> None:
    code = (
        "from ray_subnets.rl.envs import Environments, Env\n"
        "Environments(Env(id='procgen/coinrun', num_envs=1), 0).reset()"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    with pytest.raises(ValueError, match="procgen/bigfish cannot be made"):
        Environments(env("procgen/bigfish", distribution_mode="exploration"), 0)
    with pytest.raises(ValueError, match="procgen/bigfish cannot be made"):
        Environments(env("procgen/bigfish", options={"wings": 2}), 0)
