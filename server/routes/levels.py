"""`GET /v1/safety-levels`: what a request may ask for.

Knows levels. Knows no engine but its protocol.
"""

from typing import Any

from fastapi import APIRouter

from modulation.levels import SafetyLevel, Threshold
from server.engines.base import Engine
from server.routes.openapi import COUNT, TEXT, listed, telling


def levels_router(engine: Engine, default: SafetyLevel) -> APIRouter:
    """The route. `default` is the level of a request that names none."""
    router = APIRouter()

    counts = {"num_safety": COUNT, "num_utility": COUNT}
    told = {
        "object": TEXT,
        "default": TEXT,
        "mask": TEXT,
        "max": {"type": "object", "required": list(counts), "properties": counts},
        "data": listed(id=TEXT, **counts),
    }

    @router.get("/v1/safety-levels", responses=telling(**told))
    async def list_safety_levels() -> dict[str, Any]:
        """The named levels with their thresholds, the default, the mask and its size."""
        info = engine.describe()
        return {
            "object": "list",
            "default": default.name,
            "mask": info.mask_digest,
            "max": _counts(info.levels.maximum),
            "data": [{"id": level.name, **_counts(level.threshold)} for level in info.levels],
        }

    return router


def _counts(threshold: Threshold) -> dict[str, int]:
    return {"num_safety": threshold.num_safety, "num_utility": threshold.num_utility}
