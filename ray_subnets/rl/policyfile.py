"""The settings of a run that trains a policy: a YAML file with an `env:` section.

As `config.py` and `configfile.py` for classifiers, whose sections it shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ray_subnets import configfile
from ray_subnets.config import ModelSection, ResourcesSection, named
from ray_subnets.groups import Group, Noisy, Section
from ray_subnets.population import Task
from ray_subnets.recipes import Annealing, ChildSpec, Count, Training, derive
from ray_subnets.rl import ppo
from ray_subnets.rl.envs import unseen
from ray_subnets.rl.policy_jobs import Choice, Combine, PolicyChild, PolicyFit
from ray_subnets.rl.policy_recipes import PPO, Env

ENV = "env"
"""the section that only a policy's run has"""


def named_env(value: Any) -> Any:
    """`env: CartPole-v1` is short for `env: {id: CartPole-v1}`."""
    return {"id": value} if isinstance(value, str) else value


class Weights(Group):
    """What children of a policy have in common: single weights of the actor, never the critic."""

    mask_classifier: bool = True
    """also the last layer: section 4.3.3 perturbs all of the weights"""

    @model_validator(mode="after")
    def _weights(self) -> Weights:
        for key in ("structure", "recompute_norm"):
            if getattr(self, key) != Group.model_fields[key].default:
                raise ValueError(f"{key}: is for classifiers; leave it out for a policy")
        return self


class NoisyPolicy(Weights, Noisy):
    """Gaussian noise on a subnetwork of the actor, no training (section 4.3.3)."""

    @model_validator(mode="after")
    def _plain(self) -> NoisyPolicy:
        if self.kl_target is not None:
            raise ValueError("kl_target: needs validation data; give a policy's noise by sigma")
        return self


class Tuned(Weights):
    """Children that PPO tunes on their own actor."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """fraction removed; default 1 - 1 / partition"""
    tune: PPO
    """of the child; what is left out is as in the run's own `ppo`, but total_steps is required"""

    @model_validator(mode="after")
    def _consistent(self) -> Tuned:
        self._check_sets(f"partitions of {self.partition}")
        self._kept(self.sparsity)
        return self

    def training(self, num_envs: int) -> Training:
        """As a recipe knows it: its epochs are rollouts."""
        return Training(
            epochs=ppo.iterations(self.tune, num_envs),
            batch_size=self.tune.num_steps * num_envs,
            optimizer="adam",
            schedule="constant",
            lr=self.tune.lr,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            precision=self.tune.precision,
        )


class SparsePolicy(Tuned):
    """Chapter 5: remove a part of the actor, tune what is left."""

    method: Literal["sparse"]

    def recipes(self, seed: int, names: Mapping[str, int], num_envs: int) -> list[ChildSpec]:
        training = self.training(num_envs)
        return self._specs("sparse", self._kept(self.sparsity), seed, names, training=training)


class StochasticPolicy(Tuned):
    """Chapter 6: one fresh mask for each rollout, annealed to a fixed subnetwork."""

    method: Literal["stochastic"]
    tau: Annotated[float, Field(ge=0, le=1)] = 0.5
    """initial chance of a weight outside the subnetwork to be active"""
    anneal: Annealing = "linear"
    anneal_steps: Count
    """of the environments, until the subnetwork is fixed"""

    @model_validator(mode="after")
    def _fixed(self) -> StochasticPolicy:
        if self.anneal_steps > self.tune.total_steps:
            raise ValueError(
                f"anneal_steps: {self.anneal_steps} is more than tune.total_steps, "
                f"{self.tune.total_steps}; the subnetwork must be fixed at the end"
            )
        return self

    def recipes(self, seed: int, names: Mapping[str, int], num_envs: int) -> list[ChildSpec]:
        training = self.training(num_envs)
        rollouts = min(self.anneal_steps / training.batch_size, training.epochs)
        return self._specs(
            "stochastic",
            self._kept(self.sparsity),
            seed,
            names,
            tau=self.tau,
            anneal=self.anneal,
            anneal_epochs=rollouts,
            training=training,
        )


class EvaluateSection(Section):
    """Parent, children and ensembles side by side, on the same levels and random numbers."""

    episodes: Annotated[int, Field(ge=10)] = 64
    """paired, on each set of levels: one in each of so many environments"""
    levels: Annotated[tuple[Literal["train", "unseen"], ...], Field(min_length=1)] | None = None
    """train: those of `env`; unseen: all above them; default: both, if `env` plays some only"""
    choose: Annotated[tuple[Choice, ...], Field(min_length=1)] = ("sample", "argmax")
    """how an action follows from probabilities"""
    combine: Annotated[tuple[Combine, ...], Field(min_length=1)] = ("probabilities", "vote")
    """how those of members become one: their mean (section 4.3.3), softmax of mean logits, votes"""
    per_job: Count = 8
    """networks that one job asks, at most; an ensemble is never divided"""
    film: Annotated[int, Field(ge=0, le=1000)] = 150
    """frames of `film.gif`, the ensemble playing; 0: none"""
    limit: Count = 100_000
    """steps after which an episode that goes on is an error"""


