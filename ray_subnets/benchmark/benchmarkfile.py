"""The settings of a benchmark: methods x training settings x data sets x seeds, as cells."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from ray_subnets import baselines, configfile
from ray_subnets.config import Config, DataSection, ModelSection, Named, ResourcesSection, named
from ray_subnets.groups import Section
from ray_subnets.recipes import Cell, Count, Shifted, Training

NAME = r"^[A-Za-z0-9][A-Za-z0-9._]*$"
OURS = ("noisy", "sparse", "stochastic")
TRAINING = {field.name for field in fields(Training)} - {"epochs"}
OWN_KEYS = ("parent_epochs", "tune_epochs", "tune_lr", "tune_schedule", "include_parent")
Settings = Mapping[str, Any]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Grid = dict[str, Annotated[tuple[Any, ...], Field(min_length=1), BeforeValidator(_tuple)]]


def _method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class Row(Named):
    """A method, with its options beside the keys below."""

    name: Annotated[str, Field(pattern=rf"^$|{NAME}")] = ""
    """in tables and folders; default: the method"""
    method: str
    """one of `baselines.METHODS`, or noisy, sparse, stochastic"""
    title: str = ""
    """in tables; default: the method's own"""
    note: str = ""
    """printed below the tables"""
    budget: Count | None = None
    """epochs, if not those of all rows: marked in the table"""
    settings_of: str = ""
    """takes the settings chosen for this row, in place of a search of its own"""
    columns: Mapping[str, dict[str, Any]] = Field(default_factory=dict)
    """column -> settings of this row there: of training, or options of the method"""
    search: Mapping[str, Grid] = Field(default_factory=dict)
    """column -> setting -> values to choose from, in place of the benchmark's own"""

    @property
    def id(self) -> str:
        return self.name or self.method


class TaskSection(Section):
    """A data set and a network."""

    name: Annotated[str, Field(pattern=NAME)]
    data: Annotated[DataSection, BeforeValidator(named)]
    model: Annotated[ModelSection, BeforeValidator(named)]


class ShiftSection(Section):
    """Corrupted test images."""

    root: str | None = None
    """folder of published ones (CIFAR-10-C); default: made here from the test images"""
    samples: Count | None = None
    """test images that are corrupted, evenly spread over them; default: all"""
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], Field(min_length=1)] = (
        1,
        2,
        3,
        4,
        5,
    )
    ood: str | None = None
    """another data set, to be told from the first: digits, patches, or one of the same shape"""


