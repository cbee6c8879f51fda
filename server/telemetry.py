"""Spans on their way to a collector, by OpenTelemetry's protocol. Imported only where that is asked for.

Knows OpenTelemetry's SDK and our spans. Knows no request. No state of the process is used: no global
provider, no hook at its exit. OpenTelemetry's own variables (`OTEL_…`) are read by the SDK.
"""

import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.tracing import Span

TRACES_PATH: Final = "/v1/traces"
EXPORT_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 5.0


class Telemetry:
    """Hands spans to `processor`. What it holds back is sent when it is closed; if that takes too long,
    `give_up` is called."""

    def __init__(self, processor: SpanProcessor, give_up: Callable[[], object] = lambda: None) -> None:
        self._give_up = give_up
        number = _version()
        ours = Resource.create({"service.name": "neurontune", "service.version": number})
        resource = ours.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("neurontune", number)
        self._propagator = TraceContextTextMapPropagator()

    def export(self, span: Span) -> None:
        """Take a span. Sampling follows its parent, as `OTEL_TRACES_SAMPLER` says."""
        made = self._tracer.start_span(
            span.name,
            context=self._propagator.extract(span.headers),
            kind=SpanKind.SERVER,
            attributes=span.attributes,
            start_time=span.begun,
        )
        for event in span.events:
            made.add_event(event.name, event.attributes, event.at)
        if span.error is not None:
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(span.ended)

    def close(self) -> None:
        """Send what waits, for `CLOSE_SECONDS` at most: a collector that does not answer holds up nobody."""
        closing = threading.Thread(target=self._provider.shutdown, name="telemetry-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            self._give_up()


def to_collector(endpoint: str) -> Telemetry:
    """Spans in batches, by a thread of their own, to the collector at `endpoint`: a URL, to which
    `/v1/traces` is added where it has no path."""
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH
    exporter = OTLPSpanExporter(endpoint=url, timeout=EXPORT_SECONDS)
    return Telemetry(BatchSpanProcessor(exporter), give_up=exporter.shutdown)


def _version() -> str:
    try:
        return version("neurontune")
    except PackageNotFoundError:
        return "0"
