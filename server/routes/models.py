"""`GET /v1/models`: the model served, and one alias of it per safety level.

Knows ids. Knows no engine but its protocol.
"""

from typing import Any

from fastapi import APIRouter

from server.engines.base import Engine


def models_router(engine: Engine, model: str, created: int) -> APIRouter:
    """The route. `model` is the id served, `created` the time since when, in seconds of the epoch."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The ids that `model` accepts: the model's own, and the same at each named level."""
        info = engine.describe()
        ids = [model, *(f"{model}@{level}" for level in info.levels.names)]
        common = {"object": "model", "created": created, "owned_by": "neurontune"}
        data = [{"id": one, **common, "max_model_len": info.max_model_len} for one in ids]
        return {"object": "list", "data": data}

    return router
