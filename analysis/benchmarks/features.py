"""Feature visualisation in one batch against a loop that makes one picture at a time.

    python -m analysis.benchmarks.features

The same pictures, the same number of steps, LeNet-S, 28x28 images, one thread.
"""

from __future__ import annotations

import argparse
import time

import torch

from analysis.features import Settings, visualise
from ray_subnets import models
from ray_subnets.data import Preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description="Feature visualisation: a batch against a loop.")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64, help="of 1024")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (1, 28, 28)
    networks = [
        models.build("lenet_s", shape, 10, {}, seed=seed).eval().requires_grad_(False)
        for seed in range(arguments.members)
    ]
    channels = list(range(arguments.channels))
    preprocess, how = Preprocess((0.5,), (0.25,)), Settings(steps=arguments.steps)
    visualise(networks, channels, shape, preprocess, settings=Settings(steps=2))  # warm
    start = time.perf_counter()
    batched = visualise(networks, channels, shape, preprocess, settings=how)
    middle = time.perf_counter()
    single = torch.stack(
        [
            torch.stack(
                [
                    visualise([network], [channel], shape, preprocess, settings=how)[0, 0]
                    for channel in channels
                ]
            )
            for network in networks
        ]
    )
    end = time.perf_counter()
    total = arguments.members * arguments.channels
    print(
        f"{total} pictures ({arguments.members} members x {arguments.channels} channels), "
        f"{arguments.steps} steps: in one batch {middle - start:.2f} s, one at a time "
        f"{end - middle:.2f} s, {(end - middle) / (middle - start):.1f}x; largest difference of a "
        f"pixel {float((batched - single).abs().max()):.1e}"
    )


if __name__ == "__main__":
    main()
