"""A compiled model: the same answers at every level, nothing compiled while it serves, clear refusals."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from modulation.errors import ModelError
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.sites import HookPoint, find_sites
from server.engines.base import EngineUnavailableError, GenerateRequest
from server.engines.transformers import TransformersEngine
from tests.engines.contract import collect, tokens, until
from tests.engines.test_transformers import THRESHOLDS, ask, oracle, serving
from tests.tiny_models import random_mask, save_mask, scaled, tiny_chat_folder, tiny_model

pytestmark = [
    pytest.mark.anyio,
    # torch's compiler, of itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    """Compiling takes most of the time of these tests: one engine for all."""
    async with serving(folder, compile_model=True) as engine:
        yield engine


async def answered(engine: TransformersEngine, requests: list[GenerateRequest]) -> list[tuple[int, ...]]:
    return [
        tokens(each) for each in await asyncio.gather(*(collect(engine.generate(each)) for each in requests))
    ]


@needs_compiler
async def test_requests_at_six_levels_answer_as_each_does_by_itself_in_plain_transformers(
    folder: Path, engine: TransformersEngine
) -> None:
    assert engine.describe().details["compiled"] == "true"
    requests = [ask(f"question {i // 6}" + "!" * (i // 6 * 40), THRESHOLDS[i % 6]) for i in range(24)]
    expected = oracle(folder, requests)
    assert len(set(expected)) > 12, "levels and prompts must make a difference for this test to"
    before = counters["stats"]["unique_graphs"]
    assert await answered(engine, requests) == expected
    assert await answered(engine, requests[:7]) == expected[:7]
    assert [(await answered(engine, [each]))[0] for each in requests[:7]] == expected[:7]
    scored = [replace(requests[0], num_prompt_logprobs=2), requests[5]]
    assert await answered(engine, scored) == [expected[0], expected[5]]
    assert await answered(engine, [replace(requests[0], num_prompt_logprobs=2)]) == expected[:1]
    assert counters["stats"]["unique_graphs"] == before, "a step had to wait for the compiler"


@needs_compiler
async def test_masks_are_swapped_without_compiling_anew(
    folder: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    first = Mask.load(folder / "mask.safetensors")
    second = scaled(first, 1.7)
    request = ask("hello", Threshold(12, 9), max_tokens=100)
    before = counters["stats"]["unique_graphs"]
    [of_first] = oracle(folder, [request])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    save_mask(second, other)
    [expected_of_second] = oracle(other, [request])
    running = engine.generate(request)
    begun = await anext(running)
    await engine.use_mask(second)
    try:
        [of_second], rest = await asyncio.gather(answered(engine, [request]), collect(running))
    finally:
        await engine.use_mask(first)
    assert begun.token_ids + tokens(rest) == of_first
    assert of_second == expected_of_second != of_first
    assert counters["stats"]["unique_graphs"] == before
    assert await answered(engine, [request]) == [of_first]


@needs_compiler
async def test_modulation_is_timed(engine: TransformersEngine) -> None:
    before = sum(engine.tallies().modulation_seconds.counts)
    engine._tally._sample_every = 16
    await collect(engine.generate(ask("hello", THRESHOLDS[1], max_tokens=100)))
    assert sum(engine.tallies().modulation_seconds.counts) >= before + 4


@needs_compiler
async def test_an_engine_that_failed_is_rebuilt_without_compiling_anew(
    folder: Path, engine: TransformersEngine
) -> None:
    request = ask("hello", Threshold(6, 3))
    before, manager = counters["stats"]["unique_graphs"], engine._manager

    def fail(*_: object) -> None:
        raise RuntimeError("a step went wrong")

    hook = engine._model.register_forward_pre_hook(fail)
    with pytest.raises(EngineUnavailableError):
        await collect(engine.generate(request))
    hook.remove()
    await until(lambda: engine._manager is not manager and engine.healthy().ready)
    assert await answered(engine, [request]) == oracle(folder, [request])
    assert counters["stats"]["unique_graphs"] == before


async def test_without_a_compiler_the_engine_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match=r"there is no (g|clang)\+\+: install one"):
        TransformersEngine(
            str(folder), folder / "mask.safetensors", served_model_name="tiny", compile_model=True
        )


@needs_compiler
async def test_a_model_whose_layers_see_only_what_is_near_is_refused(tmp_path: Path) -> None:
    tiny_chat_folder(tmp_path, "gemma2")
    save_mask(random_mask(AutoModelForCausalLM.from_pretrained(tmp_path)), tmp_path)
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM cannot be compiled: .* Leave --compile out"):
        TransformersEngine(
            str(tmp_path), tmp_path / "mask.safetensors", served_model_name="tiny", compile_model=True
        )


async def test_hooks_are_on_what_stands_for_a_site_and_the_model_is_what_it_was() -> None:
    model = tiny_model()
    names = list(model.state_dict())
    mask = random_mask(model)
    points = [HookPoint.put_on(site) for site in find_sites(model)]
    assert list(model.state_dict()) == names
    assert [site.module for site in find_sites(model)] == points
    seen: list[Any] = []
    with Modulator(model, mask) as modulator, torch.no_grad():
        modulator.set_thresholds(torch.tensor([[12, 9]]))
        for point, site in zip(points, find_sites(model), strict=True):
            seen.append((point(torch.ones(1, site.width)) != 1).sum().item())
        modulator.check()
    assert sum(seen) == 21
