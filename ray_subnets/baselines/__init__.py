"""Every method of the benchmark beside our own three, one readable file each."""

from __future__ import annotations

from ray_subnets.baselines.batch_ensemble import BatchEnsemble
from ray_subnets.baselines.dropout import Dropout, MCDropout
from ray_subnets.baselines.free_tickets import DST, EDST
from ray_subnets.baselines.independent import Bagging, Dense, Independent
from ray_subnets.baselines.method import Bench, Method, Trained
from ray_subnets.baselines.mimo import MIMO
from ray_subnets.baselines.mother_nets import MotherNets
from ray_subnets.baselines.prune import Prune
from ray_subnets.baselines.trajectory import SWA, FastGeometric, Snapshot
from ray_subnets.baselines.tree_net import TreeNet

__all__ = ["METHODS", "Bench", "Method", "Trained"]

METHODS: dict[str, type[Method]] = {
    "independent": Independent,
    "dense": Dense,
    "bagging": Bagging,
    "dropout": Dropout,
    "mc_dropout": MCDropout,
    "snapshot": Snapshot,
    "fge": FastGeometric,
    "swa": SWA,
    "batch_ensemble": BatchEnsemble,
    "mimo": MIMO,
    "tree_net": TreeNet,
    "dst": DST,
    "edst": EDST,
    "prune": Prune,
    "mother_nets": MotherNets,
}
