"""How long modulation takes in a step: the time between two marks around its hooks, added up.

Knows modules and clocks. Knows nothing of masks or requests. Nothing of it is on a module but in the step
that is timed.

On CPU the marks are read off the process's clock, so the time is that of the work. On CUDA they are events
on the stream, so it is the time between them there: the kernels of modulation, and what the stream waits
between them for more to be launched.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Adds up the times between `start` and `stop`. Nothing in it waits for a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def start(self) -> None:
        """What follows counts."""
        self._begun = self._mark()

    def stop(self) -> None:
        """What follows does not count."""
        self._spans.append((self._begun, self._mark()))

    @contextmanager
    def around_hooks(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the block, what the hooks before these modules' forward passes do counts."""
        with ExitStack() as stack:
            for module in modules:
                first = module.register_forward_pre_hook(lambda *_: self.start(), prepend=True)
                last = module.register_forward_pre_hook(lambda *_: self.stop())
                stack.callback(first.remove)
                stack.callback(last.remove)
            yield

    @property
    def is_known(self) -> bool:
        """Whether all marks have been passed. While a graph is recorded nobody may ask, and it is not."""
        if not self._on_cuda:
            return True
        if torch.cuda.is_current_stream_capturing():
            return False
        return all(end.query() for _, end in self._spans[-1:])

    @property
    def seconds(self) -> float:
        """The time that counts, once it is known."""
        if self._on_cuda:
            return sum(float(begin.elapsed_time(end)) for begin, end in self._spans) / 1000
        return sum(float(end - begin) for begin, end in self._spans)

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
