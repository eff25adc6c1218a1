"""Many networks, one answer: combining outputs, and the `nn.Module` that a user keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ray_subnets.answers import Opinions, Prediction
from ray_subnets.data import Preprocess
from ray_subnets.metrics import scaled, temperature_of


def combine(
    logits: Tensor, how: str = "probabilities", weights: Sequence[float] | None = None
) -> Tensor:
    """Predictive probabilities `(N, C)`, float64, of members' logits `(K, N, C)`.

    probabilities: mean of the members' softmax (section 3.2.5; the default everywhere).
    weighted: the same with `weights` `(K,)`, which are made to sum to one (eq. 3.24).
    logits: softmax of the mean logits (algorithms 1-3 as printed).
    vote: share of members whose largest output is the class (eq. 3.23); its NLL is rarely
    meaningful.
    """
    outputs = logits.double()
    if how == "probabilities":
        return outputs.softmax(2).mean(0)
    if how == "weighted":
        assert weights is not None
        w = torch.tensor(weights, dtype=torch.float64, device=outputs.device)
        return torch.tensordot(w / w.sum(), outputs.softmax(2), 1)
    if how == "logits":
        return outputs.mean(0).softmax(1)
    assert how == "vote", how
    votes = torch.nn.functional.one_hot(outputs.argmax(2), outputs.shape[2])
    return votes.double().mean(0)


class Mean:
    """Mean of float64 tensors of one shape that come one at a time.

    To the last bit what torch gives for all of them at once, `torch.stack(all).mean(0)`, in the
    memory of a few of them. For that it adds in torch's order: runs of 16, then runs of 16 of
    those sums, and so on; columns at the end that do not fill its vectors go another way, so
    the last ones are kept and left to torch.
    """

    def __init__(self) -> None:
        self._shape: torch.Size | None = None
        self._sums: list[Tensor] = []  # of the run at hand, of the run of runs at hand, ...
        self._ends: list[Tensor] = []
        self.count = 0

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1)
        cut = max(0, len(flat) // 64 - 1) * 64
        self._shape = x.shape
        self._ends.append(flat[cut:].clone())
        self.count += 1
        carry, full, level = flat[:cut], self.count, 0
        while True:
            if level == len(self._sums):
                self._sums.append(carry.clone())
            else:
                self._sums[level] += carry
            if full % 16:
                return
            carry, self._sums[level] = self._sums[level], torch.zeros_like(carry)
            full, level = full // 16, level + 1

    def mean(self) -> Tensor:
        """Of what was added until now."""
        assert self._shape is not None
        total = self._sums[0].clone()
        for other in self._sums[1:]:
            total += other
        end = torch.stack(self._ends).mean(0)
        return torch.cat([total / self.count, end]).reshape(self._shape)


class Running:
    """`combine` for members that come one at a time.

    The same bits as `combine`, but for `weighted`, whose last digit can differ: sums run in
    another order there.
    """

    def __init__(self, how: str) -> None:
        assert how in ("probabilities", "weighted", "logits", "vote"), how
        self._how, self._mean, self._weights = how, Mean(), 0.0

    def add(self, logits: Tensor, weight: float = 1.0) -> None:
        """A member's `(N, C)`; `weight` counts for `weighted` only."""
        outputs = logits.double()
        if self._how in ("probabilities", "weighted"):
            outputs = outputs.softmax(1)
        elif self._how == "vote":
            outputs = torch.nn.functional.one_hot(outputs.argmax(1), outputs.shape[1]).double()
        self._mean.add(outputs * weight if self._how == "weighted" else outputs)
        self._weights += weight

    def value(self) -> Tensor:
        """Probabilities `(N, C)` of those added until now, float64."""
        mean = self._mean.mean()
        if self._how == "weighted":
            return mean * (self._mean.count / self._weights)
        return mean.softmax(1) if self._how == "logits" else mean


