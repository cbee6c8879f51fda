"""Which safety level a request gets, from what it asks for and what stands by default.

Knows levels and the order of their sources. Knows no HTTP, no engine, no settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modulation.errors import LevelError
from modulation.levels import SafetyLevel, SafetyLevels
from server.errors import InvalidLevelError, LevelConflictError


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


def grant(levels: SafetyLevels, asked: Sequence[AskedLevel], default: SafetyLevel) -> GrantedLevel:
    """Decide on one level.

    `asked` is in order of precedence and holds what was given, nothing more. All of it must mean the
    same threshold; the first one's name is then the level's. `default` is what the caller gets who
    asks for nothing.

    Raises:
        InvalidLevelError: one of them is unknown, malformed or too large.
        LevelConflictError: they do not agree.
    """
    if not asked:
        return GrantedLevel(default, is_default=True)
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
    return GrantedLevel(read[0], is_default=False)


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
