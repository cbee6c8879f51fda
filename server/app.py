"""The one place where settings, engine and routes are joined.

Knows every part by its constructor and none by its inside.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modulation.demo import MASK_FILE
from modulation.errors import LevelError
from modulation.levels import SafetyLevels
from server.access import check_callers
from server.admission import Admission
from server.audit import NOBODY, Audit, entry_of, reload_record
from server.audit_log import AuditLog, open_audit_log
from server.authentication import Authenticate, by_key, everybody
from server.body import Bounds
from server.callers import ANONYMOUS, Caller
from server.draining import WATCHED, Drain, RefuseWhenDraining
from server.engines.base import Engine, EngineUnavailableError
from server.errors import (
    ERRORS,
    AuthenticationError,
    MethodNotAllowedError,
    RequestError,
    RouteNotFoundError,
    SettingsError,
    ShuttingDownError,
    error_body,
    kind_of,
)
from server.floods import Thinned
from server.framing import PlainRequests
from server.hardening import SECURITY_HEADERS, SecurityHeaders
from server.hosts import RefuseForeign
from server.keys import Keyring
from server.mask_swap import MaskSwap, Swap
from server.metrics import CountRequests, Metrics
from server.playground import OPEN_PATHS, playground_router
from server.rates import RATE_HEADERS, Rates
from server.reloading import Check, Reloading
from server.request_ids import REQUEST_ID_HEADER, SCOPE_KEY, RequestIds
from server.routes.admin import admin_router
from server.routes.asking import TELLING_HEADERS, Asking
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.health import health_router
from server.routes.level_mix import level_mix_router
from server.routes.levels import levels_router
from server.routes.mask import mask_router
from server.routes.models import models_router
from server.routes.tokens import tokens_router
from server.settings import Settings
from server.tracing import Traced
from server.visits import Gate

if TYPE_CHECKING:
    from server.telemetry import Telemetry

# Enough that a batch never runs dry; the last in line waits for about four answers.
NUM_WAITING_PER_SEQ: Final = 4

NO_KEY_NEEDED: Final = ("/health", "/ready", *OPEN_PATHS)
METRICS: Final = "/metrics"
GENERATING: Final = ("/v1/chat/completions", "/v1/completions")


def create_app(
    settings: Settings,
    engine: Engine,
    drain: Drain | None = None,
    telemetry: "Telemetry | None" = None,
) -> FastAPI:
    """The application that serves `engine` as `settings` say. Its end closes the engine; before that,
    nothing new is taken from when `drain` begins. Spans go to `telemetry`, or where the settings say.

    Its `state` has `callers()`, everybody who may come now: a mask that is to be put in force must pass
    `check_callers` with them; and `metrics`, for what is counted before a request reaches it.

    Raises:
        SettingsError: the default level is not one that the engine's mask offers, or the key file cannot
            be used with it, or the audit log cannot be opened, or traces cannot be exported.
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
            if audit is not None and denials is not None:
                denials.close()
                await asyncio.to_thread(audit.close)
            if telemetry is not None:
                await asyncio.to_thread(telemetry.close)

    app = FastAPI(title="NeuronTune Server", lifespan=lifespan, redirect_slashes=False)
    routes = [*app.routes]
    app.state.metrics = metrics
    metrics.begin_routes(GENERATING)
    drain = drain or Drain()

    async def refuse(request: Request, error: ShuttingDownError) -> Response:
        metrics.rejected(error)
        return await _answer_error(request, error)

    app.add_middleware(RefuseWhenDraining, drain=drain, answer=refuse)
    anonymous, keyring = _anonymous(settings), _keyring(settings, engine)
    app.state.callers = lambda: (anonymous,) if keyring is None else keyring.callers
    check_callers(app.state.callers(), engine.describe().levels)
    find_caller = everybody(anonymous) if keyring is None else by_key(keyring.find)
    audit = app.state.audit = _audit_log(settings, metrics)
    denials = None if audit is None else Thinned(audit.write)

    def check(levels: SafetyLevels, callers: Sequence[Caller]) -> None:
        levels.parse(settings.default_level)
        check_callers(callers, levels)

    mask_swap = _mask_swap(settings, engine, check, app.state.callers, audit, metrics)
    app.state.reloading = Reloading(keyring, mask_swap, check, audit)
    open_paths = (*NO_KEY_NEEDED, METRICS) if settings.public_metrics else NO_KEY_NEEDED
    app.add_middleware(
        Authenticate, find_caller=find_caller, open_paths=open_paths, answer_error=_answer_error
    )
    is_private = settings.keys is None and not settings.open_to_anyone
    if is_private or settings.allowed_hosts:
        app.add_middleware(
            RefuseForeign,
            hosts=settings.allowed_hosts,
            origins=settings.cors_origins,
            # Those who watch a server come under its address. One without keys must not tell pages even this.
            open_paths=() if is_private else WATCHED,
            answer_error=_answer_error,
        )
    if audit is not None and denials is not None:
        app.add_middleware(
            Audit, log=audit, denials=denials, paths=GENERATING, keeps_prompts=settings.audit_prompts
        )
    telemetry = telemetry or _telemetry(settings)
    if telemetry is not None:
        app.add_middleware(Traced, export=telemetry.export, model=engine.describe().model_id)
    app.add_middleware(CountRequests, metrics=metrics, routes=routes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*TELLING_HEADERS, *RATE_HEADERS],
        )
    app.add_middleware(PlainRequests, answer_error=_answer_error)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestIds)
    asking = Asking(engine, metrics, model, default, _gate(settings, metrics), _bounds(settings))
    for router in (
        chat_router(asking),
        completions_router(asking),
        tokens_router(asking),
        models_router(engine, model, created=int(time.time())),
        levels_router(engine, default),
        mask_router(engine, default),
        level_mix_router(engine, metrics),
        playground_router(),
        health_router(engine, metrics, drain),
        admin_router(mask_swap, _bounds(settings)),
    ):
        app.include_router(router)
        routes += router.routes
    for kind in ERRORS:
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    return app


