"""The settings of children: one group for each entry under `children:`."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ruamel.yaml import YAML

from ray_subnets.recipes import (
    Annealing,
    ChildSpec,
    Count,
    MethodName,
    NonNegative,
    Positive,
    Probabilities,
    Schedule,
    Solve,
    Structure,
    Training,
    derive,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def to_yaml(self) -> str:
        """All settings, defaults included, as YAML that gives the same again."""
        return yaml_of(self.model_dump(mode="json"))


def yaml_of(record: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(record, stream)
    return stream.getvalue()


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """`Training` of a child: one-cycle by default (section 5.2)."""

    schedule: Schedule = "one_cycle"


def plain(training: Training) -> Training:
    """Only what a worker needs to know."""
    return Training(**{field.name: getattr(training, field.name) for field in fields(Training)})


class Group(Section):
    """Children of one kind."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")] | None = None
    """names these children and their row in the table; default: the method"""
    count: Count
    partition: Count = 1
    """siblings that share a mask draw and divide the weights; 1: every mask on its own"""
    draw: Literal["exact", "bernoulli"] = "exact"
    """exact count per layer, or each weight by chance"""
    structure: Structure = "weight"
    """weight: single connections; neuron, channel, unit (both): whole rows, which pruning really
    removes; layer: whole layers (section 3.2.1)"""
    scope: Literal["local", "global"] = "local"
    """the same fraction of every layer, or of all layers together"""
    criterion: Literal["random", "magnitude"] = "random"
    """which weights make the subnetwork: random ones, or the largest (L1) of the parent"""
    mask_classifier: bool = False
    """also mask the last layer"""
    whole: tuple[str, ...] = ()
    """weights that are never masked, by name or pattern (`backbone.*`); in Python frozen ones are
    added"""
    recompute_norm: bool = False
    """batch-norm statistics of each child from training images, before any tuning"""
    draws_of: Annotated[int, Field(ge=0)] | None = None
    """the group whose seeds this one shares, so that they differ in settings only; counted from 0,
    a group with `vary` as one"""

    @property
    def label(self) -> str:
        return self.name or self.method  # type: ignore[attr-defined]  # of each subclass

    @property
    def set_size(self) -> int:
        """Children that share one draw."""
        return self.partition

    def solve_job(self, seed: int, names: Mapping[str, int]) -> Solve | None:
        """A job that must be done before the recipes are whole; only noise has one."""
        return None

    def _specs(
        self, method: MethodName, density: float, seed: int, names: Mapping[str, int], **more: Any
    ) -> list[ChildSpec]:
        """`count` recipes; `names` says how many of each label came before."""
        specs = []
        for i in range(self.count):
            which, place = divmod(i, self.set_size)
            specs.append(
                ChildSpec(
                    id=f"{self.label}-{names.get(self.label, 0) + i:03d}",
                    method=method,
                    group=self.name or "",
                    seed=derive(seed, "set", which),
                    density=density,
                    draw=self.draw,
                    part=place % self.partition,
                    parts=self.partition,
                    mask_classifier=self.mask_classifier,
                    whole=self.whole,
                    structure=self.structure,
                    scope=self.scope,
                    criterion=self.criterion,
                    recompute_norm=self.recompute_norm,
                    sign=-1 if place >= self.partition else 1,
                    training_seed=derive(seed, "tune", i),
                    **more,
                )
            )
        return specs

    @model_validator(mode="after")
    def _weights_or_units(self) -> Group:
        if self.whole and self.structure in ("neuron", "channel", "unit"):
            raise ValueError(
                f"whole: is for single weights and layers; units ({self.structure}) are coupled "
                "through all layers"
            )
        return self

    def _check_sets(self, what: str) -> None:
        if self.count % self.set_size:
            raise ValueError(
                f"count: {self.count} children do not make whole {what}; "
                f"use a multiple of {self.set_size}"
            )
        if self.criterion == "magnitude":
            if self.draw == "bernoulli":
                raise ValueError("draw: magnitude leaves nothing to chance; use draw: exact")
            if self.partition > 2:
                raise ValueError(
                    "criterion: magnitude makes one subnetwork and its complement; use a partition "
                    "of 1 or 2, or criterion: random"
                )

    def _kept(self, sparsity: float | None) -> float:
        """Density of the drawn mask, from sparsity and partition."""
        if sparsity is None:
            if self.partition == 1:
                raise ValueError("sparsity: required where partition is 1 (fraction removed)")
            return 1 / self.partition
        if self.partition > 2 and abs(sparsity - (1 - 1 / self.partition)) > 1e-3:
            raise ValueError(
                f"sparsity: a partition of {self.partition} has sparsity "
                f"{1 - 1 / self.partition:.3f}; leave it out"
            )
        return 1 / self.partition if self.partition > 2 else 1 - sparsity


