"""One span per request for an answer, in memory and at a real collector; nobody waits for the collector."""

import asyncio
import gzip
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.app import create_app
from server.engines.base import EngineUnavailableError, GenerationError
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.errors import SettingsError
from server.settings import Settings, read_settings
from server.telemetry import Telemetry, to_collector
from tests.engines.contract import until
from tests.server.conftest import CHAT, Ask, Control, events
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio

MANUAL = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()
COMPLETIONS = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "pineapple"


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(memory: InMemorySpanExporter) -> Iterator[Telemetry]:
    telemetry = Telemetry(SimpleSpanProcessor(memory))
    yield telemetry
    telemetry.close()


@pytest.fixture
async def client(
    settings: Settings, engine: FakeEngine, telemetry: Telemetry
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings, engine, telemetry=telemetry)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def only(memory: InMemorySpanExporter) -> ReadableSpan:
    (span,) = memory.get_finished_spans()
    return span


def phases(span: ReadableSpan) -> list[tuple[str, Any]]:
    return [(event.name, (event.attributes or {})["neurontune.choice"]) for event in span.events]


ONE = [("neurontune.queue", 0), ("neurontune.prefill", 0), ("neurontune.decode", 0)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_says_what_was_asked_applied_and_generated(
    ask: Ask, memory: InMemorySpanExporter, stream: bool
) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await ask(
        model="demo@17",
        messages=[{"role": "user", "content": f"A {SECRET}, please"}],
        headers={"X-Request-Id": "abc-1"},
        temperature=0.5,
        seed=7,
        max_tokens=9,
        stop=[SECRET],
        stream=stream,
        **more,
    )
    usage = events(answer.text)[-2]["usage"] if stream else answer.json()["usage"]
    span = only(memory)
    assert (span.name, span.kind, span.parent) == ("chat demo", SpanKind.SERVER, None)
    attributes = dict(span.attributes or {})
    assert ("gen_ai.response.time_to_first_chunk" in attributes) == stream
    seconds = attributes.pop("gen_ai.response.time_to_first_chunk", 0)
    assert isinstance(seconds, float | int) and seconds >= 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "neurontune",
        "gen_ai.request.model": "demo@17",
        "gen_ai.response.model": "demo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.stream": stream,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "neurontune.request_id": "abc-1",
        "neurontune.safety_level.asked": "17",
        "neurontune.safety_level.applied": "17",
        "neurontune.num_safety": 17,
        "neurontune.num_utility": 9,
        "neurontune.mask_digest": MASK_DIGEST,
    }
    for name in (*attributes, *(event.name for event in span.events)):
        short = name.removeprefix("gen_ai.request.").removeprefix("gen_ai.usage.")
        assert f"`{name}`" in MANUAL or f"`{short}`" in MANUAL, f"docs/operations.md says nothing of {name}"
    assert span.status.status_code == StatusCode.UNSET
    assert phases(span) == ONE
    assert SECRET not in span.to_json() and "Fake" not in span.to_json()


async def test_phases_follow_one_another_within_the_span(ask: Ask, memory: InMemorySpanExporter) -> None:
    await ask()
    span = only(memory)
    assert span.start_time is not None and span.end_time is not None
    begins = [event.timestamp for event in span.events]
    lasts = [float((event.attributes or {})["neurontune.seconds"]) for event in span.events]  # type: ignore[arg-type]
    for begin, seconds, following in zip(begins, lasts, [*begins[1:], span.end_time], strict=True):
        assert seconds >= 0
        # Nanoseconds are rounded; only decode ends before what follows, which is the end of the request.
        assert begin + 1e9 * seconds <= following + 1000
    for begin, seconds, following in zip(begins, lasts, begins[1:], strict=False):
        assert begin + 1e9 * seconds == pytest.approx(following, abs=1000)
    assert span.start_time <= begins[0]


