"""The contract between the server and whatever generates text.

Knows requests as plain data. Knows no HTTP, no settings, no engine.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from modulation.levels import SafetyLevels, Threshold
from modulation.profiles import MaskProfile

if TYPE_CHECKING:
    from modulation.masks import Mask

FinishReason = Literal["stop", "length"]

# How many thresholds, and how many seconds of modulation, a step is counted by.
STEP_LEVEL_BOUNDS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
MODULATION_BOUNDS: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1),
)


class EngineError(Exception):
    """Base of what an engine may raise from `generate`. Its text is fit for users."""


class PromptError(EngineError):
    """The caller's prompt cannot be used: it is empty, or the chat template refuses it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(PromptError):
    """The prompt, or the prompt and the answer asked for, do not fit the context."""


class GrammarError(EngineError):
    """The grammar asked for cannot be used: it is malformed, or says what the engine cannot enforce.

    `param` names the field that it comes from.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedByEngineError(EngineError):
    """This engine, or the model that it runs, cannot do what is asked for; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineUnavailableError(EngineError):
    """The engine is not running, is being rebuilt, is stopping, or has died.

    `retry_after_seconds`: when it is expected to be ready again; None: not known.
    """

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineBusyError(EngineUnavailableError):
    """The engine has no room for this request now, and says so rather than let it wait."""


