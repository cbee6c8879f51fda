"""Who asks, and what they may.

Knows names, roles and limits as plain data. Knows no keys, no HTTP beyond the scope a caller rides in.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Literal

SCOPE_KEY: Final = "neurontune.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller. Levels are as a request would name them: a name or a number of safety neurons.

    `floor` is the least safe level that may be asked for (None: any), `default` what a request gets that
    names none (None: the server's), `models` the model ids that may be asked for (None: all). The rates
    are per minute; None: unbounded.
    """

    name: str
    role: Literal["user", "admin"] = "user"
    floor: str | int | None = None
    default: str | int | None = None
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


ANONYMOUS: Final = Caller("anonymous")


def caller_of(scope: MutableMapping[str, Any]) -> Caller:
    """The caller of an ASGI scope: whom authentication found, or else the anonymous one."""
    caller = scope.get(SCOPE_KEY, ANONYMOUS)
    assert isinstance(caller, Caller), caller
    return caller
