"""What a network costs, counted by torch's own counter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def forward_cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Count one forward pass in evaluation mode. Normalisation and activations are not counted."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_shape, device=device))
    finally:
        model.train(training)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    by_weight = {
        f"{name}.weight": sum(counts.get(f"{root}.{name}", {}).values())
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and name
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Cost(counter.get_total_flops(), by_weight, sum(sizes.values()), sizes)


def training_flops(forward: float, images: int) -> float:
    """FLOPs of training on `images` images: forward plus twice that for backward."""
    return 3 * forward * images
