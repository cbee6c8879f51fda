"""What an engine counts of its steps and prompts, for metrics.

Knows numbers. Knows no model, no torch, no metric. Written to by the one thread that runs the steps, and read
by another: a count may be a step old, never wrong.
"""

from typing import Final

from server.engines.base import MODULATION_BOUNDS, STEP_LEVEL_BOUNDS, Tallies
from server.observed import Observed

SAMPLE_EVERY: Final = 64
SAMPLE_GRAPHED_EVERY: Final = 512


class Tally:
    """Counts since the engine was made; the engine's rebuilds change nothing in it. In one step of
    `sample_every` modulation is to be timed."""

    def __init__(self, sample_every: int = SAMPLE_EVERY) -> None:
        self._sample_every = sample_every
        self._num_steps = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._levels = Observed(STEP_LEVEL_BOUNDS)
        self._seconds = Observed(MODULATION_BOUNDS)

    def step_begins(self, num_levels: int) -> None:
        """A step begins, with so many different thresholds."""
        self._num_steps += 1
        self._levels.add(num_levels)

    @property
    def is_sampled(self) -> bool:
        """Whether modulation is to be timed in the step that has begun."""
        return self._num_steps % self._sample_every == 0 and self._num_steps > 0

    def modulated(self, seconds: float) -> None:
        """So long was spent in modulation in a step that was sampled."""
        self._seconds.add(seconds)

    def looked_up(self, num_tokens: int, num_cached: int) -> None:
        """A prompt of so many tokens was looked up in the prefix cache; `num_cached` were there."""
        self._num_prefix_queries += num_tokens
        self._num_prefix_hits += num_cached

    def now(self, kv_cache_usage: float, num_restarts: int) -> Tallies:
        """All of it, with what others know."""
        return Tallies(
            kv_cache_usage=kv_cache_usage,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_restarts=num_restarts,
            step_levels=self._levels.distribution(),
            modulation_seconds=self._seconds.distribution(),
        )
