"""Jobs in the run folder: results, checkpoints, and children as small as their recipes allow."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_subnets import sparse
from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.masks import Masks
from ray_subnets.recipes import ChildResult, ChildSpec, Job, Result, Solve, SolveResult, Stored
from ray_subnets.rl.policy_recipes import PLACES
from ray_subnets.spawning import (
    METHODS,
    Anatomy,
    Subnetwork,
    anatomy,
    removable,
    spawn_weights,
    subnetwork,
    without_removed,
)
from ray_subnets.topology import Topology

Say = Callable[[str], None]
_SEAL = "checksum"


def store_result(folder: RunFolder, job: Job, result: Result) -> None:
    """Write `results/ID.json`, with a hash of itself, since JSON would not show a changed digit.

    Raises:
        WriteFailed: see `RunFolder.write`.
    """
    record = asdict(result) | {"job": _identity(job)}
    folder.write_json(f"results/{result.id}.json", record | {"sha256": _hash(record)})


def kind_of(job: Job) -> type[Result]:
    """The class of a job's result."""
    if isinstance(job, ChildSpec):
        return ChildResult
    return SolveResult if isinstance(job, Solve) else Result


def _hash(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_result(folder: RunFolder, job: Job, say: Say = lambda line: None) -> Result | None:
    """The result of a job that was finished before; None if there is none that can be used.

    A damaged or missing file of it is as good as no result: the job is done again and gives the
    same bytes.

    Args:
        say: called with one line if there is a result that cannot be used.

    Raises:
        ValueError: it is of other settings than the job's.
    """
    name = f"results/{job.id}.json"
    if not folder.exists(name):
        return None
    try:
        record = folder.read_json(name)
        seal = record.pop("sha256", None)  # folders of version 0.2.0 have none
        if seal is not None and seal != _hash(record):
            raise ValueError(f"{folder.path(name)}: damaged or changed since it was written")
        for key in ("weights", "outputs"):
            record[key] = Stored(**record[key]) if record[key] else None
            if record[key]:
                folder.read(record[key])
        for key in ("notes", "troubles"):
            record[key] = tuple(record.get(key, ()))
        if "sigmas" in record:
            record["sigmas"] = tuple(record["sigmas"])
        before = record.pop("job", {})  # folders of version 0.2.0 have none
        known = kind_of(job)(**record)
    except (TypeError, KeyError, AttributeError) as error:
        say(f"{folder.path(name)}: not a result ({error}); {job.id} is done again")
    except ValueError as error:
        say(f"{str(error).split(';')[0]}; {job.id} is done again")
    else:
        if changed := _changed(before, _identity(job)):
            raise ValueError(
                f"RUN: {folder}: {job.id} was made with {changed}; its settings were edited: put "
                "them back, or start a new run"
            )
        return known
    return None


def _changed(before: Any, now: Any, key: str = "") -> str | None:
    """The first setting that is not the same, of those that both versions of this program have."""
    if isinstance(before, dict) and isinstance(now, dict):
        both = (name for name in before if name in now)
        found = (_changed(before[name], now[name], name) for name in both)
        return next((one for one in found if one), None)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = (_changed(*both, key) for both in zip(before, now, strict=True))
        return next((one for one in parts if one), None)
    return None if before == now else f"{key} {before}, not {now}"


def check_room(folder: RunFolder, name: str, size: int) -> None:
    """Could a file of `size` bytes be written now?

    Raises:
        WriteFailed: no.
    """
    probe = f"{name}.room"
    try:
        folder.write(probe, bytes(size))
        folder.remove(probe)
    except WriteFailed as error:
        raise WriteFailed(str(error).replace(probe, name)) from None


def checkpoint_name(job: Job) -> str:
    return f"checkpoints/{job.id}.safetensors"


def _identity(job: Job) -> dict[str, Any]:
    """All that its result follows from, as JSON has it."""
    record = job.to_json()
    if isinstance(record.get("env"), dict):  # of a policy: where it is stepped is no part of it
        record["env"] = {k: v for k, v in record["env"].items() if k not in PLACES}
    found: dict[str, Any] = json.loads(json.dumps(record))
    return found


def _digest(job: Job) -> Tensor:
    """SHA-256 of the job, `(32,)` uint8: a checkpoint of another recipe is not continued."""
    text = json.dumps(_identity(job), sort_keys=True).encode()
    return torch.from_numpy(np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint8).copy())


