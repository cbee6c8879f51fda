"""`POST /v1/chat/completions`: from a request to an engine's outputs and back.

Knows the order of things: read, find the level, ask the engine, answer. Knows no engine but its protocol.
"""

import time
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modulation.levels import SafetyLevel
from server.access import AskedLevel, grant
from server.body import parse_fields, read_object
from server.engines.base import Engine, EngineInfo
from server.errors import LevelDeniedError, ModelNotFoundError, UnknownParameterError
from server.metrics import Metrics
from server.schemas import ChatCompletionRequest
from server.streaming import Answer, EventStream, unless_disconnected


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions put where they are referred to: it stands inside a larger document."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(definitions[part["$ref"].rpartition("/")[2]])
        return {name: resolve(value) for name, value in part.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


LEVEL_HEADER: Final = "X-Safety-Level"
NEURONS_HEADER: Final = "X-Safety-Neurons"
MASK_HEADER: Final = "X-Safety-Mask"

_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inlined(ChatCompletionRequest.model_json_schema())}},
    },
    "parameters": [
        {
            "name": LEVEL_HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "A safety level's name, or a whole number of safety neurons.",
        }
    ],
}


def chat_router(engine: Engine, metrics: Metrics, model: str, default: SafetyLevel) -> APIRouter:
    """The route. `model` is the id served, `default` the level of a request that names none."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=_BODY)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation at the safety level that the request asks for."""
        arrived = time.perf_counter()
        _refuse_query(request)
        chat = parse_fields(ChatCompletionRequest, await read_object(request))
        info = engine.describe()
        asked = _asked_levels(request, chat, model, info)
        try:
            granted = grant(info.levels, asked, default)
        except LevelDeniedError as error:
            metrics.denied(error)
            raise
        metrics.granted(info.levels, granted)
        headers = _level_headers(granted.level, info)
        answer = Answer(chat.model, f"neurontune-{info.mask_digest}")
        outputs = metrics.measured(engine.generate(chat.to_engine(granted.level.threshold)), arrived)
        if chat.stream:
            include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
            events = answer.events(outputs, include_usage=include_usage)
            return EventStream(outputs, events, headers)
        async with aclosing(outputs):
            body = await unless_disconnected(request.receive, answer.whole(outputs))
        return JSONResponse(body, headers=headers)

    return router


def _refuse_query(request: Request) -> None:
    for name in request.query_params:
        raise UnknownParameterError(
            f"{request.url.path} takes no query parameter {name!r}: parameters go into the body.", name
        )


def _asked_levels(
    request: Request, chat: ChatCompletionRequest, model: str, info: EngineInfo
) -> list[AskedLevel]:
    """Every level that the request names: header, body and model suffix, in order of precedence."""
    asked: list[tuple[str, str, Any]] = [
        (f"header {LEVEL_HEADER}", LEVEL_HEADER, value) for value in request.headers.getlist(LEVEL_HEADER)
    ]
    if chat.safety_level is not None:
        asked.append(("body field safety_level", "safety_level", chat.safety_level))
    suffix = _level_suffix(chat.model, model, info)
    if suffix is not None:
        asked.append((f"model name {chat.model!r}", "model", suffix))
    return [AskedLevel(*one) for one in asked]


def _level_suffix(name: str, model: str, info: EngineInfo) -> str | None:
    if name == model:
        return None
    if not name.startswith(f"{model}@"):
        aliases = ", ".join(f"{model}@{level}" for level in info.levels.names)
        raise ModelNotFoundError(
            f"The model {name!r} is not served here. Accepted: {model}, {aliases}, "
            f"or {model}@ and a whole number of safety neurons.",
            "model",
        )
    return name.removeprefix(f"{model}@")


def _level_headers(level: SafetyLevel, info: EngineInfo) -> dict[str, str]:
    threshold = level.threshold
    return {
        LEVEL_HEADER: level.name,
        NEURONS_HEADER: f"{threshold.num_safety},{threshold.num_utility}",
        MASK_HEADER: info.mask_digest,
    }
