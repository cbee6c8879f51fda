"""Work with tensors beside the thread that runs the steps, without slowing that one down.

Knows threads and how torch runs on several cores. Knows no model.

Each thread that has run a large enough operation keeps helpers of its own, one a core, for as long as it
lives (libgomp). With those of two threads there are more than cores, and from then on all helpers sleep
between operations and must be woken for each: measured on two cores, a step of the demo model takes twice as
long (docs/measurements.md). So tensors are worked on by the thread of the steps, and by threads that end.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_passing_thread(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, run on a thread that ends with it, and waited for. What it raises is raised."""

    @functools.wraps(work)
    def run(*arguments: P.args, **keywords: P.kwargs) -> T:
        future: Future[T] = Future()

        def fill() -> None:
            try:
                future.set_result(work(*arguments, **keywords))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: an interrupt ends the wait and the process, not only the wait.
        thread = threading.Thread(target=fill, name="tensors", daemon=True)
        thread.start()
        try:
            return future.result()
        finally:
            if future.done():
                thread.join()
                del future  # its error's traceback holds this frame: a circle

    return run
