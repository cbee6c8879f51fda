"""Twenty minutes of a real server among clients that leave, stall, run out of time and ask what is wrong.

A server process on loopback with the demo model, keys and an audit log; clients in several processes; an
operator who swaps masks every 10 s, tries bad ones, and has the key file read again. Most requests are right
and must be answered: complete, counted rightly, and if greedy with the very tokens that the same request got
alone, at the start, under the mask that the answer names. Whatever is wrong must get its documented error.
Everything else counts as lost. Exit code 1 if anything is lost, or if something is left at the end: requests,
memory, missing lines of the audit log, an exit code other than 0.
"""

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.queues
import os
import platform
import queue
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.serving import Served, served, value_of
from benchmarks.soaking.asked import MAX_BODY_BYTES, MAX_MESSAGES, ROOT, bearer
from benchmarks.soaking.auditing import deviations, endings
from benchmarks.soaking.clients import Client, references_alone
from benchmarks.soaking.judging import Names, Reference, References, differ
from benchmarks.soaking.operator import FIRST, Folder, Operator, records
from benchmarks.soaking.processes import Share, run_clients
from benchmarks.soaking.tally import Tally
from benchmarks.wire import Connection, Raw

MAX_MEMORY_RATIO: Final = 1.05
READ_TIMEOUT_SECONDS: Final = 5
PROGRESS_SECONDS: Final = 30.0
NUM_SHOWN: Final = 20


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="neurontune-soak-") as name:
        folder = Folder(Path(name))
        digests = folder.fill()
        with folder.log.open("wb") as log, served(_flags(folder, arguments), bearer(ROOT), log) as server:
            operator = Operator(server.port, server.process.pid, folder, digests, arguments.every)
            soak = Soak(arguments, server, operator)
            told = asyncio.run(soak.run())
            told["exit_code"] = server.stop()
        _report(arguments, soak, told, folder)


