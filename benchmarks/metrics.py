"""What metrics cost: a server of the demo model that counts in one round and counts nothing in the next.

In a round, `--concurrency` clients each stream `--requests` answers; pairs of rounds, with metrics and
without, in shuffled order. It is one process, told by a signal which is next, because two processes of the
same code differ by several percent. Without metrics, their methods do nothing and the engine tallies
nothing. Printed: the median over the pairs of the ratio of tokens per second with to without (checked: at
least 0.98), and of the server's CPU seconds per token, which other work on the machine disturbs less.
With `--control` nothing is switched: how far from 1 the machine alone takes the ratio. Printed too: the CPU
time of counting one answer of 30 tokens, by itself, without a model. Then a server of the fake engine
finishes `--finished` answers, and `/metrics` is asked for (checked: half of the answers within 10 ms). Exit
code 1 if a check fails.

    python -m benchmarks.metrics
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import uvicorn

from benchmarks.serving import served
from benchmarks.two_versions import one_round, running
from benchmarks.wire import Connection, Raw
from server.engines.base import Output
from server.engines.fake import FakeEngine
from server.engines.tallying import Tally
from server.metrics import Metrics

HERE: Final = Path(__file__).resolve().parents[1]
PORT: Final = 8139
SIGNALS: Final = {"with": signal.SIGUSR1, "without": signal.SIGUSR2}
MIN_RATIO: Final = 0.98
MAX_SECONDS: Final = 0.010
NUM_CONNECTIONS: Final = 8
NUM_SCRAPES: Final = 100
NUM_TOKENS: Final = 30
NUM_COUNTED: Final = 4000


def main() -> None:
    arguments = _arguments()
    if arguments.serve:
        _serve(is_switched=not arguments.control)
        return
    counting = asyncio.run(_counting_seconds())
    rounds = asyncio.run(_rounds(arguments))
    with served(["--engine", "fake"]) as server:
        asyncio.run(_finish(server.port, arguments.finished))
        before = _cpu_seconds(server.process.pid)
        scrapes, size = asyncio.run(_scrapes(server.port, arguments.finished))
        cpu = (_cpu_seconds(server.process.pid) - before) / NUM_SCRAPES
    _report(arguments, rounds, counting, scrapes, size, cpu)


async def _counting_seconds() -> float:
    """Median CPU seconds that an answer of `NUM_TOKENS` tokens takes more with metrics than without."""
    metrics = Metrics(FakeEngine())
    answer = [
        Output(
            text="ab",
            token_ids=(1,),
            finish_reason="length" if number == NUM_TOKENS else None,
            num_prompt_tokens=20,
            num_completion_tokens=number,
        )
        for number in range(1, NUM_TOKENS + 1)
    ]

    async def outputs() -> AsyncGenerator[Output, None]:
        for output in answer:
            yield output

    async def seconds(read: AsyncGenerator[Output, None]) -> float:
        begun = time.process_time()
        async with aclosing(read):
            async for _ in read:
                pass
        return time.process_time() - begun

    return statistics.median(
        [
            await seconds(metrics.measured(outputs(), time.perf_counter(), "off")) - await seconds(outputs())
            for _ in range(NUM_COUNTED)
        ]
    )


async def _rounds(arguments: argparse.Namespace) -> list[dict[str, tuple[float, float]]]:
    """For each pair of rounds, with and without: tokens per second, and CPU seconds per token."""
    source = random.Random(arguments.seed)
    pairs: list[dict[str, tuple[float, float]]] = []
    command = [sys.executable, "-m", "benchmarks.metrics", "--serve", *["--control"] * arguments.control]
    async with running(command, PORT, HERE) as (client, process):
        ends = time.monotonic() + arguments.seconds
        while time.monotonic() < ends or len(pairs) <= arguments.warmup:
            pair = {}
            for name in source.sample(list(SIGNALS), len(SIGNALS)):
                process.send_signal(SIGNALS[name])
                before, begun = _cpu_seconds(process.pid), time.perf_counter()
                _, speed = await one_round(client, arguments.concurrency, arguments.requests)
                num_tokens = speed * (time.perf_counter() - begun)
                pair[name] = speed, (_cpu_seconds(process.pid) - before) / num_tokens
            pairs.append(pair)
    return pairs[arguments.warmup :]


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _serve(*, is_switched: bool) -> None:
    """The demo model on a fixed port until a signal ends it; others switch its metrics, if any does."""
    import server.app
    from modulation.demo import MASK_FILE, MODEL_DIR
    from server.engines.transformers import TransformersEngine
    from server.settings import Settings

    engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    app = server.app.create_app(Settings(default_level="off"), engine)
    counting = {owner: {name: vars(owner)[name] for name in names} for owner, names in NOTHING.items()}

    def switch(number: int, _frame: object) -> None:
        counts = not is_switched or number == SIGNALS["with"]
        for owner, attributes in (counting if counts else NOTHING).items():
            for name, value in attributes.items():
                setattr(owner, name, value)

    for number in SIGNALS.values():
        signal.signal(number, switch)
    uvicorn.run(app, port=PORT, log_level="warning")


def _nothing(*_: object) -> None:
    pass


def _unmeasured(
    _metrics: object, outputs: AsyncGenerator[Output, None], *_: object
) -> AsyncGenerator[Output, None]:
    return outputs


# What is in the place of what counts. The engine's tally times no step either.
NOTHING: Final[Mapping[type, Mapping[str, object]]] = {
    Metrics: {"granted": _nothing, "answered": _nothing, "measured": _unmeasured},
    Tally: {"step_begins": _nothing, "looked_up": _nothing, "modulated": _nothing, "is_sampled": False},
}


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
    counting_seconds: float,
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
            name: round(statistics.median(each[name][0] for each in rounds), 1) for name in SIGNALS
        },
        "throughput_ratio": round(ratio, 4),
        "throughput_quartiles": [round(ratios[len(ratios) * part // 4], 4) for part in (1, 3)],
        "cpu_ratio": round(statistics.median(each["with"][1] / each["without"][1] for each in rounds), 4),
        "counting_us": round(1e6 * counting_seconds, 1),
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
    parser.add_argument("--seconds", type=float, default=300, help="of rounds")
    parser.add_argument("--warmup", type=int, default=2, help="pairs of rounds that are not counted")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3, help="of each client in a round")
    parser.add_argument("--finished", type=int, default=10_000, help="answers before /metrics is asked for")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--control", action="store_true", help="count in every round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
