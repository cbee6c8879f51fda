"""`neurontune serve --engine vllm` as a process of its own, leader of a process group as in a terminal."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
END_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running server: its process, its address, and the file that its errors go to."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def descendants(self) -> list[psutil.Process]:
        """All of its processes but itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def named(self, part: str) -> list[psutil.Process]:
        """Those of vLLM's processes whose titles have `part`."""
        return [each for each in self.descendants() if part in " ".join(each.cmdline())]


@contextmanager
def starting(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The demo model on vLLM, not yet ready, and the file that its errors go to. Its process group is killed
    with the `with`: processes of vLLM's that it had left behind would keep its output open for ever."""
    command = [sys.executable, "-m", "server", "serve", "--engine", "vllm", "--port", "0", *flags]
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            # A shell's jobs in the background ignore Ctrl-C, and hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield process, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=END_SECONDS)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[Served]:
    """The demo model on vLLM, ready. Whatever is left of it when the `with` ends is killed."""
    with starting(folder, *flags) as (process, log):
        left: list[psutil.Process] = []
        try:
            assert process.stdout is not None
            address = ""
            for line in process.stdout:
                address = address or "".join(re.findall(r"^address +(\S+)", line))
                if line.startswith("    -d "):
                    break
            assert address, log.read_text()[-3000:]
            found = Served(process, address, log)
            left = found.descendants()
            yield found
        finally:
            for each in left:
                if each.is_running():
                    each.kill()
