"""The settings of a run: checked by type and range, expanded into recipes.

Every setting stands once: training numbers in `recipes.Training`, all others here. Unknown keys
are errors. `configfile.py` reads settings from YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from ray_subnets.groups import Noisy, Section, Sparse, Stochastic, plain
from ray_subnets.population import Task
from ray_subnets.recipes import (
    ChildSpec,
    Count,
    Fit,
    NonNegative,
    Positive,
    Result,
    Solve,
    SolveResult,
    Training,
    derive,
)
from ray_subnets.regression import Head

GIVEN = "given.safetensors"
"""in the run folder: the weights that the parent starts from, if they are not drawn"""


def named(value: Any) -> Any:
    """`data: digits` is short for `data: {name: digits}`; the same for `model`."""
    return {"name": value} if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    """A list as the tuple that a section takes, where it was read before it is validated."""
    return tuple(value) if isinstance(value, list) else value


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
    mean: Annotated[tuple[float, ...] | None, BeforeValidator(as_tuple)] = None
    """of each channel of uint8 images, from 0 to 1, as a trained network saw them; default the
    training images' own, or the published one"""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...] | None, BeforeValidator(as_tuple)] = (
        None
    )
    """the same: standard deviations; mean: [0] and std: [1] are pixels / 255"""
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


class Named(BaseModel):
    """`name` and the options of the constructor that it names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSection(Named):
    """A network."""


@dataclass(frozen=True, kw_only=True)
class ParentTraining(Training):
    """`Training`, and on how many devices."""

    workers: Count = 1
    """devices that share each batch, by Ray Train when more than one"""


class SinglesSection(Section):
    """Single models of other budgets and rates than the parent's: the best-tuned opponent."""

    epochs: Annotated[tuple[Count, ...], Field(min_length=1)]
    lr: tuple[Positive, ...] = ()
    """default: the parent's"""


class SelectSection(Section):
    count: Count | None = None
    """members taken from all children; default: every child that did not fail"""
    by: Literal["nll", "accuracy", "rmse"] = "nll"
    """fitness, on validation data; rmse is for regression, nll also for its Gaussian head"""
    method: Literal["best", "greedy"] = "best"
    """best: the fittest (algorithm 1); greedy: one at a time, whichever lowers the ensemble's
    validation NLL most, until none does or `count` are taken"""


