"""What a caller may ask for: which safety level a request gets, at what floor, and who may administer.

Knows levels, the order of their sources, and callers. Knows no keys, no HTTP, no engine, no settings.
"""

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from modulation.errors import LevelError
from modulation.levels import SafetyLevel, SafetyLevels
from server.callers import ANONYMOUS, Caller, caller_of
from server.errors import (
    AdminRequiredError,
    InvalidLevelError,
    LevelConflictError,
    LevelForbiddenError,
    SettingsError,
)


@dataclass(frozen=True, slots=True)
class AskedLevel:
    """A level as one source of a request gives it: `source` in words, `param` as errors name it."""

    source: str
    param: str
    value: object


@dataclass(frozen=True, slots=True)
class GrantedLevel:
    """The level a request gets, and whether it asked for it or got the default."""

    level: SafetyLevel
    is_default: bool


def grant(
    levels: SafetyLevels,
    asked: Sequence[AskedLevel],
    default: SafetyLevel,
    caller: Caller = ANONYMOUS,
) -> GrantedLevel:
    """Decide on one level.

    `asked` is in order of precedence and holds what was given, nothing more. All of it must mean the
    same threshold; the first one's name is then the level's. `default` is the server's: `default_of` says
    what a caller gets who asks for nothing. A level below the caller's floor is refused, never raised.

    Raises:
        InvalidLevelError: one of them is unknown, malformed or too large.
        LevelConflictError: they do not agree.
        LevelForbiddenError: it is not at least as safe as the caller's floor.
    """
    if not asked:
        level = default_of(levels, caller, default)
        _refuse_below_floor(levels, level, caller, None)
        return GrantedLevel(level, is_default=True)
    read = [_parse(levels, one) for one in asked]
    if len({level.threshold for level in read}) > 1:
        given = "; ".join(
            f"{one.source} asks for {level.name!r} "
            f"({level.threshold.num_safety}, {level.threshold.num_utility})"
            for one, level in zip(asked, read, strict=True)
        )
        raise LevelConflictError(
            f"The safety level is given more than once and not the same: {given}. Give it once.",
            asked[-1].param,
        )
    _refuse_below_floor(levels, read[0], caller, asked[0].param)
    return GrantedLevel(read[0], is_default=False)


def admits(levels: SafetyLevels, caller: Caller, level: SafetyLevel) -> bool:
    """Whether the caller's floor admits `level`. A floor that this mask does not have admits none."""
    if caller.floor is None:
        return True
    try:
        floor = levels.parse(caller.floor)
    except LevelError:
        return False
    return levels.at_least_as_safe(level.threshold, floor.threshold)


def admitted_names(levels: SafetyLevels, caller: Caller) -> tuple[str, ...]:
    """The named levels that the caller may ask for."""
    return tuple(level.name for level in levels if admits(levels, caller, level))


def default_of(levels: SafetyLevels, caller: Caller, default: SafetyLevel) -> SafetyLevel:
    """What the caller gets who asks for nothing: the caller's own default; else `default`, the server's;
    else the caller's floor, if that does not admit the server's."""
    if caller.default is not None:
        return levels.parse(caller.default)
    if caller.floor is None or admits(levels, caller, default):
        return default
    return levels.parse(caller.floor)


def may_use_model(caller: Caller, model: str) -> bool:
    """Whether the caller may ask for `model`: an id without a level."""
    return caller.models is None or model in caller.models


def require_admin(scope: MutableMapping[str, Any]) -> Caller:
    """The caller of an ASGI scope, who is an admin.

    Raises:
        AdminRequiredError: anybody else, and whoever comes without a key.
    """
    caller = caller_of(scope)
    if caller.role != "admin":
        raise AdminRequiredError(
            f"Only an admin may do this, and {caller.name!r} is none: send a key whose role in the key file "
            "(setting keys) is admin."
        )
    return caller


def check_callers(callers: Iterable[Caller], levels: SafetyLevels) -> None:
    """Check that floors and defaults mean something under `levels`: at start, at a reload of the keys, and
    before another mask is put in force.

    Raises:
        SettingsError: one of them is no level here, or a default is below its own floor.
    """
    for caller in callers:
        for field, value in (("floor", caller.floor), ("default", caller.default)):
            try:
                level = None if value is None else levels.parse(value)
            except LevelError as error:
                raise SettingsError(f"Key {caller.name!r}, {field}: {error}") from error
            if level is not None and not admits(levels, caller, level):
                raise SettingsError(
                    f"Key {caller.name!r}, default: {level.name!r} is not at least as safe as the floor "
                    f"{caller.floor!r}. {_admitted(levels, caller)}"
                )


def _refuse_below_floor(levels: SafetyLevels, level: SafetyLevel, caller: Caller, param: str | None) -> None:
    if not admits(levels, caller, level):
        raise LevelForbiddenError(
            f"The safety level {level.name!r} is not at least as safe as {str(caller.floor)!r}, the least "
            f"safe that {caller.name!r} may ask for. {_admitted(levels, caller)}",
            param,
        )


def _admitted(levels: SafetyLevels, caller: Caller) -> str:
    names = [str(caller.floor), *admitted_names(levels, caller)]
    return f"Accepted: {', '.join(dict.fromkeys(names))}, or a number at least as safe."


def _parse(levels: SafetyLevels, asked: AskedLevel) -> SafetyLevel:
    value = asked.value
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InvalidLevelError(
            f"{asked.source}: a safety level is a name or a whole number, not {_json_type(value)}. "
            f"{levels.accepted()}",
            asked.param,
        )
    try:
        return levels.parse(value)
    except LevelError as error:
        raise InvalidLevelError(f"{asked.source}: {error}", asked.param) from error


def _json_type(value: object) -> str:
    names = {bool: "a boolean", float: "a fraction", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
