"""MotherNets: a small network is trained first, and members are hatched from it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from ray_subnets import masks, structured
from ray_subnets.baselines.method import Bench, Method, Progress, Trained, of, shares
from ray_subnets.recipes import Count, NonNegative, derive
from ray_subnets.units import Coupled, Kept, staying


def core_units(units: Sequence[Coupled], fraction: float) -> Kept:
    """The first units of each set, at least one: those that the core has."""
    return {
        one.name: torch.arange(one.count) < max(1, round(fraction * one.count)) for one in units
    }


def parents(units: Sequence[Coupled], kept: Kept, seed: int) -> dict[str, Tensor]:
    """Which unit of the core each unit of a member copies: `(count,)` by set; the core's own."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for one in units:
        core = int(kept[one.name].sum())
        drawn = torch.randint(core, (one.count - core,), generator=generator)
        result[one.name] = torch.cat([torch.arange(core), drawn])
    return result


def _sources(owner: Tensor, chosen: Tensor) -> Tensor:
    """For each position of a dimension the one that it copies.

    Args:
        owner: unit of each position, -1: none; a unit may have several, in the same order.
        chosen: which unit each unit copies.
    """
    source = torch.arange(len(owner))
    places = [(owner == unit).nonzero().squeeze(1) for unit in range(len(chosen))]
    for unit, copied in enumerate(chosen.tolist()):
        source[places[unit]] = places[copied]
    return source


def hatch(
    small: Mapping[str, Tensor], units: Sequence[Coupled], kept: Kept, chosen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State dict of the core -> state dict of a wide network with the same function.

    A copied unit has the weights of its original; what reads a unit and its copies reads each with
    an equal part of the weight.

    Args:
        kept: units of the wide network that the core has.
        chosen: see `parents`.
    """
    rows, columns = staying(units, kept)
    wide = {}
    for name, tensor in small.items():
        result = tensor.detach().cpu()
        for dim, stays, side in ((0, rows.get(name), "rows"), (1, columns.get(name), "columns")):
            if stays is None:
                continue
            source, share = torch.arange(len(stays)), torch.ones(len(stays))
            for one in units:
                owner = (one.rows if side == "rows" else one.columns).get(name)
                if owner is None:
                    continue
                found, mine = _sources(owner, chosen[one.name]), owner >= 0
                source[mine] = found[mine]
                if side == "columns":
                    copies = chosen[one.name].bincount(minlength=one.count)
                    share[mine] = 1 / copies[chosen[one.name][owner[mine]]].float()
            place = stays.cumsum(0) - 1  # in the core, of each position that it has
            result = result.index_select(dim, place[source])
            if side == "columns":
                result = result * share.view(-1, *[1] * (result.dim() - 2)).to(result.dtype)
        wide[name] = result
    return wide


@torch.no_grad()
def _narrow(model: nn.Module, units: Sequence[Coupled], kept: Kept) -> nn.Module:
    """The core, with initial weights as large as a layer with so few inputs has them."""
    core = structured.remove(model, units, kept)
    before = dict(model.named_parameters())
    for name, weight in core.named_parameters():
        if weight.dim() > 1:
            weight.mul_((before[name].shape[1] / weight.shape[1]) ** 0.5)
    return core


@dataclass(frozen=True, kw_only=True)
class MotherNets(Method):
    """A narrow core, trained once; members with the same function and more units, trained on.

    Published (Wasay et al. 2020): members are hatched by widening and deepening that leave the
    function as it is, with a little noise. The dissertation (Fig 5.6): a perceptron of 16 units for
    10 epochs, 16 more units, 10 epochs.
    """

    title: ClassVar[str] = "MotherNets"
    source: ClassVar[str] = "Wasay et al. 2020; sizes of Fig 5.6"
    deviation: ClassVar[str] = "members are all as wide and as deep as the run's network"
    method: Literal["mother_nets"] = "mother_nets"
    members: Count = 4
    """networks"""
    width: Annotated[float, Gt(0), Lt(1)] = 0.5
    """units of the core, of those of the network"""
    core: Annotated[float, Gt(0), Lt(1)] = 0.5
    """fraction of the budget for the core"""
    noise: NonNegative = 0.01
    """on a hatched weight, in standard deviations of its layer: else copies stay alike"""

    def _phases(self, budget: int) -> tuple[int, list[int]]:
        if budget <= self.members:
            raise ValueError(
                f"members: {self.members} and their core need {self.members + 1} epochs or more, "
                f"the budget is {budget}"
            )
        core = min(max(1, round(self.core * budget)), budget - self.members)
        return core, shares(budget - core, self.members, "members")

    def epochs(self, budget: int) -> int:
        self._phases(budget)
        return budget

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        first, rest = self._phases(bench.budget)
        whole = self.network(bench.build, derive(bench.seed, "weights", 0))
        try:
            units = structured.coupled_units(whole, bench.data.input_shape, bench.data.input_dtype)
        except ValueError as error:
            reason = str(error).split("(", 1)[-1].rsplit(")", 1)[0]
            raise ValueError(
                f"mother_nets: this network cannot be widened ({reason}); networks fit whose units "
                "can be removed, as with structure: unit"
            ) from None
        kept = core_units(units, self.width)
        core = _narrow(whole, units, kept).to(bench.device)
        yield from bench.fit(core, of(bench.training, first), seed=derive(bench.seed, "core"))
        networks = []
        for i, epochs in enumerate(rest):
            seed = derive(bench.seed, "hatch", i)
            model = self.network(bench.build, seed)
            model.load_state_dict(hatch(core.state_dict(), units, kept, parents(units, kept, seed)))
            generator = torch.Generator().manual_seed(derive(seed, "noise"))
            weights = dict(model.named_parameters())
            for name in masks.maskable(model, classifier=True):
                weight = weights[name].detach()
                drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight += self.noise * weight.std() * drawn
            model.to(bench.device)
            seed = derive(bench.seed, "fit", i)
            yield from bench.fit(model, of(bench.training, epochs), seed=seed)
            networks.append(model)
        return Trained(networks=networks)
