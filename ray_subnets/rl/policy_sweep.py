"""A policies' sweep: parents first, then every cell with every seed; `sweep.json`, `sweep.html`.

The driver submits jobs to a pool, as that of a run does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ray_subnets import environment, pages
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.data import Data
from ray_subnets.pools import Pool
from ray_subnets.population import Report
from ray_subnets.recipes import Job, Note, Result
from ray_subnets.rl import policy_figures, policy_run, policy_table
from ray_subnets.rl.policy_jobs import PolicyCell
from ray_subnets.rl.policy_sweepfile import PolicySweep
from ray_subnets.stored import stored_result
from ray_subnets.sweeps.sweep import RECORD
from ray_subnets.sweeps.sweepfile import cell_id, told

PAGE = "sweep.html"
EVERY = 2.0  # seconds between writes, at least


def check(sweep: PolicySweep) -> Data:
    """Can every cell be done? What the first one's policies see, for the pool.

    Raises:
        ValueError: see `policy_run.check`.
    """
    found = None
    seen = set()
    for values in sweep.cells():
        config = sweep.config(values, sweep.section.seeds[0])
        key = (config.env.id, config.env.frame_stack, str(config.env.options), str(config.model))
        if key not in seen:
            seen.add(key)
            data = policy_run.check(config)
            found = found or data
    assert found is not None
    return found


def jobs(sweep: PolicySweep) -> list[Job]:
    """Every job: parents, and cells."""
    return [*sweep.parents().values(), *_cells(sweep)]


def _cells(sweep: PolicySweep) -> list[PolicyCell]:
    return [sweep.job(values, seed) for values in sweep.cells() for seed in sweep.section.seeds]


def run(
    sweep: PolicySweep,
    folder: RunFolder,
    pool: Pool,
    *,
    listen: Callable[[Report], None] = lambda report: None,
) -> dict[str, Any]:
    """Do every cell that has no result yet; returns the content of `sweep.json`.

    Args:
        pool: its workers are `policy_cells.PolicyCellWorker`s.
    """
    if not folder.exists(CONFIG):
        folder.write(CONFIG, sweep.to_yaml().encode())
    folder.write_json("environment.json", environment.describe())
    results: dict[str, Result] = {}
    written = 0.0
    for report in _work(sweep, folder, pool, results):
        listen(report)
        if isinstance(report, Result) and time.monotonic() - written > EVERY:
            write(sweep, folder, results, state="running")
            written = time.monotonic()
    return write(sweep, folder, results, state="finished")


def _work(
    sweep: PolicySweep, folder: RunFolder, pool: Pool, results: dict[str, Result]
) -> Iterator[Report]:
    """Reports; results by job id join `results`."""
    parents = sweep.parents()
    waiting: dict[str, list[PolicyCell]] = {}
    for cell in _cells(sweep):
        waiting.setdefault(cell.parent, []).append(cell)

    def submit(job: PolicyCell) -> Iterator[Report]:
        said: list[str] = []
        known = stored_result(folder, job, said.append)
        yield from (Note(job.id, line) for line in said)
        if known is None or known.error:
            pool.submit(job)
        else:
            yield from done(known)

    def done(result: Result) -> Iterator[Report]:
        results[result.id] = result
        yield result
        place = result.id.replace("parent-", "parents/")
        for cell in waiting.pop(place, []) if place in parents else []:
            if result.error:
                yield from done(Result(id=cell.id, error=f"its parent: {result.error}"))
            else:
                yield from submit(cell)

    for job in parents.values():
        yield from submit(job)
    for report in pool.reports():
        if isinstance(report, Result):
            yield from done(report)
        else:
            yield report


# --- the outcome --------------------------------------------------------------------------------


def write(
    sweep: PolicySweep, folder: RunFolder, results: Mapping[str, Result], *, state: str
) -> dict[str, Any]:
    """`sweep.json` and `sweep.html`, of what is there."""
    record = {
        "kind": "policies",
        "name": sweep.name,
        "state": state,
        "keys": {key: list(values) for key, values in sweep.section.keys.items()},
        "seeds": list(sweep.section.seeds),
        "trials": [_trial(sweep, folder, values, results) for values in sweep.cells()],
        "environment": folder.read_json("environment.json"),
    }
    folder.write_json(RECORD, record)
    folder.write(PAGE, pages.render("policy_sweep.html", **_content(record)).encode())
    return record


def _trial(
    sweep: PolicySweep, folder: RunFolder, values: Mapping[str, Any], results: Mapping[str, Result]
) -> dict[str, Any]:
    """A cell over the seeds that are done."""
    ids = {seed: f"{cell_id(values)}-s{seed}" for seed in sweep.section.seeds}
    ended = {seed: results[id] for seed, id in ids.items() if id in results}
    sound = [f"cells/{ids[seed]}" for seed, result in ended.items() if not result.error]
    errors = [result.error for result in ended.values() if result.error]
    status = "waiting" if not ended else "running"
    if len(ended) == len(ids):
        status = "failed" if errors else "done"
    return {
        "id": cell_id(values),
        "values": dict(values),
        "status": status,
        "error": errors[0] if errors else None,
        "runs": sound,
        "evaluation": pooled([RunFolder(folder.path(name)) for name in sound]),
    }


def pooled(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Runs that differ in their seed, as one: the mean over all episodes of all of them.

    Intervals are of these trained parents: bootstrap over episodes, of each seed its own. How much
    seeds differ is said by `by_seed`.
    """
    records = [run.read_json("result.json") for run in runs]
    if not records:
        return []
    found = []
    for place, one in enumerate(records[0]["evaluation"]):
        rows = []
        for first in policy_table.shown(one["players"]):
            same = []
            for record in records:
                others = record["evaluation"][place]["players"]
                same += [player for player in others if player["name"] == first["name"]]
            if len(same) < len(records):
                continue  # a child failed with one of the seeds
            rows.append(_pooled_row(same))
        found.append({"levels": one["levels"], "choose": one["choose"], "players": rows})
    return found


