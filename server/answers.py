"""Outputs to answers in OpenAI's shapes, whole or as events.

Knows OpenAI's types and server-sent events. Knows no level, no request field, no connection.
"""

import asyncio
import codecs
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import chat_completion as whole_chat
from openai.types.chat import chat_completion_chunk as chat_chunk
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs as CompletionLogprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from server.choices import Choices
from server.engines.base import (
    Candidate,
    EngineError,
    GenerationError,
    Output,
    ParsedAnswer,
    TokenLogprob,
    ToolCall,
)
from server.errors import error_body
from server.stops import Watch
from server.streaming import Last

DONE: Final = b"data: [DONE]\n\n"
# The least that a log-probability is said to be: JSON has no infinity (OpenAI's number for it).
LEAST_LOGPROB: Final = -9999.0

# Stands where a chunk's text will; no other field of a chunk holds it: no model is served under such a name.
_PLACEHOLDER: Final = "\0"

Finish = Literal["stop", "length", "tool_calls"]


class Answers(Protocol):
    """How outputs become one kind of answer."""

    async def whole(self, outputs: Choices) -> bytes:
        """The body of an answer that is not streamed, JSON in UTF-8."""
        ...

    def events(self, outputs: Choices, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The same answer as events. The first one comes after the first output, never before.

        So what the engine refuses at once is raised from the first `anext`; what fails later is an
        event, the last one, and not followed by `[DONE]`.
        """
        ...


@dataclass(frozen=True)
class Tools:
    """How tool calls are found in an answer: how to take it apart, and with what a call begins in it (empty:
    unknown, so that nothing can pass before the end)."""

    parse: Callable[[str], ParsedAnswer]
    marker: str
    several: bool

    def calls_in(self, text: str) -> ParsedAnswer:
        """The parts of an answer, with at most one call unless several may be made."""
        parsed = self.parse(text)
        return parsed if self.several else ParsedAnswer(parsed.content, parsed.tool_calls[:1])


@dataclass
class _Head:
    """What every body and every event of an answer begins with; counts of tokens by choice."""

    model: str
    fingerprint: str
    prefix: str
    choices_per_prompt: int = 1
    created: int = field(default_factory=lambda: int(time.time()))
    last: dict[int, Output] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def usage(self) -> CompletionUsage:
        """OpenAI's token counts: of each prompt once, of each answer."""
        firsts = [last for choice, last in self.last.items() if choice % self.choices_per_prompt == 0]
        prompt = sum(each.num_prompt_tokens for each in firsts)
        completion = sum(each.num_completion_tokens for each in self.last.values())
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(each.num_cached_tokens for each in firsts)
            ),
        )

    @property
    def num_ended(self) -> int:
        return sum(each.finish_reason is not None for each in self.last.values())

    def check_ended(self, num_choices: int) -> None:
        if self.num_ended < num_choices:
            raise GenerationError("The engine ended this answer without saying why.")


