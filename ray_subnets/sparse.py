"""What happens to them, chapter 5: prune a subnetwork and hold the pruned weights at zero.

`W' = W o M` (eq. 5.2). Masks stay apart from the network, as a dict by parameter name: nothing is
renamed, hooked or copied, so `deepcopy`, `state_dict` and compiled models work unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ray_subnets.masks import Masks


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


def removal_order(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """In which order weights outside `masks` go: ranks in (0, 1] at random, 0 for the others.

    The weights of a layer with rank at most t are its fraction t, so that pruning in steps removes
    equal numbers and ends at the mask.
    """
    order = {}
    generator = torch.Generator().manual_seed(seed)
    for name, mask in masks.items():
        outside = (~mask).view(-1).nonzero().squeeze(1)
        n = len(outside)
        rank = torch.zeros(mask.numel(), dtype=torch.float64)
        rank[outside] = (torch.randperm(n, generator=generator).double() + 1) / max(n, 1)
        order[name] = rank.view(mask.shape)
    return order


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bit per weight, for masks that no recipe draws again: `NAME.kept`, `(n / 8,)` uint8."""
    return {
        f"{name}.kept": torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy()))
        for name, mask in masks.items()
    }


def unpack_masks(packed: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Masks:
    """Inverse of `pack_masks`.

    Raises:
        ValueError: a mask is missing or has another size.
    """
    masks = {}
    for name, shape in shapes.items():
        bits = packed.get(f"{name}.kept")
        if bits is None or bits.numel() != -(-shape.numel() // 8):
            raise ValueError(f"{name}: no mask of {shape.numel()} bits is stored")
        flat = np.unpackbits(bits.numpy(), count=shape.numel()).astype(np.bool_)
        masks[name] = torch.from_numpy(flat).view(shape)
    return masks


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
