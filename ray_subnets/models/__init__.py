"""Networks by name: our own, torchvision's, or the user's by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_subnets import own_code
from ray_subnets.inputs import are_probabilities, described, made_up
from ray_subnets.models.densenet import densenet121
from ray_subnets.models.impala import Impala
from ray_subnets.models.lenet import lenet_l, lenet_m, lenet_s
from ray_subnets.models.mlp import mlp
from ray_subnets.models.resnet import resnet18, resnet56
from ray_subnets.models.wide_resnet import WideResNet
from ray_subnets.strangers import raised
from ray_subnets.structured import channels_last_is_safe

GIVEN = "given"
"""stands for a network that was given in Python, in the record of what was made of it"""

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet_s": lenet_s,
    "lenet_m": lenet_m,
    "lenet_l": lenet_l,
    "resnet18": resnet18,
    "resnet56": resnet56,
    "wide_resnet": WideResNet,
    "densenet121": densenet121,
    "impala": Impala,
}


def import_path(path: str, key: str) -> Callable[..., Any]:
    """The object that `package.module:name` points to.

    Raises:
        ValueError: no such module or name; the message names `key`.
    """
    module_name, _, name = path.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"{key}: {path!r} is not of the form package.module:function")
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: cannot import {path!r} ({error}); the module must be installed or lie in the "
            "folder where the command runs"
        ) from None
    except AttributeError:
        raise ValueError(f"{key}: module {module_name!r} has no {name!r}") from None
    if not callable(target):
        raise ValueError(f"{key}: {path!r} is not a function or class")
    return target


def _call(
    build: Callable[..., Any], key: str, offered: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Call `build` with the options, and with what is offered as far as it takes it."""
    parameters = inspect.signature(build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [name for name in parameters if name not in offered]
    for name in options:
        if name not in parameters and not takes_all:
            raise ValueError(
                f"{key}.{name}: unknown option"
                + (f"; this one has {', '.join(known)}" if known else "; this one has none")
            )
    given = {name: value for name, value in offered.items() if name in parameters or takes_all}
    try:
        inspect.signature(build).bind(**given, **options)
    except TypeError as error:
        raise ValueError(f"{key}: {error}") from None
    if isinstance(build, nn.Module):
        raise ValueError(f"{key}: it is a network; name a function or class that makes one")
    try:
        return build(**given, **options)
    except ValueError:
        raise
    except TypeError as error:
        if not options:
            raise ValueError(f"{key}: building it raised {raised(error)}") from error
        chosen = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"{key}: cannot be built with {chosen}: {error}") from None
    except Exception as error:  # whatever a user's code raises
        raise ValueError(f"{key}: building it raised {raised(error)}") from error


def build(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    options: Mapping[str, Any],
    seed: int,
    *,
    channels_last: bool = True,
    input_dtype: torch.dtype = torch.float32,
    from_folder: bool = False,
) -> nn.Module:
    """A network with initial weights drawn from `seed`, checked to give `(N, num_classes)`.

    Args:
        channels_last: memory format of convolutional networks, where it is safe.
        name: a key of `MODELS`, `torchvision/<name>`, `timm/<name>`, or
            `package.module:function`. A user's function is given `input_shape` and `num_classes` if
            it has parameters of these names.
        from_folder: the name is not the user's but a folder's, so it may only be of code of the
            user's own, see `own_code`.

    Raises:
        ValueError: unknown name or option, or a network that does not fit the data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        offered = {"input_shape": tuple(input_shape), "num_classes": num_classes}
        if name in MODELS:
            model = _call(MODELS[name], "model", offered, dict(options))
        elif name.startswith("torchvision/"):
            from torchvision.models import get_model_builder

            try:
                builder = get_model_builder(name.removeprefix("torchvision/"))
            except ValueError as error:
                raise ValueError(f"model: {error}") from None
            fixed = {"weights": None, "num_classes": num_classes}
            for option in fixed:
                if option in options:
                    raise ValueError(f"model.{option}: is given by the data, leave it out")
            model = _call(builder, "model", fixed, dict(options))
        elif name.startswith("timm/"):
            model = _timm(name.removeprefix("timm/"), num_classes, dict(options))
        elif ":" in name:
            model = _call(_named(name, from_folder), "model", offered, dict(options))
        elif name == GIVEN:
            raise ValueError(
                "model: it was given in Python and is not known by name; go on from there, with "
                "ray_subnets.ensemble(..., folder=...)"
            )
        else:
            raise ValueError(
                f"model: unknown network {name!r}; known: {', '.join(MODELS)}, torchvision/NAME, "
                "timm/NAME, or your own as package.module:function"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: {name!r} returned {type(model).__name__}, not a torch Module")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.requires_grad_(True)  # all frozen: to be used as it was, not to stay so
        _check_output(model, name, made_up(2, input_shape, input_dtype), num_classes)
    return in_fast_format(model) if channels_last else model


def _named(path: str, from_folder: bool) -> Callable[..., Any]:
    try:
        if from_folder:
            own_code.check_name(path)
        target = import_path(path, "model")
        if from_folder:
            own_code.check_target(path, target)
    except ValueError as error:
        raise ValueError(f"model: {str(error).removeprefix('model: ')}") from None
    return target


def _timm(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """A network of timm's, without its weights."""
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError:
        raise ValueError("model: timm is not installed: pip install timm") from None
    for option in ("pretrained", "num_classes"):
        if option in options:
            raise ValueError(f"model.{option}: is given by the data and by weights, leave it out")
    if not timm.is_model(name):
        close = [*timm.list_models(f"{name}*"), *timm.list_models(f"*{name}*")][:5]
        hint = f"; there are {', '.join(close)}" if close else ""
        raise ValueError(f"model: timm has no network {name!r}{hint}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: timm/{name} cannot be built: {reason}") from None
    return model


def in_fast_format(model: nn.Module) -> nn.Module:
    """The same function in the memory format in which convolutions and pooling run faster on CPUs
    (`make bench` prints by how much), where that is safe.
    """
    return model.to(memory_format=torch.channels_last) if channels_last_is_safe(model) else model


def _check_output(model: nn.Module, name: str, inputs: torch.Tensor, num_classes: int) -> None:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: {name!r} does not take {described(inputs)}: {reason}") from None
    finally:
        model.train(training)
    got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if got != (2, num_classes):
        raise ValueError(
            f"model: {name!r} gives {got} for 2 inputs, but the data has {num_classes} classes; "
            f"it must return logits of shape (2, {num_classes})"
        )
    if are_probabilities(output):
        raise ValueError(
            f"model: {name!r} gives probabilities; it must return logits: leave out the softmax"
        )