class ChatAnswers:
    """Answers to a conversation. `tools` None: they call none."""

    def __init__(
        self, model: str, fingerprint: str, num_choices: int, *, logprobs: bool, tools: Tools | None
    ) -> None:
        self._head = _Head(model, fingerprint, "chatcmpl", num_choices)
        self._num_choices = num_choices
        self._logprobs = logprobs
        self._tools = tools

    async def whole(self, outputs: Choices) -> bytes:
        text: list[list[str]] = [[] for _ in range(self._num_choices)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(self._num_choices)]
        async for choice, output in outputs:
            text[choice].append(output.text)
            logprobs[choice] += output.logprobs
            self._head.last[choice] = output
        self._head.check_ended(self._num_choices)
        choices = [
            self._choice(choice, "".join(text[choice]), logprobs[choice])
            for choice in range(self._num_choices)
        ]
        fields = self._head.fields("chat.completion")
        return _json(ChatCompletion(**fields, choices=choices, usage=self._head.usage()))

    def _choice(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> whole_chat.Choice:
        parsed = self._tools.calls_in(text) if self._tools else ParsedAnswer(text, ())
        message = ChatCompletionMessage(role="assistant", content=parsed.content, refusal=None)
        if parsed.tool_calls:
            message.content = parsed.content or None
            message.tool_calls = [
                ChatCompletionMessageFunctionToolCall(
                    id=_call_id(),
                    type="function",
                    function=Function(name=call.name, arguments=call.arguments),
                )
                for call in parsed.tool_calls
            ]
        found = [_chat_logprob(each) for each in logprobs]
        return whole_chat.Choice(
            index=choice,
            message=message,
            logprobs=whole_chat.ChoiceLogprobs(content=found, refusal=None) if self._logprobs else None,
            finish_reason=_finish(self._head.last[choice], bool(parsed.tool_calls)),
        )

    def events(self, outputs: Choices, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        streams = [
            _ChatStream(self._head, choice, self._logprobs, self._tools, include_usage)
            for choice in range(self._num_choices)
        ]

        def chunks(choice: int, output: Output) -> Iterable[bytes]:
            return streams[choice].chunks(output)

        def last() -> BaseModel | None:
            fields = self._head.fields("chat.completion.chunk")
            usage = self._head.usage() if include_usage else None
            return ChatCompletionChunk(**fields, choices=[], usage=usage) if usage else None

        return _events(self._head, outputs, self._num_choices, chunks, last)


class _ChatStream:
    """One answer of a conversation as chunks."""

    def __init__(
        self, head: _Head, choice: int, logprobs: bool, tools: Tools | None, include_usage: bool
    ) -> None:
        self._head = head
        self._choice = choice
        self._logprobs = logprobs
        self._tools = tools
        self._extra: dict[str, Any] = {"usage": None} if include_usage else {}
        self._watch = Watch([tools.marker]) if tools and tools.marker else None
        self._text: list[str] = []
        self._has_begun = False
        self._passed = ""
        # Most chunks say a piece of text and nothing else: of those only the text is made anew.
        chunk = self._chunk(chat_chunk.ChoiceDelta(content=_PLACEHOLDER))
        self._before, self._after = chunk.split(json.dumps(_PLACEHOLDER).encode())

    def chunks(self, output: Output) -> Iterator[bytes]:
        """The JSON of each chunk that says `output`."""
        if not self._has_begun:
            self._has_begun = True
            yield self._chunk(chat_chunk.ChoiceDelta(role="assistant", content=""))
        is_last = output.finish_reason is not None
        content, calls = self._parts(output.text, is_last)
        if output.logprobs:
            yield self._chunk(chat_chunk.ChoiceDelta(content=content), output.logprobs)
        elif content:
            yield self._before + json.dumps(content, ensure_ascii=False).encode() + self._after
        for number, call in enumerate(calls):
            function = chat_chunk.ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments)
            delta = chat_chunk.ChoiceDeltaToolCall(
                index=number, id=_call_id(), type="function", function=function
            )
            yield self._chunk(chat_chunk.ChoiceDelta(tool_calls=[delta]))
        if is_last:
            yield self._chunk(chat_chunk.ChoiceDelta(), finish=_finish(output, bool(calls)))

    def _parts(self, text: str, is_last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """What can be said of new text now: content that calls no tool, and at the end the calls."""
        if self._tools is None:
            return text, ()
        passed = self._watch.push(text) if self._watch else ""
        self._text.append(text)
        if not is_last:
            self._passed += passed
            return passed, ()
        parsed = self._tools.calls_in("".join(self._text))
        # With calls, white space around what is said falls away: it may have passed already.
        before = self._passed if parsed.content.startswith(self._passed) else self._passed.strip()
        return parsed.content.removeprefix(before), parsed.tool_calls

    def _chunk(
        self,
        delta: chat_chunk.ChoiceDelta,
        logprobs: Sequence[TokenLogprob] = (),
        finish: Finish | None = None,
    ) -> bytes:
        found = [_chat_logprob(each) for each in logprobs]
        choice = chat_chunk.Choice(
            index=self._choice,
            delta=delta,
            logprobs=chat_chunk.ChoiceLogprobs(content=found, refusal=None)
            if self._logprobs and found
            else None,
            finish_reason=finish,
        )
        fields = self._head.fields("chat.completion.chunk")
        return _json(ChatCompletionChunk(**fields, choices=[choice], **self._extra))


class CompletionAnswers:
    """Answers to prompts that are taken as they stand. `echoes`: each choice's prompt as text, where it is
    put before the answer; `logprobs`: asked for."""

    def __init__(
        self,
        model: str,
        fingerprint: str,
        choices_per_prompt: int,
        num_choices: int,
        *,
        logprobs: bool,
        echoes: Sequence[str] | None,
    ) -> None:
        self._head = _Head(model, fingerprint, "cmpl", choices_per_prompt)
        self._num_choices = num_choices
        self._logprobs = logprobs
        self._echoes = echoes

    async def whole(self, outputs: Choices) -> bytes:
        parts = [_CompletionPart(self._echoes[number] if self._echoes else "") for number in self._range]
        async for choice, output in outputs:
            parts[choice].add(output)
            self._head.last[choice] = output
        self._head.check_ended(self._num_choices)
        choices = [
            CompletionChoice(
                index=choice,
                text=part.text,
                logprobs=part.logprobs if self._logprobs else None,
                finish_reason=_completed(self._head.last[choice]),
            )
            for choice, part in enumerate(parts)
        ]
        fields = self._head.fields("text_completion")
        body = Completion(**fields, choices=choices, usage=self._head.usage())
        # Off the event loop: the log-probabilities of many prompts are megabytes of text.
        return await asyncio.to_thread(_json, body)

    def events(self, outputs: Choices, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        offsets = [_Offsets() for _ in self._range]
        extra: dict[str, Any] = {"usage": None} if include_usage else {}

        def chunks(choice: int, output: Output) -> list[bytes]:
            echo = self._echoes[choice] if self._echoes and choice not in self._head.last else ""
            part = _CompletionPart(echo, offsets[choice])
            part.add(output)
            finish = _completed(output) if output.finish_reason else None
            if not (part.text or part.logprobs.tokens or finish):
                return []
            chosen = CompletionChoice.model_construct(
                index=choice,
                text=part.text,
                logprobs=part.logprobs if self._logprobs else None,
                finish_reason=finish,
            )
            fields = self._head.fields("text_completion")
            return [_json(Completion.model_construct(**fields, choices=[chosen], **extra))]

        def last() -> BaseModel | None:
            fields = self._head.fields("text_completion")
            return Completion(**fields, choices=[], usage=self._head.usage()) if include_usage else None

        return _events(self._head, outputs, self._num_choices, chunks, last)

    @property
    def _range(self) -> range:
        return range(self._num_choices)


@dataclass
class _Offsets:
    """Where each token begins in a text, by the bytes of those before it."""

    at: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def next(self, utf8: bytes) -> int:
        begin = self.at
        self.at += len(self.decoder.decode(utf8))
        return begin


class _CompletionPart:
    """Text of a completion and what is known of its tokens."""

    def __init__(self, echo: str, offsets: _Offsets | None = None) -> None:
        self.text = echo
        self.logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._offsets = offsets or _Offsets()

    def add(self, output: Output) -> None:
        self.text += output.text
        for place in (*output.prompt_logprobs, *output.logprobs):
            self._add_token(place)

    def _add_token(self, place: TokenLogprob) -> None:
        chosen, logprobs = place.chosen, self.logprobs
        cast(list[str], logprobs.tokens).append(chosen.text)
        cast(list[int], logprobs.text_offset).append(self._offsets.next(chosen.utf8))
        # The first token of a prompt has null in both: nothing predicts it.
        cast(list[float | None], logprobs.token_logprobs).append(
            None if chosen.logprob is None else _finite(chosen)
        )
        cast(list[dict[str, float] | None], logprobs.top_logprobs).append(
            None if chosen.logprob is None else {each.text: _finite(each) for each in (*place.top, chosen)}
        )


async def _events(
    head: _Head,
    outputs: Choices,
    num_choices: int,
    chunks: Callable[[int, Output], Iterable[bytes]],
    last: Callable[[], BaseModel | None],
) -> AsyncGenerator[bytes, None]:
    """One piece for each output, of all its events; what ends the answer is one piece too. Each piece costs a
    way through the server and a system call."""
    ending = b""
    try:
        async for choice, output in outputs:
            piece = b"".join([event(chunk) for chunk in chunks(choice, output)])
            head.last[choice] = output
            if output.finish_reason is not None and head.num_ended == num_choices:
                ending = piece
            elif piece:
                yield piece
        head.check_ended(num_choices)
    except Exception as error:
        if not head.last:
            raise
        if not isinstance(error, EngineError):
            logging.getLogger(__name__).exception("A stream failed.")
        yield Last(ending + event(json.dumps(error_body(error), separators=(",", ":")).encode()))
        return
    if (end := last()) is not None:
        ending += event(_json(end))
    yield Last(ending + DONE)


def event(data: bytes) -> bytes:
    """`data` as one server-sent event."""
    return b"data: " + data + b"\n\n"


def _json(body: BaseModel) -> bytes:
    return body.model_dump_json(exclude_unset=True).encode()


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _finish(last: Output, has_calls: bool) -> Finish:
    assert last.finish_reason is not None
    return "tool_calls" if has_calls and last.finish_reason == "stop" else last.finish_reason


def _completed(last: Output) -> Literal["stop", "length"]:
    assert last.finish_reason is not None
    return last.finish_reason


def _chat_logprob(place: TokenLogprob) -> ChatCompletionTokenLogprob:
    def fields(candidate: Candidate) -> dict[str, Any]:
        return {
            "token": candidate.text,
            "bytes": list(candidate.utf8),
            "logprob": _finite(candidate),
        }

    top = [TopLogprob(**fields(each)) for each in place.top]
    return ChatCompletionTokenLogprob(**fields(place.chosen), top_logprobs=top)


def _finite(candidate: Candidate) -> float:
    assert candidate.logprob is not None
    return max(candidate.logprob, LEAST_LOGPROB)
