"""Jobs in the run folder: results, checkpoints, and children as small as their recipes allow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor, nn

from ray_subnets import sparse, supervised
from ray_subnets.checkpoints import RunFolder
from ray_subnets.masks import Masks
from ray_subnets.recipes import ChildResult, ChildSpec, Job, Result, Solve, SolveResult, Stored
from ray_subnets.spawning import (
    METHODS,
    Subnetwork,
    anatomy,
    removable,
    spawn_weights,
    subnetwork,
    without_removed,
)


def store_result(folder: RunFolder, result: Result) -> None:
    folder.write_json(f"results/{result.id}.json", asdict(result))


def kind_of(job: Job) -> type[Result]:
    """The class of a job's result."""
    if isinstance(job, ChildSpec):
        return ChildResult
    return SolveResult if isinstance(job, Solve) else Result


def stored_result(folder: RunFolder, job: Job) -> Result | None:
    """The result of a job that was finished before; None if there is none that can be used.

    A damaged or missing file of it is as good as no result: the job is done again and gives the
    same bytes.
    """
    name = f"results/{job.id}.json"
    if not folder.exists(name):
        return None
    try:
        record = folder.read_json(name)
        for key in ("weights", "outputs"):
            record[key] = Stored(**record[key]) if record[key] else None
            if record[key]:
                folder.read(record[key])
        for key in ("notes", "sigmas"):
            if key in record:
                record[key] = tuple(record[key])
        return kind_of(job)(**record)
    except (TypeError, KeyError, ValueError):
        return None


def checkpoint_name(job: Job) -> str:
    return f"checkpoints/{job.id}.safetensors"


def _digest(job: Job) -> Tensor:
    """SHA-256 of the job, `(32,)` uint8: a checkpoint of another recipe is not continued."""
    text = json.dumps(job.to_json(), sort_keys=True).encode()
    return torch.from_numpy(np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint8).copy())


def save_checkpoint(
    folder: RunFolder,
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    images: int,
    seconds: float,
) -> None:
    """Everything needed to go on after `epoch` epochs, in one atomic file."""
    state = supervised.training_state(model, optimizer)
    state["job"] = _digest(job)
    state["progress"] = torch.tensor([epoch, images])
    state["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    folder.save_tensors(checkpoint_name(job), state)


def load_checkpoint(
    folder: RunFolder, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, int, float]:
    """Restore the job's last checkpoint into model and optimizer.

    Returns:
        (epochs done, images seen, seconds spent); zeros if there is none, or none of this very
        job. An unreadable checkpoint is as good as none: the job starts again and gives the same
        numbers.
    """
    name = checkpoint_name(job)
    if not folder.exists(name):
        return 0, 0, 0.0
    try:
        state = folder.load_tensors(name)
    except ValueError:
        return 0, 0, 0.0
    if "job" not in state or not torch.equal(state.pop("job"), _digest(job)):
        return 0, 0, 0.0
    epoch, images = state.pop("progress").tolist()
    seconds = float(state.pop("seconds"))
    supervised.restore_training_state(model, optimizer, state)
    return epoch, images, seconds


def _stores_masks(spec: ChildSpec) -> bool:
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
    return packed | sparse.pack_masks(masks) if _stores_masks(spec) else packed


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
        body = anatomy(model, spec, input_shape)
        if not spec.epochs:
            child = spawn_weights(parent, body, replace(spec, training=None))
            model.load_state_dict(child.weights)
            model = without_removed(model, spec, child.subnetwork, body)
            weights: Mapping[str, Tensor] = dict(model.state_dict()) | packed
        elif not METHODS[spec.method].prunes:
            weights = packed
        else:
            if _stores_masks(spec):
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
