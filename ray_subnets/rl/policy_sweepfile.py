"""The settings of a policies' sweep: a policy's run with a `sweep:` section, and its cells.

As `sweepfile.py` for classifiers; always a grid.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ray_subnets import configfile
from ray_subnets.groups import Section
from ray_subnets.rl import policyfile
from ray_subnets.rl.policy_jobs import PolicyCell
from ray_subnets.rl.policy_recipes import PLACES
from ray_subnets.rl.policyfile import NoisyPolicy, PolicyConfig, SparsePolicy, StochasticPolicy
from ray_subnets.sweeps.sweepfile import MOST, Varied, cell_id

GROUPS: dict[str, type[Section]] = {
    "noisy": NoisyPolicy,
    "sparse": SparsePolicy,
    "stochastic": StochasticPolicy,
}


class PolicySweepSection(Section):
    """What is swept."""

    keys: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]
    """a setting of the run -> its values; a key that is not one of the run's own (`sigma`,
    `tune.lr`) is that of every group that has it"""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """every cell is played with each of these; each has its own parent"""

    @model_validator(mode="after")
    def _once(self) -> PolicySweepSection:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may occur once")
        return self


@dataclass(frozen=True)
class PolicySweep(Varied):
    """What is varied of a run of policies."""

    section: PolicySweepSection
    run = PolicyConfig
    groups = GROUPS

    def cells(self) -> list[dict[str, Any]]:
        """Every combination of values."""
        keys = self.section.keys
        return [dict(zip(keys, one, strict=True)) for one in itertools.product(*keys.values())]

    def config(self, values: Mapping[str, Any], seed: int) -> PolicyConfig:
        """The run of a cell and a seed; without a film.

        Raises:
            ValueError: these values do not work; one line.
        """
        record = copy.deepcopy(dict(self.base))
        for path, value in self.settings(values).items():
            configfile.assign(record, path, value)
        record["seed"] = seed
        configfile.assign(record, "evaluate.film", 0)
        return policyfile.checked(record, self.source)

    def job(self, values: Mapping[str, Any], seed: int) -> PolicyCell:
        config = self.config(values, seed)
        return PolicyCell(
            id=f"{cell_id(values)}-s{seed}",
            settings=config.model_dump(mode="json"),
            parent=f"parents/{parent_id(config)}",
        )

    def parents(self) -> dict[str, PolicyCell]:
        """Those that cells share, by folder."""
        found = {}
        for values in self.cells():
            for seed in self.section.seeds:
                config, job = self.config(values, seed), self.job(values, seed)
                found[job.parent] = PolicyCell(
                    id=job.parent.replace("parents/", "parent-"),
                    settings=job.settings,
                    parent=job.parent,
                    alone=True,
                    rollouts=config.parent_job().epochs,
                )
        return found


def parent_id(config: PolicyConfig) -> str:
    """A short name of a parent, made from all that its weights follow from."""
    record = config.model_dump(mode="json", include={"env", "model", "ppo", "seed"})
    for key in PLACES:
        del record["env"][key]
    resources = config.resources
    record |= {"threads": resources.threads, "channels_last": resources.channels_last}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:10]


def is_policy_sweep(record: Mapping[str, Any]) -> bool:
    """Are these settings, as written, those of a policies' sweep?"""
    return "sweep" in record and policyfile.is_policy(record)


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> PolicySweep:
    """A sweep from YAML text; every cell is checked.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    record = configfile.record_of(text, source, overrides)
    section = record.pop("sweep")
    try:
        checked = PolicySweepSection.model_validate_json(json.dumps(section), strict=True)
    except ValidationError as error:
        line = configfile.one_line(
            error, f"{source}: sweep", lambda loc: list(PolicySweepSection.model_fields)
        )
        raise ValueError(line.replace(": sweep: ", ": sweep.", 1)) from None
    sweep = PolicySweep(record, checked, source)
    count = 1
    for values in checked.keys.values():
        count *= len(values)
    if count > MOST:
        raise ValueError(f"{source}: sweep.keys: {count:,} cells are more than {MOST:,}")
    for cell in sweep.cells():
        sweep.config(cell, checked.seeds[0])
    return sweep
