"""The settings of a run: checked by type and range, expanded into recipes.

Every setting stands once: training numbers in `recipes.Training`, all others here. Unknown keys
are errors. `configfile.py` reads settings from YAML.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from ruamel.yaml import YAML

from ray_subnets.population import Task
from ray_subnets.recipes import (
    ChildSpec,
    Count,
    Fit,
    MethodName,
    NonNegative,
    Positive,
    Training,
    derive,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _named(value: Any) -> Any:
    """`data: digits` is short for `data: {name: digits}`; the same for `model`."""
    return {"name": value} if isinstance(value, str) else value


class DataSection(Section):
    name: str
    """digits, fashion_mnist, spirals, mnist, cifar10, cifar100, npz, imagefolder, imagenet, or
    package.module:function"""
    root: str | None = None
    """folder (or .npz file) that holds it"""
    download: bool = False
    """fetch it to `root` by torchvision if it is not there"""
    validation: Count | None = None
    """samples set aside for fitness; default a tenth of the training or a fifth of the test part"""
    validation_from: Literal["train", "test"] = "train"
    """which part they are taken from (section 4.3.3: a fifth of ImageNet's validation images)"""
    split_seed: int = 0
    """which samples these are; apart from `seed`, so that all seeds share them"""
    train_limit: Count | None = None
    """train on a fixed random subset of this size"""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """default: the largest training label plus one; for spirals the number of arms, default 3"""
    noise: NonNegative | None = None
    """spirals: standard deviation in the plane, where they reach out to 3; default 0.15"""
    crop: Annotated[int, Field(ge=0, le=64)] = 0
    """pixels of padding before a random crop"""
    flip: bool = False
    """random horizontal flip"""
    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """imagefolder, imagenet: pixels of each side as the network sees it: a RandomResizedCrop in
    training, the centre in evaluation; default 224"""
    resize: Annotated[int, Field(ge=1, le=8192)] | None = None
    """the same: pixels of the shorter side before the centre is cut out; default 256 for size 224,
    in proportion for others"""
    workers: Annotated[int, Field(ge=1, le=256)] = 4
    """the same: threads of each job that decode images; they change no number"""


class ModelSection(BaseModel):
    """`name` and the options of that network's constructor."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


@dataclass(frozen=True, kw_only=True)
class ParentTraining(Training):
    """`Training`, and on how many devices."""

    workers: Count = 1
    """devices that share each batch, by Ray Train when more than one"""


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """`Training` of a child: one-cycle by default (section 5.2)."""

    schedule: Literal["decay", "one_cycle", "constant"] = "one_cycle"


def _plain(training: Training) -> Training:
    """Only what a worker needs to know."""
    return Training(**{field.name: getattr(training, field.name) for field in fields(Training)})


class Group(Section):
    """Children of one kind."""

    count: Count
    partition: Count = 1
    """siblings that share a mask draw and divide the weights; 1: every mask on its own"""
    draw: Literal["exact", "bernoulli"] = "exact"
    """exact count per layer, or each weight by chance"""
    mask_classifier: bool = False
    """also mask the last layer"""

    @property
    def set_size(self) -> int:
        """Children that share one draw."""
        return self.partition

    def _specs(
        self, method: MethodName, density: float, seed: int, names: Mapping[str, int], **fields: Any
    ) -> list[ChildSpec]:
        """`count` recipes; `names` says how many of each method came before."""
        specs = []
        for i in range(self.count):
            which, place = divmod(i, self.set_size)
            specs.append(
                ChildSpec(
                    id=f"{method}-{names.get(method, 0) + i:03d}",
                    method=method,
                    seed=derive(seed, "set", which),
                    density=density,
                    draw=self.draw,
                    part=place % self.partition,
                    parts=self.partition,
                    mask_classifier=self.mask_classifier,
                    sign=-1 if place >= self.partition else 1,
                    training_seed=derive(seed, "tune", i),
                    **fields,
                )
            )
        return specs

    def _check_sets(self, what: str) -> None:
        if self.count % self.set_size:
            raise ValueError(
                f"count: {self.count} children do not make whole {what}; "
                f"use a multiple of {self.set_size}"
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
    sigma: Positive
    """standard deviation of the noise, in units of the weights"""
    mean: float = 0.0
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
        names = ["mirrored"] * self.mirrored + [f"partitions of {self.partition}"]
        self._check_sets(" ".join(names) if self.partition > 1 else "mirrored pairs")
        if self.partition > 2 and self.density is not None:
            raise ValueError("density: with a partition above 2 it is 1 / partition; leave it out")
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        density = self.density if self.density is not None else 1 / self.partition
        return self._specs("noisy", density, seed, names, sigma=self.sigma, mean=self.mean)


class Sparse(Group):
    """Chapter 5: prune a subnetwork, tune what is left."""

    method: Literal["sparse"]
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """fraction of weights removed; default 1 - 1 / partition"""
    tune: Tuning

    @model_validator(mode="after")
    def _consistent(self) -> Sparse:
        self._check_sets(f"partitions of {self.partition}")
        self._kept(self.sparsity)
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        return self._specs(
            "sparse", self._kept(self.sparsity), seed, names, training=_plain(self.tune)
        )


class Stochastic(Group):
    """Chapter 6: a fresh mask every forward pass, annealed to a fixed subnetwork."""

    method: Literal["stochastic"]
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """fraction of weights removed in the end; default 1 - 1 / partition"""
    tau: Annotated[float, Field(ge=0, le=1)] = 0.5
    """initial chance of a weight outside the subnetwork to be active (eq. 6.6)"""
    anneal: Literal["linear", "cosine", "exponential"] = "linear"
    anneal_epochs: NonNegative
    """epochs until that chance is zero; fractions allowed"""
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
        return self

    def specs(self, seed: int, names: Mapping[str, int]) -> list[ChildSpec]:
        return self._specs(
            "stochastic",
            self._kept(self.sparsity),
            seed,
            names,
            training=_plain(self.tune),
            tau=self.tau,
            anneal=self.anneal,
            anneal_epochs=self.anneal_epochs,
        )


class SelectSection(Section):
    count: Count | None = None
    """members taken from all children; default: every child that did not fail"""
    by: Literal["nll", "accuracy"] = "nll"
    """fitness, on validation data"""


class ResourcesSection(Section):
    threads: Count = 1
    """torch threads of each job on a CPU; part of the numbers"""
    actors: Count | None = None
    """child actors; default: as many as the cluster has devices for, at most one per job"""
    cpus_per_actor: Positive = 1
    gpus_per_actor: NonNegative | None = None
    """whole, or a fraction to share a GPU; default: 1 if the cluster has GPUs, else 0"""
    retries: Annotated[int, Field(ge=0)] = 3
    """times that a job is given to another actor after its actor died"""

    @model_validator(mode="after")
    def _whole(self) -> ResourcesSection:
        gpus = self.gpus_per_actor
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_actor: above 1 it must be whole, not {gpus}")
        return self


class Config(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """names the run folder, runs/NAME"""
    seed: Annotated[int, Field(ge=0)] = 0
    data: Annotated[DataSection, BeforeValidator(_named)]
    model: Annotated[ModelSection, BeforeValidator(_named)]
    parent: ParentTraining
    children: Annotated[
        tuple[Annotated[Noisy | Sparse | Stochastic, Field(discriminator="method")], ...],
        Field(min_length=1),
    ]
    select: SelectSection = SelectSection()
    combine: Literal["probabilities", "logits", "vote"] = "probabilities"
    """how members' outputs become one (section 3.2.5)"""
    include_parent: bool = False
    """is the parent a member of the ensemble that is kept? Both are reported"""
    single: bool = True
    """also train one network for the whole budget, beside the children, to compare with"""
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _enough(self) -> Config:
        total = sum(group.count for group in self.children)
        if self.select.count is not None and self.select.count > total:
            raise ValueError(
                f"select.count: {self.select.count} members of {total} children; "
                "add children or select fewer"
            )
        return self

    # --- what follows from the settings ---

    def specs(self) -> list[ChildSpec]:
        """The recipes of all children, in the order of the groups."""
        specs: list[ChildSpec] = []
        names: dict[str, int] = {}
        for index, group in enumerate(self.children):
            new = group.specs(derive(self.seed, "group", index), names)
            names[group.method] = names.get(group.method, 0) + len(new)
            specs += new
        return specs

    def parent_job(self) -> Fit:
        return Fit(id="parent", training=_plain(self.parent), seed=derive(self.seed, "parent"))

    def budget(self) -> int:
        """Epochs of the parent and of all children together."""
        return self.parent.epochs + sum(spec.epochs for spec in self.specs())

    def single_job(self) -> Fit | None:
        """One network, the parent's recipe, the whole budget."""
        if not self.single:
            return None
        training = replace(_plain(self.parent), epochs=self.budget())
        return Fit(id="single", training=training, seed=derive(self.seed, "single"))

    def task(self, folder: str) -> Task:
        return Task(
            folder=folder,
            model=self.model.name,
            model_options=self.model.options,
            fitness=self.select.by,
            threads=self.resources.threads,
            import_from=str(Path.cwd()),
        )

    def to_yaml(self) -> str:
        """All settings, defaults included, as YAML that gives the same configuration."""
        stream = io.StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(self.model_dump(mode="json"), stream)
        return stream.getvalue()
