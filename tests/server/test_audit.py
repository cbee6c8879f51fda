"""The audit log: what a request, a denial and a reload leave in it, and what never gets there."""

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import GENERATING, create_app, reload
from server.engines.fake import LEVELS, MASK_DIGEST, FakeEngine
from server.errors import SettingsError
from server.settings import Settings, read_settings
from tests.engines.contract import until
from tests.server.conftest import CHAT, Control, listen
from tests.server.keying import bearer, key_file, key_of
from tests.server.test_authentication import OPEN, routes_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return key_file(tmp_path / "keys.yaml", mobile={}, root={"role": "admin", "floor": "off"})


@pytest.fixture
def settings(keys: Path, log: Path) -> Settings:
    return Settings(engine="fake", keys=keys, audit_log=str(log))


@pytest.fixture
def served(settings: Settings, engine: FakeEngine) -> FastAPI:
    return create_app(settings, engine)


@pytest.fixture
async def client(served: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(served, raise_app_exceptions=False, client=("192.0.2.7", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


Written = Callable[[], Awaitable[list[dict[str, Any]]]]


@pytest.fixture
def written(served: FastAPI, log: Path) -> Written:
    """End the log and read it: everything that was said until now."""

    async def read() -> list[dict[str, Any]]:
        await asyncio.to_thread(served.state.audit.close)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return read


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Hello there"}], **fields}


async def test_a_request_leaves_one_line_that_says_who_asked_for_what(
    client: httpx.AsyncClient, written: Written
) -> None:
    head = {**bearer("root"), "X-Request-Id": "mine", "X-Safety-Level": "off"}
    usage = (await client.post(CHAT, headers=head, json=body_of(max_tokens=3))).json()["usage"]
    (line,) = await written()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert 0 < line.pop("duration_seconds") < 60
    assert line == {
        "event": "request",
        "request_id": "mine",
        "key": "root",
        "client": "192.0.2.7",
        "method": "POST",
        "path": CHAT,
        "status": 200,
        "model": "demo",
        "level_asked": "off",
        "level_applied": "off",
        "num_safety": 0,
        "num_utility": 0,
        "mask": MASK_DIGEST,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 3,
        "finish_reason": "length",
        "error": None,
        "num_left_out": 0,
    }


async def test_levels_tokens_and_ends_are_those_of_the_answer(
    client: httpx.AsyncClient, written: Written
) -> None:
    chat = [body_of(), body_of(safety_level="security-critical", n=2), body_of(model="demo@40", max_tokens=2)]
    answers = [await client.post(CHAT, headers=bearer("mobile"), json=each) for each in chat]
    completion = {"model": "demo", "prompt": ["a", "b b"], "n": 2, "max_tokens": 2}
    answers.append(await client.post("/v1/completions", headers=bearer("mobile"), json=completion))
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(stream=True, max_tokens=7))
    lines = await written()
    assert [(line["level_asked"], line["level_applied"]) for line in lines] == [
        (None, "balanced"),
        ("security-critical", "security-critical"),
        ("40", "40"),
        (None, "balanced"),
        (None, "balanced"),
    ]
    assert [line["model"] for line in lines] == ["demo", "demo", "demo@40", "demo", "demo"]
    for line in lines:
        threshold = LEVELS.parse(line["level_applied"]).threshold
        assert (line["num_safety"], line["num_utility"]) == (threshold.num_safety, threshold.num_utility)
    for line, answer in zip(lines, answers, strict=False):
        for count in ("prompt_tokens", "completion_tokens"):
            assert line[count] == answer.json()["usage"][count]
    assert lines[4]["completion_tokens"] == 7 and lines[4]["prompt_tokens"] == lines[0]["prompt_tokens"]
    assert [line["finish_reason"] for line in lines] == ["stop", "stop", "length", "length", "length"]


async def test_denials_and_mistakes_are_lines_too(client: httpx.AsyncClient, written: Written) -> None:
    await client.get("/v1/models")
    await client.post(CHAT, headers={"Authorization": "Bearer nt-wrong"}, json=body_of())
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(safety_level="off"))
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(safety_level="off", model="demo@64"))
    await client.post(CHAT, headers=bearer("mobile"), content="no JSON")
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(max_tokens=100_000))
    await client.get("/v1/models", headers=bearer("mobile"))
    await client.get("/health")
    lines = await written()
    said = [
        (line["event"], line["key"], line["status"], line["error"], line["level_asked"]) for line in lines
    ]
    assert said == [
        ("denied", None, 401, "missing_api_key", None),
        ("denied", None, 401, "invalid_api_key", None),
        ("denied", "mobile", 403, "safety_level_forbidden", "off"),
        ("request", "mobile", 400, "safety_level_conflict", "off, 64"),
        ("request", "mobile", 400, "invalid_json", None),
        ("request", "mobile", 400, "context_length_exceeded", None),
    ]
    assert [line["level_applied"] for line in lines] == [*[None] * 5, "balanced"]
    assert [line["finish_reason"] for line in lines] == [*[None] * 5, "error"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_an_aborted_request(
    settings: Settings, engine: FakeEngine, control: Control, log: Path, stream: bool
) -> None:
    control.wait_at = 3
    async with listen(settings, engine) as port, httpx.AsyncClient(timeout=20) as client:
        url = f"http://127.0.0.1:{port}{CHAT}"
        asking = asyncio.create_task(_read(client, url, body_of(stream=stream)))
        await until(lambda: bool(control.requests))
        await until(lambda: engine.healthy().num_running == 1)
        asking.cancel()
        await until(lambda: engine.num_aborted == 1)
        await until(lambda: log.read_bytes().endswith(b"\n"))
    (line,) = [json.loads(each) for each in log.read_text().splitlines()]
    assert line["finish_reason"] == "aborted" and line["key"] == "mobile" and line["client"] == "127.0.0.1"


async def _read(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    async with client.stream("POST", url, headers=bearer("mobile"), json=body) as response:
        async for _ in response.aiter_bytes():
            pass


async def test_what_fails_in_the_middle_of_a_stream_is_an_error(
    client: httpx.AsyncClient, control: Control, written: Written
) -> None:
    control.fail_at = 2
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(stream=True))
    await client.post(CHAT, headers=bearer("mobile"), json=body_of())
    streamed, whole = await written()
    assert (streamed["status"], whole["status"]) == (200, 500)
    for line in (streamed, whole):
        assert line["finish_reason"] == "error" and line["error"] == "internal_error"
        assert line["completion_tokens"] == 2


async def test_reloads_are_lines(served: FastAPI, keys: Path, written: Written) -> None:
    await reload(served)
    keys.write_text("keys: [")
    await reload(served)
    lines = await written()
    assert [line.pop("time")[:2] for line in lines] == ["20", "20"]
    told = {name: value for name, value in lines[0].items() if value is not None}
    assert told == {"event": "reload", "what": "keys", "ok": True, "detail": "2 keys"}
    assert not lines[1]["ok"] and f"{keys}, line 1" in lines[1]["detail"]


async def test_no_key_and_no_prompt_gets_into_any_log(
    client: httpx.AsyncClient, log: Path, written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        messages = [{"role": "user", "content": "a very private matter"}]
        for head in (bearer("mobile"), {"Authorization": f"Bearer {key_of('wrong')}"}):
            for more in ({}, {"safety_level": "off"}, {"temperature": "hot"}):
                await client.post(CHAT, headers=head, json=body_of(messages=messages, **more))
        await client.get("/metrics", headers=bearer("mobile"))
    assert len(await written()) == 4, "of those without a valid key only the first"
    for text in (log.read_text(), caplog.text):
        assert "nt-the-key" not in text and "private" not in text


async def test_what_a_client_sends_cannot_write_a_line_of_its_own(
    client: httpx.AsyncClient, written: Written
) -> None:
    level = 'x"}\n{"event": "request", "key": "root"}\u2028' + "y" * 5000
    await client.post(CHAT, headers=bearer("mobile"), json=body_of(safety_level=level))
    (line,) = await written()
    assert line["key"] == "mobile" and len(line["level_asked"]) == 200


async def test_prompts_are_written_where_that_is_set_and_redacted(
    keys: Path, log: Path, engine: FakeEngine
) -> None:
    app = create_app(Settings(engine="fake", keys=keys, audit_log=str(log), audit_prompts=True), engine)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=bearer("root")
    ) as client:
        text = "I am ada@example.org, call +44 20 7946 0958; " * 3
        await client.post(CHAT, json=body_of(messages=[{"role": "user", "content": text}], n=2))
        await client.post("/v1/completions", json={"model": "demo", "prompt": [[6, 7], [8]], "max_tokens": 1})
    await asyncio.to_thread(app.state.audit.close)
    chat, tokens = [json.loads(line)["prompt"] for line in log.read_text().splitlines()]
    assert chat == "user: " + "I am [email], call [number]; " * 3
    assert tokens == "(2 tokens)\n(1 tokens)"


async def test_every_route_that_generates_is_audited(served: FastAPI) -> None:
    """A new route that takes a POST is one of these, or is named here because it generates nothing."""
    posts = {path for method, path in routes_of(served) if method == "POST"}
    assert posts - {"/tokenize", "/detokenize", "/admin/mask"} == set(GENERATING) and not posts & OPEN


async def test_a_flood_without_keys_is_a_line_an_address_a_reason_and_a_second(
    served: FastAPI, written: Written
) -> None:
    """And what was left out is counted: nobody is hidden behind a flood, and it does not fill the disk."""
    async with served.router.lifespan_context(served):
        for address in ("192.0.2.7", "192.0.2.8"):
            transport = httpx.ASGITransport(served, client=(address, 5000))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for number in range(200):
                    wrong = {"Authorization": "Bearer nt-wrong"} if number % 2 else {}
                    assert (await client.post(CHAT, headers=wrong, json=body_of())).status_code == 401
    lines = await written()
    counts: Counter[tuple[str, str]] = Counter()
    for line in lines:
        counts[line["client"], line["error"]] += 1 + line["num_left_out"]
    reasons = ("missing_api_key", "invalid_api_key")
    assert counts == {(f"192.0.2.{host}", reason): 100 for host in (7, 8) for reason in reasons}
    assert len(lines) < 200


@pytest.mark.parametrize("target", ["/no/such/folder/audit.jsonl", "/"])
def test_a_log_that_cannot_be_opened_is_refused_at_start(target: str) -> None:
    with pytest.raises(SettingsError, match=r"audit_log: /.* cannot be opened for writing"):
        create_app(Settings(engine="fake", audit_log=target), FakeEngine())


@pytest.mark.parametrize("flag", [{"audit_prompts": True}, {"audit_keep": 3}, {"audit_max_bytes": 5}])
def test_settings_of_a_log_that_there_is_not_are_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="without audit_log there is no use for audit_"):
        read_settings(flag)


async def test_a_full_disk_stops_no_answer_and_is_counted(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(engine="fake", audit_log="/dev/full"), engine)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for _ in range(3):
            assert (await client.post(CHAT, json=body_of())).status_code == 200
        await asyncio.to_thread(app.state.audit.close)
        assert "neurontune_audit_failures_total 3.0" in (await client.get("/metrics")).text
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "No space left on device" in errors[0]