async def test_choices_have_phases_of_their_own_and_many_are_cut(
    client: httpx.AsyncClient, ask: Ask, memory: InMemorySpanExporter
) -> None:
    await ask(n=2)
    span = only(memory)
    assert sorted(phases(span)) == sorted((name, choice) for name, _ in ONE for choice in (0, 1))
    assert (span.attributes or {})["gen_ai.request.choice.count"] == 2
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("stop", "stop")
    memory.clear()
    body = {"model": "demo", "prompt": ["one two"] * 40, "max_tokens": 1}
    usage = (await client.post(COMPLETIONS, json=body)).json()["usage"]
    span = only(memory)
    assert span.name == "text_completion demo"
    assert len(span.events) == 3 * 32 and span.dropped_events == 0
    assert (span.attributes or {})["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] == 80


@pytest.mark.parametrize(
    ("traceparent", "parent"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", None),  # whoever asks does not sample, so neither do we
        (f"00-{'0' * 32}-{PARENT}-01", False),
        ("no parent at all", False),
        ("x" * 10_000, False),
    ],
)
async def test_the_parent_is_who_the_header_names(
    ask: Ask, memory: InMemorySpanExporter, traceparent: str, parent: bool | None
) -> None:
    answer = await ask(headers={"traceparent": traceparent, "tracestate": "vendor=1"})
    assert answer.status_code == 200
    if parent is None:
        assert not memory.get_finished_spans()
        return
    span = only(memory)
    if not parent:
        assert span.parent is None
        return
    assert span.parent is not None and span.context is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent.is_remote and span.context.trace_state["vendor"] == "1"


async def test_errors_set_the_status(
    ask: Ask, client: httpx.AsyncClient, control: Control, memory: InMemorySpanExporter
) -> None:
    def seen() -> tuple[Any, ...]:
        span, attributes = only(memory), dict(only(memory).attributes or {})
        memory.clear()
        code, described = span.status.status_code, span.status.description
        assert (code == StatusCode.ERROR) == (described is not None)
        assert described in (None, attributes.get("error.type"))
        return described, attributes["http.response.status_code"], [name for name, _ in phases(span)]

    await ask(safety_level="nope")
    assert seen() == ("invalid_safety_level", 400, [])
    await client.post(CHAT, content=b"{")
    assert seen() == ("invalid_json", 400, [])
    await ask(max_tokens=5000)
    assert seen() == ("context_length_exceeded", 400, ["neurontune.queue"])
    control.fail_at = 3
    for failure, stream, expected in (
        (GenerationError("NaN"), False, ("generation_failed", 500)),
        (GenerationError("NaN"), True, ("generation_failed", 200)),
        (EngineUnavailableError("gone"), True, ("engine_unavailable", 200)),
        (OSError("a bug"), False, ("internal_error", 500)),
    ):
        control.failure = failure
        await ask(stream=stream)
        assert seen() == (*expected, [name for name, _ in ONE])
    control.fail_at, control.wait_at = None, 3
    for stream, status in ((False, 408), (True, 200)):
        await ask(headers={"X-Request-Timeout": "0.1"}, stream=stream)
        assert seen() == ("deadline_exceeded", status, [name for name, _ in ONE])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_told_of_and_is_no_error(
    settings: Settings,
    engine: FakeEngine,
    control: Control,
    telemetry: Telemetry,
    memory: InMemorySpanExporter,
    stream: bool,
) -> None:
    control.wait_at = 3
    left, sent = asyncio.Event(), [{"type": "http.request", "body": BODY % str(stream).lower().encode()}]

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("server", 80), "client": ("there", 1)}
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    app = create_app(settings, engine, telemetry=telemetry)
    asked = asyncio.create_task(app({**scope, "headers": headers}, receive, send))
    await until(lambda: engine.tallies().step_levels.total == 3)
    left.set()
    await asked
    span = only(memory)
    assert (span.attributes or {})["error.type"] == "client_disconnected"
    assert (span.attributes or {})["http.response.status_code"] == (200 if stream else 499)
    assert span.status.status_code == StatusCode.UNSET and phases(span) == ONE


BODY = b'{"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": %s}'


async def test_only_requests_for_answers_have_spans_denied_ones_too(
    engine: FakeEngine, telemetry: Telemetry, memory: InMemorySpanExporter, tmp_path: Path
) -> None:
    settings = Settings(engine="fake", keys=key_file(tmp_path / "keys.yaml", ann={"floor": "balanced"}))
    app = create_app(settings, engine, telemetry=telemetry)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "safety_level": "off"}
        await client.post(CHAT, json=body)
        await client.post(CHAT, json=body, headers=bearer("ann"))
        await client.get(CHAT, headers=bearer("ann"))
        await client.post("/tokenize", json={"model": "demo", "prompt": "Hi"}, headers=bearer("ann"))
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            await client.get(path, headers=bearer("ann"))
    spans = [dict(span.attributes or {}) for span in memory.get_finished_spans()]
    assert [span["error.type"] for span in spans] == ["missing_api_key", "safety_level_forbidden"]
    assert spans[1]["neurontune.safety_level.asked"] == "off"
    assert not any("neurontune.safety_level.applied" in span for span in spans)


