"""Routes that do work for a request only once it has passed the gate, before its body is read.

Knows routes and the gate. Knows no field and no answer.
"""

from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from server.visits import Gate


def admitting(gate: Gate) -> type[APIRoute]:
    """A class of routes, for `APIRouter(route_class=...)`: what the route does is inside the visit."""

    class AdmittingRoute(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] not in (self.methods or ()):
                await super().handle(scope, receive, send)
            else:
                await gate.answer(super().handle, scope, receive, send)

    return AdmittingRoute
