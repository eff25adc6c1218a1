"""A training step in a process that keeps what torch frees, against one as glibc has it.

    python -m analysis.benchmarks.kept_memory [--images 2048]

IMPALA (8, 16, 16 channels) on frames of 64 x 64, forward and backward. The setting cannot be taken
back, so each alternative has a process; they take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from multiprocessing.connection import Connection
from typing import Any

import torch

from analysis.benchmarks.rounds import Measure, Ratios, medians, timed
from ray_subnets import models
from ray_subnets.memory import keep_freed


def work(turn: Connection, keep: bool, images: int) -> None:
    """Answers every message with (seconds of a step, most MB that were resident so far)."""
    if keep:
        keep_freed()
    torch.set_num_threads(1)
    network = models.build("impala", (6, 64, 64), 15, {"channels": [8, 16, 16]}, seed=0)
    frames = torch.zeros(images, 6, 64, 64)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(frames).square().mean().backward()

    measure = timed(step)
    while turn.recv():
        seconds = measure()
        turn.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description="What it gains to keep memory that torch frees.")
    parser.add_argument("--images", type=int, default=2048, help="frames of a step")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    turns: list[Connection] = []
    processes: list[Any] = []
    peak = [0.0, 0.0]
    for keep in (True, False):
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, keep, options.images))
        process.start()
        turns.append(mine)
        processes.append(process)

    def asked(which: int) -> Measure:
        def measure() -> float:
            turns[which].send(True)
            seconds, peak[which] = turns[which].recv()
            return seconds

        return measure

    torch.set_num_threads(1)  # what the table says
    times = medians(asked(0), asked(1), rounds=options.rounds)
    for turn, process in zip(turns, processes, strict=True):
        turn.send(False)
        process.join()
    table = Ratios(f"IMPALA, a step on {options.images} frames")
    table.add("keep_freed", "glibc's defaults", times)
    table.show()
    print(f"most memory: {peak[0]:,.0f} MB, {peak[1]:,.0f} MB")


if __name__ == "__main__":
    main()
