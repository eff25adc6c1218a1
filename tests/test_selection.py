"""Who joins, and with what weight: greedy selection and weighted means, by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_serial, tiny
from torch import Tensor

import ray_subnets
from ray_subnets import driver, metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import combine, greedy, right_class
from ray_subnets.selection import Decision, joined, select, share_of
from ray_subnets.summary import load_outputs

Finished = tuple[RunFolder, dict[str, Any]]


def answers(candidates: int, samples: int = 30) -> tuple[Tensor, Tensor]:
    """Logits of networks that are right more often than not, and the labels."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (samples,), generator=generator)
    logits = 2 * torch.randn(candidates, samples, 4, generator=generator)
    logits[:, torch.arange(samples), labels] += 1.5
    return logits, labels


def by_hand(logits: Tensor, labels: Tensor, steps: int) -> list[tuple[int, float]]:
    """Every candidate tried at every step, each ensemble scored anew."""
    chosen: list[int] = []
    trace = []
    for _ in range(steps):
        nll = {
            i: metrics.nll(combine(logits[[*chosen, i]]), labels)
            for i in range(len(logits))
            if i not in chosen
        }
        best = min(nll, key=lambda i: nll[i])
        chosen.append(best)
        trace.append((best, nll[best]))
    return trace


def right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([right_class(one, labels) for one in logits])


# --- pure functions -----------------------------------------------------------------------------


def test_greedy_takes_what_helps_most_each_time() -> None:
    logits, labels = answers(7)
    expected, found = by_hand(logits, labels, 7), greedy(right(logits, labels), 7)
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [nll for _, nll in found] == pytest.approx([nll for _, nll in expected])
    # Of this data it is not the order of fitness.
    alone = [metrics.nll(combine(logits[[i]]), labels) for i in range(7)]
    assert [i for i, _ in found] != sorted(range(7), key=lambda i: alone[i])


def test_greedy_stops_when_nothing_improves() -> None:
    logits, labels = answers(7)
    every = by_hand(logits, labels, 7)
    worse = next(k for k in range(1, 7) if every[k][1] >= every[k - 1][1])
    assert 1 < worse < 7
    found = greedy(right(logits, labels))
    assert [i for i, _ in found] == [i for i, _ in every[:worse]]
    assert greedy(right(logits, labels), 2) == found[:2]
    assert len(greedy(right(logits, labels), 99)) == 7
    # A copy of the best helps nobody, and of equal ones the first is taken.
    assert greedy(right(logits[[0, 0, 0]], labels))[0][0] == 0
    assert len(greedy(right(logits[[0, 0, 0]], labels))) == 1


def test_greedy_of_hopeless_answers_is_finite() -> None:
    """Probabilities that underflow to zero."""
    logits = torch.tensor([[[2000.0, 0.0]], [[0.0, 2000.0]]])
    assert greedy(right(logits, torch.tensor([1])))[0][0] == 1
    assert np.isfinite(greedy(right(logits[:1], torch.tensor([1])))[0][1])


def test_decisions_of_a_greedy_selection() -> None:
    alone = select({"a": 3.0, "b": 2.0, "c": None, "d": 1.0}, None, by="nll", errors={"c": "NaN"})
    assert joined(alone, [("d", 0.5), ("a", 0.25)]) == [
        Decision("d", True, 1, "joined as number 1: validation NLL 0.50000"),
        Decision("a", True, 2, "joined as number 2: validation NLL 0.25000"),
        Decision("b", False, 3, "alone number 2; not taken by greedy selection"),
        Decision("c", False, None, "failed: NaN"),
    ]


def test_weighted_mean_by_hand() -> None:
    """Members' softmax weighted 3 : 1 (eq. 3.24)."""
    probabilities = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.1, 0.9]]])
    found = combine(probabilities.log(), "weighted", [0.6, 0.2])
    expected = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    logits, _ = answers(5)
    torch.testing.assert_close(combine(logits, "weighted", [0.3] * 5), combine(logits))


