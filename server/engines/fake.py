"""An engine without a model: deterministic answers for tests, and for trying the server out.

Knows the engine contract and arithmetic on hashes. Knows no torch, no model, no mask: what it says
depends on the request and its threshold, and means nothing.
"""

import asyncio
import hashlib
import random
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Final

from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, SafetyLevels, Threshold
from server.engines.base import (
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    Message,
    Output,
    PromptError,
    PromptTooLongError,
)

BeforeToken = Callable[[GenerateRequest, int], Awaitable[None]]

LEVELS: Final = SafetyLevels(
    named={
        UTILITY_PRIORITY: Threshold(8, 16),
        BALANCED: Threshold(32, 24),
        SECURITY_CRITICAL: Threshold(64, 32),
    },
    maximum=Threshold(128, 64),
)
MASK_DIGEST: Final = hashlib.sha256(b"fake engine, no mask").hexdigest()

# "naïve" takes three tokens, one of which has no text of its own, as with byte-level tokenizers.
VOCABULARY: Final = (
    *("", "Fake", " answer:", " na", "", "ïve"),
    *(" amber", " birch", " cedar", " delta", " ember", " fjord", " grove", " heath", " inlet"),
    *(" juniper", " kelp", " larch", " maple", " north", " ocean", " prairie", " quartz", " river"),
)
END_TOKEN: Final = 0
GREETING: Final = (1, 2)
SPELLINGS: Final = ((3, 4, 5), *((token,) for token in range(6, len(VOCABULARY))))
MAX_MODEL_LEN: Final = 2048
MIN_WORDS: Final = 24
MAX_WORDS: Final = 48


async def at_once(_request: GenerateRequest, _index: int) -> None:
    """No delay, but let others run."""
    await asyncio.sleep(0)


class FakeEngine:
    """The engine contract without a model.

    `before_token` is awaited before each token with the request and the token's index: waiting there
    makes the engine slow, raising there makes that request fail. `max_num_seqs` requests run at once,
    the others wait. `num_aborted` counts the requests that were closed before their last output.
    """

    def __init__(
        self,
        model_id: str = "demo",
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        before_token: BeforeToken = at_once,
    ) -> None:
        self._info: Final = EngineInfo(
            model_id=model_id,
            max_model_len=max_model_len or MAX_MODEL_LEN,
            levels=LEVELS,
            mask_digest=MASK_DIGEST,
            details={"engine": "fake: no model, no mask, answers without meaning"},
        )
        self._before_token: Final = before_token
        self._room: Final = asyncio.Semaphore(max_num_seqs)
        self._closed: Final = asyncio.Event()
        self._unready_reason = ""
        self._num_running = 0
        self._num_waiting = 0
        self.num_aborted = 0

    def describe(self) -> EngineInfo:
        return self._info

    def healthy(self) -> EngineHealth:
        reason = "The engine is closed." if self._closed.is_set() else self._unready_reason
        return EngineHealth(not reason, reason, self._num_running, self._num_waiting)

    def set_unready(self, reason: str) -> None:
        """Refuse new requests with `reason` from now on; an empty one makes ready again."""
        self._unready_reason = reason

    async def close(self) -> None:
        self._closed.set()
        await asyncio.sleep(0)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        health = self.healthy()
        if not health.ready:
            raise EngineUnavailableError(health.reason)
        num_prompt = self._checked_length(request)
        finished = False
        try:
            await self._take_room()
            try:
                for index, output in enumerate(_outputs(request, num_prompt, self._info)):
                    await self._unless_closed(self._before_token(request, index))
                    finished = output.finish_reason is not None
                    yield output
            finally:
                self._num_running -= 1
                self._room.release()
        except (GeneratorExit, asyncio.CancelledError):
            self.num_aborted += not finished
            raise

    def _checked_length(self, request: GenerateRequest) -> int:
        if not request.messages:
            raise PromptError("The conversation has no messages.")
        num_tokens = num_prompt_tokens(request.messages)
        num_wanted = num_tokens + (request.max_tokens or 1)
        if num_wanted > self._info.max_model_len:
            raise PromptTooLongError(
                f"This prompt has {num_tokens} tokens; with {request.max_tokens or 1} to be generated "
                f"that is {num_wanted}, and the context holds {self._info.max_model_len}."
            )
        return num_tokens

    async def _take_room(self) -> None:
        self._num_waiting += 1
        acquiring = asyncio.ensure_future(self._room.acquire())
        try:
            await self._unless_closed(acquiring)
        except BaseException:
            if not acquiring.cancelled():
                self._room.release()
            raise
        finally:
            self._num_waiting -= 1
        self._num_running += 1

    async def _unless_closed(self, work: Awaitable[object]) -> None:
        """Await `work`, but not longer than the engine is open. On return neither is pending."""
        working, closing = asyncio.ensure_future(work), asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({working, closing}, return_when=asyncio.FIRST_COMPLETED)
            if self._closed.is_set():
                raise EngineUnavailableError("The engine was closed.")
            working.result()
        finally:
            working.cancel()
            closing.cancel()
            await asyncio.gather(working, closing, return_exceptions=True)


def num_prompt_tokens(messages: Sequence[Message]) -> int:
    """One token per word, one per message for its role, one for the answer's beginning."""
    return 1 + sum(1 + len(message.content.split()) for message in messages)


def _outputs(request: GenerateRequest, num_prompt: int, info: EngineInfo) -> Iterator[Output]:
    limit = request.max_tokens or info.max_model_len - num_prompt
    for count, token in enumerate(_tokens(request), start=1):
        finish_reason: FinishReason | None = None
        if token == END_TOKEN:
            finish_reason = "stop"
        elif count == limit:
            finish_reason = "length"
        yield Output(VOCABULARY[token], (token,), finish_reason, num_prompt, count)
        if finish_reason:
            return


def _tokens(request: GenerateRequest) -> Iterator[int]:
    sampling = request.sampling
    drawn: tuple[object, ...] = ()
    if sampling.temperature > 0:
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        drawn = (sampling.temperature, sampling.top_k, sampling.top_p, seed)
    numbers = random.Random(repr((request.messages, request.threshold, drawn)))
    yield from GREETING
    for _ in range(numbers.randint(MIN_WORDS, MAX_WORDS)):
        yield from numbers.choice(SPELLINGS)
    yield END_TOKEN
