"""The body of a chat completion request: its fields, what each accepts, and how it is refused.

Knows OpenAI's fields and our extensions. Knows no model, no level, no HTTP. A field of the API that is
not supported yet stands here with the values that change nothing; any other value is refused by name.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

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
from server.engines.base import Chat, GenerateRequest, Message, Sampling

UNSUPPORTED: Final = "unsupported"
CONFLICT: Final = "conflict"
MAX_INT32: Final = 2**31 - 1

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
            UNSUPPORTED, "is not supported yet; leave it out or send {accepted}", {"accepted": accepted}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.neutral), "description": "Not supported yet with other values."}


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


def _not_empty(parts: list["TextPart"]) -> list["TextPart"]:
    if not any(part.text for part in parts):
        raise PydanticCustomError("empty", "must not be empty")
    return parts


Text = Annotated[str, AfterValidator(_encodable)]
Level = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]
Nothing = Annotated[Any, Only((None,))]
NothingOrEmpty = Annotated[Any, Only((None, []))]
NothingOrZero = Annotated[Any, Only((None, 0, 0.0))]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One message. The fields below `content` are those of answers that clients send back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
        AfterValidator(_not_empty),
    ]
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    annotations: NothingOrEmpty = None
    tool_calls: NothingOrEmpty = None
    function_call: Nothing = None

    @property
    def text(self) -> str:
        """The content's parts, joined with nothing between them."""
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream holds besides its text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only((None, False))] = None


class ChatCompletionRequest(_Strict):
    """The body of `POST /v1/chat/completions`. A null counts as not given."""

    model: Text
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    safety_level: Level = None
    user: Text | None = None
    safety_identifier: Text | None = None
    metadata: dict[Text, Text] | None = None

    n: Annotated[Any, Only((None, 1))] = None
    stop: NothingOrEmpty = None
    logprobs: Annotated[Any, Only((None, False))] = None
    top_logprobs: NothingOrZero = None
    presence_penalty: NothingOrZero = None
    frequency_penalty: NothingOrZero = None
    repetition_penalty: Annotated[Any, Only((None, 1, 1.0))] = None
    min_p: NothingOrZero = None
    logit_bias: Annotated[Any, Only((None, {}))] = None
    response_format: Annotated[Any, Only((None, {"type": "text"}))] = None
    tools: NothingOrEmpty = None
    tool_choice: Annotated[Any, Only((None, "none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, Only((None, True, False))] = None
    functions: NothingOrEmpty = None
    function_call: Annotated[Any, Only((None, "none", "auto"))] = None
    chat_template_kwargs: Annotated[Any, Only((None, {}))] = None
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
    def _consistent(self) -> "ChatCompletionRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                CONFLICT,
                "max_tokens and max_completion_tokens are two names for one limit and differ; send one",
                {"param": "max_tokens"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                CONFLICT,
                "stream_options is only accepted together with stream: true",
                {"param": "stream_options"},
            )
        return self

    def to_engine(self, threshold: Threshold) -> GenerateRequest:
        """The same request as the engine takes it."""
        defaults = Sampling()
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return GenerateRequest(
            Chat(tuple(Message(one.role, one.text) for one in self.messages)),
            threshold=threshold,
            sampling=Sampling(
                temperature=_given(self.temperature, defaults.temperature),
                top_k=_given(self.top_k, defaults.top_k),
                top_p=_given(self.top_p, defaults.top_p),
                seed=self.seed,
            ),
            max_tokens=limit,
        )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
