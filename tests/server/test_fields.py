"""The body of `POST /v1/chat/completions`: what each field accepts, and how the rest is refused."""

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import CHAT, Ask, error_of

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hello there"}
NEUTRAL: dict[str, Any] = {
    "n": 1, "stop": [], "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0,
    "logit_bias": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "min_p": 0,
    "repetition_penalty": 1.0, "service_tier": "auto", "store": False, "modalities": ["text"],
    "parallel_tool_calls": True, "user": "someone", "metadata": {"a": "b"}, "safety_identifier": "x",
}  # fmt: skip


async def test_neutral_values_are_accepted(ask: Ask) -> None:
    assert (await ask(**NEUTRAL)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["audio"]), ("reasoning_effort", "low"), ("store", True), ("prediction", {}),
        ("functions", [{}]), ("prompt_cache_key", "k"), ("verbosity", "low"), ("service_tier", "flex"),
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_refused_by_name(ask: Ask, field: str, value: Any) -> None:
    error = error_of(await ask(**{field: value}), 400, "unsupported_parameter")
    assert error["param"] == field and field in error["message"] and "not supported" in error["message"]


async def test_unknown_fields_are_refused_by_name(ask: Ask) -> None:
    error = error_of(await ask(temprature=0.1, top_z=1), 400, "unknown_parameter")
    assert "temprature" in error["message"] and "top_z" in error["message"]
    assert "temperature" in error["message"], "the way out: what is accepted"
    nested = error_of(await ask(messages=[USER | {"colour": "red"}]), 400, "unknown_parameter")
    assert nested["param"] == "messages.0.colour"


async def test_a_query_parameter_is_not_ignored(client: httpx.AsyncClient) -> None:
    body = {"model": "demo", "messages": [USER]}
    error = error_of(await client.post(f"{CHAT}?safety_level=off", json=body), 400, "unknown_parameter")
    assert error["param"] == "safety_level"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ...}, "model"), ({"model": 5}, "model"), ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [USER | {"tool_call_id": "x"}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": "[]"}}]}]}, "messages.0"),
        ({"n": 0}, "n"), ({"n": True}, "n"), ({"n": 1000}, "n"), ({"stop": ""}, "stop.0"),
        ({"stop": ["a"] * 5}, "stop"), ({"stop": 5}, "stop"), ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"logit_bias": {"5": 200}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"), ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tools": [{"type": "search"}]}, "tools.0.type"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**63}, "seed"), ({"seed": 0.5}, "seed"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"), ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"), ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"user": 5}, "user"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"cache_salt": ""}, "cache_salt"), ({"cache_salt": 5}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)  # fmt: skip
async def test_wrong_values_are_named_by_their_path(ask: Ask, fields: dict[str, Any], param: str) -> None:
    error = error_of(await ask(**fields), 400, "invalid_value")
    assert error["param"] == param and param in error["message"]
    assert error["type"] == "invalid_request_error"


GOOD = '"model":"demo","messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"), (b"   ", "empty"), (b"{", "line 1"), (b"[]", "a list"), (b'"x"', "a string"),
        (b"5", "a number"), (b"null", "null"), (b"\xff{}", "UTF-8"), (b"{} trailing", "column 4"),
        (b'{"temperature":NaN,' + GOOD.encode() + b"}", "NaN"),
        (b'{"temperature":-Infinity,' + GOOD.encode() + b"}", "-Infinity"),
        (b'{"seed":' + b"9" * 5000 + b"," + GOOD.encode() + b"}", "too many digits"),
        (b"[" * 100_000, "nested"), (b'{"a":' * 100_000, "nested"),
        (b'{"safety_level":"off",' + GOOD.encode() + b',"safety_level":"balanced"}', "safety_level"),
    ],
)  # fmt: skip
async def test_what_is_not_a_json_object_is_refused(
    client: httpx.AsyncClient, body: bytes, words: str
) -> None:
    error = error_of(await client.post(CHAT, content=body), 400, "invalid_json")
    assert words in error["message"]
    assert (await client.post(CHAT, content=f"{{{GOOD}}}")).status_code == 200, "it keeps serving"


async def test_infinity_by_way_of_a_large_exponent_is_out_of_range(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=f'{{"temperature":1e999,{GOOD}}}')
    assert error_of(response, 400, "invalid_value")["param"] == "temperature"


