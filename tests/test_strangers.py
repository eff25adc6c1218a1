"""What users' own networks, data and calls do wrong: one line, or made to work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from tiny import TINY, run_serial, tiny
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import ray_subnets as rs
from ray_subnets import configfile, datasets, driver, flops, metrics, models, supervised, table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Batches, Data, Preprocess, Split, some
from ray_subnets.recipes import Training

X, Y = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
METHOD, TUNE = rs.Sparse(sparsity=0.5), rs.OneCycle(epochs=1)


def net(outputs: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, outputs))


def make(model: nn.Module | None = None, **how: Any) -> rs.Ensemble:
    settings: dict[str, Any] = {"method": METHOD, "children": 2, "tune": TUNE, "progress": False}
    return rs.ensemble(model or net(), (X, Y), (X, Y), **settings | how)


@pytest.fixture(scope="module")
def ensemble() -> rs.Ensemble:
    return make()


# --- networks -------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Two outputs while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_second_output_in_training_is_left_alone() -> None:
    made = make(Auxiliary())
    assert made(X).shape == (90, 3)


def test_probabilities_are_no_logits() -> None:
    model = nn.Sequential(net(), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"^model: it gives probabilities.*leave out the softmax"):
        make(model)
    assert make(nn.Sequential(net(), nn.LogSoftmax(1)))(X).shape == (90, 3)


def test_computed_weights_are_named() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"^model: 0\.weight is computed from other tensors"):
        make(model)


class Weights(nn.Module):
    """What Hugging Face's networks return."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"logits": self.net(x)})()


def test_who_gives_an_object_with_logits_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"gives Output for 2 inputs.*return its \.logits"):
        make(Weights())


def test_shared_weights_cost_each_of_their_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].weight = model[0].weight
    cost = flops.forward_cost(model, (8,))
    assert cost.total == 2 * (64 + 64 + 24)
    assert cost.by_weight == {"0.weight": 2 * 128, "2.weight": 2 * 24}
    assert cost.nonzero({"0.weight": 0.5}) == 2 * (64 + 24)


