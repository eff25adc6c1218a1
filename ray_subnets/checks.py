"""Before a run begins or goes on: do network, data and recipes fit, and are they the same?"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ray_subnets import supervised
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.data import Data, farthest
from ray_subnets.spawning import KINDS, anatomy
from ray_subnets.trust_region import check_target

_DATA = "data.json"
"""the samples that a run was made with: their hash"""


def fits(config: Config, data: Data, model: nn.Module) -> None:
    """Do the recipes fit the network and the data?

    Raises:
        ValueError: there is nothing in it to mask, no such divergence, or a head for other labels.
    """
    if (config.head != "classes") != data.train.labels.is_floating_point():
        raise ValueError(
            f"head: {config.head}, but labels of {data.name} are {data.train.labels.dtype}; "
            "regression is done in Python: ray_subnets.ensemble(..., head=...)"
        )
    _check_known(model, data)
    for job in config.solve_jobs():
        check_target(job.kl_target, data.num_classes)
    seen = set()
    for spec in config.specs():
        structure = spec.structure if spec.structure in KINDS else "weight"
        key = (spec.mask_classifier, structure, spec.whole)
        if key not in seen:
            seen.add(key)
            anatomy(model, spec, data.input_shape, data.input_dtype)


@torch.no_grad()
def _check_known(model: nn.Module, data: Data) -> None:
    """Does the network know all whole numbers in the data?"""
    training = model.training
    model.eval()
    for name, x in farthest(data).items():
        try:
            model(x)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"data: {name} has whole numbers from {int(x.min())} to {int(x.max())}, and the "
                f"network does not take all of them: {str(error).partition(chr(10))[0]}"
            ) from None
    model.train(training)


def same(data: Data, folder: RunFolder, model: nn.Module) -> None:
    """Does a run that goes on still have its data and its network? Of a new one data are noted.

    Args:
        model: the run's network; its weights are written over.

    Raises:
        ValueError: one of them changed.
    """
    same_data(data, folder)
    _check_answers(data, folder, model)


def same_data(data: Data, folder: RunFolder, key: str = "") -> None:
    """Are the data those of before? Of a new folder they are noted.

    Args:
        key: tells them apart from others in the same folder.

    Raises:
        ValueError: they changed.
    """
    name = f"data-{hashlib.sha256(key.encode()).hexdigest()[:10]}.json" if key else _DATA
    if not folder.exists(name):
        folder.write_json(name, {"sha256": data.content})
    elif folder.read_json(name).get("sha256") != data.content:
        raise ValueError(
            f"data: {data.name} is not what {folder} was made with: inputs or labels changed; put "
            "them back, or begin anew in another folder"
        )


def _check_answers(data: Data, folder: RunFolder, model: nn.Module) -> None:
    """Does the network of a run that goes on still answer as its parent did?

    Raises:
        ValueError: it does not: its code changed.
    """
    try:
        model.load_state_dict(folder.load_tensors("parent.safetensors"))
        before = torch.from_numpy(folder.load_arrays("outputs/parent.npz")["validation"][:8])
    except (ValueError, OSError, KeyError, RuntimeError):
        return  # there is no parent yet, or it will be made again
    first = data.validation.images[torch.arange(len(before))]
    now = supervised.predict(model, first, data.preprocess)
    if not torch.equal(now, supervised.predict(model, first, data.preprocess)):
        return  # it draws something each time it is asked
    if now.shape != before.shape or float((now - before).abs().max()) > 0.05 * max(
        1.0, float(before.abs().max())
    ):
        raise ValueError(
            f"model: with the parent's weights it gives other answers than {folder} holds: its "
            "code, or how inputs are normalised, changed; put it back, or start a new run"
        )
