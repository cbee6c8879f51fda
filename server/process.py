"""The server as a process: its socket, its loop, and how it ends.

Knows uvicorn and signals. Knows no settings, and the engine only to close it.
"""

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Final

import typer
import uvicorn
from starlette.types import ASGIApp

from server.engines.base import Engine
from server.errors import SettingsError

GRACE_SECONDS: Final = 2.0
BACKSTOP_SECONDS: Final = 5


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


def run(
    app: ASGIApp,
    engine: Engine,
    listener: socket.socket,
    log_level: str,
    welcome: str,
    end: EngineEnd | None = None,
) -> None:
    """Serve `app` on `listener` until Ctrl-C or SIGTERM, and print `welcome` once it answers.

    Raises:
        SystemExit: with code 1, where `end` was called.
    """
    end = end or EngineEnd()
    config = uvicorn.Config(
        app, log_level=log_level, timeout_graceful_shutdown=BACKSTOP_SECONDS, server_header=False
    )
    # uvicorn raises its signal once more when it is done. It has done its work then: leave with 0.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    server = _Server(config, engine, welcome)
    end.attach(server)
    server.run(sockets=[listener])
    if end.reason is not None:
        raise SystemExit(1)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    """uvicorn, but running answers end after a grace period with an error that says why."""

    def __init__(self, config: uvicorn.Config, engine: Engine, welcome: str) -> None:
        super().__init__(config)
        self._engine = engine
        self._welcome = welcome

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The end is bounded as it is: a second Ctrl-C need not cut it short and spill tracebacks.
        if not self.should_exit:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        typer.echo(self._welcome)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_engine())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_engine(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        await self._engine.close()
