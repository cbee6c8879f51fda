"""Cores for tensors: for the thread that runs the steps, and beside it, without slowing that one down.

Knows how torch runs on several cores. Knows nothing of a model but how many parameters it has.

Each thread that has run a large enough operation keeps helpers of its own, one a core, for as long as it
lives (libgomp). With those of two threads there are more than cores, and from then on all helpers sleep
between operations and must be woken for each: what that costs is in docs/measurements.md. So beside the
steps, tensors are worked on without helpers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

# A step is mostly Python if it has fewer products than these of a parameter and a request, and of a parameter
# and a token, and if its model does not wait for memory at its weights: if it has fewer parameters than that.
_FEW_OF_REQUESTS: Final = 32_000_000
_FEW_OF_TOKENS: Final = 300_000_000
_FEW_PARAMETERS: Final = 16_000_000


@contextmanager
def on_one_core() -> Iterator[None]:
    """Within the block, torch works without helpers on this thread, and on threads that begin to use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class StepThreads:
    """How many cores each step works on, on the thread that runs the steps: all `number` of them, or, where a
    step has little to compute, all but one, which is left to whatever answers the requests. A change takes a
    millisecond or two, so a request's short prompt and its tokens are treated alike.

    `num_parameters` are the model's.
    """

    def __init__(self, number: int, num_parameters: int) -> None:
        self._number = number
        self._num_parameters = num_parameters
        self._used = number

    def begin(self) -> None:
        """On the thread that runs the steps, before them: another thread may hold torch at one just now."""
        torch.set_num_threads(self._number)
        self._used = self._number

    def use(self, num_requests: int, num_tokens: int) -> None:
        """Before a step of so many."""
        size = self._num_parameters
        is_small = size * num_requests < _FEW_OF_REQUESTS and size * num_tokens < _FEW_OF_TOKENS
        is_small = is_small and size < _FEW_PARAMETERS
        wanted = max(1, self._number - 1) if is_small else self._number
        if wanted != self._used:
            torch.set_num_threads(wanted)
            self._used = wanted
