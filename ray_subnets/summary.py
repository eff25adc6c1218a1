"""From saved outputs to `result.json`: every number of a run, in one place.

Test labels are used here and nowhere before, after members have been chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ray_subnets import metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.ensemble import combine
from ray_subnets.flops import Cost, training_flops
from ray_subnets.recipes import ChildResult, ChildSpec, Result
from ray_subnets.selection import Decision
from ray_subnets.spawning import METHODS

LABELS = "outputs/labels.npz"


@dataclass(frozen=True)
class Outputs:
    """Saved outputs of one split: `logits` `(K, N, C)` of `ids`, `labels` `(N,)`."""

    ids: tuple[str, ...]
    logits: Tensor
    labels: Tensor


def load_outputs(folder: RunFolder, ids: Sequence[str], split: str) -> Outputs:
    """Stack the saved logits of `ids` on `validation` or `test`.

    Raises:
        ValueError: a file is missing or damaged.
    """
    logits = [torch.from_numpy(folder.load_arrays(f"outputs/{id}.npz")[split]) for id in ids]
    labels = torch.from_numpy(folder.load_arrays(LABELS)[split])
    return Outputs(tuple(ids), torch.stack(logits), labels)


class Scores:
    """Metrics of groups of networks, from their saved logits; each file is read once."""

    def __init__(self, folder: RunFolder, how: str) -> None:
        self.folder, self.how = folder, how
        self._cache: dict[str, dict[str, Tensor]] = {}
        self._tests: dict[tuple[str, ...], dict[str, float]] = {}
        self.labels = {
            name: torch.from_numpy(array) for name, array in folder.load_arrays(LABELS).items()
        }

    def logits(self, ids: Sequence[str], split: str) -> Tensor:
        """`(K, N, C)`"""
        for id in ids:
            if id not in self._cache:
                arrays = self.folder.load_arrays(f"outputs/{id}.npz")
                self._cache[id] = {name: torch.from_numpy(a) for name, a in arrays.items()}
        return torch.stack([self._cache[id][split] for id in ids])

    def test(self, ids: Sequence[str]) -> dict[str, float]:
        """Test metrics of the combined members, with the NLL after temperature scaling.

        The temperature is fitted on validation data, to the combined probabilities.
        """
        if tuple(ids) in self._tests:
            return dict(self._tests[tuple(ids)])
        test = combine(self.logits(ids, "test"), self.how)
        validation = combine(self.logits(ids, "validation"), self.how)
        tiny = torch.finfo(torch.float64).tiny
        temperature = metrics.fit_temperature(
            validation.clamp_min(tiny).log(), self.labels["validation"]
        )
        scaled = (test.clamp_min(tiny).log() / temperature).softmax(1)
        result = metrics.summary(test, self.labels["test"])
        result["nll_scaled"] = metrics.nll(scaled, self.labels["test"])
        result["temperature"] = temperature
        self._tests[tuple(ids)] = result
        return dict(result)

    def validation(self, ids: Sequence[str]) -> dict[str, float]:
        """Accuracy, NLL and Brier score on validation data: what settings may be chosen by."""
        p, labels = combine(self.logits(ids, "validation"), self.how), self.labels["validation"]
        return {
            "accuracy": metrics.accuracy(p, labels),
            "nll": metrics.nll(p, labels),
            "brier": metrics.brier(p, labels),
        }

    def diversity(self, ids: Sequence[str]) -> dict[str, float]:
        """Mean pairwise disagreement, KL and correlation of members on test data (section 7.2)."""
        logits = self.logits(ids, "test")
        pairs = {
            "disagreement": metrics.disagreement(logits),
            "kl": metrics.kl_divergence(logits),
            "correlation": metrics.correlation(logits.double().softmax(2)),
        }
        return {name: metrics.mean_off_diagonal(matrix) for name, matrix in pairs.items()}


def _mean(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(record[key] for record in records) / len(records) for key in records[0]}


def summarise(
    folder: RunFolder,
    *,
    how: str,
    include_parent: bool,
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    decisions: Sequence[Decision],
    cost: Cost,
    densities: Mapping[str, Mapping[str, float]],
    times: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `result.json` (data and environment are added by the driver).

    Args:
        results: job id -> result, of the parent, the single model (if any) and all children.
        densities: child id -> kept fraction of each masked weight; {} for a dense child.
        times: wall_seconds, start (Unix time) of the run.
    """
    scores = Scores(folder, how)
    by_id = {decision.id: decision for decision in decisions}
    selected = [spec.id for spec in specs if by_id[spec.id].selected]
    alive = [spec.id for spec in specs if results[spec.id].error is None]

    children = []
    for spec in specs:
        result, decision = results[spec.id], by_id[spec.id]
        assert isinstance(result, ChildResult)
        children.append(
            {
                "id": spec.id,
                "method": spec.method,
                "recipe": spec.to_json(),
                "fitness": result.fitness,
                "rank": decision.rank,
                "selected": decision.selected,
                "why": decision.why,
                "error": result.error,
                "epochs": result.epochs,
                "images": result.images,
                "attempts": result.attempts,
                "worker": result.worker,
                "start": result.started - times["start"],
                "seconds": result.seconds,
                "weights": asdict(result.weights) if result.weights else None,
                "validation": result.validation or None,
                "test": scores.test([spec.id]) if result.error is None else None,
            }
        )

    def network(id: str) -> dict[str, Any]:
        result = results[id]
        record: dict[str, Any] = {
            "epochs": result.epochs,
            "images": result.images,
            "worker": result.worker,
            "start": result.started - times["start"],
            "seconds": result.seconds,
            "attempts": result.attempts,
            "error": result.error,
        }
        if result.error is None:
            assert result.weights
            record |= {
                "weights": asdict(result.weights),
                "validation": result.validation,
                "test": scores.test([id]),
            }
        return record

    def group(ids: Sequence[str]) -> dict[str, Any]:
        return {
            "members": list(ids),
            "test": scores.test(ids),
            "mean_member": _mean([scores.test([id]) for id in ids]),
            "diversity": scores.diversity(ids),
        }

    kinds = {
        method: group([id for id in alive if id.startswith(method + "-")])
        for method in METHODS
        if any(id.startswith(method + "-") for id in alive)
    }
    members = ["parent", *selected] if include_parent else selected
    ensemble = {
        "includes_parent": include_parent,
        "combine": how,
        **group(members),
        "without_parent": scores.test(selected),
        "with_parent": scores.test(["parent", *selected]),
        "validation": {
            "without_parent": scores.validation(selected),
            "with_parent": scores.validation(["parent", *selected]),
        },
        "kinds": kinds,
        "by_size": _by_size(scores, by_id, selected),
    }
    record: dict[str, Any] = {
        "parent": network("parent"),
        "single": network("single") if "single" in results else None,
        "children": children,
        "mean_child": _mean([scores.test([id]) for id in alive]),
        "ensemble": ensemble,
    }
    record["cost"] = _cost(folder, record, specs, results, members, cost, densities, times)
    return record


