"""The settings of a sweep: a run's configuration with a `sweep:` section, and its cells.

A cell is one value for each swept key; with a seed it is an ordinary `Config`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from ray_subnets import configfile
from ray_subnets.config import Config, Named, named
from ray_subnets.groups import Noisy, Section, Sparse, Stochastic, plain, yaml_of
from ray_subnets.recipes import Count, Fit, Positive

GROUPS: dict[str, type[Section]] = {"noisy": Noisy, "sparse": Sparse, "stochastic": Stochastic}
MOST = 10_000  # cells of a grid


class Range(Section):
    """Values of a key that a search draws from."""

    low: float
    high: float
    log: bool = False
    """uniform in the logarithm"""
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} is not below high, {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: must be above 0 with log, not {self.low:g}")
        return self


def _kind(value: Any) -> str:
    return "range" if isinstance(value, dict | Range) else "list"


Values = Annotated[
    Annotated[tuple[Any, ...], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]


class SweepSection(Section):
    """What is swept and how."""

    keys: Annotated[dict[str, Values], Field(min_length=1)]
    """a setting of the run -> its values, or for a search a range {low, high, log, integer}; a key
    that is not one of the run's own (`sigma`, `tune.lr`) is that of every group that has it"""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """every cell is tried with each of these; a scheduler may stop it after any of them"""
    search: Annotated[Named, BeforeValidator(named)] = Named(name="grid")
    """grid, or a searcher of Ray Tune: random, optuna, hyperopt, ..."""
    samples: Count | None = None
    """trials of a search; grid: every cell once"""
    scheduler: Annotated[Named, BeforeValidator(named)] = Named(name="fifo")
    """fifo, or a scheduler of Ray Tune: asha, median_stopping_rule, ..."""
    by: Literal["ensemble_accuracy", "ensemble_nll", "accuracy", "nll"] = "ensemble_accuracy"
    """the best cell is chosen by this, on validation data: of the selected ensemble, or of the mean
    child"""
    kl_bound: Positive | None = None
    """nats: only cells whose mean KL from the parent is within it may be chosen (section 4.2.1)"""

    @model_validator(mode="after")
    def _consistent(self) -> SweepSection:
        for key, values in self.keys.items():
            if isinstance(values, Range) and self.search.name == "grid":
                raise ValueError(f"keys.{key}: a grid needs a list of values; or name a search")
            if not isinstance(values, Range) and not values:
                raise ValueError(f"keys.{key}: give at least one value")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may occur once")
        if self.search.name == "grid" and self.samples is not None:
            raise ValueError("samples: a grid tries every cell; leave it out, or name a search")
        if self.search.name != "grid" and self.samples is None:
            raise ValueError(f"samples: say how many trials {self.search.name} may make")
        return self


def groups_with(
    base: Mapping[str, Any], setting: str, kinds: Mapping[str, type[Section]]
) -> list[int]:
    """Which groups under `children:` have this setting, by their method's kind of group."""
    return [
        index
        for index, group in enumerate(base.get("children") or [])
        if isinstance(group, Mapping)
        and setting in getattr(kinds.get(group.get("method", "")), "model_fields", {})
    ]


