"""`GET /v1/safety-levels`: what a request may ask for.

Knows levels and callers. Knows no engine but its protocol.
"""

from typing import Any

from fastapi import APIRouter, Request

from modulation.levels import SafetyLevel, Threshold
from server.access import admits, default_of
from server.callers import caller_of
from server.engines.base import Engine
from server.routes.openapi import COUNT, TEXT, listed, telling


def levels_router(engine: Engine, default: SafetyLevel) -> APIRouter:
    """The route. `default` is the server's for a request that names none."""
    router = APIRouter()

    counts = {"num_safety": COUNT, "num_utility": COUNT}
    told = {
        "object": TEXT,
        "default": TEXT,
        "floor": {"type": ["string", "null"]},
        "mask": TEXT,
        "max": {"type": "object", "required": list(counts), "properties": counts},
        "data": listed(id=TEXT, **counts),
    }

    @router.get("/v1/safety-levels", responses=telling(401, **told))
    async def list_safety_levels(request: Request) -> dict[str, Any]:
        """The named levels that the caller may ask for with their thresholds, the caller's default and
        floor (null: none), the mask and its size."""
        info, caller = engine.describe(), caller_of(request.scope)
        shown = [level for level in info.levels if admits(info.levels, caller, level)]
        return {
            "object": "list",
            "default": default_of(info.levels, caller, default).name,
            "floor": None if caller.floor is None else str(caller.floor),
            "mask": info.mask_digest,
            "max": _counts(info.levels.maximum),
            "data": [{"id": level.name, **_counts(level.threshold)} for level in shown],
        }

    return router


def _counts(threshold: Threshold) -> dict[str, int]:
    return {"num_safety": threshold.num_safety, "num_utility": threshold.num_utility}
