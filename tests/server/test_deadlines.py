"""A request has so many seconds, its waiting and its client's slowness included; then it ends and is gone."""

import asyncio
import json

import httpx
import pytest
from starlette.types import Message, Send

from modulation.levels import ZERO
from server.answers import CompletionAnswers
from server.app import create_app
from server.choices import merged
from server.deadlines import within
from server.engines.base import GenerateRequest, GenerationError
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.streaming import EventStream
from tests.engines.contract import is_idle, until
from tests.server.conftest import CHAT, Ask, Control, error_of, events, listen

pytestmark = pytest.mark.anyio
SOON = {"X-Request-Timeout": "0.1"}


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "", "1_0", "1e999", "0x1", "1 0"])
async def test_a_timeout_that_is_no_time_is_refused(ask: Ask, value: str) -> None:
    error = error_of(await ask(headers={"X-Request-Timeout": value}), 400, "invalid_value")
    assert error["param"] == "X-Request-Timeout" and "above 0" in error["message"]


async def test_two_timeouts_that_differ_are_refused(ask: Ask) -> None:
    given = [("X-Request-Timeout", "1"), ("X-Request-Timeout", "2")]
    error_of(await ask(headers=given), 400, "invalid_value")
    assert (await ask(headers=given[:1] * 2)).status_code == 200


@pytest.mark.parametrize(("stream", "wait_at"), [(False, 0), (False, 5), (True, 0)])
async def test_before_the_first_byte_the_end_is_408_and_the_engine_is_free(
    ask: Ask, engine: FakeEngine, control: Control, client: httpx.AsyncClient, stream: bool, wait_at: int
) -> None:
    control.wait_at = wait_at
    error = error_of(await ask(headers=SOON, stream=stream), 408, "deadline_exceeded")
    assert "0.1 s" in error["message"]
    assert engine.num_aborted == 1 and is_idle(engine)
    assert 'neurontune_deadlines_exceeded_total{model_name="demo"} 1.0' in (await client.get("/metrics")).text


async def test_after_the_first_byte_the_end_is_an_event(
    ask: Ask, engine: FakeEngine, control: Control
) -> None:
    control.wait_at = 3
    response = await ask(headers=SOON, stream=True)
    assert response.status_code == 200
    *_, last = events(response.text)
    assert last["error"]["code"] == "deadline_exceeded"
    assert engine.num_aborted == 1 and is_idle(engine)


async def test_waiting_for_room_counts(control: Control) -> None:
    control.wait_at = 0
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    transport = httpx.ASGITransport(create_app(Settings(engine="fake"), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
        running = asyncio.create_task(client.post(CHAT, json=body))
        await until(lambda: engine.healthy().num_running == 1)
        error_of(await client.post(CHAT, json=body, headers=SOON), 408, "deadline_exceeded")
        assert engine.healthy().num_running == 1 and engine.healthy().num_waiting == 0
        control.gate.set()
        assert (await running).status_code == 200


async def test_the_setting_is_the_default_and_the_most(engine: FakeEngine, control: Control) -> None:
    control.wait_at = 0
    settings = Settings(engine="fake", request_timeout_seconds=0.1)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
        for headers in ({}, {"X-Request-Timeout": "1000"}):
            error_of(await client.post(CHAT, json=body, headers=headers), 408, "deadline_exceeded")


async def test_a_body_that_does_not_arrive_is_408(engine: FakeEngine) -> None:
    async with listen(Settings(engine="fake", read_timeout_seconds=0.1), engine) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f'POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{"a"'.encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=5)
        assert head.startswith(b"HTTP/1.1 408 ")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        assert json.loads(await reader.readexactly(length))["error"]["code"] == "request_timeout"
        writer.transport.abort()


async def test_a_client_that_reads_nothing_ends_at_its_deadline(engine: FakeEngine) -> None:
    """The stream then stands at `send`, since the connection takes nothing more, and the last event cannot be
    sent either: the request still ends, and the engine is free."""
    stuck, expiries = asyncio.Event(), []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    generated = engine.generate(
        GenerateRequest("Hi", ZERO)
    )  # held: the garbage collector has no part in this
    outputs = merged([generated])
    answers = CompletionAnswers("demo", "print", 1, 1, logprobs=False, echoes=None)
    stream = EventStream(outputs, answers.events(outputs, include_usage=False), {})

    async def work(send: Send) -> None:
        await stream({"type": "http"}, asyncio.Event().wait, send)

    await within(0.1, send, work, on_expiry=lambda _: expiries.append(stuck.is_set()))
    assert expiries == [True]
    assert engine.num_aborted == 1 and is_idle(engine)


async def test_an_answer_whose_last_byte_is_sent_is_in_time_whatever_follows() -> None:
    """Found by the soak: where the time ended between a stream's last byte and the end of its work, an error
    event was sent into the answer that was complete. uvicorn then closes the connection, and whatever the
    client sends on it next is lost. Twice in 46,517 requests."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def work(send: Send) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await asyncio.Event().wait()

    expiries: list[bool] = []
    await within(0.01, send, work, on_expiry=lambda _: expiries.append(True))
    assert [message.get("more_body") for message in sent] == [None, True, False] and not expiries


@pytest.mark.parametrize("fail_at", [None, 3])
async def test_a_stream_whose_end_is_sent_is_over_also_if_its_time_ends_then(
    engine: FakeEngine, control: Control, fail_at: int | None
) -> None:
    """The end of the stream was a message behind its last event. A client that reads slowly has it wait: then
    the deadline put an error behind `[DONE]`, and cut the connection."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        if sent and (b"[DONE]" in sent[-1].get("body", b"") or b'"error"' in sent[-1].get("body", b"")):
            await asyncio.Event().wait()  # the connection takes no more
        sent.append(message)

    control.fail_at, control.failure = fail_at, GenerationError("told to fail")
    outputs = merged([engine.generate(GenerateRequest("Hi", ZERO))])
    answers = CompletionAnswers("demo", "print", 1, 1, logprobs=False, echoes=None)
    stream = EventStream(outputs, answers.events(outputs, include_usage=False), {})
    expiries: list[bool] = []

    async def work(send: Send) -> None:
        await stream({"type": "http"}, asyncio.Event().wait, send)

    await within(0.5, send, work, on_expiry=lambda _: expiries.append(True))
    assert [message.get("more_body") for message in sent[-2:]] == [True, False] and not expiries
    assert (b"[DONE]" in sent[-1]["body"]) == (fail_at is None)


async def test_a_deadline_before_the_last_event_leaves_no_done(
    ask: Ask, engine: FakeEngine, control: Control
) -> None:
    """All of the text has come, but not why it ended: the answer is not complete."""
    whole = (await ask(temperature=0)).json()["usage"]["completion_tokens"]
    control.wait_at = whole - 1
    response = await ask(headers=SOON, stream=True, temperature=0)
    *before, last = events(response.text)
    assert last["error"]["code"] == "deadline_exceeded" and len(before) == whole
    assert all(each["choices"][0]["finish_reason"] is None for each in before) and is_idle(engine)
