"""A run folder, or a cell of a benchmark, as the analyses read it: outputs, networks, data.

The folder may have been copied here from another machine; only `data` needs the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ray_subnets import datasets, driver, members, models, summary
from ray_subnets.checkpoints import CELL, ENSEMBLE, RunFolder
from ray_subnets.data import Data, some
from ray_subnets.ensembles import Ensemble
from ray_subnets.members import EnsembleRecord, MemberRecord
from ray_subnets.selection import share_of
from ray_subnets.spawning import spawn
from ray_subnets.stored import load_weights
from ray_subnets.summary import Outputs

SELECTED = "selected"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: the config's, or the row's of a benchmark's cell; runs that differ in their seed
            share it.
        groups: ids of saved outputs, by what they are: `selected`, and each group of children.
    """

    folder: RunFolder
    name: str
    seed: int
    combine: str
    groups: Mapping[str, tuple[str, ...]]
    has_parent: bool
    cell: Mapping[str, Any] | None = None

    @staticmethod
    def open(run: str | Path) -> Run:
        """Read what a folder says of itself.

        Raises:
            ValueError: it is no finished run; one line.
        """
        if RunFolder(run).exists(CELL):
            return _cell(RunFolder.open(run, needs=CELL))
        folder = RunFolder.open(run, needs="result.json")
        return _run(folder, folder.read_json("result.json"), None)

    def outputs(self, ids: Sequence[str], split: str = "test") -> Outputs:
        """Saved logits `(K, N, C)` of these networks, and labels `(N,)`.

        Raises:
            ValueError: a file is missing or damaged.
        """
        return summary.load_outputs(self.folder, ids, split)

    def shares(self, ids: Sequence[str]) -> list[float] | None:
        """Weights of these networks in a fitness-weighted mean; None: how they are combined asks
        for none."""
        if self.combine != "weighted":
            return None
        by = driver.config_of(self.folder).select.by
        record = self.folder.read_json("result.json")
        known = {"parent": record["parent"], **{one["id"]: one for one in record["children"]}}
        return [share_of(known[id]["validation"], by) for id in ids]

    @property
    def selected(self) -> tuple[str, ...]:
        return self.groups[SELECTED]

    @cached_property
    def ensemble(self) -> Ensemble:
        """The members as networks.

        Raises:
            ValueError: a file is missing or damaged.
        """
        return members.load(str(self.folder))

    @cached_property
    def data(self) -> Data:
        """The run's data set.

        Raises:
            ValueError: it is not on this machine.
        """
        if self.cell is None or "run" in self.cell["method"]:
            return driver.load_data(driver.config_of(self.folder))
        options = dict(self.cell["data"])
        return datasets.load(options.pop("name"), **options)

    @cached_property
    def record(self) -> EnsembleRecord:
        """Parent and recipes.

        Raises:
            ValueError: another method's ensemble, which has no parent.
        """
        found = self.folder.read_json(ENSEMBLE)
        if found.get("format") != 1:
            raise ValueError(f"RUN: {self.folder} has no parent: its networks are {self.name!r}")
        return EnsembleRecord.model_validate(found)

    @cached_property
    def parent(self) -> nn.Module:
        """The trained parent, in evaluation mode.

        Raises:
            ValueError: there is none, or its file is damaged.
        """
        record = self.record
        if record.model.name == models.GIVEN:
            raise ValueError(f"RUN: {self.folder}: its network was given in Python, not by name")
        network = models.build(
            record.model.name,
            record.input_shape,
            record.num_classes,
            record.model.options,
            seed=0,
            input_dtype=record.dtype,
        )
        weights = self.folder.load_tensors(record.parent)
        load_weights(network, weights, f"{self.folder}/{record.parent.file}")
        return network.eval().requires_grad_(False)

    def before_tuning(self, member: MemberRecord) -> nn.Module:
        """The child as it was spawned: pruned, or noisy, and not tuned."""
        recipe = replace(member.recipe, training=None)
        child = spawn(self.parent, recipe, self.record.input_shape, self.record.dtype)
        return child.eval().requires_grad_(False)

    def networks(self, limit: int | None = None) -> list[tuple[str, nn.Module]]:
        """Ids and networks of the (first) members.

        Raises:
            ValueError: a member is not a network of its own.
        """
        modules = list(self.ensemble.members)[:limit]
        if len(self.ensemble.members) != len(self.selected):
            raise ValueError(
                f"RUN: {self.folder}: the members of {self.name!r} share one network; this needs "
                "networks that can be looked into one by one"
            )
        return list(zip(self.selected, modules, strict=False))

    def rows(self, limit: int, split: str = "test") -> Tensor:
        """Which samples `images` gives, see `data.some`."""
        return some(getattr(self.data, split).labels.cpu(), limit)

    def images(self, limit: int, split: str = "test") -> tuple[Tensor, Tensor]:
        """Network inputs `(N, *shape)` of some samples of a split (`rows`), and labels `(N,)`."""
        part = getattr(self.data, split)
        few = part.take(self.rows(limit, split).to(part.labels.device))
        inputs = [self.data.preprocess(batch) for batch in few.images.split(max(len(few), 1))]
        return inputs[0], few.labels


def _run(folder: RunFolder, record: Mapping[str, Any], cell: Mapping[str, Any] | None) -> Run:
    try:
        how = record["ensemble"]
        groups = {SELECTED: tuple(how["members"])}
        if len(how.get("groups", {})) > 1:
            groups |= {name: tuple(group["members"]) for name, group in how["groups"].items()}
        return Run(
            folder=folder,
            name=cell["row"] if cell else record["name"],
            seed=cell["seed"] if cell else record["seed"],
            combine=how["combine"],
            groups=groups,
            has_parent=True,
            cell=cell,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/result.json: incomplete or of another version ({error})"
        ) from None


def _cell(folder: RunFolder) -> Run:
    cell = folder.read_json(CELL)["cell"]
    if not cell["final"]:
        raise ValueError(f"RUN: {folder} is a trial of a search, which has seen no test data")
    if "run" in cell["method"]:
        return _run(folder, folder.read_json("result.json"), cell)
    ids: list[str] = []
    for i in range(len(folder.read_json(ENSEMBLE)["networks"])):
        id, k = f"{i:03d}", 0
        if folder.exists(f"outputs/{id}.npz"):
            ids.append(id)
        while folder.exists(f"outputs/{id}.{k:02d}.npz"):
            ids.append(f"{id}.{k:02d}")
            k += 1
    return Run(
        folder=folder,
        name=cell["row"],
        seed=cell["seed"],
        combine="probabilities",
        groups={SELECTED: tuple(ids)},
        has_parent=False,
        cell=cell,
    )


def open_all(runs: Sequence[str | Path]) -> list[Run]:
    """Every run, none of them twice.

    Raises:
        ValueError: see `Run.open`; or two runs of one name share a seed.
    """
    found = [Run.open(run) for run in runs]
    seen: set[tuple[str, int, str]] = set()
    for run in found:
        column = str(run.cell["column"]) if run.cell else ""
        key = (run.name, run.seed, column)
        if key in seen:
            raise ValueError(
                f"RUN: {run.name}: seed {run.seed} was given twice; a repeated run is no new sample"
            )
        seen.add(key)
    return found
