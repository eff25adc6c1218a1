"""Networks that look up whole numbers (words, categories), from data to a served ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import words
from conftest import Command
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import ray_subnets as rs
from ray_subnets import datasets, driver, structured
from ray_subnets.blueprint import Blueprint
from ray_subnets.data import Preprocess
from ray_subnets.flops import forward_cost
from ray_subnets.inputs import made_up

CONFIG = """
name: words
model: {name: "words:build", width: 8}
data: {name: "words:load"}
parent: {epochs: 1, lr: 0.01, optimizer: adam, batch_size: 50}
single: false
children:
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 1, lr: 0.01, optimizer: adam}}
  - {method: stochastic, count: 1, sparsity: 0.5, anneal_epochs: 1,
     tune: {epochs: 1, lr: 0.01, optimizer: adam}}
  - {method: noisy, count: 2, sigma: 0.05}
"""


@pytest.fixture(scope="module")
def parent() -> nn.Module:
    torch.manual_seed(0)
    model = words.build(3)
    x, y = words.rows(600, 5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(4):
        for part in torch.randperm(len(x)).split(50):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def ensemble(parent: nn.Module) -> rs.Ensemble:
    method = [rs.Sparse(sparsity=0.5, partition=2), rs.Noisy(sigma=0.05)]
    tune = rs.OneCycle(epochs=1, lr=0.01, optimizer="adam")
    return rs.ensemble(
        parent, words.rows(300, 0), words.rows(100, 1), method=method, children=4, tune=tune
    )


def test_numbers_reach_the_network_as_they_are(ensemble: rs.Ensemble, parent: nn.Module) -> None:
    x, y = words.rows(200, 2)
    logits = ensemble.logits(x)
    for member, said in zip(ensemble.members, logits, strict=True):
        torch.testing.assert_close(member(x), said)
    assert float((parent(x).argmax(1) == y).float().mean()) > 0.75
    assert float((ensemble(x).argmax(1) == y).float().mean()) > 0.75
    for narrower in (torch.int32, torch.int16, torch.int8):
        torch.testing.assert_close(ensemble(x.to(narrower)), ensemble(x))
    assert ensemble.input_dtype == torch.int64
    ones = ensemble.take(ensemble.ids[:1])
    assert ones.input_dtype == torch.int64


def test_saved_loaded_and_asked_in_one_call(
    ensemble: rs.Ensemble, parent: nn.Module, tmp_path: Path
) -> None:
    ensemble.save(tmp_path / "saved")
    x, _ = words.rows(50, 2)
    again = rs.load(tmp_path / "saved", model=words.build(3))
    assert torch.equal(again(x), ensemble(x))
    assert again.input_dtype == torch.int64
    again.batched = True
    torch.testing.assert_close(again(x), ensemble(x))
    cascade = rs.Cascade.fit(again, *words.rows(100, 1))
    p, asked = cascade.predict(x)
    assert p.shape == (50, 3)
    assert 1 <= float(asked.double().mean()) <= len(again)


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_exported_files_take_whole_numbers(
    ensemble: rs.Ensemble, tmp_path: Path, ending: str
) -> None:
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
    x, _ = words.rows(50, 2)
    path = tmp_path / f"words.{ending}"
    assert ensemble.export(path, x).difference < 1e-5
    if ending == "pt2":
        module: Any = torch.export.load(path).module()
        torch.testing.assert_close(module(x), ensemble(x))
    by_hand = rs.Ensemble([words.build(3).eval()], ids=["a"], preprocess=Preprocess())
    assert by_hand.export(path, x).samples > 50
    with pytest.raises(ValueError, match=r"torch\.uint8 or torch\.int64, not torch\.float32"):
        ensemble.export(path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"not made of images; dtype=torch\.int64"):
        ensemble.export(path, dtype=torch.uint8)


def test_a_student_reads_too(ensemble: rs.Ensemble) -> None:
    small = rs.distill(
        ensemble,
        words.rows(200, 0),
        words.rows(100, 1),
        student=words.build(3, width=8),
        tune=rs.OneCycle(epochs=1),
    )
    assert small(words.rows(5, 2)[0]).shape == (5, 3)


def test_the_same_from_a_module_and_from_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(Path(words.__file__).read_text())
    (tmp_path / "words.yaml").write_text(CONFIG)
    (x, y), (test_x, test_y) = words.load()
    np.savez(
        tmp_path / "words.npz",
        train_images=x.numpy().astype(np.int32),
        train_labels=y.numpy(),
        test_images=test_x.numpy().astype(np.int32),
        test_labels=test_y.numpy(),
    )
    answers = []
    for name, data in (("a", "{name: 'words:load'}"), ("b", "{name: npz, root: words.npz}")):
        done = command(
            *("run", "words.yaml", f"name={name}", f"data={data}", "--serial"), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        ensemble = rs.load(tmp_path / "runs" / name, model=words.build(3, width=8))
        record = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert record["data"]["input_dtype"] == "int64"
        answers.append(ensemble(test_x))
    assert torch.equal(*answers)
    done = command("evaluate", "runs/a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = words.rows(1, index)
        return x[0].int(), int(y)


def test_a_data_set_of_them_is_read_anew(parent: nn.Module) -> None:
    tune = rs.OneCycle(epochs=1, lr=0.01, optimizer="adam")
    made = rs.ensemble(
        parent, Rows(), words.rows(50, 1), method=rs.Sparse(sparsity=0.5), children=2, tune=tune
    )
    assert made.input_dtype == torch.int64
    assert made(words.rows(5, 2)[0]).shape == (5, 3)


def test_what_a_network_does_not_know_is_one_line(parent: nn.Module) -> None:
    method, train, val = rs.Noisy(sigma=0.1), words.rows(60, 0), words.rows(60, 1)

    def told(model: nn.Module, train: Any, val: Any) -> str:
        with pytest.raises(ValueError, match=r"train|val|model") as caught:
            rs.ensemble(model, train, val, method=method, children=2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    x, y = train
    one = x.clone()
    one[40, 3] = 999
    assert told(parent, (one, y), val).startswith(
        "data: train has whole numbers from 0 to 999, and the network does not take all of them"
    )
    one[40, 3] = -1
    assert "from -1 to" in told(parent, (one, y), val)
    floats = told(parent, (x.float(), y), (val[0].float(), val[1]))
    assert floats.startswith("model: it does not take inputs of shape (8,): ")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(words.LENGTH, 3))
    assert "whole numbers (images are uint8 or float)" in told(linear, train, val)
    assert "torch.bool" in told(parent, (x > 3, y), (val[0] > 3, val[1]))
    assert "torch.float32, train images torch.int64" in told(linear, train, (val[0] * 1.0, val[1]))


def test_images_of_whole_numbers_are_named(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 1, 16, 16)), rng.integers(0, 3, 60)
    labels[:3] = range(3)
    np.savez(
        tmp_path / "images.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    (tmp_path / "run.yaml").write_text(
        CONFIG.replace('{name: "words:build", width: 8}', "lenet_s").replace(
            '{name: "words:load"}', "{name: npz, root: images.npz}"
        )
    )
    done = command("run", "run.yaml", "--serial", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "whole numbers (images are uint8 or float)" in done.stderr


def test_types_of_inputs() -> None:
    data = datasets.load("words:load")
    assert (data.input_shape, data.input_dtype) == ((words.LENGTH,), torch.int64)
    assert data.preprocess == Preprocess()
    assert driver.describe_data(data)["input_dtype"] == "int64"
    digits = datasets.load("digits")
    assert digits.input_dtype == torch.float32
    assert "input_dtype" not in driver.describe_data(digits)
    generator = torch.Generator().manual_seed(0)
    assert set(made_up(50, (4,), torch.int64, generator).unique().tolist()) == {0, 1}
    assert not made_up(2, (4,), torch.int64).any()


def test_a_copy_is_tried_with_whole_numbers() -> None:
    assert Blueprint.tried(words.build(3), (words.LENGTH,), torch.int64) is not None
    assert Blueprint.tried(words.build(3), (words.LENGTH,)) is None, "it takes no floats"


# --- attention ------------------------------------------------------------------------------------


def by_hand(width: int, tokens: int) -> int:
    """FLOPs of attention: projections to q, k and v, two products of all pairs, and back."""
    return 2 * (3 * width**2 * tokens + 2 * tokens**2 * width + width**2 * tokens)


def test_attention_is_counted_and_belongs_to_its_weights() -> None:
    model = words.build(3).eval()
    cost = forward_cost(model, (words.LENGTH,), torch.int64)
    n, width = words.LENGTH, 16
    pairs = 2 * 2 * n**2 * width
    assert cost.total == by_hand(width, n) + 2 * 2 * width * 2 * width * n + 2 * width * 3
    assert sum(cost.by_weight.values()) == cost.total - pairs
    assert cost.by_weight["body.layers.0.self_attn.out_proj.weight"] == 2 * width**2 * n
    assert cost.by_weight["body.layers.0.self_attn.in_proj_weight"] == 2 * 3 * width**2 * n
    # In evaluation torch has one operation for all of it, which its counter does not know.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, n, dtype=torch.int64))
    assert counter.get_total_flops() < cost.total
    assert torch.backends.mha.get_fastpath_enabled()


class Crossed(nn.Module):
    """Attention to something else, of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        key, value = x.new_zeros(len(x), 7, 6), x.new_zeros(len(x), 7, 5)
        answer: Tensor = self.attention(x, key=key, value=value)[0]
        return answer[:, 0]


def test_attention_to_something_else_is_counted() -> None:
    cost = forward_cost(Crossed(), (3, 4))
    weights = {
        "attention.q_proj_weight": 2 * 3 * 4 * 4,
        "attention.k_proj_weight": 2 * 7 * 6 * 4,
        "attention.v_proj_weight": 2 * 7 * 5 * 4,
        "attention.out_proj.weight": 2 * 3 * 4 * 4,
    }
    assert {name: cost.by_weight[name] for name in weights} == weights
    assert cost.total == sum(weights.values()) + 2 * 2 * 3 * 7 * 4


def test_layers_of_attention_that_are_gone_are_the_masked_network() -> None:
    model = words.build(3).eval().requires_grad_(False)
    names = [f"body.layers.0.{name}.weight" for name in ("self_attn.out_proj", "linear1")]
    small = structured.remove_layers(model, names)
    masked = words.build(3).eval().requires_grad_(False)
    masked.load_state_dict(model.state_dict())
    for name in names:
        masked.get_parameter(name).zero_()
    x, _ = words.rows(20, 3)
    torch.testing.assert_close(small(x), masked(x))
    assert not set(names) & set(small.state_dict())
    small.train(), masked.train()
    torch.testing.assert_close(small(x), masked(x))
