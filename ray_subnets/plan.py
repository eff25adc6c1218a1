"""What a run will do and take, computed from its settings before anything starts.

The sizes are those of networks really spawned from the untrained parent, one for each distinct
recipe, so they hold for every kind of child; only masks drawn weight by weight differ by chance.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
from torch import Tensor, nn

from ray_subnets import acting, driver
from ray_subnets.config import Config
from ray_subnets.data import Data
from ray_subnets.flat import flat_bytes
from ray_subnets.flops import Cost, training_flops
from ray_subnets.items import Items
from ray_subnets.placement import Node, missing, places, share, spread
from ray_subnets.recipes import ChildSpec, Fit, Solve, Training
from ray_subnets.spawning import (
    METHODS,
    Subnetwork,
    anatomy,
    anneals,
    subnetwork,
    without_removed,
)
from ray_subnets.stored import kept_fractions, pack_child
from ray_subnets.streaming import ImageFiles

_ARRAY = 330  # bytes that an .npz file takes for each array beside its values


@dataclass(frozen=True)
class Work:
    """One job: how much training it is and what it leaves behind."""

    id: str
    group: str
    """`parent`, `single`, or a group of children"""
    epochs: int
    images: int
    """training images seen"""
    flops: float
    """of training, if zeros cost nothing"""
    flops_dense: float
    weights: int
    """bytes of its weights in the run folder"""
    checkpoint: int
    """bytes of its state after an epoch; 0 if it is never written"""


@dataclass(frozen=True)
class Plan:
    """What a run will do and take."""

    name: str
    jobs: tuple[Work, ...]
    """in the order in which they are begun"""
    nodes: tuple[Node, ...]
    actors: int
    actors_on: tuple[int, ...]
    """by node; empty if actors do not fit"""
    cpus: float
    gpus: float
    """of one actor"""
    missing: str
    """why no actor can start; empty if one can"""
    epochs_on: tuple[float, ...]
    """by actor: epochs of all training images"""
    span: float
    """epochs from the start to the end of the last job"""
    bound: float
    """epochs below which no order of work could bring `span`"""
    parent_bytes: int
    """of the parent as it is sent to each node"""
    data_bytes: int
    """of the data set as it is sent to each node"""
    recipe_bytes: int
    """of all recipes together"""
    output_bytes: int
    """of all logits and labels"""
    hints: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """Of the parent and the children: what the ensemble costs."""
        return sum(work.epochs for work in self.jobs if work.group != "single")

    @property
    def flops(self) -> float:
        """Of training parent and children, if zeros cost nothing."""
        return sum(work.flops for work in self.jobs if work.group != "single")

    @property
    def flops_dense(self) -> float:
        """What the devices do, since masked weights save no time."""
        return sum(work.flops_dense for work in self.jobs if work.group != "single")

    @property
    def kept_bytes(self) -> int:
        """Weights and logits of a finished run."""
        return sum(work.weights for work in self.jobs) + self.output_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """The most that unfinished jobs can hold at one time."""
        largest = sorted((work.checkpoint for work in self.jobs), reverse=True)
        return sum(largest[: max(1, self.actors)])

    @property
    def written_bytes(self) -> int:
        """All that is written in the course of the run, with each epoch's checkpoint."""
        again = sum(work.checkpoint * max(0, work.epochs - 1) for work in self.jobs)
        return self.kept_bytes + again


