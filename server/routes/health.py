"""`GET /health`, `GET /ready`, `GET /metrics`: for those who watch the server.

Knows health and metrics. Knows no engine but its protocol.
"""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.draining import Drain
from server.engines.base import Engine, EngineUnavailableError
from server.metrics import Metrics
from server.routes.openapi import TEXT, failing, telling


def health_router(engine: Engine, metrics: Metrics, drain: Drain) -> APIRouter:
    """The three routes."""
    router = APIRouter()

    @router.get("/health", responses=telling(status=TEXT))
    async def health() -> dict[str, str]:
        """Whether the process lives and its event loop turns; not whether it can generate."""
        return {"status": "ok"}

    @router.get("/ready", responses=telling(503, status=TEXT))
    async def ready() -> dict[str, str]:
        """Whether requests can be answered now. If not, 503 and why: the engine's reason, or the end."""
        drain.refuse()
        state = engine.healthy()
        if not state.ready:
            raise EngineUnavailableError(state.reason)
        return {"status": "ready"}

    text = {"description": "Metrics.", "content": {CONTENT_TYPE_LATEST: {"schema": TEXT}}}

    @router.get("/metrics", response_class=Response, responses={200: text, **failing(401, 500)})
    async def prometheus() -> Response:
        """The metrics, in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