MINE = """
import torch
from torch import nn

def broken(num_classes):
    return {}["weights"]

def frozen(num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))
    return model.requires_grad_(False)

made = frozen(10)

def missing():
    raise FileNotFoundError("photos.bin")

def real():
    return (torch.rand(30, 4), torch.rand(30)), (torch.rand(9, 4), torch.rand(9))

def grey():
    x = torch.randint(0, 256, (30, 9, 7), dtype=torch.uint8)
    return (x, torch.arange(30) % 3), (x, torch.arange(30) % 3)
"""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model=mine:broken"], [r"model: building it raised KeyError: 'weights'", r"mine\.py, l"]),
        (["model=mine:made"], [r"model: it is a network; name a function or class"]),
        (
            ["data=mine:missing"],
            [r"'mine:missing' raised FileNotFoundError: photos\.bin \(", "mine"],
        ),
        (["data=mine:real"], [r"gives labels of torch\.float32; they must be integers"]),
        (["children=[{method: sparse, count: 1, sparsity: 2, tune: {epochs: 1}}]"], [r"not 2$"]),
        (["children=[{method: sparse, count: 1, sparsity: 2, tune: {epochs: x}}]"], ["and 1 more"]),
    ],
)
def test_on_the_command_line_it_is_one_line(
    command: Command, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    import re

    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = command("run", "tiny.yaml", "--serial", *settings, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for word in words:
        assert re.search(word, line), line


def test_an_all_frozen_network_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_2.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    record = run_serial(
        tiny("model=mine_2:frozen", "single=false"), RunFolder.create(tmp_path / "run")
    )
    assert record["parent"]["test"]["accuracy"] > 0.2
    assert models.build("mine_2:frozen", (1, 8, 8), 10, {}, 0)[1].weight.requires_grad
    data = datasets.load("mine_2:grey")
    assert data.input_shape == (1, 9, 7)


# --- data that changed ----------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    settings = tiny("single=false")
    run_serial(settings, folder)
    data = driver.load_data(settings)
    driver.prepare(settings, data, folder)
    changed = data.train.labels.clone()
    changed[7] = (changed[7] + 1) % 10
    other = rs.Data(
        data.name,
        rs.Split(data.train.images, changed),
        *(data.validation, data.test, data.num_classes, data.preprocess),
    )
    with pytest.raises(ValueError, match=r"^data: digits is not what .* inputs or labels changed"):
        driver.prepare(settings, other, folder)


def test_a_run_does_not_go_on_with_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights fit, and mean something else."""
    code = MINE.replace("return model.requires_grad_(False)", "return model")
    (tmp_path / "mine_3.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings, folder = tiny("single=false", "model=mine_3:frozen"), RunFolder.create(tmp_path / "a")
    run_serial(settings, folder)
    data = driver.load_data(settings)
    driver.prepare(settings, data, folder)
    (tmp_path / "mine_3.py").write_text(code.replace("nn.ReLU()", "nn.Tanh()") + "# changed\n")
    importlib.invalidate_caches()
    importlib.reload(sys.modules["mine_3"])
    with pytest.raises(ValueError, match=r"^model: .*gives other answers than .* holds: its code"):
        driver.prepare(settings, data, folder)


def test_two_do_not_work_in_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with folder.alone():
        with pytest.raises(ValueError, match="RUN: another process works in"), folder.alone():
            pass
        assert (tmp_path / "run/.lock").exists()
    with folder.alone():
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_call_that_was_stopped_at_once_goes_on(tmp_path: Path) -> None:
    whole = make(folder=tmp_path / "whole")
    early = tmp_path / "early"
    early.mkdir()
    (early / "given.json").write_bytes((tmp_path / "whole/given.json").read_bytes())
    assert torch.equal(make(folder=early)(X), whole(X))
    with pytest.raises(ValueError, match=r"folder: .*holds another run"):
        make(net(width=9), folder=early)


def test_data_of_python_are_not_known_by_name() -> None:
    with pytest.raises(ValueError, match=r"data: they were given in Python.*ensemble\("):
        datasets.load("given")


def test_without_test_data_the_record_says_so(ensemble: rs.Ensemble) -> None:
    assert ensemble.record is not None
    assert ensemble.record["data"]["test_is_validation"] is True
    tested = make(test=(X[:30], Y[:30]))
    assert tested.record is not None
    assert "test_is_validation" not in tested.record["data"]
    assert table.measured_on(ensemble.record).startswith("validation data")
    assert table.measured_on(tested.record) == "test data"


@pytest.mark.parametrize("sorted_", [True, False])
def test_some_samples_are_of_all_classes(sorted_: bool) -> None:
    labels = torch.arange(100) % 4
    labels = labels.sort().values if sorted_ else labels
    rows = some(labels, 20)
    assert len(rows) == 20
    assert len(labels[rows].unique()) == 4
    assert torch.equal(rows, torch.arange(20)) == (not sorted_)
    assert torch.equal(some(labels, 500), torch.arange(100))
    numbers = torch.linspace(0, 1, 100)
    assert torch.equal(some(numbers, 4), torch.tensor([0, 25, 50, 75]))


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"crop": -1}, "crop: must be a whole number of pixels"),
        ({"crop": 1.5}, "crop: must be a whole number of pixels"),
        ({"flip": "no"}, "flip: must be True or False, not 'no'"),
        ({"preprocess": (0.5, 0.5)}, r"preprocess: must be Preprocess\(mean"),
        ({"preprocess": rs.Preprocess(0.5, 0.5)}, r"preprocess: must be Preprocess\(mean"),
        ({"resources": "x"}, "resources: must be a mapping"),
        ({"folder": 5}, "folder: must be a path or a URI, not 5"),
    ],
)
def test_arguments_of_another_kind(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        make(**how)


def test_gradients_that_are_off_are_on_for_tuning(ensemble: rs.Ensemble) -> None:
    with torch.no_grad():
        made = make()
    assert torch.equal(made(X), ensemble(X))


def test_arrays_of_numpy_are_answered(ensemble: rs.Ensemble) -> None:
    x = X.numpy()
    assert torch.equal(ensemble(x), ensemble(X))
    assert torch.equal(ensemble.predict(x).probabilities, ensemble.predict(X).probabilities)
    cascade = rs.Cascade.fit(ensemble, x, Y.numpy())
    assert torch.equal(cascade.predict(x)[0], cascade.predict(X)[0])
    assert cascade(x).shape == (90, 3)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (X[:, :4], r"x: inputs are \(N, 6\), not \(90, 4\)"),
        (X.byte(), "x: these are uint8 images, and the ensemble was not made of images"),
    ],
)
def test_inputs_that_do_not_fit(ensemble: rs.Ensemble, x: Tensor, says: str) -> None:
    for ask in (ensemble, ensemble.predict, ensemble.ask):
        with pytest.raises(ValueError, match=says):
            ask(x)


@pytest.mark.parametrize("y", [Y[:5], Y[:0], Y.float(), Y[:, None]])
def test_labels_that_do_not_fit(ensemble: rs.Ensemble, y: Tensor) -> None:
    for ask in (ensemble.calibrate, lambda x, y: rs.Cascade.fit(ensemble, x, y)):
        with pytest.raises(ValueError, match=r"y: must be integer labels \(N,\) of the 90 inputs"):
            ask(X, y)
    assert not ensemble.calibrated


def test_labels_and_fractions_out_of_range(ensemble: rs.Ensemble) -> None:
    with pytest.raises(ValueError, match="y: labels must be from 0 to 2"):
        ensemble.calibrate(X, Y + 1)
    for keep in (0, 2):
        with pytest.raises(ValueError, match="keep: must be above 0 and at most 1"):
            rs.Cascade.fit(ensemble, X, Y, keep=keep)


def test_grey_images_need_no_channel(tmp_path: Path) -> None:
    settings = tiny("single=false")
    run_serial(settings, RunFolder.create(tmp_path / "run"))
    ensemble = rs.load(tmp_path / "run")
    images = driver.load_data(settings).test.images
    assert torch.equal(ensemble(images[:, 0].numpy()), ensemble(images))


def test_a_vote_of_one_is_what_it_thinks(tmp_path: Path) -> None:
    vote, mean = (
        run_serial(tiny("single=false", f"combine={how}"), RunFolder.create(tmp_path / how))
        for how in ("vote", "probabilities")
    )
    assert vote["parent"]["test"] == mean["parent"]["test"]
    assert vote["mean_child"] == mean["mean_child"]
    assert vote["ensemble"]["by_size"][0] == mean["ensemble"]["by_size"][0]


def test_only_one_problem_is_one() -> None:
    group = "{method: sparse, count: 1, sparsity: 1.5, tune: {epochs: 1}}"
    with pytest.raises(ValueError, match=r"sparsity: .*, not 1\.5$"):
        configfile.parse(TINY, "tiny", [f"children=[{group}]"])


# --- networks of all kinds ------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_cost_what_they_multiply(kind: type[nn.RNNBase], gates: int) -> None:
    mkldnn = torch.backends.mkldnn.enabled
    cost = flops.forward_cost(Recurrent(kind), (5, 6))
    assert cost.total == 5 * 2 * gates * 8 * (6 + 8) + 2 * 8 * 3
    assert torch.backends.mkldnn.enabled == mkldnn


def test_a_module_under_two_names_costs_what_it_is_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(6, 6))
            self.second, self.head = self.first, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.second(self.first(x)))
            return out

    cost = flops.forward_cost(Twice(), (6,))
    assert cost.by_weight == {"first.0.weight": 2 * 2 * 36, "head.weight": 2 * 18}
    assert cost.nonzero({"first.0.weight": 0.5}) == cost.total - 72


def test_volumes(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1), nn.AdaptiveAvgPool3d(1)),
        *(nn.Flatten(), nn.Linear(4, 3)),
    )
    x, y = torch.randn(30, 1, 4, 4, 4), torch.arange(30) % 3
    made = rs.ensemble(
        *(model, (x, y), (x, y)), method=METHOD, children=2, tune=TUNE, progress=False
    )
    assert made(x).shape == (30, 3)


def test_a_last_batch_of_one_is_left_out_where_it_has_no_variance() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(33, 6), torch.arange(33) % 3
    made = rs.ensemble(
        *(model, (x, y), (x, y)),
        method=METHOD,
        children=2,
        tune=rs.OneCycle(epochs=1, batch_size=16),
        progress=False,
    )
    assert made.record is not None
    assert {child["images"] for child in made.record["children"]} == {32}


def test_a_vote_of_one_from_python_is_what_it_thinks() -> None:
    one = make(combine="vote", select={"count": 1})
    model = one.members[0]
    expected = model(X).double().softmax(1).float()
    assert torch.equal(one(X), expected)
    assert torch.equal(one.predict(X).probabilities.float(), expected)
    assert len(set(make(combine="vote")(X)[:, 0].tolist())) <= 3  # two voters: 0, 1/2 and 1


def test_tuples_as_the_signature_has_them() -> None:
    method = rs.Stochastic(
        sparsity=0.5, probabilities="mixture", mixture=(0.25, 0.1, 0.75, 0.1), anneal_epochs=1
    )
    assert len(make(method=method).members) == 2
    assert len(make(method=rs.Sparse(sparsity=0.5, whole=("2.*",))).members) == 2


def test_inputs_of_another_type_are_told(ensemble: rs.Ensemble) -> None:
    for x in (X.long(), X > 0):
        with pytest.raises(ValueError, match=r"x: inputs are floating point.*, not torch\."):
            ensemble(x)


def test_a_name_with_a_bracket_is_a_name() -> None:
    model = nn.Sequential()
    model.add_module("a[0]", nn.Linear(6, 8))
    model.add_module("b", nn.Linear(8, 8))
    model.add_module("c", nn.Linear(8, 3))
    model.get_submodule("a[0]").requires_grad_(False)
    made = make(model)
    for member in made.members:
        assert bool((member.get_parameter("a[0].weight") != 0).all())
        assert float((member.get_parameter("b.weight") != 0).float().mean()) == pytest.approx(0.5)


def test_a_network_that_draws_when_it_is_asked_goes_on(tmp_path: Path) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(nn.functional.dropout(self.body(x), 0.5, True))
            return out

    torch.manual_seed(0)
    model = Draws()
    for _ in range(2):
        assert len(make(model, folder=tmp_path / "a").members) == 2


# --- data -----------------------------------------------------------------------------------------


def test_features_that_hardly_change_do_not_explode() -> None:
    images = torch.randint(0, 255, (50, 3), dtype=torch.uint8)
    images[:, 1] = 7
    images[0, 2], images[1:, 2] = 1, 0
    found = datasets.statistics(images)
    assert found.std[1:] == (1.0, 1.0)
    assert found.std[0] > 0.2


def test_mean_and_std_from_a_file() -> None:
    settings = tiny("data.mean=[0]", "data.std=[1]")
    assert (settings.data.mean, settings.data.std) == ((0.0,), (1.0,))
    data = driver.load_data(settings)
    assert (data.preprocess.mean, data.preprocess.std) == ((0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"data\.std"):
        tiny("data.mean=[0]", "data.std=[-1]")


def test_data_in_bfloat16_and_on_disk_are_told_apart(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self, sign: float) -> None:
            self.sign = sign

        def __len__(self) -> int:
            return len(X)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return self.sign * X[i] + 0.01 * torch.randn(6), int(Y[i])

    how: dict[str, Any] = {"method": METHOD, "children": 2, "tune": TUNE, "progress": False}
    first = rs.ensemble(net(), Rows(1.0), (X, Y), folder=tmp_path / "a", **how)
    again = rs.ensemble(net(), Rows(1.0), (X, Y), folder=tmp_path / "a", **how)
    assert torch.equal(first(X), again(X))
    with pytest.raises(ValueError, match=r"folder: .*holds another run"):
        rs.ensemble(net(), Rows(-1.0), (X, Y), folder=tmp_path / "a", **how)
    half = Data("half", *[Split(X.bfloat16(), Y)] * 3, 3, Preprocess())
    assert half.content != Data("half", *[Split(-X.bfloat16(), Y)] * 3, 3, Preprocess()).content


# --- several workers ------------------------------------------------------------------------------


def test_several_workers_do_not_stop_alone_and_draw_other_masks() -> None:
    """One that stopped by itself would leave the others waiting for its gradients."""
    data = Data("some", *[Split(X, Y)] * 3, 3, Preprocess())
    training, seen = Training(epochs=1, batch_size=30), list[list[bool]]()

    class Noted(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(torch.ones_like(x))
            seen.append((out != 0).flatten().tolist())
            return x * out

    for rank in (0, 1):
        model = nn.Sequential(nn.Linear(6, 8), Noted(0.5), nn.Linear(8, 3))
        nn.init.constant_(model[0].weight, torch.nan)
        batches = Batches(data, 30, 0, rank=rank, world=2)
        optimizer = supervised.make_optimizer(model, training)
        (done,) = supervised.train(model, batches, training, optimizer, id="parent", seed=0)
        assert done.loss != done.loss
        with pytest.raises(supervised.Diverged, match="parent: the loss is nan in epoch 1"):
            supervised.check_loss(done)
    assert seen[:3] != seen[3:]
    with pytest.raises(supervised.Diverged):
        list(
            supervised.train(
                *(model, Batches(data, 30, 0), training, optimizer), id="parent", seed=0
            )
        )


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["all", 1.0, ["a"], True])
def test_a_selection_of_another_kind_is_told(select: Any) -> None:
    with pytest.raises(ValueError, match=r"select: must be a number of members, or a mapping"):
        make(select=select)


def test_inputs_that_are_no_tensor_are_told(ensemble: rs.Ensemble) -> None:
    with pytest.raises(ValueError, match="x: must be a tensor or an array, not list"):
        ensemble.predict([1.0])  # type: ignore[arg-type]


def test_the_nearest_name_and_the_right_command_are_told(command: Command) -> None:
    done = command("run", "quickstrt")
    assert (done.returncode, done.stderr) == (
        2,
        "ray-subnets: CONFIG: no file 'quickstrt'; did you mean quickstart?\n",
    )
    done = command("run", "benchmark_digits")
    assert done.returncode == 2
    assert "rows: this is a benchmark; use 'ray-subnets benchmark'" in done.stderr


def test_a_perfect_score_is_zero() -> None:
    assert str(metrics.nll(torch.eye(3), torch.arange(3))) == "0.0"
