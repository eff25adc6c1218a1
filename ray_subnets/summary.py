"""From saved outputs to `result.json`: every number of a run, in one place.

Test labels are used here and nowhere before, after members have been chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ray_subnets import metrics
from ray_subnets.acting import shrinks
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import Running
from ray_subnets.flops import Cost, training_flops
from ray_subnets.recipes import ChildResult, ChildSpec, Result, SolveResult
from ray_subnets.selection import Decision, share_of
from ray_subnets.stored import needs_parent

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
    """Metrics of groups of networks, from their saved logits.

    One network's logits are in memory at a time, and the parent's, whatever the number of networks;
    for diversity up to 32. So files are read several times.
    """

    def __init__(self, folder: RunFolder, how: str, by: str = "nll") -> None:
        self.folder, self.how, self.by = folder, how, by
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._shares: dict[str, float] = {}
        self._tests: dict[tuple[str, ...], dict[str, float]] = {}
        self._together: tuple[tuple[str, ...], dict[str, Tensor]] = ((), {})
        self.labels = {
            name: torch.from_numpy(array) for name, array in folder.load_arrays(LABELS).items()
        }

    def _load(self, id: str) -> dict[str, Tensor]:
        """Logits `(N, C)` by split."""
        if id not in self._loaded:
            arrays = self.folder.load_arrays(f"outputs/{id}.npz")
            keep = {"parent": self._loaded["parent"]} if "parent" in self._loaded else {}
            self._loaded = keep | {id: {name: torch.from_numpy(a) for name, a in arrays.items()}}
        return self._loaded[id]

    def logits(self, ids: Sequence[str], split: str) -> Tensor:
        """`(K, N, C)`"""
        return torch.stack([self._load(id)[split] for id in ids])

    def combined(self, ids: Sequence[str], split: str) -> Tensor:
        """Probabilities `(N, C)` of the members together."""
        if self._together[0] != tuple(ids):
            # A vote of one is certain of everything; one network is asked what it thinks.
            how = self.how if len(ids) > 1 else "probabilities"
            running = {name: Running(how) for name in self.labels}
            for id in ids:
                for name, part in running.items():
                    self.add(part, id, name)
            self._together = (tuple(ids), {name: part.value() for name, part in running.items()})
        return self._together[1][split]

    def add(self, running: Running, id: str, split: str) -> None:
        """One more member to those combined in `running`."""
        share = self._share(id) if self.how == "weighted" else 1.0
        running.add(self._load(id)[split], share)

    def _share(self, id: str) -> float:
        if id not in self._shares:
            p, labels = self._load(id)["validation"].double(), self.labels["validation"]
            p = p.softmax(1)
            found = {"nll": metrics.nll(p, labels), "accuracy": metrics.accuracy(p, labels)}
            self._shares[id] = share_of(found, self.by)
        return self._shares[id]

    def test(self, ids: Sequence[str]) -> dict[str, float]:
        """Test metrics of the combined members, with the NLL after temperature scaling.

        The temperature is fitted on validation data, to the combined probabilities.
        """
        if tuple(ids) in self._tests:
            return dict(self._tests[tuple(ids)])
        test = self.combined(ids, "test")
        validation = self.combined(ids, "validation")
        temperature = metrics.temperature_of(validation, self.labels["validation"])
        result = metrics.summary(test, self.labels["test"])
        result["nll_scaled"] = metrics.nll(metrics.scaled(test, temperature), self.labels["test"])
        result["temperature"] = temperature
        self._tests[tuple(ids)] = result
        return dict(result)

    def validation(self, ids: Sequence[str]) -> dict[str, float]:
        """Accuracy, NLL and Brier score on validation data: what settings may be chosen by."""
        return metrics.quality(self.combined(ids, "validation"), self.labels["validation"])

    def diversity(self, ids: Sequence[str]) -> dict[str, float]:
        """Mean pairwise disagreement, KL and correlation of members on test data (section 7.2)."""
        # Pairs of the first 32 say as much as those of 128, and cost a sixteenth.
        logits = self.logits(ids[:32], "test")
        pairs = {
            "disagreement": metrics.disagreement(logits),
            "kl": metrics.kl_divergence(logits),
            "correlation": metrics.correlation(logits.double().softmax(2)),
        }
        return {name: metrics.mean_off_diagonal(matrix) for name, matrix in pairs.items()}

    def kl_from_parent(self, id: str) -> float | None:
        """Mean KL divergence of a child's answers from its parent's, on test data (Fig 4.3)."""
        return float(metrics.kl_divergence(self.logits(["parent", id], "test"))[0, 1])

    def by_size(self, ids: Sequence[str]) -> list[dict[str, float]]:
        """Test accuracy and NLL of the first k of `ids`, k = 1 to all."""
        labels, curve = self.labels["test"], []
        running, total = Running(self.how), None
        for k, id in enumerate(ids, start=1):
            if self.how == "probabilities":  # a plain sum
                new = self.combined([id], "test")
                total = new if total is None else total + new
                p = total / k
            else:
                self.add(running, id, "test")
                p = running.value() if k > 1 else self.combined([id], "test")
            curve.append(
                {
                    "members": k,
                    "accuracy": metrics.accuracy(p, labels),
                    "nll": metrics.nll(p, labels),
                }
            )
        return curve


def busy_seconds(results: Iterable[Result]) -> float:
    """Time in which at least one job ran: a run that was interrupted or grown later had pauses."""
    total, until = 0.0, 0.0
    for start, end in sorted((r.started, r.started + r.seconds) for r in results):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _mean(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(record[key] for record in records) / len(records) for key in records[0]}


def summarise(
    folder: RunFolder,
    *,
    scores: Scores,
    include_parent: bool,
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    decisions: Sequence[Decision],
    cost: Cost,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `result.json` (data and environment are added by the driver).

    Args:
        scores: of the outputs in `folder`.
        results: job id -> result, of the parent, the single model (if any) and all children.
        times: wall_seconds, start (Unix time) of the run.
    """
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
                "group": spec.label,
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
                "node": result.node,
                "start": result.started - times["start"],
                "seconds": result.seconds,
                "timings": result.timings,
                "weights": asdict(result.weights) if result.weights else None,
                "validation": result.validation or None,
                "test": scores.test([spec.id]) if result.error is None else None,
                "kl_from_parent": scores.kl_from_parent(spec.id) if result.error is None else None,
                "kept": _kept_share(result, cost),
                "notes": list(result.notes),
                "troubles": list(result.troubles),
            }
        )

    def network(id: str) -> dict[str, Any]:
        result = results[id]
        record: dict[str, Any] = {
            "epochs": result.epochs,
            "images": result.images,
            "worker": result.worker,
            "node": result.node,
            "start": result.started - times["start"],
            "seconds": result.seconds,
            "timings": result.timings,
            "attempts": result.attempts,
            "error": result.error,
            "notes": list(result.notes),
            "troubles": list(result.troubles),
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
            "validation": scores.validation(ids),
            "mean_member": _mean([scores.test([id]) for id in ids]),
            "diversity": scores.diversity(ids),
        }

    groups = {}
    for label in dict.fromkeys(spec.label for spec in specs if spec.id in alive):
        ids = [spec.id for spec in specs if spec.label == label and spec.id in alive]
        groups[label] = group(ids) | {"by_size": scores.by_size(ids)}
    members = ["parent", *selected] if include_parent else selected
    ensemble = {
        "includes_parent": include_parent,
        "combine": scores.how,
        "weighted_by": scores.by,
        **group(members),
        "without_parent": scores.test(selected),
        "with_parent": scores.test(["parent", *selected]),
        "validation": {
            "without_parent": scores.validation(selected),
            "with_parent": scores.validation(["parent", *selected]),
        },
        "groups": groups,
        "by_size": scores.by_size(sorted(selected, key=lambda id: by_id[id].rank or 0)),
    }
    record: dict[str, Any] = {
        "parent": network("parent"),
        "single": network("single") if "single" in results else None,
        **_singles(network, [id for id in results if id.startswith("single-")]),
        "children": children,
        "mean_child": _mean([scores.test([id]) for id in alive]),
        "ensemble": ensemble,
    }
    record["cost"] = _cost(folder, record, specs, results, members, cost, times)
    return record


