import os
import subprocess
import sys
import threading

import pytest

from server.engines.threads import in_passing_thread


def test_work_runs_on_a_thread_that_has_ended_when_the_call_returns() -> None:
    assert in_passing_thread(threading.current_thread)() is not threading.current_thread()
    assert not in_passing_thread(threading.current_thread)().is_alive()


def test_arguments_and_result_pass_through() -> None:
    assert in_passing_thread(divmod)(17, 5) == (3, 2)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_the_work_raises_is_raised(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("why")

    with pytest.raises(error, match="why"):
        in_passing_thread(fail)()


_COUNT_HELPERS = """
import os, threading
import torch
from server.engines.threads import in_passing_thread

def work():
    return torch.ones(2000, 2000).sum().item()

def num_helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(3)
before = num_helpers()
in_passing_thread(work)()
in_passing_thread(work)()
while num_helpers() > before:  # they leave after their thread
    os.sched_yield()
work()
print(num_helpers() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_no_helpers_of_torch_stay() -> None:
    """They stay after work on a thread that lives on, two beside it."""
    command = [sys.executable, "-c", _COUNT_HELPERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["2"]
