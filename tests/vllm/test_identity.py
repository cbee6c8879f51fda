"""The tokens of vLLM with modulation are those of plain transformers with hooks."""

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from modulation.demo import MODEL_DIR
from modulation.levels import ZERO, Threshold
from server.engines.base import Chat
from server.engines.vllm import VllmEngine
from tests.vllm.asking import LENGTH, as_tokens, chats, six_levels, together
from tests.vllm.oracle import greedy

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def asked() -> list[Chat]:
    return chats(50)


@pytest.fixture(scope="module")
def expected(asked: list[Chat], vllm_engine: VllmEngine) -> dict[tuple[int, Threshold], tuple[int, ...]]:
    return greedy(asked, six_levels(vllm_engine), LENGTH)


async def test_50_prompts_at_six_levels_in_one_batch_have_the_tokens_of_plain_transformers(
    vllm_engine: VllmEngine, asked: list[Chat], expected: dict[tuple[int, Threshold], tuple[int, ...]]
) -> None:
    """Twice: the second time, prefixes of the first are found."""
    levels = six_levels(vllm_engine)
    differing = sum(len({expected[number, level] for level in levels}) > 1 for number in range(50))
    assert differing > 15, "levels must make a difference for this test to"
    first = await together(vllm_engine, asked, levels)
    again = await together(vllm_engine, asked, levels)
    assert as_tokens(first) == expected
    assert as_tokens(again) == expected
    assert all(answers[-1].num_cached_tokens > 0 for (number, _), answers in again.items() if number % 2)


async def test_off_has_the_tokens_of_vllm_as_it_comes(
    asked: list[Chat],
    expected: dict[tuple[int, Threshold], tuple[int, ...]],
    vllm_engine: VllmEngine,
    tmp_path: Path,
) -> None:
    """In a process of its own: vLLM with its own worker, and nothing of this project's in it."""
    prompts = [list(await vllm_engine.encode(chat)) for chat in asked]
    script = Path(__file__).with_name("stock.py")
    answers = tmp_path / "answers.json"
    command = [sys.executable, str(script), str(MODEL_DIR), str(LENGTH), str(answers)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=DEVNULL, stderr=PIPE)
    _, errors = await process.communicate(json.dumps(prompts).encode())
    assert process.returncode == 0, errors.decode()[-2000:]
    stock = [tuple(answer) for answer in json.loads(answers.read_text())]
    off = [expected[number, ZERO] for number in range(len(asked))]
    assert stock == off
