"""`POST /v1/chat/completions`: answers, streams, what fields do, and what happens when the engine fails."""

import json

import httpx
import pytest

from modulation.levels import ZERO
from server.engines.base import Chat, EngineError, GenerateRequest, GenerationError, Message, Sampling
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.schemas import ChatCompletionRequest
from tests.engines.contract import collect
from tests.server.conftest import CHAT, Ask, Control, error_of, events

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hello there"}


async def test_an_answer_has_openais_shape(ask: Ask, engine: FakeEngine) -> None:
    response = await ask(safety_level="off", temperature=0)
    expected = await collect(
        engine.generate(GenerateRequest(Chat((Message("user", "Hello there"),)), ZERO, Sampling(0)))
    )
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["model"] == "demo" and MASK_DIGEST in body["system_fingerprint"]
    text = "".join(output.text for output in expected)
    message = {"role": "assistant", "content": text, "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    last = expected[-1]
    assert body["usage"] == {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_completion_tokens,
        "total_tokens": last.num_prompt_tokens + last.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_content_type_is_not_asked(client: httpx.AsyncClient) -> None:
    """`curl -d` sends form-urlencoded; the documented example does not set a content type."""
    body = json.dumps({"model": "demo", "messages": [USER]})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (await client.post(CHAT, content=body, headers=headers)).status_code == 200


async def test_a_stream_says_the_same_as_the_whole_answer(ask: Ask) -> None:
    whole = (await ask(temperature=0)).json()
    response = await ask(temperature=0, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_with_usage_ends_with_it(ask: Ask) -> None:
    whole = (await ask(temperature=0)).json()
    response = await ask(temperature=0, stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events(response.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_every_sampling_field_reaches_the_engine(ask: Ask, control: Control) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    await ask(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
        safety_level="balanced", temperature=0.5, top_p=0.9, top_k=7, seed=-(2**63), max_tokens=5,
    )  # fmt: skip
    [request] = control.requests
    assert request.prompt.messages == (Message("system", "Be brief."), Message("user", "Hello"))
    assert request.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=-(2**63))
    assert request.max_tokens == 5


async def test_a_salt_reaches_the_engine_and_changes_nothing_that_is_said(
    ask: Ask, client: httpx.AsyncClient, control: Control
) -> None:
    plain, salted = [(await ask(seed=1, **each)).json()["choices"] for each in ({}, {"cache_salt": "a"})]
    assert plain == salted
    body = {"model": "demo", "prompt": ["Hello", "there"], "cache_salt": "b", "n": 2}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert [each.cache_salt for each in control.requests] == ["", "a", *["b"] * 4]


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
async def test_both_names_of_the_token_limit_work(ask: Ask, limits: dict[str, int]) -> None:
    body = (await ask(**limits)).json()
    assert body["usage"]["completion_tokens"] == 3 and body["choices"][0]["finish_reason"] == "length"


async def test_nulls_count_as_not_given(ask: Ask, control: Control) -> None:
    """Clients send their optional fields as null."""
    optional = {
        name: None for name in ChatCompletionRequest.model_fields if name not in ("model", "messages")
    }
    assert (await ask(**optional)).status_code == 200
    assert control.requests[0].sampling == Sampling() and control.requests[0].max_tokens is None


async def test_an_answer_can_be_sent_back_as_it_came(ask: Ask) -> None:
    message = (await ask()).json()["choices"][0]["message"]
    message |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    assert (await ask(messages=[USER, message, USER])).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_the_engine_refuses_is_a_400_also_for_streams(ask: Ask, stream: bool) -> None:
    long = [{"role": "user", "content": "word " * 300}]
    error = error_of(await ask(messages=long, stream=stream), 400, "context_length_exceeded")
    assert "200" in error["message"]
    error_of(await ask(max_tokens=200, stream=stream), 400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_not_ready_is_a_503(ask: Ask, engine: FakeEngine, stream: bool) -> None:
    engine.set_unready("It is being rebuilt.")
    assert "rebuilt" in error_of(await ask(stream=stream), 503, "engine_unavailable")["message"]
    assert "x-safety-level" not in (await ask(stream=stream)).headers


FAILURES = [
    (GenerationError("NaN in the logits."), "generation_failed"),
    (KeyError("secret"), "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "code"), FAILURES)
async def test_a_failure_before_the_answer_is_a_500_without_its_inside(
    ask: Ask, control: Control, failure: Exception, code: str, stream: bool
) -> None:
    control.fail_at, control.failure = 0, failure
    response = await ask(stream=stream)
    message = error_of(response, 500, code)["message"]
    assert ("NaN" in message) == isinstance(failure, EngineError)
    assert "secret" not in response.text and "Traceback" not in response.text


@pytest.mark.parametrize(("failure", "code"), FAILURES)
async def test_a_failure_in_mid_stream_is_the_last_event(
    ask: Ask, control: Control, engine: FakeEngine, failure: Exception, code: str
) -> None:
    control.fail_at, control.failure = 3, failure
    response = await ask(stream=True)
    *chunks, last = events(response.text)
    assert response.status_code == 200 and len(chunks) == 4
    assert last["error"]["code"] == code and "secret" not in response.text
    assert engine.healthy().num_running == 0


async def test_a_failure_in_the_middle_of_a_whole_answer_is_a_500(ask: Ask, control: Control) -> None:
    control.fail_at, control.failure = 3, GenerationError("NaN in the logits.")
    error_of(await ask(), 500, "generation_failed")
