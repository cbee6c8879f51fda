"""The mask is swapped under a running server: what answers, headers and metrics say."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import httpx
import pytest

from modulation.masks import Mask
from server.app import create_app
from server.engines.base import GenerateRequest, Output
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.settings import Settings
from tests.engines.contract import until
from tests.server.conftest import CHAT, Ask, Control, error_of
from tests.server.test_metrics import samples
from tests.tiny_models import random_mask, tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def mask() -> Mask:
    return random_mask(tiny_model(), num_safety=40, num_utility=20)


async def test_an_answer_names_the_mask_it_was_granted_and_generated_under(
    ask: Ask, engine: FakeEngine, control: Control, mask: Mask
) -> None:
    alone = (await ask(temperature=0)).json()["choices"]
    control.wait_at = 1
    running = asyncio.create_task(ask(temperature=0))
    await until(lambda: engine.healthy().num_running == 1)
    await engine.use_mask(mask)
    control.wait_at = None
    after = await ask(temperature=0)
    control.gate.set()
    before = await running
    assert before.headers["X-Safety-Mask"] == MASK_DIGEST and after.headers["X-Safety-Mask"] == mask.digest
    assert before.json()["system_fingerprint"].endswith(MASK_DIGEST)
    assert after.json()["system_fingerprint"].endswith(mask.digest)
    assert before.json()["choices"] == alone != after.json()["choices"]
    assert [each.mask_digest for each in control.requests] == [MASK_DIGEST, MASK_DIGEST, mask.digest]


async def test_the_default_level_has_the_new_masks_threshold(
    ask: Ask, engine: FakeEngine, mask: Mask
) -> None:
    await engine.use_mask(mask)
    answer = await ask()
    assert answer.headers["X-Safety-Level"] == "balanced"
    assert answer.headers["X-Safety-Neurons"] == "20,6"


async def test_the_metric_follows(client: httpx.AsyncClient, engine: FakeEngine, mask: Mask) -> None:
    await engine.use_mask(mask)
    shown = {key[1] for key in await samples(client) if key[0] == "neurontune_mask_info"}
    assert shown == {mask.digest}


async def test_two_swaps_between_the_grant_and_the_start_are_a_503_that_says_when_to_come_back(
    settings: Settings, mask: Mask
) -> None:
    """The level was granted under a mask that nobody knows any more; under another one it would mean another
    threshold. So it is refused, and the next request is answered."""
    other = replace(mask, metadata=mask.metadata.model_copy(update={"seeds": {"all": 7}}))

    class Swapped(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
            if self.describe().mask_digest == MASK_DIGEST:
                await self.use_mask(mask)
                await self.use_mask(other)
            async for output in super().generate(request):
                yield output

    engine = Swapped()
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        refused = await client.post(CHAT, json=body)
        assert MASK_DIGEST in error_of(refused, 503, "engine_unavailable")["message"]
        assert refused.headers["Retry-After"] == "1"
        answered = await client.post(CHAT, json=body)
        assert answered.status_code == 200 and answered.headers["X-Safety-Mask"] == other.digest