def _pooled_row(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one player: means of the seeds' means, and the seeds' own intervals joined."""
    row = {key: same[0][key] for key in ("name", "kind", "group", "members")}
    row["episodes"] = sum(one["episodes"] for one in same)
    row |= _joined(same)
    scaled = [one["normalised"] for one in same]
    row["normalised"] = _joined(scaled) if scaled[0] else None
    differences = [one["difference"] for one in same]
    row["difference"] = None
    if differences[0]:
        row["difference"] = _joined(differences) | {
            key: sum(one[key] for one in differences)
            for key in ("pairs", "levels", "better", "worse")
        }
        row["by_seed"] = [one["mean"] for one in differences]
    return row


def _joined(same: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over seeds; the interval as of independent means of these widths."""
    means = np.array([one["mean"] for one in same])
    below = np.array([one["mean"] - one["low"] for one in same])
    above = np.array([one["high"] - one["mean"] for one in same])
    mean, n = float(means.mean()), len(same)
    return {
        "mean": mean,
        "low": mean - float(np.sqrt((below**2).sum())) / n,
        "high": mean + float(np.sqrt((above**2).sum())) / n,
    }


def seeds_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval of a difference over seeds, by Student's t: a bootstrap of so few covers far
    less. None for fewer than three."""
    values = np.array(row.get("by_seed", ()))
    if len(values) < 3:
        return None
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return float(values.mean()) - reach, float(values.mean()) + reach


def shown(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """For each way to play a title and the ensembles of every cell: its values, and cells."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for trial in record["trials"]:
        for one in trial["evaluation"]:
            title = f"{one['levels']} levels, {one['choose']}"
            parent = next(row for row in one["players"] if row["kind"] == "parent")
            for row in one["players"]:
                if row["kind"] != "ensemble":
                    continue
                off, over = row["difference"], seeds_interval(row)
                scaled = row["normalised"]
                found.setdefault(title, []).append(
                    (
                        told(trial["values"]),
                        [
                            row["name"],
                            f"{parent['mean']:.2f}",
                            f"{row['mean']:.2f}",
                            f"{scaled['mean']:.3f}" if scaled else "",
                            f"{off['mean']:+.2f}",
                            f"[{off['low']:+.2f}, {off['high']:+.2f}]",
                            f"[{over[0]:+.2f}, {over[1]:+.2f}]" if over else "",
                            f"{off['better']}/{off['worse']}",
                        ],
                    )
                )
    return list(found.items())


def brief(cells: Sequence[str], *, scaled: bool) -> list[str]:
    """What of a row, or of `HEADINGS`, a terminal has room for."""
    return [cells[i] for i in (0, 2, 3, 4, 5, 7) if scaled or i != 3]


HEADINGS = ("ensemble", "parent", "return", "scaled", "- parent", "95 %", "95 %, seeds", "+/-")


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for trial in record["trials"]:
        counts[trial["status"]] = counts.get(trial["status"], 0) + 1
    done = [trial for trial in record["trials"] if trial["evaluation"]]
    return {
        "record": record,
        "counts": ", ".join(f"{count} {status}" for status, count in counts.items()),
        "headings": HEADINGS,
        "tables": shown(record),
        "failed": [
            (told(trial["values"]), trial["error"]) for trial in record["trials"] if trial["error"]
        ],
        "figure": policy_figures.sweep(record["keys"], done) if done else "",
    }
