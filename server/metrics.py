"""What the server counts and measures, in one table, and how a request's answer is measured.

Knows Prometheus and outputs. Knows no HTTP framework and no field. One instance and one registry per
app. Buckets are vLLM's, so that people find what they know.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modulation.levels import SafetyLevels
from server.access import GrantedLevel
from server.engines.base import Engine, Output
from server.errors import LevelDeniedError

CUSTOM: Final = "custom"
DEFAULT: Final = "default"
UNMATCHED: Final = "unmatched"

FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40),
    *(80, 160, 640, 2560),
)
INTER_TOKEN_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)


class Metrics:
    """Every metric of one app. The constructor is the table."""

    def __init__(self, engine: Engine) -> None:
        self.registry: Final = CollectorRegistry()
        to: Final = self.registry
        running = Gauge("neurontune_requests_running", "Requests that are being answered.", registry=to)
        running.set_function(lambda: engine.healthy().num_running)
        waiting = Gauge("neurontune_requests_waiting", "Requests that wait for room.", registry=to)
        waiting.set_function(lambda: engine.healthy().num_waiting)
        to.register(_MaskInfo(engine))
        self.http_requests: Final = Counter(
            "neurontune_http_requests",
            "HTTP requests, by route template and status.",
            ("route", "status"),
            registry=to,
        )
        self.requests: Final = Counter(
            "neurontune_requests",
            "Requests for an answer, by the level they asked for and the level applied.",
            ("level_asked", "level_applied"),
            registry=to,
        )
        self.level_denials: Final = Counter(
            "neurontune_level_denials",
            "Requests refused because of their level, by reason.",
            ("reason",),
            registry=to,
        )
        self.audit_lost: Final = Counter(
            "neurontune_audit_lost", "Lines of the audit log that could not be written.", registry=to
        )
        self.refusals: Final = Counter(
            "neurontune_refusals",
            "Requests that found no place, no rate or no more time, by reason.",
            ("reason",),
            registry=to,
        )
        self.prompt_tokens: Final = Counter(
            "neurontune_prompt_tokens", "Tokens of prompts that were answered.", registry=to
        )
        self.generation_tokens: Final = Counter(
            "neurontune_generation_tokens", "Tokens generated.", registry=to
        )
        self.first_token: Final = Histogram(
            "neurontune_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=to,
        )
        self.inter_token: Final = Histogram(
            "neurontune_inter_token_latency_seconds",
            "Seconds between a request's tokens.",
            buckets=INTER_TOKEN_BUCKETS,
            registry=to,
        )
        self.request: Final = Histogram(
            "neurontune_e2e_request_latency_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            buckets=REQUEST_BUCKETS,
            registry=to,
        )

    def granted(self, levels: SafetyLevels, granted: GrantedLevel) -> None:
        """Count a request that got its level. A number counts as `custom`: labels stay few."""
        applied = granted.level.name if granted.level.name in levels else CUSTOM
        asked = DEFAULT if granted.is_default else applied
        self.requests.labels(asked, applied).inc()

    def denied(self, error: LevelDeniedError) -> None:
        """Count a request that was refused for its level."""
        self.level_denials.labels(error.reason).inc()

    def num_requests_by_level(self) -> dict[str, int]:
        """How many requests were given each level since the start; numbers together as `custom`."""
        counts: dict[str, int] = {}
        for sample in (each for family in self.requests.collect() for each in family.samples):
            if sample.name.endswith("_total"):
                level = sample.labels["level_applied"]
                counts[level] = counts.get(level, 0) + int(sample.value)
        return counts

    async def measured(
        self, outputs: AsyncGenerator[Output, None], arrived: float
    ) -> AsyncGenerator[Output, None]:
        """`outputs`, measured on their way. `arrived` is of `time.perf_counter`.

        Closing it closes `outputs`. Tokens count as they come, so those of aborted answers count too.
        """
        num_tokens, before = 0, arrived
        async with aclosing(outputs):
            async for output in outputs:
                now, num_new = time.perf_counter(), len(output.token_ids)
                if num_new:
                    self.generation_tokens.inc(num_new)
                    if num_tokens:
                        self.inter_token.observe((now - before) / num_new)
                    else:
                        self.first_token.observe(now - arrived)
                        self.prompt_tokens.inc(output.num_prompt_tokens)
                    num_tokens, before = num_tokens + num_new, now
                if output.finish_reason is not None:
                    self.request.observe(now - arrived)
                yield output


class _MaskInfo(Collector):
    """The mask in force at each scrape: it can be swapped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        info = self._engine.describe()
        mask = GaugeMetricFamily("neurontune_mask_info", "The mask in force.", labels=("digest", "model"))
        mask.add_metric((info.mask_digest, info.model_id), 1)
        yield mask


class CountRequests:
    """ASGI middleware that counts HTTP requests. The route is its template, never its path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.http_requests.labels(route, str(status)).inc()