@pytest.mark.parametrize("field", ["model", "user", "safety_level", "\\ud800"])
async def test_half_a_surrogate_pair_is_refused_and_can_be_reported(
    client: httpx.AsyncClient, field: str
) -> None:
    """JSON may hold text that is no Unicode: no tokenizer takes it, and no error message may break on it."""
    fields = {"model": '"demo"', "messages": '[{"role":"user","content":"hi"}]', field: '"\\ud800"'}
    body = ",".join(f'"{name}":{value}' for name, value in fields.items())
    response = await client.post(CHAT, content=f"{{{body}}}")
    assert response.status_code == 400 and response.json()["error"]["message"]


async def test_half_a_surrogate_pair_in_a_message_is_refused(client: httpx.AsyncClient) -> None:
    body = '{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}'
    error = error_of(await client.post(CHAT, content=body), 400, "invalid_value")
    assert error["param"].startswith("messages.0.content")


async def test_a_body_that_is_too_large_is_not_read(client: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(5 * 2**10):
            yield b" " * 2**10

    announced = await client.post(CHAT, content=b" " * (4 * 2**20 + 1))
    error_of(announced, 413, "request_too_large")
    error_of(await client.post(CHAT, content=endless()), 413, "request_too_large")


@pytest.mark.parametrize("model", ["gpt-4o", "", "demo2", "Demo", "dem", "demo/off", "demo@off@x"])
async def test_an_unknown_model_is_not_found(ask: Ask, model: str) -> None:
    response = await ask(model=model)
    if model.startswith("demo@"):
        error_of(response, 400, "invalid_safety_level")
        return
    error = error_of(response, 404, "model_not_found")
    assert error["param"] == "model" and "demo@utility-priority" in error["message"]


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {SURROGATE: 1}}}]},
         "tools.0.function.parameters"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"pattern": SURROGATE}}}}, "response_format"),
        ({"chat_template_kwargs": {"a": [SURROGATE]}}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": '{"a": "\\ud800"}'}}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": '{"a": NaN}'}}]}]}, "messages.0"),
        ({"logit_bias": {"05": 1}}, "logit_bias"), ({"repetition_penalty": 1e-46}, "repetition_penalty"),
    ],
)  # fmt: skip
async def test_what_would_break_further_on_is_refused_at_the_door(
    client: httpx.AsyncClient, fields: Any, param: str
) -> None:
    content = json.dumps({"model": "demo", "messages": [USER], **fields})
    error = error_of(await client.post(CHAT, content=content), 400, "invalid_value")
    assert error["param"].startswith(param)


async def test_deep_json_is_refused_by_depth(client: httpx.AsyncClient) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    body = {"model": "demo", "messages": [USER], "chat_template_kwargs": deep}
    error = error_of(await client.post(CHAT, json=body), 400, "invalid_value")
    assert "deep" in error["message"]


async def test_of_a_million_wrong_items_the_first_is_named(client: httpx.AsyncClient) -> None:
    """Collecting them all once took seconds in which nobody else was answered."""
    for path, body in (
        ("/v1/completions", {"model": "demo", "prompt": [None] * 300_000}),
        ("/detokenize", {"tokens": [""] * 300_000}),
        (CHAT, {"model": "demo", "messages": [0] * 300_000}),
    ):
        message = error_of(await client.post(path, json=body), 400, "invalid_value")["message"]
        assert len(message) < 1500


@pytest.mark.parametrize("role", ["tool", "assistant"])
async def test_content_may_be_empty_where_something_else_is_said(ask: Ask, role: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "1", "content": ""}] if role == "tool" else []
    assert (await ask(messages=turns)).status_code == 200


@pytest.mark.parametrize(
    "wide",
    [
        {str(number): 1 for number in range(300_000)},
        {"prompt": [[]] * 300_000},
        {"stop": ["x"] * 300_000},
        {"logit_bias": {str(number): "x" for number in range(100_000)}},
    ],
    ids=["fields", "prompts", "stops", "biases"],
)
async def test_a_body_of_hundreds_of_thousands_of_mistakes_is_one_error(
    client: httpx.AsyncClient, wide: dict[str, Any]
) -> None:
    """Each mistake became an error of its own, which held the event loop for seconds."""
    answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", **wide})
    error_of(answer, 400, "invalid_value")
    assert len(answer.content) < 1000
