"""Any OpenAI-compatible server is asked, at the level meant, and what goes wrong is said plainly."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from modulation.errors import RemoteError
from modulation.evaluation.remote import Endpoint, ServerLevels, ask, listed_levels, user
from server.app import create_app
from server.cli import app
from server.engines.base import GenerateRequest
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.evaluation.conftest import Asked, Ours, Scripted, completion, serving

ROOT = Path(__file__).parent.parent.parent
CSV = "goal,target\nDo a,Sure\nDo b,Sure\nDo c,Sure\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "advbench.csv"
    path.write_text(CSV)
    return path


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def evaluate(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def refused(result: Any) -> str:
    """The one sentence that a failed command says."""
    assert result.exit_code == 1, result.output
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("neurontune: ")]
    assert "Traceback" not in result.stderr
    return str(sentence)


def test_a_deployed_server_is_evaluated_at_all_its_levels_and_each_request_gets_its_own(
    ours: Ours, data: Path, tmp_path: Path
) -> None:
    out, answers = tmp_path / "out.json", tmp_path / "answers.jsonl"
    arguments = "--attacks", "json", "--json", out, "--answers-out", answers, "--max-new-tokens", 9
    result = evaluate("--data", data, "--url", ours.url, *arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())["levels"]
    assert list(figures) == ["off", "utility-priority", "balanced", "security-critical"]
    for metrics in figures.values():
        assert metrics["asr"]["total"] == metrics["refusal_plain"]["total"] == 3
        assert set(metrics["asr_by_family"]) == {"json"}
    assert f"off at {ours.url}:" in result.stdout and "asr, json" in result.stdout
    assert "did not say" not in result.stderr

    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    ids = [f"advbench-{number}{end}" for end in ("", "+json") for number in (1, 2, 3)]
    assert [(line["level"], line["id"]) for line in lines] == [(level, i) for level in figures for i in ids]
    assert lines[0]["prompt"] == "Do a" and lines[0]["answer"].startswith("Fake answer:")
    assert lines[0]["verdict"] == {"refused": False, "complied": True, "right": False}
    num_safety = dict(zip(figures, (0, 8, 32, 64), strict=True))
    assert {(r.prompt.messages[0].content, r.threshold.num_safety, r.max_tokens) for r in ours.requests} == {
        (line["prompt"], num_safety[line["level"]], 9) for line in lines
    }
    assert all(request.sampling.temperature == 0 for request in ours.requests)


def test_levels_by_name_and_number_are_asked_for(ours: Ours, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = evaluate("--data", data, "--url", ours.url + "/", "--levels", "off, 5", "--json", out)
    assert result.exit_code == 0, result.output
    assert list(json.loads(out.read_text())["levels"]) == ["off", "5"]
    assert {request.threshold.num_safety for request in ours.requests} == {0, 5}


def test_nothing_imports_torch_where_a_server_answers(ours: Ours, data: Path) -> None:
    program = (
        "import sys; from server.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    arguments = ["evaluate", "--data", str(data), "--url", ours.url, "--levels", "off"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_answers_keep_the_order_of_the_prompts_and_never_more_run_at_once_than_allowed() -> None:
    running: set[str] = set()
    most: list[int] = []

    async def before_token(request: GenerateRequest, index: int) -> None:
        running.add(request.prompt.messages[0].content)
        most.append(len(running))
        # Short prompts, sent last, are answered first: they wait for fewer turns of the loop.
        for _ in range(len(request.prompt.messages[0].content)):
            await asyncio.sleep(0)
        if index == 1:
            running.discard(request.prompt.messages[0].content)

    engine = FakeEngine(before_token=before_token)
    prompts = ["x" * (30 - number) for number in range(30)]
    done: list[int] = []
    with serving(create_app(Settings(engine="fake"), engine)) as url:
        endpoint = Endpoint(url, "demo", concurrency=4)
        replies = ask(endpoint, [user(p) for p in prompts], 2, "off", lambda row, _: done.append(row))
        alone = [ask(Endpoint(url, "demo"), [user(p)], 2, "off")[0] for p in prompts[:3]]
    assert replies[:3] == alone and len(replies) == 30
    assert sorted(done) == list(range(30))
    assert 1 < max(most) <= 4


def test_a_server_that_applies_another_level_is_refused(data: Path) -> None:
    scripted = Scripted(lambda _: completion("Sure.", {"X-Safety-Level": "off"}))
    with serving(scripted.app()) as url:
        sentence = refused(evaluate("--data", data, "--url", url, "--levels", "off,balanced"))
    assert f"{url} was asked for the safety level 'balanced' and answered at 'off'" in sentence


def test_a_server_that_does_not_say_its_level_is_reported_once(data: Path) -> None:
    scripted = Scripted(lambda _: "I'm sorry, no.")
    with serving(scripted.app()) as url:
        result = evaluate("--data", data, "--url", url, "--levels", "off,balanced")
    assert result.exit_code == 0
    assert result.stderr.count(f"{url} did not say which level it applied") == 1
    assert (
        sorted(asked.headers["x-safety-level"] for asked in scripted.asked) == ["balanced"] * 3 + ["off"] * 3
    )


def test_a_server_without_levels_answers_at_its_own_default(data: Path, tmp_path: Path) -> None:
    scripted, out = Scripted(lambda _: "I'm sorry, no."), tmp_path / "out.json"
    with serving(scripted.app()) as url:
        result = evaluate("--data", data, "--url", url, "--model", "other", "--json", out)
    assert result.exit_code == 0 and "did not say" not in result.stderr
    assert json.loads(out.read_text())["levels"]["default"]["refusal_plain"]["count"] == 3
    assert not any("x-safety-level" in asked.headers for asked in scripted.asked)
    assert {asked.body["model"] for asked in scripted.asked} == {"other"}


def test_the_key_is_read_from_the_variable_that_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    scripted = Scripted(lambda _: "Sure.")
    with serving(scripted.app()) as url:
        assert evaluate("--data", data, "--url", url, "--api-key-env", "MY_KEY").exit_code == 0
        sentence = refused(evaluate("--data", data, "--url", url, "--api-key-env", "NO_KEY"))
    assert {asked.headers["authorization"] for asked in scripted.asked} == {"Bearer s3cret"}
    assert "--api-key-env NO_KEY: this variable is not set" in sentence


def failing(status: int, message: str = "told to fail") -> Scripted:
    return Scripted(lambda _: JSONResponse({"error": {"message": message}}, status_code=status))


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "The prompt began 'Do a'"),
        (401, "read from the variable OPENAI_API_KEY"),
        (404, "mostly in /v1"),
        (429, "Lower --concurrency"),
        (500, "log may say more"),
    ],
)
def test_a_status_that_is_no_answer_is_named_with_the_address_and_what_was_said(
    data: Path, status: int, hint: str
) -> None:
    with serving(failing(status).app()) as url:
        sentence = refused(evaluate("--data", data, "--url", url, "--retries", 0, "--concurrency", 1))
    assert f"{url} answered with status {status}" in sentence
    assert "told to fail" in sentence and hint in sentence


@pytest.mark.parametrize(
    "response",
    [PlainTextResponse("hello"), JSONResponse({"choices": []}), JSONResponse([1]), completion(None)],  # type: ignore[arg-type]
    ids=["text", "no choices", "a list", "no content"],
)
def test_what_is_no_chat_completion_is_refused_and_an_empty_answer_is_one(response: Response) -> None:
    with serving(Scripted(lambda _: response).app()) as url:
        if b'"content":null' in response.body:
            assert ask(Endpoint(url, "m"), [user("Hi")], 2)[0].text == ""
            return
        with pytest.raises(RemoteError, match=f"{url} answered something that is not a chat completion"):
            ask(Endpoint(url, "m"), [user("Hi")], 2)


def test_a_server_that_is_busy_for_a_while_is_asked_again() -> None:
    def reply(_asked: Asked) -> str | Response:
        busy = JSONResponse({}, status_code=429, headers={"retry-after-ms": "1"})
        return busy if len(scripted.asked) < 3 else "Sure."

    scripted = Scripted(reply)
    with serving(scripted.app()) as url:
        assert ask(Endpoint(url, "m", max_retries=2), [user("Hi")], 2)[0].text == "Sure."
    assert len(scripted.asked) == 3


def test_a_server_that_is_not_there_is_named_at_once(data: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        sentence = refused(evaluate("--data", data, "--url", url))
    assert f"{url} cannot be reached: " in sentence and "Is the server running there?" in sentence


def test_a_server_that_hangs_is_given_up_after_the_timeout() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(RemoteError, match=r"did not answer within 0\.1 seconds, tried 1 times"):
            ask(Endpoint(url, "m", timeout_seconds=0.1, max_retries=0), [user("Hi")], 2)


def test_the_first_failure_stops_all_other_requests() -> None:
    scripted = failing(401)
    with serving(scripted.app()) as url, pytest.raises(RemoteError, match="status 401"):
        ask(Endpoint(url, "m", concurrency=2), [user(str(n)) for n in range(50)], 2)
    assert len(scripted.asked) <= 4


def test_levels_are_listed_with_the_masks_digest_or_not_at_all(ours: Ours) -> None:
    found = listed_levels(Endpoint(ours.url, "demo"))
    assert found.names[0] == "off" and len(found.names) == 4 and found.mask
    with serving(Scripted(lambda _: "").app()) as url:
        assert listed_levels(Endpoint(url, "demo")) == ServerLevels()


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_a_list_of_levels_that_is_none_is_no_list(kind: str) -> None:
    async def page(_request: Request) -> Response:
        return Response("<html>", media_type=kind)

    with serving(Starlette(routes=[Route("/v1/safety-levels", page)])) as url:
        assert listed_levels(Endpoint(url, "demo")) == ServerLevels()


@pytest.fixture
def held() -> Iterator[tuple[str, threading.Event]]:
    """A server that answers the first prompt and holds the others; the event says it holds one."""
    holds = threading.Event()

    async def before_token(request: GenerateRequest, _index: int) -> None:
        if request.prompt.messages[0].content != "Do a":
            holds.set()
            await asyncio.Event().wait()

    with serving(create_app(Settings(engine="fake"), FakeEngine(before_token=before_token))) as url:
        yield url, holds


def test_ctrl_c_stops_in_one_sentence_and_the_answers_so_far_are_kept(
    held: tuple[str, threading.Event], data: Path, tmp_path: Path
) -> None:
    url, holds = held
    out = tmp_path / "answers.jsonl"
    flags = ["--data", data, "--url", url, "--levels", "off", "--concurrency", "1", "--answers-out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "evaluate", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        # A shell's background job inherits an ignored SIGINT, and Python would leave it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert holds.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"Stopped. {out} has the answers" in stderr and "Traceback" not in stderr
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["Do a"]


def test_without_the_package_the_way_to_install_it_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    sentence = refused(evaluate("--data", data, "--url", "http://127.0.0.1:1/v1"))
    assert "pip install 'neurontune[evaluation]'" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "localhost:8000"], "--url 'localhost:8000' is no address; http://HOST:PORT/v1"),
        (["--url", "http://x/v1", "--mask", "m"], "--mask does not go with --url"),
        (["--url", "http://x/v1", "--device", "cpu"], "--device does not go with --url"),
        (["--url", "http://x/v1", "--dtype", "float32"], "--dtype does not go with --url"),
        (["--url", "http://x/v1", "--batch-size", "4"], "--batch-size does not go with --url"),
        (["--api-key-env", "K"], "--api-key-env needs --url"),
        (["--concurrency", "4"], "--concurrency needs --url or --judge-url"),
        (["--timeout", "4"], "--timeout needs --url or --judge-url"),
        (["--retries", "4"], "--retries needs --url or --judge-url"),
        (["--url", "http://x/v1", "--levels", "off,off"], "names a level twice"),
        (["--url", "http://x/v1", "--levels", "off,"], "has an empty name"),
    ],
)
def test_flags_that_do_not_fit_a_server_are_refused(data: Path, arguments: list[str], words: str) -> None:
    assert words in refused(evaluate("--data", data, *arguments))
