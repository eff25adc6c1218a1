"""A policy's run: config -> parent -> children -> episodes side by side, in a run folder.

As `driver.py` for classifiers: the driver submits jobs to a pool, and nothing that it computes
depends on where they are done.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray_subnets import driver, environment
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.data import Data
from ray_subnets.flat import flatten
from ray_subnets.models import actor_critic
from ray_subnets.pools import Pool
from ray_subnets.population import Report
from ray_subnets.recipes import Job, Note, Result, derive
from ray_subnets.rl import policyfile
from ray_subnets.rl.policy_jobs import Film, Match, Member, Player, split
from ray_subnets.rl.policy_summary import WORDS, children, cost, evaluation, load_lines, training
from ray_subnets.rl.policy_summary import playing as match_records
from ray_subnets.rl.policy_worker import MOMENTS, blank
from ray_subnets.rl.policyfile import PolicyConfig
from ray_subnets.spawning import anatomy
from ray_subnets.stored import stored_result

Listener = driver.Listener
ALL = "all"
"""the ensemble of every group's children"""


def check(config: PolicyConfig) -> Data:
    """Can this run be done? What its policies see and do, as a data set without samples.

    Raises:
        ValueError: unknown game, a package that is not installed, a network that does not take
            these observations, nothing in it to mask.
    """
    data = blank(config.env)
    model = actor_critic.build(
        config.model.name, data.input_shape, data.num_classes, config.model.options, 0
    )
    for spec in config.specs():
        anatomy(model.actor, spec, data.input_shape)
    return data


def prepare(config: PolicyConfig, folder: RunFolder) -> None:
    """Write what does not depend on the run."""
    folder.write(CONFIG, config.to_yaml().encode())
    folder.write_json("environment.json", environment.describe())


def config_of(folder: RunFolder) -> PolicyConfig:
    """The configuration a run folder was made with.

    Raises:
        ValueError: it is damaged.
    """
    return policyfile.parse(driver.config_text(folder), f"{folder}/{CONFIG}")


# --- the jobs -----------------------------------------------------------------------------------


def players(config: PolicyConfig, results: Mapping[str, Result], choose: Any) -> list[Player]:
    """Everyone who plays: chance, the parent, each child, and ensembles of each group and of all.

    Args:
        results: of children that are tuned; one that failed does not play.
    """
    members: dict[str, Member] = {}
    groups: dict[str, list[Member]] = {}
    found = []
    if choose == "sample":
        found.append(Player(name="random", kind="random"))
    found.append(Player(name="parent", kind="parent", members=(Member(),), choose=choose))
    for spec in config.specs():
        tuned = results.get(spec.id)
        if tuned is not None and tuned.error:
            continue
        member = Member(spec=spec, weights=tuned.weights if tuned else None)
        members[spec.id] = member
        groups.setdefault(spec.label, []).append(member)
        found.append(
            Player(name=spec.id, kind="child", members=(member,), choose=choose, group=spec.label)
        )
    if len(groups) > 1:
        groups[ALL] = list(members.values())
    for label, some in groups.items():
        for combine in config.evaluate.combine:
            found.append(
                Player(
                    name=f"{label}, {WORDS[combine]}",
                    kind="ensemble",
                    members=tuple(some),
                    combine=combine,
                    choose=choose,
                    group=label,
                )
            )
    return found


def matches(
    config: PolicyConfig, results: Mapping[str, Result], *, tuned: bool
) -> dict[tuple[str, str], list[Match]]:
    """Jobs by set of levels and way to choose; all of a set play the same levels.

    Args:
        tuned: of those players that some tuned child is a member of, or of all others, who can
            play as soon as the parent is there.
    """
    found = {}
    for name, env in config.level_sets().items():
        for choose in config.evaluate.choose:
            some = [one for one in players(config, results, choose) if _tuned(one) == tuned]
            parts = split(some, config.evaluate.per_job)
            found[name, str(choose)] = [
                Match(
                    id=f"play-{name}-{choose}{'-tuned' if tuned else ''}-{i:03d}",
                    env=env,
                    players=part,
                    seed=derive(config.seed, "play", name),
                    limit=config.evaluate.limit,
                )
                for i, part in enumerate(parts)
            ]
    return found


def _tuned(player: Player) -> bool:
    return any(member.spec is not None and member.spec.epochs for member in player.members)


def _heaviest_first(found: Mapping[tuple[str, str], Sequence[Match]]) -> list[Match]:
    """So that the last to finish is a short one."""
    every = [match for some in found.values() for match in some]
    return sorted(every, key=lambda match: -sum(len(one.members) for one in match.players))


def film(config: PolicyConfig, results: Mapping[str, Result]) -> Film | None:
    """The first ensemble on the last set of levels: unseen ones, if there are any."""
    if not config.evaluate.film:
        return None
    name, env = list(config.level_sets().items())[-1]
    everyone = players(config, results, config.evaluate.choose[0])
    first = next((one for one in everyone if one.kind == "ensemble"), None)
    if first is None:
        return None
    seed = derive(config.seed, "play", name)
    return Film(id="film", env=env, player=first, seed=seed, steps=config.evaluate.film)


