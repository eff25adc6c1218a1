"""What a server of an ensemble accepts, and how it refuses the rest: without Ray."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ray_subnets.serving.requested import Array, Refused, Terms, read, written
from ray_subnets.serving.webapp import App, Busy

TERMS = Terms((1, 2, 3), images=True, max_bytes=5000, max_samples=4)
FLOATS = Terms((3,), images=False, max_bytes=5000, max_samples=4)


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version)
    return file.getvalue()


def ones(*shape: int) -> Array:
    return np.ones(shape)


def refusal(body: bytes, kind: str = "application/json", terms: Terms = TERMS) -> Refused:
    with pytest.raises(Refused) as caught:
        read(body, kind, terms)
    assert "\n" not in caught.value.reason
    assert len(caught.value.reason) < 400
    return caught.value


def test_lists_and_files_give_the_same_samples() -> None:
    x = np.random.default_rng(0).normal(size=(4, 1, 2, 3)).astype(np.float32)
    text = json.dumps({"inputs": x.tolist()}).encode()
    for body, kind in (
        (text, "application/json"),
        (text, "application/json; charset=utf-8"),
        (text, ""),
        (npy(x), "application/x-npy"),
        (npy(x.astype(">f8")), "application/octet-stream"),
        (npy(np.asfortranarray(x)), "Application/X-NPY"),
        (npy(x, (2, 0)), "application/x-npy"),
    ):
        found = read(body, kind, TERMS)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, x)


WORDS = Terms((3,), images=False, max_bytes=5000, max_samples=4, whole=True)


def test_whole_numbers_where_networks_see_those() -> None:
    ids = np.array([[0, 5, 2**40], [1, 2, -3]])
    for body, kind in (
        (json.dumps({"inputs": ids.tolist()}).encode(), "application/json"),
        (npy(ids), "application/x-npy"),
        (npy(ids.astype(">i8")), "application/x-npy"),
    ):
        found = read(body, kind, WORDS)
        assert found.dtype == np.int64
        assert found.tolist() == ids.tolist()
    small = read(npy(np.ones((1, 3), np.uint8)), "application/x-npy", WORDS)
    assert small.dtype == np.int64, "not images"
    for body, kind in (
        (b'{"inputs": [[1, 2, 3.5]]}', "application/json"),
        (b'{"inputs": [[1, 2, 18446744073709551615]]}', "application/json"),
        (npy(ones(1, 3)), "application/x-npy"),
        (npy(np.full((1, 3), 2**64 - 1, np.uint64)), "application/x-npy"),
    ):
        refused = refusal(body, kind, WORDS)
        assert refused.status == 400
        assert "whole numbers" in refused.reason


def test_images_are_whole_numbers() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3) * 20
    for body, kind in (
        (json.dumps({"images": images.tolist()}).encode(), ""),
        (npy(images), "application/x-npy"),
    ):
        found = read(body, kind, TERMS)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe\x00", 400, "not JSON"),
        (b'{"inputs": [[[[NaN, 1, 1], [1, 1, 1]]]]}', 400, "NaN is no number"),
        (b'{"inputs": [[[[Infinity, 1, 1], [1, 1, 1]]]]}', 400, "Infinity is no number"),
        (b'{"inputs": [[[[1e999, 1, 1], [1, 1, 1]]]]}', 400, "finite float32"),
        (b'{"inputs": [[[[1e39, 1, 1], [1, 1, 1]]]]}', 400, "finite float32"),
        (b'{"inputs": [[[[1' + b"0" * 400 + b", 1, 1], [1, 1, 1]]]]}", 400, "lists of numbers"),
        (b"[[[[1, 1, 1], [1, 1, 1]]]]", 400, "JSON object"),
        (b'{"input": []}', 400, "JSON object"),
        (b'{"inputs": [], "images": []}', 400, "JSON object"),
        (b'{"inputs": []}', 400, "(N, 1, 2, 3), not (0,)"),
        (b'{"inputs": 3}', 400, "(N, 1, 2, 3), not ()"),
        (b'{"inputs": [[[[1, 1, 1], [1, 1]]]]}', 400, "lists of numbers"),
        (b'{"inputs": [[[["1", 1, 1], [1, 1, 1]]]]}', 400, "lists of numbers"),
        (b'{"inputs": [[[[null, 1, 1], [1, 1, 1]]]]}', 400, "lists of numbers"),
        (b'{"inputs": [[[[true, true, true], [true, true, true]]]]}', 400, "lists of numbers"),
        (b'{"inputs": {"a": 1}}', 400, "lists of numbers"),
        (b'{"inputs": [[[1, 1, 1], [1, 1, 1]]]}', 400, "(N, 1, 2, 3), not (1, 2, 3)"),
        (b'{"inputs": [[[[1, 1], [1, 1], [1, 1]]]]}', 400, "(N, 1, 2, 3), not (1, 1, 3, 2)"),
        (b'{"images": [[[[256, 1, 1], [1, 1, 1]]]]}', 400, "from 0 to 255"),
        (b'{"images": [[[[-1, 1, 1], [1, 1, 1]]]]}', 400, "from 0 to 255"),
        (b'{"images": [[[[0.5, 1, 1], [1, 1, 1]]]]}', 400, "from 0 to 255"),
        (b'{"inputs": [1, 1, 1, 1, 1]}', 413, "5 samples"),
        (b" " * 5001, 413, "5,000 bytes"),
    ],
)
def test_bad_text_is_refused(body: bytes, status: int, says: str) -> None:
    refused = refusal(body)
    assert refused.status == status
    assert says in refused.reason


def test_text_that_is_nested_without_end_is_refused() -> None:
    """Up to which depth it is read depends on the version of Python; 3.13 reads this to its end."""
    refused = refusal(b"[" * 4000)
    assert refused.status == 400
    says = (
        "nested too deeply" if sys.version_info < (3, 12) else "nested too deeply|Expecting value"
    )
    assert re.search(says, refused.reason)


def header(text: str) -> bytes:
    """A .npy file with this header and hardly any content."""
    padded = (text + "\n").encode()
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"\x00" * 24


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a .npy file"),
        (b"\x93NUMPY\x09\x00", "not a .npy file"),
        (npy(ones(1, 1, 2, 3))[:40], "not a .npy file"),
        (npy(ones(1, 1, 2, 3))[:-1], "do not agree"),
        (npy(ones(1, 1, 2, 3)) + b"x", "do not agree"),
        # Would be terabytes if the header were believed.
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (4000000000000,)}"), "(N, 1,"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (4, 1, 2, 3)}"), "not agree"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 2, 3)}"), "floating"),
        (header("__import__('os').system('true')"), "not a .npy file"),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}"), "floating"),
        (npy(np.array([{"a": 1}], dtype=object)), "floating point or uint8"),
        (npy(ones(1, 1, 2, 3).astype(int)), "floating point or uint8, not int64"),
        (npy(ones(1, 1, 2, 3) * np.nan), "NaN"),
        (npy(ones(0, 1, 2, 3)), "no samples"),
        (npy(ones(2, 3)), "(N, 1, 2, 3), not (2, 3)"),
    ],
)
def test_bad_files_are_refused(body: bytes, says: str) -> None:
    refused = refusal(body, "application/x-npy")
    assert refused.status == 400
    assert says in refused.reason


def test_other_types_and_images_where_there_are_none() -> None:
    assert refusal(b"a=1", "application/x-www-form-urlencoded").status == 415
    assert refusal(npy(ones(1, 3).astype(np.uint8)), "application/x-npy", FLOATS).status == 400
    refused = refusal(b'{"images": [[1, 2, 3]]}', terms=FLOATS)
    assert '{"inputs": [...]}' in refused.reason
    assert "images" not in refused.reason


def test_an_answer_that_is_not_finite_is_no_answer() -> None:
    assert json.loads(written({"class": np.array([1, 2])})) == {"class": [1, 2]}
    with pytest.raises(Refused) as caught:
        written({"p": np.array([np.nan])})
    assert caught.value.status == 422


async def _sums(samples: Array) -> Mapping[str, Array]:
    return {"sum": samples.reshape(len(samples), -1).sum(1)}


async def _two() -> int:
    return 2


def app(ask: Any = _sums, **how: Any) -> App:
    return App(ask, TERMS, info=lambda: {"name": "a"}, healthy=_two, **how)


GOOD = json.dumps({"inputs": ones(2, 1, 2, 3).tolist()}).encode()


def call(
    to: App,
    path: str = "/predict",
    method: str = "POST",
    parts: tuple[bytes, ...] = (GOOD,),
    headers: Mapping[str, str] | None = None,
    left: bool = False,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of one request.

    Args:
        parts: of the body, as they arrive.
        left: the client goes away in the middle.
    """
    said = {"host": "localhost:8000", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in said.items()],
    }
    more: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1 or left}
        for i, part in enumerate(parts)
    ]
    more.append({"type": "http.disconnect"})
    sent: list[Any] = []

    async def receive() -> Any:
        return more.pop(0) if len(more) > 1 else more[0]

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(to(scope, receive, send))
    if not sent:
        return 0, None, {}
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(text) if text else None, found


