"""Which levels are to be exported, and whether they may be.

Knows masks, levels and what a mask records of them. Knows no torch, no model and no format.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modulation.errors import ExportError, LevelError, UnsafeMaskError
from modulation.levels import OFF, ZERO, SafetyLevel, SafetyLevels, Threshold
from modulation.profiles import MaskProfile, Rates, profile_of

if TYPE_CHECKING:
    from modulation.masks import Mask

_ASR = "asr"


def chosen_levels(mask: "Mask", values: Sequence[str], thresholds: Sequence[str]) -> list[SafetyLevel]:
    """Levels by name or number, and thresholds written `NUM_SAFETY,NUM_UTILITY`; none of either: every named
    level but `off`.

    Raises:
        LevelError: one that is unknown, malformed or larger than the mask.
        ExportError: nothing is active at it, or it is asked for twice.
    """
    levels = mask.levels
    if not values and not thresholds:
        return [level for level in levels if level.threshold != ZERO]
    chosen = [levels.parse(value) for value in values]
    chosen += [_read(levels, text) for text in thresholds]
    for level in chosen:
        if level.threshold == ZERO:
            raise ExportError(
                f"Level {level.name!r} is (0, 0): that is the model as it is, and there is nothing to "
                f"export. Accepted: {', '.join(name for name in levels.names if name != OFF)}, or a number "
                "above 0."
            )
    names = [level.name for level in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"Level {name!r} is asked for {names.count(name)} times; once is enough.")
    return chosen


def _read(levels: SafetyLevels, text: str) -> SafetyLevel:
    """The level of a threshold, named `12-30`."""
    safety, comma, utility = text.partition(",")
    numbers = [each.strip() for each in (safety, utility)]
    if not comma or not all(each.isascii() and each.isdecimal() and len(each) <= 9 for each in numbers):
        raise LevelError(
            f"Threshold {text!r} cannot be read: write two whole numbers with a comma between, as 12,30, the "
            "active safety neurons and the active utility neurons."
        )
    threshold, most = Threshold(*map(int, numbers)), levels.maximum
    if not threshold.fits(most):
        raise LevelError(
            f"Threshold {text} asks for more neurons than this mask has: {most.num_safety} safety and "
            f"{most.num_utility} utility neurons."
        )
    return SafetyLevel(f"{threshold.num_safety}-{threshold.num_utility}", threshold)


def refuse_less_safe_points(mask: "Mask", levels: Sequence[SafetyLevel]) -> None:
    """Refuse a threshold that the mask's curve has measured to be less safe than `off`. Its named levels are
    `refuse_less_safe`'s; what was not measured is not judged.

    Raises UnsafeMaskError.
    """
    profile = profile_of(mask)
    off = recorded_rates(profile, SafetyLevel(OFF, ZERO)).get(_ASR)
    for level in levels:
        found = recorded_rates(profile, level).get(_ASR)
        if off and found and found["rate"] > off["rate"]:
            raise UnsafeMaskError(
                f"Level {level.name!r} is less safe than {OFF!r} on the mask's own recorded evaluation: "
                f"{found['rate']:.1%} of attacks succeed against {off['rate']:.1%}. Export another level, or "
                "accept it with --allow-less-safe-levels."
            )


def recorded_rates(profile: MaskProfile, level: SafetyLevel) -> Rates:
    """What the mask records of a level: of its name, else of its threshold. Empty: nothing."""
    for point in (*profile.levels, *profile.curve):
        if point.threshold == level.threshold and point.level in (level.name, None):
            return point.rates
    return {}
