"""SWAG: a Gaussian along the path of training, and networks drawn from it."""

from __future__ import annotations

import pytest
import torch
from bench import NETWORKS, MemoryBench, answers, loaded, trained

from ray_subnets.baselines.swag import SWAG, Gaussian
from ray_subnets.baselines.trajectory import SWA


def vectors(n: int = 6, size: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) + 10 for _ in range(n)]


def test_moments_are_those_of_all_and_deviations_of_the_last() -> None:
    given, found = vectors(), Gaussian(3)
    for vector in given:
        found.add(vector)
    torch.testing.assert_close(found.mean, torch.stack(given).mean(0))
    torch.testing.assert_close(found.squares / 6, torch.stack(given).var(0, correction=0))
    assert len(found.deviations) == 3
    for i, deviation in zip((4, 5, 6), found.deviations, strict=True):
        torch.testing.assert_close(deviation, given[i - 1] - torch.stack(given[:i]).mean(0))


def test_draws_have_the_mean_and_the_covariance_of_the_paper() -> None:
    found = Gaussian(4)
    for vector in vectors():
        found.add(vector)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([found.draw(1.0, generator) for _ in range(20000)])
    low = torch.stack(found.deviations, 1)
    wanted = 0.5 * (found.squares / 6).diag() + 0.5 * low @ low.T / 3
    torch.testing.assert_close(drawn.mean(0), found.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_drawn_about_the_average(network: str) -> None:
    method, bench = SWAG(samples=2, start=0.5), MemoryBench(network, budget=4)
    result = trained(method, bench)
    assert bench.images == 4 * 48
    logits = answers(method, result, bench)
    assert logits.shape == (2, 48, 4)
    assert not torch.equal(logits[0], logits[1])
    still = trained(SWAG(samples=1, start=0.5, scale=0), MemoryBench(network, budget=4))
    average = trained(SWA(start=0.5), MemoryBench(network, budget=4))
    for name, tensor in average.networks[0].state_dict().items():
        torch.testing.assert_close(still.networks[0].state_dict()[name], tensor)
    again = loaded(method, result.networks[1], bench)
    x = bench.data.test.images
    assert torch.equal(again.eval()(x), result.networks[1].eval()(x))


def test_a_covariance_needs_two() -> None:
    with pytest.raises(ValueError, match="start: leaves one epoch of the budget of 4"):
        SWAG(start=0.75).epochs(4)
