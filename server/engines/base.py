"""The contract between the server and whatever generates text.

Knows requests as plain data. Knows no HTTP, no settings, no engine.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from modulation.levels import SafetyLevels, Threshold

FinishReason = Literal["stop", "length"]


class EngineError(Exception):
    """Base of what an engine may raise from `generate`. Its text is fit for users."""


class PromptError(EngineError):
    """The caller's prompt cannot be used: it is empty, or the chat template refuses it."""


class PromptTooLongError(PromptError):
    """The prompt, or the prompt and the answer asked for, do not fit the context."""


class EngineUnavailableError(EngineError):
    """The engine is not running, is stopping, or has died."""


class GenerationError(EngineError):
    """This request failed inside the engine, through no fault of the caller."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: who speaks (`system`, `developer`, `user`, `assistant`), and what."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. A temperature below 0.00001 is greedy and ignores the rest.

    `temperature` divides the logits (0 to 2), `top_k` keeps the k likeliest tokens (0: all), `top_p`
    then the smallest set of them whose probability reaches p (in (0, 1]). Equal seed, prompt, level
    and parameters give equal tokens, whatever runs beside the request; no seed, a random one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request for one answer. `max_tokens` None: as many as the context leaves room for."""

    messages: tuple[Message, ...]
    threshold: Threshold
    sampling: Sampling = Sampling()
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What has become known since the last output of the same request.

    `text` and `token_ids` are new; the counts are totals so far. `finish_reason` is None until the
    last output, and that one always comes, also if it adds no text. A token that has no text of its
    own (part of a character, the end token) arrives with empty `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves. Constant from start to close.

    `model_id` names the model, `max_model_len` bounds prompt and answer together, in tokens,
    `mask_digest` is the hexadecimal digest of the mask in force, `details` is for logs and metrics
    (device, dtype and the like, each with the reason it was chosen).
    """

    model_id: str
    max_model_len: int
    levels: SafetyLevels
    mask_digest: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The state of an engine now: `reason` says why it is not `ready`; counts are of requests."""

    ready: bool
    reason: str
    num_running: int
    num_waiting: int


class Engine(Protocol):
    """Generates answers, many requests at once, each at its own threshold.

    An engine is ready to generate once it has been constructed: a constructor either returns an
    engine whose modulation is in force, or raises. Calls come from one event loop.
    """

    def describe(self) -> EngineInfo:
        """What is served."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Answer one request, output by output.

        Nothing happens before the first `anext`. Closing the iterator, at any point, aborts the
        request and frees what it held. Requests never influence one another's answers.

        Raises, from `anext`:
            PromptError, PromptTooLongError: before any output.
            EngineUnavailableError: before any output, or in the middle if the engine dies.
            GenerationError: in the middle.
        """
        ...

    def healthy(self) -> EngineHealth:
        """Whether the engine can take requests now. Cheap enough to ask at every probe."""
        ...

    async def close(self) -> None:
        """Abort what runs and release everything. Later calls of `generate` are refused. Idempotent."""
        ...