def right_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the right class, `(N,)` float64, from `(N, C)` logits and `(N,)` labels."""
    return logits.double().softmax(1)[torch.arange(len(labels)), labels]


def greedy(right: Tensor, count: int | None = None) -> list[tuple[int, float]]:
    """Forward selection by the NLL of the mean of probabilities.

    Starts with the best network and adds, one at a time, the one that makes the ensemble's NLL
    smallest; stops at `count` members or, without it, when none makes it smaller. Of equal ones
    the first is taken.

    Args:
        right: `right_class` of the candidates on validation data, `(K, N)`.

    Returns:
        (index, NLL of the ensemble with it) in the order of joining.
    """
    total, left = torch.zeros_like(right[0]), list(range(len(right)))
    trace: list[tuple[int, float]] = []
    while left and len(trace) < (count if count is not None else len(right)):
        tiny = torch.finfo(torch.float64).tiny
        mean = (total + right[left]) / (len(trace) + 1)
        nll = -mean.clamp_min(tiny).log().mean(1)
        best = int(nll.argmin())
        if count is None and trace and float(nll[best]) >= trace[-1][1]:
            break
        total = total + right[left[best]]
        trace.append((left.pop(best), float(nll[best])))
    return trace


class Members(nn.Module):
    """Members that are made when they are asked and dropped after: one at a time in memory.

    Args:
        make: number of a member -> the network, on the CPU.
        numbers: of those that are here.
    """

    def __init__(self, make: Callable[[int], nn.Module], numbers: Sequence[int]) -> None:
        super().__init__()
        self._make, self._numbers = make, tuple(numbers)
        self.register_buffer("_here", torch.empty(0), persistent=False)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> nn.Module:
        network = self._make(self._numbers[index]).to(self.get_buffer("_here").device)
        return network.eval().requires_grad_(False)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int]) -> Members:
        """Some of them."""
        return Members(self._make, [self._numbers[index] for index in indices])


class Origin(Protocol):
    """Where an ensemble came from: it can be written from there."""

    def save(self, folder: Any, ids: Sequence[str], temperature: float | None) -> None:
        """Write the members `ids`, in this order, into a new folder (a path or a URI)."""


class Ensemble(nn.Module):
    """Networks that answer together; one of them may be several members.

    Call it with network inputs `(N, *shape)`: floating point as the networks were trained on, or
    uint8 images, which are scaled and normalised as in training. It returns probabilities
    `(N, C)` float32.

    Attributes:
        ids: of the members, in their order.
        temperature: fitted on validation data to the members' common answer; None: not fitted.
        calibrated: are answers scaled by it? By default they are not: which class is the most
            probable stays the same, and every table of a run is without.
        record: what was measured when it was made (the run's `result.json`), if that is known.
    """

    def __init__(
        self,
        members: Sequence[nn.Module] | Members,
        *,
        ids: Sequence[str],
        preprocess: Preprocess,
        combine: str = "probabilities",
        weights: Sequence[float] | None = None,
        temperature: float | None = None,
        calibrated: bool = False,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        assert len(members) == len(ids) > 0
        self.members = members if isinstance(members, Members) else nn.ModuleList(members)
        self.ids = tuple(ids)
        self.preprocess = preprocess
        self.combine = combine
        self.weights = tuple(weights) if weights is not None else None
        self.temperature = temperature
        self.calibrated = calibrated
        self.origin = origin
        self.record: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, x: Tensor) -> Tensor:
        """Every member's logits, `(K, N, C)`."""
        x = self.preprocess(x)
        answers = [member(x) for member in self.members]
        return torch.cat([one if one.dim() == 3 else one[None] for one in answers])

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(combine(self.logits(x), self.combine, self.weights)).float()

    def answer(self, probabilities: Tensor) -> Tensor:
        """The members' common `(N, C)`, scaled by the temperature if `calibrated`.

        Raises:
            ValueError: no temperature was fitted.
        """
        if not self.calibrated:
            return probabilities
        if self.temperature is None:
            raise ValueError("calibrated: no temperature was fitted; use ensemble.calibrate(x, y)")
        return scaled(probabilities, self.temperature)

    @torch.no_grad()
    def predict(self, x: Tensor, batch_size: int = 500) -> Prediction:
        """What the members say of many samples, and how much they differ; on the CPU.

        Members are asked one after the other, so of all their logits one member's are in memory.

        Args:
            x: `(N, *shape)`, as for a call, on any device.

        Example:
            >>> said = ensemble.predict(images)  # doctest: +SKIP
            >>> said.probabilities.argmax(1), said.mutual_information  # doctest: +SKIP
        """
        together, opinions = Running(self.combine), Opinions()
        for i, member in enumerate(self.members):
            for one in self._asked(member, x, batch_size):
                together.add(one, self.weights[i] if self.weights else 1.0)
                opinions.add(one)
        return opinions.prediction(self.answer(together.value()))

    @torch.no_grad()
    def ask(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Every member's logits for many samples, `(K, N, C)` on the CPU."""
        return torch.cat([self._asked(member, x, batch_size) for member in self.members])

    def _asked(self, member: nn.Module, x: Tensor, batch_size: int) -> Tensor:
        """`(1, N, C)` on the CPU; more of a network that is several members."""
        device = self.device
        parts = [member(self.preprocess(p.to(device))).cpu() for p in x.split(batch_size)]
        logits = torch.cat(parts, dim=-2)
        return logits if logits.dim() == 3 else logits[None]

    @property
    def device(self) -> torch.device:
        """Where the members are, or will be."""
        if isinstance(self.members, Members):
            return self.members.get_buffer("_here").device
        tensors = chain(self.members.parameters(), self.members.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def calibrate(self, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
        """Fit the temperature on validation data, `(N, *shape)` and `(N,)`; returns it.

        From then on answers are scaled by it, see `calibrated`.
        """
        self.calibrated = False
        plain = self.predict(x, batch_size).probabilities
        self.temperature = temperature_of(plain, y.cpu())
        self.calibrated = True
        return self.temperature

    def take(self, ids: Sequence[str]) -> Ensemble:
        """An ensemble of these members, which it shares, in this order; no temperature is known.

        Raises:
            ValueError: there is no such member, or members are not networks of their own.
        """
        for id in ids:
            if id not in self.ids:
                raise ValueError(f"ids: no member {id!r}; there are {', '.join(self.ids)}")
        if not ids or len(set(ids)) < len(ids):
            raise ValueError("ids: name each member once, and at least one")
        places = [self.ids.index(id) for id in ids]
        chosen: Members | list[nn.Module]
        if isinstance(self.members, Members):
            chosen = self.members.take(places)
        else:
            chosen = [self.members[place] for place in places]
        return (
            Ensemble(
                chosen,
                ids=ids,
                preprocess=self.preprocess,
                combine=self.combine,
                weights=[self.weights[place] for place in places] if self.weights else None,
                origin=self.origin,
            )
            .to(self.device)
            .eval()
        )

    def save(self, folder: Any) -> None:
        """Write it into a new folder that `load` reads, wherever it is moved to.

        Safetensors and JSON: the parent's weights if a recipe needs them, what tuning changed, and
        the recipes. The temperature goes with it.

        Args:
            folder: a path, or a URI like `s3://bucket/models/a`.

        Raises:
            ValueError: the folder is in use, or what the ensemble was made from is gone.
        """
        if self.origin is None:
            raise ValueError("save: only an ensemble that was loaded, or made of a run, is saved")
        self.origin.save(folder, self.ids, self.temperature)
