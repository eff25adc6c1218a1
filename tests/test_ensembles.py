"""An ensemble that is kept: uncertainty, calibration, saving, moving, members made on demand."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_api import ALL, TRAIN, VAL, Net, make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.parameter import is_lazy

import ray_subnets as rs
from ray_subnets import metrics
from ray_subnets.ensembles import Ensemble


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two children of every method and their parent, of a network by name."""
    place = tmp_path_factory.mktemp("ensembles") / "run"
    make(
        {"name": "lenet_s"},
        parent=rs.Training(epochs=2, batch_size=32, lr=0.02),
        train=big(TRAIN),
        val=big(VAL),
        method=[rs.Noisy(sigma=0.5, count=2, partition=2), *ALL[1:]],
        include_parent=True,
        folder=place,
    )
    return place


def big(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Images as large as a LeNet wants."""
    return pair[0].repeat(1, 1, 7, 7), pair[1]


X, Y = big(VAL)


@pytest.fixture(params=["built", "on demand"])
def ensemble(run: Path, request: pytest.FixtureRequest) -> Ensemble:
    return rs.load(run, on_demand=request.param == "on demand")


def same(a: Ensemble, b: Ensemble) -> bool:
    return a.ids == b.ids and torch.equal(a.logits(X), b.logits(X)) and torch.equal(a(X), b(X))


def test_uncertainties_are_those_of_all_logits(ensemble: Ensemble) -> None:
    """Members are asked one at a time, in batches; the numbers are those of the metrics."""
    said, logits = ensemble.predict(X, batch_size=7), ensemble.logits(X)
    assert torch.allclose(said.probabilities, ensemble(X).double(), atol=1e-6)
    assert torch.allclose(said.entropy, metrics.entropy(said.probabilities), atol=0, rtol=0)
    expected = metrics.mutual_information(logits)
    assert expected.max() > 1e-3
    assert torch.allclose(said.mutual_information, expected, atol=1e-5)
    pairs = metrics.mean_off_diagonal(metrics.disagreement(logits))
    assert pairs > 0
    assert float(said.disagreement.mean()) == pytest.approx(pairs, abs=1e-12)
    assert torch.equal(said.classes, ensemble(X).argmax(1))


def test_disagreement_by_hand() -> None:
    """Of four members two name class 0, one 1, one 2: five of six pairs differ."""
    from ray_subnets.answers import Opinions

    opinions = Opinions()
    for best in (0, 0, 1, 2):
        opinions.add(torch.nn.functional.one_hot(torch.tensor([best]), 3).float())
    assert opinions.disagreement().tolist() == [pytest.approx(5 / 6)]


def test_one_member_agrees_with_itself(ensemble: Ensemble) -> None:
    said = ensemble.take(["sparse-000"]).predict(X)
    assert said.mutual_information.abs().max() == 0
    assert said.disagreement.abs().max() == 0


def test_the_temperature_is_fitted_and_waits_to_be_asked_for(run: Path) -> None:
    plain, scaled = rs.load(run), rs.load(run, calibrated=True)
    temperature = metrics.temperature_of(plain(X), Y)
    assert plain.temperature == pytest.approx(temperature, rel=1e-4)
    assert abs(temperature - 1) > 0.05
    expected = metrics.scaled(plain(X), temperature)
    assert torch.allclose(scaled(X).double(), expected, atol=1e-5)
    assert metrics.nll(scaled(X), Y) < metrics.nll(plain(X), Y)
    said = scaled.predict(X)
    assert torch.allclose(said.probabilities, expected, atol=1e-5)
    assert scaled.calibrate(X[:20], Y[:20]) == scaled.temperature != plain.temperature


def test_an_old_record_has_no_temperature(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    record = json.loads((old / "ensemble.json").read_text())
    del record["temperature"], record["channels_last"]
    (old / "ensemble.json").write_text(json.dumps(record))
    assert rs.load(old).temperature is None
    with pytest.raises(ValueError, match=r"calibrated: .*ensemble.json has no temperature"):
        rs.load(old, calibrated=True)
    ensemble = rs.load(old)
    ensemble.calibrated = True
    with pytest.raises(ValueError, match="no temperature was fitted"):
        ensemble(X)


def test_saved_moved_and_loaded_it_is_the_same(ensemble: Ensemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = rs.load(tmp_path / "b")
    assert same(ensemble, again)
    assert again.temperature == ensemble.temperature
    assert same(again, rs.load(tmp_path / "b", on_demand=True))
    again.save(tmp_path / "c")
    files = sorted(p.relative_to(tmp_path / "c") for p in (tmp_path / "c").rglob("*.*"))
    assert [str(file) for file in files] == [
        *[
            f"children/{kind}-00{i}.safetensors"
            for kind in ("sparse", "stochastic")
            for i in (0, 1)
        ],
        "ensemble.json",
        "parent.safetensors",
    ]
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


FRESH = """
import sys, torch, ray_subnets
print(ray_subnets.load(sys.argv[1])(torch.load(sys.argv[2])).numpy().tobytes().hex())
"""


def test_a_fresh_process_says_the_same(run: Path, tmp_path: Path) -> None:
    ensemble = rs.load(run)
    ensemble.save(tmp_path / "a")
    torch.save(X[:8], tmp_path / "x.pt")
    answer = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "a", tmp_path / "x.pt"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ensemble(X[:8]).numpy().tobytes().hex()


def test_some_members_are_saved_in_their_order(ensemble: Ensemble, tmp_path: Path) -> None:
    few = ensemble.take(["stochastic-001", "sparse-000"])
    assert torch.equal(few.logits(X)[1], ensemble.logits(X)[ensemble.ids.index("sparse-000")])
    few.save(tmp_path / "few")
    again = rs.load(tmp_path / "few")
    assert same(few, again)
    assert again.temperature is None
    assert not (tmp_path / "few/parent.safetensors").exists()  # their files are whole
    for ids, says in ((["x"], "no member 'x'"), ([], "at least one"), (["parent"] * 2, "once")):
        with pytest.raises(ValueError, match=says):
            ensemble.take(ids)
    with pytest.raises(ValueError, match="the parent alone is no ensemble"):
        ensemble.take(["parent"]).save(tmp_path / "no")
    with pytest.raises(ValueError, match="the parent is kept as the first member"):
        ensemble.take(["noisy-000", "parent"]).save(tmp_path / "no")


def test_saving_says_what_is_wrong(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    ensemble = rs.load(copy)
    ensemble.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"save: .*already used; name a new folder"):
        ensemble.save(tmp_path / "a")
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=r"parent.safetensors|children/.*: cannot be read"):
        ensemble.save(tmp_path / "b")
    with pytest.raises(ValueError, match="only an ensemble that was loaded"):
        Ensemble([nn.Linear(2, 2)], ids=["a"], preprocess=rs.Preprocess()).save(tmp_path / "c")


def test_a_damaged_saved_file_is_told(run: Path, tmp_path: Path) -> None:
    """It is no run, so nobody is told to resume it."""
    rs.load(run).save(tmp_path / "a")
    file = tmp_path / "a/children/sparse-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"sparse-000.*SHA-256 differs.*or save it again$"):
        rs.load(tmp_path / "a")
    (tmp_path / "a/ensemble.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON .*save the ensemble again"):
        rs.load(tmp_path / "a")


# --- a network that is not built by name ---------------------------------------------------------


def test_a_network_of_python_is_needed_to_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ensemble = make(Net())
    ensemble.save(tmp_path / "a")
    torch.manual_seed(1)
    other = Net()
    weight = other.conv.weight.detach().clone()
    for on_demand in (False, True):
        again = rs.load(tmp_path / "a", model=other, on_demand=on_demand)
        assert torch.equal(again(VAL[0]), ensemble(VAL[0]))
    assert torch.equal(other.conv.weight, weight)
    assert other.training
    with pytest.raises(ValueError, match=r"given in Python \(test_api.Net\).*load\(\.\.\., model="):
        rs.load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"another kind than .*head\.bias is \(4,\), and was"):
        rs.load(tmp_path / "a", model=Net(4))
    with pytest.raises(ValueError, match=r"model: must be a torch\.nn\.Module, not str"):
        rs.load(tmp_path / "a", model="Net")  # type: ignore[arg-type]


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x.flatten(1)).relu()).relu())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    ensemble = make(model)
    for member in ensemble.members:
        assert member.get_submodule("one").weight is member.get_submodule("two").weight
    ensemble.save(tmp_path / "a")
    again = rs.load(tmp_path / "a", model=model)
    assert torch.equal(again(VAL[0]), ensemble(VAL[0]))


# --- 128 noisy members --------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Of every tensor that is alive, memory that is shared counted once."""
    found = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor) or is_lazy(thing) or thing.is_meta:
            continue
        if is_fake(thing):  # left by torch.compile and torch.export; has no memory
            continue
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, nn.Module, int]:
    """128 noisy children of a parent of 4 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    model.append(nn.ReLU()).append(nn.Linear(1000, 3))
    ensemble = make(
        model,
        method=rs.Noisy(sigma=0.1, partition=2, mirrored=True),
        children=128,
        tune=None,
        on_demand=True,
    )
    ensemble.save(tmp_path / "a")
    return tmp_path / "a", model, sum(tensor.nbytes for tensor in model.state_dict().values())


def test_128_noisy_members_at_rest_are_a_parent_and_a_megabyte(
    wide: tuple[Path, nn.Module, int],
) -> None:
    folder, model, parent = wide
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert parent < on_disk < parent + 2**20
    gc.collect()
    before = tensor_bytes()
    ensemble = rs.load(folder, model=model, on_demand=True)
    gc.collect()
    assert len(ensemble) == 128
    tensors = tensor_bytes() - before
    recipes = len(pickle.dumps(ensemble.origin.record))  # type: ignore[union-attr]
    assert parent <= tensors + recipes < parent + 2**20
    most, biggest = 0, 0
    for member in ensemble.members:
        most = max(most, tensor_bytes() - before)
        biggest = max(biggest, sum(tensor.nbytes for tensor in member.state_dict().values()))
        if most > 4 * parent:
            break
    del member
    assert biggest == parent
    # The parent, one child, and the one before while the next is drawn.
    assert most < 3 * parent + 2**20
    built = rs.load(folder, model=model)
    gc.collect()
    assert tensor_bytes() - before > 100 * parent
    x = VAL[0][:4]
    assert torch.equal(built(x), ensemble(x))


def test_the_tuned_ones_are_read_on_demand(run: Path) -> None:
    gc.collect()
    before = tensor_bytes()
    ensemble = rs.load(run, on_demand=True)
    gc.collect()
    parent = sum(t.nbytes for t in next(iter(ensemble.members)).state_dict().values())
    gc.collect()
    assert tensor_bytes() - before < parent * 1.1 + 2**16
