"""`GET /v1/models` and `GET /v1/models/{id}`: the model served and adapters on it, and one alias of
each per safety level.
`GET /version`: of this server.

Knows ids and callers. Knows no engine but its protocol.
"""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from server.access import admitted_names, may_use_model
from server.callers import Caller, caller_of
from server.engines.base import Engine
from server.errors import ModelNotFoundError
from server.routes.asking import served_models
from server.routes.openapi import COUNT, TEXT, listed, telling


def models_router(engine: Engine, model: str, created: int) -> APIRouter:
    """The routes. `model` is the id served, `created` the time since when, in seconds of the epoch."""
    router = APIRouter()

    def models(caller: Caller) -> list[dict[str, Any]]:
        info = engine.describe()
        levels = admitted_names(info.levels, caller)
        served = [each for each in served_models(model, info) if may_use_model(caller, each)]
        ids = [name for each in served for name in (each, *(f"{each}@{level}" for level in levels))]
        common = {"object": "model", "created": created, "owned_by": "neurontune"}
        return [{"id": one, **common, "max_model_len": info.max_model_len} for one in ids]

    fields = {"id": TEXT, "object": TEXT, "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}

    @router.get("/v1/models", responses=telling(401, object=TEXT, data=listed(**fields)))
    async def list_models(request: Request) -> dict[str, Any]:
        """The ids that `model` accepts from the caller: the model's own, its adapters', and the same at each
        named level."""
        return {"object": "list", "data": models(caller_of(request.scope))}

    @router.get("/v1/models/{model_id:path}", responses=telling(401, 404, **fields))
    async def get_model(model_id: str, request: Request) -> dict[str, Any]:
        """One of them."""
        if not model_id:
            raise HTTPException(404)
        known = models(caller_of(request.scope))
        for one in known:
            if one["id"] == model_id:
                return one
        accepted = ", ".join(each["id"] for each in known) or "none"
        raise ModelNotFoundError(f"The model {model_id!r} is not served here. Accepted: {accepted}.", "model")

    @router.get("/version", responses=telling(401, version=TEXT))
    async def get_version() -> dict[str, str]:
        """The version of this server."""
        return {"version": version("neurontune")}

    return router
