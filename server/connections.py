"""Connections that cost more than they ask: too many, slow heads, clients that do not read.

Knows uvicorn's protocol on h11, and to which of its calls it adds. Knows no request. uvicorn itself bounds
only the time between two requests (`timeout_keep_alive`), until the first byte of the next.
"""

import asyncio
import http
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ConnectionsError, RefusedError, SettingsError, error_body, kind_of
from server.hardening import SECURITY_HEADERS

TELL_SECONDS: Final = 60.0
# What the process has open beside its connections: the model's files, logs, the loop's own.
OTHER_FILES: Final = 128


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may cost.

    At most `max_connections` are open. A request's head has `read_seconds` to arrive, and the client as long
    to read what is under way when its connection closes. A connection that takes nothing for `stall_seconds`
    is given up, whatever it waits for. Between two requests it may be idle for `keep_alive_seconds`.
    """

    max_connections: int = 1024
    read_seconds: float = 30.0
    stall_seconds: float = 600.0
    keep_alive_seconds: int = 120


def allow_files(max_connections: int) -> None:
    """See to it that the process may have so many connections open.

    Raises:
        SettingsError: the system does not allow it.
    """
    needed = max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"Setting max_connections: {max_connections} connections need {needed} open files, and this "
            f"process may have {hard}. Lower --max-connections, or raise the limit (ulimit -n)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass
class _Waiting:
    """Connections that wait for a request, the longest waiting first, and when a refusal was last told."""

    protocols: dict["_Protocol", None] = field(default_factory=dict)
    told: float = -TELL_SECONDS


OnRefused = Callable[[RefusedError], object]
"""Is told of every connection that is refused."""


def bounded(limits: Limits, on_refused: OnRefused = lambda _: None) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config(http=...)` that keeps to `limits`.

    Beyond the most connections, the one that has waited longest for a request is closed for the new one; if
    all are being answered, the new one is. After an answer the rest of its request's body, which nobody
    reads, counts as the next head.
    """
    waiting = _Waiting()

    class Protocol(_Protocol):
        _limits = limits
        _waiting = waiting
        _on_refused = staticmethod(on_refused)

    return Protocol


class _Protocol(H11Protocol):
    _limits: Limits
    _waiting: _Waiting
    _on_refused: OnRefused

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._closing: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        closing_in_time = _ClosingInTime(transport, self.loop, self._limits.read_seconds)
        super().connection_made(cast(asyncio.Transport, closing_in_time))
        self._watch()
        if len(self.connections) > self._limits.max_connections:
            next(iter(self._waiting.protocols)).refuse_connection()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_idle() and self.cycle is not None:
            # The body of a request that has been answered without it is whole: uvicorn's own time runs anew.
            self._unwatch()
            self._watch_for_another()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Of a body that nobody read, or of the next request, a part may be there already or still to come.
        if self._is_idle():
            self._watch_for_another()
        else:
            self._watch()

    def _is_idle(self) -> bool:
        """Between two requests: none is answered, and nothing of the next is there."""
        is_answered = self.cycle is None or self.cycle.response_complete
        is_open = is_answered and not self.transport.is_closing()
        return is_open and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._unstall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unstall()

    def send_400_response(self, msg: str) -> None:
        self._answer_and_close(400, b"text/plain; charset=utf-8", msg.encode("ascii"), {})

    def refuse_connection(self) -> None:
        """Answer, to whatever comes, that there is no room, and close."""
        self._unwatch()
        now, most = time.monotonic(), self._limits.max_connections
        if now - self._waiting.told >= TELL_SECONDS:
            self._waiting.told = now
            self.logger.warning("More than %d connections: some are refused (--max-connections).", most)
        error = ConnectionsError(f"The server has {most} connections, as many as it takes. Try again in 1 s.")
        self._on_refused(error)
        body = json.dumps(error_body(error)).encode("ascii")
        self._answer_and_close(kind_of(error).status, b"application/json", body, error.headers)
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _answer_and_close(self, status: int, kind: bytes, body: bytes, headers: dict[str, str]) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            told = {**SECURITY_HEADERS, **headers, "content-length": str(len(body)), "connection": "close"}
            lines = [(b"content-type", kind)]
            lines += [(name.encode(), value.encode()) for name, value in told.items()]
            reason = http.HTTPStatus(status).phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=lines, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Only what has not been read whole is waited for, from its first byte on."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._unwatch()
            return
        self._watch_for_another()
        if self._closing is None:
            self._closing = self.loop.call_later(self._limits.read_seconds, self.transport.close)

    def _watch_for_another(self) -> None:
        """Between two requests uvicorn's own time runs; but where there is no room it ends at once."""
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._waiting.protocols.setdefault(self)

    def _unwatch(self) -> None:
        self._waiting.protocols.pop(self, None)
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _unstall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class _ClosingInTime:
    """A transport whose `close` waits `seconds` for the client to read what is under way, not for ever."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._transport = transport
        self._loop = loop
        self._seconds = seconds

    def close(self) -> None:
        """Close; what cannot be sent in time is lost."""
        is_first = not self._transport.is_closing()
        self._transport.close()
        if is_first and self._transport.get_write_buffer_size():
            self._loop.call_later(self._seconds, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
