"""A server process under load: its start, its gauges and memory once nothing runs, its end.

Knows the command line and `/metrics`. Knows no client and nothing of what is asked.
"""

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any, Final

import psutil

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
GAUGES: Final = ("running", "waiting")
EXIT_SECONDS: Final = 60


@dataclass(frozen=True)
class Served:
    """A server that has printed its address. `headers` are sent with every request for its metrics."""

    port: int
    process: subprocess.Popen[str]
    headers: Mapping[str, str]

    def metrics(self) -> str:
        """Metrics in Prometheus' text format."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers=dict(self.headers))
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def gauges(self) -> dict[str, float]:
        """How many requests run and wait."""
        text = self.metrics()
        return {name: value_of(text, f"neurontune_num_requests_{name}") for name in GAUGES}

    def memory_mb(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def settled(self) -> dict[str, float]:
        """Gauges and memory once nothing runs or waits (or after 30 s in which something still did)."""
        ends = time.monotonic() + 30
        while True:
            gauges = self.gauges()
            if not any(gauges.values()) or time.monotonic() > ends:
                return {**gauges, "memory_mb": self.memory_mb()}
            time.sleep(0.1)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(EXIT_SECONDS)


def value_of(text: str, metric: str) -> float:
    """The value of a metric that has one, whatever its labels."""
    (value,) = re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return float(value)


@contextmanager
def ending_with_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, so that what the block has started ends with it."""

    def end(*_: object) -> None:
        sys.exit("Ended by SIGTERM.")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def served(
    flags: Sequence[str], headers: Mapping[str, str] = NO_HEADERS, errors: IO[Any] | None = None
) -> Iterator[Served]:
    """A server on a free port; what it logs goes to `errors`. It is ended with the block, and that by
    SIGTERM."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--log-level", "error", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        with ending_with_sigterm():
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.match(r"address +http://\S+:(\d+)", line):
                    yield Served(int(found[1]), process, headers)
                    return
            raise SystemExit("The server ended before it was ready.")
    finally:
        process.terminate()
        process.wait(EXIT_SECONDS)
