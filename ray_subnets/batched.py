"""Members that differ in their numbers only, called together: one pass over stacked weights.

Shape legend: K members, N samples, C classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

WEIGHTS, SAMPLES, SAMPLES_THREADED = 250_000, 1, 4
"""up to which it is faster on a CPU, with one thread or more; see `faster`"""


def faster(device: torch.device, weights: int, samples: int, threads: int | None = None) -> bool:
    """Is one call of all members the faster way? A rule, so that the same call gives the same bits.

    From `python -m analysis.benchmarks.members`: on a CPU it wins only where a member is so small,
    and asked for so little, that starting its operations is most of the work. Eight LeNet-S, one
    thread: 0.85 of the loop's time for one sample, 1.1 for two; two threads: 0.6 to 0.7 for one and
    two samples, 0.8 for four, 1.3 for 16. ResNet-18: 1.1 to 2.0. Of large ones asked for one sample
    some win and more lose (WRN-28-10 0.9), which no rule tells apart: `Ensemble.choose_batched`
    measures. Convolutions of K sets of weights are grouped ones, which CPUs do slowly. On GPUs it
    was not measured, and members are asked one by one unless `batched=True` says otherwise.

    Args:
        weights: of one member.
        threads: torch's; default: as many as it has now.
    """
    most = SAMPLES if (threads or torch.get_num_threads()) == 1 else SAMPLES_THREADED
    return device.type == "cpu" and weights <= WEIGHTS and samples <= most


class Unlike(ValueError):
    """Networks that cannot be called together."""


class Batched:
    """All members in one call of `torch.func`.

    Their tensors are put side by side, and the members' own become parts of that, so that nothing
    is in memory twice and both ways of asking see the same weights.

    Args:
        members: networks of one kind: the same code and settings, other weights and buffers.

    Raises:
        Unlike: their tensors have other names or shapes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        tensors = [_tensors(member) for member in members]
        for other in tensors[1:]:
            if _outline(other) != _outline(tensors[0]):
                raise Unlike("members of different shapes, as with units that were removed")
        self._one = copy.deepcopy(members[0]).to("meta")  # before it is a part of all
        self._stacked = {name: _stack([own[name] for own in tensors]) for name in tensors[0]}
        self._members = tuple(members)
        self._places = []
        for i, own in enumerate(tensors):
            for name, tensor in own.items():
                tensor.data = self._stacked[name][i]
        for member in members:
            for module in member.modules():
                for held in (module._parameters, module._buffers):
                    for name, part in held.items():
                        if part is not None:
                            self._places.append((held, name, part.data_ptr()))

    def current(self, members: Iterable[nn.Module]) -> bool:
        """Are these still the members and their tensors? Not once one was moved or replaced."""
        if any(one is not other for one, other in zip(members, self._members, strict=True)):
            return False
        for held, name, place in self._places:
            part = held.get(name)
            if part is None or part.data_ptr() != place:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs `(N, *shape)` -> logits `(K, N, C)`.

        Raises:
            Unlike: torch cannot do this network for many weights at once.
        """

        def one(tensors: dict[str, Tensor]) -> Tensor:
            return functional_call(self._one, tensors, (x,))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that fall back to a loop
                answer: Tensor = vmap(one)(self._stacked)
        except (RuntimeError, ValueError, TypeError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Unlike(f"torch.func cannot call the network for many weights ({why})") from None
        return answer


def _tensors(member: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers; what is shared by two layers once."""
    return {**dict(member.named_parameters()), **dict(member.named_buffers())}


def _outline(tensors: dict[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """`(K, *shape)`, each part in the memory order that it had, so that it computes as before."""
    first, count = tensors[0], len(tensors)
    strides = torch.empty_like(first, device="meta").stride()
    room = torch.empty(count * first.numel(), dtype=first.dtype, device=first.device)
    stacked = room.as_strided((count, *first.shape), (first.numel(), *strides))
    for part, tensor in zip(stacked, tensors, strict=True):
        part.copy_(tensor.detach())
    return stacked
