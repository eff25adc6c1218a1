"""The command line: `ray-subnets ...`, or this file as a script.

`ray submit CLUSTER ray_subnets/launch.py -- run quickstart` copies this one file to the cluster's
head and runs it there; it then uses the package installed there. Options need no quotes and no
characters that a shell would change, since `ray submit` joins them unquoted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script the file's own folder comes first on the path, and our `data.py` or `config.py`
    # would stand in for other people's modules of these names.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != here]
    from ray_subnets import launch

    sys.exit(launch.main())

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ray_subnets.commands import benchmark as commands_benchmark
from ray_subnets.commands import keep as commands_keep
from ray_subnets.commands import policy as commands_policy
from ray_subnets.commands import report as commands_report
from ray_subnets.commands import serve as commands_serve
from ray_subnets.commands import sweep as commands_sweep
from ray_subnets.commands.options import (
    Address,
    Overrides,
    Quiet,
    RunArgument,
    Serial,
    address_or_head,
    on_head,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Subnetwork ensembles: one trained parent in, one calibrated ensemble out.\n\n"
    "Start with [bold]ray-subnets run quickstart[/bold] (a minute on two cores), then look at "
    "runs/quickstart/report.html.",
)
out = Console()
err = Console(stderr=True)

MORE = """More: ray submit CLUSTER.yaml ray_subnets/launch.py -- run fashion_mnist_sparse seed=1
and -- --help for everything else."""


@app.command(no_args_is_help=True)
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="PLACE",
            help="run folder, a path or s3://BUCKET/FOLDER, gs://...; default: NAME in "
            "RAY_SUBNETS_RUNS, or in runs",
        ),
    ] = None,
    from_sweep: Annotated[
        str | None,
        typer.Option("--from-sweep", metavar="DIR", help="with the settings that a sweep chose"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete the run that is in the folder first")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="start nothing; print what the run would do and take, here or on --address",
        ),
    ] = False,
    serial: Serial = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Train a parent, make children of it, tune and select them, keep the ensemble.

    A config with an env: section trains a policy, and plays it and its children side by side.

    Example: ray-subnets run fashion_mnist_sparse seed=1 parent.epochs=4 --out runs/try
    """
    from ray_subnets import configfile
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.storage import join

    if not from_sweep and commands_policy.concerns(config, overrides or []):
        return commands_policy.run(
            *(config, overrides or [], folder),
            overwrite=overwrite,
            plan=plan,
            serial=serial,
            address=address,
            quiet=quiet,
        )
    if from_sweep:
        from ray_subnets.sweeps.sweep import run_config

        settings = run_config(config, from_sweep, overrides or [])
    else:
        settings = configfile.load(config, overrides or [])
    target = folder or join(os.environ.get("RAY_SUBNETS_RUNS", "runs"), settings.name)
    if plan:
        return _plan(settings, target, serial, address)
    RunFolder.check_free(target, overwrite=overwrite)
    make = lambda: RunFolder.create(target, overwrite=overwrite)  # noqa: E731
    _do(settings, make, serial, address, quiet, fresh=True)


