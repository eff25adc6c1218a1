"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_subnets.memory import keep_freed


def on_head() -> bool:
    """Is this machine the head of a cluster that `ray up` made? Its own file lies there then."""
    return (Path.home() / "ray_bootstrap_config.yaml").is_file()


def address_or_head(given: str | None) -> str | None:
    """Beside the Ray that a head has already, a second one would be a mistake."""
    return given or ("auto" if on_head() else None)


def in_this_process(serial: bool) -> bool:
    """It trains then, as actors do."""
    if serial:
        keep_freed()
    return serial


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings to change: parent.epochs=8"),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="a run folder: runs/NAME, s3://BUCKET/NAME")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]
Serial = Annotated[
    bool,
    typer.Option(
        "--serial",
        callback=in_this_process,
        help="no Ray: everything in this process, same numbers",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        envvar="RAY_ADDRESS",
        callback=address_or_head,
        help="Ray cluster to join (auto, HOST:PORT, ray://HOST:10001), or local to start Ray here; "
        "default: local, but auto on the head of a cluster made by ray up",
    ),
]
