"""The same training as a run's, in plain torch: what everything around it is measured against.

Of ray_subnets it uses the network and nothing else. No checkpoints, no files, no results: a parent,
then children of half of its weights, each evaluated once on validation and test images.

    python -m analysis.benchmarks.bare DATA.npz PARENT_EPOCHS CHILD_EPOCHS CHILDREN
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from ray_subnets import models

BATCH, VALIDATION = 128, 2000


class Images:
    """Training images and those to evaluate on, as bytes in memory."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            train = torch.from_numpy(arrays["train_images"])[:, None]
            labels = torch.from_numpy(arrays["train_labels"])
            test = torch.from_numpy(arrays["test_images"])[:, None]
        self.train, self.labels = train[VALIDATION:], labels[VALIDATION:].long()
        self.held_out = (train[:VALIDATION], test)
        self.mean = self.train.float().mean() / 255
        self.std = self.train.float().std() / 255

    def inputs(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def fit(model: nn.Module, data: Images, epochs: int, masks: Mapping[str, Tensor]) -> None:
    """SGD by one-cycle with random flips; weights outside `masks` stay zero."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
    )
    n = len(data.labels)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * -(-n // BATCH))
    held = [(p, masks[name]) for name, p in model.named_parameters() if name in masks]
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(n).split(BATCH):
            x = data.train[index]
            flipped = torch.rand(len(x)) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
            loss = cross_entropy(model(data.inputs(x)), data.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter, mask in held:
                    parameter.mul_(mask)


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> None:
    model.eval()
    for images in data.held_out:
        for part in images.split(500):
            model(data.inputs(part))


def population(data: Images, parent_epochs: int, child_epochs: int, children: int) -> None:
    torch.manual_seed(0)
    parent = models.build("lenet_s", (1, 28, 28), 10, {}, seed=0)
    fit(parent, data, parent_epochs, {})
    evaluate(parent, data)
    for _ in range(children):
        child = copy.deepcopy(parent)
        weights = [(name, p) for name, p in child.named_parameters() if p.dim() > 1]
        masks = {name: torch.rand(p.shape) < 0.5 for name, p in weights[:-1]}
        with torch.no_grad():
            for name, parameter in weights[:-1]:
                parameter.mul_(masks[name])
        fit(child, data, child_epochs, masks)
        evaluate(child, data)


def main() -> None:
    torch.set_num_threads(1)
    data = Images(sys.argv[1])
    began = time.perf_counter()
    population(data, *map(int, sys.argv[2:5]))
    json.dump({"seconds": time.perf_counter() - began}, sys.stdout)


if __name__ == "__main__":
    main()
