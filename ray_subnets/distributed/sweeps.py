"""Sweeps on Ray Tune: parents first, then a trial for each cell, on actors that stay warm."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

# Read by Tune when it is imported: trials keep the driver's folder, Ctrl-C ends the sweep at once
# (finished trials are in the folder), and our own page takes the place of Tune's tables.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from ray import tune
from ray.tune import schedulers, search
from ray.tune.experiment import Trial as TuneTrial

from ray_subnets import checks, driver
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config, Named
from ray_subnets.data import Data
from ray_subnets.distributed.children import pack_data, unpack_data
from ray_subnets.distributed.devices import Share, granted, here
from ray_subnets.distributed.pool import RayPool
from ray_subnets.distributed.sweepgauges import SweepGauges
from ray_subnets.distributed.visible import check_mark, leave_mark, take_mark
from ray_subnets.memory import keep_freed
from ray_subnets.recipes import Fit, Result
from ray_subnets.stored import stored_result
from ray_subnets.sweeps.sweep import averaged, objective
from ray_subnets.sweeps.sweepfile import Range, Sweep, cell_id, parent_job
from ray_subnets.sweeps.sweepmonitor import Monitor
from ray_subnets.sweeps.trials import Evaluator, data_key

FAILED = -1e3  # the objective of settings that do not work
ALIASES = {"asha": "async_hyperband"}
_CELL = "cell as text"
_MONITORS: dict[str, Monitor] = {}  # by folder, in the driver; Tune stores callbacks by pickling


class Trial(tune.Trainable):
    """A cell; each step is a seed. Its actor goes from cell to cell, data and parents loaded."""

    def setup(
        self,
        config: dict[str, Any],
        root: str = "",
        sweep: Any = None,
        packed: Any = None,
        gpus: float = 0.0,
        import_from: str = "",
    ) -> None:
        key, flat, rest = packed
        check_mark(root)
        keep_freed()
        self._sweep: Sweep = sweep
        self._evaluator = Evaluator(
            root, data={key: unpack_data(flat, rest)}, device=granted(gpus), import_from=import_from
        )
        self._node = here()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._values = cell_of(new_config)
        self._records: list[dict[str, Any]] = []
        return True

    def step(self) -> dict[str, Any]:
        section = self._sweep.section
        seed = section.seeds[len(self._records)]
        shared = {"worker": self._node, "cell": cell_id(self._values)}
        try:
            record = self._evaluator.trial(self._sweep.config(self._values, seed), self._values)
        except ValueError as error:  # these settings do not work; the actor is as good as before
            return shared | {"objective": FAILED, "failure": str(error), "done": True}
        self._records.append(record)
        means, _ = averaged(self._records)
        return {
            **shared,
            **means,
            "objective": objective(self._records, section.by, section.kl_bound),
            "seed": seed,
            "record": json.dumps(self._records),
            "done": len(self._records) == len(section.seeds),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Which cell; its finished seeds are in the sweep's folder."""
        (Path(checkpoint_dir) / "cell.json").write_text(json.dumps(len(self._records)))

    def load_checkpoint(self, checkpoint: Any) -> None:
        done = json.loads((Path(str(checkpoint)) / "cell.json").read_text())
        for seed in self._sweep.section.seeds[len(self._records) : done]:
            config = self._sweep.config(self._values, seed)
            self._records.append(self._evaluator.trial(config, self._values))


