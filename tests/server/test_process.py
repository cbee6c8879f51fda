"""How a server ends: what is running may finish, what is new is sent elsewhere, and the exit code is 0."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import CHAT, error_of
from tests.server.test_cli import started

SLOW = """
import asyncio
import pathlib
import sys

from server.app import create_app
from server.draining import Drain
from server.engines.fake import FakeEngine
from server.process import bind, run
from server.settings import Settings

GO = pathlib.Path(sys.argv[2])

async def hang(request, index):
    while index == 3 and not GO.exists():
        await asyncio.sleep(0.01)

engine = FakeEngine(before_token=hang)
listener = bind("127.0.0.1", 0)
port = listener.getsockname()[1]
drain = Drain()
app = create_app(Settings(engine="fake"), engine, drain)
run(app, engine, listener, "info", f"{port}\\n    -d ", drain, grace_seconds=float(sys.argv[1]))
"""

BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**BODY, "stream": True}


@contextmanager
def slow_server(grace: float, go: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose answers stop at their fourth token until the file `go` exists, and its address."""
    with started([sys.executable, "-c", SLOW, str(grace), str(go)]) as (process, printed):
        yield process, f"http://127.0.0.1:{printed.split()[0]}"


@contextmanager
def a_stream(url: str) -> Iterator[Iterator[str]]:
    """The lines of a streamed answer that has begun."""
    with httpx.stream("POST", url + CHAT, json=STREAM, timeout=30) as response:
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        yield lines


def until_unready(url: str) -> httpx.Response:
    """The first answer of `/ready` that is not 200."""
    with httpx.Client() as client:
        while (response := client.get(f"{url}/ready")).status_code == 200:
            pass
    return response


def test_sigterm_refuses_what_is_new_and_lets_what_runs_finish(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with slow_server(60, go) as (process, url), a_stream(url) as lines, httpx.Client() as old:
        assert old.get(f"{url}/v1/models").status_code == 200
        process.send_signal(signal.SIGTERM)
        error_of(until_unready(url), 503, "shutting_down")
        for client in (old, httpx):
            refused = client.post(url + CHAT, json=BODY)
            error_of(refused, 503, "shutting_down")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["connection"] == "close" and "x-request-id" in refused.headers
        assert httpx.get(f"{url}/health").status_code == 200
        assert 'neurontune_num_requests_running{model_name="demo"} 1.0' in httpx.get(f"{url}/metrics").text
        go.touch()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(10) == 0


def test_sigterm_with_nothing_running_ends_at_once(tmp_path: Path) -> None:
    with slow_server(60, tmp_path / "never") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("grace", "how"),
    [
        (60, (signal.SIGINT,)),
        (0.5, (signal.SIGTERM,)),
        (60, (signal.SIGTERM, signal.SIGTERM)),
        (60, (signal.SIGTERM, signal.SIGINT)),
        (60, (signal.SIGINT, signal.SIGINT)),
    ],
)
def test_after_the_grace_period_or_a_second_signal_open_streams_end_with_an_error(
    tmp_path: Path, grace: float, how: tuple[signal.Signals, ...]
) -> None:
    with slow_server(grace, tmp_path / "never") as (process, url), a_stream(url) as lines:
        asked = time.monotonic()
        process.send_signal(how[0])
        for second in how[1:]:
            until_unready(url)
            process.send_signal(second)
        last = [line for line in lines if line][-1]
        assert '"code":"engine_unavailable"' in last
        assert process.wait(10) == 0
        assert time.monotonic() - asked < 8
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_a_killed_server_leaves_its_port_to_the_next(tmp_path: Path) -> None:
    """SIGKILL loses the answers that were running, and nothing else: no file, no lock."""
    with slow_server(60, tmp_path / "never") as (process, url), a_stream(url) as lines:
        process.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    port = int(url.rpartition(":")[2])
    command = [sys.executable, "-m", "server", "serve", "--engine", "fake", "--port", str(port)]
    with started(command):
        assert httpx.get(f"{url}/ready").status_code == 200


def test_connections_without_a_whole_request_are_closed_in_time() -> None:
    command = [sys.executable, "-m", "server", "serve", "--engine", "fake", "--port", "0"]
    with started([*command, "--read-timeout-seconds", "0.5"]) as (_, printed):
        port = int(printed.partition("http://127.0.0.1:")[2].split()[0].partition("/")[0])
        for sent in (
            b"",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
            KEEP_ALIVE + b"GET /he",
            UNREAD,
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(sent)
                received = b""
                while part := connection.recv(4096):
                    received += part
                answered = b"200" if sent.startswith(KEEP_ALIVE) else b"404" if sent == UNREAD else b""
                assert received[9:12] == answered


KEEP_ALIVE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# Answered before its body is there, of which half comes.
UNREAD = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\nhalf"


LOST = """
import signal
import sys

from server.cli import app

class Finalized:
    def __del__(self):
        signal.raise_signal(getattr(signal, sys.argv[1]))

class DuringAnImport:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[2]:
            Finalized()

sys.meta_path.insert(0, DuringAnImport())
app(["serve", "--port", "0", *sys.argv[3:]])
"""


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        pytest.param(
            "server.engines.transformers", ("--model", "/no", "--mask", "/no"), id="before a model is loaded"
        ),
        pytest.param("server.tracing", ("--engine", "fake"), id="before an engine is made"),
        pytest.param(
            "server.telemetry",
            ("--engine", "fake", "--otlp-endpoint", "http://127.0.0.1:1"),
            id="while the application is made",
        ),
    ],
)
def test_a_signal_that_python_drops_while_it_imports_ends_the_server_nevertheless(
    how: str, code: int, module: str, flags: tuple[str, ...]
) -> None:
    """What is no model would end it with another code, and a server that is up never."""
    command = [sys.executable, "-c", LOST, how, module, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Exception ignored in" in ended.stderr
    assert ended.returncode == code, ended.stderr
    assert "address" not in ended.stdout
