"""One server on the demo model for all clients: in a thread of its own, on a real socket."""

import asyncio
import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from modulation.demo import MASK_FILE, MODEL_DIR
from server.app import create_app
from server.engines.base import Engine
from server.engines.transformers import TransformersEngine
from server.engines.upstream import UpstreamEngine
from server.process import bind
from server.settings import Settings
from tests.vllm.adapters import serving_adapters

START_SECONDS = 30


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[str]:
    """A server on `engine` and its address, until the `with` ends."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(Settings(**settings), engine),
        log_level="error",
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        for _ in range(START_SECONDS * 100):
            if server.started or not thread.is_alive():
                break
            threading.Event().wait(0.01)
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the server listens, without `/v1`."""
    kind = request.config.getoption("--engine")
    if kind == "vllm":
        engine: Engine = request.getfixturevalue("vllm_engine")
    elif kind == "gateway":
        url = request.getfixturevalue("vllm_with_adapters")
        engine = UpstreamEngine(url, MASK_FILE, served_model_name="demo", upstream_model="demo")
    else:
        engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    with serving(engine) as found:
        yield found
        _collect()  # the engine's end collects garbage too


@pytest.fixture(scope="session")
def vllm_with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_adapters(tmp_path_factory.mktemp("adapters")) as url:
        yield url


@pytest.fixture(autouse=True, scope="module")
def _left_open() -> Iterator[None]:
    """What clients leave open is theirs, not of whichever test runs when it is collected."""
    yield
    _collect()


def _collect() -> None:
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.fixture(scope="session")
def base_url(address: str) -> str:
    """What clients take as the API's address."""
    return f"{address}/v1"


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client
