"""Schedules against torch's own and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from ray_subnets import recipes, schedules, stochastic, supervised


@pytest.mark.parametrize("total", [11, 40, 137, 1000])
def test_one_cycle_is_torchs(total: int) -> None:
    """Rate and momentum of `OneCycleLR(max_lr=0.1, div_factor=100, pct_start=0.1)` per step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True)
    twin = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, div_factor=100, pct_start=0.1, total_steps=total
    )
    for step in range(total):
        lr, momentum = schedules.one_cycle(step, total, lr_max=0.1)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        assert momentum == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            twin.step()


def test_one_cycle_corners() -> None:
    """0.001 -> 0.1 -> 1e-7, momentum 0.95 -> 0.85 -> 0.95 (Fig 5.3)."""
    assert schedules.one_cycle(0, 1000, lr_max=0.1) == pytest.approx((0.001, 0.95))
    assert schedules.one_cycle(99, 1000, lr_max=0.1) == pytest.approx((0.1, 0.85))
    assert schedules.one_cycle(999, 1000, lr_max=0.1) == pytest.approx((1e-7, 0.95))
    # Fewer steps than a warm-up has room for.
    for total in range(1, 12):
        for step in range(total):
            lr, momentum = schedules.one_cycle(step, total, lr_max=0.1)
            assert 0 < lr <= 0.1
            assert 0.85 <= momentum <= 0.95


def test_parent_decay_by_hand() -> None:
    """Constant to 50 %, linear to 1 % at 90 %, then constant."""
    values = [schedules.decay(step, 100, lr=0.1) for step in (0, 50, 70, 90, 99)]
    assert values == pytest.approx([0.1, 0.1, 0.0505, 0.001, 0.001])


def test_set_rates_reaches_the_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    for name, key in (("sgd", "momentum"), ("adam", "betas")):
        training = recipes.Training(epochs=1, optimizer=name, schedule="one_cycle", lr=0.1)  # type: ignore[arg-type]
        optimizer = supervised.make_optimizer(model, training)
        supervised.set_rates(optimizer, training, 99, 1000)
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(0.1)
        assert (group[key] if name == "sgd" else group[key][0]) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]),
        ("cosine", [0.5, 0.4267767, 0.25, 0.0732233, 0.0, 0.0]),
        ("exponential", [0.5, 0.1432524, 0.0410425, 0.0117589, 0.0, 0.0]),
    ],
)
def test_anneal_by_hand(shape: str, expected: list[float]) -> None:
    """Temperature .5 over 2 epochs, at 0, .5, 1, 1.5, 2 and 3 epochs (eq. 6.2-6.4)."""
    epochs = (0, 0.5, 1, 1.5, 2, 3)
    found = [stochastic.anneal(epoch, start=0.5, epochs=2, shape=shape) for epoch in epochs]
    assert found == pytest.approx(expected, abs=1e-7)


def test_temperature_matrix_is_eq_6_6() -> None:
    mask = {"w": torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool()}
    expected = torch.tensor([[1, 1, 0.3, 1], [0.3, 1, 0.3, 0.3]])
    assert torch.equal(stochastic.temperature(mask, 0.3)["w"], expected)


def test_realised_masks_follow_their_probabilities() -> None:
    """The subnetwork is always on; the rest is on with chance tau."""
    generator = torch.Generator().manual_seed(0)
    mask = {"w": torch.rand(100, 300, generator=generator) < 0.5}
    drawn = torch.stack([stochastic.realise(mask, 0.3, generator)["w"] for _ in range(20)]).double()
    assert (drawn[:, mask["w"]] == 1).all()
    outside = drawn[:, ~mask["w"]]
    assert abs(float(outside.mean()) - 0.3) < 5 * (0.21 / outside.numel()) ** 0.5
    assert torch.equal(stochastic.realise(mask, 0.0, generator)["w"], mask["w"])
