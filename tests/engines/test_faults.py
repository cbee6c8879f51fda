"""What an engine does when a step raises, its thread dies, its memory is short or its numbers are none."""

import asyncio
import ctypes
import itertools
import math
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modulation.levels import Threshold
from modulation.masks import Mask
from server.engines.base import EngineUnavailableError, GenerationError, Sampling
from server.engines.batching import LevelManager, is_out_of_memory
from server.engines.transformers import TransformersEngine
from tests.engines.contract import collect, is_idle, tokens, until
from tests.engines.test_transformers import ask, serving
from tests.tiny_models import scaled

pytestmark = pytest.mark.anyio

LEVEL = Threshold(6, 3)
# pytest reports what ends a thread, also where that is the point.
killing = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    async with serving(folder) as engine:
        yield engine


class Fault:
    """Raises in the model's forward for the next `times` steps, after the engine's own hook has run."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.times = 0
        self.error: BaseException = RuntimeError("a step went wrong")
        self.before: Callable[[], None] = lambda: None
        engine._model.register_forward_pre_hook(self._raise)

    def _raise(self, *_: object) -> None:
        self.before()
        if self.times > 0:
            self.times -= 1
            raise self.error


def num_hooks(engine: TransformersEngine) -> int:
    return sum(len(module._forward_pre_hooks) for module in engine._model.modules())


@killing
@pytest.mark.parametrize("error", [RuntimeError("a step went wrong"), SystemExit("killed")])
async def test_a_step_that_raises_or_kills_the_thread_ends_its_requests_and_the_engine_is_rebuilt(
    folder: Path, error: BaseException
) -> None:
    async with serving(folder, max_num_seqs=2) as engine:
        fault, request = Fault(engine), ask("hello", LEVEL, max_tokens=400)
        alone, hooks = tokens(await collect(engine.generate(request))), num_hooks(engine)
        running = [engine.generate(ask(text, LEVEL, max_tokens=1000)) for text in ("one", "two")]
        for each in running:
            await anext(each)
        waiting = asyncio.ensure_future(anext(engine.generate(request)))
        await until(lambda: engine.healthy().num_waiting == 1)
        before = engine._manager
        fault.error, fault.times = error, 1
        ended: list[Any] = await asyncio.gather(
            *(collect(each) for each in running), waiting, return_exceptions=True
        )
        for each in ended:
            assert isinstance(each, EngineUnavailableError), each
            assert each.retry_after_seconds is not None and each.retry_after_seconds >= 1
        assert not engine.healthy().ready and engine.healthy().reason
        await until(lambda: engine.healthy().ready)
        assert engine._manager is not before and is_idle(engine)
        assert engine.tallies().num_restarts == 1
        assert tokens(await collect(engine.generate(request))) == alone
        assert num_hooks(engine) == hooks and not engine._open


@killing
async def test_a_thread_that_dies_while_nobody_asks_is_replaced(engine: TransformersEngine) -> None:
    before = engine._manager
    thread = before._generation_thread
    assert thread is not None and thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    await until(lambda: engine._manager is not before and engine.healthy().ready)
    assert await collect(engine.generate(ask("hello")))


async def test_while_it_is_rebuilt_requests_are_refused_at_once(engine: TransformersEngine) -> None:
    fault, release = Fault(engine), threading.Event()
    fault.times = 1
    failed = asyncio.ensure_future(collect(engine.generate(ask("hello"))))
    await asyncio.wait({failed})
    fault.before = lambda: release.wait(30)  # the probe of the new manager
    try:
        with pytest.raises(EngineUnavailableError, match="is being rebuilt") as caught:
            await until(lambda: "rebuilt" in engine.healthy().reason)
            await collect(engine.generate(ask("hello")))
        assert caught.value.retry_after_seconds
        assert is_idle(engine)
    finally:
        release.set()
    await until(lambda: engine.healthy().ready)
    assert isinstance(failed.exception(), EngineUnavailableError)


async def test_a_cache_that_cannot_be_allocated_once_can_be_the_next_time(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, allocate, fault = engine._manager, LevelManager.warmup, Fault(engine)
    failures = iter([MemoryError("no room now")])

    def fail_once(manager: LevelManager) -> None:
        for error in failures:
            raise error
        allocate(manager)

    monkeypatch.setattr(LevelManager, "warmup", fail_once)
    fault.times = 1
    with pytest.raises(EngineUnavailableError):
        await collect(engine.generate(ask("hello")))
    await until(lambda: engine._manager is not before and engine.healthy().ready)
    assert engine.tallies().num_restarts == 2
    assert await collect(engine.generate(ask("hello")))


async def test_the_mask_in_force_stays_in_force(engine: TransformersEngine, folder: Path) -> None:
    second = scaled(Mask.load(folder / "mask.safetensors"), 1.7)
    await engine.use_mask(second)
    expected, fault = tokens(await collect(engine.generate(ask("hello", LEVEL)))), Fault(engine)
    fault.times = 1
    with pytest.raises(EngineUnavailableError, match="a step went wrong"):
        await collect(engine.generate(ask("hello", LEVEL)))
    await until(lambda: engine.healthy().ready)
    assert engine.describe().mask_digest == second.digest
    assert tokens(await collect(engine.generate(ask("hello", LEVEL)))) == expected


async def test_failures_in_a_row_are_told_once_and_leave_it_unready(folder: Path) -> None:
    told: list[str] = []
    async with serving(folder, max_failures=2, on_fatal=told.append) as engine:
        fault = Fault(engine)
        for _ in range(3):  # an answer between two failures: no row
            fault.times = 1
            with pytest.raises(EngineUnavailableError):
                await collect(engine.generate(ask("hello")))
            await until(lambda: engine.healthy().ready)
            assert await collect(engine.generate(ask("hello")))
        assert not told
        fault.times = 10**9  # the rebuilt one fails at its probe
        with pytest.raises(EngineUnavailableError):
            await collect(engine.generate(ask("hello")))
        await until(lambda: bool(told))
        assert engine.tallies().num_restarts == 4
        assert len(told) == 1 and "failed 2 times in a row" in told[0] and "a step went wrong" in told[0]
        assert engine.healthy().reason == told[0]
        with pytest.raises(EngineUnavailableError, match="2 times in a row"):
            await collect(engine.generate(ask("hello")))


async def test_it_can_be_closed_while_it_is_rebuilt(folder: Path) -> None:
    async with serving(folder) as engine:
        fault = Fault(engine)
        fault.times = 1
        with pytest.raises(EngineUnavailableError):
            await collect(engine.generate(ask("hello")))
        await engine.close()
        assert engine.healthy().reason == "the engine is closed"
    assert not any(module._forward_pre_hooks for module in engine._model.model.modules())


async def test_leaving_the_queue_or_a_long_prompt_ends_the_request_within_a_step(folder: Path) -> None:
    """A prompt of three steps; the client leaves while the first of them runs."""
    async with serving(folder, max_num_seqs=1) as engine:
        fault, lengths, gate = Fault(engine), [], threading.Event()
        inside = asyncio.Event()
        loop = asyncio.get_running_loop()
        prompt = "long prompt " * 120  # 1,440 bytes, a token each; a step takes 512

        def hold() -> None:
            lengths.append(sum(each.query_length for each in engine._manager.processors.step))
            loop.call_soon_threadsafe(inside.set)
            assert gate.wait(30)

        fault.before = hold
        running = asyncio.ensure_future(anext(engine.generate(ask(prompt))))
        await inside.wait()
        waiting = asyncio.ensure_future(anext(engine.generate(ask("hello"))))
        await until(lambda: len(engine._open) == 2)
        for each in (waiting, running):
            each.cancel()
        await asyncio.wait({running, waiting})
        gate.set()
        await until(lambda: is_idle(engine))
        assert lengths == [512], "nothing ran after the step in which the client left"
        assert not engine._open


class Broken:
    """Puts NaN or infinity where one request's tokens are, in the step whose prompt begins with `text`."""

    def __init__(self, engine: TransformersEngine, text: str, value: float, place: str) -> None:
        self._engine, self._value = engine, value
        self._begin = engine._text.encode(ask(text).prompt)
        self.num_steps = 0
        if place == "logits":
            engine._model.register_forward_hook(self._in_logits)
        else:
            engine._model.model.layers[0].register_forward_hook(self._in_hidden_states)

    def _tokens(self) -> list[slice]:
        begins = self._engine._manager.processors.step
        ends = list(itertools.accumulate(each.query_length for each in begins))
        return [
            slice(end - each.query_length, end)
            for each, end in zip(begins, ends, strict=True)
            if each.state.initial_tokens[: len(self._begin)] == self._begin
        ]

    def _in_hidden_states(self, _module: Any, _arguments: Any, output: torch.Tensor) -> None:
        for place in self._tokens():
            self.num_steps += 1
            output[:, place] = self._value

    def _in_logits(self, _module: Any, _arguments: Any, output: Any) -> None:
        drawing = [each for each in self._engine._manager.processors.step if each.has_new_token]
        for place, each in enumerate(drawing):
            if each.state.initial_tokens[: len(self._begin)] == self._begin:
                self.num_steps += 1
                output.logits[:, place, 5] = self._value


