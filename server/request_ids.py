"""Every answer carries the id of its request: the one that came with it, or a new one.

Knows one header. Knows nothing of what is asked or answered.
"""

import re
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER: Final = "X-Request-Id"
SCOPE_KEY: Final = "neurontune.request_id"
_USABLE: Final = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware. An id that is not 1 to 128 visible ASCII characters gets a new one in its place."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        name = scope[SCOPE_KEY] = given if _USABLE.fullmatch(given) else uuid.uuid4().hex

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = name
            await send(message)

        await self._app(scope, receive, sending)
