"""Work with tensors beside the thread that runs the steps, without slowing that one down.

Knows how torch runs on several cores. Knows no model.

Each thread that has run a large enough operation keeps helpers of its own, one a core, for as long as it
lives (libgomp). With those of two threads there are more than cores, and from then on all helpers sleep
between operations and must be woken for each: what that costs is in docs/measurements.md. So beside the
steps, tensors are worked on without helpers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_one_core() -> Iterator[None]:
    """Within the block, torch works without helpers on this thread, and on threads that begin to use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
