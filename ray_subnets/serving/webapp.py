"""The web side of serving: an ASGI application around any function that answers samples.

It refuses what is wrong or too much before anything is computed, in one line of JSON and without a
traceback, and holds no more bodies in memory than it has room for. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ray_subnets.serving.requested import Array, Refused, Terms, read, too_large, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

Ask = Callable[[Array], Awaitable[Mapping[str, Array]]]
"""samples `(N, *shape)` -> names and arrays of N rows; raises `Busy`"""

_SMALL = 64 * 1024  # bytes that are parsed between two other requests
_BODY_SECONDS = 30.0  # a client that sends more slowly is not waited for
_LINGER = 4  # times the largest body are read of one that is too large
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Busy(Exception):
    """Nobody can answer now; asking again later may help."""


class App:
    """`POST /predict`, `GET /health`, `GET /info`.

    Args:
        ask: answers samples.
        terms: what is accepted.
        info: answer to /info, made when asked.
        healthy: how many replicas can answer.
        seconds: that an answer may take.
        local: refuse names of other hosts: a web page that points its own name here would else be
            let in by the browser.
        memory: bytes of request bodies that may be held at once.
    """

    def __init__(
        self,
        ask: Ask,
        terms: Terms,
        *,
        info: Callable[[], Mapping[str, Any]],
        healthy: Callable[[], Awaitable[int]],
        seconds: float = 60.0,
        local: bool = True,
        memory: int = 256 * 2**20,
    ) -> None:
        self._ask, self._terms, self._info, self._healthy = ask, terms, info, healthy
        self._seconds, self._local = seconds, local
        self._free = max(memory, terms.max_bytes)
        # One at a time: a large text takes many times its size while it is parsed.
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parser")
        self._routes = {
            "/predict": ("POST", self._predict),
            "/health": ("GET", self._health),
            "/info": ("GET", self._about),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except Refused as refused:
            answer = _line(refused.status, refused.reason)
        except ClientDisconnect:
            return
        except Exception:
            logger.exception("a request could not be answered")
            answer = _line(500, "the server failed; its log says why")
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._local and name.lower() not in _LOCAL:
            raise Refused(403, "this server answers to localhost only")
        if request.url.path not in self._routes:
            raise Refused(404, f"no such page; there are {', '.join(self._routes)}")
        method, do = self._routes[request.url.path]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            answer = _line(405, f"use {method}")
            answer.headers["Allow"] = method
            return answer
        return await do(request)

    async def _predict(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        with self._room() as room:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    body = await self._body(request, room)
            except TimeoutError:
                raise Refused(408, f"the request took over {_BODY_SECONDS:g} s to arrive") from None
            kind = request.headers.get("content-type", "")
            if len(body) <= _SMALL:
                samples = read(body, kind, self._terms)
            else:
                samples = await loop.run_in_executor(self._parser, read, body, kind, self._terms)
        try:
            async with asyncio.timeout(self._seconds):
                said = await self._ask(samples)
        except (Busy, TimeoutError) as error:
            reason = str(error) or f"no answer in {self._seconds:g} s"
            answer = _line(503, f"{reason}; ask again later")
            answer.headers["Retry-After"] = "1"
            return answer
        return Response(written(said), media_type="application/json")

    @contextmanager
    def _room(self) -> Iterator[Callable[[int], None]]:
        """Counts the bytes that a request holds, until it is parsed."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if count > self._free:
                raise Refused(503, "too many large requests at once; ask again later")
            held += count
            self._free -= count

        try:
            yield take
        finally:
            self._free += held

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes:
        """The whole body. What is too large is thrown away as it comes, since a client that is cut
        off in the middle does not read why; but not for ever.
        """
        length = request.headers.get("content-length", "")
        large = length.isdecimal() and int(length) > self._terms.max_bytes
        parts, size = list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            large = large or size > self._terms.max_bytes
            if not large:
                take(len(part))
                parts.append(part)
            elif size > _LINGER * self._terms.max_bytes:
                break
        if large:
            raise too_large(self._terms)
        return b"".join(parts)

    async def _health(self, request: Request) -> Response:
        count = await self._healthy()
        return JSONResponse(
            {"status": "ok" if count else "no replica is up", "replicas": count},
            status_code=200 if count else 503,
        )

    async def _about(self, request: Request) -> Response:
        return JSONResponse(dict(self._info()))


def _line(status: int, reason: str) -> Response:
    # What was not read of the request would be taken for the next one.
    headers = {"Connection": "close"} if status in (408, 413, 503) else None
    return JSONResponse({"error": reason}, status_code=status, headers=headers)
