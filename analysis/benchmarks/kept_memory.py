"""A training step in a process that keeps what torch frees, against one as glibc has it.

    python -m analysis.benchmarks.kept_memory [--images 2048]

IMPALA (8, 16, 16 channels) on frames of 64 x 64, forward and backward. The setting cannot be taken
back, so each alternative has a process; they take turns.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from functools import partial

import torch

from analysis.benchmarks.rounds import Measure, Ratios, apart, medians, timed
from ray_subnets import models
from ray_subnets.memory import keep_freed


def step(keep: bool, images: int) -> Callable[[], tuple[float, float]]:
    """Seconds of a step, and the most MB that were resident so far."""
    if keep:
        keep_freed()
    network = models.build("impala", (6, 64, 64), 15, {"channels": [8, 16, 16]}, seed=0)
    frames = torch.zeros(images, 6, 64, 64)

    def work() -> None:
        network.zero_grad(set_to_none=True)
        network(frames).square().mean().backward()

    measure = timed(work)
    return lambda: (measure(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="What it gains to keep memory that torch frees.")
    parser.add_argument("--images", type=int, default=2048, help="frames of a step")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = {True: 0.0, False: 0.0}

    def measured(keep: bool) -> Measure:
        ask = apart(partial(step, keep, options.images))

        def measure() -> float:
            seconds, peak[keep] = ask()
            return seconds

        return measure

    times = medians(measured(True), measured(False), rounds=options.rounds)
    table = Ratios(f"IMPALA, a step on {options.images} frames")
    table.add("keep_freed", "glibc's defaults", times)
    table.show()
    print(f"most memory: {peak[True]:,.0f} MB, {peak[False]:,.0f} MB")


if __name__ == "__main__":
    main()
