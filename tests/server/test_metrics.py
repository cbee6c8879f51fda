"""What `/metrics` says after known traffic, against counts that the test makes of the answers."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import ZERO
from modulation.masks import Mask
from server.app import create_app
from server.draining import Drain
from server.engines.base import EngineUnavailableError, GenerateRequest, GenerationError, Output
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.engines.transformers import TransformersEngine
from server.metric_table import TABLE
from server.metrics import Metrics
from server.settings import Settings
from tests.engines.contract import until
from tests.server.conftest import CHAT, Ask, Control, error_of, events
from tests.server.keying import bearer, key_file
from tests.tiny_models import random_mask, save_mask, tiny_model

pytestmark = pytest.mark.anyio
COMPLETIONS = "/v1/completions"
LATENCIES = ("queue", "prefill", "decode", "inference")


async def families(client: httpx.AsyncClient) -> dict[str, Metric]:
    """Every family that is exported, by its name without the prefix; `..._created` and those of the process
    left out."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith(("neurontune_", "process_")) for family in found)
    return {
        family.name.removeprefix("neurontune_"): family
        for family in found
        if family.name.startswith("neurontune_") and not family.name.endswith("_created")
    }


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values, in the order of the labels' names; the one model's left out."""
    found: dict[tuple[str, ...], float] = {}
    for family in (await families(client)).values():
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name", "demo") == "demo"
            found[(sample.name, *(value for _, value in sorted(labels.items())))] = sample.value
    return found


async def ended(client: httpx.AsyncClient) -> dict[str, float]:
    """How many answers have ended, by what."""
    seen = await samples(client)
    name = "neurontune_request_success_total"
    return {reason: seen[name, reason] for reason in ("stop", "length", "abort", "error")}


async def test_all_that_is_in_the_table_is_exported_as_it_says_and_nothing_else(
    ask: Ask, client: httpx.AsyncClient
) -> None:
    await ask()
    found = await families(client)
    assert found.keys() == TABLE.keys()
    for name, row in TABLE.items():
        assert (found[name].type, found[name].documentation) == (row.kind, row.help)
        for sample in found[name].samples:
            assert sample.labels.keys() - {"le"} == set(row.labels), sample
        bounds = {float(each.labels["le"]) for each in found[name].samples if each.name.endswith("_bucket")}
        assert bounds == ({*row.buckets, float("inf")} if row.buckets else set()), name


async def test_requests_count_by_level_asked_and_applied(ask: Ask, client: httpx.AsyncClient) -> None:
    for level in ("off", "off", 12, 99, None):
        await ask(safety_level=level)
    await ask(model="demo@balanced")
    seen = await samples(client)
    counted = {key[1:]: value for key, value in seen.items() if key[0] == "neurontune_requests_total"}
    assert {key: value for key, value in counted.items() if value} == {
        ("custom", "custom"): 2,
        ("balanced", "default"): 1,
        ("balanced", "balanced"): 1,
        ("off", "off"): 2,
    }
    # (12, 6), (99, 50) and twice (32, 24) are active, and twice nothing.
    assert seen["neurontune_active_neurons_sum",] == 18 + 149 + 2 * 56
    at_most = {bound: seen["neurontune_active_neurons_bucket", bound] for bound in ("0.0", "20.0", "100.0")}
    assert at_most == {"0.0": 2, "20.0": 3, "100.0": 5}
    assert seen["neurontune_active_neurons_count",] == 6


OF_LEVELS = ("neurontune_answers_total", "neurontune_refusals_total", "neurontune_requests_total")


async def test_levels_begin_at_nothing_also_those_of_another_mask(engine: FakeEngine, tmp_path: Path) -> None:
    """A rate misses what was counted before its first point: 1 is no increase where there was no 0."""
    mask = random_mask(tiny_model())
    levels = {"security-critical": (9, 4), "guest": (3, 2)}
    save_mask(replace(mask, metadata=mask.metadata.model_copy(update={"levels": levels})), tmp_path)
    app = create_app(Settings(engine="fake", mask_dir=tmp_path, default_level="off"), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        names = {"off", "utility-priority", "balanced", "security-critical", "custom"}
        for more in (set[str](), {"guest"}):
            names |= more
            seen = {key: value for key, value in (await samples(client)).items() if key[0] in OF_LEVELS}
            assert not any(seen.values())
            pairs = {(level, asked) for level in names for asked in (level, "default")}
            assert {key[1:] for key in seen if key[0] == OF_LEVELS[-1]} == pairs
            for name in OF_LEVELS[:2]:
                assert {key[1] for key in seen if key[0] == name} == names
            await app.state.reloading._swap.swap("mask.safetensors")


async def test_what_was_refused_or_left_is_no_answer_and_each_choice_is_one(
    ask: Ask, client: httpx.AsyncClient, control: Control
) -> None:
    await ask(safety_level="off", n=3)
    await ask(safety_level="off", max_tokens=5000)
    control.fail_at = 2
    await ask(safety_level="off")
    seen = await samples(client)
    assert seen["neurontune_answers_total", "off"] == 3
    assert seen["neurontune_requests_total", "off", "off"] == 3


async def test_labels_stay_few_whatever_is_asked(
    ask: Ask, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def everything(begin: int) -> None:
        for i in range(begin, begin + 12):
            await client.get(f"/nowhere/{i}")
            await client.get(f"/v1/models/name-{i}")
            await ask(safety_level=f"name-{i}")
            await ask(model=f"model-{i}", headers={"X-Request-Id": f"id-{i}"}, user=f"user-{i}")
            await ask(safety_level=i, max_tokens=1, metadata={"i": str(i)})
        for level in engine.describe().levels.names:
            await ask(safety_level=level, max_tokens=1)
        assert (await client.put("/health")).status_code == 405

    await samples(client)  # is a route as well
    await everything(0)
    before = set(await samples(client))
    await everything(50)
    after = await samples(client)
    assert after.keys() == before
    assert after["neurontune_http_requests_total", "unmatched", "404"] == 24
    assert after["neurontune_requests_total", "custom", "custom"] == 24
    assert after["neurontune_http_requests_total", "/v1/models/{model_id:path}", "404"] == 24


async def test_denials_count_by_reason(ask: Ask, client: httpx.AsyncClient) -> None:
    await ask(safety_level="nope")
    await ask(safety_level="off", model="demo@balanced")
    await ask(safety_level="off", model="demo@balanced")
    seen = await samples(client)
    assert seen["neurontune_level_denials_total", "invalid"] == 1
    assert seen["neurontune_level_denials_total", "conflict"] == 2
    assert seen["neurontune_level_denials_total", "forbidden"] == 0


async def test_http_requests_count_by_route_and_status(ask: Ask, client: httpx.AsyncClient) -> None:
    await ask()
    await ask(stream=True)
    await ask(messages=[])
    await client.get(CHAT)
    await client.get("/health")
    seen = await samples(client)
    counted = {key[1:]: value for key, value in seen.items() if key[0] == "neurontune_http_requests_total"}
    assert counted == {(CHAT, "200"): 2, (CHAT, "400"): 1, (CHAT, "405"): 1, ("/health", "200"): 1}
    timed = {
        key[1:]: value
        for key, value in seen.items()
        if key[0] == "neurontune_http_request_duration_seconds_count"
    }
    assert timed == {(CHAT,): 4, ("/health",): 1}


async def test_what_is_refused_before_its_route_counts_as_it(engine: FakeEngine, tmp_path: Path) -> None:
    """For want of a key, for its host, and at the end; documentation pages are routes as well."""
    drain = Drain()
    keys = key_file(tmp_path / "keys.yaml", ann={})
    settings = Settings(engine="fake", keys=keys, allowed_hosts="localhost", public_metrics=True)
    transport = httpx.ASGITransport(create_app(settings, engine, drain))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for i in range(3):
            error_of(await client.get(f"/v1/models/name-{i}"), 401, "missing_api_key")
            error_of(await client.get(f"/nowhere/{i}"), 401, "missing_api_key")
        error_of(await client.post(CHAT, headers={"Host": "evil.example"}), 403, "host_not_allowed")
        for path in ("/docs", "/openapi.json"):
            assert (await client.get(path, headers=bearer("ann"))).status_code == 200
        drain.begin(60)
        error_of(await client.post(CHAT, headers=bearer("ann")), 503, "shutting_down")
        seen = await samples(client)
    counted = {key[1:]: value for key, value in seen.items() if key[0] == "neurontune_http_requests_total"}
    assert {key: value for key, value in counted.items() if value} == {
        ("/v1/models/{model_id:path}", "401"): 3,
        ("unmatched", "401"): 3,
        (CHAT, "403"): 1,
        ("/docs", "200"): 1,
        ("/openapi.json", "200"): 1,
        (CHAT, "503"): 1,
    }


class Oracle:
    """What must be counted, made from answers as clients read them."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        self.num_prompt = self.num_generated = self.num_long = 0
        self.prompts: list[int] = []

    def add(self, choices: Sequence[Any], usage: Any, num_prompts: int = 1) -> None:
        self.finished.update(choice["finish_reason"] for choice in choices)
        self.prompts += [usage["prompt_tokens"] // num_prompts] * len(choices)
        self.num_generated += usage["completion_tokens"]

    @property
    def num_answers(self) -> int:
        return self.finished.total()


async def test_answers_tokens_and_phases_are_those_of_the_answers(
    ask: Ask, client: httpx.AsyncClient
) -> None:
    oracle = Oracle()
    for fields in ({}, {"max_tokens": 1}, {"n": 3}, {"stop": " answer"}, {"n": 2, "max_tokens": 7}):
        body = (await ask(temperature=0, **fields)).json()
        oracle.add(body["choices"], body["usage"])
        answer = await ask(temperature=0, stream=True, stream_options={"include_usage": True}, **fields)
        *chunks, last, done = events(answer.text)
        assert done == "[DONE]"
        ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        oracle.add(ends, last["usage"])
    completed = {"model": "demo", "prompt": ["one two", "three four"], "max_tokens": 5, "n": 2}
    body = (await client.post(COMPLETIONS, json=completed)).json()
    oracle.add(body["choices"], body["usage"], num_prompts=2)
    seen = await samples(client)
    assert oracle.finished == {"stop": 10, "length": 10} and oracle.num_answers == 20
    assert await ended(client) == {**oracle.finished, "abort": 0, "error": 0}
    assert seen["neurontune_prompt_tokens_total",] == sum(oracle.prompts)
    assert seen["neurontune_prompt_tokens_cached_total",] == 0
    assert seen["neurontune_generation_tokens_total",] == oracle.num_generated
    for name, total in (("prompt", sum(oracle.prompts)), ("generation", oracle.num_generated)):
        assert seen[f"neurontune_request_{name}_tokens_count",] == oracle.num_answers
        assert seen[f"neurontune_request_{name}_tokens_sum",] == total
    phases = (f"request_{name}_time" for name in LATENCIES)
    for name in ("time_to_first_token", "e2e_request_latency", *phases):
        assert seen[f"neurontune_{name}_seconds_count",] == oracle.num_answers, name
    # Two answers have one token: nothing between two of them, and no seconds per token.
    assert seen["neurontune_inter_token_latency_seconds_count",] == oracle.num_generated - oracle.num_answers
    assert seen["neurontune_request_time_per_output_token_seconds_count",] == oracle.num_answers - 2
    sums = {name: seen[f"neurontune_request_{name}_time_seconds_sum",] for name in LATENCIES}
    assert sums["prefill"] + sums["decode"] == pytest.approx(sums["inference"])
    between = seen["neurontune_inter_token_latency_seconds_sum",]
    assert 0 < between == pytest.approx(sums["decode"])
    first, whole = (
        seen[f"neurontune_{name}_seconds_sum",] for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert 0 < first < whole and first + between == pytest.approx(whole)
    assert sums["queue"] + sums["prefill"] < first
    # Every token of the fake engine is a step.
    assert seen["neurontune_step_distinct_levels_count",] >= oracle.num_generated
    assert seen["neurontune_prefix_cache_queries_total",] == sum(oracle.prompts)


async def test_waiting_for_room_is_queue_time_and_prefill_begins_after_it(
    settings: Settings, control: Control
) -> None:
    control.wait_at = 0
    engine = FakeEngine(max_num_seqs=1, before_token=control.before_token)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        asked = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(2)]
        await until(lambda: engine.healthy().num_waiting == 1)
        begun = asyncio.get_running_loop().time()
        await asyncio.sleep(0)
        control.gate.set()
        await asyncio.gather(*asked)
        most = asyncio.get_running_loop().time() - begun
        seen = await samples(client)
        queue, prefill, first = (
            seen[f"neurontune_{name}_seconds_sum",]
            for name in ("request_queue_time", "request_prefill_time", "time_to_first_token")
        )
        assert queue > 0 and prefill > 0 and most > 0
        assert queue + prefill < first


async def test_what_the_engine_refuses_for_what_it_says_is_no_answer(
    ask: Ask, client: httpx.AsyncClient
) -> None:
    error_of(await ask(max_tokens=5000), 400, "context_length_exceeded")
    error_of(await ask(response_format={"type": "json_object"}), 400, "unsupported_parameter")
    seen = await samples(client)
    assert sum((await ended(client)).values()) == seen["neurontune_prompt_tokens_total",] == 0
    assert seen["neurontune_requests_total", "balanced", "default"] == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait_at", [0, 4])
async def test_a_client_that_leaves_aborts_its_answers(
    ask: Ask, engine: FakeEngine, control: Control, client: httpx.AsyncClient, stream: bool, wait_at: int
) -> None:
    control.wait_at = wait_at
    leaving = asyncio.create_task(ask(stream=stream, n=2))
    await until(lambda: engine.healthy().num_running == 2)
    if wait_at:
        while (await samples(client))["neurontune_generation_tokens_total",] < 2 * wait_at:
            await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait({leaving})
    assert await ended(client) == {"stop": 0, "length": 0, "abort": 2, "error": 0}
    seen = await samples(client)
    assert seen["neurontune_generation_tokens_total",] == 2 * wait_at
    assert seen["neurontune_e2e_request_latency_seconds_count",] == 0
    assert seen["neurontune_kv_cache_usage_perc",] == 0


@pytest.mark.parametrize("failure", [GenerationError("NaN"), EngineUnavailableError("gone"), OSError("bug")])
@pytest.mark.parametrize("fail_at", [0, 3])
async def test_a_failure_is_an_error(
    ask: Ask, control: Control, client: httpx.AsyncClient, failure: Exception, fail_at: int
) -> None:
    control.failure, control.fail_at = failure, fail_at
    for stream in (False, True):
        await ask(stream=stream)
    assert await ended(client) == {"stop": 0, "length": 0, "abort": 0, "error": 2}
    assert (await samples(client))["neurontune_generation_tokens_total",] == 2 * fail_at


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_out_of_time_is_counted_as_that_and_as_aborted(
    ask: Ask, control: Control, client: httpx.AsyncClient, stream: bool
) -> None:
    control.wait_at = 2
    await ask(headers={"X-Request-Timeout": "0.1"}, stream=stream)
    assert await ended(client) == {"stop": 0, "length": 0, "abort": 1, "error": 0}
    seen = await samples(client)
    assert seen["neurontune_deadlines_exceeded_total",] == 1
    rejections = {key: value for key, value in seen.items() if "admission_rejections" in key[0]}
    assert len(rejections) == 4 and not any(rejections.values())


async def test_running_waiting_and_the_mask_are_gauges(settings: Settings, control: Control) -> None:
    control.wait_at = 1
    engine = FakeEngine(max_num_seqs=2, before_token=control.before_token, max_model_len=100)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
        asked = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(5)]
        await until(lambda: engine.healthy().num_waiting == 3 and engine.tallies().kv_cache_usage > 0.03)
        seen = await samples(client)
        assert seen["neurontune_num_requests_running",] == 2
        assert seen["neurontune_num_requests_waiting",] == 3
        assert seen["neurontune_kv_cache_usage_perc",] == 2 * (3 + 1) / 200
        assert seen["neurontune_mask_info", MASK_DIGEST, "none"] == 1
        control.gate.set()
        await asyncio.gather(*asked)
        seen = await samples(client)
        assert seen["neurontune_num_requests_running",] == seen["neurontune_num_requests_waiting",] == 0
        assert seen["neurontune_kv_cache_usage_perc",] == 0


