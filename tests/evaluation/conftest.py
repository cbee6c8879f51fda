"""Real servers on the loopback for commands that ask one: ours on the fake engine, and scripted ones."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.app import create_app
from server.engines.base import GenerateRequest
from server.engines.fake import FakeEngine
from server.settings import Settings


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve `app` from a thread; its address. Requests that come before it is ready wait in the socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Asked:
    """One request that a scripted server got."""

    messages: list[dict[str, str]]
    headers: Any
    body: dict[str, Any]


@dataclass
class Scripted:
    """A server that answers as `reply` says: a text, or a whole response."""

    reply: Callable[[Asked], str | Response]
    asked: list[Asked] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(Asked(body["messages"], request.headers, body))
        reply = self.reply(self.asked[-1])
        return reply if isinstance(reply, Response) else completion(reply, self.headers)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])


def completion(text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    message = {"role": "assistant", "content": text}
    return JSONResponse({"choices": [{"index": 0, "message": message}]}, headers=headers)


@dataclass
class Ours:
    """Our server on the fake engine: its address and the requests that reached the engine."""

    url: str
    requests: list[GenerateRequest]


@pytest.fixture
def ours() -> Iterator[Ours]:
    requests: list[GenerateRequest] = []

    async def before_token(request: GenerateRequest, index: int) -> None:
        if index == 0:
            requests.append(request)

    engine = FakeEngine(max_model_len=400, before_token=before_token)
    with serving(create_app(Settings(engine="fake"), engine)) as url:
        yield Ours(url, requests)
