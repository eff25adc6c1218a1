"""`ray-subnets benchmark`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ray_subnets.commands.options import Address, Overrides, Quiet, Serial

if TYPE_CHECKING:
    from ray_subnets.benchmark.benchmarkfile import Benchmark
    from ray_subnets.benchmark.run import MakePool
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.data import Data
    from ray_subnets.pools import Pool
    from ray_subnets.population import Task

out = Console()
err = Console(stderr=True)


def benchmark(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="a YAML file with rows: and columns:, the name of a shipped one "
            "(benchmark_digits), or the folder of a benchmark to go on with",
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="PLACE", help="folder; default: NAME in RAY_SUBNETS_RUNS, or in runs"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete what is in the folder first")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="check everything, print how much it is, start nothing")
    ] = False,
    serial: Serial = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Every method under one budget: one table of quality, calibration, shift and cost.

    Settings are chosen on validation data, for every method from the same grid; then each method
    is trained with every seed, and test data are looked at once. A method that sees more training
    images than the budget allows is an error, a cell that fails is a line in the table.

    Example: ray-subnets benchmark benchmark_digits; stopped, it goes on with
    ray-subnets benchmark runs/benchmark_digits
    """
    from ray_subnets.benchmark import benchmarkfile
    from ray_subnets.benchmark import run as benchmark_
    from ray_subnets.checkpoints import CONFIG, RunFolder
    from ray_subnets.storage import join

    sys.path.insert(0, str(Path.cwd()))  # the user's own model and data modules
    known = RunFolder(config)
    if ("://" in config or Path(config).is_dir()) and known.exists(CONFIG):
        if overrides or folder or overwrite:
            raise ValueError(
                "CONFIG: a benchmark goes on as it was begun; leave settings, --out and "
                "--overwrite out"
            )
        settings = benchmarkfile.parse(known.read(CONFIG).decode(), known.path(CONFIG))
        data = benchmark_.prepare(settings)
        target = known
    else:
        settings = benchmarkfile.load(config, overrides or [])
        where = folder or join(os.environ.get("RAY_SUBNETS_RUNS", "runs"), settings.name)
        if not plan:
            RunFolder.check_free(where, overwrite=overwrite, wanted="benchmark")
        data = benchmark_.prepare(settings)
        if not plan:
            target = RunFolder.create(where, overwrite=overwrite, wanted="benchmark")
    count = benchmarkfile.total(settings)
    if plan:
        out.print(
            f"{count.cells} cells, {count.epochs:,} epochs in all: {len(settings.tasks)} data "
            f"sets, {len(settings.rows)} methods, {len(settings.columns)} training settings, "
            f"{len(settings.seeds)} seeds",
            highlight=False,
        )
        return
    _do(settings, data, target, serial, address, quiet)


def _do(
    settings: Benchmark,
    data: dict[str, Data],
    folder: RunFolder,
    serial: bool,
    address: str | None,
    quiet: bool,
) -> None:
    from ray_subnets import checks, progress
    from ray_subnets.benchmark import report as benchmarkreport
    from ray_subnets.benchmark import run as benchmark_
    from ray_subnets.benchmark.table import terminal, verdict

    with (
        progress.view(benchmark_.expected(settings), err, quiet=quiet) as view,
        ExitStack() as stack,
    ):
        pools: MakePool
        if serial:
            pools = _serial
        else:
            from ray_subnets.distributed import benchmarks, cluster

            stack.enter_context(cluster.session(address))
            pools = benchmarks.pools(
                settings.resources,
                growing=address not in (None, "local"),
                notify=view.note,
                watch=view.status,
            )
        stack.enter_context(folder.alone())
        for name, one in data.items():
            checks.same_data(one, folder, name)
        try:
            record = benchmark_.run(settings, data, folder, pools, listen=view)
        except KeyboardInterrupt:
            err.print(
                f"Stopped. What was computed is kept: ray-subnets benchmark {quote(str(folder))}",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    for table in terminal(record):
        out.print(table)
    for line in verdict(record):
        out.print(line, highlight=False, markup=False)
    out.print(f"Page: {benchmarkreport.write(folder, record)}", soft_wrap=True)


@contextmanager
def _serial(task: Task, data: Data, jobs: int) -> Iterator[Pool]:
    """All cells in this process."""
    import torch

    from ray_subnets.benchmark.cells import CellWorker
    from ray_subnets.pools import SerialPool

    device: Any = "cuda:0" if torch.cuda.is_available() else "cpu"
    yield SerialPool(CellWorker(task, data, device))
