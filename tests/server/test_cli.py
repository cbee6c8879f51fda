"""The command as a newcomer meets it: help, one sentence on errors, a server that starts and ends."""

import json
import os
import re
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
from typer.testing import CliRunner

from modulation.demo import MASK_FILE
from server.cli import app
from server.settings import Settings, flag, variable
from tests.server.keying import bearer, key_file

COMMAND = [sys.executable, "-m", "server"]
UPSTREAM = ["serve", "--port", "0", "--engine", "upstream", "--upstream", "http://127.0.0.1:9/v1/"]
ROOT = Path(__file__).parent.parent.parent


def test_help_names_every_setting_as_flag_and_variable() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200)
    assert shown.exit_code == 0
    for name in Settings.model_fields:
        assert f"{flag(name)} " in shown.output and variable(name) in shown.output


def test_the_command_itself_imports_nothing_heavy() -> None:
    script = "import server.cli, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert not {"torch", "transformers", "numpy", "fastapi", "uvicorn"} & set(loaded.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "abc"], "--port"),
        (["serve", "--engine", "fake", "--port", "0", "--default-level", "nope"], "default_level"),
        (["serve", "--model", "some/model"], "--mask"),
        (["serve", "--engine", "fake", "--host", "192.0.2.1"], "192.0.2.1"),
        ([*UPSTREAM, "--mask", "no-such-file"], "no-such-file"),
        ([*UPSTREAM, "--mask", str(MASK_FILE)], "http://127.0.0.1:9 cannot be reached"),
        ([*UPSTREAM, "--mask", str(MASK_FILE), "--adapter", "nope=x", "--adapter", "balanced=y"], "'nope'"),
        (["inspect", "no-such-file.safetensors"], "no-such-file.safetensors"),
    ],
)
def test_an_error_is_one_sentence_and_exit_code_1(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("neurontune: ") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_known_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--engine", "fake", "--port", port])
    assert result.exit_code == 1 and f"port {port}: Address already in use" in result.stderr


@pytest.mark.parametrize("arguments", [["serve", "--no-such-flag"], ["no-such-command"], ["inspect"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_version_says_its_own_and_pythons() -> None:
    assert re.match(r"neurontune .*, Python 3\.", CliRunner().invoke(app, ["version"]).output)


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and what it printed until it was ready."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    try:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("    -d "):
                break
        yield process, printed
    finally:
        process.kill()
        process.communicate()


def test_serve_prints_what_is_served_and_a_request_that_works() -> None:
    with started([*COMMAND, "serve", "--engine", "fake", "--port", "0"]) as (process, printed):
        assert "fake: no model" in printed and "security-critical (64, 32)" in printed
        found = re.search(r"curl -s (\S+) -H '(\S+): (\S+)' \\\n +-d '(.*)'", printed)
        assert found, printed
        url, header, level, body = found.groups()
        response = httpx.post(url, content=body, headers={header: level})
        assert response.status_code == 200 and response.headers["x-safety-level"] == "security-critical"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_serve_counts_connections_that_it_refuses() -> None:
    command = [*COMMAND, "serve", "--engine", "fake", "--port", "0", "--max-connections", "1"]
    with started(command) as (_, printed):
        url = re.search(r"http://(127\.0\.0\.1):(\d+)", printed)
        assert url, printed
        with socket.create_connection((url[1], int(url[2]))) as idle:
            metrics = httpx.get(f"{url[0]}/metrics").text
            assert idle.recv(12) == b"HTTP/1.1 429"
    counted = 'neurontune_admission_rejections_total{model_name="demo",reason="connections"} 1.0'
    assert counted in metrics


def test_an_idle_connection_is_kept_for_as_long_as_was_asked() -> None:
    command = [*COMMAND, "serve", "--engine", "fake", "--port", "0", "--keep-alive-seconds", "6"]
    with started(command) as (_, printed):
        url = re.search(r"http://(127\.0\.0\.1):(\d+)", printed)
        assert url, printed
        with socket.create_connection((url[1], int(url[2])), timeout=60) as connection:
            begun = time.monotonic()
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert time.monotonic() - begun >= 6  # uvicorn's own time is 5, the default here 120


def test_sighup_reloads_the_keys_of_a_running_server_and_a_broken_file_changes_nothing(
    tmp_path: Path,
) -> None:
    path = key_file(tmp_path / "keys.yaml", old={})
    command = [*COMMAND, "serve", "--engine", "fake", "--port", "0", "--keys", str(path)]
    audit = tmp_path / "audit.jsonl"
    command += ["--audit-log", str(audit)]
    with started(command) as (process, printed):
        found = re.search(r"^address +(\S+)", printed, re.MULTILINE)
        assert found and process.stderr is not None
        address = found[1]

        def hang_up(say: str) -> None:
            process.send_signal(signal.SIGHUP)
            assert process.stderr is not None
            assert any(say in line for line in process.stderr), "the server ended"

        def status(name: str) -> int:
            return httpx.get(f"{address}/v1/models", headers=bearer(name)).status_code

        assert (status("old"), status("new")) == (200, 401)
        path.write_text("keys: [")
        hang_up(f"old ones stay in force. Key file {path}, line 1")
        assert (status("old"), status("new")) == (200, 401)
        key_file(path, new={})
        hang_up("The keys were reloaded: 1.")
        assert (status("old"), status("new")) == (401, 200)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(10) == 0
        assert "Traceback" not in rest and "nt-the-key" not in rest
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["ok"] for line in lines if line["event"] == "reload"] == [False, True]
    denied = [1 + line["num_left_out"] for line in lines if line["event"] == "denied"]
    assert sum(denied) == 3 and lines[0]["status"] == 401
    assert "nt-the-key" not in audit.read_text()