class PolicyConfig(Section):
    """A run that trains a policy and makes children of it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """names the run folder, runs/NAME"""
    seed: Annotated[int, Field(ge=0)] = 0
    env: Annotated[Env, BeforeValidator(named_env)]
    model: Annotated[ModelSection, BeforeValidator(named)]
    """of the actor; the critic follows it (`models/actor_critic.py`)"""
    ppo: PPO
    children: Annotated[
        tuple[
            Annotated[NoisyPolicy | SparsePolicy | StochasticPolicy, Field(discriminator="method")],
            ...,
        ],
        Field(min_length=1),
    ]
    evaluate: EvaluateSection = EvaluateSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _fits(self) -> PolicyConfig:
        ppo.iterations(self.ppo, self.env.num_envs)
        for key in ("levels", "choose", "combine"):
            named = getattr(self.evaluate, key) or ()
            if len(set(named)) < len(named):
                raise ValueError(f"evaluate.{key}: {', '.join(named)}: name each once")
        labels = [group.label for group in self.children if group.name is not None]
        for label in labels:
            if labels.count(label) > 1 or label in ("parent", "random", "all"):
                raise ValueError(f"children.name: {label!r} is taken; give this group another name")
        for index, group in enumerate(self.children):
            if group.draws_of is not None and group.draws_of >= len(self.children):
                raise ValueError(
                    f"children.{index}.draws_of: there is no such group; they count from 0"
                )
            if isinstance(group, Tuned):
                try:
                    group.training(self.env.num_envs)
                except ValueError as error:
                    line = str(error).replace("ppo.", f"children.{index}.tune.")
                    raise ValueError(line) from None
        self.level_sets()
        return self

    # --- what follows from the settings ---

    def level_sets(self) -> dict[str, Env]:
        """Name -> what is played there, an environment for each episode.

        Raises:
            ValueError: no level is unseen.
        """
        some = bool(self.env.num_levels)
        names = self.evaluate.levels or (("train", "unseen") if some else ("train",))
        env = replace(self.env, num_envs=self.evaluate.episodes)
        found: dict[str, Env] = {}
        for name in names:
            label = name if some or name == "unseen" else "all"
            found[label] = unseen(env) if name == "unseen" else env
        return found

    def specs(self) -> list[ChildSpec]:
        """The recipes of all children, in the order of the groups."""
        specs: list[ChildSpec] = []
        names: dict[str, int] = {}
        for index, group in enumerate(self.children):
            shared = index if group.draws_of is None else group.draws_of
            seed = derive(self.seed, "group", shared)
            if isinstance(group, NoisyPolicy):
                new = group.specs(seed, names)
            else:
                new = group.recipes(seed, names, self.env.num_envs)
            names[group.label] = names.get(group.label, 0) + len(new)
            specs += new
        return specs

    def parent_job(self) -> PolicyFit:
        return PolicyFit(id="parent", env=self.env, ppo=self.ppo, seed=derive(self.seed, "parent"))

    def child_jobs(self) -> list[PolicyChild]:
        """Children that are tuned; all others are there as soon as the parent is."""
        tunes = {group.label: group.tune for group in self.children if isinstance(group, Tuned)}
        return [
            PolicyChild(spec=spec, env=self.env, ppo=tunes[spec.label])
            for spec in self.specs()
            if spec.training is not None
        ]

    def task(self, folder: str) -> Task:
        return Task(
            folder=folder,
            model=self.model.name,
            model_options=self.model.options,
            threads=self.resources.threads,
            channels_last=self.resources.channels_last,
            import_from=str(Path.cwd()),
        )


# --- from a file --------------------------------------------------------------------------------


def is_policy(record: Mapping[str, Any]) -> bool:
    """Are these settings, as written, those of a policy's run?"""
    return ENV in record


def _known(loc: Sequence[Any]) -> list[str]:
    """Names that would be valid where `loc` ends."""
    above = loc[-2] if len(loc) > 1 else None
    if above is None:
        return list(PolicyConfig.model_fields)
    dataclasses: dict[Any, type[Any]] = {"env": Env, "ppo": PPO, "tune": PPO}
    if above in dataclasses:
        return [field.name for field in fields(dataclasses[above])]
    sections: dict[Any, type[Section]] = {
        "evaluate": EvaluateSection,
        "resources": ResourcesSection,
        "noisy": NoisyPolicy,
        "sparse": SparsePolicy,
        "stochastic": StochasticPolicy,
    }
    return list(sections[above].model_fields) if above in sections else []


def _inherit(record: dict[str, Any], source: str) -> None:
    """What a child's `tune` leaves out is as in the run's `ppo`; in place."""
    shared = record.get("ppo")
    groups = record.get("children")
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        tune = group.get("tune") if isinstance(group, dict) else None
        if isinstance(tune, dict) and isinstance(shared, dict):
            if "total_steps" not in tune:
                raise ValueError(
                    f"{source}: children.{index}.tune.total_steps: required, but missing"
                )
            group["tune"] = {**shared, **tune}


def checked(record: dict[str, Any], source: str) -> PolicyConfig:
    """A configuration from settings as written.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    _inherit(record, source)
    try:
        plain = configfile.plain_json(record, source)
        return PolicyConfig.model_validate_json(plain, strict=True)
    except ValidationError as error:
        line = configfile.one_line(error, source, _known)
        raise ValueError(line.replace(", or kl_target instead", "")) from None


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> PolicyConfig:
    """`checked` of YAML text and `key.path=value` overrides."""
    return checked(configfile.record_of(text, source, overrides), source)
