"""A key has so many requests and tokens per minute, and is told what is left."""

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from server.app import create_app
from server.callers import SCOPE_KEY, Caller
from server.engines.fake import FakeEngine
from server.errors import RateLimitError
from server.rates import Rates
from server.settings import Settings
from tests.server.conftest import CHAT, error_of

pytestmark = pytest.mark.anyio


class As:
    """An app whose every request comes from one caller, as authentication would find it."""

    def __init__(self, app: ASGIApp, caller: Caller) -> None:
        self._app, self._caller = app, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SCOPE_KEY] = self._caller
        await self._app(scope, receive, send)


def client_of(app: ASGIApp, caller: Caller) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(As(app, caller)), base_url="http://server")


@pytest.fixture
def app(engine: FakeEngine) -> ASGIApp:
    return create_app(Settings(engine="fake"), engine)


def body(words: int = 2, **fields: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Hey " * words}], **fields}


async def test_requests_beyond_the_rate_are_429_with_what_is_left(app: ASGIApp) -> None:
    async with client_of(app, Caller("ann", requests_per_minute=2)) as client:
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
        assert 'neurontune_refusals_total{reason="rate_limit"} 2.0' in (await client.get("/metrics")).text


async def test_callers_have_rates_of_their_own_and_without_one_there_is_no_header(app: ASGIApp) -> None:
    async with client_of(app, Caller("ann", requests_per_minute=1)) as ann:
        await ann.post(CHAT, json=body())
        assert (await ann.post(CHAT, json=body())).status_code == 429
    async with client_of(app, Caller("ben", requests_per_minute=1)) as ben:
        assert (await ben.post(CHAT, json=body())).status_code == 200
    async with client_of(app, Caller("eve")) as eve:
        answered = [await eve.post(CHAT, json=body()) for _ in range(3)]
        assert all(each.status_code == 200 for each in answered)
        assert not any(name.startswith("x-ratelimit") for name in answered[0].headers)


@pytest.mark.parametrize(("choices", "stream"), [(1, False), (1, True), (3, False)])
async def test_a_request_is_charged_the_tokens_of_its_prompt_once_and_of_all_its_answers(
    app: ASGIApp, choices: int, stream: bool
) -> None:
    async with client_of(app, Caller("ann", tokens_per_minute=1000)) as client:
        await client.post(CHAT, json=body(10, n=choices, max_tokens=7, stream=stream))
        seen = await client.post("/tokenize", json={"prompt": "Hey"})
        prompt = 1 + 1 + 10  # as the fake engine counts: more than was estimated before
        assert seen.headers["x-ratelimit-remaining-tokens"] == str(1000 - prompt - 7 * choices)


async def test_a_prompt_that_is_more_than_what_is_left_is_refused_before_it_is_generated(
    app: ASGIApp,
) -> None:
    async with client_of(app, Caller("ann", tokens_per_minute=30)) as client:
        refused = await client.post(CHAT, json=body(100))
        assert "It never fits" in error_of(refused, 429, "rate_limit_exceeded")["message"]
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
