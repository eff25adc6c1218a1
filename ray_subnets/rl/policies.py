"""A policy and its noisy ensembles: how they choose, and who does better on the same levels.

Legend: K members, N observations, A actions, E environments, P episodes in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ray_subnets.combining import combine
from ray_subnets.models.actor_critic import to_input
from ray_subnets.recipes import ChildSpec, derive
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_jobs import Choice, Combine
from ray_subnets.rl.policy_recipes import Env

Policy = Callable[[Tensor], Tensor]
"""observations `(N, *shape)` -> probabilities of actions `(N, A)`, float64"""


def noisy_children(
    seed: int, *, count: int = 8, sigma: float, density: float = 0.2
) -> tuple[ChildSpec, ...]:
    """The recipes of section 4.3.3: each perturbs its own random 20 % of all of the actor's
    weights, layer by layer, its last layer included.

    Args:
        sigma: standard deviation of the noise, 0.01 to 0.10 there.
    """
    return tuple(
        ChildSpec(
            id=f"noisy-{k:03d}",
            method="noisy",
            seed=derive(seed, "noisy", k),
            density=density,
            draw="bernoulli",
            sigma=sigma,
            mask_classifier=True,
        )
        for k in range(count)
    )


class Ensemble:
    """Actors that choose together; one actor is a policy by itself.

    Args:
        how: mean of probabilities (section 4.3.3), softmax of mean logits, or majority vote, in
            which the mean of probabilities breaks ties.
        shape: of an observation, if it is known.
    """

    def __init__(
        self,
        actors: Sequence[nn.Module],
        how: Combine = "probabilities",
        shape: Sequence[int] | None = None,
    ) -> None:
        assert actors
        self.actors = [actor.eval() for actor in actors]
        self.how = how
        self.observation_shape = tuple(shape) if shape is not None else None

    @torch.no_grad()
    def __call__(self, observations: Tensor | NDArray[Any]) -> Tensor:
        """`(N, *shape)` -> `(N, A)`.

        Raises:
            ValueError: they have another shape than those it was trained on, if that is known.
        """
        seen, shape = torch.as_tensor(observations), self.observation_shape
        if shape is not None and tuple(seen.shape[1:]) != shape:
            raise ValueError(
                f"observations: must be (N, {', '.join(map(str, shape))}) as in training (frames "
                f"stacked, channels first, numbers one-hot), not {tuple(seen.shape)}"
            )
        x = to_input(seen)
        return together(torch.stack([actor(x).float() for actor in self.actors]), self.how)


def together(logits: Tensor, how: Combine = "probabilities") -> Tensor:
    """Members' `(K, N, A)` -> probabilities of actions `(N, A)`."""
    if how != "vote":
        return combine(logits, how)
    tie = 1e-6  # less than one vote of any number of members that fits in memory
    return (1 - tie) * combine(logits, "vote") + tie * combine(logits)


def choose(probabilities: Tensor, how: Choice, uniforms: Tensor) -> Tensor:
    """Actions `(N,)`: the most probable, or one drawn where `uniforms` `(N,)` falls.

    Equal uniforms make two policies that are alike choose alike, so what differs between their
    returns is theirs.
    """
    if how == "argmax":
        return probabilities.argmax(1)
    inside = probabilities.cumsum(1)
    drawn = torch.searchsorted(inside, uniforms[:, None] * inside[:, -1:], right=True)
    return drawn.squeeze(1).clamp_max(probabilities.shape[1] - 1)


class Chance:
    """Every action is as likely: what a policy must be better than."""

    def __init__(self, num_actions: int) -> None:
        self.num_actions = num_actions

    def __call__(self, observations: Tensor) -> Tensor:
        """`(N, *shape)` -> `(N, A)`."""
        shape = (len(observations), self.num_actions)
        return torch.full(
            shape, 1 / self.num_actions, dtype=torch.float64, device=observations.device
        )


@dataclass(frozen=True)
class Played:
    """Episodes of one policy. Each environment plays the same number: the short ones do not count
    for more. All arrays are `(P, E)`."""

    returns: NDArray[np.float64]
    """sum of rewards"""
    lengths: NDArray[np.int64] | NDArray[np.float64]
    """steps; of a mean of policies, means"""
    levels: NDArray[np.int64]