@dataclass(frozen=True)
class Varied:
    """A base configuration of some kind of run, and what is varied."""

    base: Mapping[str, Any]
    """the run's settings as written"""
    section: Section
    source: str

    run: ClassVar[type[Section]]
    """the run's settings"""
    groups: ClassVar[Mapping[str, type[Section]]]
    """method -> settings of a group of children"""

    @property
    def name(self) -> str:
        return str(self.base["name"])

    def paths(self, key: str) -> list[str]:
        """The settings that a swept key stands for, as dotted paths from the top.

        Raises:
            ValueError: no such setting.
        """
        first = key.split(".")[0]
        if key == "seed":
            raise ValueError(f"{self.source}: sweep.keys.seed: list them under sweep.seeds")
        if first == "weights":
            raise ValueError(
                f"{self.source}: sweep.keys.weights: all cells begin with the same weights; make a "
                "sweep of each"
            )
        if first in self.run.model_fields:
            return [key]
        having = groups_with(self.base, first, self.groups)
        if not having:
            raise ValueError(
                f"{self.source}: sweep.keys.{key}: neither the run nor a group of children has "
                f"this setting; those of the run: {', '.join(self.run.model_fields)}"
            )
        return [f"children.{index}.{key}" for index in having]

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A cell as path -> value."""
        return {path: value for key, value in values.items() for path in self.paths(key)}

    def to_yaml(self) -> str:
        """The settings of the sweep, defaults included."""
        return yaml_of({**self.base, "sweep": self.section.model_dump(mode="json")})


@dataclass(frozen=True)
class Sweep(Varied):
    """What is varied of a run of classifiers."""

    section: SweepSection
    run = Config
    groups = GROUPS

    def config(self, values: Mapping[str, Any], seed: int) -> Config:
        """The run of one cell and seed.

        Raises:
            ValueError: a setting does not fit; one line.
        """
        record = copy.deepcopy(dict(self.base))
        for path, value in {**self.settings(values), "seed": seed}.items():
            configfile.assign(record, path, list(value) if isinstance(value, tuple) else value)
        return configfile.checked(record, f"{self.source} with {told(values)}")

    def cells(self) -> list[dict[str, Any]]:
        """Every cell of a grid, the last key fastest; empty where a search draws them."""
        if self.section.search.name != "grid":
            return []
        keys = self.section.keys
        lists = [values for values in keys.values() if not isinstance(values, Range)]
        return [dict(zip(keys, one, strict=True)) for one in itertools.product(*lists)]

    def corners(self) -> list[dict[str, Any]]:
        """Two cells: the first values, or lower ends, of all keys, and the last."""
        ends: list[dict[str, Any]] = [{}, {}]
        for key, values in self.section.keys.items():
            if isinstance(values, Range):
                pair: tuple[Any, Any] = (values.low, values.high)
                pair = (int(pair[0]), int(pair[1])) if values.integer else pair
            else:
                pair = (values[0], values[-1])
            for end, value in zip(ends, pair, strict=True):
                end[key] = value
        return ends


def told(values: Mapping[str, Any]) -> str:
    """`sigma=0.01 density=0.5`"""
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def cell_id(values: Mapping[str, Any]) -> str:
    """A short name of a cell, safe as a file name; the same for equal values."""
    text = json.dumps({key: values[key] for key in sorted(values)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def parent_job(config: Config) -> Fit:
    """The training of a run's parent, named after all that its weights follow from."""
    job = config.parent_job()
    record = {
        "data": config.data.model_dump(mode="json"),
        "model": {"name": config.model.name, **config.model.options},
        "parent": plain(config.parent).__dict__,
        "seed": job.seed,
        "threads": config.resources.threads,
        "channels_last": config.resources.channels_last,
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:10]
    return Fit(id=f"parent-{digest}", training=job.training, seed=job.seed)


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep from YAML text; every cell of a grid is checked.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    record = configfile.record_of(text, source, overrides)
    if "sweep" not in record:
        raise ValueError(
            f"{source}: sweep: required, but missing; say what is swept, as in "
            "{keys: {sigma: [0.01, 0.02]}}"
        )
    section = record.pop("sweep")
    try:
        checked = SweepSection.model_validate_json(json.dumps(section), strict=True)
    except ValidationError as error:
        raise ValueError(_one_line(error, source)) from None
    sweep = Sweep(record, checked, source)
    count = 1
    for key, values in checked.keys.items():
        sweep.paths(key)
        count *= 1 if isinstance(values, Range) else len(values)
    if count > MOST and checked.search.name == "grid":
        raise ValueError(
            f"{source}: sweep.keys: {count:,} cells are more than {MOST:,}; use a search, as in "
            "search: random, samples: 100"
        )
    for cell in sweep.cells() or sweep.corners():
        config = sweep.config(cell, checked.seeds[0])
        if config.parent.workers > 1:
            raise ValueError(
                f"{source}: parent.workers: a sweep trains each parent on one device; leave it out"
            )
    return sweep


def _one_line(error: ValidationError, source: str) -> str:
    line = configfile.one_line(error, f"{source}: sweep").replace(": sweep: ", ": sweep.", 1)
    # The branch of `list or range` is no part of the key.
    return re.sub(r"(: sweep\.keys\.\S+?)\.(?:list|range)\b", r"\1", line, count=1)


def load(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """`parse` of a file, or of a shipped config by name."""
    path = configfile.find(name)
    return parse(configfile.text_of(path), path.name, overrides)