class Live(tune.Callback):
    """Tells the monitor what Tune does."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._gauges: SweepGauges | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root, "_gauges": None}

    @property
    def _monitor(self) -> Monitor:
        return _MONITORS[self._root]

    def _measure(self) -> None:
        if self._gauges is None:
            self._gauges = SweepGauges(Path(self._root).name)
        self._gauges.update(self._monitor.cells)

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        self._monitor.started(cell_of(trial.config))
        self._measure()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        if "record" in result:
            self._monitor.started(cell_of(trial.config), result["worker"])
            self._monitor.progressed(cell_of(trial.config), json.loads(result.pop("record")))

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        last = trial.last_result or {}
        error, worker = last.get("failure"), last.get("worker", "")
        self._monitor.ended(cell_of(trial.config), error=error, worker=worker)
        self._measure()

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        error = trial.get_error()
        lines = str(error or "").strip().splitlines()
        told = " ".join(lines[-1].split())[:300] if lines else "its process died again and again"
        self._monitor.ended(cell_of(trial.config), error=told, lost=True)
        self._measure()


def _class_options(kind: str, made: Any, named: Named) -> None:
    known = inspect.signature(made.__init__).parameters
    for option in named.options:
        if option not in known:
            raise ValueError(
                f"sweep.{kind}.{option}: {named.name} has no such option; it has "
                f"{', '.join(name for name in known if name not in ('self', 'args', 'kwargs'))}"
            )


def searcher(named: Named) -> Any:
    """A searcher of Ray Tune by name; None for the grid.

    Raises:
        ValueError: unknown, not installed, or an option that it does not have.
    """
    name = named.name
    if name == "grid":
        return None
    if name not in search.SEARCH_ALG_IMPORT:
        known = ", ".join(["grid", *search.SEARCH_ALG_IMPORT])
        raise ValueError(f"sweep.search: {name!r} is none of Ray Tune's searchers; known: {known}")
    try:
        _class_options("search", search.SEARCH_ALG_IMPORT[name](), named)
        return search.create_searcher(name, **_told(named, metric="objective", mode="max"))
    except (ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"sweep.search: {name} needs a package that is not installed ({reason}); "
            f"pip install {name}, or use search: random"
        ) from None


def scheduler(named: Named, seeds: int) -> Any:
    """A scheduler of Ray Tune by name; its unit of time is a seed.

    Raises:
        ValueError: unknown, or an option that it does not have.
    """
    name = ALIASES.get(named.name, named.name)
    if name not in schedulers.SCHEDULER_IMPORT:
        known = ", ".join([*ALIASES, *schedulers.SCHEDULER_IMPORT])
        raise ValueError(
            f"sweep.scheduler: {named.name!r} is none of Ray Tune's schedulers; known: {known}"
        )
    made = schedulers.SCHEDULER_IMPORT[name]
    if inspect.isclass(made):
        _class_options("scheduler", made, named)
    try:
        return schedulers.create_scheduler(
            name, **_told(named, time_attr="training_iteration", max_t=seeds)
        )
    except (ImportError, AssertionError, TypeError) as error:
        raise ValueError(f"sweep.scheduler: {named.name}: {' '.join(str(error).split())}") from None


def _told(named: Named, **defaults: Any) -> dict[str, Any]:
    return defaults | named.options


def space(sweep: Sweep) -> dict[str, Any]:
    """The swept keys as Tune wants them."""
    found: dict[str, Any] = {}
    for key, values in sweep.section.keys.items():
        if not isinstance(values, Range):
            grid = sweep.section.search.name == "grid"
            found[key] = tune.grid_search(list(values)) if grid else tune.choice(list(values))
        elif values.integer:
            low, high = int(values.low), int(values.high) + 1
            found[key] = tune.lograndint(low, high) if values.log else tune.randint(low, high)
        else:
            draw = tune.loguniform if values.log else tune.uniform
            found[key] = draw(values.low, values.high)
    return found


def some(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """These cells, one by one, as Tune wants them; as text, since it resolves lists and mappings
    in a setting as parts of its own."""
    return {_CELL: tune.grid_search([json.dumps(cell) for cell in cells])}


def cell_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial's swept keys."""
    found: dict[str, Any] = json.loads(config[_CELL]) if _CELL in config else dict(config)
    return found


def parents(sweep: Sweep) -> dict[str, tuple[Config, Fit]]:
    """Parents that trials will share, by job id; those of a search only if no key touches them."""
    cells = sweep.cells()
    if not cells:
        corners = sweep.corners()
        ids = {parent_job(sweep.config(cell, sweep.section.seeds[0])).id for cell in corners}
        cells = corners[:1] if len(ids) == 1 else []
    found: dict[str, tuple[Config, Fit]] = {}
    for cell in cells:
        for seed in sweep.section.seeds:
            config = sweep.config(cell, seed)
            job = parent_job(config)
            found.setdefault(job.id, (config, job))
    return found


