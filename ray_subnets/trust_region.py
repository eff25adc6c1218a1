"""How far children's answers are from their parent's, and the sigma that takes them so far: 4.2.1.

Common random numbers: a recipe's mask and noise follow from its seed, not from its sigma, so over a
fixed set of recipes the mean divergence is a smooth function of sigma, near sigma^2 where it is
small. A few secant steps in log sigma and log KL find the sigma of a target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import supervised
from ray_subnets.data import Batches, Data, some
from ray_subnets.recipes import ChildSpec, Result, Solve, SolveResult, derive
from ray_subnets.spawning import Anatomy, anatomy, spawn_weights

Weights = Mapping[str, Tensor]
Answers = Callable[[Weights], Tensor]
"""weights of a whole network -> its logits on the hold-out set, `(N, C)` on the CPU"""

TOLERANCE = 0.02  # of the target
LAYER_TOLERANCE = 0.1  # of a layer's share; the common factor mends the sum
EVALUATIONS = 40  # at most, for one sigma
REACH = math.log(1e8)  # how far from the start sigma is looked for


@dataclass(frozen=True)
class Divergence:
    """Of children from their parent on a hold-out set, over draws of mask and noise."""

    kl: float
    """KL(parent || child) in nats, mean over samples and draws (eq. 4.5)"""
    kl_std: float
    """standard deviation over draws; 0 for a single one"""
    mse: float
    """squared distance of the probabilities, summed over classes, mean as above (eq. 4.4)"""
    mse_std: float
    draws: int


@dataclass(frozen=True)
class Solution:
    """The noise that meets a target."""

    sigma: float
    """for all weights, or the factor of `sigmas`"""
    sigmas: tuple[float, ...]
    """of each masked tensor in the network's order; empty: `sigma` for all"""
    divergence: Divergence
    passes: int
    """times that a network answered the whole hold-out set, the parent's included"""


def divergence(parent: Tensor, child: Tensor) -> tuple[float, float]:
    """KL (eq. 4.5) and MSE (eq. 4.4) of a child from its parent; infinite if it is not finite.

    Args:
        parent: log-probabilities `(N, C)`, float64.
        child: logits `(N, C)`.
    """
    if not child.isfinite().all():
        return math.inf, math.inf
    own, p = child.double().log_softmax(1), parent.exp()
    kl = torch.where(p > 0, p * (parent - own), 0.0).sum(1).mean()
    return max(0.0, float(kl)), float((p - own.exp()).square().sum(1).mean())


class Probe:
    """Measures children of one parent; the parent's own answers are computed once.

    Args:
        parent: its state dict, on the CPU.
        answers: see `Answers`.

    Raises:
        ValueError: the parent's answers are not finite.
    """

    def __init__(self, parent: Weights, body: Anatomy, answers: Answers) -> None:
        self._parent, self._body, self._answers = parent, body, answers
        logits = answers(parent)
        self.passes = 1
        if not logits.isfinite().all():
            raise ValueError(
                "parent: it gives NaN or infinite outputs on the hold-out set; no noise brings a "
                "child near it"
            )
        self.reference = logits.double().log_softmax(1)

    @property
    def layers(self) -> list[str]:
        """Names of the tensors that noise may be added to."""
        return list(self._body.shapes)

    @property
    def spread(self) -> float:
        """Standard deviation of the weights that noise may be added to."""
        total = sum(self._parent[name].numel() for name in self.layers)
        squares = sum(float(self._parent[name].double().square().sum()) for name in self.layers)
        return math.sqrt(squares / total) if total else 0.0

    def measure(self, specs: Sequence[ChildSpec]) -> Divergence:
        """Mean and spread over the children of these recipes, a pass for each."""
        kls, mses = [], []
        for spec in specs:
            child = spawn_weights(self._parent, self._body, spec)
            self.passes += 1
            kl, mse = divergence(self.reference, self._answers(child.weights))
            kls.append(kl)
            mses.append(mse)
        return summary(kls, mses)


