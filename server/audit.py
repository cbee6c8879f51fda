"""What an audit log says: one record per request for an answer, per denial and per reload.

Knows callers, levels and outputs, and the scope that an entry rides in. Knows no file, and no route but by
its path. Keys are in no record, and prompts only where they are asked for.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modulation.levels import SafetyLevel
from server import request_ids
from server.audit_log import PROMPT, AuditLog
from server.callers import SCOPE_KEY as CALLER_KEY
from server.callers import caller_of
from server.choices import Choices
from server.engines.base import Chat, Output, Prompt
from server.errors import ClientDisconnectedError, kind_of
from server.floods import LEFT_OUT, Thinned
from server.redaction import MAX_CHARACTERS, OVERLAP

SCOPE_KEY: Final = "neurontune.audit"
UNAUTHENTICATED: Final = 401
DENIED: Final = frozenset({UNAUTHENTICATED, 403, 429})
MAX_SHOWN: Final = 200
NOBODY: Final[Mapping[str, str | None]] = MappingProxyType(dict.fromkeys(("request_id", "key", "client")))


@dataclass
class Entry:
    """What is known of one request so far. Those who learn something write it here."""

    keeps_prompt: bool = False
    model: str | None = None
    level_asked: str | None = None
    level: SafetyLevel | None = None
    mask: str | None = None
    prompt: str | None = None
    error: str | None = None
    num_choices: int = 0
    choices_per_prompt: int = 1
    last: dict[int, Output] = field(default_factory=dict)

    def named(self, model: str) -> None:
        """The model that the request names, whatever it is."""
        self.model = model[:MAX_SHOWN]

    def asked(self, values: Sequence[object]) -> None:
        """The levels that the request names."""
        shown = dict.fromkeys(str(value)[:MAX_SHOWN] for value in values)
        self.level_asked = ", ".join(shown) or None

    def granted(self, level: SafetyLevel, mask: str) -> None:
        """The level that the request gets, under which mask."""
        self.level, self.mask = level, mask

    def failed(self, error: Exception) -> None:
        """What is answered instead, or what ended the answer."""
        self.error = kind_of(error).code

    async def observed(self, outputs: Choices, prompts: Sequence[Prompt], choices_per_prompt: int) -> Choices:
        """`outputs`, noted on their way; there are `choices_per_prompt` of each of `prompts`."""
        self.num_choices, self.choices_per_prompt = len(prompts) * choices_per_prompt, choices_per_prompt
        if self.keeps_prompt:
            self.prompt = "\n".join(map(_text, prompts))[: MAX_CHARACTERS + OVERLAP]
        async with aclosing(outputs):
            try:
                async for choice, output in outputs:
                    self.last[choice] = output
                    yield choice, output
            except Exception as error:
                self.failed(error)
                raise

    def said(self) -> dict[str, Any]:
        """The entry's part of a record."""
        threshold = self.level.threshold if self.level else None
        lasts = self.last.items()
        return {
            "model": self.model,
            "level_asked": self.level_asked,
            "level_applied": self.level.name if self.level else None,
            "num_safety": threshold.num_safety if threshold else None,
            "num_utility": threshold.num_utility if threshold else None,
            "mask": self.mask,
            "prompt_tokens": sum(
                last.num_prompt_tokens for choice, last in lasts if choice % self.choices_per_prompt == 0
            ),
            "completion_tokens": sum(last.num_completion_tokens for _, last in lasts),
            "finish_reason": self._finish_reason(),
            "error": self.error,
        } | ({PROMPT: self.prompt} if self.keeps_prompt else {})

    def _finish_reason(self) -> str | None:
        reasons = [last.finish_reason for last in self.last.values()]
        if not self.num_choices:
            return None
        if len(reasons) == self.num_choices and None not in reasons:
            return ", ".join(sorted({str(reason) for reason in reasons}))
        gone = self.error in (None, kind_of(ClientDisconnectedError()).code)
        return "aborted" if gone else "error"


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, Chat):
        return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return prompt if isinstance(prompt, str) else f"({len(prompt)} tokens)"


def entry_of(scope: Scope) -> Entry:
    """The entry of a request; one that nobody reads where there is no audit log."""
    entry = scope.setdefault(SCOPE_KEY, Entry())
    assert isinstance(entry, Entry), entry
    return entry


def asker_of(scope: Scope) -> dict[str, str | None]:
    """Who sends a request, as records name them."""
    client = scope.get("client")
    # Without a caller in the scope nobody was let in: a name would claim more than is known.
    caller = caller_of(scope) if CALLER_KEY in scope else None
    return {
        "request_id": scope.get(request_ids.SCOPE_KEY),
        "key": caller.name if caller else None,
        "client": client[0] if client else None,
    }


def reload_record(
    what: str,
    error: BaseException | None,
    detail: str = "",
    *,
    by: Mapping[str, str | None] = NOBODY,
    old: str | None = None,
    new: str | None = None,
) -> Mapping[str, Any]:
    """A record of `what` (keys, mask) having been put in force anew, or not because of `error`. `by` is who
    asked for it in a request, `old` and `new` are digests of masks."""
    return {
        "time": _now(),
        "event": "reload",
        **by,
        "what": what,
        "ok": error is None,
        "old": old,
        "new": new,
        "detail": detail if error is None else str(error) or type(error).__name__,
    }


class Audit:
    """ASGI middleware that writes a record when a request to one of `paths` ends, or a denial of any."""

    def __init__(
        self, app: ASGIApp, log: AuditLog, denials: Thinned, paths: Collection[str], keeps_prompts: bool
    ) -> None:
        """`denials` takes those that come without a key of ours, by their address and why."""
        self._app = app
        self._log = log
        self._denials = denials
        self._paths = frozenset(paths)
        self._keeps_prompts = keeps_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = scope[SCOPE_KEY] = Entry(self._keeps_prompts)
        began, since, status = _now(), time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            entry.failed(error)
            raise
        finally:
            if status in DENIED or scope["path"] in self._paths:
                seconds = round(time.perf_counter() - since, 6)
                said = record(scope, entry, began, status, seconds)
                if status == UNAUTHENTICATED:
                    self._denials.write((said["client"], said["error"]), said)
                else:
                    self._denials.write_due()
                    self._log.write(said)


def record(scope: Scope, entry: Entry, began: str, status: int, seconds: float) -> dict[str, Any]:
    """What is said of a request: of `scope`, that `entry` rode in, begun at `began`, ended with `status`."""
    return {
        "time": began,
        "event": "denied" if status in DENIED else "request",
        **asker_of(scope),
        "method": scope["method"],
        "path": scope["path"][:MAX_SHOWN],
        "status": status,
        **entry.said(),
        "duration_seconds": seconds,
        LEFT_OUT: 0,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
