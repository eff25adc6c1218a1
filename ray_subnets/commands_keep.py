"""`ray-subnets export` and `distill`: what becomes of an ensemble that is kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ray_subnets.options import RunArgument

out = Console()


def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FILE", help="x.pt2 (torch.export) or x.onnx; replaced if it is there"
        ),
    ],
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="scale answers by the fitted temperature")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="TYPE",
            help="what the file takes: uint8 images or float32 network inputs; default: what the "
            "networks were trained on",
        ),
    ] = None,
) -> None:
    """Write the ensemble as one file that runs without this package, and check that it is equal.

    It takes a batch of any size and gives probabilities.

    Example: ray-subnets export runs/quickstart --to quickstart.onnx
    """
    import torch

    from ray_subnets import members

    types = {"uint8": torch.uint8, "float32": torch.float32}
    if dtype is not None and dtype not in types:
        raise ValueError(f"--input: must be uint8 or float32, not {dtype}")
    sys.path.insert(0, str(Path.cwd()))  # the user's own model
    ensemble = members.load(run, calibrated=calibrated)
    written = ensemble.export(to, dtype=types[dtype] if dtype else None)
    out.print(written.sentence(), highlight=False, soft_wrap=True)
