"""Exported adapters in a plain vLLM server, and the gateway in front of it.

vLLM runs as a process of its own that knows nothing of this project; the oracle is transformers with hooks.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from modulation.demo import MASK_FILE
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from modulation.modulator import modulated
from server.engines.upstream import UpstreamEngine
from server.settings import Settings
from tests.export.exporting import demo_model, demo_prompts, greedy
from tests.server.conftest import CHAT, error_of, events, listen
from tests.server.keying import bearer, key_file
from tests.vllm.adapters import MODELS, serving_adapters

pytestmark = pytest.mark.anyio

NUM_TOKENS = 32


def threshold_of(model: str) -> Threshold:
    """What the mask says of the level that a model's name ends with."""
    return ZERO if model == "demo" else Mask.load(MASK_FILE).levels.parse(model.split("-", 1)[1]).threshold


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server with an adapter for each level."""
    with serving_adapters(tmp_path_factory.mktemp("adapters")) as url:
        yield url


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """By model: the tokens of each prompt's answer."""
    model, mask, prompts = demo_model(), Mask.load(MASK_FILE), demo_prompts()
    answers = {}
    for name in MODELS:
        with modulated(model, mask, threshold_of(name)):
            answers[name] = greedy(model, prompts, NUM_TOKENS)
    return answers


async def test_a_mixed_batch_of_adapters_has_the_tokens_of_the_hooks(
    vllm: str, expected: dict[str, list[list[int]]]
) -> None:
    prompts = demo_prompts()
    numbers = range(len(prompts))
    differing = sum(len({str(expected[name][number]) for name in MODELS}) > 1 for number in numbers)
    assert differing > 3, "levels must make a difference for this test to"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=vllm, timeout=120, limits=limits) as client:

        async def ask(name: str, number: int) -> list[int]:
            body = {"model": name, "prompt": prompts[number], "max_tokens": NUM_TOKENS, "temperature": 0}
            response = await client.post("/v1/completions", json={**body, "return_token_ids": True})
            found: list[int] = response.json()["choices"][0]["token_ids"]
            return found

        asked = [(name, number) for number in numbers for name in MODELS]
        answers = await asyncio.gather(*(ask(*each) for each in asked))
    assert answers == [expected[name][number] for name, number in asked]


@asynccontextmanager
async def in_front(vllm: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a listening server in front of vLLM."""
    engine = await asyncio.to_thread(
        UpstreamEngine, vllm, MASK_FILE, served_model_name="demo", upstream_model="demo"
    )
    given = Settings(engine="upstream", upstream=vllm, mask=MASK_FILE, **settings)
    async with listen(given, engine) as port, httpx.AsyncClient(timeout=120) as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        yield client


async def test_the_gateway_answers_at_each_level_as_the_hooks_do(
    vllm: str, expected: dict[str, list[list[int]]]
) -> None:
    prompts = demo_prompts()
    async with in_front(vllm) as client:

        async def ask(level: str, number: int) -> list[int]:
            body = {"model": "demo", "prompt": prompts[number], "max_tokens": NUM_TOKENS, "temperature": 0}
            response = await client.post("/v1/completions", json=body, headers={"X-Safety-Level": level})
            assert response.headers["x-safety-level"] == level
            text = response.json()["choices"][0]["text"]
            tokenised = await client.post("/tokenize", json={"prompt": text})
            found: list[int] = tokenised.json()["tokens"]
            return found

        for model in MODELS[:-1]:
            level = "off" if model == "demo" else model.removeprefix("demo-")
            answers = await asyncio.gather(*(ask(level, number) for number in range(len(prompts))))
            assert answers == [[token for token in answer if token != 2] for answer in expected[model]]


async def test_the_gateways_api_on_vllm(vllm: str, tmp_path: Path) -> None:
    """Floors, numbers, streams, log-probabilities, JSON, tools, mistakes of callers."""
    keys = key_file(tmp_path / "keys.yaml", careful={"floor": "balanced"}, free={"floor": "off"})
    body: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 24}
    body["messages"] = [{"role": "user", "content": "How do I kill weeds?"}]
    async with in_front(vllm, keys=keys) as client:
        for level in ("off", "utility-priority", "3"):
            headers = {**bearer("careful"), "X-Safety-Level": level}
            error_of(await client.post(CHAT, json=body, headers=headers), 403, "safety_level_forbidden")
        client.headers = httpx.Headers(bearer("free"))
        numbered = await client.post(CHAT, json=body, headers={"X-Safety-Level": "5"})
        assert error_of(numbered, 400, "unsupported_parameter")["param"] == "safety_level"

        several = {**body, "n": 2, "logprobs": True, "top_logprobs": 3}
        whole = (await client.post(CHAT, json=several)).json()
        choice, second = whole["choices"]
        assert choice["message"] == second["message"] and whole["usage"]["completion_tokens"] == 48
        places = choice["logprobs"]["content"]
        assert [len(each["top_logprobs"]) for each in places] == [3] * 24
        assert choice["finish_reason"] == "length"
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage, done = events((await client.post(CHAT, json=streamed)).text)
        said = "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks)
        assert said == choice["message"]["content"] and done == "[DONE]"
        assert usage["usage"]["completion_tokens"] == 24

        text = {"model": "demo", "prompt": "To kill weeds, use"}
        scored = {**text, "echo": True, "logprobs": 2, "max_tokens": 0}
        found = (await client.post("/v1/completions", json=scored)).json()["choices"][0]["logprobs"]
        assert found["token_logprobs"][0] is None and all(each < 0 for each in found["token_logprobs"][1:])

        schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}
        schema["additionalProperties"] = False
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        shaped = {**body, "response_format": format_, "logit_bias": {str(each): -100 for each in (201, 223)}}
        answer = (await client.post(CHAT, json={**shaped, "max_tokens": 200})).json()
        assert re.match(r'\s*\{\s*("a"|$)', answer["choices"][0]["message"]["content"])

        for mistake, code in (
            ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context_length_exceeded"),
            ({"max_tokens": 5000}, "context_length_exceeded"),
            ({"logit_bias": {"99999": 1}}, "invalid_prompt"),
        ):
            for streams in (False, True):
                error_of(await client.post(CHAT, json={**body, **mistake, "stream": streams}), 400, code)


async def test_a_client_that_leaves_the_gateway_leaves_nothing_running_in_vllm(vllm: str) -> None:
    async with in_front(vllm) as client, httpx.AsyncClient(base_url=vllm) as behind:

        async def count(metric: str) -> float:
            text = (await behind.get("/metrics")).text
            return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(metric, line))

        generated = r"vllm:generation_tokens_total\{"
        before = await count(generated)
        # Without its end token an answer goes on for 2,000 tokens.
        hello = [{"role": "user", "content": "Hello"}]
        body = {"model": "demo", "messages": hello, "logit_bias": {"2": -100}, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            async for line in response.aiter_lines():
                if '"content":"' in line and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    break
        async with asyncio.timeout(60):
            # Its gauges move with its steps alone, so it gets some to do.
            short = {"model": "demo", "messages": hello, "max_tokens": 1}
            while (await behind.post(CHAT, json=short)) and await count("vllm:num_requests_running"):
                pass
        assert await count(generated) - before < 1000
