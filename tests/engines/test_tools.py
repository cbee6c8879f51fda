"""Calls of tools: found in answers, forced by grammars, written by the chat template."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.demo.vocabulary import CHAT_TEMPLATE
from modulation.levels import ZERO
from server.engines.base import (
    Chat,
    GenerateRequest,
    Grammar,
    GrammarError,
    Message,
    ParsedAnswer,
    PromptError,
    Sampling,
    ToolCall,
    UnsupportedByEngineError,
)
from server.engines.grammar import Grammars
from server.engines.text import ChatText
from server.engines.transformers import TransformersEngine
from tests.engines.contract import GREEDY, collect
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.anyio

TEMPLATE_WITHOUT_TOOLS = """\
{%- for message in messages %}
{%- if message['role'] not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception("Role '" + message['role'] + "' is unknown; accepted: system, developer, \
user, assistant, tool.") }}
{%- endif %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{{- '<|im_start|>' + role + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": parameters,
        "required": list(parameters),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


WEATHER = tool(
    "get_weather",
    city={"type": "string", "maxLength": 12},
    unit={"enum": ["celsius", "fahrenheit"]},
    days={"type": "integer", "minimum": 1, "maximum": 7},
)
CLOCK = tool(
    "tell-time",
    zone={"type": "object", "properties": {"hours": {"enum": [-1, 0, 1]}}, "required": ["hours"],
          "additionalProperties": False},
)  # fmt: skip
ASKED = Chat((Message("user", "What is the weather in Brno?"),), (WEATHER, CLOCK))


def call(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def chat_text(tokenizer: PreTrainedTokenizerFast) -> ChatText:
    return ChatText(tokenizer, [tokenizer.eos_token_id], len(tokenizer))


def demo_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR, **settings)


@pytest.fixture(scope="module")
def demo() -> ChatText:
    return chat_text(demo_tokenizer())


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    made = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    yield made
    await made.close()


# What an answer says.


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        ("It rains.\n", "It rains.\n", []),
        ("", "", []),
        (call("get_weather", city="Brno"), "", [("get_weather", {"city": "Brno"})]),
        (
            f"{call('get_weather', city='Brno')}\n{call('tell-time')}\n{call('get_weather', city='Rome')}",
            "",
            [("get_weather", {"city": "Brno"}), ("tell-time", {}), ("get_weather", {"city": "Rome"})],
        ),
        (f"Let me look.\n\n{call('tell-time', a=1)}\n", "Let me look.", [("tell-time", {"a": 1})]),
        (
            f"First {call('tell-time')} then {call('tell-time', a=2)}",
            "First  then",
            [("tell-time", {}), ("tell-time", {"a": 2})],
        ),
        (
            call("get_weather", place={"city": "Žďár", "at": [1, 2.5, None, {"x": True}]}),
            "",
            [("get_weather", {"place": {"city": "Žďár", "at": [1, 2.5, None, {"x": True}]}})],
        ),
        (call("get_weather", city="東京 🌧"), "", [("get_weather", {"city": "東京 🌧"})]),
        ('<tool_call>{"arguments": {}, "name": "tell-time"}</tool_call>', "", [("tell-time", {})]),
        ('<tool_call>\n{"name": "tell-time", "arguments": {}}', "", [("tell-time", {})]),
        (call("get_weather", city="</tool_call>"), "", [("get_weather", {"city": "</tool_call>"})]),
        (call("get_weather", city="<tool_call>"), "", [("get_weather", {"city": "<tool_call>"})]),
        (call("get_weather", city="7", days="7"), "", [("get_weather", {"city": "7", "days": "7"})]),
        (
            f"<think>Would {call('get_weather')} do?</think>\n{call('tell-time')}",
            f"<think>Would {call('get_weather')} do?</think>",
            [("tell-time", {})],
        ),
        (f"A <think> tag. {call('tell-time')}", "A <think> tag.", [("tell-time", {})]),
    ],
)
def test_calls_are_found_in_order_and_the_rest_is_said(
    demo: ChatText, answer: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    parsed = demo.parse(answer, ASKED)
    expected = tuple(ToolCall(name, json.dumps(given, ensure_ascii=False)) for name, given in calls)
    assert parsed == ParsedAnswer(content, expected)


MALFORMED = (
    "<tool_call>\nget_weather(Brno)\n</tool_call>",
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": }}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "argum',
    '<tool_call>\n{"name": "get_weather"}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": "Brno"}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": ["get_weather"], "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {"days": NaN}}\n</tool_call>',
    '<tool_call>\n[{"name": "get_weather", "arguments": {}}]\n</tool_call>',
    "<tool_call>\n" + '{"a": ' * 20_000 + "}" * 20_000 + "\n</tool_call>",
    "<tool_call>",
    "</tool_call>",
    "<tool_call></tool_call>",
    call("launch_rocket", at="noon"),
)


@pytest.mark.parametrize("malformed", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_proper_call_stays_text_and_hides_no_other(demo: ChatText, malformed: str) -> None:
    assert demo.parse(malformed, ASKED) == ParsedAnswer(malformed, ())
    said = f"Well: {malformed} "
    assert demo.parse(said, ASKED) == ParsedAnswer(said, ())
    parsed = demo.parse(f"{call('tell-time')}{malformed}{call('tell-time', n=2)}", ASKED)
    assert parsed == ParsedAnswer(malformed, (ToolCall("tell-time", "{}"), ToolCall("tell-time", '{"n": 2}')))


def test_half_a_character_is_kept_as_json_escapes_it(demo: ChatText) -> None:
    """`"\\ud83d"` is JSON, but what it means cannot be written as UTF-8."""
    answer = '<tool_call>\n{"name": "tell-time", "arguments": {"a": "\\ud83d é"}}\n</tool_call>'
    (found,) = demo.parse(answer, ASKED).tool_calls
    assert found.arguments.encode() and json.loads(found.arguments) == {"a": "\ud83d é"}


@pytest.mark.parametrize("piece", ["<tool_call>", "<think>", "<think></think>", call("tell-time")])
def test_a_model_that_repeats_itself_is_taken_apart_in_time(demo: ChatText, piece: str) -> None:
    answer = piece * 10_000
    begin = time.monotonic()
    demo.parse(answer, ASKED)
    demo.parse(answer + "}</tool_call>", ASKED)
    assert time.monotonic() - begin < 20


def test_without_tools_in_the_chat_an_answer_is_all_text(demo: ChatText) -> None:
    assert demo.parse(call("get_weather"), Chat(ASKED.messages)) == ParsedAnswer(call("get_weather"), ())


# Other formats than the demo model's.

BRACKETS = {
    "version": 1,
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "[THINK]", "close": "[/THINK]"},
        "tool_calls": {
            "open_pattern": r"\[CALL (?P<name>[\w-]+)\]",
            "close": "[/CALL]",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}
BRACKET_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}[THINK]{% endif %}{% endif %}"
)


def bracket_text() -> ChatText:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BRACKET_TEMPLATE
    tokenizer.response_template = BRACKETS
    return chat_text(tokenizer)


def test_a_response_template_of_the_tokenizers_own_is_honoured() -> None:
    text = bracket_text()
    assert text.encode(ASKED)
    one = "[CALL get_weather]<city>7</city><days>3</days>[/CALL]"
    answer = f"Now{one}[CALL nothing][/CALL]{one}{call('tell-time')}"
    expected = ToolCall("get_weather", '{"city": "7", "days": 3}')  # as the schema types them
    assert text.parse(answer, ASKED) == ParsedAnswer(
        f"Now[CALL nothing][/CALL]{call('tell-time')}", (expected, expected)
    )


def test_a_thought_that_the_prompt_begins_is_no_call_and_one_without_end_hides_none() -> None:
    text = bracket_text()
    thinking = Chat(ASKED.messages, ASKED.tools, {"thinking": True})
    one, other = "[CALL tell-time][/CALL]", "[CALL tell-time]<a>1</a>[/CALL]"
    answer = f"I could {one}[/THINK]{other}"
    assert len(text.parse(answer, ASKED).tool_calls) == 2
    assert text.parse(answer, thinking) == ParsedAnswer(
        f"I could {one}[/THINK]", (ToolCall("tell-time", '{"a": "1"}'),)
    )
    assert len(text.parse(other, thinking).tool_calls) == 1


def test_calls_in_another_format_cannot_be_forced() -> None:
    with pytest.raises(UnsupportedByEngineError, match="as Hermes and Qwen do") as caught:
        bracket_text().tool_grammar(ASKED, None, several=True)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("template", "response_template"),
    [
        (BRACKET_TEMPLATE, None),
        (BRACKET_TEMPLATE, {"start_anchor": "<|assistant|>", "fields": {"content": {}}}),
        (BRACKET_TEMPLATE, {"version": 99, "fields": {}}),
        # The markers of Hermes around something else, as Qwen3-Coder has it.
        (
            BRACKET_TEMPLATE + "{% for message in messages %}{% for call in message.tool_calls or [] %}"
            "<tool_call>\n<function={{ call.function.name }}>\n</function>\n</tool_call>"
            "{% endfor %}{% endfor %}",
            None,
        ),
    ],
    ids=["no calls", "response template without calls", "unreadable response template", "other calls"],
)
def test_a_model_whose_calls_cannot_be_read_refuses_tools(
    template: str, response_template: dict[str, Any] | None
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.response_template = response_template
    text = chat_text(tokenizer)
    assert text.encode(Chat(ASKED.messages))
    with pytest.raises(UnsupportedByEngineError, match="How this model writes calls") as caught:
        text.encode(ASKED)
    assert caught.value.param == "tools"
    with pytest.raises(UnsupportedByEngineError, match="How this model writes calls") as caught:
        text.tool_grammar(ASKED, None, several=False)
    assert caught.value.param == "tool_choice"


def test_a_model_whose_template_has_no_place_for_tools_refuses_them() -> None:
    with pytest.raises(UnsupportedByEngineError, match="no place for tools") as caught:
        chat_text(byte_tokenizer()).encode(ASKED)
    assert caught.value.param == "tools"


# Grammars.


async def answers(engine: TransformersEngine, grammar: Grammar, sampling: Sampling) -> tuple[str, bool]:
    request = GenerateRequest(ASKED, ZERO, sampling, max_tokens=600, grammar=grammar)
    outputs = await collect(engine.generate(request))
    return "".join(each.text for each in outputs), outputs[-1].finish_reason == "stop"


def assert_valid(found: ToolCall) -> None:
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in ASKED.tools}
    jsonschema.validate(json.loads(found.arguments), schemas[found.name])


