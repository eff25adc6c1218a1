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
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ray_subnets.inputs import made_up
from ray_subnets.units import (
    KINDS,
    Coupled,
    Kept,
    complement_units,
    cut,
    draw_units,
    scores,
    split_units,
    staying,
    take,
    unit_masks,
)

__all__ = [
    "KINDS",
    "Constant",
    "Coupled",
    "Kept",
    "channels_last_is_safe",
    "complement_units",
    "coupled_units",
    "draw_units",
    "remove",
    "remove_layers",
    "scores",
    "split_units",
    "take",
    "unit_masks",
]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCER = (nn.Linear, *_CONV)
_PER_CHANNEL = (_BatchNorm, _InstanceNorm, nn.PReLU)
_VECTOR = 16  # float32 values in an AVX-512 register
_Atom = tuple[str, str, int]  # module or parameter name, "rows" or "columns", position


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
    model: nn.Module,
    input_shape: Sequence[int],
    input_dtype: torch.dtype = torch.float32,
    *,
    classifier: bool = False,
) -> list[Coupled]:
    """The removable units of a network, in registration order of their first producing layer.

    The network's outputs are never removable; neither are, unless `classifier` is set, the rows of
    the last convolution or linear layer (which mostly are the outputs, see `masks.maskable`). A set
    of one unit is left out: one must stay. Costs a trace and a few forward passes of one random
    sample, on the CPU in double precision; to be called once per architecture.

    Args:
        input_shape, input_dtype: of one sample, without the batch.

    Raises:
        ValueError: the network cannot be traced, shares weights between layers, nothing is
            removable, or the small network would differ from the masked one.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(model.parameters())):
        raise _refuse(model, "layers share weights")
    twin = copy.deepcopy(model).cpu().double().requires_grad_(True).eval()
    generator = torch.Generator().manual_seed(0)
    kind = torch.float64 if input_dtype.is_floating_point else input_dtype
    x = made_up(1, input_shape, kind, generator)
    try:
        if not isinstance(twin(x), Tensor):
            raise TypeError("its output is not one tensor")
        components, shown = _trace(twin, x)
        units = _sets(twin, components, shown, classifier)
    except Exception as error:  # the tracer raises whatever its guesses run into
        raise _refuse(model, error) from None
    if not units:
        raise _refuse(model, "nothing is removable")
    _try_out(model, twin, x, units)
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
def _try_out(model: nn.Module, twin: nn.Module, x: Tensor, units: Sequence[Coupled]) -> None:
    """Remove half of the units, twice, and compare with masks, in double precision.

    The scale is the effect that removal has, so that a wrong answer shows in a deep network with
    initial weights too, whose output hardly depends on single units.

    Raises:
        ValueError: the answers differ, or a size is written into the network's code.
    """
    # The last halves: what cuts its channels at fixed places, or in equal parts, fails on these.
    last = {one.name: torch.arange(one.count) >= one.count // 2 for one in units}
    whole = twin(x)
    for kept in (last, draw_units(units, 0.5, torch.Generator().manual_seed(0))):
        try:
            got = remove(twin, units, kept)(x)
        except Exception as error:
            raise _refuse(model, error) from None
        masked = copy.deepcopy(twin)
        for name, mask in unit_masks(twin, units, kept).items():
            masked.get_parameter(name).mul_(mask)
        wanted = masked(x)
        effect, size = float((whole - wanted).abs().max()), float(wanted.abs().max())
        equal = got.shape == wanted.shape
        if not equal or not float((got - wanted).abs().max()) <= 1e-6 * effect + 1e-13 * size:
            raise _refuse(model, "without its units it is not the masked network")


def remove(model: nn.Module, units: Iterable[Coupled], kept: Kept) -> nn.Module:
    """A new, smaller network that answers like the masked one; `model` is only read.

    The same in training mode, except for layers that draw random numbers (dropout), whose shape
    changes. Stays channels last where that is safe, see `channels_last_is_safe`.
    """
    rows, columns = staying(units, kept)
    small = copy.deepcopy(model)
    for prefix, module in small.named_modules():
        before = module.weight.shape if isinstance(module, _PRODUCER) else None
        for table in (module._parameters, module._buffers):
            for key, tensor in list(table.items()):
                name = f"{prefix}.{key}" if prefix else key
                if tensor is None or not (name in rows or name in columns):
                    continue
                new = cut(tensor, rows.get(name), columns.get(name))
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
    if not channels_last_is_safe(small):
        small.to(memory_format=torch.contiguous_format)
    return small


def channels_last_is_safe(model: nn.Module) -> bool:
    """Whether convolutions of images are all there are, and channels last would not corrupt memory
    on CPUs.

    The weight gradient of a strided 1x1 convolution with fewer input channels than a vector
    register holds writes past its buffer in this format (oneDNN issue 6035, open; seen here with
    torch 2.15 as aborts and hangs).
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    if any(tensor.dim() == 5 for tensor in tensors):  # torch refuses them
        return False
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
        self._shape = layer.weight.shape
        # Goes where the network goes.
        self.register_buffer("_zero", layer.weight.detach().new_zeros(()), persistent=False)
        self.window: list[tuple[int, int, int]] | None = None  # padding, reach, stride by dimension
        if not isinstance(layer, nn.Linear):
            spread = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
            same = layer.padding == "same"
            padding = (0,) * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
            self.window = [
                (dilation * (size - 1) if same else 2 * int(pad), dilation * (size - 1) + 1, stride)
                for (size, dilation, stride), pad in zip(spread, padding, strict=True)
            ]

    @property
    def weight(self) -> Tensor:
        """Zeros, for modules that do not call the layer but take its weight, as attention does."""
        return self.get_buffer("_zero").expand(self._shape)

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
    modules = dict(small.named_modules())
    constants: dict[nn.Module, nn.Module] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        layer = modules.get(path)
        if key != "weight" or not path or not isinstance(layer, _PRODUCER):
            raise ValueError(f"{name}: is not the weight of a linear or convolution layer")
        constants[layer] = Constant(layer)
    for parent in modules.values():
        for child, module in list(parent._modules.items()):  # a layer may have several names
            if module in constants:
                setattr(parent, child, constants[module])
    return small
