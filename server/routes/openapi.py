"""What the OpenAPI document says of the routes: bodies, headers, answers and errors.

Knows schemas and the table of errors. Knows no route. Definitions are put where they are referred to: each
schema stands inside a larger document.
"""

from typing import Any, Final, Literal

from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from server.errors import ERRORS

ANSWERS: Final[dict[str, type[BaseModel]]] = {"ChatCompletion": ChatCompletion, "Completion": Completion}

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, what is accepted, the way out."},
                "type": {"type": "string", "enum": sorted({kind.type for kind in ERRORS.values()})},
                "param": {"type": ["string", "null"], "description": "The path of what is wrong."},
                "code": {"type": "string", "enum": sorted({kind.code for kind in ERRORS.values()})},
            },
        }
    },
}
_LEVEL: Final = {
    "name": "X-Safety-Level",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "A safety level's name, or a whole number of safety neurons.",
}
_TIMEOUT: Final = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "Seconds that the request may take, waiting included; the server has a limit of its own.",
}
_APPLIED: Final = {
    "X-Safety-Level": "The level that was applied: its name, or the number.",
    "X-Safety-Neurons": "How many safety and utility neurons were active, with a comma between.",
    "X-Safety-Mask": "The digest of the mask in force.",
}
TEXT: Final[dict[str, Any]] = {"type": "string"}
COUNT: Final[dict[str, Any]] = {"type": "integer", "minimum": 0}
TEXTS: Final[dict[str, Any]] = {"type": ["array", "null"], "items": TEXT}
COUNTS: Final[dict[str, Any]] = {"type": "array", "items": COUNT}


def answering(body: type[BaseModel], answer: Literal["ChatCompletion", "Completion"]) -> dict[str, Any]:
    """Arguments of a route that generates: its body, its header, its answers."""
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _APPLIED.items()}
    content = {
        "application/json": {"schema": inlined(ANSWERS[answer].model_json_schema())},
        # No schema: OpenAPI 3.1 has none for the events of a stream.
        "text/event-stream": {"example": 'data: {"object": "…"}\n\ndata: [DONE]\n\n'},
    }
    answered = {
        "description": "The answer; with `stream`, as events.",
        "headers": headers,
        "content": content,
    }
    return {
        "openapi_extra": _body(body) | {"parameters": [_LEVEL, _TIMEOUT]},
        "responses": {200: answered, **failing(400, 401, 403, 404, 408, 413, 429, 500, 503)},
    }


def reading(body: type[BaseModel], **properties: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a route that reads a body and generates nothing: it answers with these properties."""
    return {
        "openapi_extra": _body(body),
        "responses": telling(400, 401, 404, 408, 413, 429, 503, **properties),
    }


def telling(*statuses: int, **properties: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that tells something: an object with these properties; or it fails so."""
    schema = {"type": "object", "required": list(properties), "properties": properties}
    answered = {"description": "What is so now.", "content": {"application/json": {"schema": schema}}}
    return {200: answered, **failing(*statuses, 500)}


def listed(**properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of objects that have these properties."""
    return {
        "type": "array",
        "items": {"type": "object", "required": list(properties), "properties": properties},
    }


def failing(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that fails in these ways."""
    return {
        status: {
            "description": ", ".join(
                dict.fromkeys(f"`{kind.code}`" for kind in ERRORS.values() if kind.status == status)
            ),
            "content": {"application/json": {"schema": _ERROR}},
        }
        for status in statuses
    }


def _body(body: type[BaseModel]) -> dict[str, Any]:
    schema = inlined(body.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions put where they are referred to."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(definitions[part["$ref"].rpartition("/")[2]])
        # A discriminator maps to definitions that are no longer there; its branches say the same.
        return {name: resolve(value) for name, value in part.items() if name != "discriminator"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
