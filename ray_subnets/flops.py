"""What a network costs, counted by torch's own counter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """One forward pass of one sample, in FLOPs (2 per multiply-accumulate)."""

    total: int
    by_weight: Mapping[str, int]
    """FLOPs of the layer that owns this weight"""
    parameters: int
    """weights and biases of the dense network"""
    sizes: Mapping[str, int]
    """elements of each parameter"""

    def nonzero(self, density: Mapping[str, float]) -> float:
        """FLOPs if zeros cost nothing; `density` gives each masked weight's kept fraction."""
        return self.total - sum(
            self.by_weight.get(name, 0) * (1 - kept) for name, kept in density.items()
        )

    def nonzero_parameters(self, density: Mapping[str, float]) -> float:
        """Parameters left when each masked weight keeps its fraction."""
        return self.parameters - sum(
            self.sizes[name] * (1 - kept) for name, kept in density.items()
        )


def forward_cost(
    model: nn.Module, input_shape: Sequence[int], input_dtype: torch.dtype = torch.float32
) -> Cost:
    """Count one forward pass in evaluation mode. Normalisation and activations are not counted."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with (
            torch.no_grad(),
            _unfused(),
            _attention(model) as projections,
            FlopCounterMode(display=False) as counter,
        ):
            model(torch.zeros(1, *input_shape, dtype=input_dtype, device=device))
    finally:
        model.train(training)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_weight: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and path:  # one that several layers share costs each
            name = names[id(weight)]
            spent = sum(counts.get(f"{root}.{path}", {}).values())
            by_weight[name] = by_weight.get(name, 0) + spent
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Cost(counter.get_total_flops(), by_weight | projections, sum(sizes.values()), sizes)


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention and recurrent layers as operations that the counter knows, and not as one each that
    it does not."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    attention, others = torch.backends.mha.get_fastpath_enabled(), [b.enabled for b in backends]
    torch.backends.mha.set_fastpath_enabled(False)
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        for backend, enabled in zip(backends, others, strict=True):
            backend.enabled = enabled


@contextmanager
def _attention(model: nn.Module) -> Iterator[dict[str, int]]:
    """FLOPs of the projections of `nn.MultiheadAttention`, by weight: it multiplies with them
    itself, and not by a layer that owns them. Filled as the model is called."""
    found: dict[str, int] = {}

    def count(name: str, module: Any, given: Any, named: Mapping[str, Any]) -> None:
        inputs = inspect.signature(nn.MultiheadAttention.forward).bind(None, *given, **named)
        q, k, v = (inputs.arguments[one].shape[:-1].numel() for one in ("query", "key", "value"))
        square = module.embed_dim**2
        if module.in_proj_weight is not None:
            costs = {"in_proj_weight": (q + k + v) * square}
        else:
            costs = {
                "q_proj_weight": q * square,
                "k_proj_weight": k * module.kdim * module.embed_dim,
                "v_proj_weight": v * module.vdim * module.embed_dim,
            }
        for weight, products in {**costs, "out_proj.weight": q * square}.items():
            key = f"{name}.{weight}" if name else weight
            found[key] = found.get(key, 0) + 2 * products

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                hook = partial(count, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        yield found


def training_flops(forward: float, images: int) -> float:
    """FLOPs of training on `images` images: forward plus twice that for backward."""
    return 3 * forward * images
