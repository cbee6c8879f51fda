"""Requests as HTTP has them, made plain before anything looks at them.

Knows HTTP's framing and request targets (RFC 9112, 3.2.2 and 6.3). Knows no route and no field.
"""

from typing import Final
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.authentication import AnswerError
from server.errors import AmbiguousLengthError, InvalidValueError, RequestError

SCHEMES: Final = (b"http://", b"https://")


class PlainRequests:
    """ASGI middleware. A request whose length is given in two ways is refused and its connection closed: a
    proxy before this server may have read the other one, and taken for two requests what is one here. A
    target with the server's name in it becomes a path, and its name the Host."""

    def __init__(self, app: ASGIApp, answer_error: AnswerError) -> None:
        self._app = app
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                _make_plain(scope)
            except RequestError as error:
                response = await self._answer_error(Request(scope), error)
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _make_plain(scope: Scope) -> None:
    headers, given = Headers(scope=scope), scope.get("raw_path", b"")
    if "content-length" in headers and "transfer-encoding" in headers:
        raise AmbiguousLengthError(
            "The request has both Content-Length and Transfer-Encoding. Send one of them."
        )
    if not given.lower().startswith(SCHEMES):
        return
    try:
        target = urlsplit(given.decode("ascii"))
    except ValueError as error:
        raise InvalidValueError(f"The request's target is no URL: {error}. Send its path.") from error
    scope["raw_path"] = (target.path or "/").encode("ascii")
    scope["path"] = unquote(target.path or "/")
    host = target.netloc.rpartition("@")[2].encode("ascii")
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"].append((b"host", host))