def _checksum(state: Mapping[str, Tensor]) -> Tensor:
    """CRC-32 of names, types, shapes and bits of contiguous tensors on the CPU: safetensors itself
    does not see a changed bit."""
    total = 0
    for name in sorted(state):
        tensor = state[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return torch.tensor(total)


def save_checkpoint(
    folder: RunFolder,
    job: Job,
    state: Mapping[str, Tensor],
    epoch: int,
    images: int,
    seconds: float,
    topology: Topology | None = None,
) -> None:
    """Everything needed to go on after `epoch` epochs, in one atomic file.

    Args:
        state: of the training, as its loop says.

    Raises:
        WriteFailed: see `RunFolder.write`; the checkpoint before is still there.
    """
    state = dict(state)
    if topology is not None:
        state |= {f"topology.{name}": tensor for name, tensor in topology.state().items()}
    state["job"] = _digest(job)
    state["progress"] = torch.tensor([epoch, images])
    state["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # Waiting for the disk after every epoch costs more than what a loss of power can: the seal
    # tells a file that is not whole, and the job starts again.
    sealed = state | {_SEAL: _checksum(state)}
    folder.save_tensors(checkpoint_name(job), sealed, lasting=False)


def load_checkpoint(
    folder: RunFolder,
    job: Job,
    restore: Callable[[Mapping[str, Tensor]], object],
    say: Say = lambda line: None,
    topology: Topology | None = None,
) -> tuple[int, int, float]:
    """Go back to the job's last checkpoint.

    Args:
        restore: takes the training's state, as it was saved.
        say: called with one line if there is a checkpoint that cannot be used.

    Returns:
        (epochs done, images seen, seconds spent); zeros if there is none, or none of this very
        job. An unreadable checkpoint is as good as none: the job starts again and gives the same
        numbers.
    """
    name = checkpoint_name(job)
    try:
        if not folder.exists(name):
            return 0, 0, 0.0
        state = folder.load_tensors(name)
    except ValueError as error:
        say(f"{str(error).split(';')[0]}; {job.id} starts again")
        return 0, 0, 0.0
    seal = state.pop(_SEAL, None)
    if seal is None or not torch.equal(seal, _checksum(state)):
        say(f"{folder.path(name)}: damaged or of another version; {job.id} starts again")
        return 0, 0, 0.0
    if not torch.equal(state.pop("job"), _digest(job)):
        say(f"{folder.path(name)}: of another recipe; {job.id} starts again")
        return 0, 0, 0.0
    epoch, images = state.pop("progress").tolist()
    seconds = float(state.pop("seconds"))
    restore(state)
    if topology is not None:
        prefix = "topology."
        topology.restore(
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        )
    return epoch, images, seconds


def stores_masks(spec: ChildSpec) -> bool:
    """Is the final mask known only after tuning?"""
    return bool(spec.prune_epochs and spec.epochs) and spec.criterion == "magnitude"


def pack_child(
    model: nn.Module, spec: ChildSpec, sub: Subnetwork, masks: Masks
) -> dict[str, Tensor]:
    """What must be stored of a finished child beside its recipe; may be nothing."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if not spec.epochs:
        buffers = {name for name, _ in model.named_buffers()} if spec.recompute_norm else set()
        return {name: tensor for name, tensor in weights.items() if name in buffers}
    if not METHODS[spec.method].prunes or removable(spec, sub):
        return weights
    packed = sparse.pack(weights, masks)
    return packed | sparse.pack_masks(masks) if stores_masks(spec) else packed


def kept_fractions(model: nn.Module, body: Anatomy, masks: Masks) -> dict[str, float]:
    """Weight -> fraction that is left, by masks and by smaller tensors; whole ones left out."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kept = {}
    for name, shape in body.parameters.items():
        left = sizes.get(name, 0)
        if name in masks and left == shape.numel():
            left = int(masks[name].sum())
        if left < shape.numel():
            kept[name] = left / shape.numel()
    return kept


def needs_parent(spec: ChildSpec, stored: Stored | None) -> bool:
    """Does `restore` read the parent's weights?"""
    return stored is None or not spec.epochs or spec.criterion == "magnitude"


def restore(
    folder: RunFolder,
    model: nn.Module,
    parent: Mapping[str, Tensor],
    spec: ChildSpec,
    stored: Stored | None,
    source: str,
    input_shape: Sequence[int],
    input_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The finished child `spec`, from its file, or from the recipe alone.

    Args:
        model: a network as the parent is, on the CPU; it becomes the child, if that is not smaller.
        source: who says so, for messages.

    Raises:
        ValueError: its file is damaged or does not belong to the recipe.
    """
    where = f"{source}: {stored.file if stored else spec.id}"
    packed = folder.load_tensors(stored) if stored else {}
    try:
        body = anatomy(model, spec, input_shape, input_dtype)
        if not spec.epochs:
            child = spawn_weights(parent, body, replace(spec, training=None))
            model.load_state_dict(child.weights)
            model = without_removed(model, spec, child.subnetwork, body)
            weights: Mapping[str, Tensor] = dict(model.state_dict()) | packed
        elif not METHODS[spec.method].prunes:
            weights = packed
        else:
            if stores_masks(spec):
                sub = Subnetwork(sparse.unpack_masks(packed, body.shapes))
                packed = {n: t for n, t in packed.items() if not n.endswith(".kept")}
            else:
                sub = subnetwork(spec, body, parent)
            model = without_removed(model, spec, sub, body)
            weights = packed if removable(spec, sub) else sparse.unpack(packed, sub.masks)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: does not fit the network ({reason})") from None
    load_weights(model, weights, where)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict` whose mismatch is one line.

    Raises:
        ValueError: names or shapes differ.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: weights do not fit the network: {reason}") from None
