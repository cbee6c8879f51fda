"""`POST /admin/mask`: another mask, without a restart.

Knows who may, and the fields. Knows no mask and no engine.
"""

from typing import Any

from fastapi import APIRouter, Request

from server.access import require_admin
from server.audit import asker_of
from server.body import Bounds, parse_fields, read_object
from server.mask_swap import MaskSwap
from server.routes.asking import refuse_query
from server.routes.openapi import COUNT, TEXT, failing, listed, reading
from server.schemas import MaskRequest


def admin_router(swap: MaskSwap, bounds: Bounds) -> APIRouter:
    """The route."""
    router = APIRouter()

    told = reading(
        MaskRequest, old=TEXT, new=TEXT, levels=listed(id=TEXT, num_safety=COUNT, num_utility=COUNT)
    )
    told["responses"] |= failing(403)

    @router.post("/admin/mask", **told)
    async def use_mask(request: Request) -> dict[str, Any]:
        """Put a mask file in force. No request fails; one that cannot be used leaves the old one."""
        require_admin(request.scope)
        refuse_query(request)
        body = parse_fields(MaskRequest, await read_object(request, bounds))
        old, info = await swap.swap(body.path, asker_of(request.scope))
        levels = [(level.name, level.threshold) for level in info.levels]
        return {
            "old": old,
            "new": info.mask_digest,
            "levels": [
                {"id": name, "num_safety": each.num_safety, "num_utility": each.num_utility}
                for name, each in levels
            ],
        }

    return router
