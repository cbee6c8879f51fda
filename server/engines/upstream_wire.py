"""What is said to an upstream and what it answers: OpenAI's completions in vLLM's dialect.

Knows fields of bodies and chunks. Knows no connection, no level and no mask.

Beyond OpenAI's fields it sends `top_k`, `min_p` and `repetition_penalty`, always, so that no default of the
upstream's own applies; `chat_template_kwargs`; and asks for token numbers and for counts in every chunk.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from server.engines.base import (
    Candidate,
    Chat,
    EngineBusyError,
    EngineError,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    GenerationError,
    Grammar,
    GrammarError,
    Message,
    Output,
    PromptError,
    PromptTooLongError,
    TokenLogprob,
    ToolCall,
    UnsupportedByEngineError,
)

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
TOOL_CHOICE: Final = "tool_choice"
UNKNOWN_TOKEN: Final = -1
MAX_TOP_LOGPROBS: Final = 20

_GREEDY_BELOW: Final = 1e-5
_TOO_LONG: Final = re.compile(r"context[ _]length|maximum.{0,20}length|max_model_len|context window", re.I)
_ABOUT_GRAMMAR: Final = re.compile(r"grammar|schema|structured", re.I)
_ENDS: Final[Mapping[str, FinishReason]] = {"stop": "stop", "tool_calls": "stop", "length": "length"}
_MAX_SHOWN: Final = 500


def body_of(request: GenerateRequest, model: str) -> tuple[str, dict[str, Any]]:
    """The path and the body that ask `model` for what `request` wants, as a stream.

    Raises:
        PromptError: the conversation is empty.
        UnsupportedByEngineError: something that cannot be said.
    """
    sampling = request.sampling
    greedy = sampling.temperature < _GREEDY_BELOW
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": -1 if greedy else sampling.top_k or -1,
        "min_p": 0.0 if greedy else sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    body |= _shaped(request)
    if isinstance(request.prompt, Chat):
        if request.num_logprobs is not None:
            # vLLM gives a token that was drawn the first of these places, whatever its rank.
            more = request.num_logprobs and min(request.num_logprobs + 1, MAX_TOP_LOGPROBS)
            body |= {"logprobs": True, "top_logprobs": more}
        return CHAT, body | chat_fields(request.prompt, strict=TOOL_CHOICE in body)
    if request.num_prompt_logprobs is not None:
        scored = {"echo": True, "logprobs": request.num_prompt_logprobs, "stream": False}
        body = {name: value for name, value in body.items() if name != "stream_options"} | scored
    elif request.num_logprobs is not None:
        body["logprobs"] = request.num_logprobs
    return COMPLETIONS, body | {"prompt": prompt_field(request.prompt)}


def _shaped(request: GenerateRequest) -> dict[str, Any]:
    """What the answer must match."""
    grammar = request.grammar
    if grammar is None:
        return {}
    if grammar.param == TOOL_CHOICE:
        found: dict[str, Any] = json.loads(grammar.text)
        return found
    if grammar.kind != "json_schema":
        raise UnsupportedByEngineError(
            "This server passes on JSON schemas and calls of tools, and no other grammar.", grammar.param
        )
    schema = {"name": "answer", "schema": json.loads(grammar.text)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def chat_fields(chat: Chat, *, strict: bool = False) -> dict[str, Any]:
    """A conversation's fields. `strict`: arguments must fit their schemas, which vLLM holds to only if every
    tool says so. Raises PromptError."""
    if not chat.messages:
        raise PromptError("The conversation has no messages.")
    fields: dict[str, Any] = {"messages": [_message(each) for each in chat.messages]}
    if chat.tools:
        more = {"strict": True} if strict else {}
        fields["tools"] = [{**tool, "function": {**tool["function"], **more}} for tool in chat.tools]
    if chat.template_arguments:
        fields["chat_template_kwargs"] = dict(chat.template_arguments)
    return fields


def prompt_field(prompt: str | tuple[int, ...]) -> str | list[int]:
    """A prompt that is taken as it stands. Raises PromptError."""
    if not prompt:
        raise PromptError("The prompt is empty: it has no tokens. Send at least one.")
    return prompt if isinstance(prompt, str) else list(prompt)


def _message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        said["tool_calls"] = [_call(each) for each in message.tool_calls]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        said["name"] = message.name
    return said


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


class Lines:
    """The data of server-sent events, from bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, received: bytes) -> Iterator[bytes]:
        """The data of each line that is whole now. Only a newline ends one: JSON may hold other breaks."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass
class Reading:
    """One answer's chunks as outputs. `model` is what was asked: an answer of another one is refused.
    `tool_marker` begins the calls at the end of the text; `num_top` likeliest tokens were asked for."""

    model: str
    tool_marker: str
    num_top: int = 0
    _num_prompt: int = 0
    _num_completion: int = 0
    _num_cached: int = 0
    _num_said: int = 0
    _finish: FinishReason | None = None
    _last: tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]] | None = None
    _calls: dict[int, list[str]] = field(default_factory=dict)

    def push(self, data: bytes) -> Iterator[Output]:
        """What a chunk adds. What is said with the end waits for the counts, which may come after it.

        Raises GenerationError.
        """
        chunk = as_object(data)
        if (error := chunk.get("error")) is not None:
            raise self._failure(data, error)
        if chunk.get("model", self.model) != self.model:
            raise GenerationError(
                f"The upstream answered with the model {chunk['model']!r} where {self.model!r} was asked: "
                "nothing says at which level."
            )
        try:
            yield from self._pushed(chunk)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise GenerationError(f"The upstream's answer cannot be read ({error!r}).") from error

    def _failure(self, data: bytes, error: Any) -> EngineError:
        """What an error amid events means. vLLM refuses some requests after it has begun to answer them."""
        code, told = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        if isinstance(code, int) and 400 <= code < 500 and not self._num_said:
            return error_for(code, data, None)
        return GenerationError(f"The upstream could not go on with this answer: {_shortened(str(told))}")

    def _pushed(self, chunk: Mapping[str, Any]) -> Iterator[Output]:
        usage = chunk.get("usage") or {}
        for choice in chunk.get("choices") or ():
            text, logprobs = self._said(choice), _logprobs(choice, self.num_top)
            tokens = self._tokens(choice, usage, bool(text), logprobs)
            if choice.get("finish_reason") is not None:
                self._finish, self._last = _end(choice["finish_reason"]), (text, tokens, logprobs)
            elif text or tokens or logprobs:
                self._count(usage)
                yield self._output(text, tokens, logprobs)
        self._count(usage)

    def end(self) -> Output:
        """The last output, once everything has come. Raises EngineUnavailableError if it has not."""
        if self._finish is None or self._last is None:
            raise EngineUnavailableError("The upstream ended this answer without saying why.")
        text, tokens, logprobs = self._last
        tokens += (UNKNOWN_TOKEN,) * (self._num_completion - self._num_said)
        return self._output(text + self._called(), tokens, logprobs, self._finish)

    def _output(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish: FinishReason | None = None,
    ) -> Output:
        return Output(
            text,
            tokens,
            finish,
            self._num_prompt,
            self._num_completion,
            self._num_cached,
            logprobs,
        )

    def _said(self, choice: Mapping[str, Any]) -> str:
        delta = choice.get("delta")
        if delta is None:
            return str(choice.get("text") or "")
        if delta.get("reasoning") or delta.get("reasoning_content"):
            raise GenerationError(
                "The upstream takes reasoning out of its answers, and this server has no field for it: start "
                "the upstream without a reasoning parser."
            )
        for call in delta.get("tool_calls") or ():
            name, arguments = self._calls.setdefault(int(call.get("index", 0)), ["", ""])
            function = call.get("function") or {}
            self._calls[int(call.get("index", 0))] = [
                name + (function.get("name") or ""),
                arguments + (function.get("arguments") or ""),
            ]
        return str(delta.get("content") or "")

    def _called(self) -> str:
        return write_calls(self.tool_marker, [tuple(each) for _, each in sorted(self._calls.items())])

    def _tokens(
        self,
        choice: Mapping[str, Any],
        usage: Mapping[str, Any],
        has_text: bool,
        logprobs: Sequence[TokenLogprob],
    ) -> tuple[int, ...]:
        """The new tokens: their numbers if they are told, else as many as are counted, else one for text."""
        if (told := choice.get("token_ids")) is not None:
            tokens = tuple(int(each) for each in told)
        elif usage:
            tokens = (UNKNOWN_TOKEN,) * max(0, int(usage["completion_tokens"]) - self._num_completion)
        else:
            tokens = (UNKNOWN_TOKEN,) * max(len(logprobs), int(has_text))
        if prompt := choice.get("prompt_token_ids"):
            self._num_prompt = len(prompt)
        self._num_said += len(tokens)
        self._num_completion += len(tokens)
        return tokens

    def _count(self, usage: Mapping[str, Any]) -> None:
        if usage:
            self._num_prompt = int(usage["prompt_tokens"])
            self._num_completion = int(usage["completion_tokens"])
            self._num_cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def scored(data: bytes, request: GenerateRequest, prompt_text: str) -> Output:
    """The one output of an answer that was asked for with its prompt's log-probabilities."""
    body = as_object(data)
    try:
        choice, usage = body["choices"][0], body["usage"]
        num_top = request.num_prompt_logprobs or 0
        places, num_prompt = _completion_logprobs(choice["logprobs"], num_top), int(usage["prompt_tokens"])
        text = "" if request.max_tokens == 0 else str(choice["text"]).removeprefix(prompt_text)
        finish = "length" if request.max_tokens == 0 else choice["finish_reason"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise GenerationError(f"The upstream's answer cannot be read ({error!r}).") from error
    if len(places) < num_prompt:
        raise GenerationError(
            f"The upstream gave {len(places)} log-probabilities for a prompt of {num_prompt} tokens."
        )
    answer = places[num_prompt:]
    return Output(
        text,
        (UNKNOWN_TOKEN,) * len(answer),
        _end(finish),
        num_prompt,
        len(answer),
        logprobs=answer if request.num_logprobs is not None else (),
        prompt_logprobs=places[:num_prompt],
    )


def write_calls(marker: str, calls: Sequence[Sequence[str]]) -> str:
    """Calls, each a name and its arguments, as text that `read_calls` reads; none: nothing."""
    return marker + json.dumps(calls) if calls else ""


def read_calls(marker: str, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """An answer's content and its calls. One whose arguments are no object, cut short for example, stays
    text; none are left where a stop text has cut into them."""
    content, _, written = text.partition(marker)
    try:
        found = json.loads(written or "[]")
    except ValueError:
        return content, ()
    for name, arguments in found:
        if not _is_object(arguments):
            content += f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
    return content, tuple(ToolCall(*each) for each in found if _is_object(each[1]))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def as_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises GenerationError."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise GenerationError("The upstream answered something that is not JSON.") from error
    if not isinstance(found, dict):
        raise GenerationError("The upstream answered JSON that is not an object.")
    return found


def error_for(status: int, body: bytes, retry_after: str | None) -> EngineError:
    """What an answer with an error's status means to the caller: their own mistake, or the upstream's."""
    message, param = _told(body)
    seconds = int(retry_after) if retry_after and retry_after.isdecimal() else None
    if status in (400, 413, 422):
        if _TOO_LONG.search(message):
            return PromptTooLongError(message)
        return PromptError(message or "The upstream refuses this request and does not say why.", param)
    if status == 429:
        return EngineBusyError("The upstream has no room for this request now.", seconds or 1)
    if status in (401, 403):
        return EngineUnavailableError("The upstream refuses this server's key.")
    if status == 404:
        return EngineUnavailableError("The upstream does not know the adapter of this level.")
    if status in (408, 502, 503, 504):
        return EngineUnavailableError(f"The upstream cannot answer now (status {status}).", seconds)
    if status >= 500:
        return GenerationError(f"The upstream failed on this request (status {status}).")
    return EngineUnavailableError(f"The upstream answered with status {status}, which no engine should.")


def about_grammar(error: PromptError, grammar: Grammar | None) -> PromptError | GrammarError:
    """The error that an upstream's refusal of a request with `grammar` stands for."""
    is_plain = type(error) is PromptError and error.param is None
    if grammar is not None and is_plain and _ABOUT_GRAMMAR.search(str(error)):
        return GrammarError(str(error), grammar.param)
    return error


def _told(body: bytes) -> tuple[str, str | None]:
    """The message of an error and the field that it names; of OpenAI's shape, vLLM's, or FastAPI's."""
    try:
        found = json.loads(body)
        error = found.get("error", found)
        message = error.get("message") or error.get("detail") or ""
        param = error.get("param")
    except (AttributeError, ValueError):
        return _shortened(body.decode(errors="replace")), None
    return _shortened(str(message)), param if isinstance(param, str) else None


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def _end(reason: Any) -> FinishReason:
    if reason not in _ENDS:
        raise GenerationError(f"The upstream ended this answer early: {str(reason)[:40]!r}.")
    return _ENDS[reason]


def _logprobs(choice: Mapping[str, Any], num_top: int) -> tuple[TokenLogprob, ...]:
    found = choice.get("logprobs")
    if not found:
        return ()
    if "content" not in found:
        return _completion_logprobs(found, num_top)
    return tuple(
        TokenLogprob(_candidate(place), _likeliest(place.get("top_logprobs") or ())[:num_top])
        for place in found["content"] or ()
    )


def _likeliest(places: Sequence[Mapping[str, Any]]) -> tuple[Candidate, ...]:
    return tuple(sorted(map(_candidate, places), key=lambda each: -(each.logprob or 0.0)))


def _candidate(place: Mapping[str, Any]) -> Candidate:
    text, utf8 = str(place["token"]), place.get("bytes")
    spelled = text.encode() if utf8 is None else bytes(utf8)
    return Candidate(UNKNOWN_TOKEN, text, spelled, float(place["logprob"]))


def _completion_logprobs(found: Mapping[str, Any], num_top: int) -> tuple[TokenLogprob, ...]:
    tokens, numbers = found["tokens"], found["token_logprobs"]
    tops = found.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(_spelled(token, number), _top(top)[:num_top])
        for token, number, top in zip(tokens, numbers, tops, strict=True)
    )


def _top(found: Mapping[str, float] | None) -> tuple[Candidate, ...]:
    ranked = sorted((found or {}).items(), key=lambda each: -each[1])
    return tuple(_spelled(token, number) for token, number in ranked)


def _spelled(token: str, logprob: float | None) -> Candidate:
    return Candidate(UNKNOWN_TOKEN, token, token.encode(), None if logprob is None else float(logprob))
