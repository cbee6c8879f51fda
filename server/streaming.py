"""Answers on their way to a client, and what happens if it leaves.

Knows streams and disconnects. Knows no answer's shape, no level, no metric.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientDisconnectedError

EVENT_STREAM: Final = "text/event-stream; charset=utf-8"

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client leaves before it is done, cancel it and let it end first.

    `receive` must be past the request's body. Whatever happens, `work` is over on return.

    Raises:
        ClientDisconnectedError: the client left.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait({working, watching})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Last(bytes):
    """The piece of a stream that ends it: it is sent together with the stream's end."""


class EventStream(Response):
    """A response that owns the outputs it streams: however it ends, it closes them.

    The status is sent with the first event, so what the first one raises is answered as an error.
    """

    def __init__(
        self,
        outputs: AsyncGenerator[Any, None],
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
            media_type=EVENT_STREAM,
        )
        del self.headers["content-length"]
        self._outputs = outputs
        self._events = events
        self._started = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._outputs), aclosing(self._events):
            try:
                await unless_disconnected(receive, self._send_all(send))
            except ClientDisconnectedError:
                if not self._started:
                    raise

    async def _send_all(self, send: Send) -> None:
        async for data in self._events:
            if not self._started:
                self._started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            is_last = isinstance(data, Last)
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            if is_last:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