SAMPLINGS = [GREEDY, *(Sampling(temperature=1.0, seed=seed) for seed in range(4))]


@pytest.mark.parametrize("name", [None, "get_weather", "tell-time"])
async def test_an_answer_under_the_grammar_of_one_call_is_that_call(
    engine: TransformersEngine, name: str | None
) -> None:
    grammar = engine.tool_grammar(ASKED, name, several=False)
    for sampling in SAMPLINGS:
        answer, is_whole = await answers(engine, grammar, sampling)
        parsed = engine.parse(answer, ASKED)
        assert is_whole and parsed.content == "", answer
        (found,) = parsed.tool_calls
        assert name in (None, found.name)
        assert_valid(found)


async def test_an_answer_under_the_grammar_of_several_calls_is_one_or_more(
    engine: TransformersEngine,
) -> None:
    grammar = engine.tool_grammar(ASKED, None, several=True)
    for sampling in SAMPLINGS:
        answer, is_whole = await answers(engine, grammar, sampling)
        parsed = engine.parse(answer, ASKED)
        assert parsed.tool_calls, answer
        assert not is_whole or parsed.content == "", answer
        for found in parsed.tool_calls:
            assert_valid(found)


def with_markers(*, special: bool) -> PreTrainedTokenizerFast:
    tokenizer = demo_tokenizer()
    markers = [
        AddedToken(each, special=special, normalized=False) for each in ("<tool_call>", "</tool_call>")
    ]
    tokenizer.add_tokens(markers, special_tokens=special)
    return tokenizer


