"""A server on the fake engine: in the test's own loop, without a socket and with a real one."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

from server.app import create_app
from server.engines.base import Engine, GenerateRequest
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.engines.contract import until

CHAT = "/v1/chat/completions"


@dataclass
class Control:
    """Holds the fake engine back at a token, or makes it fail there; notes what reached it."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    wait_at: int | None = None
    fail_at: int | None = None
    failure: Exception = field(default_factory=lambda: RuntimeError("told to fail"))
    requests: list[GenerateRequest] = field(default_factory=list)

    async def before_token(self, request: GenerateRequest, index: int) -> None:
        if index == 0:
            self.requests.append(request)
        if index == self.wait_at:
            await self.gate.wait()
        if index == self.fail_at:
            raise self.failure


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def engine(control: Control) -> FakeEngine:
    return FakeEngine(max_model_len=200, before_token=control.before_token)


@pytest.fixture
def settings() -> Settings:
    return Settings(engine="fake")


@pytest.fixture
async def client(settings: Settings, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(settings, engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def ask(client: httpx.AsyncClient) -> Ask:
    """Send one chat request: fields by name, `headers` apart; a field given as `...` is left out."""

    async def send(headers: Any = None, **fields: Any) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hello there"}], **fields}
        body = {name: value for name, value in body.items() if value is not ...}
        return await client.post(CHAT, json=body, headers=headers)

    return send


@asynccontextmanager
async def listen(settings: Settings, engine: Engine) -> AsyncIterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(settings, engine), log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


@pytest.fixture
def listening(settings: Settings, engine: FakeEngine) -> AbstractAsyncContextManager[int]:
    """A real server in this loop, and its port."""
    return listen(settings, engine)


def events(text: str) -> list[Any]:
    """The data of every event, the last one `[DONE]` if the stream is complete."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error in `response`, after checking its shape, status and code."""
    body = response.json()
    assert response.status_code == status, body
    assert list(body) == ["error"] and sorted(body["error"]) == ["code", "message", "param", "type"]
    assert body["error"]["code"] == code, body
    error: dict[str, Any] = body["error"]
    return error
