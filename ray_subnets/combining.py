"""Many networks, one answer: how outputs are combined, and who is worth asking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