TOKENIZERS = {
    "markers are spelled": demo_tokenizer,
    "markers are added tokens": lambda: with_markers(special=False),
    "markers are special tokens": lambda: with_markers(special=True),
}


def accepts(tokenizer: PreTrainedTokenizerFast, grammar: Grammar, answer: str) -> bool:
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    matcher = grammars.matcher(grammar)
    try:
        for token in [*ids, tokenizer.eos_token_id]:
            matcher.accept(token)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_the_grammar_says_what_the_chat_template_writes(make: Any) -> None:
    tokenizer = make()
    text = chat_text(tokenizer)
    weather = call("get_weather", city="Žďár", unit="celsius", days=7)
    clock = call("tell-time", zone={"hours": -1})
    one, named, several = (
        text.tool_grammar(ASKED, name, several)
        for name, several in ((None, False), ("tell-time", False), (None, True))
    )
    for grammar, answer, expected in (
        (one, weather, True),
        (one, clock, True),
        (one, f"{weather}\n{clock}", False),
        (one, f"Sure. {weather}", False),
        (one, "", False),
        (one, call("get_weather", city="Brno", unit="kelvin", days=7), False),
        (one, call("tell-time", city="Brno", unit="celsius", days=7), False),
        (named, clock, True),
        (named, weather, False),
        (several, f"{weather}\n{clock}\n{weather}", True),
        (several, weather, True),
        (several, "", False),
        (several, f"{weather}\n", False),
    ):
        assert accepts(tokenizer, grammar, answer) is expected, answer


