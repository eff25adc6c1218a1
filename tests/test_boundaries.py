"""The spiral experiment: its data, its grid, its maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import run_serial, tiny

from analysis import boundaries, spirals
from analysis.folders import Run
from ray_subnets import configfile, models
from ray_subnets.checkpoints import RunFolder


def test_the_spirals_are_as_written() -> None:
    data = spirals.load()
    assert [len(s) for s in (data.train, data.validation, data.test)] == [2500, 250, 250]
    assert data.num_classes == 2
    x, y = spirals.points(1000, 3)
    turned = torch.stack([x[:, 0] * -1, x[:, 1] * -1], 1)
    # one arm is the other one turned by half a circle: neighbours of a turned point are the other's
    nearest = torch.cdist(turned, x).argmin(1)
    assert (y[nearest] != y).double().mean() > 0.97
    config = configfile.load("spirals_boundaries")
    assert config.parent.epochs == 10
    assert (config.parent.optimizer, config.parent.lr) == ("adam", 0.001)
    assert config.model.options == {"hidden": [64, 64, 64]}


def test_the_plane_and_its_colours() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    grid, extent = boundaries.lattice(points, side=5)
    assert grid.shape == (25, 2)
    assert extent == pytest.approx((-0.12, 1.12, -0.24, 2.24))
    assert grid[0].tolist() == pytest.approx([extent[0], extent[2]])
    assert grid[4].tolist() == pytest.approx([extent[1], extent[2]])  # a row is one height
    colours = boundaries.mixed(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    assert colours[2] == pytest.approx((colours[0] + colours[1]) / 2)


def test_denser_and_stronger_noise_does_more_harm() -> None:
    parent = models.build("mlp", (2,), 2, {"hidden": [16]}, seed=0).eval()
    x, _ = spirals.points(100, 0)
    y = parent(x).argmax(1)
    table = boundaries.grid_table(parent, x, y, (0.01, 1.0), (0.0, 0.9), draws=6)
    mean = table.numbers.groupby(["sparsity", "sigma"])[["accuracy", "kl"]].mean()
    assert mean.loc[(0.0, 1.0), "kl"] > mean.loc[(0.9, 1.0), "kl"] > mean.loc[(0.9, 0.01), "kl"]
    assert mean.loc[(0.0, 1.0), "accuracy"] < mean.loc[(0.9, 0.01), "accuracy"]
    assert table.rows[0][0] == "0"
    assert table.rows[0][-1] == "6"


def test_a_run_of_points(tmp_path: Path) -> None:
    settings = tiny("data=spirals", "model.hidden=[16]", "parent.epochs=1")
    run_serial(settings, RunFolder.create(tmp_path / "points"))
    found = boundaries.find(
        Run.open(tmp_path / "points"), sigmas=(0.1,), sparsities=(0.0, 0.9), draws=2
    )
    names = [row[0] for row in found.tables[1].rows]
    assert names[0] == "parent"
    assert "sparse-000, pruned" in names
    assert names[-1] == "ensemble of 6"
    for picture in found.pictures:
        assert picture.png().startswith(b"\x89PNG")
        assert "<svg" in picture.svg()


def test_images_have_no_plane(tmp_path: Path) -> None:
    run_serial(tiny(), RunFolder.create(tmp_path / "images"))
    with pytest.raises(ValueError, match="two numbers"):
        boundaries.find(Run.open(tmp_path / "images"))
