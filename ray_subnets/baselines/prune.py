"""Prune and fine-tune: every member is trained dense, pruned once, and tuned."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from ray_subnets import masks
from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of, shares
from ray_subnets.recipes import Count, Positive, derive
from ray_subnets.topology import Fixed


@dataclass(frozen=True, kw_only=True)
class Prune(Method):
    """Dense networks; the largest weights of all layers together stay, and are tuned.

    Published (as the opponent in Liu et al. 2022): a dense training for each member, density 0.2,
    a constant rate of 0.001 after it, a hundredth of the dense one's.
    """

    title: ClassVar[str] = "prune and fine-tune"
    source: ClassVar[str] = "Han et al. 2015; settings of Liu et al. 2022"
    deviation: ClassVar[str] = "the dense trainings share the budget; a quarter of it is for tuning"
    method: Literal["prune"] = "prune"
    members: Count = 3
    """networks"""
    density: Annotated[float, Gt(0), Lt(1)] = 0.2
    """fraction of all weights of convolution and linear layers that stays, the classifier too"""
    scope: Literal["global", "local"] = "global"
    """density holds over all layers together, or in every layer"""
    tune: Annotated[float, Gt(0), Lt(1)] = 0.25
    """fraction of a network's epochs after pruning"""
    rate: Positive = 0.01
    """constant rate of tuning, in units of the column's, where that is not constant too"""

    def _phases(self, budget: int) -> list[tuple[int, int]]:
        """Epochs before and after pruning, of each network."""
        if budget < 2 * self.members:
            raise ValueError(
                f"members: {self.members} networks need {2 * self.members} epochs or more, to be "
                f"trained and tuned; the budget is {budget}"
            )
        parts = []
        for epochs in shares(budget, self.members, "members"):
            after = min(max(1, round(self.tune * epochs)), epochs - 1)
            parts.append((epochs - after, after))
        return parts

    def epochs(self, budget: int) -> int:
        return sum(map(sum, self._phases(budget)))

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        constant = bench.training.schedule == "constant"

        def level(step: int, steps: int) -> float:
            return self.rate * bench.training.lr

        networks, kept = [], []
        for i, (before, after) in enumerate(self._phases(bench.budget)):
            model = self.network(bench.build, derive(bench.seed, "weights", i)).to(bench.device)
            seed = derive(bench.seed, "fit", i)
            yield from bench.fit(model, of(bench.training, before), seed=seed)
            shapes = masks.maskable(model, classifier=True)
            parameters = dict(model.named_parameters())
            chosen = masks.magnitude(parameters, shapes, self.density, scope=self.scope)
            if empty := masks.empty_layers(chosen):
                raise ValueError(
                    f"density: at {self.density:g} nothing is left of {', '.join(empty)}; use more "
                    "or scope: local"
                )
            topology = Fixed(parameters, chosen)
            topology.after_step()  # pruned before the first step
            parts = {name: float(mask.double().mean()) for name, mask in chosen.items()}
            density = {name: part for name, part in parts.items() if part < 1}
            yield from bench.fit(
                model,
                of(bench.training, after),
                seed=derive(bench.seed, "tune", i),
                topology=topology,
                rate=None if constant else level,
                density=density,
            )
            networks.append(model)
            kept.append(density)
        return Trained(networks=networks, kept=kept)
