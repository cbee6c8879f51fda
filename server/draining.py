"""Whether the server is on its way out, and how many requests are still inside.

Knows requests by their path alone. Knows no signals: the process says when.
"""

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ShuttingDownError

WATCHED: Final = frozenset({"/health", "/ready", "/metrics"})
Answer = Callable[[Request, ShuttingDownError], Awaitable[Response]]


class Drain:
    """The end of the server: from `begin` on nothing new is taken; what is inside may end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock: Final = clock
        self._ends: float | None = None
        self.num_inside = 0

    def begin(self, grace_seconds: float) -> None:
        """Begin, or end sooner than was said before; never later."""
        ends = self._clock() + grace_seconds
        self._ends = ends if self._ends is None else min(ends, self._ends)

    @property
    def has_begun(self) -> bool:
        """Whether new requests are refused."""
        return self._ends is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing is inside any more, or the grace period has passed."""
        return self._ends is not None and (not self.num_inside or self._clock() >= self._ends)

    def refuse(self) -> None:
        """Raises ShuttingDownError once it has begun."""
        if self._ends is not None:
            seconds = max(1, math.ceil(self._ends - self._clock()))
            raise ShuttingDownError(
                f"The server is shutting down and takes no new requests. Try again in {seconds} s, at the "
                "server that takes its place.",
                seconds,
            )


class RefuseWhenDraining:
    """ASGI middleware: counts what is inside, and refuses what comes after the end has begun.

    `answer` turns an error into a response. Those who watch the server are answered to the end.
    """

    def __init__(self, app: ASGIApp, drain: Drain, answer: Answer) -> None:
        self._app = app
        self._drain = drain
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in WATCHED:
            await self._app(scope, receive, send)
            return
        try:
            self._drain.refuse()
        except ShuttingDownError as error:
            response = await self._answer(Request(scope, receive), error)
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        self._drain.num_inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.num_inside -= 1
