"""Lines of an audit log on their way to a file or to stdout, and what happens if they cannot get there.

Knows bytes, files and a thread of its own. Knows no request. Whoever writes never waits for the disk: lines
go through a bounded queue, and one that finds no room, or no disk, is lost, counted and told of.
"""

import json
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from server.errors import SettingsError
from server.redaction import redacted

STDOUT: Final = "-"
PROMPT: Final = "prompt"
CAPACITY: Final = 10_000
MODE: Final = 0o600
BURST_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 5.0

Record = Mapping[str, Any]


class AuditFile:
    """A file that grows to `max_bytes`, is then renamed to FILE.1, and FILE.1 to FILE.2, up to `keep`; or
    stdout. Not the standard library's handler: that one buffers, and a disk that was full gets its lines
    late, or half."""

    def __init__(self, target: str, max_bytes: int, keep: int) -> None:
        """Open it.

        Raises:
            OSError: it cannot be opened for writing.
        """
        self._path = None if target == STDOUT else Path(target)
        self._max_bytes = max_bytes
        self._keep = keep
        self._open()

    def write(self, line: bytes) -> None:
        """Write the line whole or not at all. Raises OSError."""
        if self._rotates and self._size and self._size + len(line) > self._max_bytes:
            self._rotate()
        num_written = 0
        try:
            while num_written < len(line):
                num_written += os.write(self._file, line[num_written:])
        except OSError:
            if num_written and self._rotates:
                os.ftruncate(self._file, self._size)
            raise
        self._size += num_written

    def reopen(self) -> None:
        """Open the file of this name again: a new one if it was moved away. Raises OSError; then the old one
        is written on."""
        old = self._file
        self._open()
        os.close(old)

    def close(self) -> None:
        """Close it."""
        os.close(self._file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.dup(1) if self._path is None else os.open(self._path, flags, MODE)
        about = os.fstat(self._file)
        self._size = about.st_size
        self._rotates = self._path is not None and stat.S_ISREG(about.st_mode)
        if self._rotates and stat.S_IMODE(about.st_mode) & ~MODE:
            log = logging.getLogger(__name__)
            try:
                os.fchmod(self._file, MODE)
                log.warning("The audit log %s could be read by others; its mode is 0600 now.", self._path)
            except PermissionError:
                log.warning("The audit log %s can be read or written by others.", self._path)

    def _rotate(self) -> None:
        """Begin a new file. If that fails the old one grows on: a line is worth more than a limit."""
        assert self._path is not None
        with suppress(OSError):
            if self._path.exists():
                for number in range(self._keep - 1, 0, -1):
                    with suppress(FileNotFoundError):
                        os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
                os.replace(self._path, f"{self._path}.1")
            self.reopen()


class AuditLog:
    """Takes records, and writes each as one line of JSON, in their order, from a thread of its own."""

    def __init__(
        self,
        file: AuditFile,
        on_lost: Callable[[], None],
        *,
        capacity: int = CAPACITY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_lost` is called for every line that is lost, from any thread."""
        self._file = file
        self._on_lost = on_lost
        self._clock = clock
        self._queue: queue.Queue[Record | None] = queue.Queue(capacity)
        self._was_moved = threading.Event()
        self._lock = threading.Lock()
        self._last_lost = -BURST_SECONDS
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="audit-log", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Have it written soon. Never waits, never raises."""
        if self._closed:
            self._lose("the log is closed")
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lose(f"{self._queue.maxsize} lines wait already")

    def reopen(self) -> None:
        """Before the next line is written, begin a new file if the old one has been moved away."""
        self._was_moved.set()

    def close(self) -> None:
        """Write what waits, for some seconds at most."""
        self._closed = True
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        for _ in range(self._queue.qsize() if self._thread.is_alive() else 0):
            self._lose("the server ended before it was written")

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                if self._was_moved.is_set():
                    self._was_moved.clear()
                    self._reopen()
                self._file.write(_line(record))
            except Exception as error:  # whatever it is, the next line gets its chance
                self._lose(error.strerror or str(error) if isinstance(error, OSError) else repr(error))
        self._file.close()

    def _reopen(self) -> None:
        try:
            self._file.reopen()
        except OSError as error:
            log = logging.getLogger(__name__)
            log.error("The audit log cannot be opened anew (%s): it goes on in the old file.", error.strerror)

    def _lose(self, reason: str) -> None:
        self._on_lost()
        with self._lock:
            now = self._clock()
            begins, self._last_lost = now - self._last_lost >= BURST_SECONDS, now
        if begins:
            logging.getLogger(__name__).error(
                "Lines of the audit log are lost: %s. neurontune_audit_failures_total counts them.", reason
            )


def open_audit_log(target: str, max_bytes: int, keep: int, on_lost: Callable[[], None]) -> AuditLog:
    """A log that writes to `target`, a path or `-`.

    Raises:
        SettingsError: it cannot be opened. Who wants an audit log is not served without one.
    """
    try:
        return AuditLog(AuditFile(target, max_bytes, keep), on_lost)
    except OSError as error:
        raise SettingsError(
            f"Setting audit_log: {target} cannot be opened for writing: {error.strerror}."
        ) from error


def _line(record: Record) -> bytes:
    """One line of ASCII: what a client sent cannot begin another one."""
    shown = {name: redacted(value) if name == PROMPT and value else value for name, value in record.items()}
    return json.dumps(shown).encode("ascii") + b"\n"