def _singles(network: Callable[[str], dict[str, Any]], ids: Sequence[str]) -> dict[str, Any]:
    """All single models of other budgets, and which is best on validation data."""
    singles = {id: network(id) for id in ids}
    sound = [id for id in ids if singles[id]["error"] is None]
    best = min(sound, key=lambda id: singles[id]["validation"]["nll"], default=None)
    return {"singles": singles, "best_single": best} if ids else {}


def _kept_share(result: Result, cost: Cost) -> float:
    """Fraction of the network's parameters that are left."""
    return cost.nonzero_parameters(result.kept) / max(cost.parameters, 1)


def _cost(
    folder: RunFolder,
    record: Mapping[str, Any],
    specs: Sequence[ChildSpec],
    results: Mapping[str, Result],
    members: Sequence[str],
    cost: Cost,
    times: Mapping[str, float],
) -> dict[str, Any]:
    """What was spent on parent and children, and what an answer of the ensemble costs.

    `flops` counts weights that acted only, the convention of Table 5.2; masked dense kernels save
    no time, so `flops_dense` is what the device did: less for children that are smaller networks.
    1.0 in `flops_vs_single` is one dense network trained on as many images.
    """
    trained = [results["parent"], *(results[spec.id] for spec in specs)]
    smaller = {spec.id for spec in specs if shrinks(spec)}
    solved = [result for result in results.values() if isinstance(result, SolveResult)]
    single = sum(training_flops(cost.total, result.images) for result in trained)
    acted = {r.id: training_flops(cost.nonzero(r.acting or r.kept), r.images) for r in trained}
    nonzero = sum(acted.values())
    dense = sum(
        acted[r.id] if r.id in smaller else training_flops(cost.total, r.images) for r in trained
    )
    stored = {child["id"]: child["weights"] for child in record["children"]}
    stored["parent"] = record["parent"]["weights"]
    files = {stored[id]["file"] for id in members if stored[id]}
    by_id = {spec.id: spec for spec in specs}
    if any(id in by_id and needs_parent(by_id[id], results[id].weights) for id in members):
        files.add("parent.safetensors")  # a recipe needs the parent to be a network again
    member_densities = [results[id].kept for id in members]
    return {
        "epochs": sum(result.epochs for result in trained),
        "images": sum(result.images for result in trained),
        "wall_seconds": times["wall_seconds"],
        "device_seconds": sum(result.device_seconds for result in [*trained, *solved]),
        "flops": nonzero,
        "flops_dense": dense,
        "flops_vs_single": nonzero / single if single else 1.0,
        "parameters": {
            "parent": cost.parameters,
            "ensemble": round(sum(cost.nonzero_parameters(d) for d in member_densities)),
        },
        "inference_passes": len(members),
        "inference_flops_vs_parent": sum(cost.nonzero(d) for d in member_densities)
        / max(cost.total, 1),
        "bytes_on_disk": sum(folder.size(name) or 0 for name in sorted(files)),
    }
