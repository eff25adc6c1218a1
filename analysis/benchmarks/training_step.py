"""What a training step costs: ratios against a named alternative in the same run.

    make bench

Each number is the median over rounds; the alternatives of a row take turns inside a round, so a
machine that slows down slows both.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from ray_subnets import masks, models, noisy, sparse, stochastic, supervised
from ray_subnets.data import Batches, Data, Preprocess, Split
from ray_subnets.recipes import Training

BATCH, STEPS, ROUNDS = 128, 4, 7


def _data(shape: tuple[int, ...]) -> Data:
    generator = torch.Generator().manual_seed(0)
    n = BATCH * STEPS
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (n,), generator=generator))
    return Data(
        "random", split, split, split, 10, Preprocess((0.5,) * shape[0], (0.25,) * shape[0])
    )


def _epochs(
    name: str, shape: tuple[int, ...], *, contiguous: bool = False, how: str = "dense"
) -> Callable[[], float]:
    """A function that trains one more epoch of `STEPS` steps and returns seconds per step."""
    data, training = _data(shape), Training(epochs=10_000, batch_size=BATCH, lr=0.01)
    model = models.build(name, shape, 10, {}, seed=0)
    if contiguous:
        model = model.to(memory_format=torch.contiguous_format)
    drawn = None
    if how != "dense":
        drawn = masks.exact(masks.maskable(model), 0.5, torch.Generator().manual_seed(0))
        model.load_state_dict(sparse.prune(model.state_dict(), drawn))
    tau = (lambda epoch: 0.5) if how == "stochastic" else None
    loop = supervised.train(
        model,
        Batches(data, BATCH, seed=0),
        training,
        supervised.make_optimizer(model, training),
        masks=drawn,
        tau=tau,
    )
    next(loop)

    def one_more() -> float:
        began = time.perf_counter()
        next(loop)
        return (time.perf_counter() - began) / STEPS

    return one_more


def _medians(alternatives: dict[str, Callable[[], float]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(ROUNDS):
        for name, measure in alternatives.items():
            times[name].append(measure())
    return {name: statistics.median(values) for name, values in times.items()}


def _bernoulli(how: str) -> Callable[[], float]:
    """Seconds to draw 2.8 million Bernoulli values, LeNet-L's weights."""
    generator = torch.Generator().manual_seed(0)
    mask = {"w": torch.rand(2_800_000, generator=generator) < 0.5}
    probabilities = stochastic.temperature(mask, 0.3)["w"]

    def draw() -> float:
        began = time.perf_counter()
        if how == "torch":
            torch.bernoulli(probabilities, generator=generator)
        else:
            stochastic.realise(mask, 0.3, generator)
        return time.perf_counter() - began

    return draw


def _normals(how: str) -> Callable[[], float]:
    """Seconds to draw 10 million standard normals, as for a noisy child."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": torch.Size([10_000_000])}

    def draw() -> float:
        began = time.perf_counter()
        if how == "torch":
            torch.randn(shapes["w"], generator=generator)
        else:
            noisy.normals(shapes, generator)
        return time.perf_counter() - began

    return draw


def main() -> None:
    torch.set_num_threads(1)
    table = Table(
        title=f"one thread, batch {BATCH}, torch {torch.__version__}, {platform.machine()}"
    )
    for heading in ("what", "alternative", "ms", "ms alternative", "ratio"):
        table.add_column(heading, justify="left" if heading in ("what", "alternative") else "right")

    def row(what: str, other: str, times: dict[str, float]) -> None:
        ours, theirs = times.values()
        table.add_row(
            what, other, f"{1000 * ours:.1f}", f"{1000 * theirs:.1f}", f"{ours / theirs:.2f}x"
        )

    for name, shape in (("lenet_s", (1, 28, 28)), ("lenet_l", (3, 32, 32))):
        row(
            f"{name} step, channels last",
            "contiguous",
            _medians({"a": _epochs(name, shape), "b": _epochs(name, shape, contiguous=True)}),
        )
    for how in ("sparse", "stochastic"):
        ours, dense = _epochs("lenet_l", (3, 32, 32), how=how), _epochs("lenet_l", (3, 32, 32))
        row(f"lenet_l step, {how}", "dense", _medians({"a": ours, "b": dense}))
    row(
        "Bernoulli mask of 2.8 M weights",
        "torch.bernoulli",
        _medians({"a": _bernoulli("ours"), "b": _bernoulli("torch")}),
    )
    row(
        "noise for 10 M weights, numpy",
        "torch.randn",
        _medians({"a": _normals("ours"), "b": _normals("torch")}),
    )
    Console().print(table)


if __name__ == "__main__":
    main()
