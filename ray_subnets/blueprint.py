"""A network without its weights: all that is needed, beside a state dict, to have it again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ray_subnets.inputs import made_up


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile` or DataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check(model: Any) -> nn.Module:
    """A network that children can be made of, unwrapped.

    Raises:
        ValueError: it is not, and why.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: TorchScript cannot be copied; give the module it was made from")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ValueError(f"model: {name} has no shape yet; call the model on a batch first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"model: {name} is {tensor.dtype}; use model.float()")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: its state {name!r} is a {type(value).__name__}; only tensors can be kept"
            )
    if not any(True for _ in model.parameters()):
        raise ValueError("model: it has no parameters")
    return model


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in which some tensors are replaced, by `id`."""
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: it cannot be copied ({reason})") from None


@dataclass(frozen=True)
class Blueprint:
    """A network whose weights and saved buffers have shapes and types but no numbers.

    A few kilobytes, whatever the size of the network. Buffers that a state dict leaves out keep
    their numbers. Frozen weights stay frozen, unless all are.
    """

    outline: nn.Module
    """on the meta device"""

    @staticmethod
    def of(model: nn.Module) -> Blueprint:
        """Of a network on any device, which is neither changed nor copied.

        Raises:
            ValueError: it cannot be copied.
        """
        trained = any(parameter.requires_grad for parameter in model.parameters())
        saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            empty = torch.empty_like(parameter, device="meta", requires_grad=False)
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad or not trained)
        for buffer in model.buffers():
            kept = torch.empty_like(buffer, device="meta") if id(buffer) in saved else None
            memo[id(buffer)] = buffer.detach().cpu().clone() if kept is None else kept
        return Blueprint(_copied(model, memo))

    @staticmethod
    def tried(
        model: nn.Module, input_shape: Sequence[int], input_dtype: torch.dtype = torch.float32
    ) -> Blueprint | None:
        """Of a network whose copy computes what it does; None: of another kind.

        A function that holds on to the module it was made in still asks that one when it is copied.

        Args:
            model: its weights are changed while it is tried.
            input_shape, input_dtype: of one sample.
        """
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        nothing = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        device, training = next(iter(state.values())).device, model.training
        try:
            made = Blueprint.of(model)
            other = made.build().to(device)
            other.load_state_dict(state)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                x = made_up(2, input_shape, input_dtype, torch.Generator().manual_seed(0))
                expected = model.eval()(x.to(device))
                model.load_state_dict(nothing)
                same = torch.equal(expected, other.eval()(x.to(device)))
        except (ValueError, RuntimeError, TypeError):
            return None
        finally:
            model.load_state_dict(state)
            model.train(training)
        return made if same else None

    def build(self) -> nn.Module:
        """A network of zeros, on the CPU; load a state dict into it."""
        memo: dict[int, Any] = {}
        for parameter in self.outline.parameters():
            zeros = torch.zeros_like(parameter, device="cpu", requires_grad=False)
            memo[id(parameter)] = nn.Parameter(zeros, parameter.requires_grad)
        for buffer in self.outline.buffers():
            if buffer.is_meta:
                memo[id(buffer)] = torch.zeros_like(buffer, device="cpu")
        return _copied(self.outline, memo)


def describe(model: nn.Module) -> str:
    """What kind of network it is: `torchvision.models.resnet.ResNet`."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