def plan(
    config: Config,
    data: Data,
    cost: Cost,
    nodes: Sequence[Node],
    *,
    serial: bool = False,
) -> Plan:
    """The plan of a run that has not begun.

    Args:
        cost: of the run's network.
        nodes: machines that there are; with `serial`, the one that this process runs on.

    Raises:
        ValueError: the network does not fit data or recipes.
    """
    model = driver.build(config, data)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    jobs = _in_order(_works(config, data, cost))
    cpus, gpus = share(config.resources, nodes)
    room = tuple(places(node, cpus, gpus) for node in nodes)
    why = "" if any(room) or serial else missing(cpus, gpus, nodes)
    if serial:
        room = (1,)
    actors = min(config.resources.actors or len(jobs), max(1, sum(room)), len(jobs))
    elsewhere = config.parent.workers > 1 or (0 < gpus < 1 and not serial)
    early = actors - config.parent.workers if config.parent.workers > 1 else actors
    epochs_on, span = _schedule(jobs, actors, len(data.train), elsewhere, early)
    outputs = 4 * (len(data.validation) + len(data.test)) * data.num_classes + 2 * _ARRAY
    labels = 8 * (len(data.validation) + len(data.test)) + 2 * _ARRAY
    result = Plan(
        name=config.name,
        jobs=tuple(jobs),
        nodes=tuple(nodes),
        actors=0 if why else actors,
        actors_on=() if why else spread(room, actors),
        cpus=cpus,
        gpus=gpus,
        missing=why,
        epochs_on=tuple(epochs_on),
        span=span,
        bound=_bound(jobs, actors, len(data.train)),
        parent_bytes=flat_bytes(weights),
        data_bytes=flat_bytes(_tensors(data)),
        recipe_bytes=sum(len(json.dumps(spec.to_json())) for spec in config.specs()),
        output_bytes=len(jobs) * outputs + labels,
        hints=(),
    )
    return replace(result, hints=tuple(_hints(config, result, len(data.train))))


# --- work ---------------------------------------------------------------------------------------


def _works(config: Config, data: Data, cost: Cost) -> list[Work]:
    """Every job, with sizes taken from a network spawned for each distinct recipe."""
    seen: dict[ChildSpec, tuple[int, int, float, float]] = {}
    found = []
    for job in driver.jobs(config):
        if isinstance(job, Solve):  # some passes over a thousand samples, nothing stored
            continue
        bag = 1.0
        if isinstance(job, Fit):
            model = driver.build(config, data)
            stored = _file_bytes(model.state_dict())
            state, forward = _state_bytes(model, job.training), float(cost.total)
            device = forward
            group = "parent" if job.id == "parent" else "single"
        else:
            kind = replace(job, id="", seed=0, training_seed=0, sign=1)
            if job.parts > 2:
                kind = replace(kind, part=0)  # all hold the same share
            if kind not in seen:
                seen[kind] = _child(config, data, cost, kind)
            stored, state, forward, device = seen[kind]
            bag, group = job.bag, job.label
        images = job.epochs * (len(data.train) if bag == 1 else round(bag * len(data.train)))
        found.append(
            Work(
                id=job.id,
                group=group,
                epochs=job.epochs,
                images=images,
                flops=training_flops(forward, images),
                flops_dense=training_flops(device, images),
                weights=stored,
                checkpoint=state if job.epochs > 1 else 0,
            )
        )
    return found


