"""The bodies of requests for an answer: their fields, what each accepts, and how it is refused.

Knows OpenAI's fields and our extensions. Knows no model, no level, no HTTP. A field of the API that is
not supported stands here with the values that change nothing; any other value is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from modulation.levels import Threshold
from server.engines.base import Chat, GenerateRequest, Grammar, Message, Prompt, Sampling

UNSUPPORTED: Final = "unsupported"
CONFLICT: Final = "conflict"
MAX_INT32: Final = 2**31 - 1
MAX_STOPS: Final = 4
MAX_DIGITS: Final = 9
MAX_DEPTH: Final = 64
DEFAULT_MAX_TOKENS: Final = 16
MAX_CHOICES: Final = 128
MAX_TOP_LOGPROBS: Final = 20
MAX_SALT: Final = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Only:
    """Marks a field that is accepted only with values that change nothing (`==` and the same type)."""

    neutral: tuple[Any, ...]

    def check(self, value: Any) -> Any:
        if any(type(value) is type(one) and value == one for one in self.neutral):
            return value
        accepted = " or ".join(repr(one) for one in self.neutral).replace("None", "null")
        raise PydanticCustomError(
            UNSUPPORTED, "is not supported; leave it out or send {accepted}", {"accepted": accepted}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.neutral), "description": "Not supported with other values."}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "holds half a surrogate pair, which is no character") from error
    return text


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    return content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _readable(value: Any, depth: int = 0) -> Any:
    """A JSON value whose text can be encoded and which is not nested without bounds."""
    if depth > MAX_DEPTH:
        raise PydanticCustomError("depth", "is nested more than {most} deep", {"most": MAX_DEPTH})
    if isinstance(value, str):
        _encodable(value)
    elif isinstance(value, dict):
        for name, each in value.items():
            _encodable(name)
            _readable(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _readable(each, depth + 1)
    return value


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call, written as JSON text; an empty text is no arguments."""
    try:
        found = json.loads(text, parse_constant=_refuse_constant) if text else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError(
            "arguments", "has a tool call whose arguments are not a JSON object written as a string"
        )
    _readable(found)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _biases(given: dict[str, float]) -> dict[str, float]:
    for token in given:
        canonical = token.isascii() and token.isdecimal() and (token == "0" or token[0] != "0")
        if not canonical or len(token) > MAX_DIGITS:
            raise PydanticCustomError(
                "token", "has a key that is no token's number: {token}", {"token": repr(token)}
            )
    return given


Text = Annotated[str, AfterValidator(_encodable)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_readable)]
Level = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]
Nothing = Annotated[Any, Only((None,))]
NothingOrEmpty = Annotated[Any, Only((None, []))]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


CacheSalt = Annotated[Text, Field(min_length=1, max_length=MAX_SALT)]
Stop = Annotated[
    list[Annotated[Text, Field(min_length=1)]],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_biases)]


