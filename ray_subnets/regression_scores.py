"""The numbers of a run of regression networks, from their saved outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_subnets import regression
from ray_subnets.checkpoints import RunFolder
from ray_subnets.summary import Scores


class RegressionScores(Scores):
    """`Scores` of networks with a Gaussian or an MSE head.

    One or two outputs for each sample are little, so those of all networks stay in memory.
    """

    def __init__(self, folder: RunFolder, head: str, by: str) -> None:
        super().__init__(folder, "probabilities", by)
        self.head = head

    def _load(self, id: str) -> dict[str, Tensor]:
        if id not in self._loaded:
            arrays = self.folder.load_arrays(f"outputs/{id}.npz")
            self._loaded[id] = {name: torch.from_numpy(a) for name, a in arrays.items()}
        return self._loaded[id]

    def test(self, ids: Sequence[str]) -> dict[str, float]:
        """RMSE, MAE and, for a Gaussian head, NLL of the members together."""
        return self._scores(ids, "test")

    def validation(self, ids: Sequence[str]) -> dict[str, float]:
        """The same on validation data."""
        return self._scores(ids, "validation")

    def _scores(self, ids: Sequence[str], split: str) -> dict[str, float]:
        return regression.scores(self.logits(ids, split), self.labels[split], self.head)

    def diversity(self, ids: Sequence[str]) -> dict[str, float]:
        """`spread`: standard deviation of members' means, root of its mean square over samples."""
        said = regression.mixture(self.logits(ids, "test"), self.head)
        return {"spread": float(said.epistemic.mean().sqrt())}

    def kl_from_parent(self, id: str) -> float | None:
        """Mean KL divergence of a child's answers from its parent's; None for an MSE head."""
        if self.head == "mse":
            return None
        parent, child = self.logits(["parent", id], "test")
        return regression.gaussian_kl(parent, child)

    def by_size(self, ids: Sequence[str]) -> list[dict[str, float]]:
        """Test measures of the first k of `ids`, k = 1 to all."""
        outputs, targets = self.logits(ids, "test"), self.labels["test"]
        return [
            {"members": k} | regression.scores(outputs[:k], targets, self.head)
            for k in range(1, len(ids) + 1)
        ]
