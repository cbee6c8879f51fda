"""Which level a request gets: every source, their agreement, their refusals, and what is said about it."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulation.levels import Threshold
from server.access import AskedLevel, grant
from server.engines.fake import LEVELS, MASK_DIGEST
from server.errors import InvalidLevelError, LevelConflictError
from tests.server.conftest import Ask, Control, error_of

pytestmark = pytest.mark.anyio

DEFAULT = LEVELS.parse("balanced")


def by(source: str, value: Any) -> dict[str, Any]:
    """The arguments of `ask` that ask for `value` by `source`."""
    ways: dict[str, dict[str, Any]] = {
        "header": {"headers": {"X-Safety-Level": str(value)}},
        "body": {"safety_level": value},
        "suffix": {"model": f"demo@{value}"},
    }
    return ways[source]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("source", ["header", "body", "suffix"])
@pytest.mark.parametrize(
    ("value", "neurons"),
    [
        ("off", (0, 0)), ("utility-priority", (8, 16)), ("balanced", (32, 24)),
        ("security-critical", (64, 32)),
        ("0", (0, 0)), (0, (0, 0)), (3, (3, 2)), ("40", (40, 20)), (128, (128, 64)),
    ],
)  # fmt: skip
async def test_every_source_names_every_level(
    ask: Ask, control: Control, source: str, value: str | int, neurons: tuple[int, int], stream: bool
) -> None:
    response = await ask(stream=stream, **by(source, value))
    assert response.status_code == 200
    assert response.headers["x-safety-level"] == str(value)
    assert response.headers["x-safety-neurons"] == f"{neurons[0]},{neurons[1]}"
    assert response.headers["x-safety-mask"] == MASK_DIGEST
    assert control.requests[0].threshold == Threshold(*neurons)


async def test_a_request_that_names_none_gets_the_default(ask: Ask, control: Control) -> None:
    for fields in ({}, {"safety_level": None}):
        response = await ask(**fields)
        assert response.headers["x-safety-level"] == "balanced"
        assert control.requests.pop().threshold == Threshold(32, 24)


NO_LEVELS = [
    *("", "Balanced", "balanced, off", "default", "none", "-1", "+5", "05", "1.5", "1e2", "129", "9" * 400),
    *("balanced@off", "off ", "\u0663"),
]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        *(("header", value) for value in NO_LEVELS[:-2]),  # a header cannot carry the last two as they are
        *((source, value) for source in ("body", "suffix") for value in NO_LEVELS),
    ],
)
async def test_what_is_not_a_level_is_refused_with_what_is(ask: Ask, source: str, value: str) -> None:
    error = error_of(await ask(**by(source, value)), 400, "invalid_safety_level")
    assert error["param"] == {"header": "X-Safety-Level", "body": "safety_level", "suffix": "model"}[source]
    assert "off, utility-priority, balanced, security-critical" in error["message"]
    assert "0 to 128" in error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize("value", [True, False, 1.0, 0.5, [], ["off"], {}, -1, 10**30])
async def test_a_body_level_of_another_type_is_refused(ask: Ask, value: Any) -> None:
    error = error_of(await ask(safety_level=value), 400, "invalid_safety_level")
    assert error["param"] == "safety_level" and "0 to 128" in error["message"]


async def test_sources_that_agree_are_one_and_the_first_names_it(ask: Ask) -> None:
    headers = {"X-Safety-Level": "64"}
    response = await ask(headers, safety_level="security-critical", model="demo@security-critical")
    assert response.headers["x-safety-level"] == "64" and response.headers["x-safety-neurons"] == "64,32"
    response = await ask(safety_level=0, model="demo@off")
    assert response.headers["x-safety-level"] == "0"


@pytest.mark.parametrize(("first", "second"), [("header", "body"), ("header", "suffix"), ("body", "suffix")])
async def test_sources_that_disagree_are_a_conflict_that_names_both(
    ask: Ask, first: str, second: str
) -> None:
    response = await ask(**by(first, "off"), **by(second, "security-critical"))
    message = error_of(response, 400, "safety_level_conflict")["message"]
    assert "'off' (0, 0)" in message and "'security-critical' (64, 32)" in message
    words = {"header": "header X-Safety-Level", "body": "body field safety_level", "suffix": "model name"}
    assert words[first] in message and words[second] in message


async def test_the_header_twice_is_a_conflict_unless_it_says_the_same(ask: Ask) -> None:
    twice = [("X-Safety-Level", "security-critical"), ("x-safety-level", "off")]
    error_of(await ask(twice), 400, "safety_level_conflict")
    assert (await ask([twice[0], twice[0]])).status_code == 200


async def test_one_invalid_source_is_enough_to_be_refused(ask: Ask) -> None:
    error_of(await ask({"X-Safety-Level": "nope"}, safety_level="off"), 400, "invalid_safety_level")
    error_of(await ask({"X-Safety-Level": "off"}, safety_level="nope"), 400, "invalid_safety_level")


async def test_the_levels_route_lists_what_a_request_may_ask(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/safety-levels")).json() == {
        "object": "list",
        "default": "balanced",
        "floor": None,
        "mask": MASK_DIGEST,
        "max": {"num_safety": 128, "num_utility": 64},
        "data": [
            {"id": "off", "num_safety": 0, "num_utility": 0},
            {"id": "utility-priority", "num_safety": 8, "num_utility": 16},
            {"id": "balanced", "num_safety": 32, "num_utility": 24},
            {"id": "security-critical", "num_safety": 64, "num_utility": 32},
        ],
    }


async def test_every_model_that_is_listed_is_served(client: httpx.AsyncClient, ask: Ask) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    ids = [model["id"] for model in models["data"]]
    assert ids == ["demo", "demo@off", "demo@utility-priority", "demo@balanced", "demo@security-critical"]
    for model in ids:
        assert (await ask(model=model)).status_code == 200


values = st.one_of(
    st.sampled_from([*LEVELS.names, "0", "64", 64, 0, 128]),
    st.text(),
    st.integers(),
    st.none(),
    st.booleans(),
    st.floats(),
    st.lists(st.integers()),
)


@given(st.lists(values, max_size=4))
def test_a_level_is_what_every_source_asked_for_or_it_is_refused(asked: list[Any]) -> None:
    """No combination of values gives a threshold that one of the sources did not mean."""
    sources = [AskedLevel(f"source {i}", "param", value) for i, value in enumerate(asked)]
    try:
        granted = grant(LEVELS, sources, DEFAULT)
    except (InvalidLevelError, LevelConflictError):
        assert asked
        return
    assert granted.is_default == (not asked)
    for value in asked:
        assert LEVELS.parse(value).threshold == granted.level.threshold
