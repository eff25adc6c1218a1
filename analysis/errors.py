"""Where errors come from and who shares them: eqs. 2.10 to 2.13, and overlaps.

Shape legend: R runs, K members, N samples, C classes. Everything in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Split:
    """`mse = bias_squared + variance / K + (1 - 1 / K) * covariance` (eq. 2.13), exactly.

    Attributes:
        mse: of the mean answer, summed over classes: a Brier score.
        bias_squared: of the members' mean bias (eq. 2.10).
        variance: mean over members (eq. 2.11).
        covariance: mean over ordered pairs of different members (eq. 2.12); 0 for one member.
    """

    members: int
    mse: float
    bias_squared: float
    variance: float
    covariance: float

    def total(self) -> float:
        """The right side of eq. 2.13."""
        share = 1 / self.members
        return self.bias_squared + share * self.variance + (1 - share) * self.covariance


def _split(residuals: Tensor, mean: Tensor) -> Split:
    """Of residuals `(E, K, S)`: expectations over E, then sums over members, then means over S."""
    k = residuals.shape[1]
    centred = residuals - mean
    together = centred.mean(1).square().mean(0)  # variance of the members' mean
    own = centred.square().mean((0, 1))
    pairs = (k * together - own) / (k - 1) if k > 1 else torch.zeros_like(own)
    return Split(
        members=k,
        mse=float(residuals.mean(1).square().mean(0).sum()),
        bias_squared=float(mean.mean(1).square().sum()),
        variance=float(own.sum()),
        covariance=float(pairs.sum()),
    )


def over_samples(probabilities: Tensor, labels: Tensor) -> Split:
    """The split with its expectations over test samples: what one run can tell.

    Variance and covariance are those of the errors `probability - target`, and the bias is what a
    class is given too much on average, which is small for a calibrated network.

    Args:
        probabilities: `(K, N, C)`.
        labels: `(N,)`.
    """
    p = probabilities.double()
    residuals = (p - one_hot(labels, p.shape[2]).double()).transpose(0, 1)  # (N, K, C)
    return _split(residuals, residuals.mean(0, keepdim=True))


def over_runs(probabilities: Tensor, labels: Tensor) -> Split:
    """The split with its expectations over runs that differ in their seed, mean over samples.

    What eqs. 2.6 to 2.13 mean: bias is what training again does not change. With few runs the
    variance is too small, by (R - 1) / R on average, and the bias takes what it lacks.

    Args:
        probabilities: `(R, K, N, C)`; member k of every run is made by the same kind of recipe.
    """
    p = probabilities.double()
    runs, k, n, c = p.shape
    residuals = (p - one_hot(labels, c).double()).reshape(runs, k, n * c)
    found = _split(residuals, residuals.mean(0, keepdim=True))
    return Split(
        k, *(v / n for v in (found.mse, found.bias_squared, found.variance, found.covariance))
    )


def wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    """Who is wrong where, `(K, N, C)`, `(N,)` -> `(K, N)` bool."""
    return outputs.argmax(2) != labels


def overlap(mistakes: Tensor) -> Tensor:
    """Of the samples on which either of two members is wrong, the share on which both are.

    `(K, N)` bool -> `(K, K)`; 1 for two members without mistakes.
    """
    m = mistakes.double()
    both = m @ m.T
    either = m.sum(1)[:, None] + m.sum(1)[None] - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def same_mistake(outputs: Tensor, labels: Tensor) -> float:
    """Of the samples on which two members are both wrong, the share on which they say the same.

    Mean over pairs, weighted by how often both are wrong; NaN if that never happens.
    """
    predicted = outputs.argmax(2)
    mistakes = predicted != labels
    both = same = 0
    for i in range(len(predicted)):
        for j in range(i):
            shared = mistakes[i] & mistakes[j]
            both += int(shared.sum())
            same += int((shared & (predicted[i] == predicted[j])).sum())
    return same / both if both else float("nan")


def how_many_wrong(mistakes: Tensor) -> Tensor:
    """Share of samples on which exactly 0, 1, ..., K members are wrong, `(K + 1,)`."""
    k, n = mistakes.shape
    return torch.bincount(mistakes.sum(0), minlength=k + 1).double() / n
