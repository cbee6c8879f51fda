"""Two ranks give the tokens of one, whether they share each layer or have half of the layers each."""

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

import asyncio

from server.engines.vllm import VllmEngine
from server.engines.vllm_arguments import VllmArguments
from tests.vllm.asking import LENGTH, as_tokens, chats, six_levels, together
from tests.vllm.engines import new_engine
from tests.vllm.oracle import greedy

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["tensor", "pipeline"])
def two_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = new_engine(arguments=VllmArguments(**{f"{request.param}_parallel_size": 2}))
    yield engine
    asyncio.run(engine.close())


async def test_two_ranks_have_the_tokens_of_plain_transformers(two_ranks: VllmEngine) -> None:
    asked, levels = chats(8), six_levels(two_ranks)
    expected = greedy(asked, levels, LENGTH)
    assert as_tokens(await together(two_ranks, asked, levels)) == expected
