"""vLLM with modulation: the contract of engines, masks that are swapped, and the end of a worker."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from transformers import AutoModelForCausalLM

from modulation.errors import ModelError
from modulation.levels import ZERO
from server.engines.base import EngineUnavailableError, GenerateRequest, Sampling
from server.engines.vllm import VllmEngine
from server.engines.vllm_arguments import VllmArguments
from server.engines.vllm_worker import NUM_SLOTS
from tests.engines.contract import collect, tokens, until
from tests.engines.demo_contract import DemoModelContract
from tests.tiny_models import random_mask, save_mask, scaled, tiny_chat_folder
from tests.vllm.engines import new_engine


def processes() -> list[psutil.Process]:
    """vLLM's processes of this one, in the order in which they were started."""
    children = psutil.Process().children(recursive=True)
    return sorted((each for each in children if "VLLM" in each.name()), key=lambda each: each.create_time())


class TestVllmEngine(DemoModelContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, vllm_engine: VllmEngine) -> VllmEngine:
        return vllm_engine

    @pytest.fixture(scope="class")
    @classmethod
    def spoilt(cls) -> Iterator[list[VllmEngine]]:
        """The last engine that a test could do with as it liked: starting one takes long."""
        engines: list[VllmEngine] = []
        yield engines
        for engine in engines:
            asyncio.run(engine.close())

    @pytest.fixture
    def closable_engine(self, spoilt: list[VllmEngine]) -> VllmEngine:
        """A test's own: as good as new, if it is not new."""
        if not spoilt or not spoilt[0].healthy().ready:
            spoilt[:] = [new_engine()]
        asyncio.run(spoilt[0].use_mask(self.masks()[0]))
        return spoilt[0]

    async def test_tallies_count_what_ran_and_how_full_it_is(self, closable_engine: VllmEngine) -> None:
        """From what was counted before, since this engine is used again; modulation is not timed."""
        engine = closable_engine
        await asyncio.gather(*(collect(engine.generate(self.ask(text))) for text in self.prompts))
        before = engine.tallies()
        assert before.kv_cache_usage == 0
        running = engine.generate(self.long_answer)
        first = await anext(running)
        await until(lambda: 0 < engine.tallies().kv_cache_usage < 1)
        outputs = [first, *await collect(running)]
        num_tokens = outputs[-1].num_completion_tokens
        await until(lambda: engine.tallies().step_levels.total > before.step_levels.total)
        alone = engine.tallies()
        assert alone.kv_cache_usage == 0 == alone.num_restarts
        assert alone.num_prefix_queries - before.num_prefix_queries == outputs[-1].num_prompt_tokens
        # One step more for the prompt, and one that those before may not have told of yet.
        assert 0 < alone.step_levels.total - before.step_levels.total <= num_tokens + 2
        assert sum(alone.modulation_seconds.counts) == 0

    async def test_a_seeded_request_whose_prompt_takes_several_steps_repeats(
        self, engine: VllmEngine
    ) -> None:
        """vLLM 0.32 by itself dies of it on CPU: 'CPU Generator does not use offset'."""
        prompt = tuple(await engine.encode("How do I bake bread? " * 150))
        assert len(prompt) > 2 * 512, "must be more than two steps read"
        request = GenerateRequest(prompt, ZERO, Sampling(temperature=1.5, seed=3), max_tokens=30)
        alone = tokens(await collect(engine.generate(request)))
        others = [self.ask(text, sampling=Sampling(temperature=1.3, seed=1)) for text in self.prompts]
        answers = await asyncio.gather(
            *(collect(engine.generate(each)) for each in (*others, request, *others, request))
        )
        assert tokens(answers[3]) == tokens(answers[7]) == alone

    async def test_a_swap_waits_where_every_slot_has_a_mask_that_somebody_runs_under(
        self, closable_engine: VllmEngine
    ) -> None:
        """There is room for so many masks in the workers; none is overwritten while a request is under it."""
        first, engine = self.masks()[0], closable_engine
        used = [scaled(first, 1 + number / 4) for number in range(NUM_SLOTS)]
        with ExitStack() as held:
            slots = []
            for mask in used[:-1]:
                await engine.use_mask(mask)
                slots.append(held.enter_context(engine._in_force.held(mask.digest)).value)
            assert sorted(slots) == list(range(1, NUM_SLOTS))
            swap = asyncio.create_task(engine.use_mask(used[-1]))
            done, _ = await asyncio.wait({swap}, timeout=0.2)
            assert not done
        await collect(engine.generate(self.long_answer))  # a request that ends lets it look again
        assert (await swap).mask_digest == used[-1].digest
        assert engine._in_force.current.value == slots[0]

    async def test_when_a_worker_dies_requests_fail_clearly_and_the_supervisor_is_told(self) -> None:
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine = new_engine(on_fatal=lambda _reason: loop.call_soon_threadsafe(told.set))
        try:
            worker = processes()[-1]
            worker.suspend()  # so that the answer cannot end before its worker
            running = asyncio.create_task(collect(engine.generate(self.long_answer)))
            await until(lambda: engine.healthy().num_waiting == 1)
            worker.kill()
            with pytest.raises(EngineUnavailableError, match="has died"):
                await running
            await until(lambda: not engine.healthy().ready)
            await asyncio.wait_for(told.wait(), 30)
            with pytest.raises(EngineUnavailableError, match="has died"):
                await collect(engine.generate(self.long_answer))
        finally:
            await engine.close()


def test_a_mask_among_the_weights_is_refused(tmp_path: Path) -> None:
    tiny_chat_folder(tmp_path)
    mask = save_mask(random_mask(AutoModelForCausalLM.from_pretrained(tmp_path)), tmp_path)
    with pytest.raises(ModelError, match=r"mask.safetensors.*every \*\.safetensors.*another folder"):
        VllmEngine(str(tmp_path), mask, served_model_name="tiny")


def test_an_engine_that_cannot_start_leaves_others_alone(vllm_engine: VllmEngine) -> None:
    with pytest.raises(ModelError, match="vLLM cannot start: 1 validation error for ModelConfig"):
        new_engine(arguments=VllmArguments(others=["tokenizer_revision=[1]"]))
    with pytest.raises(ModelError, match="vLLM cannot start"):  # a process of its own has begun, and fails
        new_engine(arguments=VllmArguments(others=["model_impl=transformers"]))
    assert asyncio.run(_one_token(vllm_engine))  # so its core and its workers live
    assert vllm_engine.healthy().ready


async def _one_token(engine: VllmEngine) -> tuple[int, ...]:
    request = GenerateRequest("Hi", ZERO, Sampling(temperature=0.0), max_tokens=1)
    return tokens(await collect(engine.generate(request)))
