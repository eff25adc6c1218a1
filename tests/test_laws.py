"""Laws that every method must keep, on several networks (one table of methods, one set of laws)."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ray_subnets import ChildSpec, Training, masks, models, noisy, sparse, spawn
from ray_subnets.data import Batches, Data, Preprocess, Split
from ray_subnets.recipes import Fit
from ray_subnets.spawning import METHODS, kept_fraction, masks_of, spawn_weights

NETWORKS = {
    "mlp": ("mlp", (1, 8, 8), {"hidden": (16, 12)}),
    "lenet_s": ("lenet_s", (1, 28, 28), {}),
    "resnet": ("resnet56", (3, 8, 8), {"width": 2}),
    "densenet": ("densenet121", (3, 8, 8), {"growth": 2}),
    "impala": ("impala", (3, 16, 16), {"channels": (4, 8), "hidden": 16}),
    "wide_resnet": ("wide_resnet", (3, 16, 16), {"depth": 10, "width": 1}),
    "shufflenet": ("torchvision/shufflenet_v2_x0_5", (3, 32, 32), {}),  # grouped convolutions
}
SETTINGS = {
    "noisy": dict(density=0.5, draw="bernoulli", sigma=0.05),
    "sparse": dict(density=0.5, draw="exact"),
    "stochastic": dict(density=0.5, draw="exact", tau=0.5, anneal_epochs=1.0),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_network = pytest.mark.parametrize("network", NETWORKS)


def build(network: str, seed: int = 0) -> nn.Module:
    name, shape, options = NETWORKS[network]
    return models.build(name, shape, 5, options, seed)


def spec_of(method: str, **changes: object) -> ChildSpec:
    training = None if method == "noisy" else Training(epochs=2, batch_size=8, lr=0.01)
    values = {"id": f"{method}-000", "method": method, "seed": 7, "training": training}
    return ChildSpec(**(values | SETTINGS[method] | changes))  # type: ignore[arg-type]


def random_data(network: str, samples: int = 20) -> Data:
    generator = torch.Generator().manual_seed(3)
    shape = NETWORKS[network][1]

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(0, 5, (n,), generator=generator))

    channels = shape[0]
    preprocess = Preprocess((0.5,) * channels, (0.25,) * channels)
    return Data("random", split(samples), split(10), split(10), 5, preprocess)


def test_every_method_has_settings_here() -> None:
    assert set(SETTINGS) == set(METHODS)


@every_network
@every_method
def test_same_recipe_same_child(method: str, network: str) -> None:
    """A recipe gives the same bits again, also after a journey as JSON."""
    parent, spec = build(network), spec_of(method)
    shapes = masks.maskable(parent)
    first = spawn_weights(parent.state_dict(), shapes, spec)
    travelled = TypeAdapter(ChildSpec).validate_json(json.dumps(spec.to_json()))
    assert travelled == spec
    torch.rand(5)  # the global generator must not matter
    second = spawn_weights(parent.state_dict(), shapes, travelled)
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])
    other = spawn_weights(parent.state_dict(), shapes, spec_of(method, seed=8))
    assert any(not torch.equal(other.masks[name], first.masks[name]) for name in shapes)


@every_network
@every_method
def test_spawning_leaves_the_parent_unchanged(method: str, network: str) -> None:
    parent = build(network)
    before = copy.deepcopy(parent.state_dict())
    child = spawn(parent, spec_of(method))
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():  # no memory is shared either
        for tensor in child.parameters():
            tensor.add_(1)
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor, before[name])


@every_network
@every_method
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_partition_covers_every_weight_once(method: str, network: str, parts: int) -> None:
    shapes = masks.maskable(build(network))
    sets = [
        masks_of(spec_of(method, parts=parts, part=part, density=1 / parts), shapes)
        for part in range(parts)
    ]
    for name in shapes:
        total = torch.stack([one[name].int() for one in sets]).sum(0)
        assert (total == 1).all(), name


@every_network
@every_method
def test_only_maskable_weights_differ_from_the_parent(method: str, network: str) -> None:
    """Biases, normalisation and the classifier are inherited; so is what the mask leaves alone."""
    parent, spec = build(network), spec_of(method)
    weights = parent.state_dict()
    shapes = masks.maskable(parent)
    child = spawn_weights(weights, shapes, spec)
    for name, weight in weights.items():
        if name not in shapes:
            assert torch.equal(child.weights[name], weight), name
            continue
        kept = ~child.masks[name] if method == "noisy" else child.masks[name]
        assert torch.equal(child.weights[name][kept], weight[kept]), name


@every_network
def test_mirrored_noise_cancels(network: str) -> None:
    """The four children of one draw average to the parent (eq. 4.8-4.11)."""
    parent = build(network)
    weights, shapes = parent.state_dict(), masks.maskable(parent)
    four = [
        spawn_weights(weights, shapes, spec_of("noisy", parts=2, part=part, sign=sign)).weights
        for sign in (1, -1)
        for part in (0, 1)
    ]
    for name in shapes:
        mean = torch.stack([child[name].double() for child in four]).mean(0)
        torch.testing.assert_close(mean, weights[name].double(), rtol=0, atol=1e-7)
        # Part 0 and part 1 together moved every weight by the same noise, once.
        moved = (four[0][name] - weights[name]) + (four[1][name] - weights[name])
        assert (moved != 0).float().mean() > 0.999


@every_network
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.prunes])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_pruned_weights_stay_zero_through_tuning(
    method: str, network: str, optimizer: str, tmp_path: object
) -> None:
    from ray_subnets.checkpoints import RunFolder
    from ray_subnets.flat import flatten
    from ray_subnets.population import Task, Worker, restore
    from ray_subnets.recipes import Result

    name, _, options = NETWORKS[network]
    data = random_data(network)
    worker = Worker(Task(folder=str(tmp_path), model=name, model_options=options), data)
    parent = build(network)
    worker.load_parent(flatten(parent.state_dict()))
    training = Training(epochs=2, batch_size=8, lr=1e-3, optimizer=optimizer)
    spec = spec_of(method, training=training)
    *_, result = worker.run(spec)
    assert isinstance(result, Result)
    assert result.error is None
    assert result.images == 2 * len(data.train)
    child = worker.build(0)
    restore(RunFolder(str(tmp_path)), child, {}, spec, result.weights, "here")
    mask = masks_of(spec, masks.maskable(child))
    for key, weight in child.state_dict().items():
        if key in mask:
            assert (weight[~mask[key]] == 0).all(), key
            # The rest was tuned.
            assert (weight[mask[key]] != parent.state_dict()[key][mask[key]]).float().mean() > 0.5
    kept = sum(int((child.state_dict()[key] != 0).sum()) for key in mask)
    wanted = kept_fraction(spec) * sum(one.numel() for one in mask.values())
    assert abs(kept - wanted) / wanted < 0.02


@every_network
@every_method
def test_kept_fraction_is_that_of_the_masks(method: str, network: str) -> None:
    shapes = masks.maskable(build(network))
    for spec in (
        spec_of(method, density=0.3),
        spec_of(method, density=0.3, parts=2, part=1),
        spec_of(method, density=0.25, parts=4, part=2),
    ):
        if METHODS[method].prunes:
            assert abs(masks.density(masks_of(spec, shapes)) - kept_fraction(spec)) < 0.01
        else:
            assert kept_fraction(spec) == 1


@every_network
def test_pack_and_unpack_are_inverse_and_small(network: str) -> None:
    parent = build(network)
    shapes = masks.maskable(parent)
    child = spawn_weights(parent.state_dict(), shapes, spec_of("sparse"))
    packed = sparse.pack(child.weights, child.masks)
    again = sparse.unpack(packed, child.masks)
    for name, weight in child.weights.items():
        assert torch.equal(again[name], weight)
    ones = sum(int(mask.sum()) for mask in child.masks.values())
    assert sum(packed[name].numel() for name in shapes) == ones
    with pytest.raises(ValueError, match="does not belong to this recipe"):
        sparse.unpack(packed, masks.complement(masks.exact(shapes, 0.3, torch.Generator())))


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
    shapes = {"w": torch.Size([400, 500])}
    noise = noisy.normals(shapes, torch.Generator().manual_seed(0), mean=0.2, sigma=0.5)["w"]
    assert abs(float(noise.mean()) - 0.2) < 5 * 0.5 / 200_000**0.5
    assert abs(float(noise.std()) - 0.5) < 5 * 0.5 / 400_000**0.5


def test_jobs_are_plain_json() -> None:
    job = Fit(id="parent", training=Training(epochs=1), seed=1)
    assert json.loads(json.dumps(job.to_json()))["training"]["batch_size"] == 128
