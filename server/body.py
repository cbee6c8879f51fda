"""Bytes of a request to its checked fields, strictly: bounded, UTF-8, no NaN, no field twice or unknown.

Knows JSON and how to say what is wrong with a field. Knows no route, and the fields only as a schema.
The content type is not asked: `curl -d` sends another one.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from server.errors import (
    ClientDisconnectedError,
    InvalidJSONError,
    InvalidValueError,
    RequestError,
    RequestTooLargeError,
    SlowRequestError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from server.schemas import CONFLICT, UNSUPPORTED

# Each wrong item of a list or object becomes an error of its own; nothing the API has is wider, but tokens.
MAX_WIDTH: Final = 8192
MAX_FIELDS: Final = 256
MAX_ERRORS_SHOWN: Final = 5
MAX_CHARACTERS_SHOWN: Final = 60

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is read of one request, and for how long."""

    max_body_bytes: int = 4 * 2**20
    read_timeout_seconds: float = 30.0
    max_messages: int = 2048


async def read_object(request: Request, bounds: Bounds) -> dict[str, Any]:
    """The JSON object that is the request's body.

    Raises:
        RequestTooLargeError: more than `bounds.max_body_bytes`; the rest is not read.
        SlowRequestError: it took longer than `bounds.read_timeout_seconds` to arrive.
        InvalidJSONError: not UTF-8, not JSON, or not an object.
        InvalidValueError: more messages than `bounds.max_messages`.
        ClientDisconnectedError: the client left before the end.
    """
    try:
        async with asyncio.timeout(bounds.read_timeout_seconds) as limit:
            body = await _read(request, bounds.max_body_bytes)
    except TimeoutError as error:
        assert limit.expired(), error
        raise SlowRequestError(
            f"The request body did not arrive within {bounds.read_timeout_seconds:g} s. Send it at once."
        ) from error
    value = parse_object(body)
    _refuse_wide(value, max(MAX_WIDTH, bounds.max_messages))
    _refuse_many(value.get("messages"), bounds.max_messages)
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as error:
        raise ClientDisconnectedError from error
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"The request body has more than {max_bytes} bytes, the most this server reads. Send less at once."
    )


def _refuse_many(messages: Any, most: int) -> None:
    if isinstance(messages, list) and len(messages) > most:
        raise InvalidValueError(
            f"messages has {len(messages)} entries; at most {most} are accepted. Leave out the oldest.",
            "messages",
        )


def parse_object(body: bytes) -> dict[str, Any]:
    """Read `body` as a JSON object.

    Raises:
        InvalidJSONError: says what is wrong and where.
    """
    if not body.strip():
        raise InvalidJSONError("The request body is empty: send a JSON object.")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise InvalidJSONError(
            f"The request body is not valid UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except json.JSONDecodeError as error:
        raise InvalidJSONError(
            f"The request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise InvalidJSONError("The request body is nested too deeply.") from error
    except ValueError as error:
        raise InvalidJSONError("The request body holds a number with too many digits.") from error
    if not isinstance(value, dict):
        raise InvalidJSONError(f"The request body must be a JSON object, not {_name(value)}.")
    return value


def parse_fields(schema: type[Schema], body: dict[str, Any]) -> Schema:
    """Read the fields of `body` as `schema` has them.

    Raises:
        UnknownParameterError: a field that the API does not have.
        UnsupportedParameterError: a field that is not supported with this value.
        InvalidValueError: a field that is missing, of the wrong type or out of range.
            Of several errors the first decides on the kind and on `param`; the text names up to five.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as failed:
        errors = failed.errors(include_url=False)
        kinds: dict[str, type[RequestError]] = {
            UNSUPPORTED: UnsupportedParameterError,
            "extra_forbidden": UnknownParameterError,
        }
        kind = kinds.get(errors[0]["type"], InvalidValueError)
        text = "; ".join(_sentence(schema, error) for error in errors[:MAX_ERRORS_SHOWN])
        raise kind(f"{text}.", _param(errors[0])) from failed


def _refuse_wide(body: dict[str, Any], most: int) -> None:
    """Raises InvalidValueError where checking the fields would take seconds."""
    if len(body) > MAX_FIELDS:
        raise InvalidValueError(f"The request body has {len(body)} fields, more than any request needs.")
    values = list(body.items())
    while values:
        name, value = values.pop()
        if not isinstance(value, dict | list):
            continue
        if len(value) > most and not (isinstance(value, list) and all(type(each) is int for each in value)):
            raise InvalidValueError(f"{name} holds {_shown(value)}: more than {most} in one place.", name)
        items = value.values() if isinstance(value, dict) else value
        values += [(name, each) for each in items if isinstance(each, dict | list)]


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJSONError(f"{name} is not a JSON number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise InvalidJSONError(f"The field {name!r} is given twice in one object.", name)
        value[name] = item
    return value


def _name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _param(error: ErrorDetails) -> str:
    named = error.get("ctx", {}).get("param")
    return named or ".".join(str(step) for step in error["loc"])


def _sentence(schema: type[BaseModel], error: ErrorDetails) -> str:
    param, kind = _param(error), error["type"]
    if kind == "missing":
        return f"{param} is required"
    if kind == "extra_forbidden":
        fields = ", ".join(schema.model_fields)
        accepted = f" (accepted: {fields})" if len(error["loc"]) == 1 else ""
        return f"{param} is not a field of this API{accepted}"
    if kind == CONFLICT:
        return error["msg"]
    said = error["msg"].replace("Input should", "should")
    return f"{param} {said}, not {_shown(error['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= MAX_CHARACTERS_SHOWN else f"{text[:MAX_CHARACTERS_SHOWN]}..."
