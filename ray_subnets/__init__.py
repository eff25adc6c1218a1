"""Subnetwork ensembles: one trained parent in, one calibrated ensemble out.

    import ray_subnets as rs
    ensemble = rs.ensemble(model, (x, y), (x_val, y_val), method=rs.Noisy(sigma=0.02), children=8)
    ensemble = rs.load("runs/quickstart")      # an nn.Module
    probabilities = ensemble(images)           # (N, C)

Names are imported on first use, so that `import ray_subnets` is quick and never imports Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_subnets.api import ensemble as ensemble
    from ray_subnets.cascade import Cascade as Cascade
    from ray_subnets.cascade import load_cascade as load_cascade
    from ray_subnets.data import Data as Data
    from ray_subnets.data import Preprocess as Preprocess
    from ray_subnets.data import Split as Split
    from ray_subnets.distilling import distill as distill
    from ray_subnets.ensembles import Ensemble as Ensemble
    from ray_subnets.members import load as load
    from ray_subnets.methods import Noisy as Noisy
    from ray_subnets.methods import OneCycle as OneCycle
    from ray_subnets.methods import Sparse as Sparse
    from ray_subnets.methods import Stochastic as Stochastic
    from ray_subnets.recipes import ChildResult as ChildResult
    from ray_subnets.recipes import ChildSpec as ChildSpec
    from ray_subnets.recipes import Training as Training
    from ray_subnets.regressor import Regressor as Regressor
    from ray_subnets.rl.policy_members import load_policy as load_policy
    from ray_subnets.spawning import spawn as spawn
    from ray_subnets.trust_region import solve_sigma as solve_sigma

__version__ = "0.2.0"

_HOME = {
    "Cascade": "cascade",
    "ChildResult": "recipes",
    "ChildSpec": "recipes",
    "Data": "data",
    "Ensemble": "ensembles",
    "Noisy": "methods",
    "OneCycle": "methods",
    "Preprocess": "data",
    "Regressor": "regressor",
    "Sparse": "methods",
    "Split": "data",
    "Stochastic": "methods",
    "Training": "recipes",
    "distill": "distilling",
    "ensemble": "api",
    "load": "members",
    "load_cascade": "cascade",
    "load_policy": "rl.policy_members",
    "solve_sigma": "trust_region",
    "spawn": "spawning",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ray_subnets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ray_subnets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
