"""The server as a process: its socket, its loop, and how it ends.

Knows uvicorn and signals. Knows no settings, and the engine only to close it.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer
import uvicorn
from starlette.types import ASGIApp

from server.connections import Limits, OnRefused, bounded
from server.draining import Drain
from server.engines.base import Engine
from server.errors import SettingsError

CTRL_C_SECONDS: Final = 2.0
BACKSTOP_SECONDS: Final = 5
DEFAULT_LIMITS: Final = Limits()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before a model is loaded.

    Raises:
        SettingsError: the address does not exist here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise SettingsError(f"Cannot use the address {host!r}: {reason}. Try --host.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Choose with --host and --port."
        ) from error
    return listener


Reload = Callable[[], Awaitable[None]]
"""What SIGHUP asks for."""


async def _nothing() -> None:
    pass


class EngineEnd:
    """Called when the engine has given up, with the reason, on any thread: ends the attached server."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._server: uvicorn.Server | None = None

    def __call__(self, reason: str) -> None:
        logging.getLogger(__name__).critical("The server ends: %s.", reason)
        self.reason = reason
        self._stop()

    def attach(self, server: uvicorn.Server) -> None:
        """End this server, at once if the engine has given up already."""
        self._server = server
        self._stop()

    def _stop(self) -> None:
        if self._server is not None and self.reason is not None:
            self._server.should_exit = True


@contextmanager
def ended_by_signals() -> Iterator[Callable[[], None]]:
    """Within the block SIGTERM raises SystemExit and Ctrl-C KeyboardInterrupt, so that what the block has
    started can be ended.

    Python drops what is raised within a finalizer or a callback of its own; it runs some at every import.
    Gives what raises it again, to be called where nothing is under way.
    """
    signalled: list[BaseException] = []

    def end(number: int, _frame: FrameType | None) -> None:
        signalled.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise signalled[-1]

    def raise_again() -> None:
        if signalled:
            raise signalled[-1]

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield raise_again
    finally:
        for number, handler in before.items():
            # None: it is not Python's, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run(
    app: ASGIApp,
    engine: Engine,
    listener: socket.socket,
    log_level: str,
    welcome: str,
    drain: Drain,
    end: EngineEnd | None = None,
    reload: Reload = _nothing,
    *,
    grace_seconds: float = 30,
    limits: Limits = DEFAULT_LIMITS,
    on_refused: OnRefused = lambda _: None,
) -> None:
    """Serve `app` on `listener` until Ctrl-C or SIGTERM, and print `welcome` once it answers. SIGHUP awaits
    `reload`, one at a time. Connections keep to `limits`; `on_refused` is told of those that are refused.

    Raises:
        SystemExit: with code 1, where `end` was called.
    """
    end = end or EngineEnd()
    config = uvicorn.Config(
        app,
        http=bounded(limits, on_refused),
        ws="none",  # there are no websockets here, and uvicorn would hand the connection to another protocol
        log_level=log_level,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=BACKSTOP_SECONDS,
        server_header=False,
        # A header that anybody can send must not decide whose address is logged.
        proxy_headers=False,
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a loop to reload in
    graces: dict[int, float] = {
        signal.SIGTERM: grace_seconds,
        signal.SIGINT: min(grace_seconds, CTRL_C_SECONDS),
    }
    server = _Server(config, engine, welcome, drain, graces, reload)
    end.attach(server)
    server.run(sockets=[listener])
    if end.reason is not None:
        raise SystemExit(1)


class _Server(uvicorn.Server):
    """uvicorn, but it listens on until running answers have ended or their grace period has.

    A signal begins `drain`; a second one ends it. Then answers that still run get an error that says why.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        welcome: str,
        drain: Drain,
        graces: Mapping[int, float],
        reload: Reload,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._welcome = welcome
        self._drain = drain
        self._graces = graces
        self._reload = reload
        self._hung_up = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        # Nothing here may wait: it runs between any two instructions of the loop.
        self._drain.begin(0 if self._drain.has_begun else self._graces[sig])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up.set)
        self._reloading = asyncio.create_task(self._reload_when_told())
        typer.echo(self._welcome)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._drain.is_over

    async def _reload_when_told(self) -> None:
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            try:
                await self._reload()
            except Exception:
                logging.getLogger(__name__).exception("The reload failed; what was in force stays.")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._reloading.cancel()
        await self._engine.close()
        await super().shutdown(sockets)
