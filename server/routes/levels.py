"""`GET /v1/safety-levels`: what a request may ask for.

Knows levels. Knows no engine but its protocol.
"""

from typing import Any

from fastapi import APIRouter

from modulation.levels import SafetyLevel, Threshold
from server.engines.base import Engine


def levels_router(engine: Engine, default: SafetyLevel) -> APIRouter:
    """The route. `default` is the level of a request that names none."""
    router = APIRouter()

    @router.get("/v1/safety-levels")
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
