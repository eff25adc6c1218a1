"""`ray-subnets report`."""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_subnets.commands import policy as commands_policy
from ray_subnets.commands.options import RunArgument

out = Console()
err = Console(stderr=True)


def report(
    run: RunArgument,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="with everything of analysis/: diversity, clusters, saliency, features, hashes, "
            "landscapes or boundaries; minutes",
        ),
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="with --full: spread the landscapes over Ray: local, auto, HOST:PORT; default: "
            "all in this process",
        ),
    ] = None,
) -> None:
    """Write report.html of a finished run again and say where it is."""
    from ray_subnets import report as report_
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.rl import policy_report

    if address and not full:
        raise ValueError("--address: only the analyses of --full can be spread; add --full")
    folder = RunFolder.open(run, needs="result.json")
    policy = commands_policy.owns(folder)
    if policy and full:
        raise ValueError("--full: analyses are of classifiers; this run is a policy's")
    if not full:
        page = (policy_report if policy else report_).write(folder)
        out.print(str(page), soft_wrap=True)
        return
    try:  # the analyses stand above this package, which does without them
        write = importlib.import_module("analysis.full").write
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--full: {error.name} is not installed; pip install 'ray_subnets[analysis]'"
        ) from None
    sys.path.append(str(Path.cwd()))
    how: dict[str, Any] = {}
    with ExitStack() as stack:
        if address:
            from ray_subnets.distributed import cluster, spreading

            err.print("starting or joining Ray", style="dim")
            stack.enter_context(cluster.session(address))
            how["mapper"] = spreading.spread
        page = write(run, say=lambda line: err.print(line, style="dim", highlight=False), **how)
    out.print(page, soft_wrap=True)
