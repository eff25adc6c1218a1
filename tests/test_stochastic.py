"""Keep-probabilities and their draws against numbers worked out by hand (chapter 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_subnets import ChildSpec, Training, acting, models, stochastic
from ray_subnets.spawning import (
    Anatomy,
    anatomy,
    anneals,
    spawn_weights,
    subnetwork,
)
from ray_subnets.topology import Annealed

BODY = Anatomy({"a": torch.Size([200, 100]), "b": torch.Size([3, 4])}, {})
MASK = {"w": torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool()}


def spec_of(**changes: Any) -> ChildSpec:
    values: dict[str, Any] = dict(
        id="child",
        method="stochastic",
        seed=5,
        density=0.5,
        draw="exact",
        tau=0.3,
        two_sided=True,
        anneal_epochs=2.0,
        training=Training(epochs=3),
    )
    return ChildSpec(**(values | changes))


def start_of(spec: ChildSpec) -> tuple[stochastic.Matrices, dict[str, Tensor]]:
    """P0 and mask of a recipe."""
    sub = subnetwork(spec, BODY, {name: torch.randn(shape) for name, shape in BODY.shapes.items()})
    return acting.probabilities(spec, sub), sub.masks


def distance(p: Tensor, cdf: Tensor) -> float:
    """Largest gap between the distribution of `p` and what it should be (Kolmogorov, Smirnov)."""
    return float((cdf - torch.linspace(0, 1, len(p))).abs().max())


# --- P0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "inside", "outside"),
    [
        ({}, 1.0, 0.3),  # eq. 6.6
        ({"two_sided": True}, 0.7, 0.3),
        ({"two_sided": True, "parts": 2}, 0.7, 0.3),
        ({"two_sided": True, "parts": 4}, 0.7, 0.1),  # three others share tau
        ({"parts": 4}, 1.0, 0.3),
    ],
)
def test_temperature_by_hand(how: dict[str, Any], inside: float, outside: float) -> None:
    expected = torch.tensor(
        [[inside, inside, outside, inside], [outside, inside, outside, outside]]
    )
    torch.testing.assert_close(stochastic.temperature(MASK, 0.3, **how)["w"], expected)


@pytest.mark.parametrize("start", ["temperature", "uniform", "mixture"])
@pytest.mark.parametrize("density", [0.5, 0.2])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_a_pairs_probabilities_sum_to_one(start: str, density: float, draw: str) -> None:
    """P' = 1 - P, weight by weight (eq. 6.1), and both halves start uncertain."""
    pair = [
        start_of(spec_of(probabilities=start, density=density, draw=draw, parts=2, part=part))[0]
        for part in (0, 1)
    ]
    for name in BODY.shapes:
        torch.testing.assert_close(pair[0][name] + pair[1][name], torch.ones(BODY.shapes[name]))
    assert ((pair[0]["a"] > 0) & (pair[0]["a"] < 1)).float().mean() > 0.98


@pytest.mark.parametrize("start", ["temperature", "uniform"])
@pytest.mark.parametrize("parts", [3, 5])
def test_parts_share_every_weight(start: str, parts: int) -> None:
    """P of k siblings sum to one; the owner of a weight is the likeliest to hold it."""
    made = [start_of(spec_of(probabilities=start, parts=parts, part=i)) for i in range(parts)]
    for name, shape in BODY.shapes.items():
        p = torch.stack([one[name] for one, _ in made])
        owner = torch.stack([mask[name] for _, mask in made]).int().argmax(0)
        torch.testing.assert_close(p.sum(0), torch.ones(shape))
        assert torch.equal(p.argmax(0), owner)
        assert (p >= 0).all()


@pytest.mark.parametrize("parts", [2, 3])
def test_each_part_is_uniform_on_the_simplex(parts: int) -> None:
    """One of k shares is Beta(1, k - 1): P(share < x) = 1 - (1 - x)^(k - 1)."""
    for part in range(parts):
        start, _ = start_of(spec_of(probabilities="uniform", parts=parts, part=part))
        p = start["a"].reshape(-1).sort().values
        assert distance(p, 1 - (1 - p) ** (parts - 1)) < 0.015


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_uniform_is_random_annealing(density: float) -> None:
    """P0 is U(0, 1), and the subnetwork is what lies at or above the sparsity (section 6.2.1)."""
    start, masks = start_of(spec_of(probabilities="uniform", density=density))
    p = start["a"].reshape(-1).sort().values
    assert distance(p, p) < 0.015
    for name, mask in masks.items():
        assert torch.equal(start[name] >= 1 - density, mask)
    assert not torch.equal(start["a"].reshape(-1)[:12], start["b"].reshape(-1))