class GenerationError(EngineError):
    """This request failed inside the engine, through no fault of the caller."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: who speaks (`system`, `developer`, `user`, `assistant`, `tool`), and what.

    `tool_calls` are those that an assistant's turn made, each {"id", "type", "function": {"name",
    "arguments"}} with the arguments as an object; `tool_call_id` is the one that a tool's turn answers.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that the model's chat template turns into a prompt.

    `tools` are JSON schemas of functions as OpenAI writes them; `template_arguments` are handed to the
    template beside them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


Prompt = Chat | str | tuple[int, ...]
"""A conversation; or text or tokens that are taken as they stand."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. A temperature below 0.00001 is greedy: the likeliest token after penalties.

    `logit_bias` is added to the logits of the tokens it names; then `repetition_penalty` (above 0, 1:
    none) divides or multiplies those of tokens in the prompt and the answer (arXiv 1909.05858), and
    `presence_penalty` and `frequency_penalty` (-2 to 2, 0: none) are taken from those of tokens in the
    answer, once and once for each time. `temperature` divides the logits (0 to 2); `min_p` keeps tokens of
    at least that share of the likeliest one's probability, `top_k` the k likeliest (0: all), `top_p` then the
    smallest set of them whose probability reaches p (in (0, 1]). Equal seed, prompt, level and
    parameters give equal tokens, whatever runs beside the request; no seed, a random one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """What every answer must match: JSON that fits a JSON schema, or a Lark grammar of llguidance's kind.

    `param` names the request's field that asks for it.
    """

    kind: Literal["json_schema", "lark"]
    text: str
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request for one answer. `max_tokens` None: as many as the context leaves room for; 0: none, for
    what is known of the prompt alone.

    `num_logprobs` asks for the log-probability of every token of the answer and of the so many likeliest
    ones beside it; `num_prompt_logprobs` for the same of every token of the prompt. None: not asked for.

    `mask_digest` names the mask under which the threshold was granted; None: the one in force when the
    request begins. What is computed of the prompt is found again by requests of equal `cache_salt` alone.
    `adapter` is one of `EngineInfo.adapters`; None: the model as it is.
    """

    prompt: Prompt
    threshold: Threshold
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    grammar: Grammar | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    mask_digest: str | None = None
    cache_salt: str = ""
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at a place, as text and as bytes. Part of a character has no text of its own: `bytes:\\xe2`.

    `logprob` is natural, of the model's own distribution, before bias, penalties, temperature and cuts; None
    for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    text: str
    utf8: bytes
    logprob: float | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token that stands at a place, and the likeliest ones there, likeliest first."""

    chosen: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What has become known since the last output of the same request.

    `text` and `token_ids` are new; the counts are totals so far. `finish_reason` is None until the
    last output, and that one always comes, also if it adds no text. A token that has no text of its
    own (part of a character, the end token) arrives with empty `text`. An engine that is not told a token's
    number gives -1 for it, also in `logprobs`. `num_cached_tokens` of the prompt's
    were computed before, for another request. `logprobs` has one entry per new token if asked for;
    `prompt_logprobs` comes with the first output, one entry per token of the prompt. `queued_seconds` passed
    from the first `anext` until the request's first step began, tokenising included; 0: not known.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    queued_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer's text taken apart: what is said, and which tools are called."""

    content: str
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves. Constant between two calls of `use_mask`.

    `model_id` names the model, `max_model_len` bounds prompt and answer together, in tokens,
    `mask_digest` is the hexadecimal digest of the mask in force, `details` is for logs and metrics
    (device, dtype and the like, each with the reason it was chosen). `mask` is what may be told of the mask
    in force; None: the engine has none. `adapters` are names of adapters that requests may ask for.
    """

    model_id: str
    max_model_len: int
    levels: SafetyLevels
    mask_digest: str
    details: dict[str, Any]
    mask: MaskProfile | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The state of an engine now: `reason` says why it is not `ready`; counts are of requests."""

    ready: bool
    reason: str
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Observations by size: `counts[i]` of them were at most `bounds[i]` and above the bound before it, the
    last of `counts` above all bounds; `total` is their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Tallies:
    """What an engine has counted since it was made, and how full it is.

    `kv_cache_usage` (0 to 1) is the share of the KV cache that running requests hold: what is only kept to be
    found again counts as free. Of `num_prefix_queries` tokens of prompts, looked up in the prefix cache,
    `num_prefix_hits` were there. `num_restarts` counts rebuilds after a failure, those that failed too.
    `step_levels` has the number of different thresholds of every step, `modulation_seconds` the time spent in
    modulation of one step in so many.
    """

    kv_cache_usage: float
    num_prefix_queries: int
    num_prefix_hits: int
    num_restarts: int
    step_levels: Distribution
    modulation_seconds: Distribution


class Engine(Protocol):
    """Generates answers, many requests at once, each at its own threshold.

    An engine that fails ends the requests it has, is not ready, and rebuilds itself. Those that come
    meanwhile are refused at once.

    An engine is ready to generate once it has been constructed: a constructor either returns an
    engine whose modulation is in force, or raises. Calls come from one event loop.
    """

    def describe(self) -> EngineInfo:
        """What is served."""
        ...

    async def use_mask(self, mask: "Mask") -> EngineInfo:
        """Put `mask` in force and say what is served then. The mask in force already: nothing happens.

        Nobody waits and no request fails: those that run end under the mask they began with, and one that
        was granted under the mask before this one (`GenerateRequest.mask_digest`) still gets it. Nothing
        that was cached under one mask is ever used under another.

        Raises:
            MaskError: the mask does not fit the model; the one in force stays.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Answer one request, output by output.

        Nothing happens before the first `anext`. Closing the iterator, at any point, aborts the
        request and frees what it held. Requests never influence one another's answers.

        Raises, from `anext`:
            PromptError, PromptTooLongError, GrammarError, UnsupportedByEngineError: before any output.
            EngineUnavailableError: before any output, also when its mask has been replaced more than once
                since its level was granted; or in the middle if the engine dies.
            GenerationError: in the middle.
        """
        ...

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt, as `generate` would read it.

        Raises PromptError and UnsupportedByEngineError.
        """
        ...

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of tokens, control tokens included. Raises PromptError for a number that is no token."""
        ...

    async def spell(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """The text of each token by itself. Raises PromptError for a number that is no token."""
        ...

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:
        """Take an answer to `chat` apart by the model's own format of tool calls.

        Tool calls that are malformed stay text.
        """
        ...

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:
        """A grammar of answers that call a tool: `name`, or any; `several`: one or more, one after another.

        Raises UnsupportedByEngineError where calls cannot be forced in the model's format or no tool has that
        name, and GrammarError where a tool's parameters are not an object.
        """
        ...

    @property
    def tool_marker(self) -> str:
        """With what a tool call begins in an answer's text; empty: not known."""
        ...

    def healthy(self) -> EngineHealth:
        """Whether the engine can take requests now. Cheap enough to ask at every probe."""
        ...

    def tallies(self) -> Tallies | None:
        """What has been counted so far. Cheap, and never waits for a step. None: the steps are those of
        another server, which has metrics of its own."""
        ...

    async def close(self) -> None:
        """Abort what runs and release everything. Later calls of `generate` are refused. Idempotent."""
        ...