def test_markers_that_are_special_tokens_reach_the_parser_and_no_other_answer() -> None:
    tokenizer = with_markers(special=True)
    text = chat_text(tokenizer)
    answer = f"Yes. {call('tell-time')}"
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    stream = text.stream(ASKED)
    said = "".join(stream.push([token]) for token in ids) + stream.finish()
    assert said == answer
    assert text.parse(said, ASKED) == ParsedAnswer("Yes.", (ToolCall("tell-time", "{}"),))
    assert text.stream(Chat(ASKED.messages)).push(ids) == 'Yes. \n{"name": "tell-time", "arguments": {}}\n'


def test_references_inside_a_tools_schema_are_followed() -> None:
    paint = tool("paint", colour={"$ref": "#/$defs/colour"})
    paint["function"]["parameters"]["$defs"] = {"colour": {"enum": ["red", "blue"]}}
    tokenizer = demo_tokenizer()
    grammar = chat_text(tokenizer).tool_grammar(Chat(ASKED.messages, (paint, CLOCK)), None, several=False)
    assert accepts(tokenizer, grammar, call("paint", colour="blue"))
    assert not accepts(tokenizer, grammar, call("paint", colour="green"))


def test_a_tool_without_parameters_takes_none(demo: ChatText) -> None:
    chat = Chat(ASKED.messages, ({"type": "function", "function": {"name": "stop"}},))
    grammar = demo.tool_grammar(chat, "stop", several=False)
    assert accepts(demo_tokenizer(), grammar, call("stop"))
    assert not accepts(demo_tokenizer(), grammar, call("stop", now=True))


def test_a_name_that_is_no_tools_and_parameters_that_are_no_object_are_refused(demo: ChatText) -> None:
    with pytest.raises(UnsupportedByEngineError, match="no tool 'fly'; accepted: get_weather, tell-time"):
        demo.tool_grammar(ASKED, "fly", several=False)
    listed = {"type": "function", "function": {"name": "sum", "parameters": {"type": "array"}}}
    with pytest.raises(GrammarError, match="'sum' are of type 'array'"):
        demo.tool_grammar(Chat(ASKED.messages, (listed,)), None, several=False)


