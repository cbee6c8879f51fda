"""The one place where settings, engine and routes are joined.

Knows every part by its constructor and none by its inside.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modulation.errors import LevelError
from server.engines.base import Engine
from server.errors import (
    ERRORS,
    MethodNotAllowedError,
    RequestError,
    RouteNotFoundError,
    SettingsError,
    error_body,
    kind_of,
)
from server.metrics import CountRequests, Metrics
from server.request_ids import REQUEST_ID_HEADER, SCOPE_KEY, RequestIds
from server.routes.asking import Asking
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.health import health_router
from server.routes.levels import levels_router
from server.routes.models import models_router
from server.routes.tokens import tokens_router
from server.settings import Settings


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """The application that serves `engine` as `settings` say. Its end closes the engine.

    Raises:
        SettingsError: the default level is not one that the engine's mask offers.
    """
    try:
        default = engine.describe().levels.parse(settings.default_level)
    except LevelError as error:
        raise SettingsError(f"Setting default_level: {error}") from error
    metrics = Metrics(engine)
    model = settings.served_model_name

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(title="NeuronTune Server", lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(RequestIds)
    asking = Asking(engine, metrics, model, default)
    app.include_router(chat_router(asking))
    app.include_router(completions_router(asking))
    app.include_router(tokens_router(asking))
    app.include_router(models_router(engine, model, created=int(time.time())))
    app.include_router(levels_router(engine, default))
    app.include_router(health_router(engine, metrics))
    for kind in ERRORS:
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    return app


class _ErrorResponse(JSONResponse):
    """JSON in ASCII: an error may quote text that is not valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


async def _answer_error(request: Request, error: Exception) -> Response:
    # What nobody expected is answered outside of the middleware that gives every answer its id.
    headers = {REQUEST_ID_HEADER: request.scope[SCOPE_KEY]} if SCOPE_KEY in request.scope else None
    response = _ErrorResponse(error_body(error), status_code=kind_of(error).status, headers=headers)
    if (seconds := getattr(error, "retry_after_seconds", None)) is not None:
        response.headers["Retry-After"] = str(seconds)
    return response


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    path, method = request.url.path, request.method
    kinds: dict[int, RequestError] = {
        404: RouteNotFoundError(f"There is no {path}. /docs lists what there is."),
        405: MethodNotAllowedError(f"{path} does not take {method}."),
    }
    answer = kinds.get(error.status_code)
    if answer is None:
        raise error
    response = await _answer_error(request, answer)
    response.headers.update(error.headers or {})
    return response
