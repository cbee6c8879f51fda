"""What a trace says of a request for an answer: one span, with its level and, as events, its phases.

Knows outputs, the fields of a request and its entry for the audit log. Knows no OpenTelemetry: what has
become of a request is a `Span`, given to a function when all is over. No text of prompts or answers is in it.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import request_ids
from server.audit import Entry, entry_of
from server.engines.base import Output
from server.errors import ClientDisconnectedError, kind_of
from server.schemas import AnswerRequest, ChatCompletionRequest

SCOPE_KEY: Final = "neurontune.trace"
# A span keeps 128 events unless told otherwise; an answer has three.
MAX_TRACED_CHOICES: Final = 32

OPERATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
)
REQUEST_FIELDS: Final = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")

Value = str | bool | int | float | Sequence[str]


@dataclass(frozen=True, slots=True)
class Event:
    """Something within a span; times are nanoseconds since 1970."""

    name: str
    at: int
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Span:
    """One request that is over. `headers` say which trace it belongs to; `error`: the code that it failed
    with."""

    name: str
    begun: int
    ended: int
    headers: Mapping[str, str]
    attributes: Mapping[str, Value]
    events: Sequence[Event]
    error: str | None


Export = Callable[[Span], None]
"""Takes a span, at once."""


@dataclass
class _Phases:
    """When one answer was handed to the engine, and when its first and last token came, by
    `time.perf_counter`; `queued` are seconds."""

    begun: float
    queued: float | None = None
    first: float | None = None
    last: float | None = None


@dataclass
class Trace:
    """What is known of a request's phases and fields so far. Those who learn something write it here."""

    model: str
    operation: str
    begun: float = field(default_factory=time.perf_counter)
    begun_at: int = field(default_factory=time.time_ns)
    asked: dict[str, Value] = field(default_factory=dict)
    phases: dict[int, _Phases] = field(default_factory=dict)
    first_chunk: float | None = None

    def read(self, body: AnswerRequest) -> None:
        """The fields of the request that a span tells."""
        given = {name: getattr(body, name) for name in REQUEST_FIELDS}
        limit = body.max_completion_tokens if isinstance(body, ChatCompletionRequest) else None
        given["max_tokens"] = getattr(body, "max_tokens", None) if limit is None else limit
        given["choice.count"] = body.n if body.num_choices > 1 else None
        given["stream"] = body.stream
        self.asked = {f"gen_ai.request.{name}": value for name, value in given.items() if value is not None}
        self.asked["gen_ai.request.model"] = body.model

    async def observed(
        self, outputs: AsyncGenerator[Output, None], choice: int
    ) -> AsyncGenerator[Output, None]:
        """`outputs` of one answer, whose phases are noted. Closing it closes `outputs`."""
        phases = self.phases[choice] = _Phases(time.perf_counter())
        async with aclosing(outputs):
            async for output in outputs:
                now = time.perf_counter()
                if phases.queued is None:
                    phases.queued = output.queued_seconds
                if output.token_ids or output.finish_reason is not None:
                    phases.first = now if phases.first is None else phases.first
                    phases.last = now
                yield output

    def events(self) -> list[Event]:
        """Of each answer's phases, as far as it got: each begins at its event and has its seconds."""
        found = []
        for choice, phases in sorted(self.phases.items())[:MAX_TRACED_CHOICES]:
            stepped = None if phases.queued is None else phases.begun + phases.queued
            borders = (phases.begun, stepped, phases.first, phases.last)
            for number, name in enumerate(("queue", "prefill", "decode")):
                begin, end = borders[number], borders[number + 1]
                if begin is None:
                    break
                attributes: dict[str, Value] = {"neurontune.choice": choice}
                if end is not None:
                    attributes["neurontune.seconds"] = end - begin
                found.append(Event(f"neurontune.{name}", self.at(begin), attributes))
        return found

    def at(self, moment: float) -> int:
        """A moment of `time.perf_counter` as nanoseconds since 1970."""
        return self.begun_at + round(1e9 * (moment - self.begun))


class Traced:
    """ASGI middleware that hands a span to `export` when a request to a path of `OPERATIONS` is over.
    Whatever `export` raises is logged, and changes nothing."""

    def __init__(self, app: ASGIApp, export: Export, model: str) -> None:
        self._app = app
        self._export = export
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in OPERATIONS:
            await self._app(scope, receive, send)
            return
        trace = scope[SCOPE_KEY] = Trace(self._model, OPERATIONS[scope["path"]])
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                trace.first_chunk = time.perf_counter()
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            entry_of(scope).failed(error)
            raise
        finally:
            try:
                self._export(_span(scope, trace, status))
            except Exception:
                logging.getLogger(__name__).exception("A request could not be traced.")


def trace_of(scope: Scope) -> Trace | None:
    """The trace of a request, where there is one."""
    trace = scope.get(SCOPE_KEY)
    assert trace is None or isinstance(trace, Trace), trace
    return trace


def _span(scope: Scope, trace: Trace, status: int) -> Span:
    entry, headers = entry_of(scope), Headers(scope=scope)
    error, left = entry.error, kind_of(ClientDisconnectedError()).code
    if error is None and len(_finished(entry)) < entry.num_choices:
        error = left
    attributes = {
        "gen_ai.operation.name": trace.operation,
        "gen_ai.provider.name": "neurontune",
        "gen_ai.response.model": trace.model,
        "http.request.method": scope["method"],
        "http.route": scope["path"],
        "http.response.status_code": status,
        "neurontune.request_id": scope.get(request_ids.SCOPE_KEY),
        "error.type": error,
        **trace.asked,
        **_granted(entry),
        **_generated(entry),
    }
    if trace.asked.get("gen_ai.request.stream") and status == 200 and trace.first_chunk is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = trace.first_chunk - trace.begun
    return Span(
        name=f"{trace.operation} {trace.model}",
        begun=trace.begun_at,
        ended=trace.at(time.perf_counter()),
        headers={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
        attributes={name: value for name, value in attributes.items() if value is not None},
        events=trace.events(),
        error=None if error == left else error,
    )


def _granted(entry: Entry) -> dict[str, Value | None]:
    if entry.level is None:
        return {"neurontune.safety_level.asked": entry.level_asked}
    return {
        "neurontune.safety_level.asked": entry.level_asked,
        "neurontune.safety_level.applied": entry.level.name,
        "neurontune.num_safety": entry.level.threshold.num_safety,
        "neurontune.num_utility": entry.level.threshold.num_utility,
        "neurontune.mask_digest": entry.mask,
    }


def _generated(entry: Entry) -> dict[str, Value]:
    if not entry.last:
        return {}
    said = entry.said()
    first = [last for choice, last in entry.last.items() if choice % entry.choices_per_prompt == 0]
    return {
        "gen_ai.usage.input_tokens": said["prompt_tokens"],
        "gen_ai.usage.output_tokens": said["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": sum(last.num_cached_tokens for last in first),
        "gen_ai.response.finish_reasons": _finished(entry),
    }


def _finished(entry: Entry) -> list[str]:
    lasts = (last for _, last in sorted(entry.last.items()))
    return [last.finish_reason for last in lasts if last.finish_reason is not None]
