"""SIGTERM and SIGKILL while a real engine answers many: what was taken on is answered or known lost."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import CHAT
from tests.server.test_cli import started

pytestmark = pytest.mark.anyio
NUM_STREAMS = 24
NUM_AT_ONCE = 6
QUESTIONS = ("How do I bake bread?", "How do I mend a bicycle?", "How do I plan a garden, step by step?")
LEVELS = ("off", "balanced", "security-critical", "7")


@contextmanager
def demo_server(audit: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The demo model's server with its audit log, and its address."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--audit-log", str(audit)]
    command += ["--max-num-seqs", str(NUM_AT_ONCE), "--log-level", "error"]
    with started(command) as (process, printed):
        found = re.search(r"^address +(\S+)", printed, re.MULTILINE)
        assert found, printed
        yield process, found[1]


class Streams:
    """Many streamed answers, and what has come of each so far."""

    def __init__(self, url: str) -> None:
        self.lines: list[list[str]] = [[] for _ in range(NUM_STREAMS)]
        self._url = url
        self._client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(NUM_STREAMS)]

    async def _read(self, number: int) -> None:
        message = {"role": "user", "content": f"{QUESTIONS[number % 3]} ({number})"}
        body = {"model": "demo", "messages": [message], "stream": True, "seed": number}
        level = {"X-Safety-Level": LEVELS[number % 4]}
        async with self._client.stream("POST", self._url + CHAT, json=body, headers=level) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                self.lines[number] += [line] if line else []

    async def until_taken_on(self) -> None:
        """Until the server has all of them, and has begun to answer."""
        while True:
            metrics = (await self._client.get(f"{self._url}/metrics")).text
            granted = re.findall(r"^neurontune_requests_total\{.*\} (\S+)$", metrics, re.MULTILINE)
            if sum(map(float, granted)) == NUM_STREAMS and any(self.lines):
                break
        assert self.num_done < NUM_STREAMS, "the load of this test is too small"

    @property
    def num_done(self) -> int:
        return sum(lines[-1:] == ["data: [DONE]"] for lines in self.lines)

    async def ended(self) -> list[BaseException]:
        """What has gone wrong with them."""
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        return [each for each in results if each is not None]


def audited(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_sigterm_under_load_ends_every_answer_that_was_taken_on(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with demo_server(audit) as (process, url):
        streams = Streams(url)
        await streams.until_taken_on()
        process.send_signal(signal.SIGTERM)
        assert await streams.ended() == [] and streams.num_done == NUM_STREAMS
        assert await asyncio.to_thread(process.wait, 30) == 0
    lines = audited(audit)
    assert len(lines) == NUM_STREAMS
    assert {line["finish_reason"] for line in lines} <= {"stop", "length"}


async def test_after_sigkill_under_load_the_next_server_serves_and_the_audit_log_is_whole(
    tmp_path: Path,
) -> None:
    audit = tmp_path / "audit.jsonl"
    with demo_server(audit) as (process, url):
        streams = Streams(url)
        await streams.until_taken_on()
        process.kill()
        failures = await streams.ended()
        assert len(failures) == NUM_STREAMS - streams.num_done > 0
        assert all(isinstance(each, httpx.TransportError) for each in failures)
    before = len(audited(audit))
    with demo_server(audit) as (_, url):
        message = {"role": "user", "content": QUESTIONS[0]}
        answer = await asyncio.to_thread(
            httpx.post, url + CHAT, json={"model": "demo", "messages": [message]}, timeout=60
        )
        assert answer.status_code == 200
        while len(audited(audit)) == before:
            await asyncio.sleep(0.01)
    assert audited(audit)[-1]["request_id"] == answer.headers["x-request-id"]
