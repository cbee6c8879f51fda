"""`GET /v1/mask`: what the mask in force does at a level, by layer, and what was measured of it.

Knows a mask's profile, levels and callers: counts, never which neurons. Knows no engine but its protocol.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request

from modulation.levels import SafetyLevel, SafetyLevels
from modulation.profiles import MaskProfile, Recorded, SetProfile
from server.access import AskedLevel, admits, grant
from server.callers import Caller, caller_of
from server.engines.base import Engine
from server.errors import UnknownParameterError
from server.routes.openapi import COUNT, TEXT, telling

PARAMETER: Final = "safety_level"
_LEVEL: Final = {
    "name": PARAMETER,
    "in": "query",
    "required": False,
    "schema": TEXT,
    "description": "A safety level's name, or a whole number of safety neurons; the caller's default.",
}
_OBJECT_OR_NULL: Final = {"type": ["object", "null"]}
_TOLD: Final[dict[str, Any]] = {
    "object": TEXT,
    "mask": TEXT,
    "level": {"type": "object", "properties": {"id": TEXT, "num_safety": COUNT, "num_utility": COUNT}},
    "numbers": _OBJECT_OR_NULL,
    "neurons": _OBJECT_OR_NULL,
    "evaluation": _OBJECT_OR_NULL,
}


def mask_router(engine: Engine, default: SafetyLevel) -> APIRouter:
    """The route. `default` is the server's level for a request that names none."""
    router = APIRouter()

    @router.get("/v1/mask", responses=telling(400, 401, 403, **_TOLD), openapi_extra={"parameters": [_LEVEL]})
    async def get_mask(request: Request) -> dict[str, Any]:
        """How many neurons of each layer are active at a level that the caller may ask for, the numbers
        that are levels to the caller, and the rates that the mask records for the caller's levels."""
        info, caller = engine.describe(), caller_of(request.scope)
        level = grant(info.levels, _asked(request), info.levels.parse(default.name), caller).level
        return {
            "object": "mask",
            "mask": info.mask_digest,
            "level": _level(level),
            "numbers": _numbers(info.levels, caller),
            "neurons": None if info.mask is None else _neurons(info.mask, level),
            "evaluation": None if info.mask is None else _evaluation(info.mask, info.levels, caller),
        }

    return router


def _asked(request: Request) -> list[AskedLevel]:
    given = request.query_params.multi_items()
    for name, _ in given:
        if name != PARAMETER:
            raise UnknownParameterError(
                f"{request.url.path} takes no query parameter {name!r}. Accepted: {PARAMETER}.", name
            )
    return [AskedLevel(f"query parameter {PARAMETER}", PARAMETER, value) for _, value in given]


def _level(level: SafetyLevel) -> dict[str, Any]:
    threshold = level.threshold
    return {"id": level.name, "num_safety": threshold.num_safety, "num_utility": threshold.num_utility}


def _numbers(levels: SafetyLevels, caller: Caller) -> dict[str, int] | None:
    """The whole numbers that the caller may ask for: where a floor admits one, it admits all larger ones."""
    numbers = range(levels.largest_number + 1)
    first = bisect_left(numbers, True, key=lambda number: admits(levels, caller, levels.parse(number)))
    return {"min": first, "max": levels.largest_number} if first < len(numbers) else None


def _neurons(mask: MaskProfile, level: SafetyLevel) -> dict[str, Any]:
    threshold = level.threshold
    return {
        "num_layers": mask.num_layers,
        "neurons_per_layer": mask.neurons_per_layer,
        "safety": _set(mask.safety, mask.num_layers, threshold.num_safety),
        "utility": _set(mask.utility, mask.num_layers, threshold.num_utility),
    }


def _set(neurons: SetProfile, num_layers: int, num_active: int) -> dict[str, Any]:
    ends = None if neurons.factors is None else {"min": neurons.factors[0], "max": neurons.factors[1]}
    return {
        "per_layer": neurons.per_layer(num_layers),
        "active_per_layer": neurons.per_layer(num_layers, num_active),
        "factors": ends,
    }


def _evaluation(mask: MaskProfile, levels: SafetyLevels, caller: Caller) -> dict[str, Any] | None:
    if not mask.levels and not mask.curve:
        return None
    return {
        "prompts": mask.prompts,
        "levels": _recorded(mask.levels, levels, caller),
        "curve": _recorded(mask.curve, levels, caller),
    }


def _recorded(points: Sequence[Recorded], levels: SafetyLevels, caller: Caller) -> list[dict[str, Any]]:
    shown = [SafetyLevel(each.level or "", each.threshold) for each in points]
    return [
        {**_level(level), "id": each.level, "rates": each.rates}
        for each, level in zip(points, shown, strict=True)
        if admits(levels, caller, level)
    ]
