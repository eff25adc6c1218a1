"""Spirals are what their description says, and a network can learn them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_datasets import same
from tiny import run_serial

from ray_subnets import Preprocess, configfile, datasets
from ray_subnets.checkpoints import RunFolder


@pytest.mark.parametrize("arms", [2, 3, 5])
def test_spirals_wind_around_the_middle(arms: int) -> None:
    """Without noise the angle of a point follows from its radius and its arm."""
    data = datasets.load("spirals", num_classes=arms, noise=0)
    for split in (data.train, data.validation, data.test):
        radius, angle = split.images.norm(dim=1), torch.atan2(*split.images.flip(1).T)
        turns = radius / 3 + split.labels / arms - angle / (2 * torch.pi)
        assert radius.max() <= 3
        assert (turns - turns.round()).abs()[radius > 0.01].max() < 1e-4
        share = split.labels.bincount(minlength=arms) / len(split)
        assert (share - 1 / arms).abs().max() < 0.1


def test_spirals_have_the_noise_that_is_asked_for() -> None:
    """The same points every time, moved by Gaussian noise of this standard deviation."""
    exact, noisy = (datasets.load("spirals", noise=noise) for noise in (0, 0.4))
    torch.manual_seed(1)
    assert same(datasets.load("spirals", noise=0.4).train, noisy.train)
    assert (len(exact.train), len(exact.validation), len(exact.test)) == (1800, 200, 1000)
    assert exact.input_shape == (2,)
    assert exact.num_classes == 3
    difference = noisy.train.images - exact.train.images
    assert difference.std().item() == pytest.approx(0.4, rel=0.1)
    assert datasets.load("spirals").preprocess == Preprocess()


def test_the_spirals_config_learns(tmp_path: Path) -> None:
    """The shipped config, in seconds: no straight line could do this."""
    settings = configfile.load("spirals_noisy", ["single=false"])
    record = run_serial(settings, RunFolder.create(tmp_path / "run"))
    assert record["ensemble"]["test"]["accuracy"] > 0.9
