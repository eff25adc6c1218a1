"""One network taught by an ensemble: the loss, where it begins, how it is kept."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from test_api import TRAIN, VAL, Net, make
from tiny import run_serial, tiny
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ray_subnets as rs
from ray_subnets import distilling, metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.commands import keep as commands_keep
from ray_subnets.data import Batch
from ray_subnets.ensembles import Ensemble

X = VAL[0]
SHORT = rs.OneCycle(epochs=2, batch_size=32, lr=0.02)


@pytest.fixture(scope="module")
def teacher() -> Ensemble:
    torch.manual_seed(0)
    return make(Net(), include_parent=True)


def taught(teacher: Ensemble, student: Any = None, train: Any = TRAIN, **how: Any) -> Ensemble:
    return rs.distill(
        teacher, train, VAL, student=student, **{"tune": SHORT, "progress": False, **how}
    )


class Constant(nn.Module):
    """Gives what it is given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def test_the_loss_by_hand() -> None:
    """Two classes: teacher 0.8, tempered by 2 it is 2/3; student log-odds 1, tempered 0.5."""
    model = Constant(torch.tensor([[1.0, 0.0]]))
    teacher = Constant(torch.tensor([[0.8, 0.2]]))
    batch = Batch(torch.zeros(1, 1), torch.tensor([1]), 1.0)

    def log_p(odds: float) -> tuple[float, float]:
        return -math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds))

    a, b = log_p(0.5)
    soft = -(2 / 3 * a + 1 / 3 * b)
    hard = -log_p(1.0)[1]
    for weight in (0.0, 0.3, 1.0):
        loss = distilling.objective(teacher, 2.0, weight)(model, batch)
        assert float(loss.detach()) == pytest.approx(
            weight * 4 * soft + (1 - weight) * hard, rel=1e-6
        )
    loss.backward()
    assert teacher.answer.grad is None


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    model = Constant(p.log())
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), 2.0)
    distilling.objective(Constant(p), 3.0, 1.0)(model, batch).backward()
    assert model.answer.grad is not None
    assert float(model.answer.grad.abs().max()) < 1e-6


def test_labels_are_not_seen_with_a_weight_of_one(teacher: Ensemble) -> None:
    wrong = (TRAIN[0], TRAIN[1].flip(0))
    right = taught(teacher, "sparse-000", weight=1.0)
    assert torch.equal(taught(teacher, "sparse-000", wrong, weight=1.0)(X), right(X))
    assert not torch.equal(taught(teacher, "sparse-000", wrong, weight=0.9)(X), right(X))


def test_it_comes_nearer_to_its_teacher(teacher: Ensemble) -> None:
    """A network that begins anew: what it says of new inputs, against the teacher's answers."""
    torch.manual_seed(3)
    fresh = Net()
    wanted = teacher(X)

    @torch.no_grad()
    def far(p: Tensor) -> float:
        return float((wanted * (wanted / p).log()).sum(1).mean())

    before = far(fresh.eval()(X).detach().softmax(1))
    tune = rs.OneCycle(epochs=8, batch_size=32, lr=0.05)
    student = taught(teacher, fresh, tune=tune, weight=1.0, temperature=1.0)
    assert far(student(X)) < 0.5 * before


def test_the_same_call_gives_the_same_bits(teacher: Ensemble) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = taught(teacher)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(taught(teacher)(X), first(X))
    assert not torch.equal(taught(teacher, seed=1)(X), first(X))
    data = TensorDataset(*TRAIN)
    assert torch.equal(taught(teacher, train=data)(X), first(X))


def test_it_begins_as_the_best_member(teacher: Ensemble) -> None:
    said = taught(teacher)
    assert said.record is not None
    nlls = [metrics.nll(one.double().softmax(1), VAL[1]) for one in teacher.ask(X)]
    assert said.record["settings"]["student"] == teacher.ids[nlls.index(min(nlls))]
    p = teacher.predict(X).probabilities
    assert said.record["teacher"]["validation"]["nll"] == metrics.nll(p, VAL[1])
    p = said.predict(X).probabilities
    assert said.record["distilled"]["validation"]["nll"] == metrics.nll(p, VAL[1])
    assert said.temperature == metrics.temperature_of(p, VAL[1])
    assert "test" not in said.record["distilled"]
    assert "test" in (taught(teacher, test=TRAIN).record or {})["distilled"]


