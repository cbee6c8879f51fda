"""What the server counts and measures, and how an answer is measured on its way.

Knows Prometheus, the table of metrics, and outputs. Knows no HTTP framework and no field. One instance and
one registry per app.
"""

import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modulation.evaluation.judges import REFUSAL_WINDOW, refuses
from modulation.levels import SafetyLevel, SafetyLevels
from server.access import GrantedLevel
from server.engines.base import (
    Distribution,
    Engine,
    EngineBusyError,
    GrammarError,
    Output,
    PromptError,
    UnsupportedByEngineError,
)
from server.errors import LevelDeniedError, RefusedError
from server.metric_table import TABLE
from server.observed import Observed

CUSTOM: Final = "custom"
DEFAULT: Final = "default"
UNMATCHED: Final = "unmatched"

JUDGED: Final = ("200", "500", "503")

FinishedReason = Literal["stop", "length", "abort", "error"]

# Whatever can be known beforehand begins at 0: a rate needs a point before the first count.
KNOWN: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "request_success": ("stop", "length", "abort", "error"),
        "level_denials": ("invalid", "conflict", "forbidden"),
        "mask_reloads": ("success", "failure"),
        "admission_rejections": ("overloaded", "connections", "rate_limit", "shutting_down"),
    }
)


class Metrics:
    """Every metric of one app, as the table says, and the client library's own of the process."""

    def __init__(self, engine: Engine) -> None:
        info = engine.describe()
        self._engine: Final = engine
        self.registry: Final = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        self._tokens: Final = _OfTokens(info.model_id)
        self.registry.register(self._tokens)
        ProcessCollector(registry=self.registry)
        self._model: Final = info.model_id
        self._prompt_tokens: Final = self._counter("prompt_tokens").labels(self._model)
        self._cached_tokens: Final = self._counter("prompt_tokens_cached").labels(self._model)
        self._success: Final = self._counter("request_success")
        self._first_token: Final = self._histogram("time_to_first_token_seconds")
        self._per_token: Final = self._histogram("request_time_per_output_token_seconds")
        self._whole: Final = self._histogram("e2e_request_latency_seconds")
        self._queue: Final = self._histogram("request_queue_time_seconds")
        self._inference: Final = self._histogram("request_inference_time_seconds")
        self._prefill: Final = self._histogram("request_prefill_time_seconds")
        self._decode: Final = self._histogram("request_decode_time_seconds")
        self._prompt_sizes: Final = self._histogram("request_prompt_tokens")
        self._answer_sizes: Final = self._histogram("request_generation_tokens")
        self._http_requests: Final = self._counter("http_requests")
        self._http_seconds: Final = Histogram(**_arguments("http_request_duration_seconds", self.registry))
        self._requests: Final = self._counter("requests")
        self._denials: Final = self._counter("level_denials")
        self._answers: Final = self._counter("answers")
        self._refusals: Final = self._counter("refusals")
        self._neurons: Final = self._histogram("active_neurons")
        self._reloads: Final = self._counter("mask_reloads")
        self._rejections: Final = self._counter("admission_rejections")
        self._deadlines: Final = self._counter("deadlines_exceeded").labels(self._model)
        self._audit_failures: Final = self._counter("audit_failures")
        self._begin(info.levels)

    def _begin(self, levels: SafetyLevels) -> None:
        """What these levels can be counted under is there, with what it has, or 0."""
        for applied in (*levels.names, CUSTOM):
            for counter in (self._answers, self._refusals):
                counter.labels(applied, self._model)
            for asked in (applied, DEFAULT):
                self._requests.labels(asked, applied, self._model)

    def _counter(self, name: str) -> Counter:
        counter = Counter(**_arguments(name, self.registry))
        for value in KNOWN.get(name, ()):
            counter.labels(value, self._model)
        return counter

    def _histogram(self, name: str) -> Histogram:
        return Histogram(**_arguments(name, self.registry)).labels(self._model)

    def begin_routes(self, routes: Iterable[str]) -> None:
        """Of these templates the statuses by which availability is judged are there, as 0."""
        for route in routes:
            for status in JUDGED:
                self._http_requests.labels(route, status)

    def granted(self, levels: SafetyLevels, granted: GrantedLevel) -> None:
        """Count a request that got its level. A number counts as `custom`: labels stay few."""
        applied = level_label(levels, granted.level)
        self._requests.labels(DEFAULT if granted.is_default else applied, applied, self._model).inc()
        threshold = granted.level.threshold
        self._neurons.observe(threshold.num_safety + threshold.num_utility)

    def denied(self, error: LevelDeniedError) -> None:
        """Count a request that was refused for its level."""
        self._denials.labels(error.reason, self._model).inc()

    def rejected(self, error: RefusedError) -> None:
        """Count a request that was not let in."""
        self._rejections.labels(error.reason, self._model).inc()

    def deadline_exceeded(self) -> None:
        """Count a request whose time was over."""
        self._deadlines.inc()

    def audit_failed(self) -> None:
        """Count a line of the audit log that was lost."""
        self._audit_failures.inc()

    def mask_reloaded(self, *, is_in_force: bool) -> None:
        """Count a mask that was to be put in force."""
        self._reloads.labels("success" if is_in_force else "failure", self._model).inc()
        if is_in_force:
            self._begin(self._engine.describe().levels)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `route` is a template, never a path."""
        self._http_requests.labels(route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def num_requests_by_level(self) -> dict[str, int]:
        """How many requests were given each level since the start; numbers together as `custom`."""
        counts: dict[str, int] = {}
        for sample in (each for family in self._requests.collect() for each in family.samples):
            if sample.name.endswith("_total") and sample.value:
                level = sample.labels["level_applied"]
                counts[level] = counts.get(level, 0) + int(sample.value)
        return counts

    async def measured(
        self, outputs: AsyncGenerator[Output, None], arrived: float, level: str
    ) -> AsyncGenerator[Output, None]:
        """`outputs` of one answer at `level` (of `level_label`), measured on their way. `arrived` is of
        `time.perf_counter`.

        Closing it closes `outputs`. Tokens count as they come, so those of aborted answers count too. What
        the engine refuses, because of what was asked or for want of room, has not begun: it is no answer.
        """
        answer = _Answer(self, arrived, level)
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    answer.saw(output)
                    yield output
            except (PromptError, GrammarError, UnsupportedByEngineError, EngineBusyError):
                answer.has_ended = True
                raise
            except Exception:
                answer.ended("error")
                raise
            finally:
                answer.ended("abort")


class _Answer:
    """One answer's measures, from when it reached the engine."""

    def __init__(self, metrics: Metrics, arrived: float, level: str) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._level = level
        self._begun = time.perf_counter()
        self._first: float | None = None  # of its tokens
        self._last = self._begun
        self._beginning = ""
        self._has_begun = self.has_ended = False

    def saw(self, output: Output) -> None:
        now, num_new, metrics = time.perf_counter(), len(output.token_ids), self._metrics
        if not self._has_begun:
            self._has_begun = True
            metrics._prompt_tokens.inc(output.num_prompt_tokens)
            metrics._cached_tokens.inc(output.num_cached_tokens)
        if num_new:
            metrics._tokens.num_generated += num_new
            if self._first is None:
                self._first = now
                metrics._first_token.observe(now - self._arrived)
            else:
                metrics._tokens.seconds_between.add((now - self._last) / num_new)
            self._last = now
        if len(self._beginning) < REFUSAL_WINDOW:
            self._beginning += output.text
        if output.finish_reason is not None:
            self._completed(output, now)
            self.ended(output.finish_reason)

    def _completed(self, output: Output, now: float) -> None:
        metrics, stepped = self._metrics, self._begun + output.queued_seconds
        metrics._whole.observe(now - self._arrived)
        metrics._queue.observe(output.queued_seconds)
        metrics._inference.observe((now if self._first is None else self._last) - stepped)
        metrics._prompt_sizes.observe(output.num_prompt_tokens)
        metrics._answer_sizes.observe(output.num_completion_tokens)
        if self._first is not None:
            metrics._prefill.observe(self._first - stepped)
            metrics._decode.observe(self._last - self._first)
            if output.num_completion_tokens > 1:
                metrics._per_token.observe((self._last - self._first) / (output.num_completion_tokens - 1))
        metrics._answers.labels(self._level, metrics._model).inc()
        if refuses(self._beginning):
            metrics._refusals.labels(self._level, metrics._model).inc()

    def ended(self, reason: FinishedReason) -> None:
        """Once; what is said later changes nothing."""
        if not self.has_ended:
            self.has_ended = True
            self._metrics._success.labels(reason, self._metrics._model).inc()


