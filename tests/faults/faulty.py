"""A network that breaks things: given as `model: faulty:build`, so every worker imports it.

What is to happen lies as files in the folder CHAOS, and each happens once, to whoever renames its
file first: `tune.7` ends the process at the seventh training step of a job; `tune.7.1` is another
one like it. Numbers are those of a plain network: where nothing happens nothing differs.

    spawn.N          SIGKILL while a process spawns its N-th child
    tune.N           SIGKILL in the N-th training step
    evaluate.N       SIGKILL in the N-th batch of an evaluation
    write-WHAT.N     SIGKILL with a file half way, just before its N-th rename into place
    cut-WHAT.N       the file is cut in half once it is in place, then SIGKILL
    full-WHAT.N      the write fails: no space left on device
    nan.N            the N-th training step gives NaN, at most once in a process: where it comes
                     again when the job is done once more it is taken for the recipe's doing

WHAT is the file's folder (checkpoints, results, outputs, children), or the file's name.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import population

_FOLDER = os.environ.get("CHAOS")
_PAUSE = float(os.environ.get("CHAOS_PAUSE", "0"))
_WORKER = Path(sys.argv[0]).name == "default_worker.py"
_counts: Counter[str] = Counter()


def due(what: str, number: int) -> bool:
    """Is this to happen here and now?"""
    if not _FOLDER:
        return False
    for copy in ("", ".1", ".2"):
        name = os.path.join(_FOLDER, f"{what}.{number}{copy}")
        try:
            os.rename(name, f"{name}.done-{os.getpid()}-{time.time_ns()}")
        except OSError:
            continue
        return True
    return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Network(nn.Module):
    """A small MLP."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.output = nn.Linear(hidden, classes)
        self._steps = self._batches = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.output(torch.relu(self.hidden(x.flatten(1))))
        if not _WORKER or len(x) < 3:  # not where the shape of outputs is only looked at
            return logits
        if self.training:
            self._steps += 1
            time.sleep(_PAUSE)
            if due("tune", self._steps):
                die()
            if not _counts["nan"] and due("nan", self._steps):
                _counts["nan"] += 1
                return logits * float("nan")
        else:
            self._batches += 1
            if due("evaluate", self._batches):
                die()
        return logits


def build(input_shape: tuple[int, ...], num_classes: int, hidden: int = 24) -> nn.Module:
    return Network(torch.Size(input_shape).numel(), hidden, num_classes)


def _break_renames() -> None:
    """Files are written under another name and renamed: that is where a write can be broken."""
    rename = os.replace

    def replace(source: Any, target: Any, **how: Any) -> None:
        path = Path(target)
        for what in (path.parent.name, path.name):
            _counts[what] += 1
            count = _counts[what]
            if due(f"full-{what}", count):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            if due(f"write-{what}", count):
                die()
            if due(f"cut-{what}", count):
                rename(source, target, **how)
                os.truncate(target, path.stat().st_size // 2)
                die()
        rename(source, target, **how)

    os.replace = replace  # type: ignore[assignment]


def _break_spawns() -> None:
    spawn = population.spawn_weights

    def spawn_weights(*args: Any, **how: Any) -> Any:
        _counts["spawn"] += 1
        if due("spawn", _counts["spawn"]):
            die()
        return spawn(*args, **how)

    population.spawn_weights = spawn_weights


if _FOLDER:
    _break_renames()
if _FOLDER and _WORKER:
    _break_spawns()
