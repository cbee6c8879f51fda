"""`GET /v1/level-mix`: which levels requests were given since the server's start.

Knows the counters of metrics and the engine's counts. Knows no level by itself.
"""

from typing import Any

from fastapi import APIRouter

from server.engines.base import Engine
from server.metrics import Metrics
from server.routes.openapi import COUNT, TEXT, listed, telling


def level_mix_router(engine: Engine, metrics: Metrics) -> APIRouter:
    """The route."""
    router = APIRouter()
    counts = {"num_running": COUNT, "num_waiting": COUNT}
    told = {"object": TEXT, **counts, "data": listed(id=TEXT, num_requests=COUNT)}

    @router.get("/v1/level-mix", responses=telling(401, **told))
    async def get_level_mix() -> dict[str, Any]:
        """How many requests were given each level since the start (numbers together as `custom`), and how
        many run and wait now. Everybody's, as in the metrics."""
        state = engine.healthy()
        given = metrics.num_requests_by_level()
        return {
            "object": "list",
            "num_running": state.num_running,
            "num_waiting": state.num_waiting,
            "data": [{"id": level, "num_requests": number} for level, number in sorted(given.items())],
        }

    return router