def level_label(levels: SafetyLevels, level: SafetyLevel) -> str:
    """How a level is named in labels: by its name, or as `custom`."""
    return level.name if level.name in levels else CUSTOM


def _arguments(name: str, registry: CollectorRegistry) -> dict[str, Any]:
    row = TABLE[name]
    buckets = {"buckets": row.buckets} if row.kind == "histogram" else {}
    return {
        "name": row.name,
        "documentation": row.help,
        "labelnames": row.labels,
        "registry": registry,
    } | buckets


class _OfEngine(Collector):
    """What the engine tells, asked at each scrape: it counts by itself, and its mask can be swapped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        info, state, tallies = self._engine.describe(), self._engine.healthy(), self._engine.tallies()
        model = [info.model_id]
        method = "none" if info.mask is None else info.mask.method
        mask = _family("mask_info", GaugeMetricFamily)
        mask.add_metric([info.mask_digest, method, *model], 1)
        yield mask
        gauges: dict[str, float] = {
            "num_requests_running": state.num_running,
            "num_requests_waiting": state.num_waiting,
            "engine_ready": state.ready,
        }
        if tallies is not None:
            gauges["kv_cache_usage_perc"] = tallies.kv_cache_usage
        for name, value in gauges.items():
            gauge = _family(name, GaugeMetricFamily)
            gauge.add_metric(model, value)
            yield gauge
        if tallies is None:
            return
        yield _counted("prefix_cache_queries", tallies.num_prefix_queries, model)
        yield _counted("prefix_cache_hits", tallies.num_prefix_hits, model)
        yield _counted("engine_restarts", tallies.num_restarts, model)
        yield _distributed("step_distinct_levels", tallies.step_levels, model)
        yield _distributed("modulation_step_seconds", tallies.modulation_seconds, model)


class _OfTokens(Collector):
    """What is counted at every token, in plain numbers: the client library's counters cost several times as
    much, and there are as many tokens as a model can generate. Written to by the event loop alone."""

    def __init__(self, model: str) -> None:
        self._model = [model]
        self.num_generated = 0
        self.seconds_between = Observed(TABLE["inter_token_latency_seconds"].buckets)

    def collect(self) -> Iterator[Metric]:
        yield _counted("generation_tokens", self.num_generated, self._model)
        yield _distributed("inter_token_latency_seconds", self.seconds_between.distribution(), self._model)


F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily)


def _family(name: str, kind: type[F]) -> F:
    row = TABLE[name]
    return kind(row.name, row.help, labels=row.labels)


def _counted(name: str, number: float, labels: Sequence[str]) -> Metric:
    counter = _family(name, CounterMetricFamily)
    counter.add_metric(labels, number)
    return counter


def _distributed(name: str, observed: Distribution, labels: Sequence[str]) -> Metric:
    histogram = _family(name, HistogramMetricFamily)
    histogram.add_metric(labels, _cumulated(observed), observed.total)
    return histogram


def _cumulated(observed: Distribution) -> list[tuple[str, float]]:
    """As Prometheus counts: by upper bound, everything at most that."""
    bounds = [*map(floatToGoString, observed.bounds), "+Inf"]
    return list(zip(bounds, accumulate(observed.counts), strict=True))


class CountRequests:
    """ASGI middleware that counts and times HTTP requests. The route is its template, never its path: of
    what is refused before it reaches `routes`, the one that it would have reached."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._metrics.answered(self._template(scope), status, time.perf_counter() - begun)

    def _template(self, scope: Scope) -> str:
        found = (route for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return getattr(scope.get("route") or next(found, None), "path", UNMATCHED)
