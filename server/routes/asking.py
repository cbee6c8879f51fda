"""What every route that generates does: read the level that a request asks for, and answer it.

Knows the order of things. Knows no engine but its protocol, and no kind of answer.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from modulation.levels import SafetyLevel
from server.access import AskedLevel, admitted_names, grant, may_use_model
from server.admission import estimated_tokens
from server.answers import Answers
from server.audit import entry_of
from server.body import Bounds
from server.callers import Caller, caller_of
from server.choices import merged
from server.engines.base import Engine, EngineInfo, GenerateRequest, Output
from server.errors import LevelDeniedError, ModelNotFoundError, UnknownParameterError
from server.metrics import Metrics, level_label
from server.request_ids import REQUEST_ID_HEADER
from server.schemas import AnswerRequest
from server.stops import until_stop
from server.streaming import EventStream, unless_disconnected
from server.tracing import Trace, trace_of
from server.visits import Gate, visit_of

LEVEL_HEADER: Final = "X-Safety-Level"
NEURONS_HEADER: Final = "X-Safety-Neurons"
MASK_HEADER: Final = "X-Safety-Mask"
# What headers tell beyond the standard ones; where CORS is on, pages of other origins may read them.
TELLING_HEADERS: Final = (LEVEL_HEADER, NEURONS_HEADER, MASK_HEADER, REQUEST_ID_HEADER, "Retry-After")


@dataclass(frozen=True)
class Asking:
    """What the routes that generate share. `model` is the id served, `default` the level of a request that
    names none."""

    engine: Engine
    metrics: Metrics
    model: str
    default: SafetyLevel
    gate: Gate
    bounds: Bounds

    def granted(self, request: Request, body: AnswerRequest, info: EngineInfo) -> SafetyLevel:
        """The level that the request gets. Raises LevelDeniedError and ModelNotFoundError."""
        if (trace := trace_of(request.scope)) is not None:
            trace.read(body)
        entry = entry_of(request.scope)
        entry.named(body.model)
        asked = _asked_levels(request, body, self.model, info)
        entry.asked([one.value for one in asked])
        try:
            # Read anew: another mask may have another threshold under the same name.
            default = info.levels.parse(self.default.name)
            granted = grant(info.levels, asked, default, caller_of(request.scope))
        except LevelDeniedError as error:
            self.metrics.denied(error)
            raise
        self.metrics.granted(info.levels, granted)
        entry.granted(granted.level, info.mask_digest)
        return granted.level

    async def answer(
        self,
        request: Request,
        body: AnswerRequest,
        wanted: Sequence[GenerateRequest],
        answers: Answers,
        level: SafetyLevel,
        info: EngineInfo,
        arrived: float,
    ) -> Response:
        """Generate what is wanted and answer with it, whole or as a stream. `info` is what the level was
        granted with; `arrived` is of `time.perf_counter`."""
        headers = _level_headers(level, info)
        # The mask may be swapped meanwhile; a threshold means what it means under its own.
        adapter = asked_model(body.model, self.model, info, caller_of(request.scope)).adapter
        wanted = [replace(each, mask_digest=info.mask_digest, adapter=adapter) for each in wanted]
        outputs = entry_of(request.scope).observed(
            merged(await self._admitted(request, body, wanted, arrived, level_label(info.levels, level))),
            [each.prompt for each in wanted[:: body.num_choices]],
            body.num_choices,
        )
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(outputs, answers.events(outputs, include_usage=include_usage), headers)
        async with aclosing(outputs):
            whole = await unless_disconnected(request.receive, answers.whole(outputs))
        return Response(whole, headers=headers, media_type="application/json")

    async def _admitted(
        self,
        request: Request,
        body: AnswerRequest,
        wanted: Sequence[GenerateRequest],
        arrived: float,
        label: str,
    ) -> list[AsyncGenerator[Output, None]]:
        """What is wanted, once there is a place for all of it."""
        visit, longest = visit_of(request.scope), self.engine.describe().max_model_len
        trace = trace_of(request.scope)
        num_tokens = [estimated_tokens(each.prompt, longest) for each in wanted]
        await visit.take(num_tokens, body.num_choices)
        return [
            visit.counted(
                self._outputs(number, each, body.stop or (), arrived, label, trace),
                num_tokens[number],
                is_charged_prompt=number % body.num_choices == 0,
            )
            for number, each in enumerate(wanted)
        ]

    def _outputs(
        self,
        number: int,
        request: GenerateRequest,
        stops: Sequence[str],
        arrived: float,
        label: str,
        trace: Trace | None,
    ) -> Any:
        outputs = self.engine.generate(request)
        measured = self.metrics.measured(until_stop(outputs, stops) if stops else outputs, arrived, label)
        return measured if trace is None else trace.observed(measured, number)


def clock() -> float:
    """When a request arrived, in seconds as `Asking.answer` takes them."""
    return time.perf_counter()


def refuse_query(request: Request) -> None:
    """A query parameter would be ignored."""
    for name in request.query_params:
        raise UnknownParameterError(
            f"{request.url.path} takes no query parameter {name!r}: parameters go into the body.", name
        )


def fingerprint(info: EngineInfo) -> str:
    """`system_fingerprint`: whose equality means that equal requests with equal seeds are answered alike."""
    return f"neurontune-{info.mask_digest}"


@dataclass(frozen=True, slots=True)
class AskedModel:
    """What a model's name says: an adapter of the model served, and the level behind the `@`."""

    adapter: str | None
    level: str | None


