"""`ray_subnets.ensemble`: the run of the command line, from a network and data in Python."""

from __future__ import annotations

import copy
import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import equal, numbers, run_serial, tiny
from torch import Tensor, nn

import ray_subnets as rs
from ray_subnets import driver, groups
from ray_subnets.checkpoints import RunFolder

Pair = tuple[Tensor, Tensor]


def pair(n: int, seed: int = 0) -> Pair:
    """Three classes that can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 4, 4, generator=generator)
    return x + y[:, None, None, None], y


class Net(nn.Module):
    """Not built by name; with batch-norm, dropout and a buffer that is not saved."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x * self.get_buffer("scale"))).relu().mean((2, 3))
        return self.head(self.drop(x))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


TRAIN, VAL = pair(96), pair(48, seed=1)
TUNE = rs.OneCycle(epochs=2, batch_size=32, lr=0.05)
ALL = [
    rs.Noisy(sigma=0.05, count=2, partition=2),
    rs.Sparse(sparsity=0.5, partition=2, count=2),
    rs.Stochastic(partition=2, anneal_epochs=1, count=2),
]


def make(model: Any, train: Any = TRAIN, val: Any = VAL, **how: Any) -> rs.Ensemble:
    return rs.ensemble(model, train, val, **{"progress": False, "tune": TUNE, "method": ALL, **how})


def test_a_mix_of_all_methods(net: Net) -> None:
    ensemble = make(net)
    assert len(ensemble) == 6
    assert [id.split("-")[0] for id in ensemble.ids] == ["noisy"] * 2 + ["sparse"] * 2 + [
        "stochastic"
    ] * 2
    p = ensemble(VAL[0])
    assert p.shape == (48, 3)
    assert torch.allclose(p.sum(1), torch.ones(48))
    assert ensemble.record is not None
    accuracy = ensemble.record["ensemble"]["validation"]["without_parent"]["accuracy"]
    assert accuracy == float((p.argmax(1) == VAL[1]).double().mean())
    pruned = ensemble.members[2].get_parameter("conv.weight")
    assert int((pruned == 0).sum()) == 36


def test_the_network_is_left_as_it_is() -> None:
    torch.manual_seed(1)
    model = Net().train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    make(model, parent=rs.Training(epochs=1, batch_size=32))
    assert equal(model.state_dict(), before.state_dict())
    for (name, one), (_, other) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert one.training == other.training, name
    for (name, one), (_, other) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert one.requires_grad == other.requires_grad, name
        assert one.grad is None


def test_torch_is_left_as_it_is(net: Net) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    make(net)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_frozen_weights_stay_frozen_unless_all_are(net: Net) -> None:
    model = copy.deepcopy(net)
    model.head.requires_grad_(False)
    children = make(model, method=rs.Sparse(sparsity=0.5), children=1)
    assert equal(children.members[0].get_submodule("head").state_dict(), net.head.state_dict())
    model.requires_grad_(False)
    children = make(model, method=rs.Sparse(sparsity=0.5), children=1)
    assert not equal(children.members[0].get_submodule("head").state_dict(), net.head.state_dict())


def test_children_are_those_of_a_run_bit_for_bit(tmp_path: Path) -> None:
    """A run's parent and data, given in Python with the same settings, give the run's children."""
    settings = tiny("single=false", "select.count=8", "seed=3")
    folder = RunFolder.create(tmp_path / "run")
    record = run_serial(settings, folder)
    data = driver.load_data(settings)
    model = driver.build(settings, data)
    model.load_state_dict(folder.load_tensors("parent.safetensors"))
    tune = rs.OneCycle(epochs=2, batch_size=64)
    ensemble = rs.ensemble(
        model,
        (data.train.images, data.train.labels),
        (data.validation.images, data.validation.labels),
        test=(data.test.images, data.test.labels),
        preprocess=data.preprocess,
        method=[
            rs.Noisy(count=4, sigma=0.05, partition=2, mirrored=True),
            rs.Sparse(count=2, partition=2),
            rs.Stochastic(count=2, partition=2, anneal_epochs=1.5),
        ],
        tune=tune,
        architecture={"name": "mlp", "hidden": [16]},
        seed=3,
        folder=tmp_path / "api",
        progress=False,
    )
    again = RunFolder(tmp_path / "api")
    for spec in settings.specs():
        if spec.method != "noisy":
            name = f"children/{spec.id}.safetensors"
            assert again.read(name) == folder.read(name)
        name = f"outputs/{spec.id}.npz"
        assert again.read(name) == folder.read(name)
    assert ensemble.record is not None
    assert numbers(ensemble.record["ensemble"]) == numbers(record["ensemble"])
    loaded = rs.load(tmp_path / "api")  # by its architecture
    assert torch.equal(loaded(data.test.images), ensemble(data.test.images))


