"""How a model writes calls of tools: taking answers apart, and grammars that force a call.

Knows a tokenizer, its templates and transformers' response parser. Knows no model and no request.

The format is that of the tokenizer's response template where it has one that knows tool calls; else that of
Hermes and Qwen where the chat template writes it; else it is unknown, and tools are refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing import ResponseParser, parse_response
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from server.engines.base import Grammar, GrammarError, ParsedAnswer, ToolCall, UnsupportedByEngineError
from server.engines.grammar import JSON_STYLE

_CALLS: Final = "tool_calls"  # the name of the field in every response template
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
HERMES: Final[Mapping[str, Any]] = {
    # Nothing of the prompt belongs to the answer but what stands in an assistant's turn of ChatML.
    "start_anchor_pattern": r"\A(?:.*<\|im_start\|>assistant\n|.*)",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        _CALLS: {
            "open": _OPEN,
            # Behind the object: an argument's text may hold the marker as well.
            "close_pattern": r"(?<=\})\s*" + _CLOSE,
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
            },
        },
        "content": {},
    },
}

_PROBED = ToolCall("probe", '{"of": "tools"}')
_PROBE_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": _PROBED.name,
        "description": "-",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "-"}}},
    },
}
_PROBE_TURNS: Final[tuple[dict[str, Any], ...]] = (
    {"role": "user", "content": "-"},
    {
        "role": "assistant",
        "content": "",
        _CALLS: [
            {
                "id": "call00000",
                "type": "function",
                "function": {"name": _PROBED.name, "arguments": json.loads(_PROBED.arguments)},
            }
        ],
    },
)


def find_tool_format(tokenizer: PreTrainedTokenizerFast) -> "ToolFormat | None":
    """The format that the model's tokenizer tells of; None where it tells of none that is known."""
    hermes = ToolFormat(tokenizer, HERMES, is_hermes=True)
    is_hermes = _writes(tokenizer, hermes)
    own = getattr(tokenizer, "response_template", None)
    try:
        if own is not None and (found := ToolFormat(tokenizer, own, is_hermes)).knows_calls:
            return found
    except (TypeError, ValueError):  # one that this version of transformers cannot read
        pass
    return hermes if is_hermes else None


def _writes(tokenizer: PreTrainedTokenizerFast, expected: "ToolFormat") -> bool:
    """Whether the chat template writes a call as `expected` reads it. Others use the same markers around
    something else, so only a rendered call tells."""
    try:
        text = tokenizer.apply_chat_template(list(_PROBE_TURNS), tools=[_PROBE_TOOL], tokenize=False)
    except Exception:  # templates raise what they like, at a turn without a tool's answer for example
        return False
    assert isinstance(text, str), type(text)
    return expected.parse(text, "", [_PROBE_TOOL]).tool_calls == (_PROBED,)


