"""Many networks, one answer: combining outputs, and the `nn.Module` that a user keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ray_subnets.data import Preprocess

COMBINE = ("probabilities", "logits", "vote")


def combine(logits: Tensor, how: str = "probabilities") -> Tensor:
    """Predictive probabilities `(N, C)`, float64, of members' logits `(K, N, C)`.

    probabilities: mean of the members' softmax (section 3.2.5; the default everywhere).
    logits: softmax of the mean logits (algorithms 1-3 as printed). vote: share of members whose
    largest output is the class (eq. 3.23); its NLL is rarely meaningful.
    """
    outputs = logits.double()
    if how == "probabilities":
        return outputs.softmax(2).mean(0)
    if how == "logits":
        return outputs.mean(0).softmax(1)
    assert how == "vote", how
    votes = torch.nn.functional.one_hot(outputs.argmax(2), outputs.shape[2])
    return votes.double().mean(0)


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
    ) -> None:
        super().__init__()
        assert len(members) == len(ids) > 0
        self.members = nn.ModuleList(members)
        self.ids = tuple(ids)
        self.preprocess = preprocess
        self.combine = combine

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, x: Tensor) -> Tensor:
        """Every member's logits, `(K, N, C)`."""
        x = self.preprocess(x)
        return torch.stack([member(x) for member in self.members])

    def forward(self, x: Tensor) -> Tensor:
        return combine(self.logits(x), self.combine).float()
