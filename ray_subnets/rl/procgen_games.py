"""ProcGen's 16 games as a simulator; the package is optional, and imported with the first game."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import torch

from ray_subnets.recipes import derive
from ray_subnets.rl.simulators import LAST_LEVEL, Array, Levels, Stepped

GAMES = (
    *("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot"),
    *("heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot"),
)
"""of ProcGen (Cobbe et al. 2020, "Leveraging procedural generation")"""
_EASY = (
    *((1, 40), (0.5, 13), (3.5, 12), (0.5, 13), (2, 12.6), (5, 10), (1.5, 19), (-1.5, 32.4)),
    *((3.5, 10), (3, 10), (3, 10), (5, 10), (1.5, 13), (3.5, 10), (4.5, 30), (2.5, 64)),
)
_HARD = (
    *((0, 40), (0.5, 13), (2, 13.4), (0.5, 14.2), (1, 12.6), (5, 10), (1.5, 19), (-0.5, 27.2)),
    *((2, 10), (1, 10), (1.5, 10), (4, 10), (1.5, 20), (2, 10), (3, 30), (1.5, 35)),
)
RANGES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "easy": dict(zip(GAMES, _EASY, strict=True)),
    "hard": dict(zip(GAMES, _HARD, strict=True)),
}
"""mode -> game -> returns that count as 0 and as 1 (the same, appendix C): of a policy that sees
nothing, and the largest that can be had, or that was had"""
_ONLY = {
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
}
"""modes that not every game has: it ends the process where one has not"""
NO_PROCGEN = (
    "env: ProcGen's games need the package procgen-mirror; install ray_subnets[rl] (0.10.7 is "
    "there for Python 3.11 and 3.12 on x86-64 Linux, and needs numpy < 2, pyarrow < 26)"
)


class ProcgenSimulator:
    """E copies of a game of ProcGen.

    Its levels are drawn inside, from the seed, in an order that does not depend on the actions. A
    time limit is an end like any other there: the game does not say which it was.

    Raises:
        ValueError: unknown game, mode or option, or the package is not installed.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        levels: Levels,
        seed: int,
        options: Mapping[str, Any],
        *,
        distribution_mode: str = "easy",
        threads: int = 0,
    ) -> None:
        if game not in GAMES:
            raise ValueError(f"env.id: ProcGen has no game {game!r}; it has {', '.join(GAMES)}")
        if distribution_mode in _ONLY and game not in _ONLY[distribution_mode]:
            raise ValueError(
                f"env.distribution_mode: {game} has no {distribution_mode}; that is of "
                f"{', '.join(_ONLY[distribution_mode])}"
            )
        make = _procgen()
        try:
            self._env = make(
                num=num_envs,
                env_name=game,
                start_level=levels.start if levels.count else 0,
                num_levels=levels.count,
                rand_seed=derive(seed, "procgen") % LAST_LEVEL,
                distribution_mode=distribution_mode,
                num_threads=threads,
                **options,
            )
        except (AssertionError, TypeError) as error:
            raise ValueError(f"env: procgen/{game} cannot be made: {error}") from None
        self._count, self._began = num_envs, False
        self.frame_shape: tuple[int, ...] = (3, 64, 64)
        self.num_actions = len(self._env.combos)
        self._level = np.zeros(num_envs, np.int64)

    def _read_levels(self) -> None:
        self._level = np.array([info["level_seed"] for info in self._env.get_info()], np.int64)

    def reset(self) -> Array:
        assert not self._began, "ProcGen's games begin once; make them anew"
        _, observations, _ = self._env.observe()
        self._read_levels()
        return _planes(observations)

    def step(self, actions: Array, out: Array | None = None) -> Stepped:
        self._began = True
        self._env.act(actions)
        rewards, observations, first = self._env.observe()
        if first.any():
            self._read_levels()
        never = np.zeros(self._count, np.bool_)
        return Stepped(_planes(observations, out), rewards.astype(np.float64), first, never, {})

    def levels(self) -> Array:
        return self._level.copy()

    def pictures(self) -> Array | None:
        picture: Array = self._env.observe()[1]["rgb"]
        return picture

    def state(self) -> dict[str, Array]:
        parts = [np.frombuffer(part, np.uint8) for part in self._env.get_state()]
        return {"bytes": np.concatenate(parts), "length": np.array([len(part) for part in parts])}

    def restore(self, state: Mapping[str, Array]) -> tuple[Array, list[int]]:
        cuts = np.cumsum(state["length"])[:-1]
        self._env.observe()
        self._env.set_state([part.tobytes() for part in np.split(state["bytes"], cuts)])
        _, observations, _ = self._env.observe()
        self._read_levels()
        self._began = True
        return _planes(observations), []

    def close(self) -> None:
        self._env.close()


def _planes(observations: Mapping[str, Array], out: Array | None = None) -> Array:
    """`(E, H, W, 3)` -> `(E, 3, H, W)`, by torch: in half the time that numpy takes."""
    pictures = observations["rgb"].transpose(0, 3, 1, 2)
    planes = np.empty(pictures.shape, np.uint8) if out is None else out
    torch.from_numpy(planes).copy_(torch.from_numpy(pictures))
    return planes


def _procgen() -> Callable[..., Any]:
    """ProcGen's own class, without the notice that its old `gym` prints when imported.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from procgen import ProcgenGym3Env
    except ImportError:
        raise ValueError(NO_PROCGEN) from None
    return ProcgenGym3Env
