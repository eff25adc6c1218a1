"""Regression: what outputs mean, losses, measures, and the common answer of many networks.

A Gaussian head has two outputs for each sample, `(N, 2)`: mean and natural logarithm of the
variance of its target. An MSE head has one, the mean, `(N, 1)` or `(N,)`. Members together are an
even mixture of their answers, of which mean and variance are kept: section 2.4 of Lakshminarayanan
et al., Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles, 2017.

Shape legend: K members, N samples. Measures are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Head = Literal["classes", "gaussian", "mse"]
"""what outputs are: logits of classes, or see above"""
OUTPUTS: Mapping[str, int] = {"gaussian": 2, "mse": 1}
"""heads for regression -> outputs for each sample"""
Criterion = Callable[[Tensor, Tensor], Tensor]
"""Outputs of a batch and what is right -> loss, summed over samples."""


@dataclass(frozen=True)
class Forecast:
    """The answer of an ensemble for the targets of N samples; `(N,)` float64."""

    mean: Tensor
    aleatoric: Tensor
    """mean of the members' variances: noise in the target itself; 0 for an MSE head, which says
    nothing of it"""
    epistemic: Tensor
    """variance of the members' means: what they disagree about, large where they never saw anything
    alike; 0 for one member"""

    @property
    def variance(self) -> Tensor:
        """Of the mixture, `(N,)`: the sum of both."""
        return self.aleatoric + self.epistemic


def check(head: str) -> None:
    """Is there such a head?

    Raises:
        ValueError: no.
    """
    if head not in ("classes", *OUTPUTS):
        raise ValueError(f"head: must be classes, gaussian or mse, not {head!r}")


def classifiers_only(head: str, what: str) -> None:
    """Refuse what has no meaning for regression.

    Raises:
        ValueError: the head is for regression.
    """
    if head != "classes":
        raise ValueError(f"{what}: for classifiers only, not for an ensemble with head={head!r}")


def columns(outputs: Tensor) -> Tensor:
    """Outputs of one network, `(N,)` as `(N, 1)`; others as they are."""
    return outputs[:, None] if outputs.dim() == 1 else outputs


def gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, `(N, 2)` and `(N,)` -> sum over samples."""
    mean, log_variance = outputs.unbind(1)
    squared = (targets - mean).square() * torch.exp(-log_variance)
    return 0.5 * (log_variance + squared + math.log(2 * math.pi)).sum()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """`(N, 1)` or `(N,)`, and `(N,)` -> sum over samples, in the square of the targets' unit."""
    return (targets - columns(outputs)[:, 0]).square().sum()


CRITERIA: Mapping[str, Criterion] = {"gaussian": gaussian_nll, "mse": squared_error}
"""heads for regression -> what they are trained by"""


def mixture(outputs: Tensor, head: str) -> Forecast:
    """The common answer of members' outputs, `(K, N, 2)` or `(K, N, 1)`."""
    means = outputs[..., 0].double()
    mean = means.mean(0)
    epistemic = (means - mean).square().mean(0)
    if head == "mse":
        return Forecast(mean, torch.zeros_like(mean), epistemic)
    return Forecast(mean, outputs[..., 1].double().exp().mean(0), epistemic)


def rmse(mean: Tensor, targets: Tensor) -> float:
    """Root mean squared error, in the targets' unit. `(N,)`, `(N,)`."""
    return float((mean.double() - targets.double()).square().mean().sqrt())


def mae(mean: Tensor, targets: Tensor) -> float:
    """Mean absolute error, in the targets' unit. `(N,)`, `(N,)`."""
    return float((mean.double() - targets.double()).abs().mean())


def nll(mean: Tensor, variance: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood in nats of normal distributions. All `(N,)`."""
    v = variance.double().clamp_min(torch.finfo(torch.float64).tiny)
    squared = (targets.double() - mean.double()).square() / v
    return float(0.5 * (v.log() + squared + math.log(2 * math.pi)).mean())


def scores(outputs: Tensor, targets: Tensor, head: str) -> dict[str, float]:
    """Measures of members together, `(K, N, 2)` or `(K, N, 1)`, and `(N,)`: rmse, mae; nll too for
    a Gaussian head, of a normal distribution with mean and variance of the mixture."""
    said = mixture(outputs, head)
    found = {"rmse": rmse(said.mean, targets), "mae": mae(said.mean, targets)}
    return found | ({"nll": nll(said.mean, said.variance, targets)} if head == "gaussian" else {})


def gaussian_kl(outputs: Tensor, other: Tensor) -> float:
    """KL divergence in nats of one network's answers from another's, mean over samples.

    Args:
        outputs, other: of Gaussian heads, `(N, 2)`: KL(outputs || other).
    """
    (m, log_v), (n, log_w) = outputs.double().unbind(1), other.double().unbind(1)
    ratio = torch.exp(log_v - log_w) + (m - n).square() * torch.exp(-log_w)
    return float(0.5 * (log_w - log_v + ratio - 1).mean())
