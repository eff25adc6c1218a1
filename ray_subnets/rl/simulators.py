"""What plays, many at a time: what all simulators do, and Gymnasium's environments by id.

A simulator resets an environment in the step that ends its episode, and gives its whole state as
arrays, so that training goes on where it stopped. Legend: E environments.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_subnets.recipes import derive
from ray_subnets.strangers import raised

Array = NDArray[Any]
LAST_LEVEL = 2**31 - 1


@dataclass(frozen=True)
class Levels:
    """Levels `start` to `start + count - 1`; a count of 0: all there are."""

    start: int = 0
    count: int = 0

    def draw(self, seed: int, env: int, episode: int) -> int:
        """The level of an episode: no matter how the ones before were played."""
        start, count = (self.start, self.count) if self.count else (0, LAST_LEVEL)
        return start + derive(seed, "level", env, episode) % count


class Stepped(NamedTuple):
    """After one action in each environment."""

    frames: Array
    """`(E, *frame)`: what to act on next; after an end, the first of the next episode"""
    rewards: Array
    """`(E,)` float64"""
    terminated: Array
    """`(E,)` bool: the episode ended, and nothing would follow"""
    truncated: Array
    """`(E,)` bool: the episode was cut off"""
    final: dict[int, Array]
    """environment -> last frame of the episode that was cut off"""


class Simulator(Protocol):
    """E environments of one kind."""

    frame_shape: tuple[int, ...]
    """`(channels, height, width)` uint8 for images, else `(D,)` float32"""
    num_actions: int

    def reset(self) -> Array:
        """First frames, `(E, *frame)`."""

    def step(self, actions: Array, out: Array | None = None) -> Stepped:
        """One action in each, `(E,)` of 0 to `num_actions - 1`.

        Args:
            out: `(E, *frame)`, where to write the frames; the simulator may read them again until
                the next step. None: a new array.
        """

    def levels(self) -> Array:
        """`(E,)` int64: the level that each is in."""

    def pictures(self) -> Array | None:
        """What a person would see, `(E, H, W, 3)` uint8; None if there is nothing to see."""

    def state(self) -> dict[str, Array]:
        """All that decides what comes next."""

    def restore(self, state: Mapping[str, Array]) -> tuple[Array, list[int]]:
        """Go on from `state`: frames `(E, *frame)`, and which environments could not be brought
        back to where they were and began their next episode instead."""

    def close(self) -> None: ...


class GymnasiumSimulator:
    """E environments of an id, in this process. A level is the seed an episode is reset with.

    An environment's state is its level and the actions since: they are played again to restore it.
    One that answers them differently (it draws from elsewhere) cannot be restored.

    Args:
        first: number of the first environment, where these are a part of more.

    Raises:
        ValueError: unknown id or option, gymnasium is not installed, or observations or actions
            are of a kind that no network here takes.
    """

    def __init__(
        self,
        id: str,
        num_envs: int,
        levels: Levels,
        seed: int,
        options: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> None:
        try:
            import gymnasium
        except ModuleNotFoundError:
            raise ValueError(
                "env: environments need the package gymnasium; install ray_subnets[rl], or "
                "gymnasium alone"
            ) from None
        try:
            self._envs = [
                gymnasium.make(id, disable_env_checker=True, **options) for _ in range(num_envs)
            ]
        except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, gymnasium.error.UnregisteredEnv) and ":" not in id:
                reason += " If it is yours, name its module too: my_module:MyEnv-v0."
            raise ValueError(f"env.id: {id!r} cannot be made: {reason}") from None
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise ValueError(f"env.id: making {id!r} raised {raised(error)}") from error
        spec = self._envs[0].spec
        assert spec
        self._id, self.spec_id = id, spec.id
        self._levels, self._seed, self._first = levels, seed, first
        actions = self._envs[0].action_space
        if not isinstance(actions, gymnasium.spaces.Discrete):
            raise ValueError(
                f"env.id: {id!r} has actions {actions}; a policy here chooses one of a number "
                "of actions (Discrete)"
            )
        self.num_actions, self._first_action = int(actions.n), int(actions.start)
        space = self._envs[0].observation_space
        self.frame_shape, self._encode = _encoder(id, gymnasium.spaces, space)
        self.dtype = np.uint8 if len(self.frame_shape) == 3 else np.float32
        self._level = np.zeros(num_envs, np.int64)
        self._episode = np.zeros(num_envs, np.int64)
        self._actions = [array("q") for _ in range(num_envs)]  # the environments', since the reset
        self._frames = np.empty((num_envs, *self.frame_shape), self.dtype)

    def _begin(self, i: int) -> Array:
        """The next episode of environment `i`: its first frame."""
        level = self._levels.draw(self._seed, self._first + i, int(self._episode[i]))
        self._episode[i] += 1
        self._level[i] = level
        self._actions[i] = array("q")
        try:
            first, _ = self._envs[i].reset(seed=level)
            return self._shaped(self._encode(first))
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise self._told("reset", error) from error

    def _shaped(self, frame: Array) -> Array:
        """Is it of the shape that its space promises? Looked at once an episode: NumPy would spread
        one number over all."""
        if np.shape(frame) != self.frame_shape:
            raise ValueError(
                f"env.id: {self._id} gave an observation of shape {np.shape(frame)}, where its "
                f"observation_space has {self.frame_shape}"
            )
        return frame

    def _told(self, what: str, error: BaseException) -> ValueError:
        """What a user's environment raised, as one line; once."""
        if isinstance(error, ValueError) and str(error).startswith("env.id: "):
            return error
        return ValueError(f"env.id: {what} of {self._id} raised {raised(error)}")

    def reset(self) -> Array:
        self._episode[:] = 0
        first = [self._begin(i) for i in range(len(self._envs))]
        self._frames = np.stack(first).astype(self.dtype)
        return self._frames

    def step(self, actions: Array, out: Array | None = None) -> Stepped:
        count = len(self._envs)
        frames = np.empty((count, *self.frame_shape), self.dtype) if out is None else out
        rewards = np.empty(count)
        terminated, truncated = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        final: dict[int, Array] = {}
        encode = self._encode
        # NumPy's own numbers: Gymnasium takes longer to check Python's.
        each = zip(self._envs, self._actions, actions + self._first_action, strict=True)
        try:
            for i, (env, kept, action) in enumerate(each):
                frame, reward, end, cut, _ = env.step(action)
                if not kept:
                    self._shaped(encode(frame))
                kept.append(action)
                rewards[i] = reward
                frames[i] = encode(frame)
                if end or cut:
                    terminated[i], truncated[i] = end, cut and not end
                    if not end:
                        final[i] = frames[i].copy()
                    frames[i] = self._begin(i)
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise self._told("step", error) from error
        self._frames = frames
        return Stepped(frames, rewards, terminated, truncated, final)

    def levels(self) -> Array:
        return self._level.copy()

    def pictures(self) -> Array | None:
        if self._envs[0].render_mode == "rgb_array":
            return np.stack([np.asarray(env.render(), np.uint8) for env in self._envs])
        if len(self.frame_shape) == 3 and self.frame_shape[0] in (1, 3):
            planes = np.broadcast_to(self._frames, (len(self._envs), 3, *self.frame_shape[1:]))
            return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        return None

    def state(self) -> dict[str, Array]:
        return {
            "level": self._level.copy(),
            "episode": self._episode.copy(),
            "length": np.array([len(actions) for actions in self._actions]),
            "actions": np.concatenate(self._actions, dtype=np.int64) - self._first_action,
            "frames": self._frames.copy(),
        }

    def restore(self, state: Mapping[str, Array]) -> tuple[Array, list[int]]:
        self._level[:], self._episode[:] = state["level"], state["episode"]
        cuts = np.cumsum(state["length"])[:-1]
        actions = state["actions"] + self._first_action
        self._actions = [array("q", part.tolist()) for part in np.split(actions, cuts)]
        frames, lost = np.empty_like(self._frames), []
        for i, env in enumerate(self._envs):
            if not self._replayed(i, env, frames, state["frames"][i]):
                lost.append(i)
                frames[i] = self._begin(i)
        self._frames = frames
        return frames, lost

    def _replayed(self, i: int, env: Any, frames: Array, then: Array) -> bool:
        """Bring an environment to where it was, if the same actions lead it there."""
        over = False
        try:
            frame = env.reset(seed=int(self._level[i]))[0]
            for action in np.array(self._actions[i]):
                if over:
                    return False
                frame, _, end, cut, _ = env.step(action)
                over = end or cut
            frames[i] = self._encode(frame)
        except (Exception, SystemExit):  # whatever a user's code does where it went another way
            return False
        return not over and np.array_equal(frames[i], then)

    def close(self) -> None:
        for env in self._envs:
            with suppress(Exception):  # a user's code; nothing that counts is left to be done
                env.close()


def _encoder(id: str, spaces: Any, space: Any) -> tuple[tuple[int, ...], Callable[[Any], Array]]:
    """Shape of a frame, and the function from an observation to it.

    Raises:
        ValueError: no network here takes such observations.
    """
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3):
        if len(space.shape) == 2:
            return (1, *space.shape), lambda image: image[None]
        few = space.shape[-1] < min(space.shape[:2])  # the smallest side is that of channels
        if space.shape[-1] in (1, 3, 4) or few:
            height, width, channels = space.shape
            return (channels, height, width), lambda image: image.transpose(2, 0, 1)
        return space.shape, np.asarray
    if isinstance(space, spaces.Box | spaces.MultiBinary) and 0 not in space.shape:
        size = int(np.prod(space.shape))
        if len(space.shape) == 1:
            return (size,), np.asarray
        return (size,), lambda values: np.asarray(values, np.float32).reshape(size)
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), lambda number: np.eye(1, space.n, number - space.start, np.float32)[
            0
        ]
    raise ValueError(
        f"env.id: {id!r} has observations {space}; a network here takes a Box, MultiBinary or "
        "Discrete: register the environment with gymnasium.wrappers.FlattenObservation around it"
    )
