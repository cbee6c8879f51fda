"""What metrics cost: two servers of the demo model, one of which counts nothing, in alternating rounds.

In a round, `--concurrency` clients each stream `--requests` answers from one of the two while the other
idles; rounds alternate in shuffled order. The one without metrics runs with an object in their place whose
methods do nothing, and its engine tallies nothing. Printed: the median over the pairs of rounds of the
ratio of tokens per second with to without (checked: at least 0.98), and of the server's CPU seconds per
token, which other work on the machine disturbs less. Then a server of the fake engine finishes `--finished`
answers, and `/metrics` is asked for (checked: half of the answers within 10 ms). Exit code 1 if a check
fails.

    python -m benchmarks.metrics
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import uvicorn

from benchmarks.serving import served
from benchmarks.two_versions import Running, one_round, running
from benchmarks.wire import Connection, Raw
from server.engines.base import Engine, Output

HERE: Final = Path(__file__).resolve().parents[1]
PORTS: Final = {"with": 8139, "without": 8140}
MIN_RATIO: Final = 0.98
MAX_SECONDS: Final = 0.010
NUM_CONNECTIONS: Final = 8
NUM_SCRAPES: Final = 100


def main() -> None:
    arguments = _arguments()
    if arguments.serve is not None:
        _serve(arguments.serve)
        return
    rounds = asyncio.run(_rounds(arguments))
    with served(["--engine", "fake"]) as server:
        asyncio.run(_finish(server.port, arguments.finished))
        before = _cpu_seconds(server.process.pid)
        scrapes, size = asyncio.run(_scrapes(server.port, arguments.finished))
        cpu = (_cpu_seconds(server.process.pid) - before) / NUM_SCRAPES
    _report(arguments, rounds, scrapes, size, cpu)


async def _rounds(arguments: argparse.Namespace) -> list[dict[str, tuple[float, float]]]:
    """For each pair of rounds, by server: tokens per second, and CPU seconds per token."""
    source, pairs = random.Random(arguments.seed), []
    async with AsyncExitStack() as stack:
        servers: dict[str, Running] = {}
        for name, port in PORTS.items():
            command = [sys.executable, "-m", "benchmarks.metrics", "--serve", name]
            servers[name] = await stack.enter_async_context(running(command, port, HERE))
        ends = time.monotonic() + arguments.seconds
        while time.monotonic() < ends or len(pairs) <= arguments.warmup:
            pair = {}
            for name in source.sample(list(servers), len(servers)):
                client, process = servers[name]
                before, begun = _cpu_seconds(process.pid), time.perf_counter()
                _, speed = await one_round(client, arguments.concurrency, arguments.requests)
                num_tokens = speed * (time.perf_counter() - begun)
                pair[name] = speed, (_cpu_seconds(process.pid) - before) / num_tokens
            pairs.append(pair)
    return pairs[arguments.warmup :]


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _serve(name: str) -> None:
    """The demo model on a fixed port, with metrics or without, until a signal."""
    import server.app
    from modulation.demo import MASK_FILE, MODEL_DIR
    from server.engines.transformers import TransformersEngine
    from server.settings import Settings

    engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    if name == "without":
        server.app.Metrics = _no_metrics()  # type: ignore[misc]
        engine._manager.processors._tally = None
    app = server.app.create_app(Settings(default_level="off"), engine)
    uvicorn.run(app, port=PORTS[name], log_level="warning")


def _no_metrics() -> Any:
    from server.metrics import Metrics

    class NoMetrics(Metrics):
        def __init__(self, engine: Engine) -> None:
            super().__init__(engine)

        def granted(self, *_: object) -> None:
            pass

        def answered(self, *_: object) -> None:
            pass

        def measured(self, outputs: AsyncGenerator[Output, None], *_: object) -> AsyncGenerator[Output, None]:
            return outputs

    return NoMetrics


async def _finish(port: int, number: int) -> None:
    """Have so many answers finished, of one token each."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    raw = Raw("POST", "/v1/chat/completions", {}, json.dumps(body).encode())

    async def client(number: int) -> None:
        connection = Connection(port)
        for _ in range(number):
            assert (await connection.ask(raw)).status == 200
        connection.drop()

    share, rest = divmod(number, NUM_CONNECTIONS)
    await asyncio.gather(*(client(share + (each < rest)) for each in range(NUM_CONNECTIONS)))


async def _scrapes(port: int, num_finished: int) -> tuple[list[float], int]:
    """Seconds of each answer of `/metrics`, shortest first, and its bytes."""
    seconds = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as asking:
        for _ in range(NUM_SCRAPES):
            begun = time.perf_counter()
            answer = await asking.get("/metrics")
            seconds.append(time.perf_counter() - begun)
    assert f'finished_reason="length",model_name="demo"}} {float(num_finished)}' in answer.text, answer.text
    return sorted(seconds), len(answer.content)


def _report(
    arguments: argparse.Namespace,
    rounds: list[dict[str, tuple[float, float]]],
    scrapes: list[float],
    size: int,
    cpu_seconds: float,
) -> None:
    ratios = sorted(each["with"][0] / each["without"][0] for each in rounds)
    ratio, scrape = statistics.median(ratios), statistics.median(scrapes)
    checks = {
        f"throughput at least {MIN_RATIO}": ratio >= MIN_RATIO,
        f"/metrics within {1000 * MAX_SECONDS:g} ms": scrape <= MAX_SECONDS,
    }
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        "model": "demo",
        "load": f"{arguments.concurrency} clients, {arguments.requests} answers each in a round, greedy, off",
        "rounds": len(rounds),
        "seed": arguments.seed,
        "command": "python -m benchmarks.metrics " + " ".join(sys.argv[1:]),
        "tokens_per_second": {
            name: round(statistics.median(each[name][0] for each in rounds), 1) for name in PORTS
        },
        "throughput_ratio": round(ratio, 4),
        "throughput_quartiles": [round(ratios[len(ratios) * part // 4], 4) for part in (1, 3)],
        "cpu_ratio": round(statistics.median(each["with"][1] / each["without"][1] for each in rounds), 4),
        "finished": arguments.finished,
        "metrics_bytes": size,
        "metrics_ms": {
            "median": round(1000 * scrape, 2),
            "p90": round(1000 * scrapes[len(scrapes) * 9 // 10], 2),
            "longest": round(1000 * scrapes[-1], 2),
            "cpu": round(1000 * cpu_seconds, 2),
        },
        "checks": checks,
    }
    for name, value in result.items():
        sys.stdout.write(f"{name:<22} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(not all(checks.values()))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100, help="of rounds")
    parser.add_argument("--warmup", type=int, default=2, help="pairs of rounds that are not counted")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3, help="of each client in a round")
    parser.add_argument("--finished", type=int, default=10_000, help="answers before /metrics is asked for")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--serve", choices=PORTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
