"""The fake engine keeps the contract, and does what only a fake can."""

import asyncio
import subprocess
import sys

import pytest

from modulation.errors import MaskMismatchError
from modulation.masks import Mask
from server.engines.base import EngineUnavailableError, GenerateRequest, GenerationError
from server.engines.fake import FakeEngine, num_prompt_tokens
from tests.engines.contract import EngineContract, collect, is_idle, tokens, until
from tests.tiny_models import random_mask, tiny_model


def refuse_others(mask: Mask) -> None:
    """Only masks for the model called "tiny" fit."""
    if mask.metadata.model_id != "tiny":
        raise MaskMismatchError(f"This mask is for {mask.metadata.model_id}.")


class TestFakeEngine(EngineContract):
    def masks(self) -> list[Mask]:
        return [random_mask(tiny_model(), seed) for seed in range(3)]

    def misfit(self) -> Mask:
        return random_mask(tiny_model(), model_id="another")

    @pytest.fixture
    def engine(self) -> FakeEngine:
        return FakeEngine()

    @pytest.fixture
    def closable_engine(self) -> FakeEngine:
        return FakeEngine(check_mask=refuse_others)

    async def test_levels_and_seeds_change_the_answer(self, engine: FakeEngine) -> None:
        answers = [
            tokens(await collect(engine.generate(self.ask("Hello", one)))) for one in self.thresholds(engine)
        ]
        assert len(set(answers)) == len(answers)

    async def test_prompt_tokens_are_words_and_roles(self, engine: FakeEngine) -> None:
        request = self.ask("three words here")
        outputs = await collect(engine.generate(request))
        assert outputs[-1].num_prompt_tokens == num_prompt_tokens(request.prompt.messages) == 5

    async def test_some_tokens_have_no_text(self, engine: FakeEngine) -> None:
        outputs = await collect(engine.generate(self.long_answer))
        assert outputs[-1].text == "" and outputs[-1].finish_reason == "stop"

    async def test_it_waits_where_it_is_told_to(self) -> None:
        gate = asyncio.Event()

        async def wait(_: GenerateRequest, index: int) -> None:
            if index == 3:
                await gate.wait()

        engine = FakeEngine(before_token=wait)
        outputs = engine.generate(self.long_answer)
        for _ in range(3):
            await anext(outputs)
        pending = asyncio.ensure_future(anext(outputs))
        assert not (await asyncio.wait({pending}, timeout=0.02))[0]
        gate.set()
        assert (await pending).num_completion_tokens == 4
        await outputs.aclose()
        assert engine.num_aborted == 1

    async def test_it_fails_where_it_is_told_to(self) -> None:
        async def fail(request: GenerateRequest, index: int) -> None:
            if index == 3 and "fail" in request.prompt.messages[0].content:
                raise GenerationError("This request was told to fail.")

        engine = FakeEngine(before_token=fail)
        outputs = engine.generate(self.ask("please fail"))
        for _ in range(3):
            await anext(outputs)
        with pytest.raises(GenerationError):
            await anext(outputs)
        assert is_idle(engine) and engine.num_aborted == 0
        assert await collect(engine.generate(self.ask("please go on")))

    async def test_unready_it_refuses_with_the_reason(self, engine: FakeEngine) -> None:
        engine.set_unready("It is being rebuilt.")
        assert engine.healthy().reason == "It is being rebuilt."
        with pytest.raises(EngineUnavailableError, match="rebuilt"):
            await collect(engine.generate(self.long_answer))
        engine.set_unready("")
        assert await collect(engine.generate(self.long_answer))

    async def test_more_than_it_holds_wait_and_may_leave_the_queue(self) -> None:
        gate = asyncio.Event()

        async def wait(_request: GenerateRequest, _index: int) -> None:
            await gate.wait()

        engine = FakeEngine(max_num_seqs=2, before_token=wait)
        asked = [asyncio.create_task(collect(engine.generate(self.ask(f"{i}")))) for i in range(5)]
        await until(lambda: engine.healthy().num_waiting == 3)
        assert engine.healthy().num_running == 2
        asked[4].cancel()
        await until(lambda: engine.healthy().num_waiting == 2)
        gate.set()
        answers = await asyncio.gather(*asked[:4])
        assert all(answers) and is_idle(engine) and engine.num_aborted == 1

    async def test_close_reaches_those_that_wait_at_the_gate_and_in_the_queue(self) -> None:
        async def forever(_request: GenerateRequest, _index: int) -> None:
            await asyncio.Event().wait()

        engine = FakeEngine(max_num_seqs=1, before_token=forever)
        asked = [asyncio.create_task(collect(engine.generate(self.ask(f"{i}")))) for i in range(3)]
        await until(lambda: engine.healthy().num_waiting == 2)
        await engine.close()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in ended] == [EngineUnavailableError] * 3
        assert is_idle(engine)


def test_the_whole_server_with_the_fake_engine_needs_no_torch() -> None:
    """A newcomer's first try, and the architecture: HTTP parts never pull the model's libraries."""
    script = "import server.app, server.cli, server.process, server.engines.fake, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "numpy"} & set(loaded.stdout.split())
