"""What a sweep has done so far, kept in `sweep.json` and `sweep.html` while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_subnets import environment
from ray_subnets.checkpoints import RunFolder
from ray_subnets.sweeps import sweepreport
from ray_subnets.sweeps.sweep import RECORD, stored_seeds, summarise, write
from ray_subnets.sweeps.sweepfile import Sweep, cell_id, told
from ray_subnets.sweeps.trials import Evaluator

EVERY = 1.0  # seconds between writes, at least


class Monitor:
    """Hears of trials, from Tune's callback or from the loop in this process.

    Cells that are done, and failures of an earlier attempt, are read from the folder.

    Args:
        notify: called with a line when a trial ends.
        links: name -> address of other places to look.
    """

    def __init__(
        self,
        folder: RunFolder,
        sweep: Sweep,
        *,
        notify: Callable[[str], None] = lambda line: None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.sweep, self._notify = folder, sweep, notify
        self.links = dict(links or {})
        self.cells: dict[str, dict[str, Any]] = {}
        self._environment = environment.describe()
        self._state, self._written, self._took = "starting", 0.0, 0.0
        self._began = self._first = self._last = time.time()
        self._work, self._ended = 0.0, 0
        # When every worker was there first: time, work and ended cells until then.
        self._warm: tuple[float, float, int] | None = None
        self.slots = 1
        for values in sweep.cells():
            self._cell(values)
        earlier = self._earlier()
        self._times: dict[str, float] = earlier.get("seconds", {})  # until a cell ends here
        for old in earlier.get("trials", []):
            cell = self._cell(old["values"])
            if old.get("lost"):  # its machine was to blame: it is done again
                continue
            if cell["status"] != "done" and old["status"] in ("failed", "stopped"):
                cell |= {"status": old["status"], "error": old["error"]}
            elif cell["status"] == "waiting" and not sweep.cells():
                # A search that was killed may or may not take this cell up again.
                cell["status"] = "stopped"

    def _earlier(self) -> dict[str, Any]:
        """`sweep.json`, if there is a sound one."""
        if not self.folder.exists(RECORD):
            return {}
        try:
            record: dict[str, Any] = self.folder.read_json(RECORD)
            return record if isinstance(record["trials"], list) else {}
        except (ValueError, KeyError, TypeError):
            return {}  # the trials' own files are what counts

    def _cell(self, values: Mapping[str, Any]) -> dict[str, Any]:
        id = cell_id(values)
        if id not in self.cells:
            seeds = stored_seeds(self.folder, self.sweep, values)
            done = len(seeds) == len(self.sweep.section.seeds)
            status = "done" if done else "waiting"
            self.cells[id] = {"values": dict(values), "seeds": seeds, "status": status}
        return self.cells[id]

    @property
    def complete(self) -> bool:
        """Is every cell of a grid done or given up?"""
        return bool(self.sweep.cells()) and not self.left

    @property
    def left(self) -> list[dict[str, Any]]:
        """Cells of a grid that are neither done nor failed."""
        return [c["values"] for c in self.cells.values() if c["status"] in ("waiting", "running")]

    def state(self, state: str) -> None:
        """A new phase: training parents, running, finished, stopped."""
        self._state = state
        if state in ("stopped", "finished"):
            for cell in self.cells.values():
                if cell["status"] == "running":
                    cell["status"] = "waiting"
        if state == "running":
            self._first = time.time()
        self.write()

    def started(self, values: Mapping[str, Any], worker: str = "") -> None:
        self._cell(values).update(status="running", worker=worker)
        running = sum(cell["status"] == "running" for cell in self.cells.values())
        if self._warm is None and running >= self.slots:
            self._warm = (time.time(), self._work, self._ended)
        self._write_soon()

    def progressed(self, values: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """A seed is done; `records` are all of the cell's so far."""
        cell = self._cell(values)
        cell["seeds"] = [dict(record) for record in records]
        self._work += float(records[-1]["seconds"])
        self._write_soon()

    def ended(
        self,
        values: Mapping[str, Any],
        *,
        error: str | None = None,
        worker: str = "",
        lost: bool = False,
    ) -> None:
        """No more seeds of this cell: all are done, a scheduler stopped it, or it failed.

        Args:
            lost: it failed with its process, and is done again when the sweep goes on.
        """
        cell = self._cell(values)
        whole = len(cell["seeds"]) == len(self.sweep.section.seeds)
        cell["status"] = "failed" if error else "done" if whole else "stopped"
        cell["error"] = error
        if lost:
            cell["lost"] = True
        cell["worker"] = worker or cell.get("worker")
        self._ended, self._last = self._ended + 1, time.time()
        count = sum(c["status"] in ("done", "stopped", "failed") for c in self.cells.values())
        outcome = f"failed: {error}"
        if not error:
            seeds = cell["seeds"]
            kl = sum(one["kl"] for one in seeds) / len(seeds)
            by = self.sweep.section.by
            value = sum(one[by] for one in seeds) / len(seeds)
            outcome = f"KL {kl:.4g} nats, {by.replace('_', ' ')} {value:.4f}"
            outcome += "" if whole else f" (stopped after {len(seeds)} seeds)"
        self._notify(f"[{count}/{len(self.cells)}] {told(values)}: {outcome}")
        self._write_soon()

    def times(self) -> dict[str, float]:
        """Seconds: by the clock, of the trials' own work, and what a trial cost beyond it.

        The last is counted over all workers, from when each had a trial to the last trial's end.
        """
        if not self._ended and self._times:
            return self._times
        beyond, cells = 0.0, 0
        if self._warm:
            since, work, before = self._warm
            beyond = self.slots * (self._last - since) - (self._work - work)
            cells = self._ended - before
        return {
            "clock": time.time() - self._began,
            "trials": max(0.0, self._last - self._first),
            "work": self._work,
            "slots": self.slots,
            "beyond_per_trial": max(0.0, beyond / max(1, cells)),
        }

    def _write_soon(self) -> None:
        if time.monotonic() - self._written > max(EVERY, 10 * self._took):
            self.write()

    def write(self) -> dict[str, Any]:
        """Rewrite both files; readers see the old or the new."""
        began = time.monotonic()
        record = summarise(
            self.sweep,
            self.cells,
            state=self._state,
            seconds=self.times(),
            links=self.links,
            updated=time.time(),
            environment=self._environment,
        )
        write(self.folder, record)
        sweepreport.write(self.folder)
        self._written = time.monotonic()
        self._took = self._written - began
        return record


def run_here(
    sweep: Sweep, folder: RunFolder, monitor: Monitor, *, device: str = "cpu"
) -> dict[str, Any]:
    """Every cell of a grid that is not done, one after another in this process.

    Returns:
        The content of `sweep.json`.

    Raises:
        ValueError: the sweep needs a searcher or scheduler of Ray Tune.
    """
    section = sweep.section
    if section.search.name != "grid" or section.scheduler.name != "fifo":
        raise ValueError("--serial: works for a grid without a scheduler; leave --serial out")
    evaluator = Evaluator(folder.root, device=device, import_from=str(Path.cwd()))
    evaluator.load(sweep.config(sweep.corners()[0], section.seeds[0]))  # else each cell would fail
    monitor.state("running")
    try:
        for values in monitor.left:
            monitor.started(values, "here")
            records: list[dict[str, Any]] = []
            error = None
            for seed in section.seeds:
                try:
                    records.append(evaluator.trial(sweep.config(values, seed), values))
                except ValueError as reason:
                    error = str(reason)
                    break
                monitor.progressed(values, records)
            monitor.ended(values, error=error)
    except KeyboardInterrupt:
        monitor.state("stopped")
        raise
    monitor.state("finished")
    return monitor.write()
