"""How a server on vLLM ends: by the death of one of vLLM's processes, by Ctrl-C, and by SIGTERM."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from tests.server.conftest import CHAT, error_of
from tests.vllm.serving import END_SECONDS, served, starting

END_TOKEN = "2"
# As long as the context: the end token is never drawn.
LONG: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "logit_bias": {END_TOKEN: -100},
}


@contextmanager
def running(url: str, **fields: Any) -> Iterator[Iterator[Any]]:
    """What a streamed answer holds that has begun: the data of its events."""
    body = {**LONG, "stream": True, **fields}
    with httpx.stream("POST", url + CHAT, json=body, timeout=END_SECONDS) as response:
        assert response.status_code == 200
        events = (_data(line) for line in response.iter_lines() if line)
        while not next(events)["choices"][0]["delta"].get("content"):
            pass
        yield events


def _data(line: str) -> Any:
    text = line.removeprefix("data: ")
    return text if text == "[DONE]" else json.loads(text)


class Waiting:
    """A request that waits for its turn, asked on a thread of its own, and how it was answered."""

    def __init__(self, url: str) -> None:
        self._thread = threading.Thread(target=self._ask, args=(url,))
        self._thread.start()
        with httpx.Client() as client:
            while 'num_requests_waiting{model_name="demo"} 1.0' not in client.get(f"{url}/metrics").text:
                assert self._thread.is_alive(), "it did not wait"

    def _ask(self, url: str) -> None:
        self._found = httpx.post(url + CHAT, json=LONG, timeout=END_SECONDS)

    def answered(self) -> httpx.Response:
        self._thread.join()
        return self._found


def no_longer_ready(url: str) -> bool:
    """Whether `/ready` says so, or nobody is there to say it."""
    try:
        answer = httpx.get(f"{url}/ready", timeout=END_SECONDS)
    except httpx.TransportError:
        return True
    error_of(answer, 503, "engine_unavailable")
    return True


def until_gone(processes: list[psutil.Process]) -> None:
    """Wait for all of them to end; fail when they do not in time."""
    deadline = time.monotonic() + END_SECONDS
    while left := [each for each in processes if not has_ended(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    """One that nobody has waited for has ended too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def group(leader: int) -> list[psutil.Process]:
    """Whoever is in the leader's process group."""
    found = []
    for each in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getpgid(each.pid) == leader:
                found.append(each)
    return found


def is_vllm(process: psutil.Process) -> bool:
    """Whether it is a process that vLLM has started, whatever it is called by now."""
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "VLLM::" in command or "spawn_main" in command


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [
        pytest.param(1, "EngineCore", id="the engine core"),
        pytest.param(2, "Worker_TP1", id="one of two ranks"),
    ],
)
def test_when_a_process_of_vllm_is_killed_every_request_gets_an_error_and_the_server_exits_with_1(
    ranks: int, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(ranks)))
    flags = ("--tensor-parallel-size", str(ranks), "--max-num-seqs", "1")
    with served(tmp_path, *flags) as server:
        processes, vllm, [process] = server.descendants(), server.named("VLLM::"), server.named(victim)
        with running(server.url) as events:
            for each in vllm:
                each.suspend()  # so that the answer cannot end before the process
            waiting = Waiting(server.url)
            process.kill()
            for each in vllm:
                if each != process:
                    each.resume()
            *_, last = events
        assert last["error"]["code"] == "engine_unavailable", last
        assert "vLLM's processes has died" in last["error"]["message"]
        assert no_longer_ready(server.url)
        error = error_of(waiting.answered(), 503, "engine_unavailable")
        assert "vLLM's processes has died" in error["message"]
        assert server.process.wait(END_SECONDS) == 1
        until_gone(processes)
        assert server.log.read_text().count("The server ends: one of vLLM's processes has died.") == 1


@pytest.mark.parametrize("how", ["SIGINT to the process group, as Ctrl-C", "SIGTERM to the server alone"])
def test_a_signal_lets_what_runs_finish_and_leaves_no_process(how: str, tmp_path: Path) -> None:
    """vLLM's processes are in the group too: if they ended by the signal, nothing could finish."""
    with served(tmp_path) as server:
        processes = server.descendants()
        with running(server.url, max_tokens=100) as events:
            if how.startswith("SIGINT"):
                os.killpg(server.process.pid, signal.SIGINT)
            else:
                server.process.send_signal(signal.SIGTERM)
            *_, finish, done = events
            assert done == "[DONE]" and finish["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(END_SECONDS) == 0
        until_gone(processes)
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("num_processes", [0, 1, 3], ids="{} of vLLM's processes are there".format)
@pytest.mark.parametrize(
    "how",
    ["SIGINT to the process group, as Ctrl-C", "SIGINT twice", "SIGTERM to the server alone"],
)
def test_a_signal_while_vllm_loads_ends_it_with_all_of_its_processes(
    how: str, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with starting(tmp_path, "--tensor-parallel-size", "2") as (process, log):
        server = psutil.Process(process.pid)
        while "vllm" not in log.read_text():  # its modules are being imported, or more
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        children: list[psutil.Process] = []
        while len(children) < num_processes:
            children = [each for each in server.children(recursive=True) if is_vllm(each)]
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        if how == "SIGTERM to the server alone":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        if how == "SIGINT twice":
            time.sleep(0.2)  # within the end, which takes longer once there are processes
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        try:
            assert process.wait(END_SECONDS) != 0
            until_gone([*children, *group(process.pid)])
            assert "Traceback" not in log.read_text()
        except BaseException as error:
            error.add_note(log.read_text()[-3000:])
            raise
