"""Ensembles of regression networks: measures by hand, and `ray_subnets.ensemble(head=...)`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import equal
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import gaussian_nll_loss, mse_loss
from torch.testing import assert_close

import ray_subnets as rs
from ray_subnets import regression, report
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.configfile import checked
from ray_subnets.regressor import Regressor
from ray_subnets.selection import fitness_of, share_of
from ray_subnets.supervised import Diverged

Pair = tuple[Tensor, Tensor]


def pair(n: int, seed: int = 0) -> Pair:
    """A line in four dimensions, with noise that grows along the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 4, generator=generator) * 2 - 1
    noise = torch.randn(n, generator=generator) * torch.exp(x[:, 0] - 1)
    return x, 2 * x[:, 0] - x[:, 1] + 3 + noise


TRAIN, VAL, TEST = pair(128), pair(64, 1), pair(64, 2)
TUNE = rs.OneCycle(epochs=2, batch_size=32, lr=0.02)
ALL = [
    rs.Noisy(sigma=0.05, count=2, partition=2),
    rs.Sparse(sparsity=0.5, partition=2, count=2),
    rs.Stochastic(partition=2, anneal_epochs=1, count=2),
]


class Flat(nn.Sequential):
    """`(N,)` instead of `(N, 1)`."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y[:, 0]


def net(outputs: int, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))


def make(model: Any, head: str, **how: Any) -> Regressor:
    settings = {"progress": False, "tune": TUNE, "method": ALL, "test": TEST, **how}
    if isinstance(settings["method"], rs.Noisy):
        del settings["tune"]
    train, val = settings.pop("train", TRAIN), settings.pop("val", VAL)
    made = rs.ensemble(model, train, val, head=head, **settings)
    assert isinstance(made, Regressor)
    return made


@pytest.fixture(scope="module")
def gaussian() -> Regressor:
    return make(net(2), "gaussian", parent=rs.Training(epochs=6, batch_size=32, lr=0.02))


# --- by hand ------------------------------------------------------------------------------------


def test_losses_are_those_of_torch() -> None:
    outputs, y = torch.randn(9, 2), torch.randn(9)
    mean, log_variance = outputs.unbind(1)
    expected = gaussian_nll_loss(mean, y, log_variance.exp(), full=True, reduction="sum")
    assert_close(regression.gaussian_nll(outputs, y), expected)
    expected = mse_loss(mean, y, reduction="sum")
    assert_close(regression.squared_error(mean, y), expected)
    assert_close(regression.squared_error(mean[:, None], y), expected)


def test_a_mixture_of_two() -> None:
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, math.log(4.0)]]])
    said = regression.mixture(outputs, "gaussian")
    assert_close([float(said.mean), float(said.aleatoric)], [2.0, 2.5])
    assert_close([float(said.epistemic), float(said.variance)], [1.0, 3.5])
    said = regression.mixture(outputs[..., :1], "mse")
    assert [float(said.mean), float(said.aleatoric), float(said.variance)] == [2.0, 0.0, 1.0]


def test_the_variance_is_that_of_samples_of_the_mixture() -> None:
    outputs = torch.tensor([[[0.5, 0.2]], [[-1.0, -0.7]], [[2.0, 0.1]]])
    drawn = torch.cat(
        [
            m + math.exp(s / 2) * torch.randn(200_000, generator=torch.Generator().manual_seed(i))
            for i, (m, s) in enumerate(outputs[:, 0].tolist())
        ]
    )
    said = regression.mixture(outputs, "gaussian")
    assert_close(float(said.mean), float(drawn.mean()), atol=0.01, rtol=0)
    assert_close(float(said.variance), float(drawn.var()), atol=0.02, rtol=0)


def test_measures() -> None:
    outputs, y = torch.tensor([[[1.0, 0.0], [2.0, math.log(4.0)]]]), torch.tensor([1.0, 5.0])
    found = regression.scores(outputs, y, "gaussian")
    nll = (math.log(2 * math.pi) / 2 + math.log(8 * math.pi) / 2 + 9 / 8) / 2
    assert found == pytest.approx({"rmse": math.sqrt(4.5), "mae": 1.5, "nll": nll})
    assert set(regression.scores(outputs[..., :1], y, "mse")) == {"rmse", "mae"}


def test_kl_is_that_of_torch() -> None:
    one, other = torch.randn(7, 2), torch.randn(7, 2)
    p, q = (Normal(o[:, 0], (o[:, 1] / 2).exp()) for o in (one, other))
    expected = float(kl_divergence(p, q).mean())
    assert regression.gaussian_kl(one, other) == pytest.approx(expected, rel=1e-5)
    assert regression.gaussian_kl(one, one) == pytest.approx(0, abs=1e-12)


def test_fitness_and_shares() -> None:
    validation = {"rmse": 0.5, "mae": 0.4, "nll": -1.0}
    assert fitness_of(validation, "rmse") == -0.5
    assert fitness_of(validation, "nll") == 1.0
    assert share_of(validation, "nll") == 1.0


# --- from a network to an ensemble --------------------------------------------------------------


def test_a_gaussian_head(gaussian: Regressor) -> None:
    assert len(gaussian) == 6
    answer, said = gaussian(VAL[0]), gaussian.predict(VAL[0], batch_size=10)
    assert answer.shape == (64, 2)
    assert_close(answer, torch.stack([said.mean, said.variance], 1).float())
    outputs = gaussian.ask(VAL[0])
    assert outputs.shape == (6, 64, 2)
    assert_close(said.mean, outputs[..., 0].double().mean(0))
    assert_close(said.aleatoric, outputs[..., 1].double().exp().mean(0))
    assert_close(said.epistemic, outputs[..., 0].double().var(0, correction=0))
    assert bool((said.epistemic > 0).all())
    far = gaussian.predict(VAL[0] * 20)
    assert float(far.epistemic.mean()) > 10 * float(said.epistemic.mean())


def test_the_record_has_what_the_ensemble_says(gaussian: Regressor) -> None:
    assert gaussian.record is not None
    record = gaussian.record
    for split, (x, y) in {"test": TEST, "validation": VAL}.items():
        found = record["ensemble"][split]
        told = found if split == "test" else found["without_parent"]
        said = gaussian.predict(x)
        assert told["rmse"] == pytest.approx(float((said.mean - y).square().mean().sqrt()))
        scale = said.variance.sqrt()
        nll = -float(Normal(said.mean, scale).log_prob(y.double()).mean())
        assert told["nll"] == pytest.approx(nll)
    assert set(record["ensemble"]["test"]) == {"rmse", "mae", "nll"}
    assert record["ensemble"]["diversity"]["spread"] > 0
    assert [one["members"] for one in record["ensemble"]["by_size"]] == [1, 2, 3, 4, 5, 6]
    assert record["ensemble"]["by_size"][-1]["nll"] == pytest.approx(told_nll(record))
    assert record["data"]["outputs"] == 2
    assert all(child["kl_from_parent"] > 0 for child in record["children"])


def told_nll(record: dict[str, Any]) -> float:
    return float(record["ensemble"]["test"]["nll"])


def test_training_learns_mean_and_noise() -> None:
    train, test = pair(1024), pair(512, 2)
    one = make(
        net(2),
        "gaussian",
        train=train,
        val=test,
        test=None,
        parent=rs.Training(epochs=30, batch_size=64, lr=0.01),
        method=rs.Sparse(sparsity=0.5, partition=2),
        children=2,
        tune=rs.OneCycle(epochs=20, batch_size=64, lr=0.05),
    )
    said = one.predict(test[0])
    truth = (2 * (test[0][:, 0] - 1)).exp()
    clean = 2 * test[0][:, 0] - test[0][:, 1] + 3
    assert regression.rmse(said.mean, clean) < 0.2
    together = torch.stack([said.aleatoric.log(), truth.double().log()])
    assert float(torch.corrcoef(together)[0, 1]) > 0.8


@pytest.mark.parametrize("kind", [nn.Sequential, Flat])
def test_an_mse_head(kind: type[nn.Sequential], tmp_path: Path) -> None:
    model = net(1, kind)
    made = make(model, "mse", parent=rs.Training(epochs=4, batch_size=32, lr=0.01), select=4)
    assert made.record is not None
    assert len(made) == 4
    said = made.predict(TEST[0])
    told = made.record["ensemble"]["test"]
    assert told["rmse"] == pytest.approx(float((said.mean - TEST[1]).square().mean().sqrt()))
    assert set(told) == {"rmse", "mae"}
    assert float(said.aleatoric.abs().max()) == 0
    assert_close(made(TEST[0])[:, 1].double(), said.epistemic, rtol=1e-5, atol=1e-7)
    ranked = sorted(made.record["children"], key=lambda child: child["rank"])
    errors = [child["validation"]["rmse"] for child in ranked]
    assert errors == sorted(errors)
    assert [child["selected"] for child in ranked] == [True] * 4 + [False] * 2
    made.save(tmp_path / "kept")
    again = rs.load(tmp_path / "kept", model=model)
    assert torch.equal(again(TEST[0]), made(TEST[0]))


def test_saved_and_loaded_bit_for_bit(gaussian: Regressor, tmp_path: Path) -> None:
    gaussian.save(tmp_path / "kept")
    for on_demand in (False, True):
        again = rs.load(tmp_path / "kept", model=net(2), on_demand=on_demand)
        assert isinstance(again, Regressor)
        assert again.head == "gaussian"
        assert torch.equal(again.predict(TEST[0]).variance, gaussian.predict(TEST[0]).variance)
    some = gaussian.take(gaussian.ids[:2])
    assert isinstance(some, Regressor)
    outputs = gaussian.ask(TEST[0])[:2]
    assert torch.equal(some.predict(TEST[0]).mean, regression.mixture(outputs, "gaussian").mean)


def test_batched_members_say_the_same() -> None:
    for head, model in (("gaussian", net(2)), ("mse", net(1)), ("mse", net(1, Flat))):
        made = make(model, head, method=rs.Noisy(sigma=0.05), children=3)
        made.batched = False
        apart = made(TEST[0])
        made.batched = True
        assert_close(made(TEST[0]), apart)
        assert made.logits(TEST[0]).shape == (3, 64, regression.OUTPUTS[head])


def test_exported(gaussian: Regressor, tmp_path: Path) -> None:
    gaussian.export(tmp_path / "all.pt2")
    program = torch.export.load(tmp_path / "all.pt2").module()
    assert_close(program(TEST[0]), gaussian(TEST[0]))


def test_by_name_with_a_data_set_and_a_loader() -> None:
    class Samples(torch.utils.data.Dataset[tuple[Tensor, float]]):
        def __getitem__(self, index: int) -> tuple[Tensor, float]:
            return TRAIN[0][index], float(TRAIN[1][index])

        def __len__(self) -> int:
            return len(TRAIN[1])

    loader = torch.utils.data.DataLoader(Samples(), batch_size=32, shuffle=True)
    training = rs.Training(epochs=2, batch_size=32, lr=0.01)
    how: dict[str, Any] = {"parent": training, "method": rs.Noisy(sigma=0.02), "children": 2}
    by_name = {"name": "mlp", "hidden": [8]}
    scanned = make(by_name, "gaussian", train=loader, **how)
    column = (TRAIN[0], TRAIN[1][:, None].double())
    in_memory = make(by_name, "gaussian", train=column, **how)
    assert torch.equal(scanned(TEST[0]), in_memory(TEST[0]))


def test_built_by_name_it_needs_no_network_to_load(tmp_path: Path) -> None:
    training = rs.Training(epochs=1, batch_size=32, lr=0.01)
    made = make({"name": "mlp", "hidden": [8]}, "mse", parent=training)
    made.save(tmp_path / "kept")
    again = rs.load(tmp_path / "kept")
    assert isinstance(again, Regressor)
    assert torch.equal(again(TEST[0]), made(TEST[0]))


@pytest.mark.cluster
def test_on_ray_the_same_bits(tmp_path: Path) -> None:
    how: dict[str, Any] = {"parent": rs.Training(epochs=2, batch_size=32, lr=0.01)}
    here = make(net(2), "gaussian", **how)
    there = make(
        net(2), "gaussian", ray=True, resources={"actors": 2}, folder=tmp_path / "r", **how
    )
    assert here.ids == there.ids
    assert equal(here.state_dict(), there.state_dict())
    assert torch.equal(here(TEST[0]), there(TEST[0]))


def test_the_same_call_goes_on_and_another_head_does_not(tmp_path: Path) -> None:
    first = make(net(2), "gaussian", folder=tmp_path / "run")
    again = make(net(2), "gaussian", folder=tmp_path / "run")
    assert torch.equal(first(TEST[0]), again(TEST[0]))
    with pytest.raises(ValueError, match=r"^folder: .*holds another run"):
        make(net(1), "mse", folder=tmp_path / "run")


# --- what is refused ----------------------------------------------------------------------------

Y = TRAIN[1]
REFUSED: list[tuple[str, int, dict[str, Any], str]] = [
    ("sum", 2, {}, "^head: must be classes, gaussian or mse, not 'sum'"),
    ("gaussian", 1, {}, r"^model: it gives \(2, 1\).*head='gaussian'.*\(2, 2\)$"),
    ("mse", 2, {}, r"^model: it gives \(2, 2\).*head='mse'.*\(2, 1\) or \(2,\)$"),
    ("gaussian", 2, {"train": (TRAIN[0], TRAIN[0])}, r"^train: targets of shape \(128, 4\)"),
    ("gaussian", 2, {"train": (TRAIN[0], Y > 0)}, "^train: targets are torch.bool"),
    ("mse", 1, {"val": (VAL[0], VAL[1] / 0)}, "^val: .*64 targets that are NaN or infinite"),
    ("mse", 1, {"combine": "vote"}, "^combine: vote is for classifiers"),
    ("mse", 1, {"select": {"by": "nll"}}, "^select.by: nll is not for head mse; use rmse"),
    ("gaussian", 2, {"select": {"by": "accuracy"}}, "^select.by: accuracy is not for head gau"),
    ("gaussian", 2, {"select": {"method": "greedy"}}, "^select.method: greedy is for class"),
    ("gaussian", 2, {"method": rs.Noisy(kl_target=0.1)}, "^method.kl_target: for classifiers only"),
    (
        "gaussian",
        2,
        {"tune": rs.OneCycle(epochs=1, label_smoothing=0.1)},
        r"^method\[1\].tune.label_smoothing|^tune.label_smoothing: for classifiers only",
    ),
    ("gaussian", 2, {"calibrated": True}, "^calibrated: for classifiers only"),
    ("classes", 2, {"train": (TRAIN[0], (Y > 3).long()), "test": None}, "^val: labels are .*head="),
]


@pytest.mark.parametrize(("head", "outputs", "how", "match"), REFUSED)
def test_refused_in_one_line(head: str, outputs: int, how: dict[str, Any], match: str) -> None:
    settings = {"method": ALL, "tune": TUNE, **how}
    if not isinstance(settings["method"], list):
        settings["children"] = 2
        del settings["tune"]
    with pytest.raises(ValueError, match=match) as caught:
        rs.ensemble(
            net(outputs),
            settings.pop("train", TRAIN),
            settings.pop("val", VAL),
            head=head,
            progress=False,
            **settings,
        )
    assert "\n" not in str(caught.value)


def test_what_is_for_classifiers(gaussian: Regressor, tmp_path: Path) -> None:
    x, y = VAL
    only = "for classifiers only, not for an ensemble with head='gaussian'"
    with pytest.raises(ValueError, match=f"^cascade: {only}"):
        rs.Cascade.fit(gaussian, x, y)
    with pytest.raises(ValueError, match=f"^distill: {only}"):
        rs.distill(gaussian, TRAIN, VAL)
    with pytest.raises(ValueError, match=f"^calibrate: {only}"):
        gaussian.calibrate(x, y)
    assert gaussian.temperature is None
    make(net(2), "gaussian", method=rs.Noisy(sigma=0.1), children=2, folder=tmp_path / "run")
    with pytest.raises(ValueError, match=f"^report: {only}"):
        report.write(RunFolder(tmp_path / "run"))
    from ray_subnets.commands import serve as commands_serve
    from ray_subnets.distributed.serving import What

    with pytest.raises(ValueError, match=f"^serve: {only}"):
        commands_serve._examined(What(str(tmp_path / "run")), 1, 1)


def test_rmse_is_not_for_classifiers() -> None:
    config: dict[str, Any] = {
        "name": "a",
        "data": "digits",
        "model": "mlp",
        "parent": {"epochs": 1},
        "children": [{"method": "noisy", "count": 2, "sigma": 0.1}],
        "select": {"by": "rmse"},
    }
    with pytest.raises(ValueError, match=r"^a: select\.by: rmse is for regression"):
        checked(config, "a")
    made = checked(config | {"head": "mse"}, "a")
    assert isinstance(made, Config)
    assert made.task("there").head == "mse"


def test_a_command_line_run_says_where_regression_is_done() -> None:
    from ray_subnets import driver

    config = {
        "name": "a",
        "data": "digits",
        "model": "mlp",
        "head": "gaussian",
        "parent": {"epochs": 1},
        "children": [{"method": "noisy", "count": 2, "sigma": 0.1}],
    }
    made = checked(config, "a")
    with pytest.raises(ValueError, match=r"^head: gaussian, but labels of digits are torch\.int64"):
        driver.build(made, driver.load_data(made))


def test_a_gaussian_that_overflows_diverged() -> None:
    model = net(2)
    with torch.no_grad():
        model[-1].get_parameter("bias")[1] = -1e5  # a variance of zero
    with pytest.raises(Diverged, match=r"^parent: .*not finite"):
        make(model, "gaussian")
