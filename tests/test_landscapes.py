"""Loss landscapes: directions, surfaces that go on, lines, sharpness."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from tiny import run_serial, tiny
from torch import Tensor, nn

from analysis import full, landscapes, surfaces
from ray_subnets import models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.commands import report as commands_report


def network(seed: int = 0) -> nn.Module:
    return (
        models.build("mlp", (1, 4, 4), 3, {"hidden": [6]}, seed=seed).eval().requires_grad_(False)
    )


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 1, 4, 4, generator=generator), torch.arange(40) % 3


def test_directions_are_orthogonal_and_as_long_as_filters() -> None:
    one = network()
    first, second = surfaces.directions(one, surfaces.kept(one, pruned=False), seed=3)
    for name, tensor in one.named_parameters():
        if tensor.dim() < 2:
            assert not first[name].any()
            continue
        a, b, w = (t.flatten(1).double() for t in (first[name], second[name], tensor))
        assert_allclose((a * b).sum(1), 0, atol=1e-6)
        assert_allclose(a.norm(dim=1), w.norm(dim=1), rtol=1e-5)
        assert_allclose(b.norm(dim=1), w.norm(dim=1), rtol=1e-5)


def test_pruned_weights_stay_pruned() -> None:
    one = network()
    with torch.no_grad():
        weight = next(p for p in one.parameters() if p.dim() == 2)
        weight[:, ::2] = 0
        weight[0] = 0  # a filter without any weight
        weight[1, :] = 0
        weight[1, 1] = 2.0  # and one with a single one: no room for two directions
    first, second = surfaces.directions(one, surfaces.kept(one, pruned=True), seed=0)
    name = next(n for n, p in one.named_parameters() if p is weight)
    for found in (first, second):
        assert not found[name][:, ::2].any()
        assert not found[name][0].any()
    assert_allclose(first[name][1].norm(), 2.0, rtol=1e-6)
    assert not second[name][1].any()


def test_a_surface_is_the_loss_of_changed_weights() -> None:
    one, (x, y) = network(), samples()
    first, second = surfaces.directions(one, surfaces.kept(one, pruned=False), seed=0)
    landscape = surfaces.Landscape(one, x, y, first, second)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    found = surfaces.surface(landscape, 3, 0.5)
    assert all(before[name].equal(tensor) for name, tensor in one.state_dict().items())
    changed = network()
    with torch.no_grad():
        for name, tensor in changed.named_parameters():
            tensor += 0.5 * first[name] - 0.5 * second[name]
        expected = nn.functional.cross_entropy(changed(x).double(), y)
    assert_allclose(found[0, 2], expected, rtol=1e-6)  # row: b = -.5; column: a = .5
    centre = nn.functional.cross_entropy(one(x).double(), y)
    assert_allclose(found[1, 1], centre, rtol=1e-6)


def test_rows_that_are_known_are_not_made_again() -> None:
    one, (x, y) = network(), samples()
    first, second = surfaces.directions(one, surfaces.kept(one, pruned=False), seed=0)
    landscape = surfaces.Landscape(one, x, y, first, second)
    whole = surfaces.surface(landscape, 4, 1.0)
    known = whole.copy()
    known[[1, 3]] = np.nan
    known[0] = 7.0
    kept: list[np.ndarray] = []
    made: list[int] = []

    def mapper(make, indices):  # type: ignore[no-untyped-def]
        made.extend(indices)
        return map(make, indices)

    found = surfaces.surface(
        landscape, 4, 1.0, known=known, keep=lambda a: kept.append(a.copy()), mapper=mapper
    )
    assert made == [1, 3]
    assert (found[0] == 7.0).all()
    assert_allclose(found[1:], whole[1:])
    assert len(kept) == 2
    assert np.isnan(kept[0][3]).all()


def test_a_stopped_landscape_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RunFolder.create(tmp_path / "out")
    one, (x, y) = network(), samples()
    first, second = surfaces.directions(one, surfaces.kept(one, pruned=False), seed=0)
    landscape = surfaces.Landscape(one, x, y, first, second)
    whole = surfaces.surface(landscape, 4, 1.0)
    real, done = surfaces.Landscape.row, []

    def row(self: surfaces.Landscape, side: int, span: float, index: int) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        return real(self, side, span, index)

    monkeypatch.setattr(surfaces.Landscape, "row", row)
    with pytest.raises(KeyboardInterrupt):
        landscapes.kept_surface(place, "parent", landscape, 4, 1.0, 0)
    done.clear()
    found = landscapes.kept_surface(place, "parent", landscape, 4, 1.0, 0)
    assert done == [2, 3]
    assert_allclose(found, whole)
    done.clear()
    monkeypatch.setattr(surfaces.Landscape, "row", real)
    other = surfaces.Landscape(network(1), x, y, first, second)  # another network: nothing is known
    assert not np.allclose(landscapes.kept_surface(place, "parent", other, 4, 1.0, 0), whole)


def test_the_line_ends_at_the_networks() -> None:
    a, b = network(0), network(1)
    x, y = samples()
    (start, _), (middle, _), (end, accuracy) = surfaces.line(a, b, x, y, (0.0, 0.5, 1.0))
    assert_allclose(start, nn.functional.cross_entropy(a(x).double(), y), rtol=1e-6)
    assert_allclose(end, nn.functional.cross_entropy(b(x).double(), y), rtol=1e-6)
    assert accuracy == (b(x).argmax(1) == y).double().mean()
    assert middle not in (start, end)
    wider = models.build("mlp", (1, 4, 4), 3, {"hidden": [7]}, seed=0)
    with pytest.raises(ValueError, match="different shapes"):
        surfaces.line(a, wider, x, y, (0.0,))


def test_larger_weights_of_the_same_function_are_as_sharp() -> None:
    """Filter normalisation: scaling a ReLU layer up and the next one down changes nothing."""
    one, two = network(), network()
    x, y = samples()
    linear = [m for m in two.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        linear[0].weight *= 4
        linear[0].bias *= 4
        linear[1].weight /= 4
    found = [
        surfaces.sharpness(n, surfaces.kept(n, pruned=False), x, y, draws=3) for n in (one, two)
    ]
    assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_the_whole_page(tmp_path: Path) -> None:
    """`report --full`: every analysis, one page that needs nothing else."""
    folder = tmp_path / "tiny"
    run_serial(tiny(), RunFolder.create(folder))
    torch.use_deterministic_algorithms(True, warn_only=True)  # see test_seen
    small = full.Sizes(members=2, samples=40, images=4, channels=2, steps=2, side=3)
    said: list[str] = []
    try:
        page = Path(full.write(folder, said.append, small))
    finally:
        torch.use_deterministic_algorithms(True)
    text = page.read_text()
    for title in (
        "Diversity of outputs",
        "Prediction clusters",
        "Saliency maps",
        "Feature visualisation",
        "Perceptual hashes of what members see",
        "Loss landscapes",
        "Not for this run",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "boundaries: boundaries can be drawn of inputs with two numbers" in text
    assert text.count("data:text/csv;base64,") >= 6
    assert not re.search(r'(?:src|href)="https?://', text.replace("http://www.w3.org", ""))
    assert len(said) == 7
    assert (folder / "analysis/landscape_2d.png").exists()


def test_an_address_needs_something_to_spread() -> None:
    with pytest.raises(ValueError, match="--address: only the analyses of --full"):
        commands_report.report("nowhere", full=False, address="local")


def test_sharpness_over_runs_by_hand() -> None:
    """0.1, 0.3 and 0.4, 0.8: means 0.2 and 0.6, errors 0.1 and 0.2; differences 0.3 and 0.5."""
    found = {
        run: pd.DataFrame({"network": ["parent", "tuned"], "loss": [1.0, 2.0], "sharpness": both})
        for run, both in (("a", [0.1, 0.4]), ("b", [0.3, 0.8]))
    }
    assert landscapes.over_runs(found).rows == [
        ["parent", "1.0000 ± 0.0000", "0.2000 ± 0.1000", "", "2"],
        ["tuned", "2.0000 ± 0.0000", "0.6000 ± 0.2000", "+0.4000 ± 0.1000", "2"],
    ]
