"""Many networks, one answer: combining outputs, and the `nn.Module` that a user keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ray_subnets.data import Preprocess


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


def greedy(logits: Tensor, labels: Tensor, count: int | None = None) -> list[tuple[int, float]]:
    """Forward selection by the NLL of the mean of probabilities.

    Starts with the best network and adds, one at a time, the one that makes the ensemble's NLL
    smallest; stops at `count` members or, without it, when none makes it smaller. Of equal ones
    the first is taken.

    Args:
        logits: `(K, N, C)` of the candidates on validation data; `labels` `(N,)`.

    Returns:
        (index, NLL of the ensemble with it) in the order of joining.
    """
    right = logits.double().softmax(2)[:, torch.arange(len(labels)), labels]  # (K, N)
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


class Ensemble(nn.Module):
    """Networks that answer together.

    Call it with network inputs `(N, *shape)`: floating point as the networks were trained on, or
    uint8 images, which are scaled and normalised as in training. It returns probabilities
    `(N, C)` float32.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        ids: Sequence[str],
        preprocess: Preprocess,
        combine: str = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        assert len(members) == len(ids) > 0
        self.members = nn.ModuleList(members)
        self.ids = tuple(ids)
        self.preprocess = preprocess
        self.combine = combine
        self.weights = tuple(weights) if weights is not None else None

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, x: Tensor) -> Tensor:
        """Every member's logits, `(K, N, C)`."""
        x = self.preprocess(x)
        return torch.stack([member(x) for member in self.members])

    def forward(self, x: Tensor) -> Tensor:
        return combine(self.logits(x), self.combine, self.weights).float()
