"""The `nn.Module` that a user keeps: many networks that answer together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ray_subnets.answers import Opinions, Prediction
from ray_subnets.batched import Batched, Unlike, faster
from ray_subnets.combining import Running, combine
from ray_subnets.data import Preprocess
from ray_subnets.exporting import TOLERANCE, Exported, export
from ray_subnets.inputs import WHOLE, is_whole
from ray_subnets.metrics import scaled, temperature_of
from ray_subnets.regression import columns


class Members(nn.Module):
    """Members that are made when they are asked and dropped after: one at a time in memory.

    Args:
        make: number of a member -> the network, on the CPU.
        numbers: of those that are here.
    """

    def __init__(self, make: Callable[[int], nn.Module], numbers: Sequence[int]) -> None:
        super().__init__()
        self._make, self._numbers = make, tuple(numbers)
        self.register_buffer("_here", torch.empty(0), persistent=False)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> nn.Module:
        network = self._make(self._numbers[index]).to(self.get_buffer("_here").device)
        return network.eval().requires_grad_(False)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int]) -> Members:
        """Some of them."""
        return Members(self._make, [self._numbers[index] for index in indices])


class Origin(Protocol):
    """Where an ensemble came from: it can be written from there."""

    def save(self, folder: Any, ids: Sequence[str], temperature: float | None) -> None:
        """Write the members `ids`, in this order, into a new folder (a path or a URI)."""


class Ensemble(nn.Module):
    """Networks that answer together; one of them may be several members.

    Call it with network inputs `(N, *shape)`: floating point or whole numbers as the networks were
    trained on, or uint8 images, which are scaled and normalised as in training. It returns
    probabilities `(N, C)` float32.

    Attributes:
        ids: of the members, in their order.
        temperature: fitted on validation data to the members' common answer; None: not fitted.
        calibrated: are answers scaled by it? By default they are not: which class is the most
            probable stays the same, and every table of a run is without.
        batched: ask all members in one call (`ray_subnets.batched`): True, False, or None for
            whichever is faster by a fixed rule, so that equal calls give equal bits; the two ways
            can differ in the last digit. Only for members that differ in nothing but their numbers,
            as those of `load` do. It is for calls and `logits`; `predict`, `ask` and cascades ask
            one member at a time.
        head: what members' outputs are, `regression.Head`; other than `classes` for a `Regressor`.
        input_shape: of one input, `(C, H, W)` for images; None if it is not known.
        input_dtype: of what the networks see: float32, or int64 of whole numbers.
        record: what was measured when it was made (the run's `result.json`), if that is known.
    """

    def __init__(
        self,
        members: Sequence[nn.Module] | Members,
        *,
        ids: Sequence[str],
        preprocess: Preprocess,
        combine: str = "probabilities",
        weights: Sequence[float] | None = None,
        temperature: float | None = None,
        calibrated: bool = False,
        origin: Origin | None = None,
        input_shape: Sequence[int] | None = None,
        input_dtype: torch.dtype = torch.float32,
        batched: bool | None = False,
        head: str = "classes",
    ) -> None:
        super().__init__()
        assert len(members) == len(ids) > 0
        self.members = members if isinstance(members, Members) else nn.ModuleList(members)
        self.ids = tuple(ids)
        self.preprocess = preprocess
        # A vote of one is certain of everything: one network is asked what it thinks.
        self.combine = "probabilities" if combine == "vote" and len(ids) == 1 else combine
        self.weights = tuple(weights) if weights is not None else None
        self.temperature = temperature
        self.calibrated = calibrated
        self.origin = origin
        self.input_shape = tuple(input_shape) if input_shape is not None else None
        self.input_dtype = input_dtype
        self.batched = batched
        self.head = head
        self.record: dict[str, Any] | None = None
        self._together: Batched | None = None
        self._weights: int | None = None  # of one member; 0: they cannot be called together

    def __len__(self) -> int:
        return len(self.members)

    def seen(self, x: Any) -> Tensor:
        """Inputs as a tensor `(N, *shape)`: of an array too, and of grey images without a channel.

        Raises:
            ValueError: they are of another shape or type than the networks take.
        """
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if not isinstance(x, Tensor):
            if not hasattr(x, "split"):
                raise ValueError(f"x: must be a tensor or an array, not {type(x).__name__}")
            return x  # something that is read in parts, with shapes checked before
        shape = self.input_shape
        if shape is not None and tuple(x.shape[1:]) != shape:
            if (1, *x.shape[1:]) != shape:
                raise ValueError(
                    f"x: inputs are (N, {', '.join(map(str, shape))}), not {tuple(x.shape)}"
                )
            x = x[:, None]
        if x.dtype == torch.uint8 and not self.preprocess.mean and self.input_shape is not None:
            raise ValueError("x: these are uint8 images, and the ensemble was not made of images")
        takes_whole = not self.input_dtype.is_floating_point
        if shape is not None and (takes_whole != is_whole(x) or x.dtype == torch.bool):
            kind = "whole numbers" if takes_whole else "floating point, or uint8 images"
            raise ValueError(f"x: inputs are {kind}, not {x.dtype}")
        return x

    def labelled(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Inputs and labels `(N,)`, checked, labels on the CPU.

        Raises:
            ValueError: there are none, they do not fit together, or labels are no integers.
        """
        x, y = self.seen(x), torch.as_tensor(y).cpu()
        if y.is_floating_point() or y.dim() != 1 or len(y) != len(x) or not len(y):
            raise ValueError(
                f"y: must be integer labels (N,) of the {len(x)} inputs, one or more; not "
                f"{tuple(y.shape)} of {y.dtype}"
            )
        return x, y.long()

    def logits(self, x: Tensor) -> Tensor:
        """Every member's logits, `(K, N, C)`."""
        x = self.preprocess(self.seen(x))
        if self.batched is not False and (together := self._batch(len(x))):
            try:
                answer = together(x)
                return answer if answer.dim() == 3 else answer[..., None]
            except Unlike as error:
                self._apart(error)
        answers = [columns(member(x)) for member in self.members]
        return torch.cat([one if one.dim() == 3 else one[None] for one in answers])

    def _batch(self, samples: int) -> Batched | None:
        """All members in one call, if that is wanted and possible."""
        if isinstance(self.members, Members):
            if self.batched:
                raise ValueError(
                    "batched: members made on demand are asked one by one; leave it out"
                )
            return None
        if self.batched is None:
            if self._weights is None:
                self._weights = sum(p.numel() for p in self.members[0].parameters())
            if not self._weights or not faster(self.device, self._weights, samples):
                return None
        if self.training or any(p.requires_grad for p in self.members[0].parameters()):
            return None
        if self._together is None or not self._together.current(self.members):
            self._together = None
            try:
                self._together = Batched(list(self.members))
            except Unlike as error:
                self._apart(error)
        return self._together

    def choose_batched(self, x: Tensor, rounds: int = 5) -> dict[str, float]:
        """Set `batched` by the clock: what is faster on this machine for inputs like `x`.

        The fixed rule knows a few networks on one machine; large ones may be up to a fifth
        faster the other way, and it never asks in one call on a GPU.

        Args:
            x: inputs as for a call, on the ensemble's device.
            rounds: how often each way is timed, in turn.

        Returns:
            Median seconds of `one call` and `loop`; of the latter alone if members cannot be
            called together.
        """
        ways = {"one call": True, "loop": False}
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for turn in range(rounds + 1):
                for name, self.batched in list(ways.items()):
                    began = time.perf_counter()
                    try:
                        self.logits(x)
                    except ValueError:
                        del ways[name], times[name]
                        continue
                    if x.is_cuda:
                        torch.cuda.synchronize(x.device)
                    if turn:  # the first one puts things side by side
                        times[name].append(time.perf_counter() - began)
        found = {name: statistics.median(seconds) for name, seconds in times.items()}
        self.batched = ways[min(found, key=lambda name: found[name])]
        return found

    def _apart(self, error: Unlike) -> None:
        """They have to be asked one by one: an error only if something else was asked for."""
        if self.batched:
            raise ValueError(f"batched: {error}; leave it out") from None
        self._weights = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(combine(self.logits(x), self.combine, self.weights)).float()

    def answer(self, probabilities: Tensor) -> Tensor:
        """The members' common `(N, C)`, scaled by the temperature if `calibrated`.

        Raises:
            ValueError: no temperature was fitted.
        """
        if not self.calibrated:
            return probabilities
        if self.temperature is None:
            raise ValueError("calibrated: no temperature was fitted; use ensemble.calibrate(x, y)")
        return scaled(probabilities, self.temperature)

    @torch.no_grad()
    def predict(self, x: Tensor, batch_size: int = 500) -> Prediction:
        """What the members say of many samples, and how much they differ; on the CPU.

        Members are asked one after the other, so of all their logits one member's are in memory.

        Args:
            x: `(N, *shape)`, as for a call, on any device.

        Example:
            >>> said = ensemble.predict(images)  # doctest: +SKIP
            >>> said.probabilities.argmax(1), said.mutual_information  # doctest: +SKIP
        """
        together, opinions = Running(self.combine), Opinions()
        for i, answers in enumerate(self.each(x, batch_size)):
            for one in answers:
                together.add(one, self.weights[i] if self.weights else 1.0)
                opinions.add(one)
        return opinions.prediction(self.answer(together.value()))

    @torch.no_grad()
    def ask(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Every member's logits for many samples, `(K, N, C)` on the CPU."""
        return torch.cat(list(self.each(x, batch_size)))

    @torch.no_grad()
    def each(self, x: Tensor, batch_size: int = 500) -> Iterator[Tensor]:
        """One member's logits after the other's, `(1, N, C)` on the CPU; more of a network that is
        several members."""
        device, x = self.device, self.seen(x)
        for member in self.members:
            parts = [member(self.preprocess(p.to(device))).cpu() for p in x.split(batch_size)]
            logits = torch.cat([columns(part) for part in parts], dim=-2)
            yield logits if logits.dim() == 3 else logits[None]

    @property
    def device(self) -> torch.device:
        """Where the members are, or will be."""
        if isinstance(self.members, Members):
            return self.members.get_buffer("_here").device
        tensors = chain(self.members.parameters(), self.members.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def calibrate(self, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
        """Fit the temperature on validation data, `(N, *shape)` and `(N,)`; returns it.

        From then on answers are scaled by it, see `calibrated`.
        """
        x, y = self.labelled(x, y)
        self.calibrated = False
        plain = self.predict(x, batch_size).probabilities
        if int(y.min()) < 0 or int(y.max()) >= plain.shape[1]:
            raise ValueError(f"y: labels must be from 0 to {plain.shape[1] - 1}")
        self.temperature = temperature_of(plain, y)
        self.calibrated = True
        return self.temperature

    def take(self, ids: Sequence[str]) -> Ensemble:
        """An ensemble of these members, which it shares, in this order; no temperature is known.

        Raises:
            ValueError: there is no such member, or one is named twice.
        """
        for id in ids:
            if id not in self.ids:
                raise ValueError(f"ids: no member {id!r}; there are {', '.join(self.ids)}")
        if not ids or len(set(ids)) < len(ids):
            raise ValueError("ids: name each member once, and at least one")
        places = [self.ids.index(id) for id in ids]
        chosen: Members | list[nn.Module]
        if isinstance(self.members, Members):
            chosen = self.members.take(places)
        else:
            chosen = [self.members[place] for place in places]
        return (
            type(self)(
                chosen,
                ids=ids,
                preprocess=self.preprocess,
                combine=self.combine,
                weights=[self.weights[place] for place in places] if self.weights else None,
                origin=self.origin,
                input_shape=self.input_shape,
                input_dtype=self.input_dtype,
                batched=self.batched,
                head=self.head,
            )
            .to(self.device)
            .eval()
        )

    def save(self, folder: Any) -> None:
        """Write it into a new folder that `load` reads, wherever it is moved to.

        Safetensors and JSON: the parent's weights if a recipe needs them, what tuning changed, and
        the recipes. The temperature goes with it.

        Args:
            folder: a path, or a URI like `s3://bucket/models/a`.

        Raises:
            ValueError: the folder is in use, or what the ensemble was made from is gone.
        """
        if self.origin is None:
            raise ValueError("save: only an ensemble that was loaded, or made of a run, is saved")
        self.origin.save(folder, self.ids, self.temperature)

    def export(
        self,
        path: Any,
        x: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        tolerance: float = TOLERANCE,
    ) -> Exported:
        """Write all members and how they are combined as one file, which runs without this package.

        The file takes a batch of any size and gives probabilities, as a call does: scaled by the
        temperature if `calibrated`. It is read back and compared before it is written.

        Args:
            path: ends in `.pt2` (for `torch.export.load`) or `.onnx` (for ONNX Runtime and others;
                `pip install 'ray_subnets[export]'`).
            x: inputs to compare on, beside random ones; their type is what the file takes.
            dtype: what the file takes: `torch.uint8` images, which it normalises itself, or
                network inputs, `torch.float32` or `torch.int64` as the networks see. Default: what
                the networks were trained on.
            tolerance: largest difference of a probability that is allowed.

        Raises:
            ValueError: it cannot be exported, in one line that says why; or answers differ.

        Example:
            >>> ensemble.export("ensemble.pt2").difference  # doctest: +SKIP
            >>> network = torch.export.load("ensemble.pt2").module()  # doctest: +SKIP
            >>> network(images)  # doctest: +SKIP
        """
        if x is not None:
            shape, dtype = tuple(x.shape[1:]), dtype or x.dtype
        elif self.input_shape is None:
            raise ValueError("export: give inputs x; what networks made by hand take is not known")
        else:
            shape = self.input_shape
        seen = self.input_dtype
        if x is not None and self.input_shape is None and is_whole(x):
            seen = WHOLE  # networks made by hand: what they take was not known
        dtype = dtype or (torch.uint8 if self.preprocess.mean else seen)
        if dtype not in (torch.uint8, seen):
            raise ValueError(f"export: inputs are torch.uint8 or {seen}, not {dtype}")
        if x is not None and x.dtype != dtype:
            raise ValueError(f"export: x is {x.dtype} and dtype says {dtype}")
        if dtype == torch.uint8 and not self.preprocess.mean:
            raise ValueError(f"export: it was not made of images; dtype={seen}")
        if self.calibrated:
            self.answer(torch.full((1, 2), 0.5))  # is there a temperature?
        whole = type(self)(
            list(self.members),
            ids=self.ids,
            preprocess=self.preprocess,
            combine=self.combine,
            weights=self.weights,
            temperature=self.temperature,
            calibrated=self.calibrated,
            head=self.head,
        )
        about = {
            "members": list(self.ids),
            "head": self.head,
            "combine": self.combine,
            "temperature": self.temperature if self.calibrated else None,
            "input": [str(dtype).removeprefix("torch."), *shape],
        }
        return export(whole, shape, dtype, path, x=x, tolerance=tolerance, about=about)
