"""A failing engine, as clients see it."""

import httpx
import pytest

from server.engines.base import EngineUnavailableError, GenerationError
from server.engines.fake import FakeEngine
from tests.server.conftest import Ask, Control, error_of, events

pytestmark = pytest.mark.anyio


async def test_while_it_is_rebuilt_ready_and_requests_are_503_and_say_when_to_come_back(
    ask: Ask, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.set_unready("the engine has failed (a step went wrong) and is being rebuilt")
    error_of(await client.get("/ready"), 503, "engine_unavailable")
    for stream in (False, True):
        answer = await ask(stream=stream)
        assert "being rebuilt" in error_of(answer, 503, "engine_unavailable")["message"]
        assert answer.headers["Retry-After"] == "1"
    assert (await client.get("/health")).status_code == 200
    engine.set_unready("")
    assert (await client.get("/ready")).status_code == 200 and (await ask()).status_code == 200


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineUnavailableError("a step went wrong", 7), 503, "engine_unavailable"),
        (GenerationError("NaN or infinity"), 500, "generation_failed"),
    ],
)
async def test_a_failure_is_a_status_before_the_first_token_and_an_event_after_it(
    ask: Ask, control: Control, failure: Exception, status: int, code: str
) -> None:
    control.failure = failure
    for fail_at, stream in ((0, True), (3, False)):
        control.fail_at = fail_at
        answer = await ask(stream=stream)
        error_of(answer, status, code)
        assert answer.headers.get("Retry-After") == ("7" if status == 503 else None)
    control.fail_at = 3
    answer = await ask(stream=True)
    assert answer.status_code == 200
    *before, last = events(answer.text)
    assert last["error"]["code"] == code and all("error" not in each for each in before)
