"""Answers on their way to a client: one JSON body or a stream of events, and what happens if it leaves.

Knows OpenAI's answer shapes, server-sent events and disconnects. Knows no level, no field, no metric.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.engines.base import EngineError, GenerationError, Output
from server.errors import ClientDisconnectedError, error_body

DONE: Final = b"data: [DONE]\n\n"
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


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer have in common."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, outputs: AsyncGenerator[Output, None]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text, last = [], None
        async for last in outputs:
            text.append(last.text)
        last = _ended(last)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        return self._shape("chat.completion") | {"choices": [choice], "usage": usage(last)}

    async def events(
        self, outputs: AsyncGenerator[Output, None], *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The same answer as events. The first one comes after the first output, never before.

        So what the engine refuses at once is raised from the first `anext`; what fails later is an
        event, the last one, and not followed by `[DONE]`.
        """
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        last: Output | None = None
        try:
            async for output in outputs:
                if last is None:
                    yield self._chunk({"role": "assistant", "content": ""}, None, extra)
                last = output
                if output.text:
                    yield self._chunk({"content": output.text}, None, extra)
            last = _ended(last)
        except Exception as error:
            if last is None:
                raise
            if not isinstance(error, EngineError):
                logging.getLogger(__name__).exception("A stream failed.")
            yield event(error_body(error))
            return
        yield self._chunk({}, last.finish_reason, extra)
        if include_usage:
            yield event(self._shape("chat.completion.chunk") | {"choices": [], "usage": usage(last)})
        yield DONE

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None, extra: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self._shape("chat.completion.chunk") | {"choices": [choice]} | extra)

    def _shape(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def _ended(last: Output | None) -> Output:
    if last is None or last.finish_reason is None:
        raise GenerationError("The engine ended this answer without saying why.")
    return last


def usage(last: Output) -> dict[str, int]:
    """OpenAI's token counts, as the last output has them."""
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_completion_tokens,
        "total_tokens": last.num_prompt_tokens + last.num_completion_tokens,
    }


def event(data: dict[str, Any]) -> bytes:
    """`data` as one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """A response that owns the outputs it streams: however it ends, it closes them.

    The status is sent with the first event, so what the first one raises is answered as an error.
    """

    def __init__(
        self,
        outputs: AsyncGenerator[Output, None],
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
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
