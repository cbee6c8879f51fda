"""What can go wrong with a request, and the one table of how each kind is answered.

Knows kinds of errors, their status and OpenAI's error shape. Knows no route, no engine, no field.

RequestError                    the caller's mistake; `param` is the path of what is wrong
├── InvalidJSONError            the body is not a JSON object
├── RequestTooLargeError        the body has too many bytes
├── SlowRequestError            the body did not arrive in time
├── InvalidValueError           a known field with a value that is not accepted
├── UnknownParameterError       a field that no version of the API has
├── AmbiguousLengthError        the request says twice how long it is
├── ForeignHostError            sent to a name that is not this server's
├── ForeignOriginError          sent by a web page of another origin
├── UnsupportedParameterError   a field of the API that is not supported with this value
├── LevelDeniedError            the safety level asked for is not given
│   ├── InvalidLevelError       unknown, malformed or too large
│   ├── LevelConflictError      header, body and model suffix do not ask for the same
│   └── LevelForbiddenError     less safe than the caller's floor
├── AuthenticationError         no caller: 401
│   ├── MissingKeyError         no key was sent
│   ├── InvalidKeyError         the key is not one of ours, or not sent as one
│   └── ExpiredKeyError         it was one of ours
├── AdminRequiredError          the caller's role is not admin
├── InvalidMaskError            a mask that cannot be put in force
├── ModelNotFoundError          no such model here
├── RouteNotFoundError          no such path
└── MethodNotAllowedError       the path exists, the method does not
RefusedError                    not now: may be asked again after some seconds
├── OverloadedError             no place is free
│   └── ConnectionsError        no connection is free
├── RateLimitError              the caller has used up its minute
└── ShuttingDownError           the server is on its way out
DeadlineExceededError           the request's time is over
ClientDisconnectedError         nobody is left to answer
SettingsError                   the operator's mistake, at start; a NeuronTuneError
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

from modulation.errors import LevelError, NeuronTuneError
from server.engines.base import (
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    GrammarError,
    PromptError,
    PromptTooLongError,
    UnsupportedByEngineError,
)


class RequestError(Exception):
    """A request that cannot be answered as it stands. Its text is fit for users."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidJSONError(RequestError):
    """The body is not a JSON object in UTF-8."""


class RequestTooLargeError(RequestError):
    """The body has more bytes than this server reads."""


class SlowRequestError(RequestError):
    """The body did not arrive in the time that this server reads for."""


class InvalidValueError(RequestError):
    """A field has a value of the wrong type, out of range, or is missing."""


class UnknownParameterError(RequestError):
    """A field, or a query parameter, that does not exist."""


class UnsupportedParameterError(RequestError):
    """A field of OpenAI's API with a value that would change the answer, and that we cannot honour."""


class AmbiguousLengthError(RequestError):
    """The request has two headers that say where it ends, and they need not agree."""


class ForeignHostError(RequestError):
    """The request was sent to a name that is not this server's."""


class ForeignOriginError(RequestError):
    """The request was sent by a web page that is not this server's, nor of an origin that may."""


class LevelDeniedError(RequestError):
    """The level asked for is not given. `reason` counts it in the metrics."""

    reason: ClassVar[Literal["invalid", "conflict", "forbidden"]]


class InvalidLevelError(LevelDeniedError):
    """The level is unknown, malformed or larger than the mask."""

    reason = "invalid"


class LevelConflictError(LevelDeniedError):
    """The request names its level more than once, and not the same one."""

    reason = "conflict"


class LevelForbiddenError(LevelDeniedError):
    """The level is less safe than the caller may ask for, or cannot be compared with that."""

    reason = "forbidden"


class AuthenticationError(RequestError):
    """Nobody knows who asks."""


class MissingKeyError(AuthenticationError):
    """The request came without a key."""


class InvalidKeyError(AuthenticationError):
    """The key is not known, or it did not come as one bearer token."""


class ExpiredKeyError(AuthenticationError):
    """The key's time is over. Told apart from an unknown key: only who has the key can learn it."""


class AdminRequiredError(RequestError):
    """Only an admin may do this."""


class ModelNotFoundError(RequestError):
    """The model named is not the one served."""


class RouteNotFoundError(RequestError):
    """No route has this path."""


class MethodNotAllowedError(RequestError):
    """The route does not take this method."""


class InvalidMaskError(RequestError):
    """A mask that cannot be put in force; the one in force stays."""


class RefusedError(Exception):
    """A request that may be answered later. Its text is fit for users, `reason` counts it in the metrics.

    `headers` go with the answer: when to come again, and what else the client should know.
    """

    reason: ClassVar[Literal["overloaded", "connections", "rate_limit", "shutting_down"]]

    def __init__(self, message: str, retry_seconds: int = 1) -> None:
        super().__init__(message)
        self.param = None
        self.headers: dict[str, str] = {"retry-after": str(retry_seconds)}


