"""Tools through OpenAI's own client: calls that are forced fit their schema, and their answers go back."""

import json
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

QUESTION = {"role": "user", "content": "What is the weather on Monday?"}


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [
    function(
        "get_weather",
        day={"enum": ["Monday", "Tuesday"]},
        hour={"type": "integer", "maximum": 9, "minimum": 0},
    ),
    function("set_alarm", loud={"type": "boolean"}),
]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
NAMED = {"type": "function", "function": {"name": "set_alarm"}}


def asked(client: OpenAI, **fields: Any) -> Any:
    fields = {"model": "demo", "messages": [QUESTION], "temperature": 0, "tools": TOOLS} | fields
    return client.chat.completions.create(**fields)


def check(call: Any) -> str:
    """The name of a call whose arguments fit its schema."""
    assert call.id.startswith("call_") and call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return str(call.function.name)


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_fits_the_schema_of_a_tool(client: OpenAI, seed: int) -> None:
    answer = asked(
        client, tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=1
    ).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls
    assert check(call) in SCHEMAS


def test_a_named_function_is_called(client: OpenAI) -> None:
    answer = asked(client, tool_choice=NAMED).choices[0]
    assert [check(call) for call in answer.message.tool_calls] == ["set_alarm"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_stream_brings_the_same_call(client: OpenAI, choice: Any) -> None:
    fields: Any = {"tool_choice": choice, "parallel_tool_calls": False}
    chunks = [chunk.choices[0] for chunk in asked(client, stream=True, **fields)]
    called = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    [whole] = asked(client, **fields).choices[0].message.tool_calls
    assert [call.index for call in called] == [0] and check(called[0]) == whole.function.name
    assert called[0].function.arguments == whole.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    assert not "".join(chunk.delta.content or "" for chunk in chunks)


def test_the_stream_helper_puts_calls_together(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo",
        messages=[QUESTION],  # type: ignore[list-item]
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice=NAMED,  # type: ignore[arg-type]
        temperature=0,
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or ()
    assert check(call) == "set_alarm"


@pytest.mark.parametrize("stream", [False, True])
def test_auto_leaves_it_to_the_model_which_was_not_trained_to_call(client: OpenAI, stream: bool) -> None:
    answer = asked(client, tool_choice="auto", stream=stream, max_tokens=60)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert (
            answer.choices[0].finish_reason in ("stop", "length") and not answer.choices[0].message.tool_calls
        )
    assert text and "<tool_call>" not in text


def test_none_is_as_if_there_were_no_tools(client: OpenAI) -> None:
    without = client.chat.completions.create(model="demo", messages=[QUESTION], temperature=0)  # type: ignore[list-item]
    answer = asked(client, tool_choice="none")
    assert answer.choices[0].message.content == without.choices[0].message.content
    assert without.usage is not None and answer.usage.prompt_tokens == without.usage.prompt_tokens


def test_calls_and_their_answers_go_back(client: OpenAI) -> None:
    called = asked(client, tool_choice=NAMED).choices[0].message
    [call] = called.tool_calls
    answered = {"role": "tool", "tool_call_id": call.id, "content": "It rings at six."}
    before = asked(client, messages=[QUESTION]).usage.prompt_tokens
    for message in (called, called.model_dump(exclude_none=True)):
        answer = asked(client, messages=[QUESTION, message, answered], max_tokens=20)
        assert answer.choices[0].message.content and answer.usage.prompt_tokens > before + 20


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_tools_that_make_no_sense_are_refused(client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        asked(client, **fields)
    assert caught.value.param == param and caught.value.code == "invalid_value"
