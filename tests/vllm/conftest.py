"""One vLLM engine on the demo model for all tests that leave it as it was, and another to be spoilt."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from modulation.demo import MASK_FILE, MODEL_DIR

if TYPE_CHECKING:
    from server.engines.vllm import VllmEngine


def new_engine(**settings: Any) -> "VllmEngine":
    """The demo model on vLLM, float32."""
    from server.engines.vllm import VllmEngine

    return VllmEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo", **{"max_num_seqs": 32, **settings})


@pytest.fixture(scope="session")
def demo_engine() -> Iterator["VllmEngine"]:
    engine = new_engine()
    yield engine
    asyncio.run(engine.close())
