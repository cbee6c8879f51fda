"""A process whose engine fails: what its clients and its supervisor see."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from modulation.demo import MODEL_DIR
from server.process import EngineEnd

ROOT = Path(__file__).parent.parent
# The server as `neurontune serve` makes it, but a step raises while the file given exists.
SCRIPT = """
import sys
from pathlib import Path

from modulation.demo import MASK_FILE, MODEL_DIR
from server.app import create_app
from server.draining import Drain
from server.engines.transformers import TransformersEngine
from server.process import EngineEnd, bind, run
from server.settings import Settings

flag, end = Path(sys.argv[1]), EngineEnd()

def fail(*_):
    if flag.exists():
        if flag.read_text() == "once":
            flag.unlink()
        raise RuntimeError("the fault that was asked for")

engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo", on_fatal=end)
engine._model.register_forward_pre_hook(fail)
with bind("127.0.0.1", 0) as listener:
    port = listener.getsockname()[1]
    drain = Drain()
    run(create_app(Settings(), engine, drain), engine, listener, "warning", f"port {port}", drain, end)
"""
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 2.0}
END = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
# It does not end by itself before the fault is asked for.
ENDLESS = {**BODY, "stream": True, "logit_bias": {str(END): -100}}


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / "fail"


@pytest.fixture
def process(flag: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, str(flag)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


@pytest.mark.anyio
async def test_a_failed_engine_comes_back_by_itself_and_after_three_in_a_row_the_process_exits_with_1(
    process: subprocess.Popen[str], flag: Path
) -> None:
    assert process.stdout is not None
    address = f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        assert (await client.get("/ready")).status_code == 200
        events: list[str] = []
        async with client.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
            assert stream.status_code == 200
            async for line in stream.aiter_lines():
                events += [line] if line else []
                if len(events) == 2:
                    flag.write_text("once")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"

        deadline = time.monotonic() + 30
        while (await client.get("/ready")).status_code != 200:
            assert time.monotonic() < deadline, "it did not come back"
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
        flag.write_text("always")
        refused = await client.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert process.wait(30) == 1
    assert process.stderr is not None
    log = process.stderr.read()
    [line] = re.findall(r".*The server ends.*", log)
    assert "the engine has failed 3 times in a row" in line and "the fault that was asked for" in line


@pytest.mark.anyio
async def test_an_end_that_came_before_the_server_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    class Server:
        should_exit = False

    end, server = EngineEnd(), Server()
    end("it broke")
    end.attach(server)  # type: ignore[arg-type]
    assert server.should_exit and "The server ends: it broke." in caplog.text