def summary(kls: Sequence[float], mses: Sequence[float]) -> Divergence:
    """Mean and spread of what was measured, a value for each draw."""

    def both(values: Sequence[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        if len(values) < 2 or not math.isfinite(mean):
            return mean, 0.0
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    return Divergence(*both(kls), *both(mses), draws=len(kls))


def check_target(target: float, classes: int) -> None:
    """Can a trust region be that wide?

    Raises:
        ValueError: it is not above 0, or wider than to a network that guesses.
    """
    if not target > 0:
        raise ValueError(f"kl_target: must be above 0 nats, not {target:g}")
    if not target <= math.log(classes):
        raise ValueError(
            f"kl_target: {target:g} nats is out of reach; a child that guesses among {classes} "
            f"classes is at most {math.log(classes):.2f} away; 0.02 to 0.05 is usual"
        )


def find(
    kl_of: Callable[[float], float],
    target: float,
    start: float,
    *,
    tolerance: float = TOLERANCE,
    what: str = "",
) -> float:
    """The sigma whose KL is `target`, within `tolerance` of it.

    Secant steps on log KL against log sigma, with the slope 2 of small noise at first, kept inside
    the bracket; a step that does not halve the error is followed by a bisection.

    Args:
        kl_of: KL at a sigma; infinite where outputs overflow. Called with six-digit numbers.
        what: whose KL, for messages.

    Raises:
        ValueError: no sigma within a factor 1e8 of `start` does it.
    """
    low, high = -math.inf, math.inf  # log sigma of the nearest points below and above
    known: list[tuple[float, float]] = []  # (log sigma, log(KL / target)), best last
    x, stalls, largest = math.log(start), 0, 0.0
    for _ in range(EVALUATIONS):
        sigma = float(f"{math.exp(x):.6g}")
        kl = kl_of(sigma)
        if abs(kl / target - 1) <= tolerance:
            return sigma
        x = math.log(sigma)
        y = math.log(kl / target) if 0 < kl < math.inf else math.copysign(math.inf, kl - target)
        low, high = (max(low, x), high) if y < 0 else (low, min(high, x))
        if y < 0:
            largest = max(largest, kl)
        stalls = stalls + 1 if known and abs(y) > 0.5 * abs(known[-1][1]) else 0
        known = sorted([*known, (x, y)], key=lambda point: -abs(point[1]))[-3:]
        x = _next(known, low, high, stalls, x)
        if abs(x - math.log(start)) > REACH or high - low < 1e-5:
            break
    name = f"{what}: " if what else ""
    if math.isinf(high):
        raise ValueError(
            f"kl_target: {name}{target:g} nats is not reached; the KL divergence is at most "
            f"{largest:.3g} up to sigma {math.exp(low):.3g}; use a smaller target or a larger "
            "density"
        )
    if math.isinf(low):
        raise ValueError(
            f"kl_target: {name}{target:g} nats is not reached; the KL divergence is larger down to "
            f"sigma {math.exp(high):.3g}; use a larger target, or mean: 0"
        )
    raise ValueError(
        f"kl_target: {name}no sigma gives {target:g} nats; the KL divergence jumps between sigma "
        f"{math.exp(low):.4g} and {math.exp(high):.4g}"
    )


def _next(
    known: Sequence[tuple[float, float]], low: float, high: float, stalls: int, last: float
) -> float:
    """Where to look next, in log sigma; `known` has the best point last."""
    inside = math.isfinite(low) and math.isfinite(high)
    if inside and stalls:
        return (low + high) / 2
    x, y = known[-1]
    if math.isinf(y):
        guess = x - math.copysign(math.log(100), y)
    else:
        slope = 2.0  # KL ~ sigma^2
        if len(known) > 1 and math.isfinite(known[-2][1]) and known[-2][0] != x:
            slope = (y - known[-2][1]) / (x - known[-2][0])
        guess = x - y / min(max(slope, 1.0), 6.0)
    if inside:
        return guess if low < guess < high else (low + high) / 2
    # Nothing on the other side yet: go on from the last point, farther each time that helps little.
    step = min(max(abs(guess - x), 0.02), math.log(1000)) * 2**stalls
    return (low if math.isinf(high) else high) + math.copysign(step, -1 if math.isinf(low) else 1)


def solve(
    probe: Probe,
    specs: Sequence[ChildSpec],
    target: float,
    *,
    per_layer: bool = False,
    start: float | None = None,
) -> Solution:
    """The noise with which these recipes' children have a mean KL of `target`, to 2 % of it.

    Per layer: every layer, perturbed alone, gets an equal share of the target (a quarter of the
    recipes, to a tenth of the share); independent small perturbations add up in KL, and one common
    factor is then solved for so that all layers together meet the target. Section 4.2.1 has one
    sigma for all layers.

    Args:
        specs: the draws; their sigma is not read.
        start: where to look first; default a tenth of the weights' spread. With `relative`
            recipes sigma is in units of each tensor's spread.

    Raises:
        ValueError: the target cannot be met.
    """
    check_target(target, probe.reference.shape[1])
    before = probe.passes - 1  # the parent's own pass counts
    last: dict[float, Divergence] = {}
    if start is None:
        start = 0.1 if specs[0].relative else 0.1 * probe.spread
    if not 0 < start < math.inf:
        raise ValueError("kl_target: the weights that noise would be added to are all zero or NaN")

    def measure(sigma: float) -> float:
        sized = [replace(spec, sigma=sigma, sigmas=scaled(sigma)) for spec in specs]
        last[sigma] = probe.measure(sized)
        return last[sigma].kl

    def scaled(factor: float) -> tuple[float, ...]:
        return tuple(float(f"{factor * one:.6g}") for one in shares)

    shares = _layer_shares(probe, specs, target, start) if per_layer else ()
    sigma = find(measure, target, 1.0 if per_layer else start)
    return Solution(sigma, scaled(sigma), last[sigma], probe.passes - before)


def _layer_shares(
    probe: Probe, specs: Sequence[ChildSpec], target: float, start: float
) -> tuple[float, ...]:
    """For each layer the sigma that gives an equal share of the target when it acts alone."""
    layers, some = probe.layers, specs[: max(1, len(specs) // 4)]
    shares: list[float] = []

    for index, name in enumerate(layers):

        def alone(sigma: float, index: int = index) -> float:
            sigmas = tuple(sigma if i == index else 0.0 for i in range(len(layers)))
            return probe.measure([replace(spec, sigma=1.0, sigmas=sigmas) for spec in some]).kl

        share = target / len(layers)
        shares.append(find(alone, share, start, tolerance=LAYER_TOLERANCE, what=name))
        start = shares[-1]
    return tuple(shares)


def search(
    job: Solve,
    parent: Weights,
    body: Anatomy,
    model: nn.Module,
    data: Data,
    norm: Batches | None = None,
) -> SolveResult:
    """The result of a job, without its timing, on validation data.

    Args:
        model: a network as the parent is, on the data's device; it is written over.
        norm: batches for the batch-norm statistics of each child, if it gets its own.

    Raises:
        ValueError: the target cannot be met; the message names the group.
    """
    images = data.validation.images[some(data.validation.labels.cpu(), job.samples)]

    def answers(weights: Weights) -> Tensor:
        model.load_state_dict(dict(weights))
        if norm is not None and weights is not parent:
            supervised.recompute_norm(model, norm)
        return supervised.predict(model, images, data.preprocess)

    try:
        probe = Probe(parent, body, answers)
        found = solve(probe, job.draws, job.kl_target, per_layer=job.per_layer)
    except ValueError as error:
        raise ValueError(f"{job.draws[0].label}: {error}") from None
    return SolveResult(
        id=job.id,
        sigma=found.sigma,
        sigmas=found.sigmas,
        divergence=asdict(found.divergence),
        passes=found.passes,
    )


def described(job: Solve, found: Result, available: int) -> dict[str, Any]:
    """For `result.json`: the noise that was solved for, and how well it meets its target.

    Args:
        available: validation samples that there are.
    """
    assert isinstance(found, SolveResult)
    return {
        "group": job.draws[0].label,
        "kl_target": job.kl_target,
        "sigma": found.sigma,
        "sigmas": list(found.sigmas),
        **found.divergence,
        "samples": min(job.samples, available),
        "passes": found.passes,
        "seconds": found.seconds,
    }


def solve_sigma(
    parent: nn.Module,
    spec: ChildSpec,
    inputs: Tensor,
    kl_target: float,
    *,
    draws: int = 8,
    per_layer: bool = False,
    start: float | None = None,
    batch_size: int = 500,
) -> ChildSpec:
    """The recipe `spec` with the sigma whose children are `kl_target` nats from `parent`.

    Args:
        spec: a noisy recipe; its sigma is not read.
        inputs: network inputs `(N, *shape)` of a hold-out set, where the parent lies.
        draws: seeds over which KL is averaged.

    Raises:
        ValueError: the target cannot be met.

    Example:
        >>> parent = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(),
        ...                              torch.nn.Linear(8, 3))
        >>> spec = ChildSpec(id="a", method="noisy", seed=1, density=1.0, draw="bernoulli")
        >>> solve_sigma(parent, spec, torch.randn(64, 4), 0.02).sigma > 0
        True
    """
    body = anatomy(parent, spec, tuple(inputs.shape[1:]))
    model = copy.deepcopy(parent).eval()

    @torch.no_grad()
    def answers(weights: Weights) -> Tensor:
        model.load_state_dict(dict(weights))
        return torch.cat([model(part).float().cpu() for part in inputs.split(batch_size)])

    weights = {name: tensor.detach().cpu() for name, tensor in parent.state_dict().items()}
    specs = [spec, *(replace(spec, seed=derive(spec.seed, "draw", i)) for i in range(1, draws))]
    found = solve(Probe(weights, body, answers), specs, kl_target, per_layer=per_layer, start=start)
    return replace(spec, sigma=found.sigma, sigmas=found.sigmas, kl_target=kl_target)