def test_mixture_has_its_moments_and_is_clipped() -> None:
    """Gaussians with their own mean and standard deviation outside and inside (eq. 6.5)."""
    start, masks = start_of(spec_of(probabilities="mixture", mixture=(0.3, 0.05, 0.8, 0.02)))
    p, mask = start["a"], masks["a"]
    outside, inside = p[~mask], p[mask]
    assert float(outside.mean()) == pytest.approx(0.3, abs=5 * 0.05 / len(outside) ** 0.5)
    assert float(outside.std()) == pytest.approx(0.05, rel=0.05)
    assert float(inside.mean()) == pytest.approx(0.8, abs=5 * 0.02 / len(inside) ** 0.5)
    assert float(inside.std()) == pytest.approx(0.02, rel=0.05)
    clipped = start_of(spec_of(probabilities="mixture", mixture=(0.0, 0.5, 1.0, 0.5)))[0]["a"]
    assert (clipped.min(), clipped.max()) == (0, 1)
    assert float((clipped[~mask] == 0).float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("start", ["uniform", "mixture"])
def test_one_sided_weights_of_the_subnetwork_always_act(start: str) -> None:
    both, masks = start_of(spec_of(probabilities=start))
    one, _ = start_of(spec_of(probabilities=start, two_sided=False))
    for name, mask in masks.items():
        assert (one[name][mask] == 1).all()
        assert torch.equal(one[name][~mask], both[name][~mask])


# --- draws --------------------------------------------------------------------------------------


def near(share: Tensor, p: Tensor, draws: int) -> bool:
    """Is every frequency within five standard deviations of its probability?"""
    return bool(((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-4).all())


def test_realised_masks_follow_their_probabilities() -> None:
    """The subnetwork is always on; the rest is on with chance tau."""
    generator = torch.Generator().manual_seed(0)
    mask = {"w": torch.rand(100, 300, generator=generator) < 0.5}
    drawn = torch.stack([stochastic.realise(mask, 0.3, generator)["w"] for _ in range(20)]).double()
    assert (drawn[:, mask["w"]] == 1).all()
    outside = drawn[:, ~mask["w"]]
    assert abs(float(outside.mean()) - 0.3) < 5 * (0.21 / outside.numel()) ** 0.5
    assert torch.equal(stochastic.realise(mask, 0.0, generator)["w"], mask["w"])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_realised_matrices_move_to_the_mask(scale: float) -> None:
    """P = M + scale (P0 - M) for every weight by itself; at scale 0 it is the mask."""
    generator = torch.Generator().manual_seed(0)
    masks = MASK | {"v": torch.tensor([True, False])}
    start = {
        "w": torch.tensor([[0.9, 0.5, 0.4, 1.0], [0.0, 0.2, 0.7, 0.1]]),
        "v": torch.tensor([0.6, 0.3]),
    }
    n = 3000
    drawn = [stochastic.realise_matrix(start, masks, scale, generator) for _ in range(n)]
    for name, mask in masks.items():
        p = mask.double() + scale * (start[name].double() - mask.double())
        assert near(torch.stack([one[name] for one in drawn]).double().mean(0), p, n)
    # Weights are drawn apart from each other: 0.9 and 0.5 are both on 45 % of the time.
    first = torch.stack([one["w"][0, :2] for one in drawn]).double()
    if scale == 1:
        assert near(first.prod(1).mean(), torch.tensor(0.45), n)
    at_the_end = stochastic.realise_matrix(start, masks, 0.0, generator)
    assert all(torch.equal(at_the_end[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]),
        ("cosine", [0.5, 0.4267767, 0.25, 0.0732233, 0.0, 0.0]),
        ("exponential", [0.5, 0.1432524, 0.0410425, 0.0117589, 0.0, 0.0]),
    ],
)
def test_anneal_by_hand(shape: str, expected: list[float]) -> None:
    """Temperature .5 over 2 epochs, at 0, .5, 1, 1.5, 2 and 3 epochs (eq. 6.2-6.4)."""
    epochs = (0, 0.5, 1, 1.5, 2, 3)
    found = [stochastic.anneal(epoch, start=0.5, epochs=2, shape=shape) for epoch in epochs]
    assert found == pytest.approx(expected, abs=1e-7)
    assert stochastic.anneal(0, start=0.5, epochs=0, shape=shape) == 0


# --- over the epochs ----------------------------------------------------------------------------


def annealed(spec: ChildSpec) -> tuple[Annealed, dict[str, nn.Parameter], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in BODY.shapes.items()}
    child = spawn_weights(weights, BODY, spec)
    assert all(torch.equal(child.weights[name], weights[name]) for name in weights)
    parameters = {name: nn.Parameter(weight) for name, weight in child.weights.items()}
    made = acting.topology(spec, child.subnetwork, BODY, parameters)
    assert isinstance(made, Annealed)
    return made, parameters, child.subnetwork.masks


@pytest.mark.parametrize(
    ("how", "inside", "outside"),
    [
        ({"two_sided": False}, 1.0, 0.3),
        ({}, 0.7, 0.3),
        ({"probabilities": "uniform"}, 0.75, 0.25),
        ({"probabilities": "uniform", "two_sided": False}, 1.0, 0.25),
        ({"probabilities": "mixture", "mixture": (0.4, 0.01, 0.6, 0.01)}, 0.6, 0.4),
    ],
)
def test_weights_come_and_go_until_the_temperature_is_zero(
    how: dict[str, Any], inside: float, outside: float
) -> None:
    """Each step draws its own mask, ever closer to the target; then the others are pruned."""
    made, parameters, masks = annealed(spec_of(**how))
    mask, generator = masks["a"], torch.Generator().manual_seed(2)
    whole = parameters["a"].detach().clone()

    def drawn(epoch: float) -> Tensor:
        seen = made.weights(epoch, generator)
        assert seen is not None
        on = seen["a"] != 0
        assert torch.equal(seen["a"], torch.where(on, whole, 0))
        made.after_step()
        assert torch.equal(parameters["a"], whole)  # nothing is held at zero yet
        return on

    first, second = drawn(0.0), drawn(0.0)
    assert not torch.equal(first, second)
    for epoch, scale in ((0.0, 1.0), (1.0, 0.5), (1.5, 0.25)):
        on = drawn(epoch)
        kept = 1 - scale * (1 - inside)
        assert float(on[mask].float().mean()) == pytest.approx(kept, abs=0.03)
        assert float(on[~mask].float().mean()) == pytest.approx(scale * outside, abs=0.03)

    assert made.weights(2.0, generator) is None
    assert torch.equal(parameters["a"], torch.where(mask, whole, 0))
    with torch.no_grad():
        parameters["a"] += 1  # an optimizer step
    made.after_step()
    assert torch.equal(parameters["a"], torch.where(mask, whole + 1, 0))


def test_gradients_reach_only_what_acts() -> None:
    made, parameters, _ = annealed(spec_of())
    seen = made.weights(0.5, torch.Generator().manual_seed(0))
    assert seen is not None
    sum((weight**2).sum() for weight in seen.values()).backward()  # type: ignore[union-attr]
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, 2 * seen[name].detach())  # type: ignore[arg-type]


