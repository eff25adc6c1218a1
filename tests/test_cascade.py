"""A cascade asks fewer members and answers as the ensemble."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_api import TRAIN, TUNE, VAL, Net, make
from torch import Tensor, nn

import ray_subnets as rs
from ray_subnets import cascade, datasets, members, metrics, models
from ray_subnets.baselines.independent import Independent
from ray_subnets.cascade import NEVER, Cascade, Point, load_cascade
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import combine
from ray_subnets.config import ModelSection
from ray_subnets.ensembles import Ensemble


class Fixed(nn.Module):
    """A member whose input is the number of its answer; counts what it is asked."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.answers[x[:, 0].long()]


K, N, C = 8, 400, 5


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """Members that agree on most samples, `(K, N, C)`."""
    generator = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(N, C, generator=generator)
    return common + 1.5 * torch.randn(K, N, C, generator=generator)


@pytest.fixture(scope="module")
def labels(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.mean(0)).sample()


def of(logits: Tensor, how: str = "probabilities") -> Ensemble:
    members = [Fixed(one) for one in logits]
    ids = [f"m{i}" for i in range(len(members))]
    return Ensemble(members, ids=ids, preprocess=rs.Preprocess(), combine=how).eval()


INPUTS = torch.arange(N, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("how", ["probabilities", "vote"])
def test_what_is_certain_names_the_class_of_the_whole_ensemble(logits: Tensor, how: str) -> None:
    p, asked = cascade.replay(logits, NEVER, how)
    whole = combine(logits, how)
    clear = cascade.lead(whole) > 1e-9  # of a tie either class may be named
    assert torch.equal(p.argmax(1)[clear], whole.argmax(1)[clear])
    assert int(asked.min()) > K // 2  # nobody is certain before half of them spoke
    assert float(asked.double().mean()) < K


def test_settled_by_hand() -> None:
    """After 3 of 4 members a lead of 1/3 is a sum of 1: the last one can even it, not turn it."""
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    assert cascade.settled(p, 3, 4, NEVER).tolist() == [True, False, False]
    assert cascade.settled(p, 1, 4, 0.15).tolist() == [True, True, False]


@pytest.mark.parametrize("how", ["probabilities", "vote"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, NEVER])
def test_the_module_does_what_the_replay_says(logits: Tensor, how: str, threshold: float) -> None:
    ensemble = of(logits, how)
    p, asked = Cascade(ensemble, threshold).predict(INPUTS, batch_size=64)
    expected, count = cascade.replay(logits, threshold, how)
    assert torch.equal(asked, count)
    assert torch.allclose(p.double(), expected, atol=1e-6)
    passes = [member.asked for member in ensemble.members]
    assert passes == [int((count > k).sum()) for k in range(K)]


def test_the_curve_ends_at_the_whole_ensemble(logits: Tensor, labels: Tensor) -> None:
    points = cascade.curve(logits, labels)
    whole = combine(logits)
    assert points[-1].threshold == NEVER
    assert points[-1].agreement == 1
    assert points[-1].accuracy == metrics.accuracy(whole, labels)
    assert points[0].passes < 1.1
    for cheap, dear in pairwise(points):
        assert cheap.passes <= dear.passes
        assert cheap.share == cheap.passes / K
    first = cascade.curve(logits, labels, [0.0])[0]
    assert first.passes == 1
    assert first.accuracy == metrics.accuracy(logits[0].softmax(1), labels)


def test_luck_is_not_chosen() -> None:
    """A cheap point that reaches the accuracy below dearer ones that do not."""

    def point(passes: float, accuracy: float) -> Point:
        return Point(passes / 4, passes, passes / 4, accuracy, 1.0, 0.1)

    points = [point(1, 0.8), point(1.5, 0.95), point(2, 0.85), point(3, 0.9), point(4, 0.91)]
    assert cascade.cheapest(points, 0.9) is points[3]
    assert cascade.cheapest(points, 0.99) is points[4]


def test_it_keeps_the_accuracy_for_fewer_passes(logits: Tensor, labels: Tensor) -> None:
    ensemble = of(logits)
    fitted = Cascade.fit(ensemble, INPUTS[:200], labels[:200], keep=0.99, by="accuracy")
    assert fitted.point is not None
    full = metrics.accuracy(combine(logits[:, :200]), labels[:200])
    assert fitted.point.accuracy >= 0.99 * full
    assert fitted.point.share < 0.7
    p, asked = fitted.predict(INPUTS[:200])
    assert float(asked.double().mean()) == fitted.point.passes
    assert metrics.accuracy(p, labels[:200]) == fitted.point.accuracy
    assert sorted(fitted.ensemble.ids) == sorted(ensemble.ids)
    best = min(range(K), key=lambda k: metrics.nll(logits[k, :200].softmax(1), labels[:200]))
    assert fitted.ensemble.ids[0] == f"m{best}"


def test_by_default_it_keeps_the_answers(logits: Tensor, labels: Tensor) -> None:
    fitted = Cascade.fit(of(logits), INPUTS, labels, keep=0.99)
    assert fitted.point is not None
    whole = combine(logits).argmax(1)
    p, asked = fitted.predict(INPUTS)
    same = float((p.argmax(1) == whole).double().mean())
    assert 0.99 <= same == fitted.point.agreement < 1
    assert float(asked.double().mean()) < 0.9 * K
    looser = Cascade.fit(of(logits), INPUTS, labels, keep=0.9).point
    assert looser is not None
    assert looser.passes < fitted.point.passes


def test_choosing_for_a_budget_is_forward_selection(logits: Tensor, labels: Tensor) -> None:
    few = cascade.choose(of(logits), INPUTS, labels, 3)
    assert len(few) == 3
    chosen = [int(id[1:]) for id in few.ids]
    pairs = {
        k: metrics.nll(combine(logits[[chosen[0], k]]), labels) for k in range(K) if k != chosen[0]
    }
    assert min(pairs, key=lambda k: pairs[k]) == chosen[1]
    for count in (0, K + 1):
        with pytest.raises(ValueError, match=r"count: \d of 8 members"):
            cascade.choose(of(logits), INPUTS, labels, count)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    ensemble = make(model, method=rs.Sparse(sparsity=0.3), children=5, tune=TUNE)
    fitted = Cascade.fit(ensemble, *VAL, keep=0.99)
    fitted.save(tmp_path / "a")
    again = rs.load_cascade(tmp_path / "a", model=model)
    assert again.ensemble.ids == fitted.ensemble.ids
    assert again.point == fitted.point
    assert torch.equal(again(TRAIN[0]), fitted(TRAIN[0]))
    warm = rs.load_cascade(tmp_path / "a", model=model, calibrated=True)
    assert fitted.temperature is not None
    expected = metrics.scaled(fitted(VAL[0]), fitted.temperature)
    assert torch.allclose(warm(VAL[0]).double(), expected, atol=1e-5)
    record = json.loads((tmp_path / "a/cascade.json").read_text())
    (tmp_path / "a/cascade.json").write_text(json.dumps(record | {"threshold": "high"}))
    with pytest.raises(ValueError, match=r"cascade.json: threshold: .*or save it again"):
        rs.load_cascade(tmp_path / "a", model=model)
    (tmp_path / "a/cascade.json").unlink()
    with pytest.raises(ValueError, match=r"no cascade.json|not a run folder"):
        rs.load_cascade(tmp_path / "a", model=model)


def test_what_cannot_be_a_cascade(logits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"combine: .*not by logits"):
        Cascade(of(logits, "logits"), 0.5)
    with pytest.raises(ValueError, match="no temperature was fitted"):
        Cascade(of(logits), 0.5, calibrated=True)(INPUTS)


def test_members_of_other_methods_are_saved_as_they_were_taken(tmp_path: Path) -> None:
    data = datasets.load("digits")
    networks = [
        models.build("mlp", data.input_shape, data.num_classes, {}, seed=i) for i in range(4)
    ]
    folder = RunFolder.create(tmp_path / "all")
    members.write_method(folder, ModelSection(name="mlp"), data, Independent(), networks)
    whole, x = members.load(tmp_path / "all"), data.test.images[:20]
    few = whole.take(["003", "001"])
    few.save(tmp_path / "few")
    again = members.load(tmp_path / "few")
    assert again.ids == ("003", "001")
    assert torch.equal(again(x), few(x))
    fitted = Cascade.fit(whole, data.validation.images, data.validation.labels, keep=0.5)
    fitted.save(tmp_path / "cascade")
    loaded = load_cascade(tmp_path / "cascade")
    assert loaded.ensemble.ids == fitted.ensemble.ids
    for one, other in zip(fitted.predict(x), loaded.predict(x), strict=True):
        assert torch.equal(one, other)
