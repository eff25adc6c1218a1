"""Diversity: by hand, against libraries, from run folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import entropy
from sklearn.metrics import jaccard_score, zero_one_loss
from tiny import run_serial, tiny
from torch import Tensor
from torchmetrics.functional import kl_divergence as torchmetrics_kl

from analysis import diversity, errors, folders
from analysis.measured import measured
from ray_subnets import metrics
from ray_subnets.checkpoints import RunFolder

REPOSITORY = Path(__file__).parent.parent


def drawn(seed: int = 0, k: int = 4, n: int = 60, c: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = 2 * torch.randn(n, c, generator=generator)
    logits = shared + torch.randn(k, n, c, generator=generator)
    return logits, torch.randint(c, (n,), generator=generator)


def test_matrices_by_hand() -> None:
    """Two members, two samples, two classes."""
    p = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.2, 0.8]]], dtype=torch.float64)
    kl = 0.5 * (
        0.9 * np.log(0.9 / 0.6)
        + 0.1 * np.log(0.1 / 0.4)
        + 0.5 * np.log(0.5 / 0.2)
        + 0.5 * np.log(0.5 / 0.8)
    )
    assert_allclose(metrics.kl_divergence(p.log())[0, 1], kl)
    # sample 2: member 0 says class 0 (the first of a tie), member 1 class 1
    assert metrics.disagreement(p)[0, 1] == 0.5
    # two outputs that sum to one correlate by 1, or by 0 where they are constant
    assert_allclose(metrics.correlation(p)[0, 1], 0.5)


def test_matrices_are_those_of_libraries() -> None:
    logits, _ = drawn()
    p = logits.double().softmax(2)
    correlation, kl = metrics.correlation(p), metrics.kl_divergence(logits)
    disagreement = metrics.disagreement(logits)
    for i in range(4):
        for j in range(4):
            each = [
                np.corrcoef(a, b)[0, 1] for a, b in zip(p[i].numpy(), p[j].numpy(), strict=True)
            ]
            assert_allclose(correlation[i, j], np.mean(each), atol=1e-12)
            assert_allclose(kl[i, j], entropy(p[i].T, p[j].T).mean(), atol=1e-12)
            assert_allclose(kl[i, j], torchmetrics_kl(p[i], p[j]), atol=1e-12)
            loss = zero_one_loss(logits[i].argmax(1), logits[j].argmax(1))
            assert_allclose(disagreement[i, j], loss, atol=1e-12)


def test_overlap_of_mistakes() -> None:
    mistakes = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    found = errors.overlap(mistakes)
    assert_allclose(found[0, 1], 1 / 3)
    assert found[0, 2] == 0
    assert found[2, 2] == 1
    assert errors.how_many_wrong(mistakes).tolist() == [0.4, 0.4, 0.2, 0.0]
    logits, labels = drawn(1)
    wrong = errors.wrong(logits, labels)
    for i, j in ((0, 1), (2, 3)):
        assert_allclose(errors.overlap(wrong)[i, j], jaccard_score(wrong[i], wrong[j]))


def test_the_same_mistake() -> None:
    """Labels 0; both are wrong on the first three samples, with the same class on two of them."""
    classes = torch.tensor([[1, 2, 1, 0], [1, 2, 2, 1]])
    outputs = torch.nn.functional.one_hot(classes, 3).float()
    labels = torch.zeros(4, dtype=torch.long)
    assert_allclose(errors.same_mistake(outputs, labels), 2 / 3)
    assert np.isnan(errors.same_mistake(outputs[:1], labels))


def test_the_split_by_hand() -> None:
    """Two members, two samples, one number that matters (two classes mirror each other).

    Errors of class 0: member 0: .2, -.4; member 1: .4, .2. Biases -.1, .3, mean .1; variances .09,
    .01; covariance ((.3)(.1) + (-.3)(-.1)) / 2 = .03. MSE ((.3)^2 + (-.1)^2) / 2 = .05.
    """
    p0 = torch.tensor([[0.2, 0.6], [0.4, 0.2 + 1.0]], dtype=torch.float64)
    p = torch.stack([p0, 1 - p0], 2)
    labels = torch.tensor([1, 0])
    found = errors.over_samples(p, labels)
    assert_allclose(found.mse, 2 * 0.05)
    assert_allclose(found.bias_squared, 2 * 0.01)
    assert_allclose(found.variance, 2 * 0.05)
    assert_allclose(found.covariance, 2 * 0.03)
    assert_allclose(found.total(), found.mse)


def test_the_split_is_numpys_and_adds_up() -> None:
    logits, labels = drawn(2)
    p = logits.double().softmax(2)
    found = errors.over_samples(p, labels)
    onehot = np.eye(5)[labels.numpy()]
    covariances = [np.cov(p.numpy()[:, :, c] - onehot[:, c], bias=True) for c in range(5)]
    own = sum(np.diag(one).mean() for one in covariances)
    pairs = sum((one.sum() - np.trace(one)) / 12 for one in covariances)
    assert_allclose([found.variance, found.covariance], [own, pairs])
    assert_allclose(found.mse, metrics.brier(p.mean(0), labels))
    assert_allclose(found.total(), found.mse)
    one = errors.over_samples(p[:1], labels)
    assert one.covariance == 0
    assert_allclose(one.total(), one.mse)


def test_the_split_over_runs() -> None:
    """Runs that are all alike have bias only; independent ones have no covariance to speak of."""
    logits, labels = drawn(3)
    p = logits.double().softmax(2)
    alike = errors.over_runs(torch.stack([p, p, p]), labels)
    assert_allclose([alike.variance, alike.covariance], 0, atol=1e-15)
    assert_allclose(alike.bias_squared, metrics.brier(p.mean(0), labels))
    generator = torch.Generator().manual_seed(4)
    noise = 0.1 * torch.randn(40, *p.shape, generator=generator, dtype=torch.float64)
    found = errors.over_runs(p + noise, labels)
    assert_allclose(found.total(), found.mse)
    assert_allclose(found.variance, 5 * 0.01 * 39 / 40, rtol=0.02)
    assert abs(found.covariance) < 0.001


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("diverse")
    for seed in (0, 1):
        run_serial(tiny(f"seed={seed}"), RunFolder.create(root / f"tiny-{seed}"))
    return [root / "tiny-0", root / "tiny-1"]


def test_numbers_are_those_of_the_run(two_runs: list[Path]) -> None:
    record = json.loads((two_runs[0] / "result.json").read_text())["ensemble"]
    found = diversity.find(folders.open_all(two_runs))
    row = found.tables[0].numbers.iloc[0]
    for name in ("disagreement", "kl", "correlation"):
        assert_allclose(row[name], record["diversity"][name], atol=1e-12)
    assert_allclose(row["accuracy"], record["test"]["accuracy"])
    assert_allclose(row["nll"], record["test"]["nll"])
    assert found.tables[0].rows[0][-1] == "2"
    means = found.tables[0].numbers["kl"]
    assert f"{means.mean():.4f} ± {means.sem():.4f}" in found.tables[0].markdown()


def analysis(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["analysis.diversity", *arguments])
    return diversity.main()


def test_the_command_on_a_copy(
    two_runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(two_runs[0], tmp_path / "elsewhere")
    assert analysis(monkeypatch, str(copy), "--groups") == 0
    assert "| sparse | 2 |" in capsys.readouterr().out
    written = {path.name for path in (copy / "analysis").iterdir()}
    assert {"diversity.csv", "diversity.md", "heat_correlation.png", "heat_kl.svg"} <= written
    pairs = pd.read_csv(copy / "analysis/pairs.csv")
    assert len(pairs) == 4 * 4 + 2 * 2 + 2 * 2
    assert (pairs[pairs["member"] == pairs["other"]]["disagreement"] == 0).all()
    table = pd.read_csv(copy / "analysis/diversity.csv")
    assert set(table["ensemble"]) == {"noisy", "sparse", "stochastic"}


def test_what_is_missing_is_one_line(
    two_runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(two_runs[0], tmp_path / "partial")
    member = folders.Run.open(copy).selected[0]
    (copy / f"outputs/{member}.npz").unlink()
    unfinished = shutil.copytree(two_runs[0], tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    cases = (
        ([copy], "cannot be read"),
        ([unfinished], "did not finish"),
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "not a run folder"),
        ([two_runs[0], two_runs[0]], "given twice"),
    )
    for named, message in cases:
        assert analysis(monkeypatch, *map(str, named)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert message in said


def test_no_analysis_needs_ray() -> None:
    """Every module is imported with Ray hidden."""
    code = """
import sys, importlib, pkgutil
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
import analysis
for module in pkgutil.iter_modules(analysis.__path__):
    if not module.ispkg:
        importlib.import_module(f"analysis.{module.name}")
print("imported")
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert answer.stdout.strip() == "imported", answer.stderr


def test_a_weighted_ensemble_is_measured_as_it_is_combined(tmp_path: Path) -> None:
    settings = tiny("single=false", "combine=weighted", "select.by=accuracy")
    record = run_serial(settings, RunFolder.create(tmp_path / "run"))
    run = folders.Run.open(tmp_path / "run")
    found = measured(run, folders.SELECTED, "ours").numbers
    test = record["ensemble"]["test"]
    assert found["nll"] == pytest.approx(test["nll"], rel=1e-12)
    assert found["accuracy"] == test["accuracy"]
    shares = run.shares(run.selected)
    assert shares is not None
    assert len(set(shares)) > 1
    assert run.shares(["parent"]) == [record["parent"]["validation"]["accuracy"]]