@pytest.mark.parametrize(
    ("student", "zeros"),
    [("sparse-000", 36), ("stochastic-001", 36), ("noisy-000", 0), ("parent", 0), ("net", 0)],
)
def test_saved_and_loaded_it_is_the_same(
    teacher: Ensemble, student: str, zeros: int, tmp_path: Path
) -> None:
    before = [tensor.clone() for tensor in teacher.state_dict().values()]
    torch.manual_seed(4)
    network = Net()
    said = taught(teacher, network if student == "net" else student)
    for one, other in zip(teacher.state_dict().values(), before, strict=True):
        assert torch.equal(one, other)
    assert said.ids == ("distilled",)
    weight = said.members[0].get_parameter("conv.weight")
    assert int((weight == 0).sum()) == zeros
    said.save(tmp_path / "a")
    again = rs.load(tmp_path / "a", model=network)
    assert torch.equal(again(X), said(X))
    assert again.temperature == said.temperature
    again.save(tmp_path / "b")
    third = rs.load(tmp_path / "b", model=network, calibrated=True)
    assert third.temperature == said.temperature
    assert not (tmp_path / "a/parent.safetensors").exists()
    if zeros:
        packed = sum(
            t.numel()
            for t in RunFolder(tmp_path / "a")
            .load_tensors("children/distilled.safetensors")
            .values()
        )
        assert packed == sum(t.numel() for t in network.state_dict().values()) - zeros
        mask = teacher.members[teacher.ids.index(student)].get_parameter("conv.weight") == 0
        assert torch.equal(weight == 0, mask)


@pytest.mark.parametrize(
    "method",
    [
        rs.Sparse(sparsity=0.5, structure="channel"),
        rs.Sparse(sparsity=0.5, criterion="magnitude"),
        rs.Sparse(sparsity=0.5, criterion="magnitude", prune_epochs=1),
    ],
    ids=["smaller", "magnitude", "step by step"],
)
def test_other_kinds_of_children(method: rs.Sparse, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    teacher = make(model, method=method, children=2)
    said = taught(teacher)
    assert said.record is not None
    begun = teacher.members[teacher.ids.index(said.record["settings"]["student"])]
    ours = said.members[0].get_parameter("conv.weight")
    assert ours.shape == begun.get_parameter("conv.weight").shape
    assert torch.equal(ours == 0, begun.get_parameter("conv.weight") == 0)
    said.save(tmp_path / "a")
    assert torch.equal(rs.load(tmp_path / "a", model=model)(X), said(X))


def test_a_network_by_name_and_networks_made_by_hand(teacher: Ensemble, tmp_path: Path) -> None:
    said = taught(teacher, {"name": "mlp", "hidden": [8]})
    said.save(tmp_path / "a")
    assert torch.equal(rs.load(tmp_path / "a")(X), said(X))
    members = [copy.deepcopy(one) for one in teacher.members]
    bare = Ensemble(members, ids=teacher.ids, preprocess=rs.Preprocess()).eval()
    said = taught(bare, "sparse-000")
    with pytest.raises(ValueError, match="save: only an ensemble that was loaded"):
        said.save(tmp_path / "b")
    assert said.export(tmp_path / "a.pt2").difference <= 1e-5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"student": "nobody"}, "student: unknown network 'nobody'.*or a member's id: parent, noisy"),
    ({"student": 3}, "student: must be a member's id, a network or its name, not 3"),
    ({"student": Net(4)}, "student: it has 4 outputs and the ensemble 3"),
    ({"student": nn.Linear(5, 3)}, "student: it does not take inputs"),
    ({"temperature": 0.0}, "temperature: must be above 0"),
    ({"weight": 1.5}, "weight: must be from 0 to 1"),
    ({"tune": 5}, "tune: must be OneCycle"),
    ({"tune": rs.OneCycle(epochs=0)}, "tune.epochs: a student must be trained"),
    ({"tune": rs.Training(epochs=3, lr=1e30)}, "distilled: the loss is"),
    ({"train": (X, VAL[1].float())}, "train: labels are torch.float32"),
    ({"train": (X.byte(), VAL[1])}, "preprocess: inputs are uint8|train: .*float|val"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_a_mistake_is_one_line(teacher: Ensemble, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        taught(teacher, **wrong)
    assert "\n" not in str(caught.value)


def test_the_commands(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_serial(tiny("single=false"), RunFolder.create(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = inspect.signature(commands_keep.distill).parameters
    how: dict[str, Any] = {"lr": 0.05, "seed": 0, "quiet": True}
    how |= {"temperature": distilling.TEMPERATURE, "weight": distilling.WEIGHT}
    assert all(options[name].default == value for name, value in how.items() if name != "quiet")
    how |= {"student": "sparse-000", "epochs": 2}
    commands_keep.distill("run", "small", **how)
    said = capsys.readouterr().out
    assert "test distilled: 1 passes, accuracy" in said
    assert "test teacher: 6 passes, accuracy" in said
    assert len(rs.load("small")) == 1
    with pytest.raises(ValueError, match="already used"):
        commands_keep.distill("run", "small", **how)
    with pytest.raises(ValueError, match="--input: must be uint8, float32 or int64, not int"):
        commands_keep.export("small", "small.pt2", False, "int")
    answer = command("export", "small", "--to", "small.pt2", "--calibrated", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "small.pt2: " in answer.stdout
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    program = torch.export.load("small.pt2").module()
    wanted = rs.load("small", calibrated=True)(x)
    assert torch.allclose(program(x), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(rs.load("small")(x), wanted, rtol=0, atol=1e-4)
    answer = command("distill", "run", "--out", "small", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
