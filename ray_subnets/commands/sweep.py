"""`ray-subnets sweep` and `ray-subnets dashboard`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_subnets.commands.options import Address, Overrides, Quiet, Serial

out = Console()
err = Console(stderr=True)


def sweep(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="a YAML file with a sweep: section, the name of a shipped one, or the folder of a "
            "sweep to go on with",
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="sweep's folder; default: NAME in RAY_SUBNETS_RUNS, or in runs",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete what is in the folder first")
    ] = False,
    serial: Serial = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Try many settings of a run and choose among them, on validation data, by Ray Tune.

    Every trial makes children of a trained parent, which trials share where what is swept does not
    touch it, and measures KL from the parent, accuracy and NLL. The folder has sweep.json and
    sweep.html, also while it runs: ray-subnets dashboard runs/NAME.

    Example: ray-subnets sweep sweep_noise; then ray-subnets run sweep_noise --from-sweep
    runs/sweep_noise
    """
    from ray_subnets.checkpoints import CONFIG, RunFolder
    from ray_subnets.commands import policy as commands_policy
    from ray_subnets.sweeps.sweep import open_sweep
    from ray_subnets.sweeps.sweepfile import load

    if commands_policy.sweeps(config, overrides or []):
        commands_policy.sweep(
            *(config, overrides or [], folder),
            overwrite=overwrite,
            serial=serial,
            address=address,
            quiet=quiet,
        )
        return
    sys.path.insert(0, str(Path.cwd()))  # the user's own model and data modules
    if (Path(config) / CONFIG).is_file():
        if overrides or folder or overwrite:
            raise ValueError(
                "CONFIG: a sweep goes on as it was begun; leave settings, --out and --overwrite out"
            )
        target, settings = open_sweep(config)
        with target.alone():
            _do(settings, target, serial, address, quiet)
        return
    settings = load(config, overrides or [])
    where = folder or f"{os.environ.get('RAY_SUBNETS_RUNS', 'runs')}/{settings.name}"
    if "://" in where:
        raise ValueError(f"--out: a sweep needs a folder on a file system, not {where}")
    RunFolder.check_free(where, overwrite=overwrite, wanted="sweep")
    target = RunFolder.create(where, overwrite=overwrite, wanted="sweep")
    target.write(CONFIG, settings.to_yaml().encode())
    with target.alone():
        _do(settings, target, serial, address, quiet)


def _do(settings: Any, folder: Any, serial: bool, address: str | None, quiet: bool) -> None:
    from ray_subnets import driver
    from ray_subnets.config import GIVEN
    from ray_subnets.sweeps.sweepmonitor import Monitor, run_here
    from ray_subnets.sweeps.trials import device_here

    def notify(line: str) -> None:
        if not quiet:
            err.print(line, highlight=False, markup=False, soft_wrap=True)

    first = settings.config(settings.corners()[0], settings.section.seeds[0])
    if first.weights is not None and not folder.exists(GIVEN):
        data = driver.load_data(first)
        weights = driver.given_weights(first, data, driver.build(first, data))
        folder.save_tensors(GIVEN, weights or {})
    monitor = Monitor(folder, settings, notify=notify)
    monitor.write()
    notify(
        f"Live page: {folder.root / 'sweep.html'}; served: ray-subnets dashboard "
        f"{quote(str(folder.root))}"
    )
    try:
        if serial or monitor.complete:
            record = run_here(settings, folder, monitor, device=device_here(first))
        else:
            with ExitStack() as stack:
                from ray_subnets.distributed import cluster, sweeps

                stack.enter_context(cluster.session(address, dashboard=cluster.has_dashboard()))
                monitor.links |= cluster.links()
                record = sweeps.run(
                    settings, folder, monitor, notify=notify, growing=address not in (None, "local")
                )
    except KeyboardInterrupt:
        err.print(
            f"Stopped. What was computed is kept: ray-subnets sweep {quote(str(folder.root))}",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    show(record)
    out.print(f"Page: {folder.root / 'sweep.html'}", soft_wrap=True)


def show(record: dict[str, Any]) -> None:
    """The outcome, for a terminal."""
    from ray_subnets.sweeps import sweeptable

    out.print(sweeptable.table(record))
    for line in sweeptable.lines(record):
        out.print(line, highlight=False, markup=False)


def dashboard(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="a folder of runs and sweeps, or one of them")
    ] = "runs",
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="of this page; TensorBoard takes the next")
    ] = 8271,
    no_tensorboard: Annotated[
        bool, typer.Option("--no-tensorboard", help="do not start TensorBoard")
    ] = False,
) -> None:
    """Show sweeps and runs live, to this machine only, until Ctrl-C.

    Lists them, serves their pages, links Ray's own dashboard of a sweep that runs here, and starts
    TensorBoard (curves, and the HParams view of a sweep's trials). Both of those are in the extra
    dashboard: pip install 'ray_subnets\\[dashboard]'.
    """
    from contextlib import suppress

    from ray_subnets.sweeps.dashboard import Server, tensorboard

    with Server(folder, port) as server, ExitStack() as stack:
        out.print(f"Dashboard: {server.address}", highlight=False)
        if not no_tensorboard:
            address = stack.enter_context(tensorboard(server.root, server.server_address[1] + 1))
            if address:
                server.links["TensorBoard"] = address
            out.print(
                f"TensorBoard: {address}"
                if address
                else "TensorBoard is not installed: pip install 'ray_subnets[dashboard]'",
                highlight=False,
                markup=False,
            )
        with suppress(KeyboardInterrupt):
            server.serve_forever()