async def test_who_comes_when_the_server_ends_is_rejected(settings: Settings, engine: FakeEngine) -> None:
    drain = Drain()
    transport = httpx.ASGITransport(create_app(settings, engine, drain))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        drain.begin(60)
        error_of(await client.post(CHAT, json={}), 503, "shutting_down")
        error_of(await client.get("/ready"), 503, "shutting_down")
        seen = await samples(client)
        assert seen["neurontune_admission_rejections_total", "shutting_down"] == 1
        assert seen["neurontune_engine_ready",] == 1


async def test_another_mask_is_another_series_and_what_could_not_be_one_is_counted(
    engine: FakeEngine, tmp_path: Path
) -> None:
    mask = random_mask(tiny_model(), num_safety=40, num_utility=20)
    method = {"attribution": {"method": "contrast", "options": {}}, "tuning": {"settings": {"method": "erm"}}}
    mask = replace(mask, metadata=mask.metadata.model_copy(update={"method": method}))
    save_mask(mask, tmp_path)
    (tmp_path / "none.safetensors").write_bytes(b"no mask")
    app = create_app(Settings(engine="fake", mask_dir=tmp_path), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        swap = app.state.reloading._swap.swap  # over HTTP it takes an admin's key
        await swap("mask.safetensors")
        for _ in range(2):
            with pytest.raises(Exception, match="cannot be put in force"):
                await swap("none.safetensors")
        with pytest.raises(Exception, match="is not in the folder"):
            await swap("../outside.safetensors")
        await swap("mask.safetensors")  # the same again
        seen = await samples(client)
        shown = {key[1:] for key in seen if key[0] == "neurontune_mask_info"}
        assert shown == {(mask.digest, "contrast+erm")}
        assert seen["neurontune_mask_reloads_total", "success"] == 2
        assert seen["neurontune_mask_reloads_total", "failure"] == 3


async def test_an_engine_that_was_rebuilt_counts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ready = []
    for reason in ("a step went wrong", "", "", "again", ""):
        engine.set_unready(reason)
        ready.append((await samples(client))["neurontune_engine_ready",])
    assert ready == [0, 1, 1, 0, 1]
    assert (await samples(client))["neurontune_engine_restarts_total",] == 2


class Speaker(FakeEngine):
    """Says what it is told, in the pieces that it is told, one token each."""

    def __init__(self, *said: Sequence[str]) -> None:
        super().__init__()
        self._said = iter(said)

    async def generate(self, _request: GenerateRequest) -> AsyncGenerator[Output, None]:
        pieces = next(self._said)
        for number, piece in enumerate(pieces, start=1):
            yield Output(piece, (3,), "length" if number == len(pieces) else None, 4, number)


REFUSING: Sequence[Sequence[str]] = (
    ("I", "\N{RIGHT SINGLE QUOTATION MARK}m sor", "ry, but no."),
    ("SORRY, BUT", " no"),
    ("x" * 189, " I will", " not do it."),  # the phrase ends at character 200
)
COMPLYING: Sequence[Sequence[str]] = (
    ("Of course", ": bread."),
    ("x" * 190, " I will", " not do it."),
    (
        "I would be so",
        "rry.",
    ),
    ("x" * 500, "I'm sorry"),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 7])