class ToolFormat:
    """One format of tool calls, given as a response template.

    `markers` are the tokenizer's special tokens that the template looks for: they must stand in the text of
    an answer that is to be taken apart.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: Mapping[str, Any], is_hermes: bool
    ) -> None:
        self._template = load_response_template(dict(template))
        self._is_hermes = is_hermes
        self._added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        fields = template["fields"]
        self.markers = frozenset(_named(special, list(fields.values())))
        self._silent = self.markers - _named(special, fields.get(_CALLS))

    @property
    def knows_calls(self) -> bool:
        field = self._template.fields.get(_CALLS)
        return field is not None and field.open_re is not None

    def parse(self, answer: str, prompt: str, tools: Sequence[Mapping[str, Any]]) -> ParsedAnswer:
        """Take apart what was said after `prompt`. What is no proper call of one of `tools` stays text."""
        said: list[str] = []
        calls: list[ToolCall] = []
        place = 0
        for starts, end in self._regions(answer, prompt):
            for start in starts:
                if found := self._calls(answer[start:end], tools):
                    said.append(answer[place:start])
                    calls += found
                    place = end
                    break
        said.append(answer[place:])
        content = "".join(said)
        for marker in self._silent:
            content = content.replace(marker, "")
        return ParsedAnswer(content.strip() if calls else content, tuple(calls))

    def grammar(self, tools: Sequence[Mapping[str, Any]], name: str | None, several: bool) -> Grammar:
        """Answers that call `name`, or any of `tools`: once, or if `several` once or more.

        Raises:
            UnsupportedByEngineError: the format is not that of Hermes, or no tool has that name.
            GrammarError: a tool's parameters are not an object.
        """
        if not self._is_hermes:
            raise UnsupportedByEngineError(
                "Calls of tools can be forced only for models that write them as Hermes and Qwen do, JSON "
                f"between {_OPEN} and {_CLOSE}; this one writes them in another way. Use tool_choice "
                '"auto" or "none".',
                "tool_choice",
            )
        functions = [function_of(tool) for tool in tools]
        chosen = [each for each in functions if name in (None, each["name"])]
        if not chosen:
            raise UnsupportedByEngineError(
                f"tool_choice: there is no tool {name!r}; accepted: "
                f"{', '.join(each['name'] for each in functions) or 'none'}.",
                "tool_choice",
            )
        # A marker that is a token of its own is named, one that is not is spelled.
        opening, closing = (each if each in self._added else _literal(each) for each in (_OPEN, _CLOSE))
        newline = _literal("\n")
        lines = [
            f"start: call ({newline} call)*" if several else "start: call",
            f"call: {opening} {newline} function {newline} {closing}",
            f"function: {' | '.join(f'f{number}' for number in range(len(chosen)))}",
            *(f"f{number}: {_function_rule(each)}" for number, each in enumerate(chosen)),
        ]
        return Grammar("lark", "\n".join(lines) + "\n")

    def _regions(self, answer: str, prompt: str) -> Iterator[tuple[list[int], int]]:
        """Where calls may stand: one may begin at each of some places, and end at one.

        What another field holds, a thought for example, is passed over; but one that never ends hides
        nothing. Two beginnings are tried, the first and the last: a call that broke off may precede one.
        """
        ahead = _OpeningsAhead(self._template, answer)
        field, start, body = self._opened_by(prompt), 0, 0
        while True:
            if field is None:
                found = ahead.first(body)
                if found is None:
                    return
                field, start, body = found
            close = field.close_re.search(answer, body) if field.close_re is not None else None
            if field.name == _CALLS:
                end = close.end() if close else len(answer)
                before_close = close.start() if close else end
                later = [each.start() for each in field.open_re.finditer(answer, body, before_close)]
                yield [start, *later[-1:]], end
                body = max(end, start + 1)
            elif close:
                body = max(close.end(), start + 1)
            else:
                ahead.forget(field)
            field = None

    def _opened_by(self, prompt: str) -> ResponseTemplateField | None:
        """The field other than calls that the prompt begins and leaves open, as with a first `<think>`."""
        try:
            parser = ResponseParser(self._template, prefix=prompt)
        except Exception:  # what the prompt holds is no field's content
            return None
        opened = None
        for event in parser.initial_events:
            if event["type"] == "region_open":
                opened = self._template.fields[event["field"]]
            elif event["type"] == "region_close":
                opened = None
        return opened if opened and opened.open_re is not None and opened.name != _CALLS else None

    def _calls(self, region: str, tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
        """The calls in a region; none where anything about one is wrong."""
        # JSON tells numbers from text by itself; elsewhere a tool's schema has to.
        is_json = self._template.fields[_CALLS].content == "json"
        functions = [function_of(tool) for tool in tools]
        typed: list[Any] = [] if is_json else [{"function": each} for each in functions]
        try:
            message = parse_response(region, self._template, prefix="", tools=typed)
            known = {each["name"] for each in functions}
            return [_call(each, known) for each in _flat(message.get(_CALLS))]
        except Exception:  # a model can write anything, and templates fail at it in any way
            return []


class _OpeningsAhead:
    """Where the fields of a template next begin in a text; each stretch is searched once."""

    def __init__(self, template: ResponseTemplate, text: str) -> None:
        self._text = text
        self._fields = [field for field in template.fields.values() if field.open_re is not None]
        self._found = {field.name: field.open_re.search(text) for field in self._fields}

    def first(self, place: int) -> tuple[ResponseTemplateField, int, int] | None:
        """The field that begins first from `place` on (of two the longer beginning), and from where to
        where its beginning goes."""
        openings = []
        for number, field in enumerate(self._fields):
            match = self._found[field.name]
            if match is not None and match.start() < place:
                match = self._found[field.name] = field.open_re.search(self._text, place)
            if match is not None:
                openings.append((match.start(), -match.end(), number))
        if not openings:
            return None
        start, end, number = min(openings)
        return self._fields[number], start, -end

    def forget(self, field: ResponseTemplateField) -> None:
        self._found[field.name] = None


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool, as OpenAI writes it, is."""
    function: Mapping[str, Any] = tool["function"]
    return function


def _call(found: Any, known: set[str]) -> ToolCall:
    """A parsed call in the contract's form. Raises ValueError where it is none of a known tool."""
    function = found["function"]
    name, arguments = function["name"], function["arguments"]
    if name not in known or not isinstance(arguments, dict):
        raise ValueError(f"no call of a known tool: {found!r}")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if re.search(r"[\ud800-\udfff]", text):  # half a character: UTF-8 cannot write it, JSON can escape it
        text = json.dumps(arguments)
    return ToolCall(name, text)


def _flat(found: Any) -> Iterator[Any]:
    """Calls one by one: a region may hold one or a list, and a field one region or several."""
    if isinstance(found, list):
        for each in found:
            yield from _flat(each)
    elif found is not None:
        yield found


def _named(tokens: set[str], part: Any) -> set[str]:
    """The tokens that stand in the texts and patterns of a part of a template."""
    if isinstance(part, str):
        return {token for token in tokens if token in part or token in part.replace("\\", "")}
    inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    return set().union(*(_named(tokens, each) for each in inner))


def _function_rule(function: Mapping[str, Any]) -> str:
    """One function's object. Its schema stands by itself, so that references inside it find their aims."""
    schema = {"type": "object"} | dict(
        function.get("parameters") or {"properties": {}, "additionalProperties": False}
    )
    if schema["type"] != "object":
        raise GrammarError(
            f"The parameters of tool {function['name']!r} are of type {schema['type']!r}; accepted: 'object'."
        )
    before = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    return f"{_literal(before)} %json {json.dumps(schema | JSON_STYLE)} {_literal('}')}"


def _literal(text: str) -> str:
    """Text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
