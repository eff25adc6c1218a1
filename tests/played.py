"""Small environments whose answers can be worked out by hand; Gymnasium's, registered by id."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np

_TICKS = itertools.count()


class Corridor(gymnasium.Env[Any, Any]):
    """From 0 to 3; action 1 walks on for a reward of 1, action 0 stays for nothing."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, bad: float | None = None, spontaneous: bool = False) -> None:
        self._bad, self._spontaneous = bad, spontaneous

    def _see(self) -> Any:
        extra = next(_TICKS) if self._spontaneous else 0
        return np.array([self._at, self._level % 10 + extra], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._at, self._level = 0, seed or 0
        return self._see(), {}

    def step(self, action: Any) -> Any:
        self._at += int(action)
        reward = float(action)
        if self._bad is not None and self._at == 2:
            reward = self._bad
        return self._see(), reward, self._at == 3, False, {}


class Picture(Corridor):
    """The same seen as a grey image of 5 x 4 pixels."""

    observation_space = gymnasium.spaces.Box(0, 255, (5, 4), np.uint8)

    def _see(self) -> Any:
        return np.full((5, 4), 10 * self._at, np.uint8)


class Blind(Picture):
    """Needs an option, and cannot be drawn."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(self, place: str, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        raise NotImplementedError("too dark")


class Wide(Corridor):
    """Two channels, last."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 2), np.uint8)

    def _see(self) -> Any:
        return np.stack([np.full((8, 8), self._at), np.full((8, 8), 50)], 2).astype(np.uint8)


class Lost(Corridor):
    """Its second observation is not a number."""

    def _see(self) -> Any:
        return np.array([np.nan if self._at == 1 else 0.0, 1.0], np.float32)


class Graph(Corridor):
    observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)})


class Steering(Corridor):
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


class Numbered(Corridor):
    """Observations are numbers from 2 on, actions from 1 on."""

    observation_space = gymnasium.spaces.Discrete(4, start=2)
    action_space = gymnasium.spaces.Discrete(2, start=1)

    def _see(self) -> Any:
        return 2 + self._at

    def step(self, action: Any) -> Any:
        assert action in (1, 2)
        return super().step(action - 1)


class Strict(Corridor):
    """Goes its own way each time, and takes no step after its end."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._left = 2 + next(_TICKS) % 3
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        assert self._left > 0, "step after the end"
        self._left -= 1
        self._at = 0
        seen, reward, _, _, info = super().step(action)
        return seen, reward, self._left == 0, False, info


class Narrow(Corridor):
    """Gives one number where two are promised, from its first step on."""

    def step(self, action: Any) -> Any:
        seen, *rest = super().step(action)
        return seen[:1], *rest


class Unsaid(Corridor):
    """Gives three numbers where two are promised."""

    def _see(self) -> Any:
        return np.zeros(3, np.float32)


class Leaving(Corridor):
    """Its last observation, when it is cut off, is not a number."""

    def _see(self) -> Any:
        self._seen = 0 if self._at == 0 and not hasattr(self, "_seen") else self._seen + 1
        return np.array([np.nan if self._seen % 6 == 5 else 0.0, 1.0], np.float32)


for _name, _kind in (
    *(("Corridor", Corridor), ("Picture", Picture), ("Graph", Graph)),
    *(("Steering", Steering), ("Numbered", Numbered), ("Blind", Blind), ("Wide", Wide)),
    *(("Lost", Lost), ("Strict", Strict), ("Narrow", Narrow), ("Unsaid", Unsaid)),
    ("Leaving", Leaving),
):
    gymnasium.register(id=f"{_name}-v0", entry_point=_kind, max_episode_steps=5)
