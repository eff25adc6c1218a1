"""Ray metrics, for Prometheus: what each child does and how fit it is.

Ray's agent on every node exports them where its package `ray[default]` is installed, with the
prefix `ray_`; without it they go nowhere and cost nothing.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Status

_TAGS = ("run", "network")
NAMES = {
    "ray_subnets_epoch": "epochs done",
    "ray_subnets_loss": "mean training loss of the last epoch, nats",
    "ray_subnets_fitness": "fitness on validation data of a finished child; larger is better",
    "ray_subnets_nodes": "nodes that are alive, as the driver sees them",
    "ray_subnets_actors": "child actors that are ready",
    "ray_subnets_running": "networks being trained",
    "ray_subnets_done": "networks that are done",
    "ray_subnets_failed": "networks that could not be made",
    "ray_subnets_retried": "times that a network was given to another actor",
}


class Instruments:
    """Gauges of one process: an actor's reports, or the driver's view of the whole run.

    Args:
        run: name of the run folder; the tag that tells runs apart.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._images = Counter("ray_subnets_images", "training images seen", tag_keys=("run",))

    def _set(self, name: str, value: float, network: str | None = None) -> None:
        if name not in self._gauges:
            keys = ("run",) if network is None else _TAGS
            self._gauges[name] = Gauge(name, NAMES[name], tag_keys=keys)
        tags = {"run": self._run} | ({} if network is None else {"network": network})
        self._gauges[name].set(value, tags)

    def report(self, report: Report) -> None:
        """What an actor says of its job."""
        if isinstance(report, Epoch):
            self._set("ray_subnets_epoch", report.epoch, report.id)
            self._set("ray_subnets_loss", report.loss, report.id)
            self._images.inc(report.images, {"run": self._run})
            return
        fitness = getattr(report, "fitness", None)
        if fitness is not None:
            self._set("ray_subnets_fitness", fitness, report.id)

    def status(self, status: Status, done: int, failed: int) -> None:
        """What the driver sees."""
        for name in ("nodes", "actors", "running", "retried"):
            self._set(f"ray_subnets_{name}", getattr(status, name))
        self._set("ray_subnets_done", done)
        self._set("ray_subnets_failed", failed)
