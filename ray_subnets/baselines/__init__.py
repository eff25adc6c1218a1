"""Every method of the benchmark beside our own three, one readable file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ray_subnets.baselines.batch_ensemble import BatchEnsemble
from ray_subnets.baselines.dropout import Dropout, MCDropout
from ray_subnets.baselines.free_tickets import DST, EDST
from ray_subnets.baselines.independent import Bagging, Dense, Independent
from ray_subnets.baselines.method import Bench, Method, Trained
from ray_subnets.baselines.mimo import MIMO
from ray_subnets.baselines.mother_nets import MotherNets
from ray_subnets.baselines.prune import Prune
from ray_subnets.baselines.swag import SWAG
from ray_subnets.baselines.trajectory import SWA, FastGeometric, Snapshot
from ray_subnets.baselines.tree_net import TreeNet

__all__ = ["METHODS", "Bench", "Method", "Trained", "parse"]

METHODS: dict[str, type[Method]] = {
    "independent": Independent,
    "dense": Dense,
    "bagging": Bagging,
    "dropout": Dropout,
    "mc_dropout": MCDropout,
    "snapshot": Snapshot,
    "fge": FastGeometric,
    "swa": SWA,
    "swag": SWAG,
    "batch_ensemble": BatchEnsemble,
    "mimo": MIMO,
    "tree_net": TreeNet,
    "dst": DST,
    "edst": EDST,
    "prune": Prune,
    "mother_nets": MotherNets,
}


def parse(options: Mapping[str, Any], source: str) -> Method:
    """A method by its name, under `method`, and its options.

    Raises:
        ValueError: unknown name or option, or a value out of range; one line.
    """
    name = options.get("method")
    if name not in METHODS:
        raise ValueError(f"{source}: method: unknown method {name!r}; known: {', '.join(METHODS)}")
    try:
        return TypeAdapter(METHODS[name]).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{source}: {name}: {key}: {first['msg']}") from None
