"""The server in front of another engine: keys, floors and levels here, answers from there."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from modulation.demo import MASK_FILE
from modulation.masks import Mask
from server.app import create_app
from server.engines.base import GenerateRequest
from server.engines.fake import FakeEngine
from server.engines.upstream import UpstreamEngine
from server.process import bind
from server.settings import Settings
from tests.engines.contract import is_idle, until
from tests.engines.test_upstream import DONE, USAGE, gateway, said, standin
from tests.gateway.relay import LEVELS, Relay
from tests.gateway.standin import Standin
from tests.server.conftest import CHAT, error_of, events, listen
from tests.server.keying import bearer, key_file
from tests.tiny_models import random_mask, save_mask, tiny_model

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent.parent
SERVE = [sys.executable, "-m", "server", "serve"]
BODY = {"model": "served", "messages": [{"role": "user", "content": "Hello there"}]}


@asynccontextmanager
async def in_front_of(
    upstream: Standin, folder: Path, engine_settings: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, UpstreamEngine]]:
    """A client of the application in front of `upstream`, and its engine."""
    mask = save_mask(random_mask(tiny_model()), folder)
    async with gateway(upstream, mask, **(engine_settings or {})) as engine:
        given = Settings(
            engine="upstream", upstream="http://up", mask=mask, served_model_name="served", **settings
        )
        transport = httpx.ASGITransport(create_app(given, engine), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, engine


async def test_every_way_to_name_a_level_names_its_adapter(tmp_path: Path) -> None:
    upstream = standin()
    async with in_front_of(upstream, tmp_path) as (client, _):
        for level in ("off", "security-critical", "balanced", "utility-priority"):
            adapter = "demo" if level == "off" else f"demo-{level}"
            for headers, fields in (
                ({"X-Safety-Level": level}, {}),
                ({}, {"safety_level": level}),
                ({}, {"model": f"served@{level}"}),
            ):
                response = await client.post(CHAT, json={**BODY, **fields}, headers=headers)
                assert response.status_code == 200, response.text
                assert response.headers["x-safety-level"] == level
                assert upstream.asked[-1]["model"] == adapter
        await client.post(CHAT, json=BODY)
        assert upstream.asked[-1]["model"] == "demo-balanced", "the server's default"


async def test_a_number_is_refused_by_name_unless_it_means_a_named_level(tmp_path: Path) -> None:
    upstream = standin()
    async with in_front_of(upstream, tmp_path) as (client, _):
        error = error_of(
            await client.post(CHAT, json=BODY, headers={"X-Safety-Level": "3"}), 400, "unsupported_parameter"
        )
        assert error["param"] == "safety_level" and "none for numbers" in error["message"]
        assert not upstream.asked
        same = await client.post(CHAT, json=BODY, headers={"X-Safety-Level": "12"})
        assert same.status_code == 200 and upstream.asked[-1]["model"] == "demo-security-critical"


async def test_floors_hold_and_what_they_refuse_is_never_asked(tmp_path: Path) -> None:
    keys = key_file(tmp_path / "keys.yaml", careful={"floor": "security-critical"}, free={"floor": "off"})
    upstream = standin()
    async with in_front_of(upstream, tmp_path, keys=keys) as (client, _):
        assert (await client.post(CHAT, json=BODY)).status_code == 401
        for level in ("off", "balanced", "utility-priority", "3"):
            refused = await client.post(
                CHAT, json=BODY, headers={**bearer("careful"), "X-Safety-Level": level}
            )
            error_of(refused, 403, "safety_level_forbidden")
            through_model = {**BODY, "model": f"served@{level}"}
            refused = await client.post(CHAT, json=through_model, headers=bearer("careful"))
            error_of(refused, 403, "safety_level_forbidden")
        assert not upstream.asked
        answered = await client.post(CHAT, json=BODY, headers=bearer("careful"))
        assert answered.headers["x-safety-level"] == "security-critical"
        assert upstream.asked[-1]["model"] == "demo-security-critical"
        await client.post(CHAT, json=BODY, headers={**bearer("free"), "X-Safety-Level": "off"})
        assert upstream.asked[-1]["model"] == "demo"
        for asked in upstream.asked:
            assert "nt-the-key" not in str(asked), "a caller's key is none of the upstream's business"


async def test_whole_and_streamed_answers_are_those_of_the_engine_behind(tmp_path: Path) -> None:
    upstream = standin()
    async with in_front_of(upstream, tmp_path) as (client, _):
        body = {**BODY, "temperature": 0, "n": 2, "logprobs": True, "top_logprobs": 2}
        whole = (await client.post(CHAT, json=body)).json()
        texts = [each["message"]["content"] for each in whole["choices"]]
        assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith("Fake answer:")
        assert whole["usage"]["completion_tokens"] > 2 and whole["usage"]["prompt_tokens"] == 4
        assert whole["model"] == "served" and len(whole["choices"][0]["logprobs"]["content"]) > 2
        stream = await client.post(
            CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        *chunks, usage, done = events(stream.text)
        said = ["", ""]
        for chunk in chunks:
            for choice in chunk["choices"]:
                said[choice["index"]] += choice["delta"].get("content") or ""
        assert said == texts and done == "[DONE]" and usage["usage"] == whole["usage"]
        stopped = (await client.post(CHAT, json={**BODY, "temperature": 0, "stop": " answer"})).json()
        assert stopped["choices"][0]["message"]["content"] == "Fake"
        completed = (await client.post("/v1/completions", json={"model": "served", "prompt": "a b"})).json()
        assert completed["choices"][0]["text"].startswith("Fake") and completed["usage"]["prompt_tokens"] == 2
        assert upstream.asked[-1]["max_tokens"] == 16
        counted = (await client.post("/tokenize", json={"prompt": "a b c"})).json()
        assert counted["count"] == 3


async def test_tool_calls_reach_the_caller_whole_and_streamed(tmp_path: Path) -> None:
    upstream = standin()
    call = {"index": 0, "id": "a", "function": {"name": "look_up", "arguments": '{"of": "x"}'}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    async with in_front_of(upstream, tmp_path) as (client, _):
        upstream.renames = {}
        upstream.raw = [
            each.replace(b'"model": "demo"', b'"model": "demo-balanced"')
            for each in (said(content="Well."), said("tool_calls", tool_calls=[call]), USAGE, DONE)
        ]
        body = {**BODY, "tools": [tool], "tool_choice": "required"}
        choice = (await client.post(CHAT, json=body)).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Well."
        (found,) = choice["message"]["tool_calls"]
        assert found["function"] == {"name": "look_up", "arguments": '{"of": "x"}'}
        assert upstream.asked[-1]["tool_choice"] == "required"
        stream = events((await client.post(CHAT, json={**body, "stream": True})).text)
        deltas = [each["choices"][0]["delta"] for each in stream[:-1]]
        assert "".join(each.get("content") or "" for each in deltas) == "Well."
        (calls,) = (each["tool_calls"] for each in deltas if each.get("tool_calls"))
        assert calls[0]["function"] == {"name": "look_up", "arguments": '{"of": "x"}'}


async def test_no_room_there_is_429_here_with_the_same_retry_after(tmp_path: Path) -> None:
    upstream = standin()
    async with in_front_of(upstream, tmp_path) as (client, _):
        upstream.status, upstream.headers = 429, {"retry-after": "7"}
        for body in (BODY, {**BODY, "stream": True}):
            response = await client.post(CHAT, json=body)
            error_of(response, 429, "server_overloaded")
            assert response.headers["retry-after"] == "7"


async def test_an_upstream_that_is_not_well_makes_ready_503_with_the_reason(tmp_path: Path) -> None:
    upstream = standin()
    async with in_front_of(upstream, tmp_path, {"watch_seconds": 0.05}) as (client, engine):
        assert (await client.get("/ready")).status_code == 200
        upstream.health = 503
        await until(lambda: not engine.healthy().ready)
        assert "not well" in error_of(await client.get("/ready"), 503, "engine_unavailable")["message"]
        refused = await client.post(CHAT, json=BODY)
        error_of(refused, 503, "engine_unavailable")
        assert refused.headers["retry-after"] == "5"
        upstream.health = 200
        await until(lambda: engine.healthy().ready)
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_audit_and_metrics_say_what_they_say_of_any_engine(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    async with in_front_of(standin(), tmp_path, audit_log=str(audit)) as (client, _):
        await client.post(CHAT, json=BODY, headers={"X-Safety-Level": "security-critical"})
        metrics = (await client.get("/metrics")).text
        applied = 'level_applied="security-critical",level_asked="security-critical"'
        assert re.search(rf"neurontune_requests_total{{{applied},.*}} 1\.0", metrics)
        generated = re.search(r"^neurontune_generation_tokens_total\S* (\S+)$", metrics, re.MULTILINE)
        assert generated and float(generated[1]) > 2
    (line,) = (json.loads(each) for each in audit.read_text().splitlines())
    assert "security-critical" in json.dumps(line) and line["status"] == 200
    assert line["completion_tokens"] == float(generated[1]) and line["prompt_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_leaves_nothing_running_there(tmp_path: Path, stream: bool) -> None:
    """From its socket through this server and to the other one, which sees its own client go."""
    gate, stalled = asyncio.Event(), asyncio.Event()

    async def stall(request: GenerateRequest, index: int) -> None:
        if index == 3 and not isinstance(request.prompt, str):
            stalled.set()
            await gate.wait()

    behind = FakeEngine(before_token=stall)
    upstream = standin(behind)
    mask = save_mask(random_mask(tiny_model()), tmp_path)
    async with gateway(upstream, mask) as engine:
        settings = Settings(engine="upstream", upstream="http://up", mask=mask, served_model_name="served")
        async with listen(settings, engine) as port:
            body = json.dumps({**BODY, "stream": stream}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await asyncio.wait_for(stalled.wait(), 10)
            assert behind.healthy().num_running == 1
            writer.transport.abort()
            await asyncio.wait_for(upstream.left.wait(), 10)
            await until(lambda: is_idle(behind) and is_idle(engine))


@pytest.fixture
def process() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts a process and gives it with the first address that it prints; all end with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> tuple[subprocess.Popen[str], str]:
        found = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=os.environ
        )
        started.append(found)
        assert found.stdout is not None
        for line in found.stdout:
            if address := re.search(r"^(?:address +)?(http://127\.0\.0\.1:\d+)$", line):
                return found, address[1]
        raise AssertionError(f"{command} ended before it said its address")

    yield start
    for each in started:
        each.kill()
        each.communicate()


async def test_an_upstream_process_that_is_killed_ends_streams_with_an_error_and_ready_with_503(
    tmp_path: Path, process: Callable[..., tuple[subprocess.Popen[str], str]]
) -> None:
    mask = save_mask(random_mask(tiny_model()), tmp_path)
    models = [
        f"{'demo' if level.name == 'off' else f'demo-{level.name}'}="
        f"{level.threshold.num_safety},{level.threshold.num_utility}"
        for level in Mask.load(mask).levels
    ]
    behind, url = process(sys.executable, "-m", "tests.gateway.standin", *models)
    _, address = process(
        *(*SERVE, "--engine", "upstream", "--upstream", f"{url}/v1", "--mask", str(mask), "--port", "0"),
        *("--adapter", "balanced=demo-balanced", "--adapter", "utility-priority=demo-utility-priority"),
    )
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        async with client.stream("POST", CHAT, json={**BODY, "model": "demo", "stream": True}) as response:
            lines = [line async for line in _until_killed(response, behind)]
        assert '"code":"engine_unavailable"' in lines[-1] and "[DONE]" not in lines[-1]
        while (await client.get("/ready")).status_code != 503:
            await asyncio.sleep(0.01)
        error_of(await client.post(CHAT, json={**BODY, "model": "demo"}), 503, "engine_unavailable")


async def _until_killed(response: httpx.Response, process: subprocess.Popen[str]) -> AsyncIterator[str]:
    async with aclosing(response.aiter_lines()) as lines:
        async for line in lines:
            if line:
                yield line
            if '"content":" answer:"' in line:
                process.send_signal(signal.SIGKILL)


async def test_in_front_of_a_real_server_answers_are_token_for_token_its_own(
    process: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    """Two processes of `neurontune serve`; between them only what makes levels look like adapters."""
    _, behind = process(*SERVE, "--dtype", "float32", "--port", "0")
    relay, listener = Relay(behind), bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(relay.app(), log_level="error", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = (*SERVE, "--engine", "upstream", "--upstream", url, "--mask", str(MASK_FILE), "--port", "0")
        _, front = await asyncio.to_thread(process, *command)
        async with httpx.AsyncClient(timeout=60) as client:
            for model, level in LEVELS.items():
                relay.asked.clear()
                for prompt in ("How do I kill weeds?", "As a JSON object: how do I poison a neighbour?"):
                    messages = [{"role": "user", "content": prompt}]
                    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 48, "n": 2}
                    here, there = await both(client, (front, behind), CHAT, body, {"X-Safety-Level": level})
                    assert here["choices"] == there["choices"]
                    told = ("prompt_tokens", "completion_tokens")
                    assert [here["usage"][name] for name in told] == [there["usage"][name] for name in told]
                assert set(relay.asked) == {(model, CHAT)}
            text = {"model": "demo", "prompt": "To kill weeds,"}
            for path, body in (
                ("/v1/completions", {**text, "temperature": 0, "echo": True}),
                ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}),
                ("/tokenize", {"prompt": "To kill weeds,", "return_token_strs": True}),
                ("/detokenize", {"tokens": [20, 30, 40]}),
            ):
                here, there = await both(client, (front, behind), path, body)
                for each in (here, there):
                    for changing in ("id", "created", "usage"):
                        each.pop(changing, None)
                assert here == there
            scored = {**text, "echo": True, "logprobs": 2, "max_tokens": 0}
            pair = await both(client, (front, behind), "/v1/completions", scored)
            here, there = (each["choices"][0]["logprobs"] for each in pair)
            assert here["tokens"] == there["tokens"] and here["text_offset"] == there["text_offset"]
            assert here["token_logprobs"][1:] == pytest.approx(there["token_logprobs"][1:], abs=1e-4)
            assert here["token_logprobs"][0] is None is there["token_logprobs"][0]
    finally:
        server.should_exit = True
        await serving
        listener.close()
        await relay.close()


async def both(
    client: httpx.AsyncClient, urls: tuple[str, str], path: str, body: Any, headers: Any = None
) -> list[dict[str, Any]]:
    """What each of two servers answers to the same request."""
    return [(await client.post(url + path, json=body, headers=headers)).json() for url in urls]