class StreamOptions(_Strict):
    """What a stream holds besides its text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only((None, False))] = None


class AnswerRequest(_Strict):
    """What chat completions and completions have in common. A null counts as not given."""

    model: Text = Field(description="An id of `GET /v1/models`; `@` and a level or a number may follow.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only together with `stream`.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="How many answers; the i-th from 0 is drawn with `seed` + i."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="Divides the logits; 1 if left out; below 0.00001: greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Keep the likeliest tokens that together reach this probability."
    )
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = Field(
        default=None, description="Keep the so many likeliest tokens; 0: all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Keep tokens of at least this share of the likeliest one's probability."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None, description="Equal requests with equal seeds give equal answers."
    )
    stop: Stop | None = Field(
        default=None, description="Up to four texts that end the answer; they are not part of it."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="Taken from the logit of every token that the answer has already."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="The same, once for each time that the answer has it."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="Divides positive and multiplies negative logits of tokens seen before."
    )
    logit_bias: LogitBias | None = Field(
        default=None, description="Token number to what is added to its logit, -100 to 100."
    )
    safety_level: Level = Field(
        default=None, description="A safety level's name, or a whole number of safety neurons."
    )
    cache_salt: CacheSalt | None = Field(
        default=None, description="Prefixes are shared with requests of the same salt alone."
    )
    user: Text | None = Field(default=None, description="Who asks; recorded nowhere yet.")

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options is only accepted together with stream: true", "stream_options")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def sampling(self, choice: int) -> Sampling:
        """How the tokens of answer number `choice` are drawn."""
        defaults = Sampling()
        seed = self.seed
        if seed is not None and choice:
            seed = (seed + choice + 2**63) % 2**64 - 2**63
        return Sampling(
            temperature=_given(self.temperature, defaults.temperature),
            top_k=_given(self.top_k, defaults.top_k),
            top_p=_given(self.top_p, defaults.top_p),
            min_p=_given(self.min_p, defaults.min_p),
            seed=seed,
            repetition_penalty=_given(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_given(self.presence_penalty, defaults.presence_penalty),
            frequency_penalty=_given(self.frequency_penalty, defaults.frequency_penalty),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Strict):
    """The function that a call names, and its arguments as JSON text."""

    name: Annotated[Text, Field(min_length=1)]
    arguments: Text


class MessageToolCall(_Strict):
    """A call that an earlier answer made."""

    id: Annotated[Text, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(_Strict):
    """One message. The fields below `content` are those of answers that clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            list[TextPart],
            Field(fail_fast=True),
            BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
        ]
        | None
    ) = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Annotated[Text, Field(min_length=1)] | None = None
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    annotations: NothingOrEmpty = None
    function_call: Nothing = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError(
                "missing_content", "must have content: a string or a list of text parts"
            )
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("role", "has tool_calls, which only an assistant's message may have")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("role", "must have tool_call_id if its role is tool, and only then")
        for call in self.tool_calls or ():
            _arguments(call.function.arguments)
        if not (self.tool_calls or self.role == "tool" or any(part.text for part in self.content or ())):
            raise PydanticCustomError("empty", "must not have empty content")
        return self

    def to_engine(self) -> Message:
        """The same message as the engine takes it: the parts of its content joined with nothing between."""
        return Message(
            role=self.role,
            content="".join(part.text for part in self.content or ()),
            tool_calls=tuple(
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
        )


class FunctionDefinition(_Strict):
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    """The name of a function among the tools."""

    name: str


class NamedTool(_Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(_Strict):
    """A JSON schema that the answer fits. It is enforced whether `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: JsonObject = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaResponse(_Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaResponse, Field(discriminator="type")]


class ChatCompletionRequest(AnswerRequest):
    """The body of `POST /v1/chat/completions`. A null counts as not given."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo", "messages": [{"role": "user", "content": "How do I kill weeds?"}]}]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] = Field(
        description="The conversation."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        default=None, description="Most tokens of the answer; left out: as many as fit the context."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        default=None, description="Another name of `max_tokens`."
    )
    logprobs: bool | None = Field(default=None, description="Give every token's log-probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        default=None, description="And those of the so many likeliest at its place; only with `logprobs`."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="Text, a JSON object, or JSON that fits a schema."
    )
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="Whether tools may, must or must not be called, or which one must."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether one answer may call more than one tool; true if left out."
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Arguments for the model's chat template, those that it reads."
    )
    safety_identifier: Text | None = Field(default=None, description="Recorded nowhere yet.")
    metadata: dict[Text, Text] | None = Field(default=None, description="Recorded nowhere yet.")

    functions: NothingOrEmpty = None
    function_call: Annotated[Any, Only((None, "none", "auto"))] = None
    modalities: Annotated[Any, Only((None, ["text"]))] = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None
    moderation: Nothing = None
    service_tier: Annotated[Any, Only((None, "auto", "default"))] = None
    store: Annotated[Any, Only((None, False))] = None
    prompt_cache_key: Nothing = None
    prompt_cache_retention: Nothing = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise _conflict(
                "max_tokens and max_completion_tokens are two names for one limit and differ; send one",
                "max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs is only accepted together with logprobs: true", "top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise _conflict("tools has two functions of one name; give each its own", "tools")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise _conflict("tool_choice asks for a call, but there are no tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise _conflict(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools: "
                f"{', '.join(names)}",
                "tool_choice",
            )
        if self.calls_tools and self.response_schema is not None:
            raise _conflict(
                "response_format and tools cannot both shape one answer; send tool_choice: 'none', or leave "
                "one of them out",
                "response_format",
            )
        return self

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def response_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema of the answer, where it must be JSON."""
        match self.response_format:
            case JsonObjectFormat():
                return {"type": "object"}
            case JsonSchemaResponse(json_schema=wanted):
                return wanted.schema_
        return None

    @property
    def chat(self) -> Chat:
        """The conversation as the engine takes it. With tool_choice "none" the model sees no tools."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()] if self.calls_tools else []
        return Chat(
            messages=tuple(one.to_engine() for one in self.messages),
            tools=tuple(tools),
            template_arguments=self.chat_template_kwargs or {},
        )

    def to_engine(self, threshold: Threshold, grammar: Grammar | None) -> list[GenerateRequest]:
        """One request for each answer that is wanted; `grammar` is that of the tools that must be called."""
        if self.response_schema is not None:
            grammar = Grammar("json_schema", json.dumps(self.response_schema))
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        first = GenerateRequest(
            self.chat,
            threshold,
            max_tokens=limit,
            grammar=grammar,
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            cache_salt=self.cache_salt or "",
        )
        return [replace(first, sampling=self.sampling(choice)) for choice in range(self.num_choices)]


Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT32)]], Field(min_length=1, fail_fast=True)]
MAX_PROMPTS: Final = 1024
MAX_SCORED: Final = 128