def test_pages() -> None:
    status, said, headers = call(app())
    assert (status, said) == (200, {"sum": [6.0, 6.0]})
    assert headers["content-type"] == "application/json"
    assert call(app(), "/health", "GET")[:2] == (200, {"status": "ok", "replicas": 2})
    assert call(app(), "/info", "GET")[:2] == (200, {"name": "a"})


@pytest.mark.parametrize(
    ("path", "method", "status", "says"),
    [
        ("/", "GET", 404, "/predict"),
        ("/predict/", "POST", 404, "/predict"),
        ("/../etc/passwd", "GET", 404, "/predict"),
        ("/predict", "GET", 405, "POST"),
        ("/predict", "PUT", 405, "POST"),
        ("/health", "POST", 405, "GET"),
    ],
)
def test_unknown_pages_and_methods(path: str, method: str, status: int, says: str) -> None:
    found, said, headers = call(app(), path, method)
    assert found == status
    assert says in said["error"]
    assert headers.get("allow", says) == says or status == 404


def test_other_names_of_this_machine_are_refused() -> None:
    assert call(app(), headers={"host": "evil.example"})[0] == 403
    assert call(app(), headers={"host": "localhost.evil.example:8000"})[0] == 403
    assert call(app(local=False), headers={"host": "gpu-3:8000"})[0] == 200
    for name in ("127.0.0.1:80", "LOCALHOST", "[::1]:8000", "[::1]"):
        assert call(app(), headers={"host": name})[0] == 200