def _flags(folder: Folder, arguments: argparse.Namespace) -> list[str]:
    flags = {
        "mask": folder.masks / FIRST,
        "keys": folder.keys,
        "audit-log": folder.audit,
        "max-num-seqs": arguments.concurrency,
        "max-num-waiting": arguments.waiting,
        "max-body-bytes": MAX_BODY_BYTES,
        "max-messages": MAX_MESSAGES,
        "read-timeout-seconds": READ_TIMEOUT_SECONDS,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@dataclass
class Soak:
    """A soak under way: what its parties have seen so far."""

    arguments: argparse.Namespace
    server: Served
    operator: Operator

    def __post_init__(self) -> None:
        self.tally, self.warmup, self.operator_warmup = Tally(), Tally(), Tally()
        self._began = time.monotonic()

    async def run(self) -> dict[str, Any]:
        """References, warm-up, load; what the server says before and after the load."""
        references = await self._references()
        await self._load("warm", self.arguments.warmup, references)
        self.warmup, self.tally = self.tally, Tally()
        self.operator_warmup, self.operator.tally = self.operator.tally, Tally()
        before = await asyncio.to_thread(self.server.settled)
        await self._load("soak", self.arguments.seconds, references)
        after = await asyncio.to_thread(self.server.settled)
        ready = await Connection(self.server.port).ask(Raw("GET", "/ready"))
        lost = value_of(await asyncio.to_thread(self.server.metrics), "neurontune_audit_failures_total")
        return {"before": before, "after": after, "ready": ready.status, "audit_failures": int(lost)}

    async def _references(self) -> References:
        """Every right answer, asked for alone, under each mask."""
        found: dict[Names, Reference] = {}
        client = Client(self.server.port, "alone", random.Random(0), found)
        for _ in range(2):
            await self.operator.swap()
            found |= await references_alone(client)
        client.connection.drop()
        self.tally += client.tally
        self.num_references = len(found)
        self.num_different = _num_different(found)
        return found

    async def _load(self, name: str, seconds: float, references: References) -> None:
        """Clients and operator for so many seconds; `tally` grows as they report."""
        context = multiprocessing.get_context("spawn")
        seen: multiprocessing.queues.Queue[Tally] = context.Queue()
        processes = [
            context.Process(target=run_clients, args=(share, references, seen), daemon=True)
            for share in self._shares(name, seconds)
        ]
        for process in processes:
            process.start()
        working = asyncio.create_task(self.operator.work(seconds))
        shown = time.monotonic()
        while not working.done() or any(process.is_alive() for process in processes):
            await asyncio.sleep(0.2)
            self._collect(seen)
            if time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                await asyncio.to_thread(self._show_progress, name)
        await working
        for process in processes:
            process.join()
            if process.exitcode:
                self.tally.lost.append(f"a process of clients ended with {process.exitcode}")
        self._collect(seen)

    def _shares(self, name: str, seconds: float) -> Iterator[Share]:
        given = self.arguments
        for number in range(given.processes):
            who = f"{name}{given.seed}.{number}"
            yield Share(self.server.port, given.clients, seconds, given.pause, who)

    def _collect(self, seen: "multiprocessing.queues.Queue[Tally]") -> None:
        while True:
            try:
                self.tally += seen.get_nowait()
            except queue.Empty:
                return

    def _show_progress(self, name: str) -> None:
        gauges, tally = self.server.gauges(), self.tally
        _print(
            f"{time.monotonic() - self._began:6.0f} s  {name}  {tally.num_sent} requests, "
            f"{tally.answered.total()} answered, {tally.num_tokens} tokens, "
            f"{(tally.faults + self.operator.tally.faults).total()} faults, "
            f"{len(tally.lost) + len(self.operator.tally.lost)} lost; {gauges['running']:.0f} running, "
            f"{gauges['waiting']:.0f} waiting, {self.server.memory_mb():.1f} MB"
        )
        for line in (tally.lost + self.operator.tally.lost)[:NUM_SHOWN]:
            _print(f"    lost: {line}")


def _num_different(references: References) -> int:
    """How many requests are answered otherwise under the other mask; none: nothing would tell masks apart."""
    by_names: dict[tuple[str, ...], list[Reference]] = {}
    for (_, *names), each in references.items():
        by_names.setdefault(tuple(names), []).append(each)
    return sum(differ(*pair) for pair in by_names.values())


def _report(arguments: argparse.Namespace, soak: "Soak", told: dict[str, Any], folder: Folder) -> None:
    measured = Tally()
    measured += soak.tally
    measured += soak.operator.tally
    all_of_it = Tally()
    for each in (measured, soak.warmup, soak.operator_warmup):
        all_of_it += each
    lines, log = records(folder.audit), folder.log.read_text(errors="replace")
    missing = deviations(lines, all_of_it)
    before, after = told["before"], told["after"]
    ratio = after["memory_mb"] / before["memory_mb"]
    checks = {
        "masks differ": soak.num_different > 0,
        "nothing lost": not all_of_it.lost,
        "nothing runs or waits": not (after["running"] or after["waiting"]),
        "memory within 5 %": ratio <= MAX_MEMORY_RATIO,
        "audit log complete": not missing and not told["audit_failures"],
        "ready at the end": told["ready"] == 200,
        "SIGTERM exits with 0": told["exit_code"] == 0,
        "no traceback in the log": "Traceback" not in log,
    }
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        "load": f"{arguments.processes * arguments.clients} clients in {arguments.processes} processes for "
        f"{arguments.seconds:g} s after {arguments.warmup:g} s of warm-up; {arguments.concurrency} run, "
        f"{arguments.waiting} wait; another mask every {arguments.every:g} s",
        "seed": arguments.seed,
        "command": " ".join(["python -m benchmarks.soak", *sys.argv[1:]]),
        "references": f"{soak.num_references}; {soak.num_different} prompts and levels differ by mask",
        "requests": measured.num_sent,
        "statuses": dict(sorted(measured.statuses.items())),
        "answered": dict(measured.answered.most_common()),
        "tokens": measured.num_tokens,
        "deviation": f"{measured.deviation:.1e}",
        "faults": measured.faults.total(),
        "lost": len(all_of_it.lost),
        "memory_mb": {"before": round(before["memory_mb"], 1), "after": round(after["memory_mb"], 1)},
        "memory_ratio": round(ratio, 4),
        "audit_lines": len(lines),
        "audit_failures": told["audit_failures"],
        "checks": checks,
    }
    for title, counted in (("fault", measured.faults), ("end, by the audit log", endings(lines))):
        _print(f"\n{title:<42} times")
        for name, number in counted.most_common():
            _print(f"{name:<42} {number:>5}")
    _print("")
    for name, value in result.items():
        _print(f"{name:<13} {value}")
    wrong = [*all_of_it.lost, *missing]
    for line in wrong[:NUM_SHOWN]:
        _print(f"wrong: {line}")
    if "Traceback" in log:
        _print(log[log.index("Traceback") - 500 :][:5000])
    _print(json.dumps({**result, "faults_by_kind": dict(measured.faults.most_common())}))
    sys.exit(not all(checks.values()))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=1200, help="of load")
    add(
        "--warmup",
        type=float,
        default=60,
        help="seconds of the same load before",
    )
    add("--every", type=float, default=10, help="seconds between two masks")
    add("--concurrency", type=int, default=8, help="answers at once")
    add("--waiting", type=int, default=16, help="answers that may wait")
    add("--processes", type=int, default=3, help="of clients")
    add("--clients", type=int, default=6, help="of each process")
    add("--pause", type=float, default=0.1, help="seconds, on average, between two requests of a client")
    add("--seed", type=int, default=0, help="of what is asked and done")
    return parser.parse_args()


if __name__ == "__main__":
    main()
