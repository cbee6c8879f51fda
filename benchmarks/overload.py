"""Ten times as many clients as the server runs requests at once: who is refused, how soon, and what is left.

A real server on loopback and clients in several processes, each with a connection that it keeps. Whoever gets
429 tries again after a pause. Checked: no 5xx and nothing but 200 and 429; half of the 429 within 50 ms, each
with Retry-After; every token of an accepted answer arrived (as many as `usage` counts); afterwards nothing
runs or waits and the resident memory is where it was after the warm-up, within 5 %. Exit code 1 if a check
fails.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.serving import served
from benchmarks.wire import Connection, Raw, choices, events

LEVELS: Final = ("off", "balanced", "security-critical", "utility-priority", "7")
PROMPTS: Final = ("How do I bake bread?", "How do I mend a bicycle?", "How do I plan a garden, step by step?")
MAX_REFUSAL_SECONDS: Final = 0.050
MAX_MEMORY_RATIO: Final = 1.05


@dataclass
class Seen:
    """What the clients of one process have seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    refusal_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    flags = ["--max-num-seqs", str(arguments.concurrency), "--max-num-waiting", str(arguments.waiting)]
    with served(flags) as server:
        _load(server.port, arguments, arguments.warmup)
        before = server.settled()
        seen = _load(server.port, arguments, arguments.seconds)
        after = server.settled()
    _report(arguments, seen, before, after)


def _load(port: int, arguments: argparse.Namespace, seconds: float) -> Seen:
    """What all clients have seen in that time."""
    num_clients, total = 10 * arguments.concurrency, Seen()
    shares = [num_clients // arguments.processes] * arguments.processes
    shares[0] += num_clients - sum(shares)
    work = [(port, share, seconds, arguments, number) for number, share in enumerate(shares)]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for seen in pool.starmap(_clients, work):
            total.statuses += seen.statuses
            total.refusal_seconds += seen.refusal_seconds
            total.num_tokens += seen.num_tokens
            total.faults += seen.faults
    return total


def _clients(port: int, number: int, seconds: float, arguments: argparse.Namespace, process: int) -> Seen:
    seen = Seen()

    async def run() -> None:
        ends = time.monotonic() + seconds
        source = random.Random(arguments.seed * 1000 + process)
        seeds = [source.random() for _ in range(number)]
        await asyncio.gather(*(_client(port, random.Random(seed), ends, arguments, seen) for seed in seeds))

    asyncio.run(run())
    return seen


async def _client(
    port: int, source: random.Random, ends: float, arguments: argparse.Namespace, seen: Seen
) -> None:
    connection = Connection(port)
    try:
        await connection.open()
        while time.monotonic() < ends:
            status = await _ask(connection, source, arguments.tokens, seen)
            seen.statuses[status] += 1
            if status == 429:
                await asyncio.sleep(arguments.pause * source.uniform(0.5, 1.5))
    except (OSError, EOFError) as error:
        seen.faults.append(f"connection: {error!r}")
    finally:
        connection.drop()


async def _ask(connection: Connection, source: random.Random, num_tokens: int, seen: Seen) -> int:
    stream = source.random() < 0.5
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": source.choice(PROMPTS)}],
        "safety_level": source.choice(LEVELS),
        "max_tokens": source.randint(1, num_tokens),
        "logprobs": True,  # one entry for each token, also for those without text
        **options,
    }
    raw = Raw("POST", "/v1/chat/completions", body=json.dumps(body).encode())
    asked = time.perf_counter()
    await connection.send(raw.to_bytes())
    head = await connection.head()
    answered = time.perf_counter() - asked
    answer = await connection.body(head)
    if head.status == 429:
        seen.refusal_seconds.append(answered)
        if not re.fullmatch(r"[1-9]\d*", head.headers.get("retry-after", "")):
            seen.faults.append(f"429 without Retry-After: {head.headers}")
    elif head.status == 200:
        seen.num_tokens += _tokens(answer, stream, seen)
    else:
        seen.faults.append(f"{head.status}: {answer[:200]!r}")
    return head.status


def _tokens(answer: bytes, stream: bool, seen: Seen) -> int:
    """How many tokens have arrived; a fault if `usage` counts others or the end is missing."""
    parts, is_done = events(answer) if stream else ([json.loads(answer)], True)
    if not is_done:
        seen.faults.append(f"a stream ended early: {answer[-200:]!r}")
        return 0
    arrived = sum(len(each.tokens) for each in choices(parts).values())
    if arrived != (counted := parts[-1]["usage"]["completion_tokens"]):
        seen.faults.append(f"{arrived} tokens arrived, usage counts {counted}")
    return arrived


def _report(
    arguments: argparse.Namespace, seen: Seen, before: dict[str, float], after: dict[str, float]
) -> None:
    refused = sorted(seen.refusal_seconds) or [0.0]
    seconds = {
        name: round(refused[min(len(refused) - 1, int(share * len(refused)))], 4)
        for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0))
    }
    seconds["median"] = round(statistics.median(refused), 4)
    ratio = after["memory_mb"] / before["memory_mb"]
    checks = {
        "only 200 and 429": set(seen.statuses) == {200, 429},
        "no fault": not seen.faults,
        "half of the 429 within 50 ms": seconds["median"] <= MAX_REFUSAL_SECONDS,
        "memory within 5 %": ratio <= MAX_MEMORY_RATIO,
        "nothing runs or waits": not (after["running"] or after["waiting"]),
    }
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        "load": f"{10 * arguments.concurrency} clients in {arguments.processes} processes for "
        f"{arguments.seconds:g} s; {arguments.concurrency} run, {arguments.waiting} wait; up to "
        f"{arguments.tokens} tokens; {arguments.pause:g} s of pause after 429",
        "seed": arguments.seed,
        "command": "python -m benchmarks.overload " + " ".join(sys.argv[1:]),
        "statuses": dict(sorted(seen.statuses.items())),
        "tokens": seen.num_tokens,
        "refusal_seconds": seconds,
        "memory_mb": {"before": round(before["memory_mb"], 1), "after": round(after["memory_mb"], 1)},
        "memory_ratio": round(ratio, 4),
        "faults": seen.faults[:5],
        "checks": checks,
    }
    for name, value in result.items():
        _print(f"{name:<16} {value}")
    _print(json.dumps(result))
    sys.exit(not all(checks.values()))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--concurrency", type=int, default=8, help="answers at once; ten times as many clients"
    )
    parser.add_argument("--waiting", type=int, default=8, help="answers that may wait")
    parser.add_argument("--processes", type=int, default=4, help="of clients")
    parser.add_argument("--seconds", type=float, default=120, help="of load")
    parser.add_argument(
        "--warmup", type=float, default=10, help="seconds of the same load before, not counted"
    )
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument(
        "--pause", type=float, default=0.5, help="seconds, on average, between 429 and next try"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is asked")
    return parser.parse_args()


if __name__ == "__main__":
    main()
