"""One data set's shifted images, and how ensembles fare on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ray_subnets import metrics
from ray_subnets.combining import combine
from ray_subnets.data import Data, Split
from ray_subnets.ensembles import Ensemble
from ray_subnets.recipes import Shifted
from ray_subnets.shifts import corruptions, shift
from ray_subnets.shifts.outsiders import ood_split

_KEEP = 512 * 2**20  # bytes of corrupted images that are kept for the next ensemble
_BATCH = 500


class ShiftedData:
    """Corrupted copies of a data set's test images, and images of another data set.

    Raises:
        ValueError: see `corruptions.splits` and `outsiders.ood_split`.
    """

    def __init__(self, data: Data, job: Shifted) -> None:
        self._data, self._job = data, job
        rows = corruptions.rows_of(len(data.test), job.samples)
        count = len(rows) * len(job.severities) * len(corruptions.NAMES + corruptions.EXTRA)
        self._small = count * torch.Size(data.input_shape).numel() <= _KEEP
        self._kept: list[tuple[str, int, Split]] = []
        self._outside: Tensor | None = None
        if job.ood:
            self._outside = ood_split(job.ood, data)

    def _splits(self) -> Iterator[tuple[str, int, Split]]:
        if self._kept:
            yield from self._kept
            return
        made = corruptions.splits(
            self._data.test,
            severities=self._job.severities,
            limit=self._job.samples,
            root=self._job.root,
        )
        for one in made:
            if self._small:
                self._kept.append(one)
            yield one

    def measure(self, ensemble: Ensemble) -> dict[str, Any]:
        """`shift` and `ood` of a record."""
        found: dict[shift.Key, shift.Cell] = {}
        samples = 0
        for name, severity, split in self._splits():
            assert isinstance(split.images, Tensor)
            probabilities = combine(self._logits(ensemble, split.images), ensemble.combine)
            found[name, severity] = shift.cell(probabilities, split.labels.cpu())
            samples = len(split)
        severities = self._job.severities
        names = corruptions.NAMES
        severity_means = {
            str(severity): shift.mean_over_cells(found, names, [severity])
            for severity in severities
        }
        cells = {
            f"{name} {severity}": {k: v for k, v in asdict(one).items() if isinstance(v, float)}
            for (name, severity), one in found.items()
        }
        record: dict[str, Any] = {
            "shift": {
                "samples": samples,
                **shift.mean_over_cells(found, names, severities),
                "pooled": shift.pooled(found, names + corruptions.EXTRA, severities),
                "severities": severity_means,
                "cells": cells,
            }
        }
        if self._outside is not None:
            record["ood"] = self._apart(ensemble, self._outside)
        return record

    def _logits(self, ensemble: Ensemble, images: Tensor) -> Tensor:
        """`(K, N, C)` on the CPU."""
        device = next(ensemble.parameters()).device
        with torch.no_grad():
            parts = [ensemble.logits(part.to(device)).cpu() for part in images.split(_BATCH)]
        return torch.cat(parts, dim=1)

    def _apart(self, ensemble: Ensemble, outside: Tensor) -> dict[str, Any]:
        """How well strangers are told from test images, by each score."""
        scores = []
        for images in (self._data.test.images, outside):
            assert isinstance(images, Tensor), "checked by ood_split"
            logits = self._logits(ensemble, images)
            scores.append(metrics.uncertainties(combine(logits, ensemble.combine), logits))
        found: dict[str, Any] = {"data": self._job.ood}
        for name, inside in scores[0].items():
            other = scores[1][name]
            found[name] = {
                "auroc": metrics.auroc(inside, other),
                "fpr95": metrics.fpr_at_95(inside, other),
            }
        return found
