"""A full server says so at once, and a place that was taken is always free again."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admission import Admission, estimated_tokens
from server.app import create_app
from server.engines.base import Chat, Message
from server.engines.fake import FakeEngine
from server.errors import InvalidValueError, OverloadedError
from server.settings import Settings
from tests.engines.contract import is_idle, until
from tests.server.conftest import CHAT, Control, error_of, listen
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello there"}]}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_places_are_bounded_and_free_again_whatever_happens() -> None:
    admission = Admission(1, 1, 100)
    with admission.seat(), pytest.raises(ZeroDivisionError), admission.seat():
        with pytest.raises(OverloadedError, match="2 of 2 places"), admission.seat():
            raise AssertionError("there is no third place")
        raise ZeroDivisionError
    assert admission.num_taken == 0


def test_each_answer_takes_a_place_and_more_than_there_are_never_fit() -> None:
    admission = Admission(2, 2, 100)
    with admission.seat() as seat:
        with pytest.raises(InvalidValueError, match="places for, 4"):
            seat.take([1] * 5)
        seat.take([1] * 4)
        with pytest.raises(OverloadedError), admission.seat():
            pass
    with admission.seat(), admission.seat() as second, pytest.raises(OverloadedError):
        second.take([1] * 4)
    assert (admission.num_taken, admission.num_waiting_tokens) == (0, 0)


def test_waiting_tokens_are_bounded_until_answers_begin_but_one_request_alone_always_fits() -> None:
    admission = Admission(9, 9, 100)
    with admission.seat() as first, admission.seat() as second:
        first.take([150])
        with pytest.raises(OverloadedError, match="about 150 tokens wait"):
            second.take([1])
        first.begun(150)
        second.take([60])
        with admission.seat() as third, pytest.raises(OverloadedError):
            third.take([41])
    assert (admission.num_taken, admission.num_waiting_tokens) == (0, 0)


def test_the_advice_when_to_come_again_follows_the_rate_at_which_places_become_free() -> None:
    clock = Clock()
    admission = Admission(1, 41, 10**6, clock)
    assert admission.retry_seconds() == 1
    for _ in range(10):
        with admission.seat():
            clock.now += 2
    with admission.seat() as seat:
        seat.take([1] * 42)
        assert admission.retry_seconds() == 37  # half of 41 at 10 in 18 s
        clock.now += 10**6
        assert admission.retry_seconds() == 60


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 50), min_size=1, max_size=6)), max_size=30))
def test_no_sequence_of_requests_exceeds_the_bounds_or_leaves_anything_behind(
    steps: list[tuple[bool, list[int]]],
) -> None:
    admission = Admission(3, 2, 60)

    def enter(rest: list[tuple[bool, list[int]]]) -> None:
        assert admission.num_taken <= 5
        if not rest:
            return
        (nested, tokens), *others = rest
        try:
            with admission.seat() as seat:
                seat.take(tokens)
                seat.begun(tokens[0])
                if nested:
                    enter(others)
        except (OverloadedError, InvalidValueError):
            pass
        if not nested:
            enter(others)

    enter(steps)
    assert (admission.num_taken, admission.num_waiting_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("x" * 40, 10), ("", 1), ((1, 2, 3), 3), ("x" * 4000, 100),
        (Chat((Message("user", "x" * 40), Message("user", "y" * 4))), 19),
        (Chat((Message("user", "x"),), tools=({"name": "x" * 27},)), 17),
    ],
)  # fmt: skip
def test_tokens_are_estimated_without_a_tokenizer(prompt: Any, number: int) -> None:
    assert estimated_tokens(prompt, at_most=100) == number


@pytest.fixture
async def small(control: Control) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    """A server for one answer that runs and one that waits."""
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    settings = Settings(engine="fake", max_num_seqs=1, max_num_waiting=1)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client, engine


async def test_beyond_running_and_waiting_requests_the_answer_is_429_at_once(
    small: tuple[httpx.AsyncClient, FakeEngine], control: Control
) -> None:
    client, engine = small
    control.wait_at = 0
    asked = [asyncio.create_task(client.post(CHAT, json=BODY)) for _ in range(2)]
    await until(lambda: engine.healthy().num_waiting == 1)
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        refused = await client.post(path, content=b"not even read")
        error_of(refused, 429, "server_overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    assert (
        'neurontune_admission_rejections_total{model_name="demo",reason="overloaded"} 4.0'
        in (await client.get("/metrics")).text
    )
    assert (await client.get("/v1/models")).status_code == 200
    control.gate.set()
    assert [response.status_code for response in await asyncio.gather(*asked)] == [200, 200]
    assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_each_of_several_choices_takes_a_place(
    small: tuple[httpx.AsyncClient, FakeEngine], control: Control
) -> None:
    client, engine = small
    assert (await client.post(CHAT, json={**BODY, "n": 2})).status_code == 200
    error = error_of(await client.post(CHAT, json={**BODY, "n": 3}), 400, "invalid_value")
    assert error["param"] == "n"
    control.wait_at = 0
    asked = asyncio.create_task(client.post(CHAT, json=BODY))
    await until(lambda: engine.healthy().num_running == 1)
    error_of(await client.post(CHAT, json={**BODY, "n": 2}), 429, "server_overloaded")
    control.gate.set()
    assert (await asked).status_code == 200


@pytest.mark.parametrize(
    ("settings", "fields", "reason"),
    [
        ({"max_waiting_tokens": 10}, {"prompt": "x" * 400}, "overloaded"),
        ({"max_num_waiting": 7}, {"n": 8}, "overloaded"),
        ({}, {"prompt": "x" * 400}, "rate_limit"),
    ],
    ids=["max_waiting_tokens", "places", "tokens_per_minute"],
)
async def test_what_is_refused_once_its_body_is_read_is_counted_too(
    control: Control, tmp_path: Path, settings: dict[str, Any], fields: dict[str, Any], reason: str
) -> None:
    """The route had made a 429 of it before anybody counted."""
    control.wait_at = 0
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    keys = key_file(tmp_path / "keys.yaml", ann={"tokens_per_minute": 110} if reason == "rate_limit" else {})
    app = create_app(Settings(engine="fake", keys=keys, max_num_seqs=1, **settings), engine)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://a", headers=bearer("ann")) as client:
        body = {"model": "demo", "max_tokens": 1, **fields}
        first = {**body, "prompt": "x" * 80, "n": 1}
        asked = asyncio.create_task(client.post("/v1/completions", json=first))
        await until(lambda: engine.healthy().num_running == 1)
        status = (await client.post("/v1/completions", json={"prompt": "x", **body})).status_code
        counted = {
            each: f'neurontune_admission_rejections_total{{model_name="demo",reason="{each}"}} {number:.1f}'
            for each, number in (
                ("overloaded", reason == "overloaded"),
                ("rate_limit", reason == "rate_limit"),
            )
        }
        seen = (await client.get("/metrics")).text
        assert status == 429 and all(line in seen for line in counted.values()), seen
        control.gate.set()
        assert (await asked).status_code == 200


async def test_failures_and_clients_that_leave_give_their_places_back(control: Control) -> None:
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    settings = Settings(engine="fake", max_num_seqs=1, max_num_waiting=0)
    async with (
        listen(settings, engine) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for at in (0, 3):
            control.fail_at = at
            for stream in (False, True):
                await client.post(CHAT, json={**BODY, "stream": stream})
        control.fail_at = None
        error_of(await client.post(CHAT, json={**BODY, "temperature": 9}), 400, "invalid_value")
        control.wait_at = 3
        async with client.stream("POST", CHAT, json={**BODY, "stream": True}) as stream:
            await anext(stream.aiter_lines())
            error_of(await client.post(CHAT, json=BODY), 429, "server_overloaded")
        await until(lambda: is_idle(engine))
        control.wait_at = None
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_a_body_too_large_or_with_too_many_messages_is_refused_as_set(engine: FakeEngine) -> None:
    settings = Settings(engine="fake", max_body_bytes=300, max_messages=2)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        large = json.dumps({**BODY, "user": "x" * 300}).encode()
        assert (
            "300 bytes"
            in error_of(await client.post(CHAT, content=large), 413, "request_too_large")["message"]
        )
        many = {**BODY, "messages": BODY["messages"] * 3}
        for path in (CHAT, "/tokenize"):
            error = error_of(await client.post(path, json=many), 400, "invalid_value")
            assert error["param"] == "messages" and "at most 2" in error["message"]
        assert (await client.post(CHAT, json={**BODY, "messages": BODY["messages"] * 2})).status_code == 200
