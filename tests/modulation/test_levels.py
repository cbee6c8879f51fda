"""What a request's level may be, and what is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulation.errors import LevelError
from modulation.levels import SafetyLevels, Threshold

LEVELS = SafetyLevels(
    {
        "security-critical": Threshold(40, 30),
        "balanced": Threshold(10, 20),
        "utility-priority": Threshold(0, 30),
    },
    maximum=Threshold(60, 36),
)


@pytest.mark.parametrize(
    ("value", "threshold"),
    [
        ("off", Threshold(0, 0)),
        ("security-critical", Threshold(40, 30)),
        ("balanced", Threshold(10, 20)),
        ("utility-priority", Threshold(0, 30)),
        ("0", Threshold(0, 0)),
        (0, Threshold(0, 0)),
        ("40", Threshold(40, 30)),
        (12, Threshold(12, 9)),
        ("2", Threshold(2, 2)),  # 1.5, rounded half up
        ("48", Threshold(48, 36)),
    ],
)
def test_a_name_or_a_whole_number_gives_its_threshold(value: str | int, threshold: Threshold) -> None:
    assert LEVELS.parse(value).threshold == threshold


@pytest.mark.parametrize(
    "value",
    ["", " ", "Off", "OFF", "on", "balanced ", "-1", "+1", "1.0", "1e3", "007", "0x10", "1_0", "٣", "²",
     "49", 49, -1, True, "9" * 5000, "security_critical"],
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_accepted(value: str | int) -> None:
    with pytest.raises(LevelError, match=r"off, security-critical, balanced, utility-priority.* 0 to 48"):
        LEVELS.parse(value)


@given(st.text(max_size=12))
def test_no_text_at_all_breaks_the_parser(text: str) -> None:
    try:
        level = LEVELS.parse(text)
    except LevelError:
        return
    assert level.name == text and level.threshold.fits(LEVELS.maximum)


@given(
    maximum=st.tuples(st.integers(1, 300), st.integers(0, 300)),
    part=st.tuples(st.floats(0.01, 1), st.floats(0, 1)),
)
def test_the_largest_number_fits_and_the_next_one_does_not(
    maximum: tuple[int, int], part: tuple[float, float]
) -> None:
    reference = Threshold(max(1, int(maximum[0] * part[0])), int(maximum[1] * part[1]))
    levels = SafetyLevels({"security-critical": reference}, Threshold(*maximum))
    largest = levels.largest_number
    assert levels.parse(largest).threshold.fits(levels.maximum)
    with pytest.raises(LevelError):
        levels.parse(largest + 1)
    # In exact arithmetic, the utility neurons are the nearest whole number to the proportion.
    for number in range(largest + 1):
        exact = number * reference.num_utility / reference.num_safety
        assert abs(levels.parse(number).threshold.num_utility - exact) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"balanced": Threshold(1, 1)}, "'security-critical' is missing"),
        ({"security-critical": Threshold(2, 1), "off": Threshold(0, 0)}, "'off' is always"),
        ({"security-critical": Threshold(99, 1)}, r"asks for \(99, 1\)"),
        ({"security-critical": Threshold(2, 1), "Very Safe": Threshold(1, 1)}, "'Very Safe' is not allowed"),
        ({"security-critical": Threshold(2, 1), "12": Threshold(1, 1)}, "'12' is not allowed"),
        ({"security-critical": Threshold(2, 1), "custom": Threshold(1, 1)}, "'custom' is not allowed"),
        ({"security-critical": Threshold(2, 1), "default": Threshold(1, 1)}, "'default' is not allowed"),
        ({"security-critical": Threshold(2, 1), "a" * 65: Threshold(1, 1)}, "at most 64 characters"),
        ({"security-critical": Threshold(0, 1)}, "activates no safety neuron"),
    ],
)
def test_levels_that_contradict_themselves_are_refused(named: dict[str, Threshold], message: str) -> None:
    with pytest.raises(LevelError, match=message):
        SafetyLevels(named, maximum=Threshold(60, 36))


def test_a_threshold_is_never_negative() -> None:
    with pytest.raises(LevelError, match="num_utility -1"):
        Threshold(3, -1)


def number(n: int, reference: Threshold) -> Threshold:
    """What the whole number n stands for."""
    return Threshold(
        n, math.floor(Fraction(n * reference.num_utility, reference.num_safety) + Fraction(1, 2))
    )


def closed(thresholds: set[Threshold], levels: SafetyLevels) -> set[tuple[Threshold, Threshold]]:
    """The order as a relation, by Floyd and Warshall from its four rules."""
    zero = Threshold(0, 0)
    numbers = [number(n, levels.named["security-critical"]) for n in range(1, 7)]
    names = [levels.named[name] for name in ("security-critical", "balanced", "utility-priority")]
    pairs = set()
    for one in thresholds:
        for other in thresholds:
            dominates = one.num_safety >= other.num_safety and one.num_utility <= other.num_utility
            named = any(one == names[i] and other in names[i:] for i in range(len(names)))
            numbered = one in numbers and other in numbers and one.num_safety >= other.num_safety
            if other == zero or (one != zero and (dominates or named or numbered)):
                pairs.add((one, other))
    for middle in thresholds - {zero}:
        for one in thresholds:
            if (one, middle) in pairs:
                pairs |= {(one, other) for other in thresholds if (middle, other) in pairs}
    return pairs


counts = st.builds(Threshold, st.integers(0, 6), st.integers(0, 6))


@given(st.tuples(st.builds(Threshold, st.integers(1, 6), st.integers(0, 6)), counts, counts), st.sets(counts))
def test_the_order_is_the_closure_of_its_rules(
    named: tuple[Threshold, Threshold, Threshold], others: set[Threshold]
) -> None:
    names = ("security-critical", "balanced", "utility-priority")
    levels = SafetyLevels(dict(zip(names, named, strict=True)), Threshold(6, 6))
    numbers = {number(n, named[0]) for n in range(1, 7)}
    thresholds = {*others, *named, *numbers, Threshold(0, 0)}
    expected = closed(thresholds, levels)
    for one in thresholds:
        for other in thresholds:
            assert levels.at_least_as_safe(one, other) == ((one, other) in expected), (one, other)
