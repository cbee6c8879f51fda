"""Thresholds and safety levels: what they are, how a request's value is read, what is refused.

Knows neither torch nor masks nor HTTP.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from modulation.errors import LevelError

OFF: Final = "off"
SECURITY_CRITICAL: Final = "security-critical"
BALANCED: Final = "balanced"
UTILITY_PRIORITY: Final = "utility-priority"

STANDARD: Final = (SECURITY_CRITICAL, BALANCED, UTILITY_PRIORITY)
"""Safest first."""

RESERVED: Final = ("default", "custom")
"""What metrics call a request without a level, and a number: no name of a level."""

MAX_NAME_LENGTH: Final = 64

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Threshold:
    """How many top-ranked neurons of each set are active: a neuron of rank r is active iff r < n."""

    num_safety: int
    num_utility: int

    def __post_init__(self) -> None:
        for name, value in (("num_safety", self.num_safety), ("num_utility", self.num_utility)):
            if value < 0:
                raise LevelError(f"{name} {value} is negative: it is a number of neurons, 0 or more.")

    def fits(self, maximum: "Threshold") -> bool:
        """Whether both counts are at most those of `maximum`."""
        return self.num_safety <= maximum.num_safety and self.num_utility <= maximum.num_utility


ZERO: Final = Threshold(0, 0)


def _dominates(one: Threshold, other: Threshold) -> bool:
    if ZERO in (one, other):
        return other == ZERO
    return one.num_safety >= other.num_safety and one.num_utility <= other.num_utility


@dataclass(frozen=True, slots=True)
class SafetyLevel:
    """A threshold and the name it goes by: a level of the mask, `off`, or a whole number."""

    name: str
    threshold: Threshold


@dataclass(frozen=True)
class SafetyLevels:
    """The levels that one mask offers.

    `named` maps a level's name to its threshold; it must hold `security-critical`, whose proportion
    of utility to safety neurons also serves for levels given as a number, and never `off`, which is
    always there and always (0, 0). `maximum` is the size of the mask's two sets.
    """

    named: Mapping[str, Threshold]
    maximum: Threshold
    _levels: Mapping[str, SafetyLevel] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if OFF in self.named:
            raise LevelError(f"The level {OFF!r} is always (0, 0); a mask must not define it.")
        if SECURITY_CRITICAL not in self.named:
            raise LevelError(
                f"The level {SECURITY_CRITICAL!r} is missing: levels given as a number take their "
                f"proportion of utility neurons from it. Defined: {', '.join(self.named) or 'none'}."
            )
        for name, threshold in self.named.items():
            if not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
                raise LevelError(
                    f"Level name {name[:100]!r} is not allowed: use lower-case letters, digits and single "
                    f"hyphens, beginning with a letter, at most {MAX_NAME_LENGTH} characters."
                )
            if name in RESERVED:
                raise LevelError(
                    f"Level name {name!r} is not allowed: metrics have another meaning for it. Not allowed: "
                    f"{', '.join(RESERVED)}."
                )
            if not threshold.fits(self.maximum):
                raise LevelError(
                    f"Level {name!r} asks for ({threshold.num_safety}, {threshold.num_utility}) neurons; "
                    f"the sets hold ({self.maximum.num_safety}, {self.maximum.num_utility})."
                )
        if self.named[SECURITY_CRITICAL].num_safety == 0:
            raise LevelError(f"The level {SECURITY_CRITICAL!r} activates no safety neuron.")
        object.__setattr__(self, "named", MappingProxyType(dict(self.named)))
        levels = {OFF: SafetyLevel(OFF, ZERO)}
        levels.update({name: SafetyLevel(name, value) for name, value in self.named.items()})
        object.__setattr__(self, "_levels", MappingProxyType(levels))

    def __iter__(self) -> Iterator[SafetyLevel]:
        return iter(self._levels.values())

    def __contains__(self, name: object) -> bool:
        return name in self._levels

    @property
    def names(self) -> tuple[str, ...]:
        """Every level's name, `off` first, then in the mask's order."""
        return tuple(self._levels)

    @property
    def largest_number(self) -> int:
        """The largest whole number that `parse` accepts."""
        numbers = range(self.maximum.num_safety + 1)
        return bisect_right(numbers, self.maximum.num_utility, key=self._proportional) - 1

    def _proportional(self, num_safety: int) -> int:
        """Utility neurons that go with `num_safety`, in the proportion of `security-critical`."""
        reference = self.named[SECURITY_CRITICAL]
        return (2 * num_safety * reference.num_utility + reference.num_safety) // (2 * reference.num_safety)

    def parse(self, value: str | int) -> SafetyLevel:
        """Read a request's value: a level's name, or a whole number of safety neurons.

        A number n stands for (n, n x utility/safety of `security-critical`, rounded half up).

        Raises:
            LevelError: unknown name, malformed number, or more neurons than the mask has.
        """
        text = str(value)
        if text in self._levels:
            return self._levels[text]
        if isinstance(value, bool) or not _NUMBER.fullmatch(text):
            raise LevelError(f"Safety level {text!r} is not known. {self.accepted()}")
        # The bound is checked on the text's length first: int() of a huge numeral is itself refused.
        if len(text) > 9 or int(text) > self.largest_number:
            shown = text if len(text) <= 20 else f"{text[:20]}..."
            raise LevelError(
                f"Safety level {shown} asks for more neurons than this mask can activate. {self.accepted()}"
            )
        number = int(text)
        return SafetyLevel(text, Threshold(number, self._proportional(number)))

    def at_least_as_safe(self, one: Threshold, other: Threshold) -> bool:
        """Whether whoever may ask for nothing less safe than `other` may ask for `one`.

        A partial order. `one` is at least as safe as `other` if one of these says so, or a chain of them:

        - Nothing is less safe than (0, 0), and nothing but (0, 0) itself is as little safe.
        - `one` activates at least as many safety neurons and at most as many utility neurons.
        - Both are what whole numbers stand for (as `parse` has it), and `one`'s number is at least `other`'s.
        - Both are thresholds of standard names, and `one`'s comes earlier in `security-critical`,
          `balanced`, `utility-priority`, whatever numbers the mask gives them.

        What no chain connects cannot be compared: False, both ways.
        """
        named = [self.named[name] for name in STANDARD if self.named.get(name, ZERO) != ZERO]
        reached, waiting = {one}, [one]
        while waiting:
            here = waiting.pop()
            safest = next((i for i, each in enumerate(named) if self._is_above(here, each)), len(named))
            new = set(named[safest:]) - reached
            reached |= new
            waiting += new
        return any(self._is_above(each, other) for each in reached)

    def _is_above(self, one: Threshold, other: Threshold) -> bool:
        """Whether `one` dominates `other`, or a number's threshold that is not below another's which does."""
        if _dominates(one, other):
            return True
        least = max(1, other.num_safety)
        dominates_its_number = one.num_utility <= self._proportional(one.num_safety)
        return (
            least <= one.num_safety
            and dominates_its_number
            and self._proportional(least) <= other.num_utility
        )

    def accepted(self) -> str:
        """One sentence that lists what `parse` accepts."""
        return (
            f"Accepted: {', '.join(self.names)}, or a whole number of safety neurons "
            f"from 0 to {self.largest_number}."
        )
