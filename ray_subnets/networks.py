"""A network as a user has it in Python: can an ensemble be made of it, and how is it called?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import blueprint, models
from ray_subnets.blueprint import Blueprint
from ray_subnets.data import Preprocess
from ray_subnets.inputs import are_probabilities, described
from ray_subnets.masks import maskable, output_layer
from ray_subnets.regression import OUTPUTS
from ray_subnets.sources import Source
from ray_subnets.stored import load_weights


def examined(
    model: Any,
    val: Source,
    labelled: int,
    preprocess: Preprocess | None,
    architecture: str | Mapping[str, Any] | None,
    head: str = "classes",
) -> tuple[Blueprint | None, dict[str, Tensor] | None, dict[str, Any], int]:
    """What is built, the weights that it begins with, its name, and its number of classes (for
    regression of outputs).

    Args:
        model: a network; or a name, or a mapping of name and options: then there is nothing to
            examine, and no weights.
        val: its first samples are what the network is tried on.
        labelled: classes of the data, for a network that is yet to be built.
        architecture: how a network is built by name.
        head: what its outputs are, `regression.Head`.

    Raises:
        ValueError: nothing that an ensemble can be made of; the message names the argument.
    """
    if isinstance(model, str | Mapping):
        if architecture is not None:
            raise ValueError("architecture: the model is given by name already; leave it out")
        return None, None, named(model, "model"), labelled
    model = blueprint.check(model)
    network = Blueprint.of(model)
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    trial = network.build()
    try:
        trial.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: plain tensors are not enough to load its weights again ({reason})"
        ) from None
    images = val.split.images[torch.arange(min(2, len(val.split)))]
    inputs = next(iter(images.split(2))).cpu()
    if inputs.dtype == torch.uint8 and preprocess is None:
        inputs = inputs.float()
    inputs = (preprocess or Preprocess())(inputs)
    classes = _outputs(trial, inputs, head)
    if architecture is None:
        kind = {"name": models.GIVEN, "type": blueprint.describe(model)}
        return network, weights, kind, classes
    called = named(architecture, "architecture")
    options = {key: value for key, value in called.items() if key != "name"}
    try:
        built = models.build(
            *(called["name"], inputs.shape[1:], classes, options),
            seed=0,
            input_dtype=inputs.dtype,
        )
        load_weights(built, weights, "the model's")
    except ValueError as error:
        text = str(error).removeprefix("model: ")
        raise ValueError(f"architecture: {text}") from None
    with torch.no_grad():
        if not torch.equal(built.eval()(inputs), models.in_fast_format(trial)(inputs)):
            raise ValueError(
                f"architecture: {called['name']} with the model's weights gives other outputs than "
                "the model"
            )
    return network, weights, called, classes


def kept_whole(network: Blueprint, val: Source, preprocess: Preprocess | None) -> Whole:
    """What of a network that was given is not to be masked unless that is asked for: frozen
    weights, and the layer that gives the outputs if it was not registered last.

    Args:
        val: its first sample is what the network is asked about.
    """
    model = network.build()
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = list(maskable(model, classifier=True))
    frozen = [name for name in names if not grads[name]] if any(grads.values()) else []
    images = val.split.images[torch.arange(1)]
    inputs = (preprocess or Preprocess())(next(iter(images.split(1))).cpu())
    head = output_layer(model, inputs)
    if not set(names) - {*frozen, head}:
        frozen = []  # all there is to mask
    return Whole(tuple(frozen), head if head != names[-1] else None)


@dataclass(frozen=True)
class Whole:
    """See `kept_whole`."""

    frozen: tuple[str, ...] = ()
    head: str | None = None

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of children that leaves them alone; one that removes units is left as it is."""
        given = group.get("whole", ())
        if group.get("structure", "weight") not in ("weight", "layer"):
            return group
        if not isinstance(given, list | tuple):
            return group  # what is checked next says so
        more = list(self.frozen)
        settings = dict(group)
        if self.head is not None and not group.get("mask_classifier"):
            more.append(self.head)
            settings["mask_classifier"] = True  # the layer that was registered last is another
        if more:
            settings["whole"] = list(dict.fromkeys([*given, *more]))
        return settings


def named(value: Any, argument: str) -> dict[str, Any]:
    """`{name: ..., option: ...}` of a name or a mapping.

    Raises:
        ValueError: there is no name.
    """
    found = {"name": value} if isinstance(value, str) else dict(value)
    if not isinstance(found.get("name"), str):
        raise ValueError(f"{argument}: must be a name, or a mapping with a name and options")
    return found


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor, head: str) -> int:
    """Outputs of a network, in evaluation mode.

    Raises:
        ValueError: it does not take these inputs, or gives something else than the head says.
    """
    try:
        output = model.eval()(inputs)
    except Exception as error:  # whatever a stranger's forward raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: it does not take {described(inputs)}: {reason}") from None
    if head != "classes":
        _check_head(output, len(inputs), head)
    elif not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(inputs):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        hint = "; a module around it can return its .logits" if hasattr(output, "logits") else ""
        raise ValueError(
            f"model: it gives {what} for {len(inputs)} inputs; it must return logits "
            f"({len(inputs)}, C){hint}"
        )
    elif output.shape[1] < 2:
        raise ValueError(
            "model: it has a single output; a classifier has one for each of two or more classes; "
            "for regression say head='mse'"
        )
    if head == "classes" and are_probabilities(output):
        raise ValueError(
            "model: it gives probabilities; it must return logits: leave out the softmax"
        )
    if not output.isfinite().all():
        raise ValueError("model: it gives NaN or infinite outputs for the first validation samples")
    return OUTPUTS.get(head, output.shape[-1])


def _check_head(output: Any, samples: int, head: str) -> None:
    shapes = [(samples, 2)] if head == "gaussian" else [(samples, 1), (samples,)]
    what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if what not in shapes:
        means = "mean and logarithm of the variance" if head == "gaussian" else "the mean"
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(
            f"model: it gives {what} for {samples} inputs; with head={head!r} it must return "
            f"{means}, {wanted}"
        )
