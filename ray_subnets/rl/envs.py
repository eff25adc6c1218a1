"""Environments for a policy to learn in: levels, stacked frames, rewards in proportion.

    envs = Environments(Env(id="procgen/coinrun", num_levels=200), seed=0, gamma=0.999)
    observations, _ = envs.reset()
    observations, rewards, terminated, truncated, infos = envs.step(actions)

in the manner of `gymnasium.vector` with its resets in the same step. Legend: E environments,
k stacked frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_subnets.rl.env_processes import ProcessesSimulator
from ray_subnets.rl.policy_recipes import Env
from ray_subnets.rl.procgen_games import RANGES, ProcgenSimulator
from ray_subnets.rl.simulators import (
    LAST_LEVEL,
    Array,
    GymnasiumSimulator,
    Levels,
    Simulator,
    Stepped,
)

Say = Callable[[str], None]
PROCGEN = "procgen/"


def unseen(env: Env) -> Env:
    """The same on all the levels above those of `env`: none of them was trained on.

    Raises:
        ValueError: `env` plays all levels.
    """
    start = env.start_level + env.num_levels
    if start > LAST_LEVEL:
        raise ValueError(f"env.start_level: levels end at {LAST_LEVEL}")
    if not env.num_levels or start == LAST_LEVEL:
        raise ValueError("env.num_levels: with all levels in training none is unseen; use 200")
    return replace(env, start_level=start, num_levels=LAST_LEVEL - start)


def simulator(env: Env, seed: int) -> Simulator:
    """What plays `env`.

    Raises:
        ValueError: it cannot be played: one line that names the setting.
    """
    for name, least in (("num_envs", 1), ("frame_stack", 1), ("start_level", 0), ("num_levels", 0)):
        if getattr(env, name) < least:
            raise ValueError(f"env.{name}: must be at least {least}, not {getattr(env, name)}")
    if env.num_levels and env.start_level + env.num_levels > LAST_LEVEL:
        raise ValueError(f"env.start_level: levels end at {LAST_LEVEL}")
    if env.id.startswith(PROCGEN) and env.processes:
        raise ValueError("env.processes: ProcGen has threads of its own; use env.threads")
    if not env.id.startswith(PROCGEN):
        for name, usual in (("threads", 0), ("distribution_mode", "easy")):
            if getattr(env, name) != usual:
                raise ValueError(f"env.{name}: is for ProcGen's games; leave it out")
    if env.start_level and not env.num_levels:
        raise ValueError("env.start_level: give num_levels too; without it all levels are played")
    levels = Levels(env.start_level, env.num_levels)
    if env.id.startswith(PROCGEN):
        return ProcgenSimulator(
            env.id.removeprefix(PROCGEN),
            *(env.num_envs, levels, seed, env.options),
            distribution_mode=env.distribution_mode,
            threads=env.threads,
        )
    settings = (env.id, env.num_envs, levels, seed, env.options)
    if env.processes:
        return ProcessesSimulator(*settings, processes=env.processes)
    return GymnasiumSimulator(*settings)


def reward_range(env: Env) -> tuple[float, float] | None:
    """The returns that count as 0 and as 1, where someone has published them: for ProcGen."""
    if not env.id.startswith(PROCGEN):
        return None
    return RANGES.get(env.distribution_mode, {}).get(env.id.removeprefix(PROCGEN))


class RunningReturn:
    """Divides rewards by the standard deviation of the discounted return so far.

    The return of each environment, `R = gamma R + r`, joins a running variance at every step; the
    mean is not subtracted, and the result is clipped to ±10 (openai/baselines, `VecNormalize`;
    Engstrom et al. 2020, "Implementation matters", section 3).
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        self.gamma = gamma
        self.returns = np.zeros(num_envs)
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards: Array, ended: Array) -> Array:
        """`(T, E)` rewards, step after step, and which episodes ended with them -> `(T, E)`."""
        scaled = np.empty_like(rewards)
        for t, (now, end) in enumerate(zip(rewards, ended, strict=True)):
            self.returns = self.returns * self.gamma + now
            n = len(now)
            mean = float(self.returns.sum()) / n
            off = self.returns - mean
            # Two samples joined (Chan, Golub and LeVeque 1979).
            delta, total = mean - self.mean, self.count + n
            squares = self.variance * self.count + float(off @ off)
            squares += delta * delta * self.count * n / total
            self.mean += delta * n / total
            self.variance, self.count = squares / total, total
            self.returns[end] = 0.0
            scaled[t] = now / (self.variance + 1e-8) ** 0.5
        return scaled.clip(-10.0, 10.0)

    @property
    def moments(self) -> Array:
        """Mean, variance and count `(3,)` of the discounted return."""
        return np.array([self.mean, self.variance, self.count])

    @moments.setter
    def moments(self, moments: Array) -> None:
        self.mean, self.variance, self.count = moments.tolist()

    def state(self) -> dict[str, Array]:
        return {"returns": self.returns.copy(), "moments": self.moments}

    def restore(self, state: Mapping[str, Array]) -> None:
        self.returns = state["returns"].copy()
        self.moments = state["moments"]


