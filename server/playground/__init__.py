"""The web page to try the server with, at `/`: files as they lie in `page/`, and nothing that is made.

Knows files and headers. Knows no level, no key, no engine: the page asks for all of it through the API, with
the key that its user enters. The files hold no secret, so they are served without one.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

FOLDER: Final = Path(__file__).parent / "page"
INDEX: Final = "index.html"
MEDIA_TYPES: Final = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)

FILES: Final = MappingProxyType(
    {
        "/" if file.name == INDEX else f"/playground/{file.name}": file
        for file in sorted(FOLDER.iterdir())
        if file.suffix in MEDIA_TYPES
    }
)
"""By path: what is served."""

OPEN_PATHS: Final = tuple(FILES)


def playground_router() -> APIRouter:
    """One route per file; there are no others."""
    router = APIRouter()
    for path, file in FILES.items():
        router.add_api_route(path, _serving(file), methods=["GET"], include_in_schema=False)
    return router


def _serving(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # no-cache: kept, but asked for again each time, so that page and server are of one version
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache", "ETag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("If-None-Match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=MEDIA_TYPES[file.suffix], headers=headers)

    return serve
