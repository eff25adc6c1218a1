"""All members in one call of torch.func, against one after the other.

    make bench            # or: python -m analysis.benchmarks.members [--network resnet18]

What `ray_subnets.batched.faster` decides comes from this table.
"""

from __future__ import annotations

import argparse

import torch

from analysis.benchmarks.rounds import Ratios, medians, timed
from ray_subnets import batched, models
from ray_subnets.data import Preprocess
from ray_subnets.ensembles import Ensemble

ROUNDS = 7
NETWORKS: dict[
    str, tuple[tuple[int, ...], dict[str, int], int, tuple[int, ...]]
] = {  # name -> shape of an input, options, members, samples
    "lenet_s": ((1, 28, 28), {}, 8, (1, 2, 4, 16, 64)),
    "resnet18": ((3, 32, 32), {}, 8, (1, 2, 8)),
    "wide_resnet": ((3, 32, 32), {"depth": 28, "width": 10}, 4, (1, 4)),
}
OTHERS = ("alexnet", "resnet50", "vgg11", "wide_resnet50_2")  # if asked for by name
NETWORKS |= {f"torchvision/{name}": ((3, 224, 224), {}, 4, (1,)) for name in OTHERS}


def compare(name: str, device: torch.device) -> None:
    """Print the ratios of a network on a device."""
    shape, options, count, sizes = NETWORKS[name]
    members = [
        models.build(name, shape, 10, options, seed=seed).eval().requires_grad_(False)
        for seed in range(count)
    ]
    ids = [str(i) for i in range(count)]
    ensemble = Ensemble(members, ids=ids, preprocess=Preprocess()).eval().to(device)
    weights = sum(p.numel() for p in members[0].parameters())
    table = Ratios(f"{count} members of {name}, {weights:,} weights each")
    for samples in sizes:
        x = torch.randn(samples, *shape, device=device)

        def ask(how: bool, x: torch.Tensor = x) -> torch.Tensor:
            ensemble.batched = how
            return ensemble.logits(x)

        with torch.no_grad():
            difference = float((ask(True) - ask(False)).abs().max())
            assert difference < 1e-3, difference
            times = medians(timed(lambda: ask(True)), timed(lambda: ask(False)), rounds=ROUNDS)
        chosen = "one call" if batched.faster(device, weights, samples) else "loop"
        table.add(f"one call, {samples} samples", "loop", times, f"default: {chosen}")
    table.show()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=list(NETWORKS), help="default: the first three")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        default = [name for name in NETWORKS if "/" not in name]
        for name in [arguments.network] if arguments.network else default:
            compare(name, torch.device(device))


if __name__ == "__main__":
    main()
