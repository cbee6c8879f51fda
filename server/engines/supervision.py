"""What becomes of a worker that ends by itself: another is started, until too many in a row have failed.

Knows how to start, stop and watch a worker by the functions it is given. Knows no model and no request.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Final

DEFAULT_MAX_FAILURES: Final = 3


def leave_it(_reason: str) -> None:
    """For who only looks at `Supervisor.reason`."""


class Supervisor:
    """Keeps one worker running. Its methods can be called on any thread.

    `start` and `stop` are called on the thread of `begin` and `close`, or on one of the supervisor's own;
    `start` raises what keeps a worker from running. `on_fatal` is called once, with the reason, when
    `max_failures` workers in a row have failed, counted from the last `succeeded`: those that ended and
    those that did not start. `num_restarts` counts all that were started, or were to be, after a failure.
    """

    def __init__(
        self,
        start: Callable[[], None],
        stop: Callable[[], None],
        is_running: Callable[[], bool],
        *,
        max_failures: int = DEFAULT_MAX_FAILURES,
        on_fatal: Callable[[str], None] = leave_it,
    ) -> None:
        self._start = start
        self._stop = stop
        self._is_running = is_running
        self._max_failures = max_failures
        self._on_fatal = on_fatal
        self._lock = threading.Lock()
        self._reason: str | None = "the engine is starting"
        self._num_failures = 0
        self.num_restarts = 0
        self._recovery: threading.Thread | None = None
        self._start_seconds = 0.0
        self._closed = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why the worker cannot be used now; None: it can."""
        return self._reason

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    @property
    def retry_after_seconds(self) -> int:
        """In how many seconds a worker that is being started can be expected: as the last one took."""
        return max(1, math.ceil(self._start_seconds))

    def begin(self) -> None:
        """Start the first worker. Raises what `start` raises."""
        self._timed_start()
        self._reason = None

    def succeeded(self) -> None:
        """The worker has done what it is for: failures are counted from here."""
        self._num_failures = 0

    def ended(self, cause: str) -> None:
        """The worker in use has ended: start another. Said again, it changes nothing."""
        with self._lock:
            if self.is_closed or self._reason is not None:
                return
            self._reason = f"the engine has failed ({cause}) and is being rebuilt"
            self._recovery = threading.Thread(target=self._recover, args=(cause,), name="engine-recovery")
            self._recovery.start()

    def close(self) -> None:
        """Stop the worker for good."""
        with self._lock:
            self._reason = "the engine is closed"
            self._closed.set()
        if self._recovery is not None:
            self._recovery.join()
        self._stop()

    def _recover(self, cause: str) -> None:
        log = logging.getLogger(__name__)
        while not self.is_closed:
            self._num_failures += 1
            if self._num_failures >= self._max_failures:
                self._give_up(f"the engine has failed {self._num_failures} times in a row, at last: {cause}")
                return
            number = f"failure {self._num_failures}, {self._max_failures} in a row end the server"
            log.error("The engine has failed (%s) and is being rebuilt (%s).", cause, number)
            self.num_restarts += 1
            try:
                self._stop()
                self._timed_start()
            except Exception as error:
                cause = " ".join(str(error).split()) or repr(error)
                continue
            log.warning("The engine is ready again after %.1f s.", self._start_seconds)
            self._set_reason(None)
            if not self._is_running():  # it ended before anybody was told of it
                self.ended("it ended as soon as it had started")
            return

    def _give_up(self, reason: str) -> None:
        self._set_reason(reason)
        self._on_fatal(reason)

    def _set_reason(self, reason: str | None) -> None:
        with self._lock:
            if not self.is_closed:
                self._reason = reason

    def _timed_start(self) -> None:
        begun = time.monotonic()
        self._start()
        self._start_seconds = time.monotonic() - begun