class Environments:
    """E environments of one kind.

    Args:
        seed: of the levels, and of what is drawn in them.
        gamma: discount of the return that `scaled` divides rewards by; None: they stay as they are.

    Raises:
        ValueError: see `simulator`.
    """

    def __init__(self, env: Env, seed: int, *, gamma: float | None = None) -> None:
        self.env = env
        self.simulator = simulator(env, seed)
        self.num_envs = env.num_envs
        self.num_actions = self.simulator.num_actions
        frame = self.simulator.frame_shape
        self._width = frame[0]
        self.observation_shape = (frame[0] * env.frame_stack, *frame[1:])
        """`(k channels, height, width)` uint8 for images, else `(k D,)` float32"""
        self.normaliser = RunningReturn(env.num_envs, gamma) if gamma is not None else None
        self.observations: Array | None = None
        """`(E, *observation_shape)`, what the next actions answer; None before `reset`"""
        self._returns, self._lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
        self._steps = 0

    def reset(self) -> tuple[Array, dict[str, Any]]:
        """First observations. Once: the order of levels begins anew only with a new object."""
        assert self.observations is None
        self.observations = self._stacked(self.simulator.reset())
        return self.observations, {}

    def _stacked(self, first: Array) -> Array:
        """Stacks of first frames: each is there k times."""
        return np.concatenate([first] * self.env.frame_stack, 1)

    def step(
        self, actions: Array, out: Array | None = None
    ) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """`(E,)` actions -> observations, rewards, terminated, truncated, infos.

        Where an episode ended, the observation is the first of the next one. Then infos has
        `final_obs`, environment -> last observation of an episode that was cut off; and `ended`,
        `return`, `length`, `level`: for each that ended its environment, sum of rewards, steps,
        and level.

        Args:
            out: where to write the observations, and to leave them until the next step; None: a
                new array.

        Raises:
            ValueError: a reward is NaN or infinite.
        """
        levels = self.simulator.levels()
        observations, rewards, terminated, truncated, final = self.advance(actions, out)
        over = terminated | truncated
        returns, lengths = self.count(rewards[None], over[None])
        if not returns:
            return observations, rewards, terminated, truncated, {}
        infos = {"return": np.array(returns), "length": np.array(lengths), "final_obs": final}
        infos |= {"ended": over.nonzero()[0], "level": levels[over]}
        return observations, rewards, terminated, truncated, infos

    def advance(self, actions: Array, out: Array | None = None) -> Stepped:
        """`step` for those who keep rewards and ends themselves, and give them to `count` later,
        of all steps at once: small environments take a tenth less time.

        Returns:
            Observations for frames, stacked where frames are.
        """
        before, width = self.observations, self._width
        assert before is not None, "reset first"
        observations = np.empty_like(before) if out is None else out
        self._steps += 1
        if self.env.frame_stack == 1:
            stepped = self.simulator.step(actions, observations)
        else:
            observations[:, :-width] = before[:, width:]
            stepped = self.simulator.step(actions, observations[:, -width:])
            frames, _, terminated, truncated, final = stepped
            if len(ended := (terminated | truncated).nonzero()[0]):
                observations[ended] = self._stacked(frames[ended])
            final = {i: np.concatenate([before[i, width:], last]) for i, last in final.items()}
            stepped = stepped._replace(frames=observations, final=final)
        self.observations = observations
        return stepped

    def count(self, rewards: Array, ended: Array) -> tuple[list[float], list[int]]:
        """Returns and lengths of the episodes that ended, step after step.

        Args:
            rewards: `(T, E)`, of the steps since this was asked last.
            ended: `(T, E)` bool: an episode ended with them.

        Raises:
            ValueError: a reward is NaN or infinite.
        """
        with np.errstate(over="ignore"):
            good = np.isfinite(rewards.astype(np.float32))  # as they are learnt from
        if not good.all():
            t, worst = (int(first[0]) for first in np.nonzero(~good))
            raise ValueError(
                f"env.id: {self.env.id} gave the reward {rewards[t, worst]} in environment "
                f"{worst}, step {self._steps - len(rewards) + t + 1}; rewards must be finite"
            )
        returns, lengths = list[float](), list[int]()
        for now, end in zip(rewards, ended, strict=True):
            self._returns += now
            self._lengths += 1
            if end.any():
                returns += self._returns[end].tolist()
                lengths += self._lengths[end].tolist()
                self._returns[end], self._lengths[end] = 0.0, 0
        return returns, lengths

    def check(self, observations: Tensor) -> None:
        """Are all that a rollout kept, `(T, E, *observation_shape)`, numbers? Once for all its
        steps: a look at each costs small environments 3 % of their time.

        Raises:
            ValueError: NaN or infinity is among them.
        """
        if observations.is_floating_point() and not (good := observations.isfinite()).all():
            step, worst = (~good.flatten(2).all(2)).nonzero()[0].tolist()
            raise ValueError(
                f"env.id: {self.env.id} gave an observation with NaN or infinity in environment "
                f"{worst}, step {self._steps - len(observations) + step}; they must be finite"
            )

    def check_final(self, final: Mapping[int, Array]) -> None:
        """Are the last observations of episodes that were cut off numbers?

        Raises:
            ValueError: NaN or infinity is among them.
        """
        for i, observation in final.items():
            if observation.dtype != np.uint8 and not np.isfinite(observation).all():
                raise ValueError(
                    f"env.id: {self.env.id} gave a last observation with NaN or infinity in "
                    f"environment {i}, step {self._steps}; they must be finite"
                )

    def scaled(self, rewards: Array, ended: Array) -> Array:
        """What to learn from: the rewards of the steps since this was asked last, in proportion.

        Args:
            rewards: `(T, E)`, as they came.
            ended: `(T, E)` bool: an episode ended with them.
        """
        return rewards if self.normaliser is None else self.normaliser(rewards, ended)

    def state(self) -> dict[str, Tensor]:
        """All that decides what comes next, as tensors."""
        assert self.observations is not None
        arrays = {f"simulator.{k}": v for k, v in self.simulator.state().items()}
        if self.normaliser is not None:
            arrays |= {f"normaliser.{k}": v for k, v in self.normaliser.state().items()}
        arrays |= {"observations": self.observations, "return": self._returns}
        arrays |= {"length": self._lengths, "steps": np.array(self._steps)}
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, Tensor], say: Say = lambda line: None) -> None:
        """Go on from `state`.

        Args:
            say: called with one line if episodes could not be brought back and began anew.
        """
        arrays = {name: np.array(tensor) for name, tensor in state.items()}

        def of(part: str) -> dict[str, Array]:
            part += "."
            return {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}

        frames, lost = self.simulator.restore(of("simulator"))
        if self.normaliser is not None:
            self.normaliser.restore(of("normaliser"))
        self.observations = arrays["observations"]
        self._returns, self._lengths = arrays["return"], arrays["length"]
        self._steps = int(arrays["steps"])
        if lost:
            say(
                f"env.id: {self.env.id} does not repeat itself from a seed; {len(lost)} of "
                f"{self.num_envs} episodes begin anew"
            )
            self.observations[lost] = self._stacked(frames[lost])
            self._returns[lost], self._lengths[lost] = 0.0, 0
            if self.normaliser is not None:
                self.normaliser.returns[lost] = 0.0

    def close(self) -> None:
        self.simulator.close()
