"""An ensemble of regression networks: one mean and variance for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_subnets import regression
from ray_subnets.ensembles import Ensemble
from ray_subnets.regression import Forecast


class Regressor(Ensemble):
    """Networks with a Gaussian or an MSE head that answer together.

    Call it with network inputs `(N, *shape)`: it returns `(N, 2)` float32, mean and variance of the
    members' mixture. `logits` and `ask` give the members' own outputs, `(K, N, 2)` (mean, logarithm
    of the variance) or `(K, N, 1)` (mean).

    It is saved, loaded and exported like any `Ensemble`; it has no temperature.
    """

    def forward(self, x: Tensor) -> Tensor:
        said = regression.mixture(self.logits(x), self.head)
        return torch.stack([said.mean, said.variance], 1).float()

    @torch.no_grad()
    def predict(self, x: Tensor, batch_size: int = 500) -> Forecast:  # type: ignore[override]
        """Mean and variance, and how much of it members disagree about; on the CPU.

        Args:
            x: `(N, *shape)`, as for a call, on any device.

        Example:
            >>> said = ensemble.predict(x)  # doctest: +SKIP
            >>> said.mean, said.variance.sqrt(), said.aleatoric, said.epistemic  # doctest: +SKIP
        """
        return regression.mixture(self.ask(x, batch_size), self.head)

    def calibrate(self, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
        """Not for regression.

        Raises:
            ValueError: always.
        """
        regression.classifiers_only(self.head, "calibrate")
        raise AssertionError(self.head)
