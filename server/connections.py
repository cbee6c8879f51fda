"""Connections that do not send: one that has no whole request head in time is closed.

Knows uvicorn's protocol on h11, and to which of its calls it adds. Knows no request. uvicorn itself bounds
only the time between two requests (`timeout_keep_alive`), until the first byte of the next.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def reading_heads_within(seconds: float) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config(http=...)` that gives every request's head `seconds` to arrive.

    After an answer the rest of its request's body, which nobody reads, counts as the next head.
    """

    class Protocol(H11Protocol):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self._closing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Only what has not been read whole is waited for, from its first byte on."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._closing is None:
                self._closing = self.loop.call_later(seconds, self.transport.close)

        def _unwatch(self) -> None:
            if self._closing is not None:
                self._closing.cancel()
                self._closing = None

    return Protocol
