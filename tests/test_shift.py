"""Detection of data from elsewhere; numbers over corrupted cells; images from elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from test_mnist import write_idx
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from ray_subnets import Data, Preprocess, Split, datasets, metrics
from ray_subnets.shifts import shift
from ray_subnets.shifts.outsiders import ood_split


def scores(seed: int, levels: int | None) -> tuple[Tensor, Tensor]:
    """300 insiders and 170 outsiders that overlap; rounded to few levels, they tie."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(300, generator=generator, dtype=torch.float64)
    outside = 1 + torch.randn(170, generator=generator, dtype=torch.float64)
    if levels:
        inside, outside = ((x * levels).round() / levels for x in (inside, outside))
    return inside, outside


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_detection_against_scikit_learn(seed: int, levels: int | None) -> None:
    """With and without ties; insiders are the positive class of the error at 95 %."""
    inside, outside = scores(seed, levels)
    both = torch.cat([inside, outside]).numpy()
    strange = np.concatenate([np.zeros(300), np.ones(170)])
    ours = metrics.auroc(inside, outside)
    assert ours == pytest.approx(roc_auc_score(strange, both), abs=1e-12)
    # torchmetrics wants scores in [0, 1] and counts in float32.
    squeezed = torch.from_numpy(both).sigmoid()
    theirs = binary_auroc(squeezed, torch.from_numpy(strange).long())
    assert ours == pytest.approx(float(theirs), abs=1e-5)
    wrong, right, _ = roc_curve(1 - strange, -both, drop_intermediate=False)
    assert metrics.fpr_at_95(inside, outside) == pytest.approx(wrong[right >= 0.95].min())


def test_detection_by_hand() -> None:
    """Insiders 1 2 2 3, outsiders 2 4: of eight pairs 6 are right and 2 tie."""
    inside, outside = torch.tensor([2.0, 1, 3, 2]), torch.tensor([2.0, 4])
    assert metrics.auroc(inside, outside) == (1 + 4 + 2 * 0.5) / 8
    assert metrics.fpr_at_95(inside, outside) == 0.5  # the threshold is 3
    same = torch.zeros(5)
    assert (metrics.auroc(same, same), metrics.fpr_at_95(same, same)) == (0.5, 1.0)
    assert (metrics.auroc(same, same + 1), metrics.fpr_at_95(same, same + 1)) == (1.0, 0.0)
    hundred = torch.arange(100.0)
    assert metrics.fpr_at_95(hundred, torch.tensor([94.0])) == 1  # the 95th smallest is 94
    assert metrics.fpr_at_95(hundred, torch.tensor([94.5])) == 0


def test_uncertainties_by_hand() -> None:
    """Two members that are sure of different classes, that are both unsure, that are both sure."""
    sure, other, unsure = [40.0, -40.0], [-40.0, 40.0], [0.0, 0.0]
    logits = torch.tensor([[sure, unsure, sure], [other, unsure, sure]])
    one = float(np.log(2))
    information = metrics.mutual_information(logits)
    assert information.tolist() == pytest.approx([one, 0, 0], abs=1e-12)
    mean = logits.double().softmax(2).mean(0)
    assert metrics.entropy(mean).tolist() == pytest.approx([one, one, 0], abs=1e-12)
    found = metrics.uncertainties(mean, logits)
    assert found["maximum_probability"].tolist() == pytest.approx([0.5, 0.5, 0])
    assert torch.equal(found["mutual_information"], information)
    assert torch.equal(found["entropy"], metrics.entropy(mean))
    assert set(metrics.uncertainties(mean, logits[:1])) == {"maximum_probability", "entropy"}
    certain = torch.tensor([[1.0, 0.0]])
    assert metrics.entropy(certain).item() == 0


def test_mutual_information_is_the_mean_divergence_from_the_mean() -> None:
    logits = 2 * torch.randn(5, 40, 7, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(2)
    kl = (p * (p.log() - p.mean(0).log())).sum(2).mean(0)
    assert torch.allclose(metrics.mutual_information(logits), kl)


def test_scaled_is_the_temperature_of_combined_probabilities() -> None:
    """T = 1 changes nothing; the fitted one is the best of a grid."""
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(500, 4, generator=generator)).double().softmax(1)
    labels = torch.multinomial(metrics.scaled(p, 2.0), 1, generator=generator)[:, 0]
    assert torch.allclose(metrics.scaled(p, 1.0), p)
    temperature = metrics.temperature_of(p, labels)
    best = metrics.nll(metrics.scaled(p, temperature), labels)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert best <= metrics.nll(metrics.scaled(p, temperature * factor), labels)


# --- cells --------------------------------------------------------------------------------------


def answers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, 4, generator=generator)).double().softmax(1)
    return p, torch.randint(4, (count,), generator=generator)


