"""Metrics against torchmetrics, against numbers worked out by hand, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics import PearsonCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
)
from torchmetrics.functional import kl_divergence as tm_kl_divergence

from ray_subnets import metrics
from ray_subnets.combining import combine

TOLERANCE = 1e-6


def outputs(k: int, n: int, c: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(k, n, c, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, c, (n,), generator=generator)


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> probabilities `(N, C)`, labels `(N,)`."""
    found = {}
    for seed, (n, c, scale) in enumerate([(1000, 10, 2.0), (333, 3, 5.0), (64, 100, 1.0)]):
        logits, labels = outputs(1, n, c, seed, scale)
        found[f"random {n}x{c}"] = (logits[0].softmax(1), labels)
    p, labels = found["random 1000x10"]
    found["one class occurs"] = (p, torch.zeros_like(labels))
    found["one sample"] = (p[:1], labels[:1])
    found["ties"] = (torch.full((12, 4), 0.25, dtype=torch.float64), torch.arange(12) % 4)
    almost = torch.tensor([[1 - 3e-9, 1e-9, 1e-9, 1e-9]], dtype=torch.float64).repeat(6, 1)
    found["confident and wrong"] = (almost, torch.tensor([1, 2, 3, 1, 2, 3]))
    return found


@pytest.mark.parametrize("name", cases())
def test_against_torchmetrics(name: str) -> None:
    p, labels = cases()[name]
    n, c = p.shape
    assert metrics.accuracy(p, labels) == pytest.approx(
        float(MulticlassAccuracy(c, average="micro")(p, labels)), abs=TOLERANCE
    )
    # torchmetrics' bins are closed below, ours above; inside bins they agree.
    assert metrics.ece(p, labels) == pytest.approx(
        float(MulticlassCalibrationError(c, n_bins=15, norm="l1")(p, labels)), abs=TOLERANCE
    )
    assert metrics.nll(p, labels) == pytest.approx(
        float(torch.nn.functional.nll_loss(p.log(), labels)), abs=TOLERANCE
    )
    one_hot = torch.nn.functional.one_hot(labels, c)
    assert metrics.brier(p, labels) == pytest.approx(
        float(((p - one_hot) ** 2).sum() / n), abs=TOLERANCE
    )


def test_diversity_against_torchmetrics() -> None:
    logits, _ = outputs(3, 200, 7, seed=5)
    p = logits.softmax(2)
    kl, correlation = metrics.kl_divergence(logits), metrics.correlation(p)
    for i in range(3):
        for j in range(3):
            assert float(kl[i, j]) == pytest.approx(
                float(tm_kl_divergence(p[i], p[j])), abs=TOLERANCE
            )
            # One correlation per sample over its outputs, then the mean over samples.
            pearson = PearsonCorrCoef(num_outputs=200)(p[i].T, p[j].T)
            assert float(correlation[i, j]) == pytest.approx(float(pearson.mean()), abs=TOLERANCE)


def test_disagreement_by_hand() -> None:
    """Three members, four samples: predictions 0011, 0010, 1100."""
    predicted = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
    matrix = metrics.disagreement(torch.nn.functional.one_hot(predicted, 2).double())
    expected = torch.tensor([[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]], dtype=torch.float64)
    assert torch.equal(matrix, expected)
    assert metrics.mean_off_diagonal(matrix) == pytest.approx((0.25 + 1 + 0.75) / 3)


def test_kl_by_hand() -> None:
    """KL of (3/4, 1/4) from (1/2, 1/2) is log 2 - H; of itself 0."""
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])
    kl = metrics.kl_divergence(logits)
    assert float(kl[0, 1]) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl[1, 0]) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert float(kl[0, 0]) == 0


def test_ece_by_hand() -> None:
    """Two bins in use: 3 samples at 0.8, 2 right; 1 sample at 0.6, wrong."""
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1, 1])
    assert metrics.ece(p, labels) == pytest.approx(
        3 / 4 * (0.8 - 2 / 3) + 1 / 4 * 0.6, abs=TOLERANCE
    )


def test_bins_are_closed_above() -> None:
    """Confidence exactly 1.0 shares the last bin with 0.95 (torchmetrics gives it its own)."""
    p = torch.tensor([[1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    bins = metrics.reliability(p, torch.tensor([0, 1]))
    assert bins.count.tolist() == [0.0] * 14 + [2.0]
    on_edge = torch.tensor([[0.2] * 5], dtype=torch.float64)  # 3/15, the top of the third bin
    assert int(metrics.reliability(on_edge, torch.tensor([0])).count.argmax()) == 2


def test_zero_probability_is_a_large_number_not_infinity() -> None:
    p = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert 700 < metrics.nll(p, torch.tensor([1])) < 710


def test_constant_outputs_have_no_correlation() -> None:
    p = torch.full((2, 3, 4), 0.25)
    assert torch.equal(metrics.correlation(p), torch.zeros(2, 2, dtype=torch.float64))


def test_the_ece_of_a_calibrated_predictor_is_its_floor() -> None:
    """Labels drawn from the predictor itself: ECE within four deviations of the floor."""
    logits, _ = outputs(1, 5000, 10, seed=9)
    p = logits[0].softmax(1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    floor, deviation = metrics.ece_floor(p)
    assert 0 < deviation < floor
    assert abs(metrics.ece(p, labels) - floor) < 4 * deviation
    # An overconfident one is far above it.
    sharp = (3 * logits[0]).softmax(1)
    assert metrics.ece(sharp, labels) > metrics.ece_floor(sharp)[0] + 20 * deviation


def test_floor_near_the_value_computed_for_83_percent_and_10000_samples() -> None:
    """About .009 at 83 % accuracy on 10,000 samples; the exact value depends on the confidences."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.66 + 0.34 * torch.rand(10_000, generator=generator, dtype=torch.float64)
    p = torch.stack([confidence, 1 - confidence], 1)
    floor, _ = metrics.ece_floor(p)
    assert 0.005 < floor < 0.013


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_is_found(temperature: float) -> None:
    """Labels drawn from softmax(logits / T): the fit finds T."""
    logits, _ = outputs(1, 20_000, 5, seed=2)
    p = (logits[0] / temperature).softmax(1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(4))[:, 0]
    found = metrics.fit_temperature(logits[0].log_softmax(1), labels)
    assert found == pytest.approx(temperature, rel=0.05)
    scaled = (logits[0] / found).softmax(1)
    for other in (0.9 * found, 1.1 * found):
        assert metrics.nll(scaled, labels) <= metrics.nll((logits[0] / other).softmax(1), labels)


def test_combining() -> None:
    """The three ways, on an example where mean probabilities and mean logits disagree."""
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 3.0, 0.0]], [[0.0, 3.0, 0.0]]])
    by_probability = combine(logits, "probabilities")
    by_logit = combine(logits, "logits")
    assert torch.allclose(by_probability, logits.double().softmax(2).mean(0))
    assert int(by_probability.argmax()) == 1
    assert int(by_logit.argmax()) == 0
    assert combine(logits, "vote").tolist() == [[1 / 3, 2 / 3, 0]]
    for how in ("probabilities", "logits", "vote"):
        assert float(combine(logits, how).sum()) == pytest.approx(1)
