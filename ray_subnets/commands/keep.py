"""`ray-subnets export` and `distill`: what becomes of an ensemble that is kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ray_subnets.commands.options import Quiet, RunArgument

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
            help="what the file takes: uint8 images, or network inputs, float32 or int64 as they "
            "are; default: what the networks were trained on",
        ),
    ] = None,
) -> None:
    """Write the ensemble as one file that runs without this package, and check that it is equal.

    It takes a batch of any size and gives probabilities.

    Example: ray-subnets export runs/quickstart --to quickstart.onnx
    """
    import torch

    from ray_subnets import members

    types = {"uint8": torch.uint8, "float32": torch.float32, "int64": torch.int64}
    if dtype is not None and dtype not in types:
        raise ValueError(f"--input: must be uint8, float32 or int64, not {dtype}")
    sys.path.insert(0, str(Path.cwd()))  # the user's own model
    ensemble = members.load(run, calibrated=calibrated)
    written = ensemble.export(to, dtype=types[dtype] if dtype else None)
    out.print(written.sentence(), highlight=False, soft_wrap=True)


def distill(
    run: RunArgument,
    folder: Annotated[
        str, typer.Option("--out", metavar="PLACE", help="new folder for the one network")
    ],
    student: Annotated[
        str | None,
        typer.Option(
            metavar="ID|NAME",
            help="a member's id or parent: begin as that, and keep what is pruned there; or a "
            "network by name: begin anew; default: the best member on validation data",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 10,
    lr: Annotated[float, typer.Option(help="peak of the one-cycle learning rate")] = 0.05,
    temperature: Annotated[float, typer.Option(help="of teacher and student in the loss")] = 2.0,
    weight: Annotated[
        float, typer.Option(help="of the ensemble's answers in the loss; the labels' is the rest")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="of batches, augmentation and new weights")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train one network of a child's size on the run's ensemble: an answer costs one pass.

    On the run's own data, in this process, on a GPU if there is one. The result is loaded,
    exported and served like an ensemble.

    Example: ray-subnets distill runs/quickstart --out runs/quickstart-distilled
    """
    import torch

    from ray_subnets import distilling, driver, members
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.methods import OneCycle
    from ray_subnets.sweeps.trials import device_here

    source = RunFolder.open(run, needs="result.json")
    try:
        RunFolder.check_free(folder)
    except ValueError as error:
        raise ValueError(f"{str(error).split('; choose')[0]}; name a new folder") from None
    sys.path.insert(0, str(Path.cwd()))  # the user's own model and data modules
    config = driver.config_of(source)
    torch.set_num_threads(config.resources.threads)
    data = driver.load_data(config)
    made = distilling.distilled(
        members.load(run, device_here(config)),
        data,
        student=student,
        tune=OneCycle(epochs=epochs, lr=lr),
        temperature=temperature,
        weight=weight,
        seed=seed,
        show=not quiet,
    )
    made.save(folder)
    assert made.record is not None
    for line in distilling.lines(made.record):
        out.print(line, highlight=False)
    out.print(f"Network: ray_subnets.load({folder!r})", soft_wrap=True)