def test_mean_over_cells_and_pool() -> None:
    """The mean of cells is a mean of their metrics; the pool has those of all images at once."""
    parts = {("fog", s): answers(50 + s, s) for s in (1, 2, 3)}
    cells = {key: shift.cell(*part) for key, part in parts.items()}
    mean = shift.mean_over_cells(cells, ["fog"], [1, 2, 3])
    for key in ("accuracy", "nll", "ece"):
        metric = getattr(metrics, key)
        assert mean[key] == pytest.approx(sum(metric(*part) for part in parts.values()) / 3)
    p, labels = (torch.cat(list(column)) for column in zip(*parts.values(), strict=True))
    pool = shift.pooled(cells, ["fog"], [1, 2, 3])
    assert pool["accuracy"] == pytest.approx(metrics.accuracy(p, labels))
    assert pool["nll"] == pytest.approx(metrics.nll(p, labels))
    assert pool["ece"] == pytest.approx(metrics.ece(p, labels))
    assert pool["ece"] != pytest.approx(mean["ece"], abs=1e-3)


def test_cells_survive_json_and_must_be_complete() -> None:
    cells = {("fog", s): shift.cell(*answers(20, s)) for s in (1, 2)}
    again = {
        key: shift.Cell(**{k: tuple(v) if isinstance(v, list) else v for k, v in read.items()})
        for key, read in ((key, json.loads(json.dumps(asdict(c)))) for key, c in cells.items())
    }
    assert again == cells
    with pytest.raises(ValueError, match=r"3 of 5 .* are missing, the first is fog at severity 3"):
        shift.mean_over_cells(cells, ["fog"])
    with pytest.raises(ValueError, match=r"1 of 2 .* are missing, the first is snow at severity 1"):
        shift.pooled(cells, ["fog", "snow"], [1])


# --- images from elsewhere ----------------------------------------------------------------------


def images_of(*shape: int, name: str = "mine", dtype: torch.dtype = torch.uint8) -> Data:
    split = Split(torch.zeros(4, *shape, dtype=dtype), torch.arange(4) % 2)
    return Data(name, split, split, split, 2, Preprocess())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 40)])
def test_embedded_outsiders_fit_any_shape(shape: tuple[int, ...]) -> None:
    for name, count in (("digits", 1797), ("patches", 2000)):
        images = ood_split(name, images_of(*shape))
        assert images.shape == (count, *shape)
        assert images.dtype == torch.uint8
        assert torch.equal(images, ood_split(name, images_of(*shape)))
        few = ood_split(name, images_of(*shape), limit=10)
        assert torch.equal(few, images[torch.arange(10) * count // 10])
        assert images.flatten(1).double().std(1).median() > 5
    digits = ood_split("digits", images_of(*shape))
    assert torch.equal(digits[:, 0], digits[:, -1])
    patches = ood_split("patches", images_of(*shape), seed=1)
    assert not torch.equal(patches, ood_split("patches", images_of(*shape)))


def test_resized_digits_are_digits() -> None:
    """At their own size they are those of scikit-learn; enlarged they have the same mean."""
    digits = datasets.load("digits")
    own = ood_split("digits", images_of(1, 8, 8))
    assert torch.equal(own[-540:], digits.test.images)  # type: ignore[arg-type]
    large = ood_split("digits", images_of(3, 32, 32))
    assert float(large.double().mean()) == pytest.approx(float(own.double().mean()), rel=0.02)


def test_a_second_data_set(tmp_path: Path) -> None:
    """MNIST for 28 x 28 images: its test part, as grey or colour."""
    write_idx(tmp_path, zipped=True)
    test = datasets.load("mnist", root=str(tmp_path)).test.images
    assert isinstance(test, Tensor)
    grey = ood_split("mnist", images_of(1, 28, 28, name="fashion_mnist"), root=str(tmp_path))
    assert torch.equal(grey, test)
    colour = ood_split("mnist", images_of(3, 28, 28), root=str(tmp_path), limit=3)
    assert colour.shape == (3, 3, 28, 28)
    with pytest.raises(ValueError, match=r"mnist images are \(1, 28, 28\), .*: digits or patches"):
        ood_split("mnist", images_of(3, 32, 32), root=str(tmp_path))


def test_outsiders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"digits has the classes of mnist; .*instance patches"):
        ood_split("digits", images_of(1, 28, 28, name="mnist"))
    with pytest.raises(ValueError, match="fashion_mnist has the classes of fashion_mnist"):
        ood_split("fashion_mnist", images_of(1, 28, 28, name="fashion_mnist"))
    with pytest.raises(ValueError, match=r"mine has no uint8 images .* but torch.float32 \(5,\)"):
        ood_split("digits", images_of(5, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"cannot read svhn: data: unknown data set 'svhn'; known"):
        ood_split("svhn", images_of(3, 32, 32))
    with pytest.raises(ValueError, match=r"cannot read mnist: data.root: no train-images"):
        ood_split("mnist", images_of(1, 28, 28), root=str(tmp_path))
    with pytest.raises(ValueError, match="spirals has no uint8 images in memory"):
        ood_split("spirals", images_of(1, 28, 28))
    large = images_of(1, 500, 8)
    with pytest.raises(ValueError, match="patches are at most 427 x 640 pixels, not 500 x 8"):
        ood_split("patches", large)