def play(
    policy: Policy,
    env: Env,
    *,
    seed: int,
    episodes: int = 1,
    how: Choice = "sample",
    device: torch.device | str = "cpu",
    limit: int = 100_000,
) -> Played:
    """`episodes` in each of the environments, on levels and with random numbers that depend on
    `seed` alone: every policy meets the same.

    Args:
        limit: steps after which we give up.

    Raises:
        ValueError: episodes do not end.
    """
    if episodes < 1:
        raise ValueError(f"episodes: must be at least 1, not {episodes}")
    envs = Environments(env, seed)
    try:
        shape = (episodes, envs.num_envs)
        returns, lengths = np.zeros(shape), np.zeros(shape, np.int64)
        levels, done = np.zeros(shape, np.int64), np.zeros(envs.num_envs, np.int64)
        observations, _ = envs.reset()
        rng = np.random.Generator(np.random.SFC64(derive(seed, "choice")))
        for _ in range(limit):
            uniforms = rng.random(envs.num_envs)
            left = np.flatnonzero(done < episodes)  # the others' actions no longer matter
            probabilities = policy(torch.from_numpy(observations[left]).to(device))
            if not probabilities.isfinite().all():
                raise ValueError(
                    f"env.id: a policy answers an observation of {env.id} with NaN or infinity; "
                    "observations and logits must be finite"
                )
            drawn = torch.from_numpy(uniforms[left]).to(device)
            actions = np.zeros(envs.num_envs, np.int64)
            actions[left] = choose(probabilities, how, drawn).cpu().numpy()
            observations, _, _, _, infos = envs.step(actions)
            for n, i in enumerate(infos.get("ended", ())):
                if done[i] < episodes:
                    returns[done[i], i] = infos["return"][n]
                    lengths[done[i], i] = infos["length"][n]
                    levels[done[i], i] = infos["level"][n]
                    done[i] += 1
            if (done >= episodes).all():
                return Played(returns, lengths, levels)
    finally:
        envs.close()
    raise ValueError(
        f"env.id: after {limit} steps {env.id} has {int((done < episodes).sum())} environments "
        f"with fewer than {episodes} episodes; give it a time limit (options: max_episode_steps)"
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of one minus the other over pairs of episodes, and its bootstrap interval."""

    mean: float
    low: float
    high: float
    pairs: int
    levels: int
    """different ones among them"""
    better: int
    """pairs in which the first has the larger return"""
    worse: int


def interval(
    values: NDArray[np.float64], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: `(n,)`.
        level: chance that such an interval covers the mean.
    """
    rng = np.random.Generator(np.random.SFC64(derive(seed, "bootstrap")))
    part = max(1, min(resamples, 20_000_000 // len(values)))  # resamples at once: memory
    parts = [min(part, resamples - done) for done in range(0, resamples, part)]
    means = np.concatenate(
        [values[rng.integers(len(values), size=(n, len(values)))].mean(1) for n in parts]
    )
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def sure(
    values: NDArray[np.float64], levels: NDArray[Any], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """`interval` of the mean over episodes `(n,)` on `levels` `(n,)`.

    Episodes on one level are alike. Where each was played twice or more on average levels are drawn
    again, with all of their episodes, and not episodes (the cluster bootstrap; Davison and Hinkley
    1997, section 3.8).
    """
    which, place = np.unique(levels, return_inverse=True)
    if 2 * len(which) > len(values):
        return interval(values, seed=seed, resamples=resamples)
    sums, counts = np.bincount(place, values), np.bincount(place)
    rng = np.random.Generator(np.random.SFC64(derive(seed, "bootstrap")))
    drawn = rng.integers(len(which), size=(resamples, len(which)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def paired(a: Played, b: Played, *, seed: int = 0, resamples: int = 10_000) -> Difference:
    """`a` minus `b`, episode by episode on the same levels.

    Raises:
        ValueError: they did not play the same levels.
    """
    if a.levels.shape != b.levels.shape or (a.levels != b.levels).any():
        raise ValueError("the two policies did not play the same levels; use one seed and one env")
    off = (a.returns - b.returns).reshape(-1)
    low, high = sure(off, a.levels.reshape(-1), seed=seed, resamples=resamples)
    return Difference(
        mean=float(off.mean()),
        low=low,
        high=high,
        pairs=len(off),
        levels=len(np.unique(a.levels)),
        better=int((off > 0).sum()),
        worse=int((off < 0).sum()),
    )


def compare(
    policies: Mapping[str, Policy], env: Env, *, seed: int, **how: Any
) -> dict[str, Played]:
    """`play` for each, on the same levels."""
    return {name: play(policy, env, seed=seed, **how) for name, policy in policies.items()}
