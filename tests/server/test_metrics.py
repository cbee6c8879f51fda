"""What `/metrics` says after known traffic."""

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.settings import Settings
from tests.engines.contract import until
from tests.server.conftest import CHAT, Ask, Control

pytestmark = pytest.mark.anyio


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values, in the order of the labels' names."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_requests_count_by_level_asked_and_applied(ask: Ask, client: httpx.AsyncClient) -> None:
    for level in ("off", "off", 12, 99, None):
        await ask(safety_level=level)
    await ask(model="demo@balanced")
    seen = await samples(client)
    counted = {key[1:]: value for key, value in seen.items() if key[0] == "neurontune_requests_total"}
    assert counted == {
        ("custom", "custom"): 2,
        ("balanced", "default"): 1,
        ("balanced", "balanced"): 1,
        ("off", "off"): 2,
    }


async def test_labels_stay_few_whatever_is_asked(ask: Ask, client: httpx.AsyncClient) -> None:
    await samples(client)
    before = len(await samples(client))
    for i in range(10):
        await client.get(f"/nowhere/{i}")
        await ask(safety_level=f"name-{i}")
    for i in range(10):
        await ask(safety_level=i, max_tokens=1)
    grown = [key for key in await samples(client) if not key[0].endswith("_created")]
    assert len(grown) - before < 25
    assert ("neurontune_http_requests_total", "unmatched", "404") in grown


async def test_denials_count_by_reason(ask: Ask, client: httpx.AsyncClient) -> None:
    await ask(safety_level="nope")
    await ask(safety_level="off", model="demo@balanced")
    await ask(safety_level="off", model="demo@balanced")
    seen = await samples(client)
    assert seen["neurontune_level_denials_total", "invalid"] == 1
    assert seen["neurontune_level_denials_total", "conflict"] == 2


async def test_http_requests_count_by_route_and_status(ask: Ask, client: httpx.AsyncClient) -> None:
    await ask()
    await ask(stream=True)
    await ask(messages=[])
    await client.get(CHAT)
    await client.get("/health")
    seen = await samples(client)
    counted = {key[1:]: value for key, value in seen.items() if key[0] == "neurontune_http_requests_total"}
    assert counted == {(CHAT, "200"): 2, (CHAT, "400"): 1, (CHAT, "405"): 1, ("/health", "200"): 1}


async def test_tokens_and_seconds_are_measured(ask: Ask, client: httpx.AsyncClient) -> None:
    usages = [(await ask()).json()["usage"] for _ in range(3)]
    seen = await samples(client)
    num_tokens = sum(usage["completion_tokens"] for usage in usages)
    assert seen["neurontune_prompt_tokens_total",] == sum(usage["prompt_tokens"] for usage in usages)
    assert seen["neurontune_generation_tokens_total",] == num_tokens
    assert seen["neurontune_time_to_first_token_seconds_count",] == 3
    assert seen["neurontune_inter_token_latency_seconds_count",] == num_tokens - 3
    assert seen["neurontune_e2e_request_latency_seconds_count",] == 3
    whole, first = (
        seen[f"neurontune_{name}_seconds_sum",] for name in ("e2e_request_latency", "time_to_first_token")
    )
    between = seen["neurontune_inter_token_latency_seconds_sum",]
    assert 0 < first < whole and first + between == pytest.approx(whole)


async def test_running_waiting_and_the_mask_are_gauges(settings: Settings, control: Control) -> None:
    control.wait_at = 1
    engine = FakeEngine(max_num_seqs=2, before_token=control.before_token)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
        asked = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(5)]
        await until(lambda: engine.healthy().num_waiting == 3)
        seen = await samples(client)
        assert seen["neurontune_requests_running",] == 2 and seen["neurontune_requests_waiting",] == 3
        assert seen["neurontune_mask_info", MASK_DIGEST, "demo"] == 1
        control.gate.set()
        await asyncio.gather(*asked)
        seen = await samples(client)
        assert seen["neurontune_requests_running",] == seen["neurontune_requests_waiting",] == 0


async def test_two_apps_count_apart(settings: Settings) -> None:
    """Metrics belong to an app, not to the process."""
    apps = [create_app(settings, FakeEngine()) for _ in range(2)]
    clients = [
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") for app in apps
    ]
    await clients[0].get("/health")
    assert ("neurontune_http_requests_total", "/health", "200") not in await samples(clients[1])
    for client in clients:
        await client.aclose()
