"""Observations counted by size, in plain numbers.

Knows numbers. Written to by one thread, read by any: a reader may miss the latest one.
"""

from bisect import bisect_left
from collections.abc import Sequence

from server.engines.base import Distribution


class Observed:
    """Observations counted by size, between `bounds` that rise."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        """All until now."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
