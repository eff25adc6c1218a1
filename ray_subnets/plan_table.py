"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from rich.filesize import decimal
from rich.table import Table

from ray_subnets.plan import Plan, Work


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def table(plan: Plan, free: int | None = None) -> Table:
    """Two columns: what, and how much.

    Args:
        free: bytes left where the run folder will lie; None if nobody knows.
    """
    result = Table(title=f"{plan.name}: the plan", title_justify="left", title_style="bold")
    result.show_header, result.box = False, None
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for what, says in _rows(plan, free):
        result.add_row(what, says)
    return result


def _rows(plan: Plan, free: int | None) -> list[tuple[str, str]]:
    children = sum(1 for work in plan.jobs if work.group not in ("parent", "single"))
    singles = [work for work in plan.jobs if work.group == "single"]
    weights = sum(work.weights for work in plan.jobs)
    networks, epochs = "parent", f"{plan.epochs} of parent and children"
    if singles:
        networks += f", {_counted(len(singles), 'single model')}"
        epochs += f", {sum(work.epochs for work in singles)} of single models"
    networks += f", {children} child" + ("" if children == 1 else "ren")
    nodes = _counted(len(plan.nodes), "node")
    cpus, gpus = sum(n.cpus for n in plan.nodes), sum(n.gpus for n in plan.nodes)
    actors = "none"
    if plan.actors:
        own = f"{plan.cpus:g} CPU" + (f" and {plan.gpus:g} GPU" if plan.gpus else "")
        held = Counter(plan.actors_on).items()
        where = ", ".join(f"{count} on {_counted(n, 'node')}" for count, n in held)
        actors = f"{plan.actors}, {own} each; {where}"
    clock = (
        f"{plan.span:g} epochs; no order takes less than {plan.bound:g}; "
        f"{min(plan.epochs_on):g} to {max(plan.epochs_on):g} on an actor"
    )
    travels = (
        f"{decimal(plan.parent_bytes)} of parent, {decimal(plan.data_bytes)} of data; "
        f"{decimal(plan.recipe_bytes)} of recipes in all"
    )
    disk = f"{decimal(plan.kept_bytes)} and up to {decimal(plan.checkpoint_bytes)} of checkpoints"
    if free is not None:
        disk += f"; {decimal(free)} are free"
    parts = (
        f"weights {decimal(weights)}, outputs {decimal(plan.output_bytes)}; records and events "
        "beside them are small"
    )
    flops = (
        f"{_flops(plan.flops)} for parent and children if zeros are free, "
        f"{_flops(plan.flops_dense)} dense"
    )
    return [
        ("networks", networks),
        ("devices", f"{nodes}: {cpus:g} CPUs, {gpus:g} GPUs"),
        ("actors", actors),
        ("epochs", epochs),
        ("by the clock", clock),
        ("order of work", _order(plan.jobs)),
        ("computing", flops),
        ("to each node", travels),
        ("on disk", disk),
        ("  of it", parts),
        ("written in all", f"{decimal(plan.written_bytes)}, a checkpoint after each epoch"),
    ]


def _order(jobs: tuple[Work, ...]) -> str:
    """Runs of alike jobs, in the order in which they are begun."""
    parts = []
    for (group, epochs), some in groupby(jobs, key=lambda work: (work.group, work.epochs)):
        n = len(list(some))
        parts.append(f"{group} ({f'{n} x ' if n > 1 else ''}{epochs})")
    shown = parts if len(parts) <= 12 else [*parts[:11], f"and {len(parts) - 11} more"]
    return ", ".join(shown)
