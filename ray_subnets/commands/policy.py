"""What `ray-subnets run`, `resume` and `report` do where there is a policy to learn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ray_subnets.commands.options import on_head

if TYPE_CHECKING:
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.data import Data
    from ray_subnets.rl.policy_sweepfile import PolicySweep
    from ray_subnets.rl.policyfile import PolicyConfig

out = Console()
err = Console(stderr=True)


def concerns(config: str, overrides: list[str]) -> bool:
    """Is this file, or shipped config, a policy's?

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    from ray_subnets import configfile
    from ray_subnets.rl import policyfile

    path = configfile.find(config)
    return policyfile.is_policy(
        configfile.record_of(configfile.text_of(path), path.name, overrides)
    )


def owns(folder: RunFolder) -> bool:
    """Is this the run folder of a policy?

    Raises:
        ValueError: its settings are damaged.
    """
    from ray_subnets import configfile, driver
    from ray_subnets.checkpoints import CONFIG
    from ray_subnets.rl import policyfile

    record = configfile.record_of(driver.config_text(folder), folder.path(CONFIG), [])
    return policyfile.is_policy(record)


def run(
    config: str,
    overrides: list[str],
    folder: str | None,
    *,
    overwrite: bool,
    plan: bool,
    serial: bool,
    address: str | None,
    quiet: bool,
) -> None:
    """Train a policy, make children of it, play them side by side."""
    from ray_subnets import configfile
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.rl import policyfile
    from ray_subnets.storage import join

    path = configfile.find(config)
    settings = policyfile.parse(configfile.text_of(path), path.name, overrides)
    target = folder or join(os.environ.get("RAY_SUBNETS_RUNS", "runs"), settings.name)
    if plan:
        _plan(settings)
        return
    RunFolder.check_free(target, overwrite=overwrite)
    _do(settings, lambda: RunFolder.create(target, overwrite=overwrite), serial, address, quiet)


def resume(folder: RunFolder, serial: bool, address: str | None, quiet: bool) -> None:
    """Go on with a stopped run."""
    from ray_subnets.rl import policy_run

    _do(policy_run.config_of(folder), lambda: folder, serial, address, quiet)


def _plan(config: PolicyConfig) -> None:
    """What a run would do."""
    from ray_subnets.rl import policy_run

    sys.path.insert(0, str(Path.cwd()))
    data = policy_run.check(config)
    jobs = policy_run.jobs(config)
    tuning = sum(job.ppo.total_steps for job in config.child_jobs())
    networks = len(config.specs())
    out.print(
        f"{config.env.id}: observations {tuple(data.input_shape)}, {data.num_classes} actions; "
        f"{config.ppo.total_steps:,} steps for the parent, {tuning:,} to tune children; "
        f"{networks} children in {len(jobs)} jobs; {config.evaluate.episodes} episodes of each on "
        f"{len(config.level_sets())} sets of levels, {len(config.evaluate.choose)} ways to choose",
        highlight=False,
        soft_wrap=True,
    )


