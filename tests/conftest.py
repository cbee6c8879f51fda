"""What every test of asynchronous code needs."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The one event loop that the server runs on."""
    return "asyncio"
