"""`GET /v1/models` and `GET /v1/models/{id}`: the model served, and one alias of it per safety level.
`GET /version`: of this server.

Knows ids. Knows no engine but its protocol.
"""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, HTTPException

from server.engines.base import Engine
from server.errors import ModelNotFoundError
from server.routes.openapi import COUNT, TEXT, listed, telling


def models_router(engine: Engine, model: str, created: int) -> APIRouter:
    """The routes. `model` is the id served, `created` the time since when, in seconds of the epoch."""
    router = APIRouter()

    def models() -> list[dict[str, Any]]:
        info = engine.describe()
        ids = [model, *(f"{model}@{level}" for level in info.levels.names)]
        common = {"object": "model", "created": created, "owned_by": "neurontune"}
        return [{"id": one, **common, "max_model_len": info.max_model_len} for one in ids]

    fields = {"id": TEXT, "object": TEXT, "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}

    @router.get("/v1/models", responses=telling(object=TEXT, data=listed(**fields)))
    async def list_models() -> dict[str, Any]:
        """The ids that `model` accepts: the model's own, and the same at each named level."""
        return {"object": "list", "data": models()}

    @router.get("/v1/models/{model_id:path}", responses=telling(404, **fields))
    async def get_model(model_id: str) -> dict[str, Any]:
        """One of them."""
        if not model_id:
            raise HTTPException(404)
        known = models()
        for one in known:
            if one["id"] == model_id:
                return one
        accepted = ", ".join(each["id"] for each in known)
        raise ModelNotFoundError(f"The model {model_id!r} is not served here. Accepted: {accepted}.", "model")

    @router.get("/version", responses=telling(version=TEXT))
    async def get_version() -> dict[str, str]:
        """The version of this server."""
        return {"version": version("neurontune")}

    return router
