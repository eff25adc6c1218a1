"""Cheaper answers: fewer members, and a cascade that stops asking once the answer is settled.

Members are asked one after the other. After k of them a sample is done when the most probable class
of their mean leads the next one by `threshold`, or by so much that the members that are left could
not change it: then the cascade names the class of the whole ensemble for certain. Samples that are
done are not asked again, so most cost one or two passes.

Shape legend: K members, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ray_subnets import configfile, members, metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.combining import Running, combine, greedy, right_class
from ray_subnets.ensembles import Ensemble
from ray_subnets.groups import Section
from ray_subnets.recipes import NonNegative, Positive
from ray_subnets.regression import classifiers_only

CASCADE = "cascade.json"
NEVER = 2.0
"""a threshold above every lead: only what is certain is settled"""
THRESHOLDS = (*(i / 50 for i in range(1, 50)), 0.99, 0.995, 0.998, 0.999, 0.9999, NEVER)
"""that `Cascade.fit` tries"""
By = Literal["agreement", "accuracy"]


@dataclass(frozen=True)
class Point:
    """What a cascade gives at one threshold."""

    threshold: float
    passes: float
    """members asked, mean over samples"""
    share: float
    """`passes` by the number of members: 1 is the whole ensemble"""
    accuracy: float
    agreement: float
    """fraction of samples for which it names the class of the whole ensemble"""
    nll: float
    """nats"""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def lead(probabilities: Tensor) -> Tensor:
    """How far the most probable class is ahead of the next one, `(N, C)` -> `(N,)`."""
    top = probabilities.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def settled(probabilities: Tensor, asked: int, members: int, threshold: float) -> Tensor:
    """Which samples are done, `(N,)` bool, by the mean `(N, C)` of the first `asked` members.

    Each member that is left moves the sum of the lead by 1 at most.
    """
    ahead = lead(probabilities)
    return (ahead >= threshold) | (ahead * asked > members - asked)


def replay(logits: Tensor, threshold: float, how: str = "probabilities") -> tuple[Tensor, Tensor]:
    """A cascade of members whose answers are known: probabilities `(N, C)`, members asked `(N,)`.

    Args:
        logits: `(K, N, C)` in the order in which members are asked.
    """
    return _replay(_means(logits, how), threshold)


def _means(logits: Tensor, how: str) -> list[Tensor]:
    """The common answer `(N, C)` of the first member, of the first two, and so on."""
    running, means = Running(how), []
    for one in logits:
        running.add(one)
        means.append(running.value())
    return means


def _replay(means: Sequence[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    answer = torch.zeros_like(means[0])
    asked = torch.zeros(len(answer), dtype=torch.int64)
    for k, mean in enumerate(means, start=1):
        done = (asked == 0) & (settled(mean, k, len(means), threshold) | (k == len(means)))
        answer[done], asked[done] = mean[done], k
    return answer, asked


def curve(
    logits: Tensor,
    labels: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    how: str = "probabilities",
) -> list[Point]:
    """Accuracy against cost, from saved outputs.

    Args:
        logits: `(K, N, C)` in the order in which members are asked.
        labels: `(N,)`.
    """
    means = _means(logits, how)
    whole = means[-1].argmax(1)
    points = []
    for threshold in sorted(thresholds):
        p, asked = _replay(means, threshold)
        passes = float(asked.double().mean())
        points.append(
            Point(
                threshold=threshold,
                passes=passes,
                share=passes / len(logits),
                accuracy=metrics.accuracy(p, labels),
                agreement=float((p.argmax(1) == whole).double().mean()),
                nll=metrics.nll(p, labels),
            )
        )
    return points


def cheapest(points: Sequence[Point], least: float, by: By = "accuracy") -> Point:
    """The point of fewest passes from which on all dearer ones reach `least`.

    From which on: on few samples a cheap point may reach it by luck.
    """
    best = points[-1]
    for point in reversed(sorted(points, key=lambda point: point.passes)):
        if getattr(point, by) < least:
            break
        best = point
    return best


def choose(ensemble: Ensemble, x: Tensor, y: Tensor, count: int, batch_size: int = 500) -> Ensemble:
    """The `count` members that together have the best NLL on validation data, one at a time.

    Args:
        x, y: inputs `(N, *shape)` and labels `(N,)`.
        count: the budget of passes.

    Raises:
        ValueError: there are not so many members.
    """
    classifiers_only(ensemble.head, "choose")
    if not 1 <= count <= len(ensemble.ids):
        raise ValueError(f"count: {count} of {len(ensemble.ids)} members; choose fewer")
    logits = ensemble.ask(x, batch_size)
    return ensemble.take([ensemble.ids[i] for i in _order(logits, y.cpu(), count)])


def _order(logits: Tensor, labels: Tensor, count: int) -> list[int]:
    right = torch.stack([right_class(one, labels) for one in logits])
    return [index for index, _ in greedy(right, count)]


class Settings(Section):
    """`cascade.json`."""

    format: Literal[1] = 1
    threshold: NonNegative
    temperature: Positive | None = None
    validation: dict[str, float] | None = None
    """the point of the curve that it was chosen at, on validation data"""


class Cascade(nn.Module):
    """An ensemble that asks its members in their order, and no more of them than it needs.

    Call it as the ensemble; it returns probabilities `(N, C)` float32, for each sample the mean of
    the members that were asked. `asked` tells how many those were in the last call.

    Attributes:
        threshold: lead of the most probable class from which on a sample is done.
        temperature: fitted on validation data to the cascade's own answers.
        calibrated: are answers scaled by it? By default not, as in `Ensemble`.
        point: what it gave on validation data when it was fitted.

    Raises:
        ValueError: members are not combined by their mean or by vote, or are for regression.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        threshold: float,
        *,
        temperature: float | None = None,
        calibrated: bool = False,
    ) -> None:
        super().__init__()
        classifiers_only(ensemble.head, "cascade")
        if ensemble.combine not in ("probabilities", "vote"):
            raise ValueError(
                f"combine: a cascade is for members that are combined by probabilities or vote, "
                f"not by {ensemble.combine}"
            )
        if len(ensemble.ids) != len(ensemble.members):
            raise ValueError("ensemble: its members are one network and cannot be asked apart")
        self.ensemble, self.threshold = ensemble, threshold
        self.temperature, self.calibrated = temperature, calibrated
        self.point: Point | None = None
        self.asked = torch.zeros(0, dtype=torch.int64)

    @staticmethod
    def fit(
        ensemble: Ensemble,
        x: Tensor,
        y: Tensor,
        *,
        keep: float = 0.999,
        by: By = "agreement",
        thresholds: Sequence[float] = THRESHOLDS,
        batch_size: int = 500,
    ) -> Cascade:
        """The cheapest cascade that keeps the whole ensemble's answers on validation data.

        Members are put in order first: the best one, then whichever helps most.

        Args:
            x, y: inputs `(N, *shape)` and labels `(N,)`; thousands of them, since one in a thousand
                is to be seen.
            keep: fraction of samples for which it names the class of the whole ensemble, or of the
                whole ensemble's accuracy.
            by: which of the two. Accuracy is cheaper, since other answers may be as often right;
                how often they are varies more from one set of samples to another.

        Raises:
            ValueError: see `Cascade`.
        """
        Cascade(ensemble, NEVER)
        if not 0 < keep <= 1:
            raise ValueError(f"keep: must be above 0 and at most 1, not {keep}")
        x, labels = ensemble.labelled(x, y)
        logits = ensemble.ask(x, batch_size)
        order = _order(logits, labels, len(logits))
        logits, how = logits[order], ensemble.combine
        points = curve(logits, labels, thresholds, how)
        full = metrics.accuracy(_means(logits, how)[-1], labels) if by == "accuracy" else 1.0
        point = cheapest(points, keep * full, by)
        answer, _ = replay(logits, point.threshold, how)
        ordered = ensemble.take([ensemble.ids[i] for i in order])
        temperature = metrics.temperature_of(answer, labels)
        cascade = Cascade(ordered, point.threshold, temperature=temperature)
        cascade.point = point
        return cascade.eval()

    def forward(self, x: Tensor) -> Tensor:
        ensemble, total = self.ensemble, len(self.ensemble)
        inputs = ensemble.preprocess(ensemble.seen(x))
        left = torch.arange(len(inputs), device=inputs.device)
        asked = torch.zeros(len(inputs), dtype=torch.int64)
        answer = sums = inputs.new_zeros(0, dtype=torch.float64)
        for k, member in enumerate(ensemble.members, start=1):
            new = combine(member(inputs)[None], ensemble.combine)
            if k == 1:
                answer, sums = torch.zeros_like(new), torch.zeros_like(new)
            sums = sums + new
            done = settled(sums / k, k, total, self.threshold) | (k == total)
            answer[left[done]], asked[left[done].cpu()] = sums[done] / k, k
            left, inputs, sums = left[~done], inputs[~done], sums[~done]
            if not len(left):
                break
        self.asked = asked
        if self.calibrated:
            if self.temperature is None:
                raise ValueError("calibrated: no temperature was fitted; use Cascade.fit")
            answer = metrics.scaled(answer, self.temperature)
        return answer.float()

    @torch.no_grad()
    def predict(self, x: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Probabilities `(N, C)` float32 and members asked `(N,)`, on the CPU."""
        parts, asked = [], []
        for part in self.ensemble.seen(x).split(batch_size):
            parts.append(self(part.to(self.ensemble.device)).cpu())
            asked.append(self.asked)
        return torch.cat(parts), torch.cat(asked)

    def save(self, folder: Any) -> None:
        """Write the ensemble in this order, and the threshold, into a new folder.

        Raises:
            ValueError: see `Ensemble.save`.
        """
        self.ensemble.save(folder)
        settings = Settings(
            threshold=self.threshold,
            temperature=self.temperature,
            validation=self.point.to_json() if self.point else None,
        )
        RunFolder(folder).write_json(CASCADE, settings.model_dump(mode="json"))


def load_cascade(folder: Any, *args: Any, calibrated: bool = False, **how: Any) -> Cascade:
    """What `Cascade.save` wrote; arguments as for `load`.

    Raises:
        ValueError: no such folder, or something in it is damaged.
    """
    ensemble = members.load(folder, *args, **how)
    place = RunFolder.open(folder, needs=CASCADE, saved=True)
    try:
        settings = Settings.model_validate_json(place.read(CASCADE), strict=True)
    except ValidationError as error:
        line = configfile.one_line(error, place.path(CASCADE))
        raise ValueError(f"{line}; restore it from a copy, or save it again") from None
    cascade = Cascade(
        ensemble, settings.threshold, temperature=settings.temperature, calibrated=calibrated
    )
    cascade.point = Point(**settings.validation) if settings.validation else None
    return cascade.eval()
