"""Numbers from outputs. Logits first, metrics after.

Shape legend: K members, N samples, C classes, B bins. Everything is computed in float64 from the
tensors given, so that a metric of saved outputs is the metric that was printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ECE_BINS = 15


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose largest entry is the label (eq. 3.26). `(N, C)`, `(N,)`."""
    return float((probabilities.argmax(1) == labels).double().mean())


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats (eq. 3.27). `(N, C)`, `(N,)`.

    A zero probability counts as the smallest positive float64: large, but a number.
    """
    picked = probabilities.double().gather(1, labels[:, None])[:, 0]
    return 0.0 - float(picked.clamp_min(torch.finfo(torch.float64).tiny).log().mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Mean squared distance to the one-hot label, summed over classes (Brier 1950); 0 to 2."""
    p = probabilities.double()
    target = torch.nn.functional.one_hot(labels, p.shape[1]).double()
    return float((p - target).square().sum(1).mean())


@dataclass(frozen=True)
class Bins:
    """A reliability diagram: samples, mean confidence and accuracy of each bin, `(B,)`."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    def ece(self) -> float:
        gap = (self.accuracy - self.confidence).abs()
        return float((gap * self.count).sum() / self.count.sum())


def _bin_index(confidence: Tensor, bins: int) -> Tensor:
    """Equal bins, open below and closed above: (lo, hi] as in the dissertation's code."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    return torch.bucketize(confidence.contiguous(), edges)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> Bins:
    """Bin samples by their largest probability. Empty bins have confidence and accuracy 0."""
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    index = _bin_index(confidence, bins)
    zeros = torch.zeros(bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    safe = count.clamp_min(1)
    return Bins(
        count=count,
        confidence=zeros.index_add(0, index, confidence) / safe,
        accuracy=zeros.index_add(0, index, correct) / safe,
    )


def ece(probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: sum over bins of |B|/N |acc - conf| (eq. 3.28)."""
    return reliability(probabilities, labels, bins).ece()


def ece_floor(
    probabilities: Tensor, *, bins: int = ECE_BINS, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the ECE that a perfectly calibrated predictor would score.

    ECE is not zero under perfect calibration: bins hold finitely many samples. Here the same
    confidences are kept and correctness is drawn as Bernoulli(confidence), `draws` times. An ECE
    within two deviations of this floor is not evidence of miscalibration.
    """
    confidence = probabilities.double().max(1).values.clamp_max(1.0)
    index = _bin_index(confidence, bins)
    n = len(confidence)
    zeros = torch.zeros(bins, dtype=torch.float64)
    total_confidence = zeros.index_add(0, index, confidence)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        correct = (torch.rand(n, generator=generator, dtype=torch.float64) < confidence).double()
        hits = zeros.index_add(0, index, correct)
        scores[i] = (hits - total_confidence).abs().sum() / n
    return float(scores.mean()), float(scores.std(unbiased=False))


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """Temperature T > 0 that minimises the NLL of `softmax(log p / T)` (Guo et al. 2017).

    `(N, C)`, `(N,)`. The loss is convex in 1/T: bisection on its derivative, 1/T in [0.01, 100].
    """
    logp = log_probabilities.double()
    true = logp.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        weights = (logp * inverse).softmax(1)
        return float(((weights * logp).sum(1) - true).mean())

    low, high = math.log(0.01), math.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        if slope(math.exp(middle)) > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


def scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """`softmax(log p / temperature)`, `(N, C)` float64: the same, more or less confident.

    For an ensemble, of its combined probabilities. The temperature is fitted on other data.
    """
    tiny = torch.finfo(torch.float64).tiny
    return (probabilities.double().clamp_min(tiny).log() / temperature).softmax(1)


def temperature_of(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature with which `scaled` minimises the NLL of these `(N, C)`, `(N,)`."""
    tiny = torch.finfo(torch.float64).tiny
    return fit_temperature(probabilities.double().clamp_min(tiny).log(), labels)


def quality(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """What a network is chosen by: accuracy, nll, brier."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
    }


def summary(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The numbers printed for every predictor: accuracy, nll, brier, ece, ece_floor(+_std)."""
    floor, floor_std = ece_floor(probabilities)
    return quality(probabilities, labels) | {
        "ece": ece(probabilities, labels),
        "ece_floor": floor,
        "ece_floor_std": floor_std,
    }


# --- data from elsewhere: scores are uncertainties, larger for what looks strange -----------------


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy in nats, `(N, C)` -> `(N,)` float64."""
    p = probabilities.double()
    return -torch.special.xlogy(p, p).sum(1)


def mutual_information(logits: Tensor) -> Tensor:
    """Between the label and which member answers, in nats, `(K, N, C)` -> `(N,)` float64.

    Entropy of the mean answer minus the mean entropy of answers: what members disagree about
    (Depeweg et al. 2018); 0 for a single member.
    """
    p = logits.double().softmax(2)
    own = -torch.special.xlogy(p, p).sum(2).mean(0)
    return (entropy(p.mean(0)) - own).clamp_min(0.0)


def uncertainties(probabilities: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """The scores by name, each `(N,)`; the last one needs at least two members.

    Args:
        probabilities: `(N, C)`, of the members together.
        logits: `(K, N, C)`, of each member.
    """
    found = {
        "maximum_probability": 1 - probabilities.double().max(1).values,
        "entropy": entropy(probabilities),
    }
    return found | ({"mutual_information": mutual_information(logits)} if len(logits) > 1 else {})


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a sample from outside scores higher than one from inside; ties count half.

    Args:
        inside, outside: uncertainties of samples `(N,)` of the data set and `(M,)` of another.
    """
    ordered = inside.double().sort().values
    values = outside.double()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return float((below + up_to).double().mean()) / (2 * len(ordered))


def fpr_at_95(inside: Tensor, outside: Tensor) -> float:
    """Fraction of samples from outside that are taken for insiders where 95 % of those are.

    The threshold is the smallest score that accepts at least 95 % of `inside`; what ties with it is
    accepted. Arguments as for `auroc`.
    """
    ordered = inside.double().sort().values
    threshold = ordered[-(-95 * len(ordered) // 100) - 1]
    return float((outside.double() <= threshold).double().mean())


# --- diversity: (K, N, C) -> (K, K) ------------------------------------------------------------


def disagreement(outputs: Tensor) -> Tensor:
    """Fraction of samples on which two members predict different classes (eq. 7.3), `(K, K)`."""
    predicted = outputs.argmax(2)
    return torch.stack([(predicted != row).double().mean(1) for row in predicted])


def kl_divergence(logits: Tensor) -> Tensor:
    """KL(row member || column member) in nats, mean over samples (eq. 7.2), `(K, K)`."""
    logp = logits.double().log_softmax(2)
    p = logp.exp()
    k, n, _ = logp.shape
    own = torch.special.xlogy(p, p).sum((1, 2)) / n
    cross = torch.einsum("inc,jnc->ij", p, logp) / n
    result = own[:, None] - cross
    result[torch.arange(k), torch.arange(k)] = 0.0
    return result.clamp_min(0.0)


def correlation(probabilities: Tensor) -> Tensor:
    """Pearson correlation of two members' output vectors, mean over samples (eq. 7.1), `(K, K)`.

    The correlation of one sample runs over its C outputs. A constant output vector has none and
    counts as 0 (on the diagonal too).
    """
    p = probabilities.double()
    centred = p - p.mean(2, keepdim=True)
    norm = centred.square().sum(2, keepdim=True).sqrt()
    unit = torch.where(norm > 1e-12, centred / norm.clamp_min(1e-300), 0.0)
    return torch.einsum("inc,jnc->ij", unit, unit) / p.shape[1]


def mean_off_diagonal(matrix: Tensor) -> float:
    """Mean over all ordered pairs of different members; 0 for a single member."""
    k = len(matrix)
    if k < 2:
        return 0.0
    return float((matrix.sum() - matrix.diagonal().sum()) / (k * (k - 1)))
