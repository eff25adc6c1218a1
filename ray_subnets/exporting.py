"""A network as one file that runs without this package: torch.export's `.pt2`, or ONNX.

The graph takes a batch of any size. Before the file is written it is read back and run on batches
of several sizes beside the network it was made of; answers that differ are an error, and no file.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import storage
from ray_subnets.inputs import made_up

TOLERANCE = 1e-5
"""largest difference of a probability that is still called equal"""
ABOUT = "ray_subnets.json"
"""what a `.pt2` file says about itself: `torch.export.load(..., extra_files={ABOUT: ""})`"""
INPUTS, OUTPUTS = "inputs", "probabilities"
"""names in an ONNX file"""
_TRACED = 3  # samples; not 1, which torch would take for a constant
_CHECKED = (1, 2, 5)
_PROTOBUF = 2**31  # bytes that one ONNX file can have

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how well it repeats its network."""

    path: str
    bytes: int
    difference: float
    """largest difference of a probability that was seen"""
    samples: int
    """inputs on which it was looked for"""

    def sentence(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1e6:.1f} MB; on {self.samples} inputs its probabilities "
            f"differ from the ensemble's by {self.difference:.1e} at most"
        )


def export(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    path: Any,
    *,
    x: Tensor | None = None,
    tolerance: float = TOLERANCE,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write `model` to `path`, over a file that is there, once the new one is known to be right.

    Args:
        model: `(N, *shape)` of `dtype` -> probabilities `(N, C)`, on any device; it is not changed.
        path: ends in `.pt2` or `.onnx`; a path or a URI.
        x: more inputs to check on.
        tolerance: difference of a probability that is allowed.
        about: JSON that goes into the file.

    Raises:
        ValueError: one line: the ending is unknown, a package is missing, the network cannot be
            traced or translated, or its file gives other answers.
    """
    name = PurePosixPath(str(path).replace("\\", "/").partition("?")[0]).name
    kind = PurePosixPath(name).suffix
    if kind not in _FORMATS:
        raise ValueError(f"export: {path} must end in .pt2 (torch.export) or .onnx")
    if kind == ".onnx":
        _check_onnx(model)
    model = _plain(model)
    batches = _batches(shape, dtype, x)
    with torch.no_grad(), _quiet():
        wanted = [_asked("network", model, batch) for batch in batches]
        first = torch.cat([batches[0], batches[1]])[:_TRACED]
        try:
            program = torch.export.export(
                model, (first,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        except Exception as error:  # torch has many kinds, and a stranger's forward any
            raise ValueError(
                f"export: torch.export cannot follow the network: {_line(error)}"
            ) from None
        content, run = _FORMATS[kind](program, first, json.dumps(dict(about or {})))
        difference = 0.0
        for batch, answer in zip(batches, wanted, strict=True):
            said = _asked(f"{kind} file", run, batch)
            if said.shape != answer.shape:
                raise ValueError(
                    f"export: the {kind} file gives {tuple(said.shape)} for {len(batch)} inputs, "
                    f"not {tuple(answer.shape)}"
                )
            difference = max(difference, float((said.double() - answer.double()).abs().max()))
    if not difference <= tolerance:
        raise ValueError(
            f"export: the {kind} file differs from the network by {difference:.1e}, more than the "
            f"tolerance of {tolerance:.1e}; no file was written"
        )
    folder = str(path)[: str(path).rindex(name)] or "."
    try:
        storage.place(folder).write(name, content)
    except OSError as error:
        raise ValueError(f"export: {path} cannot be written: {storage.reason(error)}") from None
    return Exported(str(path), len(content), difference, sum(map(len, batches)))


def _asked(what: str, run: Run, batch: Tensor) -> Tensor:
    try:
        return run(batch)
    except Exception as error:  # whatever a stranger's forward raises, or a runtime
        raise ValueError(
            f"export: the {what} does not take {len(batch)} inputs: {_line(error)}"
        ) from None


def _check_onnx(model: nn.Module) -> None:
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"export: an .onnx file needs the package {' and '.join(missing)}: "
            "pip install 'ray_subnets[export]'"
        )
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if size >= _PROTOBUF:
        raise ValueError(
            f"export: {size / 1e9:.1f} GB of weights; one .onnx file holds 2 GB; export to .pt2, "
            "or fewer members: ensemble.take(ids)"
        )


def _plain(model: nn.Module) -> nn.Module:
    """A copy on the CPU, tensors in torch's usual order: other layouts are not kept in files."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def _batches(shape: tuple[int, ...], dtype: torch.dtype, x: Tensor | None) -> list[Tensor]:
    """Random inputs of several batch sizes, and those that were given."""
    generator = torch.Generator().manual_seed(0)
    found = [made_up(n, shape, dtype, generator) for n in _CHECKED]
    return found if x is None else [*found, x.cpu()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and log about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line[:240] for line in lines if line), type(error).__name__)


def _pt2(program: torch.export.ExportedProgram, x: Tensor, about: str) -> tuple[bytes, Run]:
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: about})
    content = buffer.getvalue()
    return content, torch.export.load(BytesIO(content)).module()


def _onnx(program: torch.export.ExportedProgram, x: Tensor, about: str) -> tuple[bytes, Run]:
    import onnxruntime

    try:
        made = torch.onnx.export(
            program,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=[INPUTS],
            output_names=[OUTPUTS],
        )
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"export: ONNX has no form of the network: {_line(cause)}") from None
    assert made is not None
    made.model.metadata_props["ray_subnets"] = about
    content = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        (answer,) = session.run([OUTPUTS], {INPUTS: batch.numpy()})
        return torch.from_numpy(answer)

    return content, run


_FORMATS = {".pt2": _pt2, ".onnx": _onnx}