# The demo model's chat template.


def rendered(turns: list[dict[str, Any]], template: str = CHAT_TEMPLATE, **settings: Any) -> str:
    text = demo_tokenizer().apply_chat_template(
        turns, chat_template=template, tokenize=False, **{"add_generation_prompt": True, **settings}
    )
    assert isinstance(text, str)
    return text


def turn(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def function_call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_shipped_template_is_that_of_the_source() -> None:
    assert (MODEL_DIR / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert demo_tokenizer().chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "turns",
    [
        [turn("user", "Hi")],
        [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", " \n")],
        [turn("developer", "Be kind.\n"), turn("user", "Grüße {x} \\ <tool_call>")],
        [turn("user", "Hi"), turn("system", "Late."), turn("assistant", ""), turn("developer", "Later.")],
        [turn("user", "Hi", name="Ada"), turn("assistant", "So", tool_calls=[])],
    ],
)
@pytest.mark.parametrize("answering", [True, False])
def test_conversations_without_tools_read_as_they_did_when_the_model_was_trained(
    turns: list[dict[str, Any]], answering: bool
) -> None:
    for tools in (None, []):
        now = rendered(turns, add_generation_prompt=answering, tools=tools)
        assert now == rendered(turns, TEMPLATE_WITHOUT_TOOLS, add_generation_prompt=answering)


def test_tools_their_calls_and_what_they_gave_are_written_as_hermes_does() -> None:
    turns = [
        turn("developer", "Be kind."),
        turn("user", "Weather?"),
        turn("assistant", None, tool_calls=[function_call("tell-time"), function_call("tell-time", a="é\n")]),
        turn("tool", "12:00", tool_call_id="call_1"),
        turn("assistant", "Wait.", tool_calls=[function_call("get_weather", city="Brno")]),
        turn("tool", "rain"),
        turn("system", "Hurry."),
        turn("assistant", "It rains."),
    ]
    listed = "\n".join(json.dumps(each) for each in (WEATHER, CLOCK))
    head = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
        f"with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\nFor each "
        "function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        "<|im_end|>\n"
    )
    calls = call("tell-time") + "\n" + call("tell-time", a="é\n")
    body = (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{calls}<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\n12:00\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\nWait.\n{call('get_weather', city='Brno')}<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>system\nHurry.<|im_end|>\n"
        "<|im_start|>assistant\nIt rains.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered(turns, tools=[WEATHER, CLOCK]) == f"<|im_start|>system\nBe kind.\n\n{head}{body}"
    assert rendered(turns[1:], tools=[WEATHER, CLOCK]) == f"<|im_start|>system\n{head}{body}"
    assert rendered(turns[1:]) == body


def test_a_call_that_was_parsed_is_written_as_it_was_said(demo: ChatText) -> None:
    answer = f"Wait.\n{call('get_weather', city='Žďár', at=[1])}\n{call('tell-time')}"
    parsed = demo.parse(answer, ASKED)
    calls = tuple(function_call(each.name, **json.loads(each.arguments)) for each in parsed.tool_calls)
    again = Chat((*ASKED.messages, Message("assistant", parsed.content, calls)), ASKED.tools)
    assert f"<|im_start|>assistant\n{answer}<|im_end|>" in demo.decode(demo.encode(again))


@pytest.mark.parametrize(
    "chat",
    [
        Chat(ASKED.messages, (tool("a<|im_end|>"),)),
        Chat((Message("assistant", "", (function_call("a", b="<|im_end|>"),)),), ASKED.tools),
        Chat((Message("tool", "x", tool_call_id="<|im_end|>"),), ASKED.tools),
        Chat((Message("tool", "x", name="<|im_end|>"),), ASKED.tools),
    ],
    ids=["tool", "call", "call id", "name"],
)
def test_control_tokens_are_refused_wherever_a_chat_may_hold_text(demo: ChatText, chat: Chat) -> None:
    with pytest.raises(PromptError, match=r"0 contains '<\|im_end\|>'"):
        demo.encode(chat)
