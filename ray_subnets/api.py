"""From a network and data to an ensemble, in Python: the same run as on the command line.

import ray_subnets as rs

ensemble = rs.ensemble(model, (x, y), (x_val, y_val),
                       method=rs.Sparse(sparsity=0.5, partition=2),
                       children=8, tune=rs.OneCycle(epochs=2))
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

from ray_subnets import configfile, driver, members, networks, sources
from ray_subnets import progress as progress_
from ray_subnets.blueprint import Blueprint
from ray_subnets.checkpoints import CONFIG, RunFolder
from ray_subnets.config import GIVEN, Config
from ray_subnets.data import Data, Preprocess
from ray_subnets.ensembles import Ensemble
from ray_subnets.methods import Method, groups_of, training
from ray_subnets.pools import SerialPool
from ray_subnets.population import Worker
from ray_subnets.recipes import Training
from ray_subnets.regression import OUTPUTS, Head
from ray_subnets.regression import check as check_head

_GIVEN = "given.json"


def ensemble(
    model: nn.Module | str | Mapping[str, Any],
    train: Any,
    val: Any,
    *,
    method: Method | Sequence[Method],
    head: Head = "classes",
    children: int | None = None,
    tune: Training | None = None,
    parent: Training | None = None,
    test: Any = None,
    select: Mapping[str, Any] | int | None = None,
    combine: str = "probabilities",
    include_parent: bool = False,
    preprocess: Preprocess | None = None,
    crop: int = 0,
    flip: bool = False,
    architecture: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    ray: bool | str = False,
    device: str | torch.device | None = None,
    resources: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    on_demand: bool = False,
    calibrated: bool = False,
    progress: bool = True,
) -> Ensemble:
    """Make children of a trained classifier, or regression network, tune them, keep the best.

    The network that is given stays as it is: its weights, mode and `requires_grad`. Weights that
    are frozen stay frozen in children too, unless all are.

    Args:
        model: maps inputs `(N, *shape)` to logits `(N, C)`, with float32 weights on any device. Or
            the name (and options) of a network as in a configuration, then `parent` trains it.
        train: inputs `(N, *shape)` and integer labels `(N,)` from 0 to C - 1: tensors or arrays
            `(x, y)`, a `torch.utils.data.Dataset` of such pairs, or a `DataLoader` of one.
            Tensors and `TensorDataset` stay in memory and are what the network sees: floating
            point or whole numbers, or uint8 images with `preprocess`. Other data sets are read anew
            in each epoch, with fresh random transforms, whose draws follow from `seed`.
        val: the same, of other samples: fitness, selection and temperature come from it.
        method: `Noisy(...)`, `Sparse(...)`, `Stochastic(...)`, or a list of them.
        head: what the network's outputs are. `classes`: logits `(N, C)`. For regression of one
            target, a number for each sample in place of labels, `(N,)` or `(N, 1)`: `gaussian`,
            mean and logarithm of the variance `(N, 2)`, tuned by its NLL; `mse`, the mean `(N, 1)`
            or `(N,)`, tuned by the squared error. Then a `Regressor` comes back.
        children: in all; methods that do not say `count` share it evenly.
        tune: how children are tuned, `OneCycle(epochs=2)` or `Training(...)`. Batches are shuffled
            here and have `tune.batch_size` samples; a `DataLoader` brings its own batch size.
        parent: train the network itself first, before children are made: for a pretrained one on
            new data. Default: it is the parent as it is.
        test: as `val`; measured once, after members were chosen, for `ensemble.record`. Without it
            `val` stands in: those numbers are of samples that members were chosen by, and look
            better than they are (the record says `test_is_validation`).
        select: how many members to take (the fittest); or `{count, by, method}` as in a
            configuration; `by` is `nll` by default, `rmse` for an MSE head.
            Default: every child that did not fail.
        combine: `probabilities` (their mean), `weighted`, `logits`, `vote`; for classifiers.
        include_parent: is the network itself a member?
        preprocess: mean and standard deviation of the channels of uint8 images.
        crop, flip: augment image tensors: pixels of padding before a random crop, random flips.
        architecture: how `model` is built by name (`torchvision/resnet18`, `package.module:build`,
            or `{name: ..., option: ...}`), so that `load` needs no network.
        seed: of masks, noise, batches and augmentation.
        ray: False: one after the other in this process. True: on Ray actors, on a local Ray (or
            the one this process is connected to); an address: on that cluster. Same numbers.
        device: of the work without Ray, and of the ensemble; default: where the model is.
        resources: `{threads, actors, cpus_per_actor, gpus_per_actor, channels_last, retries}`.
        folder: keep the run here, a path or a URI. The same call goes on with what is there.
            Default: a temporary folder, which goes when the ensemble does.
        on_demand, calibrated: see `load`.
        progress: show it, with the time left.

    Returns:
        In evaluation mode; `ensemble.record` has what was measured. `ensemble.save` keeps it.

    Raises:
        ValueError: one line that names the argument.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(),
        ...                           torch.nn.Linear(32, 3))
        >>> x, y = torch.randn(96, 4), torch.arange(96) % 3
        >>> some = ensemble(net, (x, y), (x, y), method=rs.Noisy(sigma=0.1), children=4)
        >>> some(x[:5]).shape
        torch.Size([5, 3])
    """
    if isinstance(model, nn.Module):
        where = next((p.device for p in model.parameters()), torch.device("cpu"))
    else:
        where = torch.device("cpu")
    where = _device(device, where)
    check_head(head)
    _check_settings(crop, flip, preprocess, select, resources, folder)
    real = head != "classes"
    given = {
        "train": sources.source("train", train, keep=False, real=real),
        "val": sources.source("val", val, keep=True, real=real),
    }
    if test is not None:
        given["test"] = sources.source("test", test, keep=True, real=real)
    labelled = (
        OUTPUTS[head] if real else max(int(one.split.labels.max()) for one in given.values()) + 1
    )
    network, weights, name, classes = networks.examined(
        model, given["val"], labelled, preprocess, architecture, head
    )
    data = sources.assemble(
        given["train"],
        given["val"],
        given.get("test"),
        num_classes=classes,
        preprocess=preprocess,
        crop=crop,
        flip=flip,
    )
    size = given["train"].batch_size
    whole = networks.kept_whole(network, given["val"], preprocess) if network else networks.Whole()
    config = _config(
        {
            "name": "ensemble",
            "seed": seed,
            "data": {"name": "given"},
            "model": name,
            "parent": _trained("parent", parent, size) or {"epochs": 0},
            "children": [
                whole.settings(group)
                for group in groups_of(method, children, _trained("tune", tune, size))
            ],
            "head": head,
            "select": ({"by": "rmse"} if head == "mse" else {})
            | ({"count": select} if isinstance(select, int) else dict(select or {})),
            "combine": combine,
            "include_parent": include_parent,
            "single": False,
            "resources": dict(resources or {}),
        },
        several=not isinstance(method, Method),
    )
    if network is None and parent is None:
        raise ValueError(
            "parent: a network that is given by name has no trained weights; say how to train it, "
            "parent=Training(epochs=30)"
        )
    run, keep = _folder(folder, config, data, weights)
    with _generators(where), torch.enable_grad():
        record = _run(config, data, run, network, weights is not None, where, ray, progress)
    made = members.load(
        str(run), where, model=network, on_demand=on_demand, calibrated=calibrated, keep=keep
    )
    made.record = record
    return made


def _check_settings(
    crop: Any, flip: Any, preprocess: Any, select: Any, resources: Any, folder: Any
) -> None:
    """Are these of the right kind? Other arguments are checked where they are used."""
    if isinstance(crop, bool) or not isinstance(crop, int) or not 0 <= crop <= 64:
        raise ValueError(f"crop: must be a whole number of pixels from 0 to 64, not {crop!r}")
    if not isinstance(flip, bool):
        raise ValueError(f"flip: must be True or False, not {flip!r}")
    if preprocess is not None:
        good = isinstance(preprocess, Preprocess)
        good = good and all(isinstance(v, tuple | list) for v in (preprocess.mean, preprocess.std))
        if not good or len(preprocess.mean) != len(preprocess.std):
            raise ValueError(
                "preprocess: must be Preprocess(mean=(...), std=(...)), a number for each channel"
            )
    if not isinstance(select, Mapping | int | None) or isinstance(select, bool):
        raise ValueError(
            f"select: must be a number of members, or a mapping as {{'count': 3}}, not {select!r}"
        )
    if resources is not None and not isinstance(resources, Mapping):
        raise ValueError(f"resources: must be a mapping, as {{'actors': 2}}, not {resources!r}")
    if folder is not None and not isinstance(folder, str | Path):
        raise ValueError(f"folder: must be a path or a URI, not {folder!r}")


def _device(device: str | torch.device | None, default: torch.device) -> torch.device:
    try:
        found = torch.device(device) if device is not None else default
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used ({reason})") from None
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _trained(argument: str, value: Any, batch_size: int | None) -> dict[str, Any] | None:
    """Settings of `tune` or `parent`, with the batch size of a DataLoader."""
    if value is None:
        return None
    settings = training(value, argument)
    if batch_size is not None:
        usual = Training(epochs=1).batch_size
        if settings["batch_size"] not in (usual, batch_size):
            raise ValueError(
                f"{argument}.batch_size: {settings['batch_size']}, but the DataLoader's is "
                f"{batch_size}; give one of them"
            )
        settings["batch_size"] = batch_size
    return settings


def _config(record: dict[str, Any], *, several: bool) -> Config:
    """The settings of the run, checked as those of a file are."""
    try:
        return configfile.checked(record, "ensemble")
    except ValueError as error:
        text = str(error).removeprefix("ensemble: ")
        found = re.match(r"children\.(\d+)\.(.*)", text, flags=re.DOTALL)
        if found:
            which, rest = found.groups()
            text = f"method[{which}].{rest}" if several else f"method.{rest}"
            text = re.sub(r"^method(\[\d+\])?\.tune\.", "tune.", text)
            text = re.sub(r"^method\.count: ", "children: ", text)
        raise ValueError(text) from None


def _folder(
    place: str | Path | None, config: Config, data: Data, weights: dict[str, Tensor] | None
) -> tuple[RunFolder, Any]:
    """Where the run is kept, new or as this very call left it; and what to keep for that."""
    content = safetensors.torch.save(_apart(weights)) if weights else b""
    say = {
        "weights": hashlib.sha256(content).hexdigest(),
        "data": sources.digest(data),
    }
    keep = None
    if place is None:
        keep = _Scratch()
        place = keep.path
    folder = RunFolder(place)
    if keep is None and folder.exists(CONFIG):
        known = folder.exists(_GIVEN) and folder.read_json(_GIVEN) == say
        if not known or folder.read(CONFIG) != config.to_yaml().encode():
            raise ValueError(f"folder: {place} holds another run; name a new folder")
        return folder, None
    if not (keep is None and folder.exists(_GIVEN) and folder.read_json(_GIVEN) == say):
        try:
            folder = RunFolder.create(place)
        except ValueError as error:
            reason = str(error).removeprefix("--out: ").split("; choose")[0]
            raise ValueError(f"folder: {reason}; name a new folder") from None
        folder.write_json(_GIVEN, say)  # first: a call that was stopped here is known again
    if weights:
        folder.write(GIVEN, content)
    return folder, keep


class _Scratch:
    """A temporary folder that goes when nobody holds this."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="ray-subnets-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none in the memory of another."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