MIXED = [
    ask("one", LEVEL, max_tokens=40),
    ask("two two", LEVEL, Sampling(temperature=1.0, seed=4), max_tokens=30),
    ask("three " * 40, max_tokens=35, num_logprobs=2),
    ask("four " * 150, LEVEL, max_tokens=20),
]


@pytest.mark.parametrize("place", ["logits", "hidden states"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_a_request_with_nan_or_infinity_fails_alone(folder: Path, place: str, value: float) -> None:
    """In hidden states it reaches all of the batch: on CPU attention has one mask over everybody."""
    async with serving(folder) as engine:
        alone = [await collect(engine.generate(each)) for each in MIXED]
        manager, broken = engine._manager, Broken(engine, "bad", value, place)
        bad = ask("bad", LEVEL, max_tokens=50)
        answers = await asyncio.gather(
            *(collect(engine.generate(each)) for each in (*MIXED[:2], bad, *MIXED[2:])),
            return_exceptions=True,
        )
        error = answers.pop(2)
        assert isinstance(error, GenerationError) and "NaN or infinity" in str(error), error
        assert [tokens(each) for each in answers] == [tokens(each) for each in alone]
        assert [[len(output.logprobs) for output in each] for each in answers] == [
            [len(output.logprobs) for output in each] for each in alone
        ]
        assert broken.num_steps >= 1 and manager is engine._manager and engine.healthy().ready
        await until(lambda: is_idle(engine))
        assert not manager.batch_processor.scheduler.suspects and not engine._open


async def test_nan_in_the_middle_of_an_answer_ends_it_there(engine: TransformersEngine) -> None:
    """The answer of a neighbour goes on, and what the broken one cached is not found again."""
    request = ask("bad " * 40, LEVEL, max_tokens=100)
    alone = tokens(await collect(engine.generate(request)))
    neighbour = ask("neighbour", LEVEL, max_tokens=100)
    expected = tokens(await collect(engine.generate(neighbour)))
    beside = asyncio.ensure_future(collect(engine.generate(neighbour)))
    running = engine.generate(request)
    seen = [await anext(running) for _ in range(5)]
    broken = Broken(engine, "bad " * 40, math.nan, "hidden states")
    with pytest.raises(GenerationError, match="NaN or infinity"):
        while True:
            seen.append(await anext(running))
    assert tokens(seen) == alone[: len(tokens(seen))]
    assert tokens(await beside) == expected
    broken._begin = [-1]
    assert tokens(await collect(engine.generate(request))) == alone


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        MemoryError("no memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
async def test_out_of_memory_in_one_step_fails_nobody_who_fits(
    engine: TransformersEngine, error: Exception
) -> None:
    alone = [tokens(await collect(engine.generate(each))) for each in MIXED]
    manager, fault = engine._manager, Fault(engine)
    fault.error = error
    tasks = [asyncio.ensure_future(collect(engine.generate(each))) for each in MIXED]
    await until(lambda: engine.healthy().num_running == len(MIXED))
    fault.times = 1
    answers = await asyncio.gather(*tasks)
    assert fault.times == 0
    assert [tokens(each) for each in answers] == alone
    assert manager is engine._manager and engine.healthy().ready


def test_the_allocators_own_words_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


async def test_who_does_not_fit_even_alone_fails_and_takes_nobody_down(engine: TransformersEngine) -> None:
    alone = [tokens(await collect(engine.generate(each))) for each in MIXED]
    manager, fault = engine._manager, Fault(engine)
    begin = engine._text.encode(ask("huge").prompt)

    def is_huge() -> None:
        step = engine._manager.processors.step
        if any(each.state.initial_tokens == begin for each in step):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    fault.before = is_huge
    answers = await asyncio.gather(
        *(collect(engine.generate(each)) for each in (ask("huge"), *MIXED)), return_exceptions=True
    )
    assert isinstance(answers[0], GenerationError) and "not enough memory" in str(answers[0])
    assert [tokens(each) for each in answers[1:]] == alone
    assert manager is engine._manager and is_idle(engine)