async def test_answers_that_begin_like_a_refusal_count_by_level(
    settings: Settings, stream: bool, choices: int
) -> None:
    """Phrases that lie across tokens or have curly apostrophes are found; those behind the beginning not."""
    said = [*REFUSING, *COMPLYING]
    engine = Speaker(*said, *said)
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for level in ("off", "17"):
            for _ in range(len(said) // choices):
                body = {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "Hi"}],
                    "stream": stream,
                    "n": choices,
                }
                answer = await client.post(CHAT, json=body, headers={"X-Safety-Level": level})
                assert answer.status_code == 200
        seen = await samples(client)
        counted = {key[1]: value for key, value in seen.items() if key[0] == "neurontune_refusals_total"}
        names = {"off", "utility-priority", "balanced", "security-critical", "custom"}
        assert counted == {**dict.fromkeys(names, 0), "off": len(REFUSING), "custom": len(REFUSING)}
        counted = {key[1]: value for key, value in seen.items() if key[0] == "neurontune_answers_total"}
        assert counted == {**dict.fromkeys(names, 0), "off": len(said), "custom": len(said)}


async def test_a_refusal_that_its_client_did_not_wait_for_is_none() -> None:
    metrics = Metrics(FakeEngine())
    request = GenerateRequest("Hi", ZERO)
    outputs = metrics.measured(Speaker(REFUSING[0]).generate(request), 0.0, "off")
    for _ in range(2):
        await anext(outputs)
    await outputs.aclose()
    value = metrics.registry.get_sample_value
    for name in ("answers", "refusals"):
        assert value(f"neurontune_{name}_total", {"level_applied": "off", "model_name": "demo"}) == 0
    assert value("neurontune_request_success_total", {"finished_reason": "abort", "model_name": "demo"}) == 1