def train_parents(
    sweep: Sweep,
    folder: RunFolder,
    data: Data,
    key: str,
    notify: Callable[[str], None],
    *,
    growing: bool,
) -> None:
    """Train the shared parents that are not there yet, side by side."""
    groups: dict[str, list[tuple[Config, Fit]]] = {}
    for config, job in parents(sweep).values():
        if stored_result(folder, job) is None:
            network = json.dumps([config.model.name, config.model.options, data_key(config)])
            groups.setdefault(network, []).append((config, job))
    for group in groups.values():
        config = group[0][0]
        own = data if data_key(config) == key else driver.load_data(config)
        pool = RayPool(
            config.task(str(folder)),
            own,
            config.resources,
            jobs=len(group),
            growing=growing,
            notify=notify,
        )
        try:
            for _, job in group:
                pool.submit(job)
            for report in pool.reports():
                if isinstance(report, Result):
                    notify(f"{report.id}: " + (report.error or f"done in {report.seconds:.1f} s"))
        finally:
            pool.close()


def run(
    sweep: Sweep,
    folder: RunFolder,
    monitor: Monitor,
    *,
    notify: Callable[[str], None] = lambda line: None,
    growing: bool = False,
) -> dict[str, Any]:
    """Do every trial that is not done; on the Ray that this process is connected to.

    Returns:
        The content of `sweep.json`.

    Raises:
        ValueError: unknown searcher or scheduler, or no room on the cluster.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    section = sweep.section
    base = sweep.config(sweep.corners()[0], section.seeds[0])
    share = Share.of(base.resources, growing=growing)
    algorithm, order = searcher(section.search), scheduler(section.scheduler, len(section.seeds))
    data, key = driver.load_data(base), data_key(base)
    checks.same_data(data, folder, key)
    monitor.state("training parents")
    train_parents(sweep, folder, data, key, notify, growing=growing)
    flat, rest = pack_data(data)
    trainable = tune.with_resources(
        tune.with_parameters(
            Trial,
            root=str(folder),
            sweep=sweep,
            packed=(key, flat, rest),
            gpus=share.gpus,
            import_from=str(Path.cwd()),
        ),
        {"cpu": share.cpus, "gpu": share.gpus},
    )
    # Tune knows trainables by name, and two sweeps in one process are not the same.
    trainable.__name__ = f"Trial_{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"
    monitor.slots = base.resources.actors or share.fit()
    _MONITORS[str(folder)] = monitor
    path = str(folder.root / "tune")
    monitor.state("running")
    leave_mark(str(folder))
    try:
        plain = bool(sweep.cells()) and section.scheduler.name == "fifo"
        swept, samples = space(sweep), section.samples or 1
        if plain and Path(path).exists():
            # What is left of a grid follows from the cells' own files. Tune's are pickle, and hold
            # the place where they were written.
            shutil.rmtree(path)
            swept, samples = some(monitor.left), 1
        if tune.Tuner.can_restore(path):
            try:
                tuner = tune.Tuner.restore(path, trainable, restart_errored=True)
            except (ValueError, AttributeError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{folder}: Ray Tune cannot go on from {path} ({reason}); a search goes on "
                    "only where it was begun: move it back, or begin it anew"
                ) from None
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=swept,
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="max",
                    search_alg=algorithm,
                    scheduler=order,
                    num_samples=samples,
                    max_concurrent_trials=monitor.slots,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: (
                        cell_id(cell_of(trial.config)) + f"-{trial.trial_id}"
                    ),
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.root),
                    callbacks=[Live(str(folder))],
                    failure_config=tune.FailureConfig(max_failures=base.resources.retries),
                    verbose=0,
                ),
            )
        tuner.fit()
    except KeyboardInterrupt:
        monitor.state("stopped")
        raise
    finally:
        del _MONITORS[str(folder)]
        take_mark(str(folder))
    monitor.state("finished")
    lost = sum(bool(cell.get("lost")) for cell in monitor.cells.values())
    if lost:
        notify(
            f"{lost} cells were lost with their processes: ray-subnets sweep {quote(str(folder))} "
            "does them"
        )
    return monitor.write()