def test_share_is_a_probability() -> None:
    """The accuracy, or exp(-NLL): 1 for a network that is always right."""
    validation = {"nll": np.log(4), "accuracy": 0.6}
    assert share_of(validation, "nll") == pytest.approx(0.25)
    assert share_of(validation, "accuracy") == 0.6
    assert share_of({"nll": 0.0}, "nll") == 1


# --- whole runs ---------------------------------------------------------------------------------

QUICK = ("single=false", "children.0.sigma=0.3")


@pytest.fixture(scope="module")
def greedy_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "greedy")
    return folder, run_serial(tiny(*QUICK, "select.method=greedy", "select.count="), folder)


def test_a_run_selects_greedily_and_writes_the_trace(greedy_run: Finished) -> None:
    folder, record = greedy_run
    ids = sorted(child["id"] for child in record["children"])
    saved = load_outputs(folder, ids, "validation")
    every = by_hand(saved.logits, saved.labels, len(ids))
    trace = record["ensemble"]["trace"]
    assert 1 <= len(trace) < len(ids)
    assert [step["id"] for step in trace] == [ids[i] for i, _ in every[: len(trace)]]
    nll = [step["validation_nll"] for step in trace]
    assert nll == pytest.approx([value for _, value in every[: len(trace)]])
    assert nll == sorted(nll, reverse=True)
    assert every[len(trace)][1] >= nll[-1]
    assert {child["id"] for child in record["children"] if child["selected"]} == {
        step["id"] for step in trace
    }
    without = record["ensemble"]["validation"]["without_parent"]
    assert without["nll"] == pytest.approx(nll[-1])
    assert set(ray_subnets.load(folder.root).ids) == {step["id"] for step in trace}


def test_members_are_asked_in_the_order_of_joining(greedy_run: Finished) -> None:
    """`by_size` follows the trace."""
    folder, record = greedy_run
    order = [step["id"] for step in record["ensemble"]["trace"]]
    saved = load_outputs(folder, order, "test")
    for k, row in enumerate(record["ensemble"]["by_size"], start=1):
        assert row["members"] == k
        expected = metrics.nll(combine(saved.logits[:k]), saved.labels)
        assert row["nll"] == pytest.approx(expected)


def test_greedy_with_a_count(tmp_path: Path) -> None:
    settings = tiny(*QUICK, "select.method=greedy", "select.count=5")
    record = run_serial(settings, RunFolder.create(tmp_path / "run"))
    assert len(record["ensemble"]["members"]) == 5 == len(record["ensemble"]["trace"])
    assert sorted(child["rank"] for child in record["children"]) == list(range(1, 9))


@pytest.mark.parametrize("by", ["nll", "accuracy"])
@pytest.mark.parametrize("parent", ["true", "false"])
def test_a_weighted_ensemble_is_the_same_from_disk(by: str, parent: str, tmp_path: Path) -> None:
    """Recorded test numbers, by hand from saved logits, and by the loaded ensemble."""
    folder = RunFolder.create(tmp_path / "run")
    options = ("combine=weighted", f"select.by={by}", f"include_parent={parent}")
    record = run_serial(tiny(*QUICK, *options), folder)
    ids = record["ensemble"]["members"]
    assert ("parent" in ids) == (parent == "true")
    validation, test = (load_outputs(folder, ids, split) for split in ("validation", "test"))
    measure = metrics.accuracy if by == "accuracy" else lambda p, y: np.exp(-metrics.nll(p, y))
    shares = [measure(p.double().softmax(1), validation.labels) for p in validation.logits]
    assert max(shares) - min(shares) > 0.01
    weights = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    expected = (weights[:, None, None] * test.logits.double().softmax(2)).sum(0)
    recorded = record["ensemble"]["test"]
    assert recorded["nll"] == pytest.approx(metrics.nll(expected, test.labels))
    plain = metrics.nll(combine(test.logits), test.labels)
    assert abs(plain - recorded["nll"]) > 1e-5

    data = driver.load_data(tiny())
    p = ray_subnets.load(folder.root)(data.test.images)
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-6)
    assert metrics.nll(p, data.test.labels) == pytest.approx(recorded["nll"], abs=1e-6)
    last = record["ensemble"]["by_size"][-1]["nll"]
    assert last == pytest.approx(record["ensemble"]["without_parent"]["nll"])
