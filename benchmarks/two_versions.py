"""Whether a change made the server slower: two checkouts, both served over HTTP, in one run.

Rounds of the two alternate in shuffled order. In a round, `--concurrency` clients each stream `--requests`
answers; the other server idles. Both serve at `off`, so that they give the same answers whatever mask each
ships with. Prints the medians of time to first token and of tokens per second, and
the ratio of this checkout to the other one.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.two_versions --other /tmp/before
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx

QUESTIONS = ("bake bread", "mend a bicycle", "write a letter", "plan a garden", "paint a fence", "water ivy")
READY_SECONDS = 120.0

Running = tuple[httpx.AsyncClient, subprocess.Popen[bytes]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="Checkout to compare with.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="Rounds that are not counted.")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3, help="Of each client in a round.")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(_run(parser.parse_args()))


async def _run(arguments: argparse.Namespace) -> None:
    source = random.Random(arguments.seed)
    here = Path(__file__).resolve().parents[1]
    async with AsyncExitStack() as stack:
        clients = {
            name: (await stack.enter_async_context(_served(checkout, port)))[0]
            for name, checkout, port in (("this", here, 8137), ("other", arguments.other.resolve(), 8138))
        }
        firsts: dict[str, list[float]] = {name: [] for name in clients}
        speeds: dict[str, list[float]] = {name: [] for name in clients}
        for number in range(-arguments.warmup, arguments.rounds):
            for name in source.sample(list(clients), len(clients)):
                first, speed = await one_round(clients[name], arguments.concurrency, arguments.requests)
                if number >= 0:
                    firsts[name].append(first)
                    speeds[name].append(speed)
    for name in clients:
        sys.stdout.write(
            f"{name:6} first token {1000 * statistics.median(firsts[name]):7.1f} ms   "
            f"{statistics.median(speeds[name]):7.1f} tokens/s\n"
        )
    first = statistics.median(b / a for a, b in zip(firsts["this"], firsts["other"], strict=True))
    speed = statistics.median(a / b for a, b in zip(speeds["this"], speeds["other"], strict=True))
    sys.stdout.write(
        f"ratio  first token {first:.3f}   tokens/s {speed:.3f}   (1: alike, above: this one is faster)\n"
    )


def _served(checkout: Path, port: int) -> AbstractAsyncContextManager[Running]:
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    command += ["--log-level", "warning", "--default-level", "off"]
    return running(command, port, checkout)


@asynccontextmanager
async def running(command: Sequence[str], port: int, checkout: Path) -> AsyncIterator[Running]:
    """A server that `command` starts in `checkout`, once it is ready on `port`: a client, and the process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            try:
                await _ready(client, process)
                yield client, process
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


async def _ready(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("A server did not become ready.")


async def one_round(client: httpx.AsyncClient, concurrency: int, requests: int) -> tuple[float, float]:
    """Median seconds to the first token, and tokens per second of all together."""
    begin = time.perf_counter()
    answers = await asyncio.gather(*(_ask_in_turn(client, n, requests) for n in range(concurrency)))
    seconds = time.perf_counter() - begin
    measured = [each for answer in answers for each in answer]
    tokens = sum(number for _, number in measured)
    return statistics.median(first for first, _ in measured), tokens / seconds


async def _ask_in_turn(client: httpx.AsyncClient, number: int, requests: int) -> list[tuple[float, int]]:
    return [await _ask(client, QUESTIONS[(number + turn) % len(QUESTIONS)]) for turn in range(requests)]


async def _ask(client: httpx.AsyncClient, question: str) -> tuple[float, int]:
    body = {
        "model": "demo",
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": f"How do I {question}?"}],
    }
    begin, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - begin
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    assert first is not None and tokens
    return first, tokens


if __name__ == "__main__":
    main()
