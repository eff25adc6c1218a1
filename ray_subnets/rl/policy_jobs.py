"""What a worker is asked to do with a policy: learn it, tune a child of it, play it, film it.

Frozen dataclasses of plain numbers and strings, as in `recipes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_subnets.recipes import ChildSpec, Described, Stored
from ray_subnets.rl.policy_recipes import PPO, Env

Choice = Literal["sample", "argmax"]
Combine = Literal["probabilities", "logits", "vote"]


def rollouts(ppo: PPO, num_envs: int) -> int:
    """Whole rollouts in `ppo.total_steps`: the epochs of a policy's training."""
    return ppo.total_steps // (ppo.num_steps * num_envs)


@dataclass(frozen=True, kw_only=True)
class PolicyFit(Described):
    """Train a policy from its initial weights: the parent."""

    id: str
    env: Env
    ppo: PPO
    seed: int

    @property
    def epochs(self) -> int:
        return rollouts(self.ppo, self.env.num_envs)


@dataclass(frozen=True, kw_only=True)
class PolicyChild(Described):
    """Make a child of the parent's actor and tune it by PPO, its critic with it."""

    spec: ChildSpec
    """`training.epochs` counts rollouts"""
    env: Env
    ppo: PPO

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def epochs(self) -> int:
        return self.spec.epochs


@dataclass(frozen=True, kw_only=True)
class Member:
    """An actor, in a few hundred bytes."""

    spec: ChildSpec | None = None
    """None: the parent's own"""
    weights: Stored | None = None
    """file of a tuned child; one that was not tuned follows from its recipe"""


@dataclass(frozen=True, kw_only=True)
class Player:
    """Who plays: actors that choose together, or chance."""

    name: str
    """`parent`, a child's id, `noisy, vote`; unique among those that choose alike"""
    kind: Literal["random", "parent", "child", "ensemble"]
    members: tuple[Member, ...] = ()
    """none: every action is as likely"""
    combine: Combine = "probabilities"
    choose: Choice = "sample"
    group: str = ""
    """of a child or an ensemble: the label of its children"""


@dataclass(frozen=True, kw_only=True)
class Match(Described):
    """Let several policies play the same levels: one episode in each environment."""

    id: str
    env: Env
    players: tuple[Player, ...]
    seed: int
    """of levels and choices: the same for all that are to be compared"""
    limit: int
    """steps after which an episode that goes on is an error"""

    @property
    def epochs(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Film(Described):
    """Let a policy play and keep what is seen."""

    id: str
    env: Env
    player: Player
    seed: int
    steps: int
    """frames, at most"""

    @property
    def epochs(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class PolicyCell(Described):
    """A cell of a sweep with one seed: a run of its own, of a parent that other cells share."""

    id: str
    settings: Mapping[str, Any]
    """of the run"""
    parent: str
    """folder of the parent, in the sweep's"""
    alone: bool = False
    """train that parent, no more"""
    rollouts: int = 0
    """of the parent, if it is trained"""

    @property
    def epochs(self) -> int:
        return self.rollouts


def split(players: Sequence[Player], most: int) -> list[tuple[Player, ...]]:
    """Players for each job, in order: so many that not more than `most` networks are asked in it,
    or one player that has more members than that."""
    jobs: list[tuple[Player, ...]] = []
    networks = 0
    for player in players:
        size = max(1, len(player.members))
        if jobs and networks + size <= most:
            jobs[-1] = (*jobs[-1], player)
            networks += size
        else:
            jobs.append((player,))
            networks = size
    return jobs
