"""Replicas of an ensemble on Ray Serve, and the web server in front of them.

HTTP is taken in this process, by uvicorn, and not by a Serve proxy: a wrong or huge request then
never reaches a replica, and a request whose replica dies is asked again elsewhere, which is safe
since answering changes nothing. Ray Serve does the rest: replicas and their health, one that dies
is replaced, requests are shared out and joined into batches.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private import replica as serve_replica
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.schema import LoggingConfig

from ray_subnets import members, metrics
from ray_subnets.blueprint import Blueprint
from ray_subnets.cascade import Cascade, load_cascade
from ray_subnets.distributed import devices
from ray_subnets.ensembles import Ensemble
from ray_subnets.serving.requested import Array, Refused
from ray_subnets.serving.webapp import Busy

APP = "ray-subnets"
_TRIES = 5  # of a request whose replica dies each time
_REFUSED = "refused"  # in place of an answer: why there is none
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


@dataclass(frozen=True)
class What:
    """What every replica loads."""

    run: str
    cascade: bool = False
    calibrated: bool = False
    on_demand: bool = False
    model: Blueprint | None = None
    """for an ensemble of a network that is not built by name"""
    import_from: str = ""
    """folder of the user's own modules"""

    def load(self, device: str = "cpu") -> Ensemble | Cascade:
        """It.

        Raises:
            ValueError: see `members.load` and `cascade.load_cascade`.
        """
        if self.import_from and self.import_from not in sys.path:
            sys.path.insert(0, self.import_from)
        read = load_cascade if self.cascade else members.load
        how: dict[str, Any] = {"on_demand": self.on_demand, "calibrated": self.calibrated}
        return read(self.run, device, model=self.model, **how)


def predict(what: Ensemble | Cascade, samples: torch.Tensor, batch: int) -> dict[str, Array]:
    """Answers for samples `(N, *shape)`: arrays of N rows by name.

    Of an ensemble: probabilities, class, entropy and mutual information in nats, disagreement; of a
    cascade, which does not ask all members: how many it asked in place of the last two.
    """
    if isinstance(what, Cascade):
        p, asked = what.predict(samples, batch)
        p = p.double()
        more = {"asked": asked}
    else:
        said = what.predict(samples, batch)
        p = said.probabilities
        more = {"mutual_information": said.mutual_information, "disagreement": said.disagreement}
    found = {"class": p.argmax(1), "probabilities": p, "entropy": metrics.entropy(p), **more}
    return {name: value.numpy() for name, value in found.items()}


def _samples(requests: list[Array]) -> int:
    return sum(len(request) for request in requests)


def _loopback() -> None:
    """Where Ray is on this machine only, so is the port on which replicas answer each other.

    Serve opens it on all addresses, when the replica's own `__init__` is done, and what is sent
    there is unpickled.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    module: Any = serve_replica
    opened = module.add_port_to_grpc_server

    def here(server: Any, address: str) -> Any:
        return opened(server, address.replace("[::]", "127.0.0.1"))

    module.add_port_to_grpc_server = here


class Replica:
    """One copy of the ensemble, in a process of its own.

    Args:
        batch: samples of one forward pass, at most.
        wait: seconds that the first request of a batch waits for others. While a batch is
            computed the next one gathers in any case.
        threads: of torch, on a CPU.
        gpus: share of a GPU, 0 for none.
    """

    def __init__(self, what: What, batch: int, wait: float, threads: int, gpus: float) -> None:
        _loopback()
        torch.set_num_threads(threads)
        self._device = devices.granted(gpus)
        self._batch, self._what = batch, what.load(self._device)
        self._preprocess = self._ensemble.preprocess
        self._together.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self._together.set_batch_wait_timeout_s(wait)  # type: ignore[attr-defined]

    @property
    def _ensemble(self) -> Ensemble:
        return self._what.ensemble if isinstance(self._what, Cascade) else self._what

    async def ask(self, samples: Array) -> dict[str, Array]:
        """`predict`, together with the requests of others."""
        return await self._together(samples)

    @serve.batch(batch_size_fn=_samples)
    async def _together(self, requests: list[Array]) -> list[dict[str, Array]]:
        # In a thread: this process also has to say that it is well.
        return await asyncio.to_thread(self._answered, requests)

    def _answered(self, requests: list[Array]) -> list[dict[str, Array]]:
        inputs = [self._preprocess(torch.from_numpy(np.array(one))) for one in requests]
        try:
            answer = predict(self._what, torch.cat(inputs), self._batch)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            if len(requests) > 1:  # one of them is to blame, and the others are not
                return [self._answered([one])[0] for one in requests]
            return [{_REFUSED: np.array([str(error).partition("\n")[0][:200]])}]
        ends = np.cumsum([len(one) for one in requests])[:-1]
        parts = {name: np.split(value, ends) for name, value in answer.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(requests))]


@dataclass
class Service:
    """Replicas that run; made by `service`."""

    handle: Any
    batch: int

    async def ask(self, samples: Array) -> Mapping[str, Array]:
        """Answers for any number of samples, of as many replicas as there are.

        Raises:
            Busy: none can answer now.
            Refused: the networks do not take these samples.
        """
        parts = [samples[i : i + self.batch] for i in range(0, len(samples), self.batch)]
        answers = await asyncio.gather(*(self._ask(part) for part in parts))
        for one in answers:
            if _REFUSED in one:
                raise Refused(422, f"inputs: the networks do not take them: {one[_REFUSED][0]}")
        return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}

    async def _ask(self, part: Array) -> dict[str, Array]:
        for attempt in range(_TRIES):
            try:
                return await self.handle.ask.remote(part)
            except BackPressureError:
                raise Busy("too many requests are waiting") from None
            except RayTaskError:  # a mistake of ours: it would be one elsewhere too
                raise
            except (RayActorError, ReplicaUnavailableError):
                await asyncio.sleep(0.05 * 2**attempt)
            except DeploymentUnavailableError:
                break
        raise Busy("replicas fail to start or die")

    async def running(self) -> int:
        """How many replicas can answer."""
        return await asyncio.to_thread(self._running)

    def _running(self) -> int:
        deployments = serve.status().applications[APP].deployments.values()
        states = (state for one in deployments for state in one.replica_states.items())
        return sum(count for state, count in states if state == "RUNNING")


@contextmanager
def service(
    what: What,
    *,
    replicas: int = 1,
    batch: int = 64,
    wait: float = 0.0,
    threads: int = 1,
    gpus: float | None = None,
    waiting: int = 1000,
) -> Iterator[Service]:
    """Replicas for the length of a `with` block, on the Ray that this process is connected to.

    Args:
        batch, wait, threads: see `Replica`.
        gpus: of each replica; default: all are shared evenly, at most one each.
        waiting: requests that may wait beyond those that replicas have taken; more are refused.

    Raises:
        ValueError: replicas do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if gpus is None:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / replicas)
    deployment: Any = serve.deployment(
        Replica,
        name="ensemble",
        num_replicas=replicas,
        # As many as fill the next batch while one is computed, whatever their size.
        max_ongoing_requests=2 * batch,
        max_queued_requests=waiting,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        logging_config=_QUIET,
    )
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    try:
        bound = deployment.bind(what, batch, wait, threads, gpus)
        try:
            handle = serve.run(bound, name=APP, route_prefix=None, logging_config=_QUIET)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(f"RUN: no replica of {what.run} started: {reason}") from None
        yield Service(handle, batch)
    finally:
        serve.delete(APP)  # `serve.shutdown` kills its controller, of which Ray then complains
