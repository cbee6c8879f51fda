"""`GET /health`, `GET /ready`, `GET /metrics`: for those who watch the server.

Knows health and metrics. Knows no engine but its protocol.
"""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.engines.base import Engine, EngineUnavailableError
from server.metrics import Metrics


def health_router(engine: Engine, metrics: Metrics) -> APIRouter:
    """The three routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives and its event loop turns; not whether it can generate."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests can be answered now. If not, 503 and the engine's reason."""
        state = engine.healthy()
        if not state.ready:
            raise EngineUnavailableError(state.reason)
        return {"status": "ready"}

    @router.get("/metrics")
    async def prometheus() -> Response:
        """The metrics, in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
