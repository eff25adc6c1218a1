"""What happens to them, chapter 5: prune a subnetwork and hold the pruned weights at zero.

`W' = W o M` (eq. 5.2). Masks stay apart from the network, as a dict by parameter name: nothing is
renamed, hooked or copied, so `deepcopy`, `state_dict` and compiled models work unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def prune(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights `W o M` (eq. 5.2); tensors without a mask are copied."""
    return {
        name: torch.where(masks[name], weight, 0) if name in masks else weight.clone()
        for name, weight in weights.items()
    }


@torch.no_grad()
def hold_zero_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set masked-out weights back to zero, in place: called after every optimizer step.

    `masks` have the dtype of `weights` (one fused multiplication for all layers). A weight that
    starts at zero, gets no weight decay from zero and is zeroed after each step never acts.
    """
    torch._foreach_mul_(list(weights), list(masks))


def pack(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a sparse child needs on disk: surviving values only, `(n_kept,)` for a masked tensor.

    The mask itself is not stored: the child's recipe draws it again.
    """
    return {
        name: weight[masks[name]] if name in masks else weight.clone()
        for name, weight in weights.items()
    }


def unpack(packed: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `pack`: full-shape weights with zeros where the mask is zero.

    Raises:
        ValueError: a tensor does not hold as many values as its mask has ones.
    """
    weights = {}
    for name, values in packed.items():
        if name not in masks:
            weights[name] = values.clone()
            continue
        ones = int(masks[name].sum())
        if values.shape != (ones,):
            raise ValueError(
                f"{name}: {tuple(values.shape)} values stored for a mask with {ones} ones; "
                "the file does not belong to this recipe"
            )
        weights[name] = torch.zeros(masks[name].shape, dtype=values.dtype)
        weights[name][masks[name]] = values
    return weights
