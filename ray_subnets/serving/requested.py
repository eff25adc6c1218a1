"""What may be asked of an ensemble over the network, and what it is told: bytes in, JSON out.

Samples come as JSON, `{"inputs": [...]}` (what the networks see) or `{"images": [...]}` (0 to 255,
scaled and normalised as in training), or as one NumPy file, whose type says which: floating point,
or whole numbers where the networks see those, or uint8. Nothing that is sent is unpickled, and
nothing is allocated on the word of a header.

Shape legend: N samples, C classes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

JSON = "application/json"
NPY = ("application/x-npy", "application/octet-stream")


class Refused(Exception):
    """A request that is not answered: an HTTP status and one line for who sent it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Terms:
    """What is accepted."""

    input_shape: tuple[int, ...]
    """of one sample"""
    images: bool
    """are uint8 images known, or network inputs only?"""
    max_bytes: int
    """of one request's body"""
    max_samples: int
    """in one request"""
    whole: bool = False
    """are network inputs whole numbers?"""

    @property
    def keys(self) -> tuple[str, ...]:
        """Under which samples may stand in JSON."""
        return ("inputs", "images") if self.images else ("inputs",)


def read(body: bytes, kind: str, terms: Terms) -> Array:
    """The samples in a body: `(N, *input_shape)`, float32 or int64 (inputs) or uint8 (images).

    Args:
        kind: the Content-Type; without one it is taken for JSON.

    Raises:
        Refused: 400 (not what it claims to be, wrong shape or numbers), 413 (too much) or 415
            (another type).
    """
    if len(body) > terms.max_bytes:
        raise too_large(terms)
    kind = kind.partition(";")[0].strip().lower()
    if kind in ("", JSON):
        samples = _from_json(body, terms)
    elif kind in NPY:
        samples = _from_npy(body, terms)
    else:
        raise Refused(415, f"Content-Type: send {JSON} or {NPY[0]}, not {kind[:60]!r}")
    return samples


def too_large(terms: Terms) -> Refused:
    """The answer to a body of too many bytes."""
    return Refused(413, f"the request is larger than {terms.max_bytes:,} bytes; send less at once")


def _from_json(body: bytes, terms: Terms) -> Array:
    wanted = " or ".join(f'{{"{key}": [...]}}' for key in terms.keys)
    try:
        said = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"not JSON: {reason[:200]}; send {wanted}") from None
    if not isinstance(said, dict) or len(said) != 1 or next(iter(said)) not in terms.keys:
        raise Refused(400, f"send a JSON object {wanted}, a list of samples, and nothing else")
    [(key, rows)] = said.items()
    if isinstance(rows, list) and len(rows) > terms.max_samples:
        raise _too_many(len(rows), terms)
    try:
        found = np.asarray(rows)
    except (ValueError, OverflowError, RecursionError):
        found = None
    if found is None or found.dtype.kind not in "iuf":
        raise Refused(400, f"{key}: must be lists of numbers, all of one shape")
    _check_shape(key, found.shape, terms)
    if key == "images":
        if found.dtype.kind == "f" or found.min() < 0 or found.max() > 255:
            raise Refused(400, "images: must be whole numbers from 0 to 255")
        return found.astype(np.uint8)
    return _inputs(found, terms)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _from_npy(body: bytes, terms: Terms) -> Array:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, kind = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError("an unknown version")
    except Exception as error:  # whatever NumPy's parser says of a damaged header
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise Refused(400, f"not a .npy file: {reason[:200]}") from None
    if kind.kind not in ("iu" if terms.whole else "f") and not (kind == np.uint8 and terms.images):
        wanted = "of whole numbers" if terms.whole else "floating point"
        wanted += " or uint8" if terms.images else ""
        raise Refused(400, f"the array must be {wanted}, not {str(kind)[:60]}")
    _check_shape("the array", shape, terms)
    start = file.tell()
    count = int(np.prod(shape, dtype=object))
    if len(body) - start != count * kind.itemsize:
        raise Refused(400, "not a whole .npy file: its size and its header do not agree")
    flat = np.frombuffer(body, kind, offset=start)
    found = flat.reshape(shape, order="F" if fortran else "C")
    if kind == np.uint8 and terms.images:
        return np.ascontiguousarray(found)
    return _inputs(found, terms)


def _check_shape(what: str, shape: Sequence[int], terms: Terms) -> None:
    if tuple(shape[1:]) != terms.input_shape or not shape:
        wanted = ", ".join(["N", *map(str, terms.input_shape)])
        raise Refused(400, f"{what}: must have the shape ({wanted}), not {_shape(shape)}")
    if shape[0] < 1:
        raise Refused(400, f"{what}: no samples")
    if shape[0] > terms.max_samples:
        raise _too_many(shape[0], terms)


def _shape(shape: Sequence[int]) -> str:
    return str(tuple(shape))[:100]


def _too_many(count: int, terms: Terms) -> Refused:
    return Refused(413, f"{count:,} samples; send {terms.max_samples:,} at most at once")


def _inputs(found: Array, terms: Terms) -> Array:
    if terms.whole:
        if found.dtype.kind == "f" or (found.size and found.max() > np.iinfo(np.int64).max):
            raise Refused(400, "inputs: must be whole numbers of 64 bits")
        return np.ascontiguousarray(found, dtype=np.int64)
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and told below
        inputs = np.ascontiguousarray(found, dtype=np.float32)
    if not np.isfinite(inputs).all():
        raise Refused(400, "inputs: must be finite float32 numbers; NaN or infinity is among them")
    return inputs


def written(answer: Mapping[str, Array]) -> bytes:
    """The JSON that answers: each name with a list of one entry for each sample.

    Raises:
        Refused: 422, an answer is not finite (inputs of 1e38 do that).
    """
    try:
        text = json.dumps({name: value.tolist() for name, value in answer.items()}, allow_nan=False)
    except ValueError:
        raise Refused(422, "inputs: the networks give no finite answer for them") from None
    return text.encode()