class ResourcesSection(Section):
    threads: Count = 1
    """torch threads of each job on a CPU; part of the numbers"""
    actors: Count | None = None
    """child actors; default: as many as the cluster has devices for, at most one per job"""
    cpus_per_actor: Positive = 1
    gpus_per_actor: NonNegative | None = None
    """whole, or a fraction to share a GPU; default: 1 if the cluster has GPUs, else 0"""
    channels_last: bool = True
    """memory format of convolutional networks, where it is safe; part of the numbers"""
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
    data: Annotated[DataSection, BeforeValidator(named)]
    model: Annotated[ModelSection, BeforeValidator(named)]
    weights: str | None = None
    """that the parent (and the single model) start from, instead of drawn ones: a file
    (.safetensors, or a state dict of torch.save), or for torchvision/NAME a name of torchvision's
    (IMAGENET1K_V1); `parent.epochs: 0` takes them as they are"""
    parent: ParentTraining
    children: Annotated[
        tuple[Annotated[Noisy | Sparse | Stochastic, Field(discriminator="method")], ...],
        Field(min_length=1),
    ]
    select: SelectSection = SelectSection()
    head: Head = "classes"
    """what outputs are: logits of classes, or (in Python) mean and logarithm of the variance of a
    target (gaussian), or its mean (mse)"""
    combine: Literal["probabilities", "weighted", "logits", "vote"] = "probabilities"
    """how members' outputs become one (section 3.2.5)"""
    include_parent: bool = False
    """is the parent a member of the ensemble that is kept? Both are reported"""
    single: bool = True
    """also train one network for the whole budget, beside the children, to compare with"""
    singles: SinglesSection | None = None
    """and more of them, every number of epochs with every rate; the best by validation NLL is
    reported"""
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _groups(self) -> Config:
        labels = [group.label for group in self.children if group.name is not None]
        for label in labels:
            if labels.count(label) > 1 or label in ("parent", "single"):
                raise ValueError(f"children.name: {label!r} is taken; give this group another name")
        for index, group in enumerate(self.children):
            shared = group.draws_of
            if shared is not None and shared >= len(self.children):
                raise ValueError(
                    f"children.{index}.draws_of: there is no such group; they count from 0"
                )
            if shared is not None and self.children[shared].draws_of not in (None, shared):
                raise ValueError(
                    f"children.{index}.draws_of: that group has the draws of another one itself; "
                    "name that one"
                )
        return self

    @model_validator(mode="after")
    def _enough(self) -> Config:
        total = sum(group.count for group in self.children)
        if self.select.count is not None and self.select.count > total:
            raise ValueError(
                f"select.count: {self.select.count} members of {total} children; "
                "add children or select fewer"
            )
        return self

    @model_validator(mode="after")
    def _meaningful(self) -> Config:
        """Some settings are for classifiers, some for regression."""
        by = self.select.by
        if self.head == "classes":
            if by == "rmse":
                raise ValueError("select.by: rmse is for regression; use nll or accuracy")
            return self
        fits = ("nll", "rmse") if self.head == "gaussian" else ("rmse",)
        if by not in fits:
            raise ValueError(f"select.by: {by} is not for head {self.head}; use {fits[-1]}")
        if self.select.method == "greedy":
            raise ValueError("select.method: greedy is for classifiers; use best")
        if self.combine != "probabilities":
            raise ValueError(
                f"combine: {self.combine} is for classifiers; regression networks are an even "
                "mixture, leave it out"
            )
        trained: list[tuple[str, Training]] = [("parent", self.parent)]
        for index, group in enumerate(self.children):
            if isinstance(group, Noisy):
                if group.kl_target is not None:
                    raise ValueError(
                        f"children.{index}.kl_target: for classifiers only; give sigma instead"
                    )
            else:
                trained.append((f"children.{index}.tune", group.tune))
        for name, training in trained:
            if training.label_smoothing:
                raise ValueError(f"{name}.label_smoothing: for classifiers only; leave it out")
        return self

    # --- what follows from the settings ---

    def plans(self) -> list[tuple[list[ChildSpec], Solve | None]]:
        """For each group its recipes, and what must be solved before they are whole."""
        plans = []
        names: dict[str, int] = {}
        for index, group in enumerate(self.children):
            shared = index if group.draws_of is None else group.draws_of
            seed = derive(self.seed, "group", shared)
            new = group.specs(seed, names)
            plans.append((new, group.solve_job(seed, names)))
            names[group.label] = names.get(group.label, 0) + len(new)
        return plans

    def specs(self, results: Mapping[str, Result] | None = None) -> list[ChildSpec]:
        """The recipes of all children, in the order of the groups.

        Args:
            results: by job id; the sigma of those of `solve_jobs` is filled in.
        """
        specs: list[ChildSpec] = []
        for new, job in self.plans():
            found = (results or {}).get(job.id) if job else None
            if isinstance(found, SolveResult):
                new = [replace(spec, sigma=found.sigma, sigmas=found.sigmas) for spec in new]
            specs += new
        return specs

    def solve_jobs(self) -> list[Solve]:
        """What must be found, given the parent, before some recipes are whole."""
        return [job for _, job in self.plans() if job]

    def parent_job(self) -> Fit:
        return Fit(id="parent", training=plain(self.parent), seed=derive(self.seed, "parent"))

    def budget(self) -> int:
        """Epochs of the parent and of all children together."""
        return self.parent.epochs + sum(spec.epochs for spec in self.specs())

    def single_job(self) -> Fit | None:
        """One network, the parent's recipe, the whole budget."""
        if not self.single:
            return None
        training = replace(plain(self.parent), epochs=self.budget())
        return Fit(id="single", training=training, seed=derive(self.seed, "single"))

    def singles_jobs(self) -> list[Fit]:
        """Single models of other budgets and rates; all start from the same initial weights."""
        if self.singles is None:
            return []
        return [
            Fit(
                id=f"single-{epochs}-{lr:g}",
                training=replace(plain(self.parent), epochs=epochs, lr=lr),
                seed=derive(self.seed, "single"),
            )
            for epochs in self.singles.epochs
            for lr in self.singles.lr or (self.parent.lr,)
        ]

    def task(self, folder: str) -> Task:
        return Task(
            folder=folder,
            model=self.model.name,
            model_options=self.model.options,
            fitness=self.select.by,
            head=self.head,
            threads=self.resources.threads,
            channels_last=self.resources.channels_last,
            import_from=str(Path.cwd()),
            weights=GIVEN if self.weights is not None else None,
        )
