"""The tokens of vLLM with modulation are those of plain transformers with hooks."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from modulation.levels import Threshold
from server.engines.base import Chat
from server.engines.vllm import VllmEngine
from tests.vllm.asking import LENGTH, as_tokens, chats, six_levels, together
from tests.vllm.oracle import greedy

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def asked() -> list[Chat]:
    return chats(50)


@pytest.fixture(scope="module")
def expected(asked: list[Chat], demo_engine: VllmEngine) -> dict[tuple[int, Threshold], tuple[int, ...]]:
    return greedy(asked, six_levels(demo_engine), LENGTH)


async def test_50_prompts_at_six_levels_in_one_batch_have_the_tokens_of_plain_transformers(
    demo_engine: VllmEngine, asked: list[Chat], expected: dict[tuple[int, Threshold], tuple[int, ...]]
) -> None:
    """Twice: the second time, prefixes of the first are found."""
    levels = six_levels(demo_engine)
    differing = sum(len({expected[number, level] for level in levels}) > 1 for number in range(50))
    assert differing > 15, "levels must make a difference for this test to"
    first = await together(demo_engine, asked, levels)
    again = await together(demo_engine, asked, levels)
    assert as_tokens(first) == expected
    assert as_tokens(again) == expected
    assert all(answers[-1].num_cached_tokens > 0 for (number, _), answers in again.items() if number % 2)