def test_a_network_by_name_is_trained_first() -> None:
    ensemble = make(
        {"name": "mlp", "hidden": [8]},
        parent=rs.Training(epochs=3, batch_size=32),
        include_parent=True,
        select=3,
    )
    assert ensemble.ids[0] == "parent"
    assert len(ensemble) == 4
    assert ensemble.record is not None
    assert ensemble.record["parent"]["epochs"] == 3


def test_transfer_trains_the_parent_on_new_data(net: Net) -> None:
    ensemble = make(
        net,
        parent=rs.Training(epochs=2, batch_size=32),
        include_parent=True,
        method=rs.Noisy(sigma=1e-6),
        tune=None,
        children=2,
    )
    tuned = ensemble.members[0].state_dict()
    assert not torch.equal(tuned["conv.weight"], net.conv.weight)
    child = ensemble.members[1].state_dict()["conv.weight"]
    assert torch.allclose(child, tuned["conv.weight"], atol=1e-5)


def test_without_ray_and_on_ray_are_the_same(net: Net, tmp_path: Path) -> None:
    """Also of a data set that draws at random, and of a network of the test's own module."""
    train = Noise(TRAIN)
    here = make(net, train, folder=tmp_path / "here")
    there = make(
        net, train, folder=tmp_path / "there", ray=True, resources={"actors": 2, "retries": 0}
    )
    assert here.record is not None
    assert there.record is not None
    assert numbers(here.record) == numbers(there.record)
    assert torch.equal(here(VAL[0]), there(VAL[0]))


class Noise(torch.utils.data.Dataset[Any]):
    """Augments by torch's own generator."""

    def __init__(self, samples: Pair) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples[1])

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.samples[0][row] + 0.1 * torch.randn(1, 4, 4), int(self.samples[1][row])