class Noisy(Group):
    """Chapter 4: Gaussian noise on a subnetwork, no training."""

    method: Literal["noisy"]
    sigma: Positive | None = None
    """standard deviation of the noise, in units of the weights; or `kl_target` instead"""
    kl_target: Positive | None = None
    """mean KL divergence of children from the parent, in nats: sigma is solved for once the parent
    is there (section 4.2.1, algorithm 1); harm begins at .02 to .05 (section 4.3.2)"""
    per_layer: bool = False
    """with kl_target: a sigma for each layer, such that each alone takes an equal share of it"""
    kl_samples: Count = 1000
    """with kl_target: validation samples it is measured on, at most all (section 4.3.3)"""
    kl_draws: Count = 8
    """with kl_target: draws of mask and noise it is the mean of, rounded up to whole sets; the
    same for any `count`, so that a run can grow"""
    mean: float = 0.0
    relative: bool = False
    """sigma and mean in units of each tensor's standard deviation"""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """fraction of weights perturbed; default 1 / partition"""
    draw: Literal["exact", "bernoulli"] = "bernoulli"
    mirrored: bool = False
    """each draw also with the opposite sign (eq. 4.10, 4.11)"""

    @property
    def set_size(self) -> int:
        return self.partition * (2 if self.mirrored else 1)

    @model_validator(mode="after")
    def _consistent(self) -> Noisy:
        if (self.sigma is None) == (self.kl_target is None):
            raise ValueError(
                "sigma: required (standard deviation of the noise), or kl_target instead"
                if self.sigma is None
                else "kl_target: sigma is solved for it; leave one of the two out"
            )
        if self.per_layer and self.kl_target is None:
            raise ValueError("per_layer: sigmas of layers are solved for; give a kl_target")
        names = ["mirrored"] * self.mirrored + [f"partitions of {self.partition}"]
        self._check_sets(" ".join(names) if self.partition > 1 else "mirrored pairs")
        if self.partition > 2 and self.density is not None:
            raise ValueError("density: with a partition above 2 it is 1 / partition; leave it out")
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        density = self.density if self.density is not None else 1 / self.partition
        return self._specs(
            "noisy",
            density,
            seed,
            names,
            sigma=self.sigma or 0.0,
            kl_target=self.kl_target,
            mean=self.mean,
            relative=self.relative,
        )

    def solve_job(self, seed: int, names: Mapping[str, int]) -> Solve | None:
        """What finds this group's sigma, if it has a KL target; named after its first child."""
        if self.kl_target is None:
            return None
        count = -(-self.kl_draws // self.set_size) * self.set_size
        draws = self.model_copy(update={"count": count}).specs(seed, names)
        return Solve(
            id=f"{draws[0].id}-sigma",
            draws=tuple(draws),
            kl_target=self.kl_target,
            samples=self.kl_samples,
            per_layer=self.per_layer,
        )


class Sparse(Group):
    """Chapter 5: prune a subnetwork, tune what is left."""

    method: Literal["sparse"]
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """fraction removed; default 1 - 1 / partition"""
    prune_epochs: Annotated[int, Field(ge=0)] = 0
    """remove it in equal steps at the start of so many epochs (iterative pruning); 0: at once"""
    bag: Annotated[float, Field(gt=0, le=1)] = 1.0
    """tune each child on a random fraction of the training images (NP+BAG)"""
    tune: Tuning

    @model_validator(mode="after")
    def _consistent(self) -> Sparse:
        self._check_sets(f"partitions of {self.partition}")
        self._kept(self.sparsity)
        if self.prune_epochs:
            if self.prune_epochs > self.tune.epochs:
                raise ValueError(
                    f"prune_epochs: {self.prune_epochs} is more than tune.epochs, "
                    f"{self.tune.epochs}; the subnetwork must be fixed at the end"
                )
            if self.structure != "weight":
                raise ValueError("prune_epochs: works on single weights; use structure: weight")
            if self.criterion == "magnitude" and (self.partition > 1 or self.scope == "global"):
                raise ValueError(
                    "prune_epochs: magnitudes are compared again in each step, layer by layer; "
                    "use partition: 1 and scope: local, or criterion: random"
                )
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        return self._specs(
            "sparse",
            self._kept(self.sparsity),
            seed,
            names,
            prune_epochs=self.prune_epochs,
            bag=self.bag,
            training=plain(self.tune),
        )


class Stochastic(Group):
    """Chapter 6: a fresh mask every forward pass, annealed to a fixed subnetwork."""

    method: Literal["stochastic"]
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """fraction removed in the end; default 1 - 1 / partition"""
    probabilities: Probabilities = "temperature"
    """how the chance of being active starts: the same for all weights outside the subnetwork
    (eq. 6.6), uniform ("random annealing", 6.2.1), or two Gaussians (eq. 6.5)"""
    tau: Annotated[float, Field(ge=0, le=1)] = 0.5
    """for temperature: initial chance of a weight outside the subnetwork to be active"""
    mixture: tuple[float, float, float, float] = (0.25, 0.1, 0.75, 0.1)
    """for mixture: mean and standard deviation outside, then inside the subnetwork"""
    two_sided: bool | None = None
    """are weights of the subnetwork also left out at times? default: not for temperature, else yes
    (as the dissertation writes each of them)"""
    anneal: Annealing = "linear"
    """shape of the fall to zero (eq. 6.2-6.4)"""
    anneal_epochs: NonNegative
    """epochs until the subnetwork is fixed; fractions allowed"""
    bag: Annotated[float, Field(gt=0, le=1)] = 1.0
    """tune each child on a random fraction of the training images"""
    tune: Tuning

    @model_validator(mode="after")
    def _consistent(self) -> Stochastic:
        self._check_sets(f"partitions of {self.partition}")
        self._kept(self.sparsity)
        if self.anneal_epochs > self.tune.epochs:
            raise ValueError(
                f"anneal_epochs: {self.anneal_epochs:g} is more than tune.epochs, "
                f"{self.tune.epochs}; the subnetwork must be fixed at the end"
            )
        if self.probabilities == "mixture" and self.partition > 2:
            raise ValueError(
                "probabilities: mixtures of more than 2 parts do not sum to one; use uniform"
            )
        if min(self.mixture[1], self.mixture[3]) < 0:
            raise ValueError("mixture: standard deviations (second, fourth) must not be negative")
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        sides = self.two_sided
        return self._specs(
            "stochastic",
            self._kept(self.sparsity),
            seed,
            names,
            probabilities=self.probabilities,
            tau=self.tau,
            mixture=self.mixture,
            two_sided=self.probabilities != "temperature" if sides is None else sides,
            anneal=self.anneal,
            anneal_epochs=self.anneal_epochs,
            bag=self.bag,
            training=plain(self.tune),
        )


# --- many groups from one -----------------------------------------------------------------------


def vary(groups: Any) -> Any:
    """Expand `vary: {sparsity: [0.5, 0.9], tune.lr: [0.01, 0.1]}` into a group per combination.

    The variants share their seeds and are named after what varies: `sparse-sparsity=0.5-lr=0.01`.

    Raises:
        ValueError: `vary` does not map settings to lists.
    """
    if not isinstance(groups, list | tuple):
        return groups
    expanded: list[Any] = []
    firsts = []  # where the variants of each group begin
    for group in groups:
        firsts.append(len(expanded))
        if not isinstance(group, Mapping) or "vary" not in group:
            expanded.append(group)
            continue
        grid = group["vary"]
        if not isinstance(grid, Mapping) or not all(
            isinstance(values, list) and values for values in grid.values()
        ):
            raise ValueError("vary: must map settings to lists, as in {sparsity: [0.5, 0.9]}")
        own = {"draws_of": len(firsts) - 1}
        for values in itertools.product(*grid.values()):
            expanded.append(own | _variant(group, dict(zip(grid, values, strict=True))))
    for i, group in enumerate(expanded):
        written = group.get("draws_of") if isinstance(group, Mapping) else None
        if isinstance(written, int) and not isinstance(written, bool) and written >= 0:
            # Counted as in the file; one that is not there stays so.
            found = firsts[written] if written < len(firsts) else len(expanded)
            expanded[i] = {**group, "draws_of": found}
    return expanded


def _variant(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    one = copy.deepcopy({key: value for key, value in group.items() if key != "vary"})
    name = str(group.get("name") or group.get("method"))
    for path, value in values.items():
        *above, key = path.split(".")
        section = one
        for part in above:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ValueError(f"vary: {path!r} is not a setting")
        section[key] = value
        name += f"-{key}={value:g}" if isinstance(value, float) else f"-{key}={value}"
    return one | {"name": name}