class CompletionRequest(AnswerRequest):
    """The body of `POST /v1/completions`. A null counts as not given."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo", "prompt": "To kill weeds,", "max_tokens": 16, "temperature": 0}]
        }
    )

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="Text or tokens, taken as they stand, or a list of them.")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = Field(
        default=None, description="Most tokens of the answer; 16 if left out; 0 only with `echo`."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        default=None, description="Give every token's log-probability and those of the so many likeliest."
    )

    suffix: Nothing = None
    best_of: Annotated[Any, Only((None, 1))] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _conflict("max_tokens: 0 asks for nothing at all; send echo: true with it", "max_tokens")
        is_scored = self.echo and self.logprobs is not None
        number, most = len(self.prompts) * self.num_choices, MAX_SCORED if is_scored else MAX_PROMPTS
        if number > most:
            what = "prompts times n, with echo and logprobs," if is_scored else "prompts times n"
            raise _conflict(f"{what} are {number}, more than {most}", "n")
        return self

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Every prompt: text or tokens."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(given)]
        return [each if isinstance(each, str) else tuple(each) for each in given]

    def to_engine(self, threshold: Threshold) -> list[GenerateRequest]:
        """One request for each answer that is wanted: `n` for each prompt, prompt by prompt."""
        return [
            GenerateRequest(
                prompt,
                threshold,
                self.sampling(choice),
                max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
                num_logprobs=self.logprobs,
                num_prompt_logprobs=self.logprobs if self.echo else None,
                cache_salt=self.cache_salt or "",
            )
            for prompt in self.prompts
            for choice in range(self.num_choices)
        ]


class TokenizeRequest(_Strict):
    """The body of `POST /tokenize`: a conversation, or text."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: Annotated[Any, Only((None, True))] = None
    add_special_tokens: Annotated[Any, Only((None,))] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _conflict("either prompt or messages is needed, and not both", "prompt")
        if self.prompt is not None and (self.tools or self.chat_template_kwargs):
            raise _conflict("tools and chat_template_kwargs belong to messages, not to a prompt", "tools")
        return self

    def to_engine(self) -> Prompt:
        """What is to be tokenised."""
        if self.prompt is not None:
            return self.prompt
        return Chat(
            messages=tuple(one.to_engine() for one in self.messages or ()),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ()),
            template_arguments=self.chat_template_kwargs or {},
        )


class MaskRequest(_Strict):
    """The body of `POST /admin/mask`: a file in the folder that masks are taken from."""

    path: Annotated[Text, Field(min_length=1)]


class DetokenizeRequest(_Strict):
    """The body of `POST /detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT32)]], Field(fail_fast=True)]


def _conflict(message: str, param: str) -> PydanticCustomError:
    return PydanticCustomError(CONFLICT, message, {"param": param})


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