def _do(
    config: PolicyConfig,
    make: Callable[[], RunFolder],
    serial: bool,
    address: str | None,
    quiet: bool,
) -> None:
    """Run or go on with a run, write the report, show the result."""
    from ray_subnets import progress
    from ray_subnets.events import Events
    from ray_subnets.pools import SerialPool
    from ray_subnets.rl import policy_report, policy_run, policy_table
    from ray_subnets.rl.policy_worker import PolicyWorker
    from ray_subnets.sweeps.trials import device_here

    sys.path.insert(0, str(Path.cwd()))  # the user's own model and environment modules
    joins = address not in (None, "local")
    data = policy_run.check(config)
    with progress.view(policy_run.jobs(config), err, quiet=quiet) as view, ExitStack() as stack:
        if not serial:  # before anything is written: the cluster may not answer
            view.note(f"joining Ray at {address}" if joins else "starting Ray")
            from ray_subnets.distributed import cluster
            from ray_subnets.distributed import policies as on_ray

            stack.enter_context(cluster.session(address))
        folder = make()
        stack.enter_context(folder.alone())
        policy_run.prepare(config, folder)
        events = Events(folder, view.note)
        stack.callback(events.close)

        def listen(event: Any) -> None:
            view(event)
            events(event)

        try:
            if serial:
                worker = PolicyWorker(config.task(str(folder)), data, device_here(config))
                record = policy_run.run(config, data, folder, SerialPool(worker), listen=listen)
            else:
                record = on_ray.run(
                    *(config, data, folder),
                    listen=listen,
                    notify=view.note,
                    watch=view.status,
                    growing=joins,
                )
        except KeyboardInterrupt:
            err.print(
                f"Stopped. What was computed is kept: ray-subnets resume {quote(str(folder))}",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    for table in policy_table.tables(record):
        out.print(table)
    out.print(policy_table.legend(record), style="dim", highlight=False)
    for line in policy_table.notes(record):
        out.print(f"Note: {line}", style="yellow", highlight=False, markup=False)
    for line in [*policy_table.verdict(record), policy_table.cost_text(record)]:
        out.print(line, highlight=False, markup=False)
    page = policy_report.write(folder)
    out.print(f"Report: {page}\nPolicy: ray_subnets.load_policy({str(folder)!r})", soft_wrap=True)
    if on_head() and "://" not in str(folder):
        line = f"Fetch it: ray rsync-down CLUSTER.yaml {folder}/ runs/{folder.name}/"
        out.print(line, highlight=False, soft_wrap=True)


def refuse(folder: RunFolder, command: str) -> None:
    """For commands that only know classifiers.

    Raises:
        ValueError: the folder is a policy's.
    """
    if owns(folder):
        raise ValueError(
            f"{command}: {folder} is a policy's run, and this is for classifiers; its report.html "
            "and result.json have the numbers"
        )


# --- sweeps -------------------------------------------------------------------------------------


def sweeps(config: str, overrides: list[str]) -> bool:
    """Is this file, shipped config, or folder a policies' sweep?

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    from ray_subnets import configfile
    from ray_subnets.checkpoints import CONFIG
    from ray_subnets.rl import policy_sweepfile

    path = Path(config) / CONFIG
    if not path.is_file():
        path = configfile.find(config)
    record = configfile.record_of(configfile.text_of(path), path.name, overrides)
    return policy_sweepfile.is_policy_sweep(record)


def sweep(
    config: str,
    overrides: list[str],
    folder: str | None,
    *,
    overwrite: bool,
    serial: bool,
    address: str | None,
    quiet: bool,
) -> None:
    """Every cell of a grid with every seed."""
    from ray_subnets import configfile
    from ray_subnets.checkpoints import CONFIG, RunFolder
    from ray_subnets.rl import policy_sweep, policy_sweepfile
    from ray_subnets.storage import join
    from ray_subnets.table import empty

    sys.path.insert(0, str(Path.cwd()))  # the user's own model and environment modules
    path = Path(config) / CONFIG
    if path.is_file():
        if overrides or folder or overwrite:
            raise ValueError(
                "CONFIG: a sweep goes on as it was begun; leave settings, --out and --overwrite out"
            )
        settings = policy_sweepfile.parse(configfile.text_of(path), str(path))
        data, target = policy_sweep.check(settings), RunFolder(config)
    else:
        path = configfile.find(config)
        settings = policy_sweepfile.parse(configfile.text_of(path), path.name, overrides)
        where = folder or join(os.environ.get("RAY_SUBNETS_RUNS", "runs"), settings.name)
        RunFolder.check_free(where, overwrite=overwrite, wanted="sweep")
        data = policy_sweep.check(settings)
        target = RunFolder.create(where, overwrite=overwrite, wanted="sweep")
        target.write(CONFIG, settings.to_yaml().encode())
    record = _swept(settings, data, target, serial, address, quiet)
    for title, rows in policy_sweep.shown(record):
        scaled = any(cells[3] for _, cells in rows)
        headings = policy_sweep.brief(policy_sweep.HEADINGS, scaled=scaled)
        table = empty(f"{record['name']}: {title}", headings)
        for told, cells in rows:
            table.add_row(told, *policy_sweep.brief(cells, scaled=scaled))
        out.print(table)
    for trial in record["trials"]:
        if trial["error"]:
            line = f"Failed: {trial['values']}: {trial['error']}"
            out.print(line, highlight=False, markup=False, style="yellow")
    out.print(f"Page: {target.path(policy_sweep.PAGE)}", soft_wrap=True)


def _swept(
    settings: PolicySweep,
    data: Data,
    folder: RunFolder,
    serial: bool,
    address: str | None,
    quiet: bool,
) -> dict[str, Any]:
    from ray_subnets import progress
    from ray_subnets.pools import SerialPool
    from ray_subnets.rl import policy_sweep
    from ray_subnets.rl.policy_cells import PolicyCellWorker
    from ray_subnets.sweeps.trials import device_here

    first = settings.config(settings.cells()[0], settings.section.seeds[0])
    with progress.view(policy_sweep.jobs(settings), err, quiet=quiet) as view, ExitStack() as stack:
        stack.enter_context(folder.alone())
        try:
            if serial:
                worker = PolicyCellWorker(first.task(str(folder)), data, device_here(first))
                return policy_sweep.run(settings, folder, SerialPool(worker), listen=view)
            from ray_subnets.distributed import cluster
            from ray_subnets.distributed import policies as on_ray

            stack.enter_context(cluster.session(address))
            return on_ray.sweep(
                *(settings, data, folder),
                listen=view,
                notify=view.note,
                watch=view.status,
                growing=address not in (None, "local"),
            )
        except KeyboardInterrupt:
            err.print(
                f"Stopped. What was computed is kept: ray-subnets sweep {quote(str(folder))}",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
