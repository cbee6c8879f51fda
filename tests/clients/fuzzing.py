"""Hooks of schemathesis: what it makes up reaches the engine, and asks it for little.

Most names are no model and most texts no level: left alone, nearly every request would be a 404 or a 400.
"""

from typing import Any

import schemathesis

MODELS = ("demo", "demo@off", "demo@7")
LEVELS = ("off", "balanced", "security-critical", "7")
MAX_CHOICES = 3
MAX_TOKENS = 8


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """Name the model served, and ask for few and short answers, where a field has a value of its type."""
    if not isinstance(body, dict) or not isinstance(name := body.get("model"), str):
        return body
    body["model"] = MODELS[len(name) % len(MODELS)]
    if _is_count(body.get("n")) and 1 <= body["n"] <= 128:
        body["n"] = 1 + body["n"] % MAX_CHOICES
    for limit in ("max_tokens", "max_completion_tokens"):
        if _is_count(body.get(limit)) and body[limit] > MAX_TOKENS:
            body[limit] = 1 + body[limit] % MAX_TOKENS
    if "messages" in body and not (body.get("max_tokens") or body.get("max_completion_tokens")):
        body["max_completion_tokens"] = MAX_TOKENS
    if len(name) % 2 == 0:
        _make_consistent(body)
    return body


def _make_consistent(body: dict[str, Any]) -> None:
    """Mend what only fields together get wrong: no schema says it. Leave out what few engines do."""
    for name in ("tools", "tool_choice", "response_format", "chat_template_kwargs"):
        body.pop(name, None)
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("max_tokens") and body.get("max_completion_tokens"):
        del body["max_tokens"]
    if body.get("safety_level") is not None:
        body["safety_level"] = body["model"].partition("@")[2] or "off"
    for message in body.get("messages") or () if isinstance(body.get("messages"), list) else ():
        if isinstance(message, dict):
            message.pop("tool_calls", None)
            if message.get("role") == "tool":
                message["tool_call_id"] = "call_1"
            else:
                message.pop("tool_call_id", None)
            message["content"] = message.get("content") or "Hello"


@schemathesis.hook
def map_headers(_context: Any, headers: Any) -> Any:
    """Most levels are levels, and some are not given."""
    if headers and isinstance(level := headers.get("X-Safety-Level"), str) and len(level) % 4:
        headers["X-Safety-Level"] = LEVELS[len(level) % len(LEVELS)]
        if len(level) % 2:
            del headers["X-Safety-Level"]
    return headers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
