"""What the soak asks: who may ask, what is right and what is wrong, and how the wrong must be answered.

Knows the API's fields, keys and errors. Knows no connection and no answer.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.wire import Raw
from server.keys import hash_of

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
ADMIN_MASK: Final = "/admin/mask"
GENERATING: Final = (CHAT, COMPLETIONS)

ROOT, HELD, FREE, EXPIRED, GUEST = "root", "held", "free", "expired", "guest"
"""Keys: an admin's, one with the floor `balanced`, one without, one that is over, one that comes and goes."""
ENTRIES: Final[Mapping[str, Mapping[str, str]]] = {
    ROOT: {"role": "admin", "floor": "off"},
    HELD: {"floor": "balanced"},
    FREE: {"floor": "off"},
    EXPIRED: {"floor": "off", "expires": "2020-01-01T00:00:00Z"},
    GUEST: {},
}

LEVELS: Final = ("off", "utility-priority", "balanced", "security-critical", "5")
ADMITTED: Final = ("balanced", "security-critical")
BELOW_FLOOR: Final = ("off", "utility-priority", "3")
DEFAULT: Final = "balanced"
SOURCES: Final = ("header", "body", "model")
PROMPTS: Final[Mapping[str, tuple[str, ...]]] = {
    CHAT: ("How do I bake bread?", "How do I mend a bicycle?", "How do I kill weeds?", "What is a lock?"),
    COMPLETIONS: ("How do I plan a garden,", "The best way to clean a"),
}
MAX_TOKENS: Final = 32
MAX_BODY_BYTES: Final = 2**16
MAX_MESSAGES: Final = 64


@dataclass(frozen=True)
class Asked:
    """A request for an answer. `level` None: the default; `greedy`: to be judged word by word."""

    path: str
    prompt: str
    level: str | None = None
    source: str = "body"
    key: str = FREE
    num_tokens: int = MAX_TOKENS
    num_choices: int = 1
    stream: bool = False
    logprobs: bool = True
    greedy: bool = True

    @property
    def kind(self) -> str:
        """What the report counts it as."""
        name = "chat" if self.path == CHAT else "completion"
        return f"{name}{', streamed' if self.stream else ''}{', n > 1' if self.num_choices > 1 else ''}"

    def body(self) -> dict[str, Any]:
        is_chat, suffix = self.path == CHAT, f"@{self.level}" if self.level and self.source == "model" else ""
        body: dict[str, Any] = {"model": f"demo{suffix}", "max_tokens": self.num_tokens}
        if is_chat:
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        body |= {"temperature": 0} if self.greedy else {"temperature": 1, "seed": 1}
        if self.num_choices > 1:
            body["n"] = self.num_choices
        if self.logprobs:
            body["logprobs"] = True if is_chat else 0
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.level and self.source == "body":
            body["safety_level"] = self.level
        return body

    def raw(self) -> Raw:
        headers = {"X-Safety-Level": self.level} if self.level and self.source == "header" else {}
        return post(self.path, self.body(), self.key, headers)


@dataclass(frozen=True)
class Wrong:
    """A request that must be refused with this status and code. `key`: whose it is; None: nobody's."""

    kind: str
    status: int
    code: str
    raw: Raw
    key: str | None = FREE


def key_of(name: str) -> str:
    """The key itself; what `hash_of` makes of it stands in the key file."""
    return f"nt-the-key-of-{name}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


def write_keys(path: Path, *names: str) -> None:
    """A key file of these names."""
    keys = [{"name": name, "hash": hash_of(key_of(name).encode()), **ENTRIES[name]} for name in names]
    path.write_text(yaml.safe_dump({"keys": keys}))