async def test_an_exporter_that_raises_fails_no_request(
    settings: Settings, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Telemetry):
        def export(self, _span: object) -> None:
            raise OSError("told to fail")

    broken = Broken(SimpleSpanProcessor(InMemorySpanExporter()))
    app = create_app(settings, engine, telemetry=broken)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for stream in (b"true", b"false"):
            assert (await client.post(CHAT, content=BODY % stream)).status_code == 200
    assert caplog.text.count("could not be traced") == 2
    broken.close()


class Collector(ThreadingHTTPServer):
    """Decodes what comes by OTLP over HTTP; `answers` not set: it lets everybody wait."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        self.answers, self.asked = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        self.server.asked.set()
        self.server.answers.wait(30)
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(data)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        serving = threading.Thread(target=collector.serve_forever)
        serving.start()
        yield collector
        collector.answers.set()
        collector.shutdown()
        serving.join()


@asynccontextmanager
async def exporting(endpoint: str, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose spans go to `endpoint`; the server ends with the block."""
    app = create_app(Settings(engine="fake", otlp_endpoint=endpoint), engine)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


async def test_a_collector_gets_the_spans_by_the_servers_end_at_the_latest(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    collector.answers.set()
    async with exporting(collector.url, engine) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Safety-Level": "security-critical"}
        assert (await client.post(CHAT, content=BODY % b"true", headers=headers)).status_code == 200
    ((path, sent),) = collector.received
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    named = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert named["service.name"] == "neurontune" and named["deployment.environment.name"] == "test"
    (span,) = resource.scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "chat demo" and [event.name for event in span.events] == [name for name, _ in ONE]
    told = {each.key: each.value for each in span.attributes}
    assert told["neurontune.safety_level.applied"].string_value == "security-critical"
    assert told["neurontune.num_safety"].int_value == 64
    assert b"Hi" not in sent.SerializeToString()


async def test_a_path_of_the_endpoint_is_kept(engine: FakeEngine, collector: Collector) -> None:
    collector.answers.set()
    async with exporting(f"{collector.url}/otlp/mine", engine) as client:
        await client.post(CHAT, content=BODY % b"false")
    assert [path for path, _ in collector.received] == ["/otlp/mine"]


async def test_nobody_waits_for_a_collector_that_does_not_answer(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread hangs at the collector; requests are answered, and the server ends all the same."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setattr("server.telemetry.CLOSE_SECONDS", 0.1)
    async with exporting(collector.url, engine) as client:
        assert (await client.post(CHAT, content=BODY % b"false")).status_code == 200
        await asyncio.to_thread(collector.asked.wait, 30)
        assert collector.asked.is_set() and not collector.received
        for _ in range(3):
            assert (await client.post(CHAT, content=BODY % b"true")).status_code == 200
    assert not collector.received


async def test_a_collector_that_is_not_there_fails_no_request(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setattr("server.telemetry.CLOSE_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        async with exporting(f"http://127.0.0.1:{taken.getsockname()[1]}", engine) as client:
            for stream in (b"true", b"false"):
                assert (await client.post(CHAT, content=BODY % stream)).status_code == 200


def test_without_the_extra_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"otlp_endpoint: .* pip install 'neurontune\[otel\]'"):
        create_app(Settings(engine="fake", otlp_endpoint="http://localhost:4318"), FakeEngine())


def test_without_the_setting_it_need_not_be_installed() -> None:
    """The default installation has OpenTelemetry's interface alone, which FastAPI brings along."""
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None;"
        "from server.app import create_app; from server.settings import Settings;"
        "from server.engines.fake import FakeEngine; create_app(Settings(engine='fake'), FakeEngine());"
        "print('server.telemetry' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://", "http://a b", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="otlp_endpoint"):
        read_settings({"otlp_endpoint": endpoint})


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_path_of_traces_is_added_to_a_bare_endpoint(slash: str) -> None:
    telemetry = to_collector(f"http://127.0.0.1:4318{slash}")
    (processor,) = telemetry._provider._active_span_processor._span_processors
    assert processor.span_exporter._endpoint == "http://127.0.0.1:4318/v1/traces"  # type: ignore[attr-defined]
    telemetry.close()
