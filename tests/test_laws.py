"""Laws that every method must keep, on several networks (one table of methods, one set of laws)."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ray_subnets import ChildSpec, Training, masks, models, noisy, sparse, spawn
from ray_subnets.checkpoints import RunFolder
from ray_subnets.data import Batches, Data, Preprocess, Split
from ray_subnets.flat import flatten
from ray_subnets.population import Task, Worker
from ray_subnets.recipes import Fit, Result
from ray_subnets.spawning import (
    KINDS,
    METHODS,
    Anatomy,
    Child,
    anatomy,
    spawn_weights,
    subnetwork,
)
from ray_subnets.stored import restore
from ray_subnets.supervised import predict
from tests.tiny import equal

NETWORKS = {
    "mlp": ("mlp", (1, 8, 8), {"hidden": (16, 12)}),
    "lenet_s": ("lenet_s", (1, 28, 28), {}),
    "resnet": ("resnet56", (3, 8, 8), {"width": 2}),
    "densenet": ("densenet121", (3, 8, 8), {"growth": 2}),
    "impala": ("impala", (3, 16, 16), {"channels": (4, 8), "hidden": 16}),
    "wide_resnet": ("wide_resnet", (3, 16, 16), {"depth": 10, "width": 1}),
    "shufflenet": ("torchvision/shufflenet_v2_x0_5", (3, 32, 32), {}),  # grouped convolutions
}
half = {"density": 0.5}
VARIANTS: dict[str, dict[str, object]] = {
    "noisy": dict(method="noisy", draw="bernoulli", sigma=0.05),
    "noisy relative": dict(method="noisy", draw="exact", sigma=0.5, relative=True, mean=0.1),
    "noisy units": dict(method="noisy", draw="exact", sigma=0.05, structure="unit"),
    "noisy layers": dict(method="noisy", draw="exact", sigma=0.05, structure="layer"),
    "sparse": dict(method="sparse", draw="exact"),
    "sparse global": dict(method="sparse", draw="exact", scope="global"),
    "sparse magnitude": dict(method="sparse", draw="exact", criterion="magnitude"),
    "sparse units": dict(method="sparse", draw="exact", structure="unit"),
    "sparse layers": dict(method="sparse", draw="exact", structure="layer"),
    "sparse iterative": dict(method="sparse", draw="exact", prune_epochs=2),
    "sparse iterative magnitude": dict(
        method="sparse", draw="exact", prune_epochs=2, criterion="magnitude"
    ),
    "stochastic": dict(method="stochastic", draw="exact", tau=0.5, anneal_epochs=1.0),
    "stochastic two-sided": dict(
        method="stochastic", draw="bernoulli", tau=0.3, anneal_epochs=2.0, two_sided=True
    ),
    "stochastic uniform": dict(
        method="stochastic", draw="exact", probabilities="uniform", anneal_epochs=1.0
    ),
    "stochastic mixture": dict(
        method="stochastic", draw="exact", probabilities="mixture", anneal_epochs=1.0
    ),
    "stochastic units": dict(
        method="stochastic", draw="exact", tau=0.5, anneal_epochs=1.0, structure="unit"
    ),
}
"""Every method, in every way that it can draw and tune."""
PRUNING = [name for name, one in VARIANTS.items() if METHODS[str(one["method"])].prunes]
THOROUGH = ("mlp", "wide_resnet")
"""networks that meet every variant; the others, slower, meet one of each method, and removal"""
PAIRS = [
    (variant, network)
    for network in NETWORKS
    for variant in VARIANTS
    if network in THOROUGH
    or variant in ("noisy", "sparse", "stochastic")
    or (variant == "sparse units" and network != "shufflenet")  # refused: it chunks channels
]
every_pair = pytest.mark.parametrize(("variant", "network"), PAIRS)
every_network = pytest.mark.parametrize("network", NETWORKS)


def build(network: str, seed: int = 0) -> nn.Module:
    name, shape, options = NETWORKS[network]
    return models.build(name, shape, 5, options, seed)


def spec_of(variant: str, **changes: object) -> ChildSpec:
    noisy_ = VARIANTS[variant]["method"] == "noisy"
    training = None if noisy_ else Training(epochs=2, batch_size=8, lr=0.01)
    values = {"id": "child-000", "seed": 7, "training": training}
    return ChildSpec(**(values | half | VARIANTS[variant] | changes))  # type: ignore[arg-type]


@functools.cache
def body_of(network: str, structured: bool) -> Anatomy:
    """Found once: tracing a network for its units takes a second."""
    variant = "sparse units" if structured else "sparse"
    return anatomy(build(network), spec_of(variant), NETWORKS[network][1])


def body_for(network: str, variant: str) -> Anatomy:
    return body_of(network, VARIANTS[variant].get("structure") in KINDS)


def child_of(network: str, spec: ChildSpec, parent: nn.Module) -> Child:
    return spawn_weights(parent.state_dict(), body_of(network, spec.structure in KINDS), spec)


def random_data(network: str, samples: int = 20) -> Data:
    generator = torch.Generator().manual_seed(3)
    shape = NETWORKS[network][1]

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(0, 5, (n,), generator=generator))

    channels = shape[0]
    preprocess = Preprocess((0.5,) * channels, (0.25,) * channels)
    return Data("random", split(samples), split(10), split(10), 5, preprocess)


def test_every_method_has_variants_here() -> None:
    assert {one["method"] for one in VARIANTS.values()} == set(METHODS)


@every_pair
def test_same_recipe_same_child(variant: str, network: str) -> None:
    """A recipe gives the same bits again, also after a journey as JSON."""
    parent, spec = build(network), spec_of(variant)
    first = child_of(network, spec, parent)
    travelled = TypeAdapter(ChildSpec).validate_json(json.dumps(spec.to_json()))
    assert travelled == spec
    torch.rand(5)  # the global generator must not matter
    stored = dict(sorted(parent.state_dict().items(), reverse=True))  # a file has its own order
    second = spawn_weights(stored, body_for(network, variant), travelled)
    assert equal(first.weights, second.weights)
    assert equal(first.subnetwork.masks, second.subnetwork.masks)
    body = body_for(network, variant)
    others = [subnetwork(spec_of(variant, seed=k), body, parent.state_dict()) for k in range(8)]
    same = all(equal(other.masks, first.subnetwork.masks) for other in others)
    assert same == (spec.criterion == "magnitude")


@every_pair
def test_spawning_leaves_the_parent_unchanged(variant: str, network: str) -> None:
    parent = build(network)
    before = copy.deepcopy(parent.state_dict())
    child = spawn(parent, spec_of(variant), NETWORKS[network][1])
    assert equal(parent.state_dict(), before)
    with torch.no_grad():  # no memory is shared either
        for tensor in child.parameters():
            tensor.add_(1)
    assert equal(parent.state_dict(), before)


@every_pair
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_partition_covers_everything_once(variant: str, network: str, parts: int) -> None:
    """Every weight, or every unit or layer, is in exactly one part (eq. 3.10, 3.11)."""
    if parts == 3 and VARIANTS[variant].get("criterion") == "magnitude":
        pytest.skip("magnitude makes one subnetwork and its complement")
    body = body_for(network, variant)
    if parts == 3 and any(one.count < 3 for one in body.units):
        pytest.skip("this small network has a layer with fewer units than parts")
    weights = build(network).state_dict()
    sets = [
        subnetwork(spec_of(variant, parts=parts, part=part, density=1 / parts), body, weights)
        for part in range(parts)
    ]
    for name in sets[0].target:
        total = torch.stack([one.target[name].int() for one in sets]).sum(0)
        assert (total == 1).all(), name


@every_pair
def test_only_what_is_masked_differs_from_the_parent(variant: str, network: str) -> None:
    """The classifier is inherited, and so is what the mask leaves alone."""
    parent, spec = build(network), spec_of(variant)
    weights = parent.state_dict()
    child = child_of(network, spec, parent)
    masked = child.subnetwork.masks
    assert list(masks.maskable(parent, classifier=True))[-1] not in masked
    for name, weight in weights.items():
        if name not in masked or (spec.method == "noisy" and weight.dim() < 2):
            assert torch.equal(child.weights[name], weight), name
            continue
        kept = ~masked[name] if spec.method == "noisy" else masked[name]
        assert torch.equal(child.weights[name][kept], weight[kept]), name


@every_network
def test_mirrored_noise_cancels(network: str) -> None:
    """The four children of one draw average to the parent (eq. 4.8-4.11)."""
    parent = build(network)
    weights, shapes = parent.state_dict(), masks.maskable(parent)
    four = [
        child_of(network, spec_of("noisy", parts=2, part=part, sign=sign), parent).weights
        for sign in (1, -1)
        for part in (0, 1)
    ]
    for name in shapes:
        mean = torch.stack([child[name].double() for child in four]).mean(0)
        torch.testing.assert_close(mean, weights[name].double(), rtol=0, atol=1e-7)
        # Part 0 and part 1 together moved every weight by the same noise, once.
        moved = (four[0][name] - weights[name]) + (four[1][name] - weights[name])
        assert (moved != 0).float().mean() > 0.999


@pytest.mark.parametrize(
    ("variant", "network", "optimizer"),
    [
        (variant, network, optimizer)
        for variant, network in PAIRS
        for optimizer in ("sgd", "adam")
        if variant in PRUNING and (optimizer == "sgd" or network == "mlp")
    ],
)
def test_pruned_weights_stay_zero_through_tuning(
    variant: str, network: str, optimizer: str, tmp_path: Path
) -> None:
    """And come back from disk as they were tuned: zero, or gone where units were removed."""
    name, shape, options = NETWORKS[network]
    data = random_data(network)
    worker = Worker(Task(folder=str(tmp_path), model=name, model_options=options), data)
    parent = build(network)
    worker.load_parent(flatten(parent.state_dict()))
    training = Training(epochs=2, batch_size=8, lr=1e-3, optimizer=optimizer)  # type: ignore[arg-type]
    spec = spec_of(variant, training=training)
    *_, result = worker.run(spec)
    assert isinstance(result, Result)
    if spec.structure == "layer" and result.error:
        assert "NaN or infinite" in result.error  # nothing came through
        return
    assert result.error is None
    assert result.images == 2 * len(data.train)
    child = restore(
        RunFolder(tmp_path),
        worker.build(0),
        parent.state_dict(),
        spec,
        result.weights,
        "here",
        shape,
    )
    logits = RunFolder(tmp_path).load_arrays("outputs/child-000.npz")["test"]
    again = predict(child, data.test.images, data.preprocess)
    torch.testing.assert_close(again, torch.from_numpy(logits), rtol=1e-4, atol=1e-5)
    left = {key: int((weight != 0).sum()) for key, weight in child.named_parameters()}
    sub = subnetwork(spec, body_for(network, variant), parent.state_dict())
    if sub.kept is not None:
        smaller = sum(weight.numel() for weight in child.parameters())
        assert smaller < 0.75 * sum(weight.numel() for weight in parent.parameters())
    for key, mask in sub.masks.items():
        kept = int(mask.sum()) if sub.kept is None else child.get_parameter(key).numel()
        if spec.structure == "layer" and kept == 0:
            assert key not in left  # the layer is gone
        elif mask.dim() > 1:
            assert left[key] == pytest.approx(kept, rel=0.02, abs=2), key
        whole = parent.get_parameter(key).numel()
        assert result.kept.get(key, 1.0) * whole == pytest.approx(kept), key


@every_network
def test_pack_and_unpack_are_inverse_and_small(network: str) -> None:
    parent = build(network)
    shapes = masks.maskable(parent)
    child = child_of(network, spec_of("sparse"), parent)
    drawn = child.subnetwork.masks
    packed = sparse.pack(child.weights, drawn)
    assert equal(sparse.unpack(packed, drawn), child.weights)
    ones = sum(int(mask.sum()) for mask in drawn.values())
    assert sum(packed[name].numel() for name in shapes) == ones
    with pytest.raises(ValueError, match="does not belong to this recipe"):
        sparse.unpack(packed, masks.complement(masks.exact(shapes, 0.3, torch.Generator())))
    assert equal(sparse.unpack_masks(sparse.pack_masks(drawn), shapes), drawn)
    with pytest.raises(ValueError, match="no mask of"):
        sparse.unpack_masks({}, shapes)


@every_network
def test_workers_share_a_batch_without_loss_or_repeat(network: str) -> None:
    """Every image of the global batch goes to one rank, augmented as on a single device."""
    data = random_data(network)
    whole = list(Batches(data, 8, seed=1).epoch(0))
    shares = [list(Batches(data, 8, seed=1, rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    for i, batch in enumerate(whole):
        parts = [share[i] for share in shares]
        merged = torch.empty_like(batch.x)
        merged[0::2], merged[1::2] = parts[0].x, parts[1].x
        assert torch.equal(merged, batch.x)
        assert sum(part.size for part in parts) == batch.size


def test_noise_has_the_moments_it_is_asked_for() -> None:
    zeros = {"w": torch.zeros(400, 500), "v": torch.zeros(3)}
    every = {"w": torch.ones(400, 500, dtype=torch.bool)}
    generator = torch.Generator().manual_seed(0)
    moved = noisy.perturb(zeros, every, generator, mean=0.2, sigma=0.5, scale={"w": 2.0})
    assert abs(float(moved["w"].mean()) - 0.4) < 5 * 1.0 / 200_000**0.5
    assert abs(float(moved["w"].std()) - 1.0) < 5 * 1.0 / 400_000**0.5
    assert torch.equal(moved["v"], zeros["v"])


def test_noise_leaves_float64_weights_alone_where_it_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(50, dtype=torch.float64, generator=generator)}
    masks = {"w": torch.arange(50) % 2 == 0}
    moved = noisy.perturb(weights, masks, generator, sigma=0.1)
    assert moved["w"].dtype == torch.float64
    assert torch.equal(moved["w"][1::2], weights["w"][1::2])
    assert not (moved["w"] == weights["w"])[::2].any()


def test_relative_noise_is_in_units_of_each_tensors_spread() -> None:
    weights = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[2.0, -2.0, 6.0, -6.0]])}
    assert noisy.spread(weights, weights) == {"a": 1.0, "b": pytest.approx(20**0.5)}


def test_jobs_are_plain_json() -> None:
    job = Fit(id="parent", training=Training(epochs=1), seed=1)
    assert json.loads(json.dumps(job.to_json()))["training"]["batch_size"] == 128
