"""What a training step of a child costs, against a dense step in the same run.

    make bench            # or: python -m analysis.benchmarks.training_step [--network wide_resnet]

On a GPU the network is WRN-28-10 in bfloat16 unless another is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from analysis.benchmarks.rounds import Measure, Ratios, medians, timed
from ray_subnets import acting, draws, masks, models, noisy, spawning, stochastic, supervised
from ray_subnets.data import Batches, Data, Preprocess, Split
from ray_subnets.recipes import ChildSpec, Epoch, Training

BATCH, STEPS, ROUNDS = 128, 4, 9
OPTIONS = {"wide_resnet": {"depth": 28, "width": 10}}


def random_data(shape: tuple[int, ...]) -> Data:
    generator = torch.Generator().manual_seed(0)
    n = BATCH * STEPS
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (n,), generator=generator))
    channels = shape[0]
    return Data(
        "random", split, split, split, 10, Preprocess((0.5,) * channels, (0.25,) * channels)
    )


def child_spec(method: str) -> ChildSpec:
    training = Training(epochs=10_000, batch_size=BATCH, lr=0.01)
    return ChildSpec(
        id="child",
        method=method,  # type: ignore[arg-type]
        seed=0,
        density=0.5,
        draw="exact",
        tau=0.5,
        anneal_epochs=1e9,
        training=training,
    )


def _loop(name: str, shape: tuple[int, ...], how: str, device: str) -> Iterator[Epoch]:
    """Training without end; how: dense, contiguous, sparse, stochastic or prune (torch's own)."""
    model: nn.Module = models.build(name, shape, 10, OPTIONS.get(name, {}), seed=0)
    if how in ("contiguous", "prune"):  # torch's pruning fails on channels-last weights
        model = model.to(memory_format=torch.contiguous_format)
    model = model.to(device)
    topology = None
    if how == "prune":
        for module in list(model.modules())[:-1]:
            if isinstance(module, nn.Linear | nn.Conv2d):
                torch_prune.random_unstructured(module, "weight", amount=0.5)
        model = model.to(memory_format=torch.channels_last)
    elif how in ("sparse", "stochastic"):
        spec = child_spec(how)
        body = spawning.anatomy(model, spec, shape)
        weights = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
        child = spawning.spawn_weights(weights, body, spec)
        model.load_state_dict(child.weights)
        parameters = dict(model.named_parameters())
        topology = acting.topology(spec, child.subnetwork, body, parameters)
    precision = "bfloat16" if device == "cuda" else "float32"
    training = Training(epochs=10_000, batch_size=BATCH, lr=0.01, precision=precision)  # type: ignore[arg-type]
    optimizer = supervised.make_optimizer(model, training)
    batches = Batches(random_data(shape).to(torch.device(device)), BATCH, seed=0)
    return supervised.train(model, batches, training, optimizer, topology=topology)


def _step(name: str, shape: tuple[int, ...], how: str, device: str) -> Measure:
    """Seconds per step, over an epoch of `STEPS`."""
    loop = _loop(name, shape, how, device)

    def one_epoch() -> float:
        began = time.perf_counter()
        next(loop)  # reads the loss, so that a GPU has finished
        return (time.perf_counter() - began) / STEPS

    return one_epoch


def steps(name: str, shape: tuple[int, ...], device: str) -> None:
    table = Ratios(f"A step of {name}, batch {BATCH}")
    for how, other, wanted in (
        ("sparse", "dense", "<= 1.03"),
        ("stochastic", "dense", "<= 1.10"),
        ("prune", "dense", "(torch.nn.utils.prune)"),
        ("sparse", "prune", ""),
        ("dense", "contiguous", "(channels last)"),
    ):
        ours, theirs = _step(name, shape, how, device), _step(name, shape, other, device)
        table.add(how, other, medians(ours, theirs, rounds=ROUNDS), wanted)
    table.show()


def random_bits() -> None:
    """The random numbers by themselves, on the CPU."""
    table = Ratios("Random numbers")
    n = 2_800_000
    generator = torch.Generator().manual_seed(0)
    mask = {"w": torch.rand(n, generator=generator) < 0.5}
    chances = stochastic.temperature(mask, 0.3)["w"]
    ours = timed(lambda: stochastic.realise(mask, 0.3, generator))
    theirs = timed(lambda: torch.bernoulli(chances, generator=generator))
    table.add(
        "Bernoulli mask of 2.8 M weights", "torch.bernoulli", medians(ours, theirs, rounds=ROUNDS)
    )
    ours = timed(lambda: draws.normals(10_000_000, 1))
    theirs = timed(lambda: torch.randn(10_000_000, generator=generator))
    table.add("10 M normals", "torch.randn", medians(ours, theirs, rounds=ROUNDS))

    network = models.build("wide_resnet", (3, 32, 32), 10, OPTIONS["wide_resnet"], seed=0)
    weights = network.state_dict()
    shapes = masks.maskable(network)
    half = masks.bernoulli(shapes, 0.5, generator)

    def normals_and_copy() -> None:
        for name in shapes:
            torch.empty_like(weights[name]).copy_(torch.randn(shapes[name], generator=generator))

    def numpy_and_copy() -> None:
        for name in shapes:
            drawn = draws.normals(shapes[name].numel(), 1).view(shapes[name])
            torch.empty_like(weights[name]).copy_(drawn)

    spec = ChildSpec(id="n", method="noisy", seed=0, density=0.5, draw="bernoulli", sigma=0.01)
    body = spawning.anatomy(network, spec, None)
    spawn = timed(lambda: spawning.spawn_weights(weights, body, spec))
    wanted = "<= 1.5"
    pair = medians(spawn, timed(normals_and_copy), rounds=ROUNDS)
    table.add("spawn a noisy WRN-28-10", "torch.randn and copy", pair, wanted)
    pair = medians(spawn, timed(numpy_and_copy), rounds=ROUNDS)
    table.add("spawn a noisy WRN-28-10", "our normals and copy", pair, wanted)
    perturb = timed(lambda: noisy.perturb(weights, half, generator, sigma=0.01))
    pair = medians(perturb, spawn, rounds=ROUNDS)
    table.add("of it, noise (mask given)", "spawn", pair)
    table.show()


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", default="wide_resnet" if cuda else "lenet_l")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if cuda:
        torch.backends.cudnn.benchmark = True
    steps(arguments.network, (3, 32, 32), "cuda" if cuda else "cpu")
    random_bits()


if __name__ == "__main__":
    main()