def _child(
    config: Config, data: Data, cost: Cost, spec: ChildSpec
) -> tuple[int, int, float, float]:
    """Bytes of the stored child, bytes of its checkpoint, FLOPs of one forward pass in tuning if
    zeros are free, and as they are computed."""
    model = driver.build(config, data)
    parent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    body = anatomy(model, spec, data.input_shape, data.input_dtype)
    sub = subnetwork(spec, body, parent) if METHODS[spec.method].prunes else Subnetwork({})
    dense = _state_bytes(model, spec.training)
    model = without_removed(model, spec, sub, body)
    packed = pack_child(model, spec, sub, sub.masks)
    kept = kept_fractions(model, body, sub.masks)
    state = dense if anneals(spec) else _state_bytes(model, spec.training)
    left = cost.nonzero(kept)
    if anneals(spec) or spec.prune_epochs:
        assert spec.training is not None
        count = len(data.train) if spec.bag == 1 else round(spec.bag * len(data.train))
        acted = cost.nonzero(acting.shares(spec, sub, body, -(-count // spec.training.batch_size)))
    else:
        acted = left
    device = left if acting.shrinks(spec) else float(cost.total)
    return (_file_bytes(packed) if packed else 0), state, acted, device


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return len(safetensors.torch.save(plain))


def _state_bytes(model: nn.Module, training: Training | None) -> int:
    """Weights, buffers and what the optimizer remembers of each weight."""
    if training is None:
        return 0
    moments = 2 if training.optimizer == "adam" else int(training.momentum > 0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return _file_bytes(model.state_dict()) + moments * weights


def _tensors(data: Data) -> dict[str, Tensor]:
    """What of a data set travels to a node: images, or the names of files that lie there."""
    tensors = {}
    for name in ("train", "validation", "test"):
        images = getattr(data, name).images
        assert not isinstance(images, Items), "settings name no such data"
        tensors[f"{name}.images"] = images.names if isinstance(images, ImageFiles) else images
        tensors[f"{name}.labels"] = getattr(data, name).labels
    return tensors


# --- time ---------------------------------------------------------------------------------------


def _in_order(works: Sequence[Work]) -> list[Work]:
    """As the driver submits them: parent, single models, children longest first."""
    first = [work for work in works if work.group in ("parent", "single")]
    rest = [work for work in works if work.group not in ("parent", "single")]
    return first + sorted(rest, key=lambda work: (-work.epochs, work.id))


def _schedule(
    jobs: Sequence[Work], actors: int, train: int, elsewhere: bool, early: int
) -> tuple[list[float], float]:
    """Epochs on each actor, and the end of the last job.

    Args:
        elsewhere: the parent is trained by others than the actors.
        early: actors that there are before the parent is done.
    """
    parent_end = jobs[0].images / train
    busy = [0.0] * actors
    ends = [parent_end]
    free = [(0.0 if i < early else parent_end, i) for i in range(actors)]
    if not elsewhere:
        busy[0] = parent_end
        free[0] = (parent_end, 0)
    heapq.heapify(free)
    for work in jobs[1:]:
        at, actor = heapq.heappop(free)
        long = work.images / train
        start = at if work.group == "single" else max(at, parent_end)
        busy[actor] += long
        ends.append(start + long)
        heapq.heappush(free, (start + long, actor))
    return busy, max(ends)


def _bound(jobs: Sequence[Work], actors: int, train: int) -> float:
    """No schedule is shorter: parent and longest child in a row, one single, all work shared."""
    lengths = {group: 0.0 for group in ("parent", "single", "child")}
    for work in jobs:
        key = work.group if work.group in lengths else "child"
        lengths[key] = max(lengths[key], work.images / train)
    shared = sum(work.images for work in jobs) / train / actors
    return max(lengths["parent"] + lengths["child"], lengths["single"], shared)


# --- advice -------------------------------------------------------------------------------------


def _hints(config: Config, plan: Plan, train: int) -> list[str]:
    lines = []
    wanted = min(config.resources.actors or 0, len(plan.jobs))
    if plan.actors and wanted > plan.actors:
        lines.append(
            f"resources.actors: {wanted} are asked for and {plan.actors} fit; the others start "
            "when there are more devices"
        )
    tuned = sum(1 for spec in config.specs() if spec.epochs)
    if plan.actors and tuned > plan.actors and plan.gpus >= 1:
        lines.append(
            f"{tuned} children are tuned by {plan.actors} actors: resources.gpus_per_actor: 0.25 "
            "puts four on each GPU, if its memory holds four networks in training"
        )
    others = [work for work in plan.jobs if work.group != "single"]
    if plan.actors and len(others) < len(plan.jobs):
        _, without = _schedule(others, plan.actors, train, False, plan.actors)
        if plan.span > 1.1 * without:
            lines.append(
                f"with single models the run takes {plan.span:g} epochs by the clock, without them "
                f"{without:g}: single: false"
            )
    return lines
