"""Adapters on the model served are models of their own for clients: each has ids, levels and keys."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.server.conftest import CHAT, Control, error_of
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio
LEVELS = ("off", "utility-priority", "balanced", "security-critical")
MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
async def client(tmp_path: Path, control: Control) -> AsyncIterator[httpx.AsyncClient]:
    keys = key_file(
        tmp_path / "keys.yaml",
        all={"floor": "off"},
        cook={"floor": "balanced", "models": ["cooking"]},
        bare={"floor": "off", "models": ["demo"]},
    )
    engine = FakeEngine(before_token=control.before_token, adapters=("cooking", "org/law-2"))
    transport = httpx.ASGITransport(create_app(Settings(engine="fake", keys=keys), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as found:
        yield found


@pytest.mark.parametrize(
    ("model", "adapter", "level"),
    [
        ("demo", None, "balanced"),
        ("demo@security-critical", None, "security-critical"),
        ("cooking", "cooking", "balanced"),
        ("cooking@off", "cooking", "off"),
        ("org/law-2@3", "org/law-2", "3"),
    ],
)
async def test_a_request_gets_the_adapter_and_the_level_that_its_model_names(
    client: httpx.AsyncClient, control: Control, model: str, adapter: str | None, level: str
) -> None:
    for path, asked in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Hello"})):
        answer = await client.post(path, json={"model": model, **asked}, headers=bearer("all"))
        assert answer.status_code == 200 and answer.json()["model"] == model
        assert answer.headers["x-safety-level"] == level
        assert control.requests.pop().adapter == adapter


async def test_who_may_use_which_is_listed_and_held_to(client: httpx.AsyncClient) -> None:
    for name, served, levels in (
        ("all", ("demo", "cooking", "org/law-2"), LEVELS),
        ("cook", ("cooking",), LEVELS[2:]),
        ("bare", ("demo",), LEVELS),
    ):
        listed = (await client.get("/v1/models", headers=bearer(name))).json()["data"]
        expected = [each for one in served for each in (one, *(f"{one}@{level}" for level in levels))]
        assert [each["id"] for each in listed] == expected
        for model in ("demo", "cooking@balanced", "org/law-2", "law"):
            body = {"model": model, "messages": MESSAGES}
            answer = await client.post(CHAT, json=body, headers=bearer(name))
            if model.partition("@")[0] in served:
                assert answer.status_code == 200
            else:
                message = error_of(answer, 404, "model_not_found")["message"]
                message = message.partition("Accepted: ")[2]
                assert all(f"{each}@balanced" in message for each in served)
                assert not any(f"{each}@" in message for each in {"demo", "cooking"} - {*served})


async def test_a_floor_holds_for_adapters_too(client: httpx.AsyncClient, control: Control) -> None:
    for model, fields, status, code in (
        ("cooking@off", {}, 403, "safety_level_forbidden"),
        ("cooking@3", {}, 403, "safety_level_forbidden"),
        ("cooking", {"safety_level": "utility-priority"}, 403, "safety_level_forbidden"),
        ("cooking@balanced", {"safety_level": "security-critical"}, 400, "safety_level_conflict"),
        ("org/law-2@balanced", {}, 404, "model_not_found"),
    ):
        body = {"model": model, "messages": MESSAGES, **fields}
        error_of(await client.post(CHAT, json=body, headers=bearer("cook")), status, code)
    assert not control.requests, "what is refused reaches no engine"


async def test_one_who_may_not_use_the_model_names_an_adapter_to_count_its_tokens(
    client: httpx.AsyncClient,
) -> None:
    head = bearer("cook")
    error_of(await client.post("/tokenize", json={"prompt": "Hi"}, headers=head), 404, "model_not_found")
    answer = await client.post("/tokenize", json={"model": "cooking", "prompt": "Hi"}, headers=head)
    assert answer.status_code == 200
