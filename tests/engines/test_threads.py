import os
import subprocess
import sys
import threading

import pytest
import torch

from server.engines.threads import StepThreads, on_one_core


def test_there_is_one_core_within_the_block_and_as_many_as_before_after_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="why"), on_one_core():
            seen = [torch.get_num_threads()]
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            raise ValueError("why")
        assert (seen, torch.get_num_threads()) == ([1, 1], 3)
    finally:
        torch.set_num_threads(before)


_COUNT_HELPERS = """
import os, threading
import torch
from server.engines.threads import on_one_core

def work():
    return torch.ones(2000, 2000).sum().item() + (torch.ones(500, 500) @ torch.ones(500, 500)).sum().item()

def num_helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(3)
before = num_helpers()
with on_one_core():
    work()
within = num_helpers()
work()
print(within - before, num_helpers() - before)
"""

_COUNT_OF_ENGINE = """
import asyncio, os, threading
import torch
torch.set_num_threads(3)
from modulation.demo import MASK_FILE, MODEL_DIR
from server.engines.transformers import TransformersEngine

before = len(os.listdir("/proc/self/task")) - threading.active_count()
engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
print(len(os.listdir("/proc/self/task")) - threading.active_count() - before)
asyncio.run(engine.close())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # The second number shows that the work is large enough to have helpers.
        (_COUNT_HELPERS, ["0", "2"]),
        # Of three cores one is left to others in steps as small as those here.
        (_COUNT_OF_ENGINE, ["1"]),
    ],
    ids=["work on one core", "the steps of an engine"],
)
def test_only_the_steps_have_helpers(code: str, expected: list[str]) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == expected


@pytest.mark.parametrize(
    ("number", "num_parameters", "seen"),
    [(4, 4_000_000, [3, 3, 4, 4]), (4, 400_000_000, [4, 4, 4, 4]), (1, 4_000_000, [1, 1, 1, 1])],
    ids=["small model", "large model", "one core"],
)
def test_steps_with_little_to_compute_leave_a_core(number: int, num_parameters: int, seen: list[int]) -> None:
    before, found = torch.get_num_threads(), []
    try:
        threads = StepThreads(number, num_parameters)
        threads.begin()
        for num_requests, num_tokens in ((1, 1), (7, 40), (16, 16), (1, 200)):
            threads.use(num_requests, num_tokens)
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == seen
