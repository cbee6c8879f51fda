"""Who sends a request: every route but a few wants a key, and what comes after finds a caller in the scope.

Knows the header that keys come in. Knows no key file, no level, no route but by its path.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.callers import SCOPE_KEY, Caller
from server.errors import AuthenticationError, InvalidKeyError, MissingKeyError

HEADER: Final = "Authorization"
SCHEME: Final = "bearer"
POLICY_VIOLATION: Final = 1008

FindCaller = Callable[[Scope], Caller]
"""Whom a request comes from; raises AuthenticationError."""

AnswerError = Callable[[Request, Exception], Awaitable[Response]]
"""The answer that says so."""


class Authenticate:
    """ASGI middleware that puts the caller into the scope. Without one, only `open_paths` are reached: what
    does not exist is not told from what does."""

    def __init__(
        self, app: ASGIApp, find_caller: FindCaller, open_paths: Collection[str], answer_error: AnswerError
    ) -> None:
        self._app = app
        self._find_caller = find_caller
        self._open_paths = frozenset(open_paths)
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                scope[SCOPE_KEY] = self._find_caller(scope)
            except AuthenticationError as error:
                response = await self._answer_error(Request(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def by_key(find: Callable[[bytes], Caller]) -> FindCaller:
    """Callers by the one bearer token of their request. `find` raises AuthenticationError."""

    def find_caller(scope: Scope) -> Caller:
        given = Headers(scope=scope).getlist(HEADER)
        if not given:
            raise MissingKeyError(f"This server wants an API key: send the header {HEADER}: Bearer KEY.")
        scheme, _, key = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != SCHEME or not key.strip(" "):
            raise InvalidKeyError(
                f"The header {HEADER} is not one API key: send it once, as {HEADER}: Bearer KEY."
            )
        return find(key.strip(" ").encode("latin-1"))

    return find_caller


def everybody(caller: Caller) -> FindCaller:
    """Whoever comes is `caller`, whatever key they send."""
    return lambda _scope: caller