def test_a_unit_comes_back_whole() -> None:
    """Structured children draw neurons: rows with their biases, not single weights."""
    model = models.build("mlp", (1, 8, 8), 5, {"hidden": (40, 30)}, seed=0)
    spec = spec_of(structure="unit", two_sided=False)
    body = anatomy(model, spec, (1, 8, 8))
    child = spawn_weights(model.state_dict(), body, spec)
    assert child.subnetwork.kept
    made = acting.topology(spec, child.subnetwork, body, dict(model.named_parameters()))
    assert made is not None
    seen = made.weights(0.0, torch.Generator().manual_seed(0))
    assert seen is not None
    on = (seen["1.weight"] != 0).float().mean(1)
    assert set(on.tolist()) == {0.0, 1.0}
    assert torch.equal(on == 1, seen["1.bias"] != 0)
    assert 20 < on.sum() < 40  # 20 always, 6 of the other 20 on average


@pytest.mark.parametrize(
    "how", [{"tau": 0.0, "two_sided": False}, {"anneal_epochs": 0.0}, {"training": None}]
)
def test_without_a_temperature_it_is_the_sparse_child(how: dict[str, Any]) -> None:
    spec = spec_of(**how)
    assert not anneals(spec)
    weights = {name: torch.randn(shape) for name, shape in BODY.shapes.items()}
    child = spawn_weights(weights, BODY, spec)
    for name, mask in child.subnetwork.masks.items():
        assert torch.equal(child.weights[name], torch.where(mask, weights[name], 0))