def test_a_folder_goes_on_with_what_is_there(net: Net, tmp_path: Path) -> None:
    first = make(net, folder=tmp_path / "run")
    (tmp_path / "run/results/sparse-001.json").unlink()
    (tmp_path / "run/result.json").unlink()
    stamp = (tmp_path / "run/results/sparse-000.json").stat().st_mtime_ns
    second = make(net, folder=tmp_path / "run")
    assert (tmp_path / "run/results/sparse-000.json").stat().st_mtime_ns == stamp
    assert torch.equal(first(VAL[0]), second(VAL[0]))
    with pytest.raises(ValueError, match=r"^folder: .*run holds another run"):
        make(net, folder=tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match=r"^folder: .*run holds another run"):
        make(net, pair(96, seed=2), folder=tmp_path / "run")
    other = copy.deepcopy(net)
    other.head.bias.data += 1
    with pytest.raises(ValueError, match=r"^folder: .*run holds another run"):
        make(other, folder=tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^folder: .*already used; name a new folder"):
        make(net, folder=tmp_path / "mine")


def test_a_temporary_folder_goes_with_the_ensemble(net: Net) -> None:
    ensemble = make(net, on_demand=True)
    assert ensemble.origin is not None
    place = Path(str(ensemble.origin.folder))  # type: ignore[attr-defined]
    assert place.exists()
    ensemble(VAL[0])
    del ensemble
    assert not place.exists()


def test_progress_ends_with_the_last_network(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    make(net, progress=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("[7/7 networks, about 0:00:00 left]"), last


def test_help_lists_every_setting() -> None:
    for kind, group in ((rs.Noisy, groups.Noisy), (rs.Stochastic, groups.Stochastic)):
        for name in set(group.model_fields) - {"method", "draws_of"}:
            assert name in inspect.signature(kind).parameters
            assert re.search(rf"^ +{name}\b", kind.__doc__ or "", flags=re.MULTILINE), name
    assert "standard deviation of the noise" in (rs.Noisy.__doc__ or "")


def test_parallel_and_compiled_networks_are_unwrapped(net: Net) -> None:
    plain = make(net, method=rs.Noisy(sigma=0.1), children=2, tune=None)(VAL[0])
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        ensemble = make(wrapped, method=rs.Noisy(sigma=0.1), children=2, tune=None)
        assert torch.equal(ensemble(VAL[0]), plain)


class Odd(nn.Module):
    """Gives what a test wants."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(16, 3), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.layer(x.flatten(1)))


X, Y = TRAIN
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "lenet_s"}, "parent: .*by name has no trained weights"),
    ({"model": 3}, "model: must be a torch.nn.Module, not int"),
    ({"model": nn.Flatten()}, "model: it has no parameters"),
    ({"model": nn.Linear(5, 3)}, r"model: it does not take inputs of shape \(1, 4, 4\)"),
    ({"model": Odd(lambda x: x[:, :1])}, "model: it has a single output.*for regression say head="),
    ({"model": Odd(lambda x: (x, x))}, r"model: it gives tuple for 2 inputs; .*\(2, C\)"),
    ({"model": Odd(lambda x: x / 0)}, "model: it gives NaN or infinite outputs"),
    ({"model": Net().double()}, "model: conv.weight is torch.float64; use model.float"),
    ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, "model: 1.weight has no shape yet"),
    ({"model": Net(2)}, r"train: label 2 \(sample 2\) is outside the 2 classes"),
    ({"method": rs.Sparse(sparsity=1.5)}, "method.sparsity: .*less than 1, not 1.5"),
    ({"method": rs.Noisy(), "tune": None}, "method.sigma: required"),
    ({"method": [rs.Noisy(sigma=1.0), rs.Sparse(sparsity=2.0)]}, r"method\[1\].sparsity"),
    ({"method": "sparse"}, "method: must be Noisy"),
    ({"method": []}, "method: must be Noisy"),
    ({"method": rs.Noisy(sigma=0.1)}, "tune: noisy children are not tuned; leave it out"),
    ({"tune": None}, "tune: required, since sparse children are tuned"),
    ({"tune": 5}, "tune: must be OneCycle"),
    ({"tune": rs.OneCycle(epochs=-1)}, "^tune.epochs: .*greater than or equal to 0, not -1"),
    ({"tune": rs.OneCycle(epochs=1, lr=0.0)}, "^tune.lr"),
    ({"children": 0}, "children: must be a whole number"),
    ({"children": 3}, "children: 3 children do not make whole partitions of 2"),
    ({"children": None}, "children: say how many"),
    ({"method": ALL, "children": 7}, "children: 7 do not divide"),
    ({"select": 99}, "select.count: 99 members of 4 children"),
    ({"combine": "median"}, "combine: "),
    ({"seed": -1}, "seed: "),
    ({"resources": {"threads": 0}}, "resources.threads: "),
    ({"resources": {"thread": 2}}, "resources.thread: unknown key; did you mean threads"),
    ({"train": X}, r"train: must be tensors \(x, y\), .*, not Tensor"),
    ({"train": (X, Y, Y)}, r"train: must be tensors \(x, y\), .*, not tuple of 3"),
    ({"train": (X, Y[:5])}, "train: has 96 images and 5 labels"),
    ({"train": (X, Y.float())}, "train: labels are torch.float32; .*for regression say head="),
    ({"train": (X > 0, Y)}, "train: inputs are torch.bool"),
    ({"train": (X[:0], Y[:0])}, "train: .*empty"),
    ({"train": (X * torch.nan, Y)}, "train: has 96 samples with NaN"),
    ({"train": (X, -Y)}, "train: label -1"),
    ({"val": (X[..., :3], Y)}, r"train: images are \(1, 4, 4\)|val: images are \(1, 4, 3\)|model"),
    ({"val": (X, Y[:, None])}, "val: images must be .* and labels"),
    ({"train": (X.byte(), Y), "val": (X.byte(), Y)}, "preprocess: inputs are uint8"),
    ({"crop": 2, "train": Noise(TRAIN)}, "crop, flip: for image tensors"),
    ({"device": "gpu"}, "device: 'gpu' cannot be used"),
    ({"architecture": "lenet_s"}, "architecture: "),
    ({"architecture": {"hidden": [3]}}, "architecture: must be a name"),
    ({"ray": "127.0.0.1:1"}, "ray: no Ray cluster at 127.0.0.1:1"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_mistake_is_one_line_that_names_the_argument(
    net: Net, wrong: dict[str, Any], says: str
) -> None:
    how: dict[str, Any] = {
        "model": net,
        "train": TRAIN,
        "val": VAL,
        "method": rs.Sparse(sparsity=0.5, partition=2),
        "children": 4,
        "tune": TUNE,
        "progress": False,
    }
    with pytest.raises(ValueError, match=says) as caught:
        rs.ensemble(**(how | wrong))
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"Sparse.sparsty: unknown setting; did you mean sparsity"):
        rs.Sparse(sparsty=0.5)


def test_the_example_of_the_documentation_runs() -> None:
    scope = {"ensemble": rs.ensemble, "rs": rs, "torch": torch}
    (example,) = doctest.DocTestFinder().find(rs.ensemble, "ensemble", globs=scope)
    assert len(example.examples) == 4
    example.examples[2].source = example.examples[2].source.replace("n=4)", "n=4, progress=False)")
    assert doctest.DocTestRunner().run(example).failed == 0
