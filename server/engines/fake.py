"""An engine without a model: deterministic answers for tests, and for trying the server out.

Knows the engine contract and arithmetic on hashes. Knows no torch, no model, and of masks their digests:
what it says depends on the request, its threshold and its mask, and means nothing.
"""

import asyncio
import hashlib
import math
import random
import secrets
import time
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, SafetyLevels, Threshold
from modulation.profiles import profile_of
from server.engines.base import (
    Candidate,
    Chat,
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    Grammar,
    Message,
    Output,
    ParsedAnswer,
    Prompt,
    PromptError,
    PromptTooLongError,
    Tallies,
    TokenLogprob,
    UnsupportedByEngineError,
)
from server.engines.in_force import InForce
from server.engines.limits import refuse_unknown_adapter
from server.engines.tallying import Tally

if TYPE_CHECKING:
    from modulation.masks import Mask

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


def fits(_mask: "Mask") -> None:
    """Any mask will do."""


async def at_once(_request: GenerateRequest, _index: int) -> None:
    """No delay, but let others run."""
    await asyncio.sleep(0)


class FakeEngine:
    """The engine contract without a model.

    `before_token` is awaited before each token with the request and the token's index: waiting there
    makes the engine slow, raising there makes that request fail. `check_mask` is called with every mask
    that is to be put in force; raising there refuses it. `max_num_seqs` requests run at once, the others
    wait. `adapters` change no answer. `num_aborted` counts the requests that were closed before their last
    output.

    In the tallies every token is a step, all requests that run are in it, modulation takes no time, the cache
    has room for a whole context of each request that can run, and no prefix is found in it.
    """

    def __init__(
        self,
        model_id: str = "demo",
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        before_token: BeforeToken = at_once,
        check_mask: Callable[["Mask"], None] = fits,
        adapters: tuple[str, ...] = (),
    ) -> None:
        first = EngineInfo(
            model_id=model_id,
            max_model_len=max_model_len or MAX_MODEL_LEN,
            levels=LEVELS,
            mask_digest=MASK_DIGEST,
            details={"engine": "fake: no model, no mask, answers without meaning"},
            adapters=adapters,
        )
        self._in_force: Final = InForce(first.mask_digest, first)
        self._before_token: Final = before_token
        self._check_mask: Final = check_mask
        self._room: Final = asyncio.Semaphore(max_num_seqs)
        self._tally: Final = Tally()
        self._num_cacheable: Final = max_num_seqs * first.max_model_len
        self._num_cached = 0
        self._num_restarts = 0
        self._thresholds = Counter[Threshold]()
        self._closed: Final = asyncio.Event()
        self._unready_reason = ""
        self._num_running = 0
        self._num_waiting = 0
        self.num_aborted = 0

    def describe(self) -> EngineInfo:
        return self._in_force.current.value

    async def use_mask(self, mask: "Mask") -> EngineInfo:
        self._check_mask(mask)
        if self._in_force.find(mask.digest) is None:
            info = replace(
                self.describe(), levels=mask.levels, mask_digest=mask.digest, mask=profile_of(mask)
            )
            self._in_force.put(mask.digest, info)
        else:
            self._in_force.put_back(mask.digest)
        return self.describe()

    def healthy(self) -> EngineHealth:
        reason = "The engine is closed." if self._closed.is_set() else self._unready_reason
        return EngineHealth(not reason, reason, self._num_running, self._num_waiting)

    def set_unready(self, reason: str) -> None:
        """Refuse new requests with `reason` from now on; an empty one makes ready again, as if rebuilt."""
        self._num_restarts += bool(self._unready_reason and not reason)
        self._unready_reason = reason

    def tallies(self) -> Tallies:
        return self._tally.now(self._num_cached / self._num_cacheable, self._num_restarts)

    async def close(self) -> None:
        self._closed.set()
        await asyncio.sleep(0)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return _prompt_tokens(prompt)

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        return "".join(VOCABULARY[token] for token in _known(token_ids))

    async def spell(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(VOCABULARY[token] for token in _known(token_ids))

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:  # noqa: ARG002 - it calls no tools
        return ParsedAnswer(text, ())

    @property
    def tool_marker(self) -> str:
        return ""

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:  # noqa: ARG002
        raise UnsupportedByEngineError("The fake engine calls no tools.", "tool_choice")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        asked = time.perf_counter()
        health = self.healthy()
        if not health.ready:
            raise EngineUnavailableError(health.reason, None if self._closed.is_set() else 1)
        refuse_unknown_adapter(request.adapter, self.describe().adapters)
        num_prompt = self._checked_length(request)
        finished = False
        with self._in_force.held(request.mask_digest) as known:
            try:
                await self._take_room()
                queued = time.perf_counter() - asked
                with self._counted(request, num_prompt) as cached:
                    for index, output in enumerate(_outputs(request, num_prompt, known.value)):
                        await self._unless_closed(self._before_token(request, index))
                        self._step(cached, output)
                        finished = output.finish_reason is not None
                        yield replace(output, queued_seconds=queued)
            except (GeneratorExit, asyncio.CancelledError):
                self.num_aborted += not finished
                raise

    @contextmanager
    def _counted(self, request: GenerateRequest, num_prompt: int) -> Iterator[list[int]]:
        """A request that has taken room runs within the block; the list has the tokens that it caches."""
        cached = [num_prompt]
        self._tally.looked_up(num_prompt, 0)
        self._num_cached += num_prompt
        self._thresholds[request.threshold] += 1
        try:
            yield cached
        finally:
            self._num_cached -= cached[0]
            self._thresholds -= Counter([request.threshold])
            self._num_running -= 1
            self._room.release()

    def _step(self, cached: list[int], output: Output) -> None:
        self._tally.step_begins(len(self._thresholds))
        if self._tally.is_sampled:
            self._tally.modulated(0.0)
        cached[0] += len(output.token_ids)
        self._num_cached += len(output.token_ids)

    def _checked_length(self, request: GenerateRequest) -> int:
        num_tokens = len(_prompt_tokens(request.prompt))
        if request.grammar is not None:
            raise UnsupportedByEngineError("The fake engine follows no grammar.", "response_format")
        wanted = 1 if request.max_tokens is None else request.max_tokens
        if num_tokens + wanted > self.describe().max_model_len:
            raise PromptTooLongError(
                f"This prompt has {num_tokens} tokens; with {wanted} to be generated "
                f"that is {num_tokens + wanted}, and the context holds {self.describe().max_model_len}."
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


def _prompt_tokens(prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, Chat):
        if not prompt.messages:
            raise PromptError("The conversation has no messages.")
        if prompt.tools:
            raise UnsupportedByEngineError("The fake engine calls no tools.", "tools")
        if prompt.template_arguments:
            raise UnsupportedByEngineError("The fake engine has no chat template.", "chat_template_kwargs")
        return (1,) * num_prompt_tokens(prompt.messages)
    if isinstance(prompt, str):
        words = (zlib.crc32(word.encode()) for word in prompt.split())
        tokens = tuple(1 + word % (len(VOCABULARY) - 1) for word in words)
    else:
        tokens = _known(prompt)
    if not tokens:
        raise PromptError("The prompt is empty.")
    return tokens


def _known(tokens: tuple[int, ...]) -> tuple[int, ...]:
    for token in tokens:
        if not 0 <= token < len(VOCABULARY):
            raise PromptError(
                f"{token} is no token of the fake engine; accepted: 0 to {len(VOCABULARY) - 1}."
            )
    return tokens


def _outputs(request: GenerateRequest, num_prompt: int, info: EngineInfo) -> Iterator[Output]:
    limit = info.max_model_len - num_prompt if request.max_tokens is None else request.max_tokens
    scored: tuple[TokenLogprob, ...] = ()
    if request.num_prompt_logprobs is not None:
        number = request.num_prompt_logprobs
        first, *rest = _prompt_tokens(request.prompt)
        begin = TokenLogprob(replace(_candidate(first, 0), logprob=None), ())
        scored = (begin, *(_logprobs(token, number) for token in rest))
    if not limit:
        yield Output("", (), "length", num_prompt, 0, prompt_logprobs=scored)
        return
    for count, token in enumerate(_tokens(request, info.mask_digest), start=1):
        finish_reason: FinishReason | None = None
        if token == END_TOKEN:
            finish_reason = "stop"
        elif count == limit:
            finish_reason = "length"
        asked = request.num_logprobs
        yield Output(
            VOCABULARY[token],
            (token,),
            finish_reason,
            num_prompt,
            count,
            logprobs=() if asked is None else (_logprobs(token, asked),),
            prompt_logprobs=scored if count == 1 else (),
        )
        if finish_reason:
            return


def _logprobs(token: int, number: int) -> TokenLogprob:
    """As if every token were half as likely as the one before it, counted from `token`."""
    top = tuple(_candidate((token + rank) % len(VOCABULARY), rank) for rank in range(number))
    return TokenLogprob(_candidate(token, 0), top[: len(VOCABULARY)])


def _candidate(token: int, rank: int) -> Candidate:
    text = VOCABULARY[token]
    return Candidate(token, text, text.encode(), -(rank + 1) * math.log(2))


def _tokens(request: GenerateRequest, mask_digest: str) -> Iterator[int]:
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(63))
    elif sampling.temperature == 0:
        sampling = replace(sampling, temperature=0.0, seed=None, top_k=0, top_p=1.0, min_p=0.0)
    numbers = random.Random(repr((request.prompt, request.threshold, sampling, mask_digest)))
    yield from GREETING
    for _ in range(numbers.randint(MIN_WORDS, MAX_WORDS)):
        yield from numbers.choice(SPELLINGS)
    yield END_TOKEN
