"""Connections are bounded: their number, and the time for a client that does not read."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.app import create_app
from server.connections import OTHER_FILES, Limits, OnRefused, allow_files, bounded
from server.deadlines import within
from server.engines.fake import FakeEngine
from server.errors import SettingsError
from server.hardening import SECURITY_HEADERS
from server.settings import Settings
from tests.engines.contract import until

pytestmark = pytest.mark.anyio
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
MEGABYTES = b"x" * 2**23


async def hello(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answers, and keeps the connection."""
    if scope["type"] == "http":
        length = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"hello"})


@asynccontextmanager
async def serving(
    app: ASGIApp, limits: Limits, on_refused: OnRefused = lambda _: None
) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server in this loop, with little room in its sockets, and its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=bounded(limits, on_refused),
            lifespan="off",
            log_level="error",
            timeout_keep_alive=limits.keep_alive_seconds,
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield server, int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def connected(
    port: int, sends: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sends)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def head_of(reader: asyncio.StreamReader) -> str:
    return (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().lower()


@pytest.mark.parametrize("sent", [b"", b"GET / HTT", GET])
async def test_beyond_the_most_connections_the_longest_waiting_one_is_closed(sent: bytes) -> None:
    """One that sends nothing, one that sends half a head, one that is idle after its answer."""
    async with serving(hello, Limits(2)) as (server, port), connected(port, sent) as (oldest, _):
        if sent == GET:
            assert "200 ok" in await head_of(oldest)
            assert await oldest.readexactly(5) == b"hello"
        await until(lambda: len(server.server_state.connections) == 1)
        async with connected(port, GET) as (second, _), connected(port, GET) as (third, _):
            told = await head_of(oldest)
            assert told.startswith("http/1.1 429 too many requests") and "\r\nretry-after: 1\r\n" in told
            assert all(f"\r\n{name.lower()}: " in told for name in SECURITY_HEADERS)
            assert b'"code": "server_overloaded"' in await oldest.read()
            for reader in (second, third):
                assert "200 ok" in await head_of(reader)
            assert len(server.server_state.connections) == 2


async def test_where_all_are_being_answered_the_new_one_is_refused() -> None:
    go, inside = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        inside.release()
        await go.wait()
        await hello(scope, receive, send)

    async with serving(slow, Limits(1)) as (server, port), connected(port, GET) as (first, _):
        await inside.acquire()
        for _ in range(3):
            async with httpx.AsyncClient() as client:
                refused = await client.get(f"http://127.0.0.1:{port}/")
            assert refused.status_code == 429 and refused.headers["connection"] == "close"
        go.set()
        assert "200 ok" in await head_of(first)
        assert len(server.server_state.connections) == 1


async def test_each_refused_connection_is_counted() -> None:
    """Neither the app nor its middleware ever sees one."""
    app = create_app(Settings(engine="fake"), FakeEngine())
    counted = app.state.metrics.registry.get_sample_value
    labels = {"reason": "connections", "model_name": "demo"}
    async with (
        serving(app, Limits(1), app.state.metrics.rejected) as (server, port),
        AsyncExitStack() as held,
    ):
        readers = []
        for number in range(4):
            reader, _ = await held.enter_async_context(connected(port))
            readers.append(reader)
            await until(lambda at=number: counted("neurontune_admission_rejections_total", labels) == at)
        for reader in readers[:-1]:
            assert "429 too many" in await head_of(reader)
        assert len(server.server_state.connections) == 1


async def test_what_is_no_http_is_answered_with_the_security_headers() -> None:
    async with serving(hello, Limits()) as (_, port), connected(port, b"\x16\x03\x01\r\n\r\n") as pair:
        told = await head_of(pair[0])
    assert told.startswith("http/1.1 400 bad request") and "x-content-type-options: nosniff" in told


async def test_a_body_that_arrives_after_its_answer_leaves_an_idle_connection() -> None:
    limits = Limits(read_seconds=1, keep_alive_seconds=2)
    post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\na"
    async with serving(hello, limits) as (_, port), connected(port, post) as (reader, writer):
        for rest in (b"bcd" + post, b"bcd"):
            assert "200 ok" in await head_of(reader)
            assert await reader.readexactly(5) == b"hello"
            begun = asyncio.get_running_loop().time()
            writer.write(rest)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        assert asyncio.get_running_loop().time() - begun >= 2


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_client_that_does_not_read_does_not_keep_its_connection(is_whole: bool) -> None:
    """asyncio closes a connection once all is sent: to a client that reads nothing, never. A whole answer
    under way, and a stream whose deadline has passed."""

    async def much(send: Send) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": MEGABYTES, "more_body": not is_whole})
        if not is_whole:
            await send({"type": "http.response.body", "body": b"never", "more_body": True})

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await within(0.1, send, much, on_expiry=lambda _: None)

    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with serving(app, Limits(read_seconds=0.2)) as (server, port):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(head)
            await until(lambda: len(server.server_state.connections) == 1)
            await until(lambda: not server.server_state.connections)


async def test_a_client_that_reads_in_time_gets_all_of_what_was_under_way() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        length = [(b"content-length", str(len(MEGABYTES)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": MEGABYTES})

    async with serving(app, Limits()) as (_, port), connected(port, GET) as (reader, _):
        await head_of(reader)
        assert await reader.readexactly(len(MEGABYTES)) == MEGABYTES


async def test_a_connection_that_takes_nothing_is_given_up_also_where_there_is_no_deadline() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send({"type": "http.response.body", "body": MEGABYTES, "more_body": True})

    async with serving(app, Limits(stall_seconds=0.2)) as (server, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(GET)
            await until(lambda: len(server.server_state.connections) == 1)
            await until(lambda: not server.server_state.connections)


def test_more_connections_than_files_are_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_files(100)
    assert asked == []
    allow_files(1024)
    assert asked == [(1024 + OTHER_FILES, 4096)]
    with pytest.raises(SettingsError, match="may have 4096"):
        allow_files(5000)