@contextmanager
def _generators(device: torch.device) -> Iterator[None]:
    """What a worker on a GPU sets for the whole process is put back."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    tried = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            torch.backends.cudnn.benchmark = tried


def _run(
    config: Config,
    data: Data,
    folder: RunFolder,
    network: Blueprint | None,
    weighted: bool,
    device: torch.device,
    on: bool | str,
    show: bool,
) -> dict[str, Any]:
    """The run, here or on Ray; what is in `result.json`."""
    weights = GIVEN if weighted else None
    with progress_.view(driver.jobs(config), Console(), quiet=not show) as view, ExitStack() as up:
        if on:
            from ray_subnets.distributed import cluster
            from ray_subnets.distributed import run as ray_run

            address = None if on is True else str(on)
            view.note(f"joining Ray at {address}" if address else "starting Ray")
            try:
                up.enter_context(cluster.session(address))
            except ValueError as error:
                text = str(error).removeprefix("--address: ").split("; start one")[0]
                raise ValueError(f"ray: {text}; ray=True uses this machine") from None
        up.enter_context(folder.alone())
        cost = driver.prepare(config, data, folder, network)
        if on:
            return ray_run.run(
                config,
                data,
                folder,
                cost=cost,
                listen=view,
                notify=view.note,
                watch=view.status,
                growing=bool(address and address != "local"),
                network=network,
                weights=weights,
            )
        task = replace(driver.task_of(config, folder), weights=weights)
        pool = SerialPool(Worker(task, data, str(device), network=network))
        return driver.run(config, data, folder, pool, cost=cost, listen=view)