class Benchmark(Section):
    """Every method under one budget."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """names the folder, runs/NAME"""
    budget: Count
    """epochs that a method may take in all"""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    tasks: Annotated[tuple[TaskSection, ...], Field(min_length=1)]
    columns: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """name -> settings of `parent:` in a run, but its epochs"""
    search: Mapping[str, Grid] = Field(default_factory=dict)
    """column -> setting -> values; every row takes those that are best on validation data"""
    search_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1000,)
    """seeds of the search; none of `seeds`"""
    rows: Annotated[tuple[Annotated[Row, BeforeValidator(_method)], ...], Field(min_length=1)]
    shift: ShiftSection | None = None
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        for what, names in (
            ("seeds", self.seeds),
            ("search_seeds", self.search_seeds),
            ("rows: name", [row.id for row in self.rows]),
            ("tasks: name", [task.name for task in self.tasks]),
        ):
            twice = [str(name) for name in names if list(names).count(name) > 1]
            if twice:
                raise ValueError(f"{what}: {twice[0]} is there twice; give one another name")
        if set(self.seeds) & set(self.search_seeds):
            raise ValueError(
                "search_seeds: must be others than seeds, or a choice is its own proof"
            )
        for place, keys in (
            ("search", self.search),
            *((f"rows.{row.id}.columns", row.columns) for row in self.rows),
            *((f"rows.{row.id}.search", row.search) for row in self.rows),
        ):
            for key in keys:
                if key not in self.columns:
                    raise ValueError(
                        f"{place}: no column {key!r}; there are {', '.join(self.columns)}"
                    )
        for row in self.rows:
            if row.settings_of and row.settings_of not in [r.id for r in self.rows]:
                raise ValueError(f"rows.{row.id}.settings_of: no row {row.settings_of!r}")
            if any(r.settings_of for r in self.rows if r.id == row.settings_of):
                raise ValueError(
                    f"rows.{row.id}.settings_of: {row.settings_of!r} takes those of another row; "
                    "name that one"
                )
            if row.method not in {*baselines.METHODS, *OURS}:
                raise ValueError(
                    f"rows: unknown method {row.method!r}; known: "
                    f"{', '.join([*OURS, *baselines.METHODS])}"
                )
        return self

    # --- what follows ---

    def training(self, row: Row, column: str, settings: Settings) -> Training:
        """How a row is trained in a column.

        Raises:
            ValueError: a setting does not fit.
        """
        record = dict(self.columns[column]) | {"epochs": row.budget or self.budget}
        record |= {k: v for k, v in self._all(row, column, settings).items() if k in TRAINING}
        try:
            return TypeAdapter(Training).validate_python(record)
        except ValidationError as error:
            line = configfile.one_line(error, f"columns.{column} of {row.id}")
            raise ValueError(line) from None

    def _all(self, row: Row, column: str, settings: Settings) -> dict[str, Any]:
        return dict(row.columns.get(column, {})) | dict(settings)

    def options(self, row: Row, column: str, settings: Settings) -> dict[str, Any]:
        """Options of a row's method in a column."""
        extra = {k: v for k, v in self._all(row, column, settings).items() if k not in TRAINING}
        return row.options | extra

    def grid(self, row: Row, column: str) -> list[dict[str, Any]]:
        """What a row may be tried with in a column; one entry if nothing is to be chosen."""
        if row.settings_of:
            row = next(other for other in self.rows if other.id == row.settings_of)
        grid = row.search.get(column, self.search.get(column, {}))
        fixed = row.columns.get(column, {})
        grid = {key: values for key, values in grid.items() if key not in fixed}
        return [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]

    def cell(
        self,
        task: TaskSection,
        row: Row,
        column: str,
        settings: Settings,
        seed: int,
        label: str = "",
    ) -> Cell:
        """One cell; `label` marks it as one of a search.

        Raises:
            ValueError: the settings do not fit; one line.
        """
        training = self.training(row, column, settings)
        options = self.options(row, column, settings)
        budget = row.budget or self.budget
        if row.method in OURS:
            config = self._run(task, row, training, options, seed, budget)
            method: dict[str, Any] = {"run": config.model_dump(mode="json")}
            if config.budget() > budget:
                raise ValueError(
                    f"rows.{row.id}: takes {config.budget()} epochs, the budget is {budget}"
                )
        else:
            parsed = baselines.parse({"method": row.method, **options}, f"rows.{row.id}")
            if parsed.epochs(budget) > budget:
                raise ValueError(
                    f"rows.{row.id}: takes {parsed.epochs(budget)} epochs, the budget is {budget}"
                )
            method = asdict(parsed)
        return Cell(
            id=f"{task.name}-{row.id}-{column}{label}-s{seed}",
            row=row.id,
            column=column,
            seed=seed,
            budget=budget,
            method=method,
            training=training,
            data=task.data.model_dump(mode="json"),
            final=not label,
        )

    def _run(
        self,
        task: TaskSection,
        row: Row,
        training: Training,
        options: Mapping[str, Any],
        seed: int,
        budget: int,
    ) -> Config:
        """The run of one of our own methods."""
        own = {key: options[key] for key in OWN_KEYS if key in options}
        group = {k: v for k, v in options.items() if k not in OWN_KEYS}
        parent = own.get("parent_epochs", budget // 2)
        count = group.get("count", 8)
        each, rest = divmod(budget - parent, count)
        if "tune_epochs" not in own and (rest or each < 0) and row.method != "noisy":
            raise ValueError(
                f"rows.{row.id}: {budget - parent} epochs are left for {count} children; give "
                "parent_epochs or tune_epochs so that it comes out even"
            )
        plain = {**asdict(training), "epochs": parent}
        record: dict[str, Any] = {
            "name": row.id,
            "seed": seed,
            "data": task.data.model_dump(mode="json"),
            "model": {"name": task.model.name, **task.model.options},
            "parent": plain,
            "single": False,
            "include_parent": own.get("include_parent", False),
            "children": [{"method": row.method, "count": count, **group}],
            "resources": self.resources.model_dump(mode="json"),
        }
        if row.method != "noisy":
            constant = training.schedule == "constant"
            tune = plain | {
                "epochs": own.get("tune_epochs", each),
                "lr": own.get("tune_lr", training.lr),
                "schedule": own.get("tune_schedule", "constant" if constant else "one_cycle"),
            }
            record["children"][0]["tune"] = tune
        return configfile.checked(record, f"rows.{row.id}")

    @staticmethod
    def run_of(cell: Cell) -> Config:
        """The run that a cell of one of our own methods is."""
        return configfile.checked(dict(cell.method["run"]), f"rows.{cell.row}")

    def searches(self, task: TaskSection, row: Row, column: str) -> list[list[Cell]]:
        """For each entry of the grid the cells it is tried with; empty if there is no choice."""
        grid = self.grid(row, column)
        if len(grid) < 2 or row.settings_of:
            return []
        return [
            [self.cell(task, row, column, one, seed, f"-try{i}") for seed in self.search_seeds]
            for i, one in enumerate(grid)
        ]

    def shifted(self, cell: Cell) -> Shifted | None:
        """The job that measures a cell on shifted data, if that is wanted."""
        if self.shift is None:
            return None
        return Shifted(
            id=f"{cell.id}.shift",
            cell=cell.id,
            root=self.shift.root,
            samples=self.shift.samples,
            severities=self.shift.severities,
            ood=self.shift.ood,
        )

    def finals(self, task: TaskSection, row: Row, column: str, settings: Settings) -> list[Cell]:
        """The cells of the table."""
        return [self.cell(task, row, column, settings, seed) for seed in self.seeds]

    def places(self) -> Iterator[tuple[Row, str]]:
        """Every row and column of a task's tables."""
        for row in self.rows:
            for column in self.columns:
                yield row, column

    def config(self, task: TaskSection) -> Config:
        """A run on a task's data and network, for loading and building them."""
        row = Row(method="noisy", name="none")
        first = next(iter(self.columns))
        training = replace(self.training(row, first, {}), epochs=1)
        return self._run(task, row, training, {"count": 1, "sigma": 0.01, "parent_epochs": 1}, 0, 1)


@dataclass(frozen=True)
class Total:
    """How much a benchmark is."""

    cells: int
    epochs: int


def total(benchmark: Benchmark) -> Total:
    """Cells and epochs, those of searches included."""
    cells = epochs = 0
    for task in benchmark.tasks:
        for row, column in benchmark.places():
            tried = sum(map(len, benchmark.searches(task, row, column)))
            n = tried + len(benchmark.seeds)
            cells, epochs = cells + n, epochs + n * (row.budget or benchmark.budget)
    return Total(cells, epochs)


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Benchmark:
    """A benchmark from YAML text; every cell is checked.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    record = configfile.record_of(text, source, overrides)
    try:
        benchmark = Benchmark.model_validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        raise ValueError(configfile.one_line(error, source)) from None
    for task in benchmark.tasks:
        for row, column in benchmark.places():
            try:
                benchmark.searches(task, row, column)
                benchmark.finals(task, row, column, benchmark.grid(row, column)[0])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
    return benchmark


def load(name: str, overrides: Sequence[str] = ()) -> Benchmark:
    """`parse` of a file, or of a shipped config by name."""
    path = configfile.find(name)
    return parse(configfile.text_of(path), path.name, overrides)
