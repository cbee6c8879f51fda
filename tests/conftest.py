"""What tests everywhere need: the event loop, the engine clients are tried on, both ways of modulating."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.vllm.engines import new_engine

if TYPE_CHECKING:
    from server.engines.vllm import VllmEngine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=["transformers", "vllm", "gateway"],
        default="transformers",
        help="What the clients of tests/clients talk to; gateway: a server in front of vLLM with adapters.",
    )


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The one event loop that the server runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def vllm_engine() -> Iterator["VllmEngine"]:
    """The demo model on vLLM, for all tests that leave it as it was."""
    engine = new_engine()
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(params=[0, 10**9], ids=["neurons taken out", "all multiplied"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of multiplying activations on CPU, whichever is faster."""
    monkeypatch.setattr("modulation.modulator._MOST_WIDENED", request.param)
