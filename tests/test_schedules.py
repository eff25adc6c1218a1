"""Schedules against torch's own and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from ray_subnets import recipes, schedules, supervised


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


def test_steps_by_hand() -> None:
    """A tenth of the rate after half of the steps, a hundredth for the last tenth (4.3.2)."""
    values = [schedules.steps(step, 100, lr=0.2) for step in (0, 49, 50, 89, 90, 99)]
    assert values == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    thirds = [schedules.steps(step, 9, lr=1.0, at=(1 / 3, 2 / 3), factor=0.5) for step in (2, 3, 6)]
    assert thirds == [1.0, 0.5, 0.25]


def test_steps_reach_the_optimizer() -> None:
    training = recipes.Training(epochs=1, schedule="steps", lr=0.1)
    optimizer = supervised.make_optimizer(torch.nn.Linear(2, 2), training)
    found = [supervised.set_rates(optimizer, training, step, 10) for step in (4, 5, 9)]
    assert found == pytest.approx([0.1, 0.01, 0.001])
    assert optimizer.param_groups[0]["lr"] == found[-1]
    assert optimizer.param_groups[0]["momentum"] == training.momentum  # one-cycle alone moves it