def test_what_is_too_large_is_not_kept() -> None:
    large = {"content-length": "5001"}
    assert call(app(), parts=(b"x" * 5001,), headers=large)[0] == 413
    endless = app()
    status, said, headers = call(endless, parts=(b"x" * 1000,) * 100)  # nothing said its length
    assert status == 413
    assert "5,000 bytes" in said["error"]
    assert headers["connection"] == "close"
    assert call(endless)[0] == 200


def test_room_is_given_back() -> None:
    small = app(memory=5000)
    for _ in range(3):
        assert call(small, parts=(b"x" * 4000,))[0] == 400
        assert call(small, parts=(b"x" * 4000,), left=True)[0] == 0
    slow = asyncio.Event()

    async def both() -> list[int]:
        async def one(parts: list[bytes]) -> int:
            sent: list[Any] = []

            async def receive() -> Any:
                if len(parts) == 1:
                    await slow.wait()
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
            await small({**scope, "headers": [(b"host", b"localhost")]}, receive, send)
            slow.set()
            return int(sent[0]["status"])

        return await asyncio.gather(one([b" " * 3000, GOOD]), one([b" " * 3000, GOOD]))

    assert asyncio.run(both()) == [200, 503]


def test_when_nobody_can_answer() -> None:
    async def busy(samples: Array) -> Mapping[str, Array]:
        raise Busy("too many requests are waiting")

    async def slow(samples: Array) -> Mapping[str, Array]:
        await asyncio.sleep(10)
        raise AssertionError

    async def broken(samples: Array) -> Mapping[str, Array]:
        raise KeyError("a secret")

    status, said, headers = call(app(busy))
    assert (status, headers["retry-after"]) == (503, "1")
    assert said["error"] == "too many requests are waiting; ask again later"
    assert call(app(slow, seconds=0.05))[0] == 503
    status, said, _ = call(app(broken))
    assert status == 500
    assert "secret" not in said["error"]
    assert "Traceback" not in said["error"]


def test_a_health_check_without_replicas_fails() -> None:
    async def none() -> int:
        return 0

    found = App(_sums, TERMS, info=dict, healthy=none)
    assert call(found, "/health", "GET")[0] == 503


def test_a_client_that_goes_away_is_nobodys_fault() -> None:
    assert call(app(), parts=(b"{",), left=True) == (0, None, {})
