"""The tests that every engine passes, whatever it generates with.

A subclass named `Test...` gives two fixtures, `engine` (which no test closes or gives another mask; it may be
shared) and `closable_engine` (a test's own), masks that fit its engines and one that does not, and sets the
parameters below where the defaults do not suit it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import ClassVar

import pytest

from modulation.errors import MaskError
from modulation.levels import SECURITY_CRITICAL, ZERO, Threshold
from modulation.masks import Mask
from server.engines.base import (
    Chat,
    Engine,
    EngineUnavailableError,
    GenerateRequest,
    Message,
    Output,
    PromptError,
    PromptTooLongError,
    Sampling,
    UnsupportedByEngineError,
)

GREEDY = Sampling(temperature=0.0)
TIMEOUT_SECONDS = 30.0


async def until(condition: Callable[[], bool], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait for `condition` to hold; fail when it does not hold in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {timeout_seconds} s"
        await asyncio.sleep(0.005)


async def collect(outputs: AsyncGenerator[Output, None]) -> list[Output]:
    """Every output of a request."""
    return [output async for output in outputs]


def tokens(outputs: list[Output]) -> tuple[int, ...]:
    """The tokens of an answer."""
    return tuple(token for output in outputs for token in output.token_ids)


def is_idle(engine: Engine) -> bool:
    """Whether no request is left in `engine`."""
    state = engine.healthy()
    return (state.num_running, state.num_waiting) == (0, 0)


class EngineContract:
    """See the contract in `server.engines.base`."""

    # Prompts of a few words, all different; the first one's answer, greedy, has at least this many tokens.
    prompts: ClassVar[tuple[str, ...]] = ("Tell me about rivers.", "What is rye bread?", "Name a tree.")
    num_sure_tokens: ClassVar[int] = 16

    @property
    def long_answer(self) -> GenerateRequest:
        """A request whose answer takes a while."""
        return self.ask(self.prompts[0])

    def ask(self, text: str, threshold: Threshold = ZERO, sampling: Sampling = GREEDY) -> GenerateRequest:
        """A request of one user message."""
        return GenerateRequest(Chat((Message("user", text),)), threshold, sampling)

    def thresholds(self, engine: Engine) -> list[Threshold]:
        """Every named level's threshold, and one that is only a number."""
        levels = engine.describe().levels
        return [*(level.threshold for level in levels), levels.parse(levels.largest_number).threshold]

    async def first_output(self, engine: Engine, text: str) -> Output:
        """The first output of a request, which is then left."""
        async with aclosing(engine.generate(self.ask(text))) as outputs:
            return await anext(outputs)

    def masks(self) -> list[Mask]:
        """Three masks that fit the engine, the one that it starts with first where that one is a file."""
        raise NotImplementedError

    def misfit(self) -> Mask:
        """A mask that was made for another model."""
        raise NotImplementedError

    def under_masks(self, engine: Engine) -> GenerateRequest:
        """A request that is answered differently under different masks."""
        level = engine.describe().levels.parse(SECURITY_CRITICAL)
        return self.ask(self.prompts[0], level.threshold, Sampling(temperature=1.0, seed=3))

    pytestmark = pytest.mark.anyio

    async def test_describe_is_constant_and_complete(self, engine: Engine) -> None:
        info = engine.describe()
        assert info == engine.describe()
        assert info.model_id and info.max_model_len > 0 and info.details
        assert int(info.mask_digest, 16) >= 0

    async def test_an_adapter_that_is_not_there_is_refused(self, engine: Engine) -> None:
        asked = replace(self.ask(self.prompts[0]), adapter="nope")
        with pytest.raises(UnsupportedByEngineError, match="no adapter 'nope'") as refused:
            await collect(engine.generate(asked))
        assert refused.value.param == "model" and is_idle(engine)

    async def test_a_new_engine_is_ready_and_idle(self, closable_engine: Engine) -> None:
        state = closable_engine.healthy()
        assert state.ready and state.reason == ""
        assert is_idle(closable_engine)

    async def test_counts_are_totals_and_the_last_output_says_why_it_ended(self, engine: Engine) -> None:
        outputs = await collect(engine.generate(self.ask(self.prompts[0])))
        assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
        total = 0
        for output in outputs:
            total += len(output.token_ids)
            assert output.num_completion_tokens == total
        assert len({output.num_prompt_tokens for output in outputs}) == 1
        assert outputs[0].num_prompt_tokens > 0

    async def test_text_comes_in_pieces_that_are_whole_characters(self, engine: Engine) -> None:
        outputs = await collect(engine.generate(self.ask(self.prompts[0])))
        text = "".join(output.text for output in outputs)
        assert text and "\ufffd" not in text

    @pytest.mark.parametrize("max_tokens", [1, 2, 7])
    async def test_max_tokens_is_exact_and_finishes_with_length(
        self, engine: Engine, max_tokens: int
    ) -> None:
        assert max_tokens < self.num_sure_tokens
        whole = await collect(engine.generate(self.long_answer))
        cut = await collect(engine.generate(replace(self.long_answer, max_tokens=max_tokens)))
        assert tokens(cut) == tokens(whole)[:max_tokens]
        assert cut[-1].finish_reason == "length"

    async def test_the_context_ends_an_answer_that_has_no_limit_of_its_own(self, engine: Engine) -> None:
        # The longest prompt of its kind that the context takes leaves room for less than an answer.
        length, step = 0, engine.describe().max_model_len
        while step := step // 2:
            with suppress(PromptTooLongError):
                await self.first_output(engine, "word " * (length + step))
                length += step
        outputs = await collect(engine.generate(self.ask("word " * length)))
        last = outputs[-1]
        total = last.num_prompt_tokens + last.num_completion_tokens
        assert total <= engine.describe().max_model_len
        if last.finish_reason == "length":
            assert total == engine.describe().max_model_len

    async def test_a_prompt_longer_than_the_context_is_refused(self, engine: Engine) -> None:
        text = "word " * engine.describe().max_model_len
        with pytest.raises(PromptTooLongError, match=str(engine.describe().max_model_len)):
            await collect(engine.generate(self.ask(text)))
        await until(lambda: is_idle(engine))

    async def test_a_prompt_that_leaves_no_room_for_max_tokens_is_refused(self, engine: Engine) -> None:
        request = replace(self.ask(self.prompts[0]), max_tokens=engine.describe().max_model_len)
        with pytest.raises(PromptTooLongError, match=str(engine.describe().max_model_len)):
            await collect(engine.generate(request))

    async def test_an_empty_conversation_is_refused(self, engine: Engine) -> None:
        with pytest.raises(PromptError):
            await collect(engine.generate(GenerateRequest(Chat(()), ZERO)))

    async def test_greedy_answers_repeat_whatever_the_seed(self, engine: Engine) -> None:
        answers = {
            tokens(await collect(engine.generate(self.ask(self.prompts[1], sampling=sampling))))
            for sampling in (GREEDY, GREEDY, replace(GREEDY, seed=1), replace(GREEDY, seed=2, top_k=5))
        }
        assert len(answers) == 1

    async def test_a_seed_repeats_beside_other_traffic(self, engine: Engine) -> None:
        seeded = self.ask(self.prompts[0], sampling=Sampling(temperature=1.0, seed=-(2**63)))
        alone = tokens(await collect(engine.generate(seeded)))
        others = [self.ask(text, sampling=Sampling(temperature=1.3)) for text in self.prompts * 2]
        answers = await asyncio.gather(
            *(collect(engine.generate(request)) for request in (*others, seeded, *others))
        )
        assert tokens(answers[len(others)]) == alone

    @pytest.mark.parametrize("seeds", [range(8), [None] * 8], ids=["different seeds", "no seeds"])
    async def test_different_seeds_and_no_seeds_differ(
        self, engine: Engine, seeds: Iterable[int | None]
    ) -> None:
        samplings = [Sampling(temperature=1.5, seed=seed) for seed in seeds]
        answers = await asyncio.gather(
            *(collect(engine.generate(self.ask(self.prompts[0], sampling=one))) for one in samplings)
        )
        assert len({tokens(answer) for answer in answers}) > 4

    async def test_thresholds_side_by_side_answer_as_they_do_alone(self, engine: Engine) -> None:
        requests = [self.ask(text, one) for text in self.prompts for one in self.thresholds(engine)]
        alone = [tokens(await collect(engine.generate(request))) for request in requests]
        together = await asyncio.gather(*(collect(engine.generate(request)) for request in requests))
        assert [tokens(answer) for answer in together] == alone

    async def test_leaving_while_the_first_output_is_awaited_leaves_nothing_behind(
        self, engine: Engine
    ) -> None:
        await engine.generate(self.long_answer).aclose()
        for num_turns in range(6):  # wherever in its beginning the request is by then
            waiting = asyncio.ensure_future(anext(engine.generate(self.long_answer)))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        await until(lambda: is_idle(engine))

    async def test_closing_in_the_middle_leaves_nothing_behind(self, engine: Engine) -> None:
        outputs = engine.generate(self.long_answer)
        await anext(outputs)
        await outputs.aclose()
        await until(lambda: is_idle(engine))

    async def test_cancelling_whoever_waits_leaves_nothing_behind(self, engine: Engine) -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.generate(self.long_answer):
                started.set()

        consumer = asyncio.create_task(consume())
        await asyncio.wait_for(started.wait(), TIMEOUT_SECONDS)
        consumer.cancel()
        await asyncio.wait({consumer})
        await until(lambda: is_idle(engine))

    async def test_a_closed_iterator_does_not_disturb_the_others(self, engine: Engine) -> None:
        alone = tokens(await collect(engine.generate(self.ask(self.prompts[1]))))
        left = engine.generate(self.long_answer)
        await anext(left)
        beside = asyncio.create_task(collect(engine.generate(self.ask(self.prompts[1]))))
        await left.aclose()
        assert tokens(await beside) == alone

    async def test_tallies_count_what_ran_and_how_full_it_is(self, closable_engine: Engine) -> None:
        engine = closable_engine
        before = engine.tallies()
        assert (before.kv_cache_usage, before.num_prefix_queries, before.num_restarts) == (0, 0, 0)
        assert sum(before.step_levels.counts) == 0 == before.step_levels.total
        running = engine.generate(self.long_answer)
        first = await anext(running)
        assert 0 < engine.tallies().kv_cache_usage < 1
        outputs = [first, *await collect(running)]
        await until(lambda: engine.tallies().kv_cache_usage == 0)
        alone = engine.tallies()
        assert alone.num_prefix_queries == outputs[-1].num_prompt_tokens
        assert alone.step_levels.counts[0] == sum(alone.step_levels.counts) == alone.step_levels.total
        assert alone.step_levels.total >= outputs[-1].num_completion_tokens
        assert sum(alone.modulation_seconds.counts) == alone.step_levels.total // 64
        for observed in (alone.step_levels, alone.modulation_seconds):
            assert len(observed.counts) == len(observed.bounds) + 1

    async def test_a_step_has_as_many_levels_as_the_requests_in_it(self, closable_engine: Engine) -> None:
        thresholds = self.thresholds(closable_engine)
        assert len(thresholds) == 5
        requests = [self.ask(text, one) for one in thresholds for text in self.prompts]
        await asyncio.gather(*(collect(closable_engine.generate(each)) for each in requests))
        levels = closable_engine.tallies().step_levels
        most = max(bound for bound, count in zip(levels.bounds, levels.counts, strict=False) if count)
        assert most in (4, 6) and levels.counts[-1] == 0  # 5 lies between

    async def test_queued_seconds_are_known_with_the_first_output_and_stay(self, engine: Engine) -> None:
        begun = time.perf_counter()
        outputs = await collect(engine.generate(self.long_answer))
        passed = time.perf_counter() - begun
        (queued,) = {output.queued_seconds for output in outputs}
        assert 0 < queued < passed

    async def test_a_swap_waits_for_nobody_and_what_runs_ends_under_the_mask_it_began_with(
        self, closable_engine: Engine
    ) -> None:
        engine, request = closable_engine, self.under_masks(closable_engine)
        first, second = engine.describe(), self.masks()[1]
        under_first = tokens(await collect(engine.generate(request)))
        running = engine.generate(request)
        begun = await anext(running)
        info = await engine.use_mask(second)
        assert info == engine.describe() and info.mask_digest == second.digest != first.mask_digest
        assert info.levels == second.levels and info.model_id == first.model_id
        under_second, rest = await asyncio.gather(
            collect(engine.generate(replace(request, mask_digest=second.digest))), collect(running)
        )
        assert begun.token_ids + tokens(rest) == under_first
        assert tokens(under_second) != under_first
        assert tokens(await collect(engine.generate(request))) == tokens(under_second)
        assert engine.healthy().ready and is_idle(engine)

    async def test_a_request_granted_under_the_mask_before_still_gets_it(
        self, closable_engine: Engine
    ) -> None:
        engine, request = closable_engine, self.under_masks(closable_engine)
        granted = replace(request, mask_digest=engine.describe().mask_digest)
        before = tokens(await collect(engine.generate(request)))
        _, second, third = self.masks()
        await engine.use_mask(second)
        assert tokens(await collect(engine.generate(granted))) == before
        running = engine.generate(granted)
        begun = await anext(running)
        await engine.use_mask(third)
        assert begun.token_ids + tokens(await collect(running)) == before
        with pytest.raises(EngineUnavailableError, match=third.digest):
            await collect(engine.generate(granted))
        assert await collect(engine.generate(replace(request, mask_digest=second.digest)))

    async def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(
        self, closable_engine: Engine
    ) -> None:
        engine, request = closable_engine, self.under_masks(closable_engine)
        info, before = engine.describe(), tokens(await collect(engine.generate(request)))
        with pytest.raises(MaskError):
            await engine.use_mask(self.misfit())
        assert engine.describe() == info
        assert tokens(await collect(engine.generate(request))) == before

    async def test_the_mask_in_force_again_is_no_swap(self, closable_engine: Engine) -> None:
        second = self.masks()[1]
        info = await closable_engine.use_mask(second)
        assert await closable_engine.use_mask(second) == info == closable_engine.describe()

    async def test_close_ends_what_runs_and_refuses_what_comes(self, closable_engine: Engine) -> None:
        running = closable_engine.generate(self.long_answer)
        await anext(running)
        await closable_engine.close()
        with pytest.raises(EngineUnavailableError):
            await collect(running)
        with pytest.raises(EngineUnavailableError):
            await collect(closable_engine.generate(self.long_answer))
        state = closable_engine.healthy()
        assert not state.ready and state.reason
        assert is_idle(closable_engine)

    async def test_close_twice_is_close_once(self, closable_engine: Engine) -> None:
        await closable_engine.close()
        await closable_engine.close()
        assert not closable_engine.healthy().ready
