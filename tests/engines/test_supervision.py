"""When a worker is started anew, and when that ends."""

import threading

import pytest

from server.engines.supervision import Supervisor

TIMEOUT_SECONDS = 10.0


class Worker:
    """Starts and stops as told, and notes it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failures: list[Exception] = []
        self.may_start = threading.Event()
        self.may_start.set()
        self.runs = False

    def start(self) -> None:
        assert self.may_start.wait(TIMEOUT_SECONDS)
        self.log.append("start")
        if self.failures:
            raise self.failures.pop()
        self.runs = True

    def stop(self) -> None:
        self.log.append("stop")
        self.runs = False


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def fatal() -> list[str]:
    return []


@pytest.fixture
def supervisor(worker: Worker, fatal: list[str]) -> Supervisor:
    return Supervisor(worker.start, worker.stop, lambda: worker.runs, max_failures=3, on_fatal=fatal.append)


def recover(supervisor: Supervisor, cause: str = "it broke") -> None:
    """Say that the worker has ended, and wait for what comes of it."""
    supervisor.ended(cause)
    assert supervisor._recovery is not None
    supervisor._recovery.join(TIMEOUT_SECONDS)


def test_a_worker_that_ends_is_stopped_and_another_started(supervisor: Supervisor, worker: Worker) -> None:
    supervisor.begin()
    worker.may_start.clear()
    supervisor.ended("it broke")
    assert supervisor.reason == "the engine has failed (it broke) and is being rebuilt"
    supervisor.ended("and was said to have")
    worker.may_start.set()
    assert supervisor._recovery is not None
    supervisor._recovery.join(TIMEOUT_SECONDS)
    assert supervisor.reason is None and worker.log == ["start", "stop", "start"]
    assert supervisor.retry_after_seconds == 1


def test_so_many_failures_in_a_row_are_fatal(
    supervisor: Supervisor, worker: Worker, fatal: list[str]
) -> None:
    supervisor.begin()
    recover(supervisor)
    recover(supervisor)
    assert not fatal and supervisor.reason is None
    recover(supervisor, "again")
    assert fatal == ["the engine has failed 3 times in a row, at last: again"]
    assert supervisor.reason == fatal[0] and worker.log.count("start") == 3
    supervisor.ended("once more")
    assert len(fatal) == 1


def test_success_between_failures_starts_the_count_again(supervisor: Supervisor, fatal: list[str]) -> None:
    supervisor.begin()
    for _ in range(6):
        recover(supervisor)
        supervisor.succeeded()
    assert not fatal and supervisor.reason is None


def test_one_that_does_not_start_counts_as_a_failure(
    supervisor: Supervisor, worker: Worker, fatal: list[str]
) -> None:
    supervisor.begin()
    worker.failures = [RuntimeError("no memory"), RuntimeError("no device")]
    recover(supervisor)
    assert fatal == ["the engine has failed 3 times in a row, at last: no memory"]


def test_what_the_first_one_raises_is_raised(supervisor: Supervisor, worker: Worker) -> None:
    worker.failures = [RuntimeError("no memory")]
    with pytest.raises(RuntimeError, match="no memory"):
        supervisor.begin()


def test_close_ends_a_recovery(supervisor: Supervisor, worker: Worker, fatal: list[str]) -> None:
    supervisor.begin()
    supervisor.ended("it broke")
    supervisor.close()
    assert supervisor.reason == "the engine is closed" and worker.log[-1] == "stop" and not worker.runs
    supervisor.ended("later")
    assert worker.log[-1] == "stop" and not fatal
