"""The messages of policies: what is played, how it is learnt, and what a rollout reports.

Frozen dataclasses of plain numbers and strings, as in `recipes.py`. Sources: Table 4.2 of the
dissertation, and [37] Huang et al. 2022, "The 37 implementation details of proximal policy
optimization", numbered as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from ray_subnets.recipes import Count, Fraction, NonNegative, Positive

Mode = Literal["easy", "hard", "extreme", "memory"]


@dataclass(frozen=True, kw_only=True)
class Env:
    """Which environments are played, on which levels, and what a policy sees of them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    id: str
    """`procgen/coinrun` and 15 other games, or an id of Gymnasium's: `CartPole-v1`"""
    num_envs: Count = 64
    """played side by side (Table 4.2)"""
    distribution_mode: Mode = "easy"
    """of ProcGen's levels"""
    start_level: Annotated[int, Ge(0)] = 0
    num_levels: Annotated[int, Ge(0)] = 0
    """levels from `start_level` on that are played; 0: all there are. A level of Gymnasium's is
    the seed of an episode"""
    frame_stack: Count = 2
    """newest frames that a policy sees, the newest last (Table 4.2)"""
    threads: Annotated[int, Ge(0)] = 0
    """that step ProcGen's games; 0: the calling one"""
    processes: Annotated[int, Ge(0)] = 0
    """that step Gymnasium's environments, each its share; no part of the numbers. 0: the calling
    one"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """for `gymnasium.make`, or ProcGen's: `use_backgrounds`, `restrict_themes`"""


PLACES = ("threads", "processes")
"""settings of an `Env` that say where it is stepped, and are no part of the numbers"""


@dataclass(frozen=True, kw_only=True)
class PPO:
    """How a policy is trained; the defaults are those of Table 4.2, or named otherwise."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    total_steps: Count = 10_000_000
    """actions over all environments together; whole rollouts, rounded down"""
    num_steps: Count = 256
    """actions in each environment per rollout"""
    update_epochs: Count = 3
    """passes over a rollout, at most"""
    num_minibatches: Count = 8
    lr: Positive = 5e-4
    """of Adam"""
    anneal_lr: bool = False
    """to zero, linearly over all iterations [37, 4]; the table names one rate"""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.999
    gae_lambda: Fraction = 0.95
    clip_coef: Positive = 0.2
    """of the ratio of probabilities"""
    clip_value: Positive | None = 0.2
    """how far a value may move in an iteration [37, 9], in units of normalised rewards: others are
    not clipped, since their values may have to go far. None: never"""
    ent_coef: NonNegative = 0.01
    vf_coef: NonNegative = 0.5
    """weight of the value loss (openai/baselines); not in the table"""
    max_grad_norm: Positive = 0.5
    """of all gradients together [37, 11]; not in the table"""
    target_kl: NonNegative | None = 0.01
    """nats; after a pass in which the last minibatch is further from the policy that acted, the
    rest of the passes is left out [37, early stopping]. None: never"""
    normalize_reward: bool = True
    """by the running return: `envs.RunningReturn`"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the networks' passes; weights, optimizer, advantages and losses stay float32"""


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One rollout was collected and learnt from."""

    id: str
    iteration: int
    """done, 1-based"""
    iterations: int
    steps: int
    """actions taken since the start"""
    returns: tuple[float, ...]
    """sums of rewards, as they came, of the episodes that ended in this rollout"""
    lengths: tuple[int, ...]
    """their steps"""
    policy_loss: float
    value_loss: float
    entropy: float
    """nats"""
    approx_kl: float
    """nats, from the policy that acted, in the last minibatch"""
    clip_fraction: float
    """of samples whose ratio was clipped"""
    explained_variance: float
    """1 - Var(returns - values) / Var(returns), before the update"""
    passes: int
    """over the rollout, `update_epochs` or fewer"""
    lr: float
    seconds: float
    """wall time"""
    rollout_seconds: float
    """of it, collecting"""

    @property
    def mean_return(self) -> float | None:
        return sum(self.returns) / len(self.returns) if self.returns else None