@pytest.fixture
async def demo() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the demo model."""
    engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client
    finally:
        await engine.close()


async def test_prefixes_steps_and_modulation_of_a_model_are_told(demo: httpx.AsyncClient) -> None:
    """What was cached is what `usage` says; every token of requests one by one is a step of one level."""
    prompt = "How do I bake bread, and how do I slice it? " * 4
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    usages = []
    for level in ("balanced", "balanced", "off", "balanced", "off"):
        answer = await demo.post(CHAT, json={**body, "safety_level": level})
        usages.append(answer.json()["usage"])
    scored = {"model": "demo", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    assert (await demo.post(COMPLETIONS, json=scored)).status_code == 200
    seen = await samples(demo)
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert [each > 0 for each in cached] == [False, True, False, True, True]
    assert seen["neurontune_prompt_tokens_cached_total",] == sum(cached)
    assert seen["neurontune_prefix_cache_hits_total",] == sum(cached)
    assert seen["neurontune_prefix_cache_queries_total",] == sum(each["prompt_tokens"] for each in usages)
    num_steps = sum(each["completion_tokens"] for each in usages) + 1
    assert seen["neurontune_step_distinct_levels_count",] == num_steps
    assert seen["neurontune_step_distinct_levels_bucket", "1.0"] == num_steps
    assert seen["neurontune_modulation_step_seconds_count",] == num_steps // 64 > 0
    assert seen["neurontune_modulation_step_seconds_sum",] > 0
    assert seen["neurontune_mask_info", Mask.load(MASK_FILE).digest, "attack_aware+maml"] == 1
    assert seen["neurontune_request_success_total", "length"] >= 1
    assert seen["neurontune_kv_cache_usage_perc",] == 0


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
