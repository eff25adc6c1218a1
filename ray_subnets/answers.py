"""What many networks say of each sample together, and how much they differ in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_subnets.metrics import entropy


@dataclass(frozen=True)
class Prediction:
    """The answer of an ensemble for N samples of C classes; tensors on the CPU, float64."""

    probabilities: Tensor
    """`(N, C)`"""
    entropy: Tensor
    """`(N,)` nats, of the probabilities: how unsure the answer is"""
    mutual_information: Tensor
    """`(N,)` nats, between the class and which member answers: what members disagree about; the
    part of the entropy of their mean, uncalibrated, that is large where they never saw anything
    alike; 0 for one member"""
    disagreement: Tensor
    """`(N,)` fraction of pairs of members that name different classes (eq. 7.3 of one sample)"""

    @property
    def classes(self) -> Tensor:
        """The most probable class, `(N,)`."""
        return self.probabilities.argmax(1)


class Opinions:
    """Members' answers, added one at a time."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._own = self._votes = torch.zeros(())

    def add(self, logits: Tensor) -> None:
        """One member's `(N, C)`."""
        p = logits.double().softmax(1)
        votes = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
        if self._count == 0:
            self._mean, self._own, self._votes = p, entropy(p), votes
        else:
            self._mean = self._mean + p
            self._own = self._own + entropy(p)
            self._votes = self._votes + votes
        self._count += 1

    def mutual_information(self) -> Tensor:
        """`(N,)`; see `metrics.mutual_information`."""
        if self._count == 1:
            return torch.zeros_like(self._own)
        return (entropy(self._mean / self._count) - self._own / self._count).clamp_min(0.0)

    def disagreement(self) -> Tensor:
        """`(N,)`; its mean is the mean of `metrics.disagreement` over pairs."""
        pairs = self._count * (self._count - 1)
        if not pairs:
            return torch.zeros_like(self._own)
        return 1 - (self._votes * (self._votes - 1)).sum(1).double() / pairs

    def prediction(self, probabilities: Tensor) -> Prediction:
        """All of it.

        Args:
            probabilities: the members' common answer, `(N, C)`.
        """
        p = probabilities.double()
        return Prediction(p, entropy(p), self.mutual_information(), self.disagreement())
