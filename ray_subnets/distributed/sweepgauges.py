"""Ray metrics of a sweep, for Prometheus; see `instruments`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from ray_subnets.sweeps.sweep import averaged

STATUSES = ("waiting", "running", "done", "stopped", "failed")
TRIALS = "ray_subnets_sweep_trials"
OF_A_TRIAL = {
    "kl": ("ray_subnets_sweep_kl", "mean KL of a trial's children from their parent, nats"),
    "ensemble_accuracy": (
        "ray_subnets_sweep_ensemble_accuracy",
        "validation accuracy of a trial's ensemble",
    ),
    "ensemble_nll": (
        "ray_subnets_sweep_ensemble_nll",
        "validation NLL of a trial's ensemble, nats",
    ),
}
NAMES = (TRIALS, *(name for name, _ in OF_A_TRIAL.values()))


class SweepGauges:
    """How many trials are where, and the numbers of those that have any.

    Args:
        sweep: name of the sweep's folder; the tag that tells sweeps apart.
    """

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep
        self._trials = Gauge(TRIALS, "trials by status", tag_keys=("sweep", "status"))
        self._numbers = {
            key: Gauge(name, what, tag_keys=("sweep", "trial"))
            for key, (name, what) in OF_A_TRIAL.items()
        }
        self._shown: dict[str, int] = {}

    def update(self, cells: Mapping[str, Mapping[str, Any]]) -> None:
        """From the monitor's cells."""
        counts = dict.fromkeys(STATUSES, 0)
        for id, cell in cells.items():
            counts[cell["status"]] += 1
            if self._shown.get(id, 0) < len(cell["seeds"]):
                self._shown[id] = len(cell["seeds"])
                means, _ = averaged(cell["seeds"])
                for key, gauge in self._numbers.items():
                    gauge.set(means[key], {"sweep": self._sweep, "trial": id})
        for status, count in counts.items():
            self._trials.set(count, {"sweep": self._sweep, "status": status})