def _gate(settings: Settings, metrics: Metrics) -> Gate:
    running, waiting = settings.max_num_seqs, settings.max_num_waiting
    num_waiting = NUM_WAITING_PER_SEQ * running if waiting is None else waiting
    admission = Admission(running, num_waiting, settings.max_waiting_tokens)
    return Gate(admission, Rates(), metrics, settings.request_timeout_seconds)


def _bounds(settings: Settings) -> Bounds:
    return Bounds(settings.max_body_bytes, settings.read_timeout_seconds, settings.max_messages)


async def reload(app: FastAPI) -> None:
    """Put in force what has changed in the files that it reads (`Reloading`)."""
    await app.state.reloading()


def _audit_log(settings: Settings, metrics: Metrics) -> AuditLog | None:
    if settings.audit_log is None:
        return None
    return open_audit_log(
        settings.audit_log, settings.audit_max_bytes, settings.audit_keep, metrics.audit_failed
    )


def _telemetry(settings: Settings) -> "Telemetry | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        from server.telemetry import to_collector
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"Setting otlp_endpoint: traces need the extra otel, and {error.name} is not installed. Install "
            "it: pip install 'neurontune[otel]'."
        ) from error
    return to_collector(settings.otlp_endpoint)


def _mask_swap(
    settings: Settings,
    engine: Engine,
    check: Check,
    callers: Callable[[], Sequence[Caller]],
    audit: AuditLog | None,
    metrics: Metrics,
) -> MaskSwap:
    def note(swap: Swap) -> None:
        metrics.mask_reloaded(is_in_force=swap.error is None)
        if audit is not None:
            detail = f"{swap.new} from {swap.file}"
            by = NOBODY if swap.by is None else cast(Mapping[str, str | None], swap.by)
            audit.write(reload_record("mask", swap.error, detail, by=by, old=swap.old, new=swap.new))

    if settings.mask_dir is not None and not settings.mask_dir.is_dir():
        raise SettingsError(f"Setting mask_dir: {settings.mask_dir} is no folder. Make it, or leave it out.")
    file = settings.mask or MASK_FILE
    reread = None if settings.engine == "fake" else file
    return MaskSwap(
        settings.mask_dir or file.parent,
        reread,
        engine.use_mask,
        lambda levels: check(levels, callers()),
        lambda: engine.describe().mask_digest,
        note,
    )


def _anonymous(settings: Settings) -> Caller:
    """Whoever comes where there are no keys. Told to serve anybody, the server holds them to a floor; on
    loopback it is the operator who asks."""
    return replace(ANONYMOUS, floor=settings.default_floor if settings.open_to_anyone else None)


def _keyring(settings: Settings, engine: Engine) -> Keyring | None:
    if settings.keys is None:
        return None
    return Keyring(
        settings.keys,
        settings.default_floor,
        check=lambda callers: check_callers(callers, engine.describe().levels),
    )


class _ErrorResponse(JSONResponse):
    """JSON in ASCII: an error may quote text that is not valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


async def _answer_error(request: Request, error: Exception) -> Response:
    entry_of(request.scope).failed(error)
    # What nobody expected is answered outside of the middleware that gives every answer its id and these.
    headers = dict(SECURITY_HEADERS)
    if SCOPE_KEY in request.scope:
        headers[REQUEST_ID_HEADER] = request.scope[SCOPE_KEY]
    headers |= getattr(error, "headers", {})
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, EngineUnavailableError) and error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return _ErrorResponse(error_body(error), status_code=kind_of(error).status, headers=headers)


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
