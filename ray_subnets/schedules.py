"""Learning rate and momentum as functions of the step: `(step, total) -> value`.

`step` counts optimizer steps from 0 to `total - 1`. Pure numbers: no optimizer is touched here.
"""

from __future__ import annotations

import math


def _cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` at fraction 0 to `end` at fraction 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def one_cycle(
    step: int,
    total: int,
    *,
    lr_max: float,
    div_factor: float = 100.0,
    final_div_factor: float = 1e4,
    warmup_fraction: float = 0.1,
    momentum_max: float = 0.95,
    momentum_min: float = 0.85,
) -> tuple[float, float]:
    """Learning rate and inverse momentum of the one-cycle policy (eq. 5.4, 5.5, Fig 5.3).

    Up from `lr_max / div_factor` to `lr_max` over `warmup_fraction` of the steps, then down to
    `lr_max / div_factor / final_div_factor`, both by half a cosine; momentum runs the other way.
    The equations as printed do not complete a half cosine over a phase; this follows the
    dissertation's code, which is torch's `OneCycleLR(pct_start=0.1, div_factor=100)`.

    Returns:
        (learning rate, momentum) of `step`.
    """
    peak = warmup_fraction * total - 1
    lr_start = lr_max / div_factor
    if peak > 0 and step <= peak:  # too few steps have no warm-up
        fraction = step / peak
        return _cosine(lr_start, lr_max, fraction), _cosine(momentum_max, momentum_min, fraction)
    last = total - 1
    fraction = (step - peak) / (last - peak) if last > peak else 1.0
    return (
        _cosine(lr_max, lr_start / final_div_factor, fraction),
        _cosine(momentum_min, momentum_max, fraction),
    )


def decay(step: int, total: int, *, lr: float, lr_final_fraction: float = 0.01) -> float:
    """The parent's schedule: constant for half the steps, linear to 1 % at 90 %, then constant.

    Source: the dissertation's own training code (after fast geometric ensembling, 2018).
    """
    t = step / total
    if t <= 0.5:
        return lr
    if t <= 0.9:
        return lr * (1 - (1 - lr_final_fraction) * (t - 0.5) / 0.4)
    return lr * lr_final_fraction


def constant(step: int, total: int, *, lr: float) -> float:
    """The same rate at every step (small budget experiments, Table 5.1)."""
    return lr


def steps(
    step: int, total: int, *, lr: float, at: tuple[float, ...] = (0.5, 0.9), factor: float = 0.1
) -> float:
    """The step-wise rate of sections 4.3.2 and 6.3.1: `lr` times `factor` for each fraction of
    the steps in `at` that has passed (0.1, 0.01 after half, 0.001 for the last tenth)."""
    return lr * factor ** sum(step >= fraction * total for fraction in at)


def cosine(step: int, total: int, *, lr: float) -> float:
    """Half a cosine from `lr` to zero, at every step (Loshchilov and Hutter 2017)."""
    return _cosine(lr, 0.0, step / total)