def post(path: str, body: Any, key: str | None, headers: Mapping[str, str] | None = None) -> Raw:
    """A request with a body, JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Raw("POST", path, {**(bearer(key) if key else {}), **(headers or {})}, data)


def right(source: random.Random) -> Asked:
    """A request that must be answered."""
    path = CHAT if source.random() < 0.75 else COMPLETIONS
    key = source.choice((HELD, FREE, FREE, ROOT))
    greedy, logprobs = source.random() < 0.85, source.random() < 0.75
    whole = greedy and not logprobs  # without tokens only the whole text can be compared
    return Asked(
        path,
        source.choice(PROMPTS[path]),
        source.choice((None, *(ADMITTED if key == HELD else LEVELS))),
        source.choice(SOURCES),
        key,
        MAX_TOKENS if whole else source.randint(1, MAX_TOKENS),
        source.choice((1, 1, 1, 1, 2, 3)),
        source.random() < 0.5,
        logprobs,
        greedy,
    )


def everything_right() -> Iterator[Asked]:
    """Every prompt at every level: greedy, whole, alone."""
    for path, prompts in PROMPTS.items():
        yield from (Asked(path, prompt, level) for prompt in prompts for level in LEVELS)


def below_floor(source: random.Random) -> Wrong:
    """A level that the key's floor does not admit, by any of the ways to ask."""
    path = source.choice(GENERATING)
    asked = Asked(path, PROMPTS[path][0], source.choice(BELOW_FLOOR), source.choice(SOURCES))
    raw = replace(asked, key=HELD, stream=source.random() < 0.5).raw()
    return Wrong("level below the floor", 403, "safety_level_forbidden", raw, HELD)


def wrong_requests() -> tuple[Wrong, ...]:
    """One request for each way to be wrong."""
    good = Asked(CHAT, PROMPTS[CHAT][0], num_tokens=4).body()
    chat = post(CHAT, good, FREE)

    def told(kind: str, status: int, code: str, body: Any, **headers: str) -> Wrong:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Wrong(kind, status, code, post(CHAT, body, FREE, named))

    big = good | {"messages": [{"role": "user", "content": "x" * (MAX_BODY_BYTES + 5000)}]}
    long = good | {"messages": [{"role": "user", "content": "bread " * 5000}]}
    many = good | {"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}
    return (
        told("body too big", 413, "request_too_large", big),
        Wrong(
            "body too big, chunked", 413, "request_too_large", replace(post(CHAT, big, FREE), chunked=True)
        ),
        Wrong("body too big, announced", 413, "request_too_large", replace(chat, body=b"{", announced=2**40)),
        told("prompt too long", 400, "context_length_exceeded", long),
        told("too many messages", 400, "invalid_value", many),
        told("bad JSON", 400, "invalid_json", b'{"model": "demo", "messages": ['),
        told("not UTF-8", 400, "invalid_json", b'{"model": "\xff"}'),
        told("empty body", 400, "invalid_json", b""),
        told("NaN", 400, "invalid_json", b'{"model": "demo", "temperature": NaN}'),
        told("field given twice", 400, "invalid_json", b'{"model": "demo", "model": "demo"}'),
        told("unknown field", 400, "unknown_parameter", good | {"tempreture": 1}),
        told("unsupported field", 400, "unsupported_parameter", good | {"store": True}),
        told("value out of range", 400, "invalid_value", good | {"temperature": 3}),
        told("too many choices", 400, "invalid_value", good | {"n": 100}),
        told("unknown level", 400, "invalid_safety_level", good | {"safety_level": "very-safe"}),
        told("level too large", 400, "invalid_safety_level", good, X_Safety_Level="999999"),
        told("malformed level", 400, "invalid_safety_level", good | {"model": "demo@05"}),
        told(
            "levels that differ",
            400,
            "safety_level_conflict",
            good | {"model": "demo@0"},
            X_Safety_Level="5",
        ),
        told("bad time", 400, "invalid_value", good, X_Request_Timeout="soon"),
        told("unknown model", 404, "model_not_found", good | {"model": "other"}),
        Wrong("unknown key", 401, "invalid_api_key", post(CHAT, good, "nobody"), None),
        Wrong("no key", 401, "missing_api_key", post(CHAT, good, None), None),
        Wrong("expired key", 401, "expired_api_key", post(CHAT, good, EXPIRED), None),
        Wrong("user as admin", 403, "admin_required", post(ADMIN_MASK, {"path": "a.safetensors"}, FREE)),
        Wrong("unknown path", 404, "route_not_found", post("/v2/chat", good, FREE)),
        Wrong("wrong method", 405, "method_not_allowed", Raw("GET", CHAT, bearer(FREE))),
    )
