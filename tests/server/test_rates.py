"""A key has so many requests and tokens per minute, and is told what is left."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.callers import Caller
from server.engines.fake import FakeEngine
from server.errors import RateLimitError
from server.rates import Rates
from server.settings import Settings
from tests.server.conftest import CHAT, error_of
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio


Client = Callable[[str], httpx.AsyncClient]
Clients = Callable[..., Client]


@pytest.fixture
def clients(tmp_path: Path, engine: FakeEngine) -> Clients:
    """Makes an app whose keys have these fields, and returns what makes a client for a name."""

    def of(**entries: dict[str, int]) -> Client:
        keys = key_file(tmp_path / "keys.yaml", **entries)
        transport = httpx.ASGITransport(create_app(Settings(engine="fake", keys=keys), engine))
        return lambda name: httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=bearer(name)
        )

    return of


def body(words: int = 2, **fields: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Hey " * words}], **fields}


async def test_requests_beyond_the_rate_are_429_with_what_is_left(clients: Clients) -> None:
    async with clients(ann={"requests_per_minute": 2})("ann") as client:
        for left in (1, 0):
            answered = await client.post(CHAT, json=body())
            assert answered.headers["x-ratelimit-limit-requests"] == "2"
            assert answered.headers["x-ratelimit-remaining-requests"] == str(left)
            assert 0 < float(answered.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
            assert "x-ratelimit-limit-tokens" not in answered.headers
        for path in (CHAT, "/tokenize"):
            refused = await client.post(path, json=body())
            assert "'ann' has 0 of 2 requests" in error_of(refused, 429, "rate_limit_exceeded")["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (
            'neurontune_admission_rejections_total{model_name="demo",reason="rate_limit"} 2.0'
            in (await client.get("/metrics")).text
        )


async def test_callers_have_rates_of_their_own_and_without_one_there_is_no_header(clients: Clients) -> None:
    client_of = clients(ann={"requests_per_minute": 1}, ben={"requests_per_minute": 1}, eve={})
    async with client_of("ann") as ann:
        await ann.post(CHAT, json=body())
        assert (await ann.post(CHAT, json=body())).status_code == 429
    async with client_of("ben") as ben:
        assert (await ben.post(CHAT, json=body())).status_code == 200
    async with client_of("eve") as eve:
        answered = [await eve.post(CHAT, json=body()) for _ in range(3)]
        assert all(each.status_code == 200 for each in answered)
        assert not any(name.startswith("x-ratelimit") for name in answered[0].headers)


@pytest.mark.parametrize(("choices", "stream"), [(1, False), (1, True), (3, False)])
async def test_a_request_is_charged_the_tokens_of_its_prompt_once_and_of_all_its_answers(
    clients: Clients, choices: int, stream: bool
) -> None:
    async with clients(ann={"tokens_per_minute": 1000})("ann") as client:
        await client.post(CHAT, json=body(10, n=choices, max_tokens=7, stream=stream))
        seen = await client.post("/tokenize", json={"prompt": "Hey"})
        prompt = 1 + 1 + 10  # as the fake engine counts: more than was estimated before
        assert seen.headers["x-ratelimit-remaining-tokens"] == str(1000 - prompt - 7 * choices)


async def test_a_prompt_that_is_more_than_what_is_left_is_refused_before_it_is_generated(
    clients: Clients,
) -> None:
    async with clients(ann={"tokens_per_minute": 30})("ann") as client:
        refused = await client.post(CHAT, json=body(100))
        assert "it never fits" in error_of(refused, 400, "invalid_value")["message"]
        assert "retry-after" not in refused.headers
        assert (await client.post(CHAT, json=body(max_tokens=28))).status_code == 200
        error_of(await client.post(CHAT, json=body()), 429, "rate_limit_exceeded")


async def test_a_new_minute_is_a_new_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    rates, caller, now = Rates(), Caller("ann", requests_per_minute=1), time.time()
    await rates.admit(caller)
    with pytest.raises(RateLimitError):
        await rates.admit(caller)
    monkeypatch.setattr(time, "time", lambda: now + 61)
    await rates.admit(caller)