def jobs(config: PolicyConfig) -> list[Job]:
    """Every job of a run in which no child fails."""
    last = film(config, {})
    playing = [one for when in (False, True) for one in _playing(config, {}, tuned=when)]
    return [config.parent_job(), *config.child_jobs(), *playing, *([last] if last else [])]


def _playing(config: PolicyConfig, results: Mapping[str, Result], *, tuned: bool) -> list[Match]:
    return _heaviest_first(matches(config, results, tuned=tuned))


# --- the run ------------------------------------------------------------------------------------


def run(
    config: PolicyConfig,
    data: Data,
    folder: RunFolder,
    pool: Pool,
    *,
    parent: RunFolder | None = None,
    listen: Listener = lambda report: None,
) -> dict[str, Any]:
    """Do every job that has no result yet; write `result.json` and return its content.

    Args:
        data: from `check`.
        parent: where the parent is, if that is not this folder: runs may share one.
        listen: called with every report, for progress and logs.

    Raises:
        ValueError: the parent diverged, no child is left, or an episode does not end. What was
            computed stays in the folder.
    """
    return driver.heard(steps(config, data, folder, pool, parent=parent), listen)


def steps(
    config: PolicyConfig,
    data: Data,
    folder: RunFolder,
    pool: Pool,
    *,
    parent: RunFolder | None = None,
) -> Generator[Report, None, dict[str, Any]]:
    """`run`, report by report; the generator's return value is the content of `result.json`."""
    began = time.time()
    results: dict[str, Result] = {}
    home = parent or folder
    yield from _work(config, folder, home, pool, results)
    if not any(one.kind == "ensemble" for one in players(config, results, "sample")):
        first = next(result.error for result in results.values() if result.error)
        raise ValueError(f"children: every child failed; the first: {first}")
    early, late = (matches(config, results, tuned=tuned) for tuned in (False, True))
    playing = {key: [*early[key], *late[key]] for key in early}
    every = [match for some in playing.values() for match in some]
    stored = results["parent"].weights
    assert stored
    weights = home.load_tensors(stored)
    size = sum(one.numel() for name, one in weights.items() if name != MOMENTS)
    start = min(result.started for result in results.values())
    record = {
        "kind": "policy",
        "name": config.name,
        "seed": config.seed,
        "env": asdict(config.env)
        | {"observation_shape": list(data.input_shape), "num_actions": data.num_classes},
        "parent": training(results["parent"], start) | {"folder": str(parent) if parent else None},
        "children": children(config.specs(), results, start),
        "evaluation": evaluation(
            {key: load_lines(folder, some, results) for key, some in playing.items()},
            config.level_sets(),
            config.seed,
        ),
        "matches": match_records(every, results, start),
        "film": _film(results.get("film"), list(config.level_sets())[-1]),
        "cost": cost(folder, results, every, size),
        "faults": [asdict(fault) for fault in pool.faults],
        "environment": folder.read_json("environment.json")
        | {"driver_seconds": time.time() - began},
    }
    folder.write_json("result.json", record)
    return record


def _film(result: Result | None, levels: str) -> dict[str, Any]:
    if result is None:
        return {"file": None, "error": None}
    file = result.outputs.file if result.outputs else None
    return {"file": file, "levels": levels, "error": result.error}


def _work(
    config: PolicyConfig,
    folder: RunFolder,
    home: RunFolder,
    pool: Pool,
    results: dict[str, Result],
) -> Iterator[Report]:
    """Do every job; finished ones are read from the folder, the parent from its `home`. Results
    join `results`."""
    waiting = {job.id for job in config.child_jobs()}

    def submit(jobs: Iterable[Job]) -> Iterator[Report]:
        for job in jobs:
            said: list[str] = []
            known = stored_result(home if job.id == "parent" else folder, job, said.append)
            yield from (Note(job.id, line) for line in said)
            if known is None:
                pool.submit(job)
            else:
                yield from done(known)

    def done(result: Result) -> Iterator[Report]:
        results[result.id] = result
        yield result
        if result.id == "parent":
            assert result.weights
            pool.share(flatten(home.load_tensors(result.weights)))
            yield from submit(sorted(config.child_jobs(), key=lambda job: -job.epochs))
            yield from submit(_playing(config, results, tuned=False))
            if not config.child_jobs():
                yield from finish()
        elif result.id in waiting:
            waiting.remove(result.id)
            if not waiting:
                yield from finish()

    def finish() -> Iterator[Report]:
        """All children are there."""
        last = film(config, results)
        yield from submit(_playing(config, results, tuned=True))
        yield from submit([last] if last else [])

    yield from submit([config.parent_job()])
    for report in pool.reports():
        if isinstance(report, Result):
            yield from done(report)
        else:
            yield report
