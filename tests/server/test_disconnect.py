"""A client that goes away is forgotten at once: closing the engine's iterator is the abort."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Message

from modulation.levels import ZERO
from server.answers import ChatAnswers
from server.choices import merged
from server.engines.base import Chat, GenerateRequest, GenerationError
from server.engines.base import Message as EngineMessage
from server.engines.fake import FakeEngine
from server.errors import ClientDisconnectedError
from server.metrics import Metrics
from server.settings import Settings
from server.streaming import EventStream, unless_disconnected
from tests.engines.contract import is_idle, until
from tests.server.conftest import CHAT, Control, listen

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def sent(port: int, **fields: Any) -> AsyncIterator[asyncio.StreamReader]:
    """Send a chat request over a raw connection; on exit the client is gone, without a goodbye."""
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello"}], **fields})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    try:
        yield reader
    finally:
        writer.transport.abort()
        await asyncio.wait({asyncio.ensure_future(writer.wait_closed())})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait_at", [0, 4])
async def test_leaving_while_tokens_are_awaited_aborts_the_request(
    listening: AbstractAsyncContextManager[int],
    engine: FakeEngine,
    control: Control,
    stream: bool,
    wait_at: int,
) -> None:
    control.wait_at = wait_at
    async with listening as port:
        async with sent(port, stream=stream) as reader:
            await until(lambda: engine.healthy().num_running == 1)
            if stream and wait_at:
                await reader.readuntil(b'"content":"Fake"')
        await until(lambda: engine.num_aborted == 1, timeout_seconds=2)
        assert is_idle(engine)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_the_queue_takes_the_request_out_of_it(
    settings: Settings, control: Control, stream: bool
) -> None:
    """Also one that waits for room has a client that can go away."""
    control.wait_at = 0
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    async with listen(settings, engine) as port:
        async with sent(port):
            await until(lambda: engine.healthy().num_running == 1)
            async with sent(port, stream=stream):
                await until(lambda: engine.healthy().num_waiting == 1)
            await until(lambda: engine.healthy().num_waiting == 0, timeout_seconds=2)
            assert engine.healthy().num_running == 1
        await until(lambda: is_idle(engine), timeout_seconds=2)


async def test_a_client_that_stops_reading_and_leaves_is_forgotten(engine: FakeEngine) -> None:
    """The stream then stands at `send`, not at the engine's next token: the iterator is not running, and
    no cancellation reaches it. It must be closed, not left to the garbage collector."""
    client, full = Client(), asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            full.set()
            await asyncio.Event().wait()

    request = GenerateRequest(Chat((EngineMessage("user", "Hi"),)), ZERO)
    generated = engine.generate(request)  # held here: the garbage collector has no part in this
    outputs = merged([Metrics(engine).measured(generated, time.perf_counter(), "off")])
    answers = ChatAnswers("demo", "print", 1, logprobs=False, tools=None)
    stream = EventStream(outputs, answers.events(outputs, include_usage=False), {})
    answering = asyncio.create_task(stream({"type": "http"}, client.receive, send))
    await full.wait()
    assert engine.healthy().num_running == 1
    client.leaves.set()
    await answering
    assert engine.num_aborted == 1 and is_idle(engine)


async def test_a_client_that_leaves_before_its_request_is_whole_is_counted_as_such(
    listening: AbstractAsyncContextManager[int], engine: FakeEngine
) -> None:
    async with listening as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f'POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{"a"'.encode())
        await writer.drain()
        await client.get("/health")
        writer.transport.abort()
        line = f'neurontune_http_requests_total{{route="{CHAT}",status="499"}} 1.0'
        while line not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        assert is_idle(engine) and engine.num_aborted == 0


async def test_one_that_leaves_does_not_disturb_the_others(
    listening: AbstractAsyncContextManager[int], engine: FakeEngine, control: Control
) -> None:
    control.wait_at = 5
    async with listening as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
        staying = asyncio.create_task(client.post(CHAT, json=body))
        async with sent(port, stream=True):
            await until(lambda: engine.healthy().num_running == 2)
        await until(lambda: engine.healthy().num_running == 1, timeout_seconds=2)
        control.gate.set()
        assert (await staying).json()["choices"][0]["finish_reason"] == "stop"
        running = (await client.get("/metrics")).text
        assert 'neurontune_num_requests_running{model_name="demo"} 0.0' in running


async def test_tokens_arrive_when_they_are_made(
    listening: AbstractAsyncContextManager[int], control: Control
) -> None:
    control.wait_at = 2
    async with listening as port, sent(port, stream=True) as reader:
        await asyncio.wait_for(reader.readuntil(b'" answer:"'), timeout=5)
        assert not control.gate.is_set(), "the rest does not exist yet"
        control.gate.set()
        await asyncio.wait_for(reader.readuntil(b"[DONE]"), timeout=5)


async def test_the_apps_end_closes_the_engine(
    listening: AbstractAsyncContextManager[int], engine: FakeEngine
) -> None:
    async with listening:
        assert engine.healthy().ready
    assert not engine.healthy().ready


class Client:
    """The receiving side of a connection whose client leaves when told."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def test_work_that_is_done_first_gives_its_result_or_its_error() -> None:
    async def work() -> int:
        return 5

    async def failing() -> int:
        raise GenerationError("x")

    assert await unless_disconnected(Client().receive, work()) == 5
    with pytest.raises(GenerationError):
        await unless_disconnected(Client().receive, failing())


@pytest.mark.parametrize("cancelled", [False, True])
async def test_work_has_ended_before_anyone_is_told_that_the_client_left(cancelled: bool) -> None:
    client, steps, started = Client(), [], asyncio.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    waiting = asyncio.create_task(unless_disconnected(client.receive, work()))
    await started.wait()
    if cancelled:
        waiting.cancel()
    else:
        client.leaves.set()
    with pytest.raises(asyncio.CancelledError if cancelled else ClientDisconnectedError):
        await waiting
    assert steps == ["cleaned up"]
