"""Which units: choices of whole neurons and channels (section 3.2.1, eq. 3.5), and their masks.

Pure tensors: what the units of a network are says `structured.coupled_units`. Draws use an explicit
CPU generator, integers and 24-bit uniform numbers only, as in `masks`. Of every set at least one
unit is kept: a network cut in two is useless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ray_subnets.masks import Masks

Kept = dict[str, Tensor]
"""`Coupled.name` -> bool `(count,)`: True is a unit that stays."""

KINDS = frozenset({"neuron", "channel"})


@dataclass(frozen=True)
class Coupled:
    """Units of layers that can only lose them together. -1 in an owner: not of this set."""

    name: str
    """weight of the first layer, by registration, that produces the units"""
    count: int
    """number of units, at least 2"""
    kinds: frozenset[str]
    """`neuron` (linear) and/or `channel` (convolution) of the producing layers"""
    rows: Mapping[str, Tensor]
    """parameter or buffer -> owner: the unit of each position of dim 0, int64 `(size(0),)`"""
    columns: Mapping[str, Tensor]
    """consuming weight -> owner: the unit of each position of dim 1, int64 `(size(1),)`"""


def scores(weights: Mapping[str, Tensor], units: Iterable[Coupled]) -> dict[str, Tensor]:
    """Mean |w| over the weight rows of each unit, float64 `(count,)`: the magnitude criterion.

    Biases and normalisation parameters do not count.
    """
    result = {}
    for one in units:
        total = torch.zeros(one.count, dtype=torch.float64)
        numbers = torch.zeros(one.count, dtype=torch.float64)
        for name, owner in one.rows.items():
            if weights[name].dim() < 2:
                continue
            mine = owner >= 0
            sums = weights[name].detach().cpu().double().abs().flatten(1).sum(1)
            total.index_add_(0, owner[mine], sums[mine])
            size = float(prod(weights[name].shape[1:]))
            numbers.index_add_(0, owner[mine], torch.full((int(mine.sum()),), size).double())
        result[one.name] = total / numbers
    return result


def draw_units(
    units: Sequence[Coupled],
    density: float,
    generator: torch.Generator,
    *,
    kinds: frozenset[str] = KINDS,
    scope: str = "local",
    draw: str = "exact",
    criterion: str = "random",
    scores: Mapping[str, Tensor] | None = None,
) -> Kept:
    """Which units stay. At least one of each set always does.

    Args:
        density: fraction of the units that stays. `exact`: `round(density * count)` of each set
            (`local`) or of all sets together (`global`). `bernoulli`: each by itself, in either
            scope; the luckiest one where a set would be empty.
        kinds: sets with units of another kind are kept whole.
        criterion: `random`, or `magnitude`: those with the largest `scores`, the first of equals;
            nothing is drawn.
        scores: from `scores`, `(count,)` for each set; for `magnitude` only.
    """
    assert scope in ("local", "global")
    assert draw in ("exact", "bernoulli")
    assert criterion in ("random", "magnitude")
    kept = {one.name: torch.ones(one.count, dtype=torch.bool) for one in units}
    drawn = [one for one in units if one.kinds <= kinds]
    if draw == "bernoulli" and criterion == "random":
        for one in drawn:
            luck = torch.rand(one.count, generator=generator)
            kept[one.name] = luck < max(density, float(luck.min()) + 2**-24)
        return kept
    for some in [drawn] if scope == "global" else [[one] for one in drawn]:
        total = sum(one.count for one in some)
        if criterion == "magnitude":
            assert scores is not None
            value = torch.cat([scores[one.name] for one in some]) if some else torch.empty(0)
            order = value.sort(descending=True, stable=True).indices
        else:
            order = torch.randperm(total, generator=generator)
        counts = [one.count for one in some]
        which = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        stays = torch.zeros(total, dtype=torch.bool)
        for index in range(len(some)):  # the best of each set come first
            stays[order[which[order] == index][:1]] = True
        rest = order[~stays[order]]
        stays[rest[: max(0, round(density * total) - len(some))]] = True
        for one, part in zip(some, stays.split(counts), strict=True):
            kept[one.name] = part.clone()
    return kept


def split_units(
    units: Sequence[Coupled],
    parts: int,
    generator: torch.Generator,
    *,
    kinds: frozenset[str] = KINDS,
) -> list[Kept]:
    """`parts` disjoint choices that together hold every unit once (eq. 3.10, 3.11 for units).

    Within a set, sizes differ by at most one. Sets with units of another kind than `kinds` are
    whole in every part.

    Raises:
        ValueError: a set has fewer units than there are parts.
    """
    result: list[Kept] = [{} for _ in range(parts)]
    for one in units:
        if one.kinds <= kinds and one.count < parts:
            raise ValueError(
                f"partition: {one.name} has {one.count} units, too few for {parts} parts; "
                "use fewer parts or structure: weight"
            )
        order = torch.randperm(one.count, generator=generator) if one.kinds <= kinds else None
        for part, kept in enumerate(result):
            kept[one.name] = torch.ones(one.count, dtype=torch.bool)
            if order is not None:
                kept[one.name].zero_()
                start, stop = (one.count * edge // parts for edge in (part, part + 1))
                kept[one.name][order[start:stop]] = True
    return result


def complement_units(
    kept: Kept, units: Iterable[Coupled] = (), *, kinds: frozenset[str] = KINDS
) -> Kept:
    """The units that `kept` leaves out (eq. 3.10); sets of other `kinds`, by `units`, stay whole.

    Raises:
        ValueError: a set would be left without units.
    """
    whole = {one.name for one in units if not one.kinds <= kinds}
    for name, stays in kept.items():
        if name not in whole and bool(stays.all()):
            raise ValueError(
                f"partition: the complement keeps no unit of {name}; use a density below 1 that "
                "leaves some out, or structure: weight"
            )
    return {name: stays.clone() if name in whole else ~stays for name, stays in kept.items()}


def unit_masks(
    shapes: nn.Module | Mapping[str, torch.Size], units: Iterable[Coupled], kept: Kept
) -> Masks:
    """Bool masks of every parameter with rows in `units`: weights, biases, norm weights and biases.

    `W o M` makes the removed units zero: eq. 3.5's matrix with rows of zeros.

    Args:
        shapes: a network, or names and shapes of its parameters; buffers are not masked.
    """
    if isinstance(shapes, nn.Module):
        shapes = {name: parameter.shape for name, parameter in shapes.named_parameters()}
    rows = staying(units, kept)[0]
    return {
        name: rows[name].view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
        for name, shape in shapes.items()
        if name in rows
    }


def staying(units: Iterable[Coupled], kept: Kept) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which positions of dim 0 and of dim 1 stay, by tensor name: bool `(size,)`."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for one in units:
        # Position -1, "not of this set", finds the True appended at the end.
        stays = torch.cat([kept[one.name], torch.ones(1, dtype=torch.bool)])
        for owners, result in ((one.rows, rows), (one.columns, columns)):
            for name, owner in owners.items():
                result[name] = result.get(name, True) & stays[owner]
    return rows, columns


def take(weights: Mapping[str, Tensor], units: Iterable[Coupled], kept: Kept) -> dict[str, Tensor]:
    """State dict of the full network -> state dict of `remove(model, units, kept)`: new tensors."""
    rows, columns = staying(units, kept)
    return {name: cut(t, rows.get(name), columns.get(name)) for name, t in weights.items()}


def cut(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A copy without some rows and columns, in the memory format of the original."""
    result = tensor.detach()
    for dim, stays in ((0, rows), (1, columns)):
        if stays is not None:
            result = result.index_select(dim, stays.nonzero().squeeze(1).to(tensor.device))
    # By strides: is_contiguous is true of both formats for a 1x1 convolution.
    last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
    format_ = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(result, memory_format=format_).copy_(result)
