"""Many answers of one function, each a task of its own on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import torch

In = TypeVar("In")
Out = TypeVar("Out")


def _one(make: Callable[[Any], Any], item: Any) -> Any:
    torch.set_num_threads(1)  # a task has one core
    return make(item)


def spread(make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`map`, by tasks of one core each, on the Ray that this process is connected to.

    Answers come in the order of the items, each as soon as it and those before it are there, so a
    caller that keeps them loses little when it is stopped; what was not asked for any more is
    cancelled. `make` travels once. A task whose worker dies is done again, by Ray's own count.

    Raises:
        Exception: what `make` raises.
    """
    shared = ray.put(make)
    task: Any = ray.remote(num_cpus=1)(_one)
    waiting = [task.remote(shared, item) for item in items]
    try:
        while waiting:
            yield ray.get(waiting[0])
            waiting.pop(0)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
