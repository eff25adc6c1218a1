"""`ray-subnets serve`."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ray_subnets.blueprint import Blueprint
    from ray_subnets.cascade import Cascade
    from ray_subnets.distributed.serving import What
    from ray_subnets.ensembles import Ensemble
    from ray_subnets.serving.requested import Terms

out = Console()
err = Console(stderr=True)


def serve(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="a run folder, or what Ensemble.save or Cascade.save wrote"
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free")
    ] = 8000,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="to listen at; there is no password"),
    ] = "127.0.0.1",
    replicas: Annotated[
        int, typer.Option("--replicas", metavar="N", min=1, help="processes that answer")
    ] = 1,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="of each replica, on a CPU")
    ] = 1,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="ask no more members than needed (Cascade.save)")
    ] = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="scale answers by the fitted temperature")
    ] = False,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="make members when asked: little memory, slower")
    ] = False,
    max_batch: Annotated[
        int, typer.Option("--max-batch", metavar="N", min=1, help="samples of a forward pass")
    ] = 64,
    batch_wait: Annotated[
        float,
        typer.Option("--batch-wait", metavar="MS", min=0, help="that a batch waits for more"),
    ] = 0.0,
    max_samples: Annotated[
        int, typer.Option("--max-samples", metavar="N", min=1, help="of one request")
    ] = 1000,
    max_megabytes: Annotated[
        float, typer.Option("--max-mb", metavar="MB", min=0.001, help="of one request")
    ] = 16.0,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="for an answer")
    ] = 60.0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="how the network is built (package.module:build, torchvision/NAME), where the "
            "folder does not say it",
        ),
    ] = None,
) -> None:
    """Answer over HTTP on this machine, by Ray Serve, until Ctrl-C.

    POST /predict takes {"inputs": [...]} or {"images": [...]}, or a .npy file, and returns class,
    probabilities, entropy, mutual information and disagreement; GET /health, GET /info.

    Example: ray-subnets serve runs/quickstart --replicas 2
    """
    for module in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise ValueError("serve: needs the extra serve: pip install 'ray_subnets[serve]'")
    import uvicorn

    from ray_subnets.distributed import cluster, serving
    from ray_subnets.serving.webapp import App

    sys.path.insert(0, str(Path.cwd()))  # the user's own model
    place = run if "://" in run else str(Path(run).absolute())
    blueprint = _blueprint(place, model)
    what = serving.What(place, cascade, calibrated, on_demand, blueprint, str(Path.cwd()))
    terms, about = _examined(what, max_samples, round(max_megabytes * 1e6))
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        door = stack.enter_context(closing(_listening(host, port)))
        err.print("starting Ray", style="dim")
        cpus = max(os.cpu_count() or 1, replicas * threads)
        stack.enter_context(cluster.session("local", cpus=cpus))
        running = stack.enter_context(
            serving.service(
                what, replicas=replicas, batch=max_batch, wait=batch_wait / 1000, threads=threads
            )
        )
        app = App(
            running.ask,
            terms,
            info=lambda: about,
            healthy=running.running,
            seconds=timeout,
            local=_loopback(host),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        place = f"[{host}]" if ":" in host else host
        out.print(f"Serving: http://{place}:{door.getsockname()[1]}", highlight=False)
        if not _loopback(host):
            err.print("Anyone who reaches this address can ask.", style="yellow")
        server.run(sockets=[door])
    out.print("Stopped.")


def _blueprint(run: str, model: str | None) -> Blueprint | None:
    """The network that `--model` names."""
    if model is None:
        return None
    from ray_subnets import members, models
    from ray_subnets.blueprint import Blueprint

    record = members.record_of(run)
    try:
        made = models.build(
            *(model, record.input_shape, record.num_classes, {}), seed=0, input_dtype=record.dtype
        )
        return Blueprint.of(made)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _examined(what: What, max_samples: int, max_bytes: int) -> tuple[Terms, dict[str, Any]]:
    """What may be sent, and what /info says; loads the ensemble once, so that mistakes are told
    before anything is started.
    """
    from ray_subnets import __version__, members
    from ray_subnets.cascade import CASCADE, Cascade
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.regression import classifiers_only
    from ray_subnets.serving.requested import Terms

    record = members.record_of(what.run)
    classifiers_only(record.head, "serve")
    if what.cascade and not RunFolder(what.run).exists(CASCADE):
        raise ValueError(
            f"--cascade: {what.run} has no {CASCADE}; write one with "
            "Cascade.fit(ensemble, x, y).save(FOLDER)"
        )
    loaded: Ensemble | Cascade = what.load()
    ensemble = loaded.ensemble if isinstance(loaded, Cascade) else loaded
    terms = Terms(
        *(record.input_shape, bool(record.mean), max_bytes, max_samples),
        whole=not record.dtype.is_floating_point,
    )
    return terms, {
        "name": what.run.rstrip("/").rpartition("/")[2],
        "input_shape": list(record.input_shape),
        "classes": record.num_classes,
        "members": list(ensemble.ids),
        "combine": ensemble.combine,
        "calibrated": what.calibrated,
        "cascade": loaded.threshold if isinstance(loaded, Cascade) else None,
        "accepts": list(terms.keys),
        "max_bytes": max_bytes,
        "max_samples": max_samples,
        "version": __version__,
    }


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """A socket of ours, before anything is started: the port may be taken."""
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
    except OSError as error:
        door.close()
        reason = error.strerror or str(error)
        raise ValueError(f"--port: {host}:{port} cannot be used ({reason}); name another") from None
    return door
