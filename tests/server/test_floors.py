"""Who may lower safety: every floor against every level, whichever way the level is asked for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulation.errors import LevelError
from modulation.levels import SafetyLevels, Threshold
from server.access import AskedLevel, admits, check_callers, default_of, grant, require_admin
from server.callers import ANONYMOUS, SCOPE_KEY, Caller
from server.engines.fake import LEVELS
from server.errors import AdminRequiredError, LevelDeniedError, LevelForbiddenError, SettingsError

# What each floor admits under the fake engine's levels, by hand. Its numbers n mean (n, n / 2 rounded half
# up); utility-priority is (8, 16), balanced (32, 24), security-critical (64, 32), which the number 64 is too.
NUMBERS = range(129)
ADMITTED: dict[str | int | None, set[str]] = {
    None: {"off", "utility-priority", "balanced", "security-critical", *map(str, NUMBERS)},
    "off": {"off", "utility-priority", "balanced", "security-critical", *map(str, NUMBERS)},
    0: {"off", "utility-priority", "balanced", "security-critical", *map(str, NUMBERS)},
    "utility-priority": {"utility-priority", "balanced", "security-critical", *map(str, range(8, 129))},
    "balanced": {"balanced", "security-critical", *map(str, range(32, 129))},
    "security-critical": {"security-critical", *map(str, range(64, 129))},
    "9": {"security-critical", *map(str, range(9, 129))},  # but not balanced: (32, 24) against (32, 16)
    64: {"security-critical", *map(str, range(64, 129))},
}
ASKED: tuple[str | int, ...] = ("off", "utility-priority", "balanced", "security-critical", *NUMBERS)


@pytest.mark.parametrize("floor", ADMITTED, ids=str)
def test_a_floor_admits_exactly_what_is_at_least_as_safe(floor: str | int | None) -> None:
    caller = Caller("somebody", floor=floor)
    admitted = {str(value) for value in ASKED if admits(LEVELS, caller, LEVELS.parse(value))}
    assert admitted == ADMITTED[floor]


levels_of_a_mask = st.builds(
    lambda safety, utility, balanced: SafetyLevels(
        {"security-critical": Threshold(safety, utility), "balanced": balanced}, Threshold(40, 40)
    ),
    st.integers(1, 40),
    st.integers(0, 40),
    st.builds(Threshold, st.integers(0, 40), st.integers(0, 40)),
)
values = st.one_of(st.sampled_from(["off", "balanced", "security-critical"]), st.integers(0, 40), st.text())


@given(levels_of_a_mask, values, st.none() | values, st.lists(values | st.none() | st.floats(), max_size=3))
def test_no_input_gives_a_level_that_is_less_safe_than_the_floor(
    levels: SafetyLevels, floor: str | int, default: str | int | None, asked: list[Any]
) -> None:
    caller = Caller("somebody", floor=floor, default=default)
    try:
        check_callers([caller], levels)
    except SettingsError:
        return
    sources = [AskedLevel(f"source {i}", "param", value) for i, value in enumerate(asked)]
    try:
        granted = grant(levels, sources, levels.parse("off"), caller)
    except LevelDeniedError:
        assert asked
        return
    assert levels.at_least_as_safe(granted.level.threshold, levels.parse(floor).threshold)


@given(st.text() | st.integers())
def test_a_floor_that_the_mask_does_not_have_admits_nothing(floor: str | int) -> None:
    try:
        LEVELS.parse(floor)
    except LevelError:
        assert not any(admits(LEVELS, Caller("somebody", floor=floor), level) for level in LEVELS)


@pytest.mark.parametrize(
    ("caller", "server", "level"),
    [
        (ANONYMOUS, "off", "off"),
        (Caller("a", floor="balanced"), "security-critical", "security-critical"),
        (Caller("a", floor="balanced"), "off", "balanced"),
        (Caller("a", floor=60), "balanced", "60"),  # cannot be compared
        (Caller("a", floor="balanced", default="security-critical"), "off", "security-critical"),
        (Caller("a", floor=40), "off", "40"),
        (Caller("a", default="off"), "balanced", "off"),
    ],
)
def test_who_asks_for_nothing_gets_their_default_the_servers_or_the_floor(
    caller: Caller, server: str, level: str
) -> None:
    assert default_of(LEVELS, caller, LEVELS.parse(server)).name == level
    assert grant(LEVELS, [], LEVELS.parse(server), caller).level.name == level


def test_what_is_refused_names_the_floor_and_what_it_admits() -> None:
    asked = [AskedLevel("header", "X-Safety-Level", "off")]
    with pytest.raises(LevelForbiddenError) as refused:
        grant(LEVELS, asked, LEVELS.parse("off"), Caller("mobile", floor="balanced"))
    assert refused.value.param == "X-Safety-Level"
    assert str(refused.value) == (
        "The safety level 'off' is not at least as safe as 'balanced', the least safe that 'mobile' may ask "
        "for. Accepted: balanced, security-critical, or a number at least as safe."
    )


@pytest.mark.parametrize(
    ("caller", "words"),
    [
        (Caller("mobile", floor="nope"), "'mobile', floor: Safety level 'nope' is not known"),
        (Caller("mobile", default="129"), "'mobile', default: Safety level 129 asks for more"),
        (Caller("mobile", floor="balanced", default="off"), "'mobile', default: 'off' is not at least"),
        (Caller("mobile", floor="balanced", default=30), "'mobile', default: '30' is not at least"),
    ],
)
def test_a_floor_or_default_that_cannot_be_is_named_with_its_key(caller: Caller, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check_callers([Caller("other", floor="balanced"), caller], LEVELS)


def test_only_an_admin_is_one() -> None:
    admin = Caller("root", role="admin")
    assert require_admin({SCOPE_KEY: admin}) is admin
    scopes: list[dict[str, Any]] = [{}, {SCOPE_KEY: Caller("somebody")}]
    for scope in scopes:
        with pytest.raises(AdminRequiredError, match="key file"):
            require_admin(scope)
