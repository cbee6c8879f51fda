"""Modulation is timed in one step of 64, and nothing of that is on the model in the others."""

import time

import pytest
import torch
from torch import nn

from server.engines.base import MODULATION_BOUNDS
from server.engines.tallying import SAMPLE_EVERY, Tally
from server.engines.timing import Stopwatch


class Clock:
    """Goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)


class Slow(nn.Module):
    """Takes 100 seconds, and a hook before it 5, and one after that 2."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        for seconds in (5, 2):
            self.register_forward_pre_hook(lambda *_, seconds=seconds: self._wait(seconds))

    def _wait(self, seconds: float) -> None:
        self._clock.seconds += seconds

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self._wait(100)
        return values


def test_what_hooks_take_counts_and_what_modules_take_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    modules = [Slow(clock) for _ in range(3)]
    watch = Stopwatch(torch.device("cpu"))
    with watch.around_hooks(modules):
        for module in modules:
            module(torch.zeros(1))
    watch.start()
    clock.seconds += 30
    watch.stop()
    for module in modules:
        module(torch.zeros(1))
        assert len(module._forward_pre_hooks) == 2
    assert watch.is_known and watch.seconds == 3 * 7 + 30


def test_one_step_in_64_is_sampled_and_counts_by_size() -> None:
    tally, sampled = Tally(), []
    for number in range(1, 3 * SAMPLE_EVERY):
        tally.step_begins(1 + number % 2)
        if tally.is_sampled:
            sampled.append(number)
            tally.modulated(0.0005 if number == SAMPLE_EVERY else 7)
    assert sampled == [64, 128]
    tallies = tally.now(0.5, 3)
    assert (tallies.kv_cache_usage, tallies.num_restarts) == (0.5, 3)
    assert tallies.step_levels.counts[:3] == (95, 96, 0) and tallies.step_levels.total == 95 + 2 * 96
    seconds = dict(zip((*MODULATION_BOUNDS, None), tallies.modulation_seconds.counts, strict=True))
    assert {bound: count for bound, count in seconds.items() if count} == {0.0005: 1, None: 1}
    assert tallies.modulation_seconds.total == 7.0005