def _plan(config: Config, target: str, serial: bool, address: str | None) -> None:
    """Print a plan; exit code 1 if the run could not begin."""
    import shutil

    import torch

    from ray_subnets import driver, plan_table
    from ray_subnets import plan as plan_
    from ray_subnets.flops import forward_cost
    from ray_subnets.placement import Node

    sys.path.insert(0, str(Path.cwd()))  # the user's own model and data modules
    data = driver.load_data(config)
    cost = forward_cost(driver.build(config, data), data.input_shape, data.input_dtype)
    nodes = [Node(os.cpu_count() or 1, torch.cuda.device_count())]
    joined = address_or_head(address)
    if joined and not serial:
        from ray_subnets.distributed import cluster, devices

        with cluster.session(joined):
            nodes = devices.nodes()
    free = None
    if "://" not in target:
        there = next(path for path in Path(target).absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
    planned = plan_.plan(config, data, cost, nodes, serial=serial)
    out.print(plan_table.table(planned, free))
    for line in planned.hints:
        out.print(f"Note: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    need = planned.kept_bytes + planned.checkpoint_bytes
    problems = [planned.missing] if planned.missing else []
    if free is not None and free < need:
        problems.append(f"the run needs {need:,} bytes of disk and {free:,} are free at {target}")
    for line in problems:
        out.print(f"Missing: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def resume(
    run: RunArgument, serial: Serial = False, address: Address = None, quiet: Quiet = False
) -> None:
    """Go on with a stopped run: finished networks are kept, others go on where they were."""
    from ray_subnets import driver
    from ray_subnets.checkpoints import RunFolder

    folder = RunFolder.open(run)
    if commands_policy.owns(folder):
        return commands_policy.resume(folder, serial, address, quiet)
    _do(driver.config_of(folder), lambda: folder, serial, address, quiet)


@app.command(no_args_is_help=True)
def grow(
    run: RunArgument,
    to: Annotated[int, typer.Option("--to", metavar="N", help="children in all, or of --group")],
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="which children; needed if there are several"),
    ] = None,
    no_single: Annotated[
        bool,
        typer.Option("--no-single", help="drop the single model instead of training a longer one"),
    ] = False,
    serial: Serial = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Add children to a run; the parent and the children that exist are not touched.

    The result is that of a run made with N children from the start. More tuned children are a
    larger budget, so the single model beside them is trained again for it.

    Example: ray-subnets grow runs/fashion_mnist_sparse --to 128
    """
    from ray_subnets import configfile, driver
    from ray_subnets.checkpoints import RunFolder

    folder = RunFolder.open(run)
    commands_policy.refuse(folder, "grow")
    before = driver.config_of(folder)
    after = configfile.grown(before, to, group)
    if no_single:
        after = after.model_copy(update={"single": False})

    again = ["results/single.json"] if after.single_job() != before.single_job() else []
    _do(after, lambda: folder, serial, address, quiet, again=again)


def _do(
    config: Config,
    make: Callable[[], RunFolder],
    serial: bool,
    address: str | None,
    quiet: bool,
    fresh: bool = False,
    again: Sequence[str] = (),
) -> None:
    """Run or go on with a run, write the report, show the result.

    Args:
        fresh: nothing is in the folder yet.
        again: files of it that are out of date, to be removed first.
    """
    from ray_subnets import driver, progress, report
    from ray_subnets.events import Events
    from ray_subnets.pools import SerialPool
    from ray_subnets.population import Worker
    from ray_subnets.sweeps.trials import device_here

    sys.path.insert(0, str(Path.cwd()))  # the user's own model and data modules
    joins = address not in (None, "local")
    data = driver.load_data(config)
    model = driver.build(config, data)
    weights = driver.given_weights(config, data, model) if fresh else None
    with progress.view(driver.jobs(config), err, quiet=quiet) as view, ExitStack() as stack:
        if not serial:  # before anything is written: the cluster may not answer
            view.note(f"joining Ray at {address}" if joins else "starting Ray")
            from ray_subnets.distributed import cluster
            from ray_subnets.distributed import run as ray_run

            stack.enter_context(cluster.session(address))
        folder = make()
        if "://" not in str(folder):
            view.note(f"To watch it: ray-subnets dashboard {quote(str(folder))}")
        stack.enter_context(_interruptible(folder))
        for name in again:
            folder.remove(name)
        cost = driver.prepare(config, data, folder, weights=weights)
        events = Events(folder, view.note)
        stack.callback(events.close)

        def listen(event: Any) -> None:
            view(event)
            events(event)

        if serial:
            task = driver.task_of(config, folder)
            pool = SerialPool(Worker(task, data, device_here(config)))
            record = driver.run(config, data, folder, pool, cost=cost, listen=listen)
        else:
            record = ray_run.run(
                config,
                data,
                folder,
                cost=cost,
                listen=listen,
                notify=view.note,
                watch=view.status,
                growing=joins,
            )
    _show(record)
    page = report.write(folder)
    out.print(f"Report: {page}\nEnsemble: ray_subnets.load({str(folder)!r})", soft_wrap=True)
    if on_head() and "://" not in str(folder):
        line = f"Fetch it: ray rsync-down CLUSTER.yaml {folder}/ runs/{folder.name}/"
        out.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _interruptible(folder: RunFolder) -> Iterator[None]:
    try:
        with folder.alone():
            yield
    except KeyboardInterrupt:
        err.print(
            f"Stopped. What was computed is kept: ray-subnets resume {quote(str(folder))}",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _show(record: dict[str, Any]) -> None:
    from ray_subnets import table

    out.print(table.table(record))
    out.print(table.LEGEND, style="dim", highlight=False)
    for line in table.trust_text(record):
        out.print(line, highlight=False)
    for line in table.notes(record):
        out.print(f"Note: {line}", style="yellow", highlight=False, markup=False)
    out.print(table.verdict(record), highlight=False)
    out.print(table.cost_text(record), highlight=False)


@app.command(no_args_is_help=True)
def evaluate(run: RunArgument) -> None:
    """Load a finished run's ensemble, predict its test data again, compare with the record.

    Exit code 1 if they differ by more than another processor or device explains.
    """
    from ray_subnets import evaluation
    from ray_subnets.checkpoints import RunFolder

    commands_policy.refuse(RunFolder.open(run), "evaluate")
    sys.path.insert(0, str(Path.cwd()))
    outcome = evaluation.evaluate(run)
    out.print(evaluation.table(outcome))
    out.print(outcome.sentence(), highlight=False)
    if not outcome.agrees:
        raise typer.Exit(1)


app.command(no_args_is_help=True)(commands_report.report)
app.command(no_args_is_help=True)(commands_sweep.sweep)
app.command(no_args_is_help=True)(commands_benchmark.benchmark)
app.command(no_args_is_help=True)(commands_keep.export)
app.command(no_args_is_help=True)(commands_keep.distill)
app.command(no_args_is_help=True)(commands_serve.serve)
app.command()(commands_sweep.dashboard)


def main() -> int:
    """Run the command line. The user's mistakes are one line and exit code 2."""
    bare = len(sys.argv) == 1 and Path(sys.argv[0]).name == "launch.py"
    if bare:  # `ray submit cluster.yaml ray_subnets/launch.py`, with nothing after it
        sys.argv += ["run", "quickstart", "--overwrite"]
        err.print("No command given: running the quickstart.")
    stopped = [False]

    def stop(signum: int, frame: Any) -> None:
        """As Ctrl-C does; `docker stop` and Slurm send this."""
        stopped[0] = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if stopped[0]:
            return 128 + signal.SIGTERM
        if bare and not end.code:
            out.print(MORE, highlight=False, soft_wrap=True)
        raise
    except ValueError as error:
        err.print(
            f"ray-subnets: {error}", style="red", highlight=False, soft_wrap=True, markup=False
        )
        return 2
    return 0
