"""Weights that somebody trained already: from a file or by torchvision's name, checked to fit."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

_WRAPPED = ("state_dict", "model_state_dict", "model")
"""under which training scripts store a state dict beside other things"""
_PREFIXES = ("module.", "_orig_mod.")
"""of names that were stored inside DataParallel or torch.compile"""

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""torchvision's files for DenseNet have names with a dot that it mends when it reads them"""
_COUNTER = "num_batches_tracked"
"""files from before 2018 lack it; torch takes it for 0"""


def read(source: str, network: str) -> dict[str, Tensor]:
    """A state dict: tensors on the CPU, floating-point ones as float32.

    Nothing is unpickled but tensors (`weights_only`).

    Args:
        source: a file, .safetensors or what `torch.save` wrote; or, for `torchvision/NAME`, the
            name of torchvision's weights (IMAGENET1K_V1, DEFAULT), fetched to torch's cache.
        network: how the network is called.

    Raises:
        ValueError: there are no such weights, or they cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = _from_file(path)
    elif network.startswith("torchvision/") and source.isidentifier():
        found = _of_torchvision(network.removeprefix("torchvision/"), source)
    else:
        raise ValueError(
            f"weights: no such file: {path}; give a .safetensors file, a state dict written by "
            "torch.save, or for torchvision/NAME one of torchvision's names (IMAGENET1K_V1)"
        )
    if network.startswith("torchvision/densenet"):
        found = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in found.items()}
    for prefix in _PREFIXES:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in found.items()
    }


def _from_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"weights: cannot read {path} ({_line(error)})") from None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError):
        raise ValueError(
            f"weights: {path} holds more than tensors, or is no file of torch.save; where the "
            "network is known, write torch.save(model.state_dict(), PATH) and give that"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"weights: cannot read {path} ({_line(error)})") from None
    for key in _WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"weights: {path} holds a {type(content).__name__}, not a state dict")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"weights: {path}: {name!r} is a {type(value).__name__}, not a tensor; give a "
                "state dict"
            )
    return dict(content)


def _of_torchvision(network: str, name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model, get_model_weights

    try:
        known = get_model_weights(network)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    try:
        weights = known[name]
    except KeyError:
        names = ", ".join(known.__members__)
        raise ValueError(
            f"weights: {network} has no {name!r} in torchvision, and there is no such file; it has "
            f"{names}"
        ) from None
    try:
        built = get_model(network, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"weights: {weights.url} could not be fetched ({_line(error)}); fetch it elsewhere and "
            "give the file"
        ) from None
    return dict(built.state_dict())


def fitted(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights, if they are those of such a network.

    Raises:
        ValueError: names or shapes differ; one line says which.
    """
    wanted = model.state_dict()
    old = {n: torch.zeros_like(t) for n, t in wanted.items() if n.rpartition(".")[2] == _COUNTER}
    weights = {**old, **weights}
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if len(missing) == len(wanted) - len(old):
        said = ["none of its names are the network's"]
    else:
        said = [f"{_some(missing)} {_are(missing)} missing"] * bool(missing)
    said += [f"{_some(unknown)} {_are(unknown)} unexpected"] * bool(unknown) + shapes[:3]
    if said:
        more = f" and {len(shapes) - 3} more shapes" if len(shapes) > 3 else ""
        raise ValueError(
            f"weights: {source} does not fit the network: {', '.join(said)}{more}; check model, "
            "its options and data.num_classes"
        )
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"weights: {source} has NaN or infinite numbers in {_some(broken)}")
    return {name: weights[name] for name in wanted}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