def asked_model(name: str | None, model: str, info: EngineInfo, caller: Caller) -> AskedModel:
    """What `name` says; None says the model served. Raises ModelNotFoundError for a model that is not served,
    or not to the caller."""
    if name is None:
        name = model
    for served in served_models(model, info):
        if (name == served or name.startswith(f"{served}@")) and may_use_model(caller, served):
            level = name[len(served) + 1 :] if name != served else None
            return AskedModel(None if served == model else served, level)
    allowed = [served for served in served_models(model, info) if may_use_model(caller, served)]
    if not allowed:
        raise ModelNotFoundError(
            f"The model {name!r} is not served to {caller.name!r}: the model served here is none of this "
            "key's models in the key file.",
            "model",
        )
    levels = admitted_names(info.levels, caller)
    accepted = ", ".join(each for one in allowed for each in (one, *(f"{one}@{level}" for level in levels)))
    raise ModelNotFoundError(
        f"The model {name!r} is not served here. Accepted: {accepted}, "
        f"or {allowed[0]}@ and a whole number of safety neurons.",
        "model",
    )


def served_models(model: str, info: EngineInfo) -> tuple[str, ...]:
    """What may be asked for, levels aside: the model, and adapters on it."""
    return (model, *info.adapters)


def _asked_levels(request: Request, body: AnswerRequest, model: str, info: EngineInfo) -> list[AskedLevel]:
    """Every level that the request names: header, body and model suffix, in order of precedence."""
    asked: list[tuple[str, str, Any]] = [
        (f"header {LEVEL_HEADER}", LEVEL_HEADER, value) for value in request.headers.getlist(LEVEL_HEADER)
    ]
    if body.safety_level is not None:
        asked.append(("body field safety_level", "safety_level", body.safety_level))
    named = asked_model(body.model, model, info, caller_of(request.scope))
    if named.level is not None:
        asked.append((f"model name {body.model!r}", "model", named.level))
    return [AskedLevel(*one) for one in asked]


def _level_headers(level: SafetyLevel, info: EngineInfo) -> dict[str, str]:
    threshold = level.threshold
    return {
        LEVEL_HEADER: level.name,
        NEURONS_HEADER: f"{threshold.num_safety},{threshold.num_utility}",
        MASK_HEADER: info.mask_digest,
    }
