"""What vLLM tells of its steps, counted as the other engines count.

Knows vLLM's loggers. Knows no requests but how many different thresholds are open.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from server.engines.base import Tallies
from server.engines.tallying import Tally


class VllmStats:
    """Counts from when it is told to begin: what vLLM does before is no request's.

    A step is counted by the thresholds of the requests that are open when vLLM tells of it. How long
    modulation takes in it is not known: it is a part of compiled kernels.
    """

    def __init__(self, num_levels: Callable[[], int]) -> None:
        self._num_levels = num_levels
        self._tally = Tally()
        self._usage: dict[int, float] = {}
        self.counts = False

    def logger(self, _config: VllmConfig, engine_index: int = 0) -> "StatLoggerBase":
        """What vLLM makes one of for each copy of the model."""
        return _Logger(self, engine_index)

    def record(self, engine_index: int, scheduler_stats: Any) -> None:
        """What a step of one copy has told."""
        if scheduler_stats is None or not self.counts:
            return
        self._usage[engine_index] = scheduler_stats.kv_cache_usage
        found = scheduler_stats.prefix_cache_stats
        self._tally.looked_up(found.queries, found.hits)
        if num_levels := self._num_levels():
            self._tally.step_begins(num_levels)

    def now(self, num_open: int) -> Tallies:
        """All of it. Where nobody asks anything, nothing is in use: vLLM does not tell when requests left."""
        usage = max(self._usage.values(), default=0.0) if num_open else 0.0
        return self._tally.now(usage, num_restarts=0)


class _Logger(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, stats: VllmStats, engine_index: int) -> None:
        self._stats = stats
        self._engine_index = engine_index

    def record(self, scheduler_stats: Any, *_: Any, engine_idx: int = 0, **__: Any) -> None:
        self._stats.record(engine_idx or self._engine_index, scheduler_stats)

    def log_engine_initialized(self) -> None:
        pass
