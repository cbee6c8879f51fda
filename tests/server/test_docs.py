"""docs/api.md, docs/metrics.md and the code say the same: what one of them has, the other has too."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from modulation.evaluation.judges import REFUSAL_PHRASES, REFUSAL_WINDOW
from server.app import create_app
from server.body import Bounds
from server.engines.fake import FakeEngine
from server.engines.tallying import SAMPLE_EVERY, SAMPLE_GRAPHED_EVERY
from server.errors import ERRORS
from server.metric_table import TABLE
from server.metrics import KNOWN
from server.process import CTRL_C_SECONDS
from server.schemas import ChatCompletionRequest, CompletionRequest, Only
from server.settings import Settings, flag, variable

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "api.md").read_text()
METRICS_PAGE = (DOCS / "metrics.md").read_text()


def section(title: str, page: str = PAGE) -> str:
    """The text under the heading `title`."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found.group(1)


def rows(title: str, page: str = PAGE) -> Iterator[list[str]]:
    """The cells of every row of the tables under `title`, their headings left out, without backticks."""
    for table in re.findall(r"(?:^\|.*\n)+", section(title, page), re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def test_errors() -> None:
    documented = {(int(status), kind, code) for status, kind, code, _ in rows("Errors")}
    assert documented == {(entry.status, entry.type, entry.code) for entry in ERRORS.values()}


def test_settings() -> None:
    documented = {name: (shown, default) for shown, name, default, _ in rows("Settings")}
    assert documented.keys() == {variable(name) for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        shown, default = documented[variable(name)]
        assert shown == flag(name)
        if field.default not in (None, "", ()):
            assert default == str(field.default).lower()


def test_metrics() -> None:
    documented = [(name, kind, labels, help) for name, kind, labels, help in rows("The table", METRICS_PAGE)]
    in_code = [(row.wire_name, row.kind, ", ".join(row.labels), row.help) for row in TABLE.values()]
    assert documented == [(*row, help.replace("`", "")) for *row, help in in_code]


def test_metric_buckets() -> None:
    documented = {
        name: tuple(map(float, buckets.split(", ")))
        for names, buckets in rows("Buckets", METRICS_PAGE)
        for name in names.split(", ")
    }
    assert documented == {name: row.buckets for name, row in TABLE.items() if row.buckets}


def test_metric_labels() -> None:
    documented = dict(rows("Labels", METRICS_PAGE))
    assert documented.keys() == {label for row in TABLE.values() for label in row.labels}
    for name, values in KNOWN.items():
        (label,) = set(TABLE[name].labels) - {"model_name"}
        assert all(re.search(rf"\b{value}\b", documented[label]) for value in values), name
    assert f"one step in {SAMPLE_EVERY} (with CUDA graphs one in {SAMPLE_GRAPHED_EVERY}" in METRICS_PAGE
    assert str(REFUSAL_WINDOW) in METRICS_PAGE
    assert f"{len(REFUSAL_PHRASES)} English phrases" in METRICS_PAGE


@pytest.mark.anyio
async def test_metrics_of_the_process(client: httpx.AsyncClient) -> None:
    documented = {(name, kind) for name, kind, _ in rows("The process", METRICS_PAGE)}
    text = (await client.get("/metrics")).text
    assert documented == set(re.findall(r"^# TYPE (process_\w+) (\w+)$", text, re.MULTILINE))
    started = re.search(r"^process_start_time_seconds (\S+)$", text, re.MULTILINE)
    assert started and float(started[1]) == pytest.approx(psutil.Process().create_time(), abs=1)


def test_fields() -> None:
    documented = dict(row[:2] for row in rows("Fields of a chat completion"))
    assert documented.keys() == ChatCompletionRequest.model_fields.keys()
    for name, field in ChatCompletionRequest.model_fields.items():
        only = [mark for mark in field.metadata if isinstance(mark, Only)]
        if only:
            values = {json.dumps(value) for value in only[0].neutral if value is not None}
            shown = {json.dumps(json.loads(value)) for value in documented[name].split(", ") if value}
            assert shown == values - {"0.0", "1.0"}, name


def test_fields_of_a_completion() -> None:
    own = dict(row[:2] for row in rows("Fields of a completion"))
    shared = re.findall(
        r"`(\w+)`", section("Fields of a completion").partition("meaning:")[2].partition("And")[0]
    )
    assert {*own, *shared} == CompletionRequest.model_fields.keys()
    assert not set(own) & set(shared)


def test_endpoints() -> None:
    app = create_app(Settings(engine="fake"), FakeEngine())
    documented = {tuple(endpoint.split(" ")) for endpoint, _ in rows("Endpoints")}
    operations = {
        (method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods
    }
    assert documented == operations | {("GET", "/docs"), ("GET", "/")}


def test_figures() -> None:
    assert Bounds() == Bounds(*(Settings.model_fields[name].default for name in Bounds.__slots__))
    assert CTRL_C_SECONDS == 2 and "two seconds" in PAGE


@pytest.mark.anyio
async def test_the_curl_example_is_a_request_that_works(client: httpx.AsyncClient) -> None:
    header, body = re.findall(r"-H '(.*?)'.*?-d '(.*?)'", PAGE, re.DOTALL)[0]
    name, value = header.split(": ")
    response = await client.post("/v1/chat/completions", content=body, headers={name: value})
    assert response.status_code == 200 and response.headers[name] == value


@pytest.mark.anyio
async def test_the_error_example_is_what_is_answered(client: httpx.AsyncClient) -> None:
    [example] = re.findall(r"^(\{\"error\".*\})$", PAGE, re.MULTILINE)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 3}
    assert (await client.post("/v1/chat/completions", json=body)).json() == json.loads(example)