class OverloadedError(RefusedError):
    """No place is free for this request, or too many tokens wait already."""

    reason: ClassVar[Literal["overloaded", "connections"]] = "overloaded"


class ConnectionsError(OverloadedError):
    """There are as many connections as this server takes."""

    reason = "connections"


class RateLimitError(RefusedError):
    """The caller has used up its requests or its tokens of this minute."""

    reason = "rate_limit"

    def __init__(
        self, message: str, retry_seconds: int = 1, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(message, retry_seconds)
        self.headers |= headers


class ShuttingDownError(RefusedError):
    """The server is on its way out and takes nothing new."""

    reason = "shutting_down"


class DeadlineExceededError(Exception):
    """A request took longer than it may. Its text is fit for users."""


class ClientDisconnectedError(Exception):
    """The client went away before its answer was complete. No client ever sees this one."""


class SettingsError(NeuronTuneError):
    """A setting that cannot be used, or a variable that is none. The server does not start."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How a kind of error is answered: HTTP status, and OpenAI's `type` and `code`."""

    status: int
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    code: str


INTERNAL_ERROR: Final = ErrorKind(500, "server_error", "internal_error")

ERRORS: Final[Mapping[type[Exception], ErrorKind]] = MappingProxyType(
    {
        InvalidJSONError: ErrorKind(400, "invalid_request_error", "invalid_json"),
        InvalidValueError: ErrorKind(400, "invalid_request_error", "invalid_value"),
        UnknownParameterError: ErrorKind(400, "invalid_request_error", "unknown_parameter"),
        UnsupportedParameterError: ErrorKind(400, "invalid_request_error", "unsupported_parameter"),
        AmbiguousLengthError: ErrorKind(400, "invalid_request_error", "ambiguous_length"),
        ForeignHostError: ErrorKind(403, "invalid_request_error", "host_not_allowed"),
        ForeignOriginError: ErrorKind(403, "invalid_request_error", "origin_not_allowed"),
        InvalidLevelError: ErrorKind(400, "invalid_request_error", "invalid_safety_level"),
        LevelError: ErrorKind(400, "invalid_request_error", "invalid_safety_level"),
        LevelConflictError: ErrorKind(400, "invalid_request_error", "safety_level_conflict"),
        PromptError: ErrorKind(400, "invalid_request_error", "invalid_prompt"),
        PromptTooLongError: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
        GrammarError: ErrorKind(400, "invalid_request_error", "invalid_grammar"),
        UnsupportedByEngineError: ErrorKind(400, "invalid_request_error", "unsupported_parameter"),
        MissingKeyError: ErrorKind(401, "invalid_request_error", "missing_api_key"),
        InvalidKeyError: ErrorKind(401, "invalid_request_error", "invalid_api_key"),
        ExpiredKeyError: ErrorKind(401, "invalid_request_error", "expired_api_key"),
        LevelForbiddenError: ErrorKind(403, "invalid_request_error", "safety_level_forbidden"),
        AdminRequiredError: ErrorKind(403, "invalid_request_error", "admin_required"),
        InvalidMaskError: ErrorKind(400, "invalid_request_error", "invalid_mask"),
        ModelNotFoundError: ErrorKind(404, "invalid_request_error", "model_not_found"),
        RouteNotFoundError: ErrorKind(404, "invalid_request_error", "route_not_found"),
        MethodNotAllowedError: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
        SlowRequestError: ErrorKind(408, "invalid_request_error", "request_timeout"),
        RequestTooLargeError: ErrorKind(413, "invalid_request_error", "request_too_large"),
        OverloadedError: ErrorKind(429, "rate_limit_error", "server_overloaded"),
        EngineBusyError: ErrorKind(429, "rate_limit_error", "server_overloaded"),
        RateLimitError: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
        ClientDisconnectedError: ErrorKind(499, "invalid_request_error", "client_disconnected"),
        GenerationError: ErrorKind(500, "server_error", "generation_failed"),
        Exception: INTERNAL_ERROR,
        EngineUnavailableError: ErrorKind(503, "server_error", "engine_unavailable"),
        ShuttingDownError: ErrorKind(503, "server_error", "shutting_down"),
        DeadlineExceededError: ErrorKind(408, "invalid_request_error", "deadline_exceeded"),
    }
)


def kind_of(error: Exception) -> ErrorKind:
    """The entry of the table for the nearest class of `error`."""
    return next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)


def error_body(error: Exception) -> dict[str, Any]:
    """`error` in OpenAI's shape. What is not in the table says nothing of its cause."""
    kind = kind_of(error)
    known = kind is not INTERNAL_ERROR
    message = str(error) if known else "The server failed on this request. The cause is in its log."
    return {
        "error": {
            "message": message,
            "type": kind.type,
            "param": getattr(error, "param", None) if known else None,
            "code": kind.code,
        }
    }
