"""Whole neurons and channels left out, and really removed (section 3.2.1, eq. 3.5).

A structured mask zeroes whole rows of a weight matrix: output neurons of a linear layer, output
channels of a convolution. What only such a unit feeds can go with it (its bias, its normalisation,
the matching columns of every layer that reads it), so the subnetwork is a smaller dense network.

Layers that write to the same place, such as all layers on one residual stream of a ResNet stage,
can only lose a unit together: one `Coupled` set. A grouped convolution loses whole groups: its unit
is a group of input channels together with the output channels computed from them, one channel if
it is depthwise. Of every set at least one unit is kept: a network cut in two is useless.

A removed unit must give zero in the masked network too. That holds for activations with f(0) = 0
(ReLU and most others, not sigmoid unless it scales something that is zero) and for normalisation
of each channel by itself (batch, not layer). `coupled_units` tries it out and refuses otherwise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ray_subnets.masks import Masks

Kept = dict[str, Tensor]
"""`Coupled.name` -> bool `(count,)`: True is a unit that stays."""

KINDS = frozenset({"neuron", "channel"})
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCER = (nn.Linear, *_CONV)
_PER_CHANNEL = (_BatchNorm, _InstanceNorm, nn.PReLU)
_VECTOR = 16  # float32 values in an AVX-512 register
_Atom = tuple[str, str, int]  # module or parameter name, "rows" or "columns", position


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


class _Components:
    """Connected positions of tensors: what must vanish together (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[_Atom, _Atom] = {}

    def find(self, atom: _Atom) -> _Atom:
        root = atom
        while (above := self.parent.setdefault(root, root)) != root:
            root = above
        while (above := self.parent[atom]) != root:
            self.parent[atom], atom = root, above
        return root

    def join(self, a: _Atom, b: _Atom) -> None:
        self.parent[self.find(a)] = self.find(b)


def _refuse(model: nn.Module, reason: object) -> ValueError:
    what = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    return ValueError(
        f"structure: {type(model).__name__} does not fall into units ({what}); "
        "use structure: weight"
    )


def _trace(model: nn.Module, x: Tensor) -> tuple[_Components, set[_Atom]]:
    """Which positions vanish together, and those that the network's output shows."""
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad():
        # What it warns about are guesses; a wrong guess is found by trying.
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, x, forward_fn=lambda network, inputs: network(inputs), verbose=False
        )
    modules = {id(module): name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    components, shown = _Components(), set()
    for name, module in model.named_modules():
        if not isinstance(module, _PRODUCER) or module not in graph.module2node:
            continue
        outputs = module.weight.shape[0]
        if isinstance(module, _CONV) and module.groups > 1:
            for i in range(outputs):  # rows of one group go together
                group = (name, "columns", i * module.groups // outputs)
                components.join((name, "rows", i), group)
        elif all((name, "rows", i) in components.parent for i in range(outputs)):
            continue  # met from another layer
        prune = graph.get_pruner_of_module(module).prune_out_channels
        for item in graph.get_pruning_group(module, prune, list(range(outputs))):
            node = item.dep.target
            target = node.module
            rows = item.dep.handler == graph.get_pruner_of_module(target).prune_out_channels
            if rows and not node.outputs:  # the last node
                shown |= {(name, "rows", int(root)) for root in item.root_idxs}
            found = modules.get(id(target), parameters.get(id(target)))
            if found is None:  # an operation without parameters
                continue
            divisor = _check_target(found, target, rows)
            for position, root in zip(item.idxs, item.root_idxs, strict=True):
                atom = (found, "rows" if rows else "columns", int(position) // divisor)
                components.join(atom, (name, "rows", int(root)))
    return components, shown


def _check_target(name: str, target: Any, rows: bool) -> int:
    """How many neighbouring positions make one unit here: several in a grouped convolution's input.

    Raises:
        ValueError: something that cannot lose single units.
    """
    if isinstance(target, _CONV) and target.groups > 1 and not rows:
        return target.in_channels // target.groups
    depthwise = isinstance(target, _CONV) and 1 < target.groups == target.out_channels
    if depthwise and target.in_channels != target.out_channels:
        pass  # several inputs for an output: the tracer takes positions of one for the other
    elif isinstance(target, nn.Parameter):
        if target.dim() and target.numel() == target.shape[0]:
            return 1
    elif isinstance(target, (*_PRODUCER, *_PER_CHANNEL)) or not list(target.parameters()):
        return 1
    raise ValueError(f"{name}, {type(target).__name__}, cannot lose single units")


def coupled_units(
    model: nn.Module, input_shape: Sequence[int], *, classifier: bool = False
) -> list[Coupled]:
    """The removable units of a network, in registration order of their first producing layer.

    The network's outputs are never removable; neither are, unless `classifier` is set, the rows of
    the last convolution or linear layer (which mostly are the outputs, see `masks.maskable`). A set
    of one unit is left out: one must stay. Costs a trace and three forward passes of one random
    sample, on the CPU in double precision; to be called once per architecture.

    Args:
        input_shape: of one sample, without the batch.

    Raises:
        ValueError: the network cannot be traced, shares weights between layers, nothing is
            removable, or the small network would differ from the masked one.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(model.parameters())):
        raise _refuse(model, "layers share weights")
    twin = copy.deepcopy(model).cpu().double().requires_grad_(True).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *input_shape, generator=generator, dtype=torch.float64)
    try:
        components, shown = _trace(twin, x)
        units = _sets(twin, components, shown, classifier)
    except Exception as error:  # the tracer raises whatever its guesses run into
        raise _refuse(model, error) from None
    if not units:
        raise _refuse(model, "nothing is removable")
    _try_out(model, twin, x, units, generator)
    return units


def _sets(
    model: nn.Module, components: _Components, shown: set[_Atom], classifier: bool
) -> list[Coupled]:
    """Connected positions -> units -> sets with the same first producing layer."""
    producers = [name for name, module in model.named_modules() if isinstance(module, _PRODUCER)]
    order = {name: i for i, name in enumerate(producers)}
    members: dict[_Atom, list[_Atom]] = {}
    for atom in list(components.parent):
        members.setdefault(components.find(atom), []).append(atom)
    sets: dict[int, list[tuple[int, list[_Atom]]]] = {}
    for atoms in members.values():
        made = [(order[n], i) for n, side, i in atoms if side == "rows" and n in order]
        fixed = any(atom in shown for atom in atoms)
        if made and not fixed and (classifier or all(n != len(order) - 1 for n, _ in made)):
            sets.setdefault(min(made)[0], []).append((min(made)[1], atoms))
    return [
        _coupled(model, producers[first], [atoms for _, atoms in sorted(found)])
        for first, found in sorted(sets.items())
        if len(found) > 1
    ]


def _coupled(model: nn.Module, first: str, units: list[list[_Atom]]) -> Coupled:
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    kinds = set()
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())}
    modules = dict(model.named_modules())
    owned: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for unit, atoms in enumerate(units):
        for name, side, position in atoms:
            owned.setdefault((name, side), []).append((position, unit))
    for (name, side), pairs in owned.items():
        module = modules.get(name)
        if side == "rows" and isinstance(module, _PRODUCER):
            kinds.add("neuron" if isinstance(module, nn.Linear) else "channel")
        if module is None:
            keys = [name]
        elif side == "columns":
            if isinstance(module, _CONV) and module.groups > 1:
                continue  # it loses whole groups: rows
            keys = [f"{name}.weight"]
        else:
            size = module.weight.shape[0] if isinstance(module, _PRODUCER) else None
            keys = [
                f"{name}.{key}"
                for key, tensor in (*module.named_parameters(), *module.named_buffers())
                if tensor.dim() and tensor.shape[0] > 1 and size in (None, tensor.shape[0])
            ]
        for key in keys:
            owner = torch.full((tensors[key].shape[0 if side == "rows" else 1],), -1)
            owner[[position for position, _ in pairs]] = torch.tensor([u for _, u in pairs])
            (rows if side == "rows" else columns)[key] = owner
    place = {name: i for i, name in enumerate(tensors)}
    return Coupled(
        name=f"{first}.weight",
        count=len(units),
        kinds=frozenset(kinds),
        rows=dict(sorted(rows.items(), key=lambda item: place[item[0]])),
        columns=dict(sorted(columns.items(), key=lambda item: place[item[0]])),
    )


@torch.no_grad()
def _try_out(
    model: nn.Module,
    twin: nn.Module,
    x: Tensor,
    units: Sequence[Coupled],
    generator: torch.Generator,
) -> None:
    """Remove half of the units and compare with masks, in double precision.

    The scale is the effect that removal has, so that a wrong answer shows in a deep network with
    initial weights too, whose output hardly depends on single units.

    Raises:
        ValueError: the answers differ, or a size is written into the network's code.
    """
    kept = draw_units(units, 0.5, generator)
    whole = twin(x)
    try:
        got = remove(twin, units, kept)(x)
    except Exception as error:
        raise _refuse(model, error) from None
    for name, mask in unit_masks(twin, units, kept).items():
        twin.get_parameter(name).mul_(mask)
    wanted = twin(x)
    effect = float((whole - wanted).abs().max())
    error_ = float((got - wanted).abs().max()) if got.shape == wanted.shape else float("inf")
    if not error_ <= 1e-6 * effect + 1e-13 * float(wanted.abs().max()):
        raise _refuse(model, "without its units it is not the masked network")


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
    rows = _keep(units, kept)[0]
    return {
        name: rows[name].view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
        for name, shape in shapes.items()
        if name in rows
    }


def _keep(units: Iterable[Coupled], kept: Kept) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
    rows, columns = _keep(units, kept)
    return {name: _slice(t, rows.get(name), columns.get(name)) for name, t in weights.items()}


def _slice(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A copy without some rows and columns, in the memory format of the original."""
    result = tensor.detach()
    for dim, stays in ((0, rows), (1, columns)):
        if stays is not None:
            result = result.index_select(dim, stays.nonzero().squeeze(1).to(tensor.device))
    # By strides: is_contiguous is true of both formats for a 1x1 convolution.
    last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
    format_ = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(result, memory_format=format_).copy_(result)


def remove(model: nn.Module, units: Iterable[Coupled], kept: Kept) -> nn.Module:
    """A new, smaller network that answers like the masked one; `model` is only read.

    The same in training mode, except for layers that draw random numbers (dropout), whose shape
    changes. Stays channels last where that is safe, see `channels_last_is_safe`.
    """
    rows, columns = _keep(units, kept)
    small = copy.deepcopy(model)
    for prefix, module in small.named_modules():
        before = module.weight.shape if isinstance(module, _PRODUCER) else None
        for table in (module._parameters, module._buffers):
            for key, tensor in list(table.items()):
                name = f"{prefix}.{key}" if prefix else key
                if tensor is None or not (name in rows or name in columns):
                    continue
                new = _slice(tensor, rows.get(name), columns.get(name))
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                setattr(module, key, new)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _CONV):
            assert before is not None
            outputs, inputs = module.weight.shape[:2]
            module.groups = module.groups * outputs // before[0] if module.groups > 1 else 1
            module.out_channels, module.in_channels = outputs, inputs * module.groups
        elif isinstance(module, (_BatchNorm, _InstanceNorm)):
            sized = module.weight if module.weight is not None else module.running_mean
            module.num_features = module.num_features if sized is None else len(sized)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
    return small if channels_last_is_safe(small) else small.to(memory_format=torch.contiguous_format)


def channels_last_is_safe(model: nn.Module) -> bool:
    """Whether channels last would not corrupt memory on CPUs.

    The weight gradient of a strided 1x1 convolution with fewer input channels than a vector
    register holds writes past its buffer in this format (oneDNN issue 6035, open; seen here with
    torch 2.15 as aborts and hangs).
    """
    return not any(
        isinstance(module, nn.Conv2d)
        and max(module.stride) > 1
        and max(module.kernel_size) == 1
        and module.in_channels // module.groups < _VECTOR
        for module in model.modules()
    )


class Constant(nn.Module):
    """What is left of a layer without weights: its bias at every output position, or zeros.

    No gradient flows to its input, where the masked layer passes on zeros: layers that only this
    one reads keep `grad` None.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, _PRODUCER)
        self.bias = layer.bias
        self.outputs = layer.weight.shape[0]
        self.window: list[tuple[int, int, int]] | None = None  # padding, reach, stride by dimension
        if not isinstance(layer, nn.Linear):
            spread = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
            same = layer.padding == "same"
            padding = (0,) * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
            self.window = [
                (dilation * (size - 1) if same else 2 * int(pad), dilation * (size - 1) + 1, stride)
                for (size, dilation, stride), pad in zip(spread, padding, strict=True)
            ]

    def forward(self, x: Tensor) -> Tensor:
        """Shaped as the layer's output. A real tensor, not a view: what follows may write to it."""
        if self.window is None:
            shape, ones = (*x.shape[:-1], self.outputs), 0
        else:
            ones = len(self.window)
            sizes = [
                (side + pad - reach) // stride + 1
                for side, (pad, reach, stride) in zip(x.shape[-ones:], self.window, strict=True)
            ]
            shape = (*x.shape[: -ones - 1], self.outputs, *sizes)
        zeros = x.new_zeros(shape)
        return zeros if self.bias is None else zeros + self.bias.view(-1, *[1] * ones)


def remove_layers(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A new network where the layers with these weights are `Constant`; `model` is only read.

    Equals the network whose masks leave nothing of these weights, at no cost for them. Biases stay
    under their names; the weights are gone from the state dict.

    Raises:
        ValueError: a name is not the weight of a linear or convolution layer.
    """
    small = copy.deepcopy(model)
    for name in names:
        path, _, key = name.rpartition(".")
        layer = dict(small.named_modules()).get(path)
        if key != "weight" or not path or not isinstance(layer, _PRODUCER):
            raise ValueError(f"{name}: is not the weight of a linear or convolution layer")
        for parent in list(small.modules()):
            for child, module in list(parent.named_children()):
                if module is layer:  # also under its other names
                    setattr(parent, child, Constant(layer))
    return small


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
        which = torch.repeat_interleave(torch.tensor([one.count for one in some], dtype=torch.int64))
        stays = torch.zeros(total, dtype=torch.bool)
        for index in range(len(some)):  # the best of each set come first
            stays[order[which[order] == index][:1]] = True
        rest = order[~stays[order]]
        stays[rest[: max(0, round(density * total) - len(some))]] = True
        for one, part in zip(some, stays.split([one.count for one in some]), strict=True):
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