def _by_size(
    scores: Scores, decisions: Mapping[str, Decision], selected: Sequence[str]
) -> list[dict[str, float]]:
    """Test accuracy and NLL of the k fittest members, k = 1 to all."""
    order = sorted(selected, key=lambda id: decisions[id].rank or 0)
    labels, curve = scores.labels["test"], []
    for k in range(1, len(order) + 1):
        p = combine(scores.logits(order[:k], "test"), scores.how)
        curve.append(
            {"members": k, "accuracy": metrics.accuracy(p, labels), "nll": metrics.nll(p, labels)}
        )
    return curve


def _cost(
    folder: RunFolder,
    record: Mapping[str, Any],
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    members: Sequence[str],
    cost: Cost,
    densities: Mapping[str, Mapping[str, float]],
    times: Mapping[str, float],
) -> dict[str, Any]:
    """What was spent on parent and children, and what an answer of the ensemble costs.

    `flops` counts non-zero weights only, the convention of Table 5.2; masked dense kernels save no
    time, so `flops_dense` is what the device did. 1.0 in `flops_vs_single` is one dense network
    trained on as many images.
    """
    trained = [results["parent"], *(results[spec.id] for spec in specs)]
    dense = sum(training_flops(cost.total, result.images) for result in trained)
    nonzero = sum(
        training_flops(cost.nonzero(densities.get(result.id, {})), result.images)
        for result in trained
    )
    stored = {child["id"]: child["weights"] for child in record["children"]}
    stored["parent"] = record["parent"]["weights"]
    files = {stored[id]["file"] for id in members if stored[id]}
    if any(stored[id] is None for id in members):
        files.add("parent.safetensors")  # a recipe needs the parent to be a network again
    member_densities = [densities.get(id, {}) for id in members]
    return {
        "epochs": sum(result.epochs for result in trained),
        "images": sum(result.images for result in trained),
        "wall_seconds": times["wall_seconds"],
        "device_seconds": sum(result.device_seconds for result in trained),
        "flops": nonzero,
        "flops_dense": dense,
        "flops_vs_single": nonzero / dense if dense else 1.0,
        "parameters": {
            "parent": cost.parameters,
            "ensemble": round(sum(cost.nonzero_parameters(d) for d in member_densities)),
        },
        "inference_passes": len(members),
        "inference_flops_vs_parent": sum(cost.nonzero(d) for d in member_densities)
        / max(cost.total, 1),
        "bytes_on_disk": sum((folder.root / name).stat().st_size for name in sorted(files)),
    }
