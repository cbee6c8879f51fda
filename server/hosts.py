"""Requests that a web page of somebody else has a browser send: to a name that is not this server's, or from
another origin.

Knows the headers Host and Origin. Knows no keys, no route. Without keys this is what tells the operator from
the pages that they visit: with DNS rebinding a page reads what it has a browser ask for under the page's own
name, and it can send what it cannot read.
"""

import ipaddress
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.authentication import AnswerError
from server.errors import ForeignHostError, ForeignOriginError, RequestError

ANY: Final = "*"


class RefuseForeign:
    """ASGI middleware that lets through what is sent to a name of this machine's own (localhost and loopback
    addresses) or one of `hosts`, by no web page, or by one of this server or of `origins` (`*`: any).
    `open_paths` are let through whatever they are sent to."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        origins: Collection[str],
        open_paths: Collection[str],
        answer_error: AnswerError,
    ) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._open_paths = frozenset(open_paths)
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                self._refuse_foreign(Headers(scope=scope))
            except RequestError as error:
                response = await self._answer_error(Request(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refuse_foreign(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not (_is_loopback(_name(host)) or _name(host) in self._hosts):
            raise ForeignHostError(
                f"This server is not {host[:100]!r}: it answers under the names of this machine itself "
                "(localhost). Whoever runs it names others in the setting allowed_hosts, or gives keys out."
            )
        if origin is None or ANY in self._origins or origin in self._origins:
            return
        if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise ForeignOriginError(
                f"Web pages of {origin[:100]!r} may not ask this server. Whoever runs it names the origins "
                "that may in the setting cors_origins."
            )


def _name(host: str) -> str:
    """A Host header's value without its port."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
