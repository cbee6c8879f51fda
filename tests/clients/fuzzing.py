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
    return body


@schemathesis.hook
def map_headers(_context: Any, headers: Any) -> Any:
    """Three in four levels are levels."""
    if headers and isinstance(level := headers.get("X-Safety-Level"), str) and len(level) % 4:
        headers["X-Safety-Level"] = LEVELS[len(level) % len(LEVELS)]
    return headers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
