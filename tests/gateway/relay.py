"""A relay that makes a real `neurontune serve` look like an engine with adapters: each model name is a level.

What only vLLM takes is left out on the way, so token numbers are not told and counts come at the end.
"""

from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LEVELS = {
    "demo": "off",
    "demo-security-critical": "security-critical",
    "demo-balanced": "balanced",
    "demo-utility-priority": "utility-priority",
}


class Relay:
    """In front of the server at `url`. `asked` has the model and the path of every request for an answer."""

    def __init__(self, url: str) -> None:
        self.asked: list[tuple[str, str]] = []
        self._client = httpx.AsyncClient(base_url=url, timeout=60)

    def app(self) -> Starlette:
        posts = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
        return Starlette(
            routes=[
                Route("/health", self._got),
                Route("/v1/models", self._list),
                *(Route(path, self._posted, methods=["POST"]) for path in posts),
            ]
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _got(self, request: Request) -> Response:
        found = await self._client.get(request.url.path)
        return Response(found.content, found.status_code)

    async def _list(self, _: Request) -> Response:
        (base, *_) = (await self._client.get("/v1/models")).json()["data"]
        return JSONResponse({"data": [{**base, "id": name} for name in LEVELS]})

    async def _posted(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        model, headers = body["model"], {}
        if model not in LEVELS:
            return JSONResponse({"error": {"message": f"no model {model}"}}, 404)
        if request.url.path.startswith("/v1/"):
            self.asked.append((model, request.url.path))
            headers["X-Safety-Level"] = LEVELS[model]
        body["model"] = "demo"
        body.pop("return_token_ids", None)
        if "stream_options" in body:
            body["stream_options"] = {"include_usage": True}
        if body.get("top_k") == -1:
            body["top_k"] = 0
        sent = self._client.build_request("POST", request.url.path, json=body, headers=headers)
        answer = await self._client.send(sent, stream=True)
        named = (
            piece.replace(b'"model":"demo"', f'"model":"{model}"'.encode()) async for piece in _of(answer)
        )
        kind = answer.headers["content-type"]
        return StreamingResponse(
            named, answer.status_code, media_type=kind, background=BackgroundTask(answer.aclose)
        )


async def _of(answer: httpx.Response) -> Any:
    async for piece in answer.aiter_bytes():
        yield piece
