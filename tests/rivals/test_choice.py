"""The rule that picks a setting, on made-up figures: no model is needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from modulation.errors import DataError, ModelError
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, rate
from modulation.rivals.choice import Limits, Point, best, choose, point_of, ranked

OFF = Point(asr=0.6, over_refusal=0.20, benign_correct=1.0)
RECORDS = [Record(id="1", prompt="how?", kind="harmful", family="please")]


def metrics(asr: int, over_refusal: int, benign_correct: int) -> Metrics:
    """Rates in whole points, of a hundred prompts each."""

    def points(count: int) -> object:
        return rate(place < count for place in range(100))

    return Metrics(asr=points(asr), over_refusal=points(over_refusal), benign_correct=points(benign_correct))


class Rival:
    """Settings by name with figures in points, and a count of what was asked."""

    def __init__(self, **figures: tuple[int, int, int]) -> None:
        self.figures = {"off": (60, 20, 100), **figures}
        self.now = "off"
        self.measured: list[str] = []
        self.screened: list[str] = []

    @contextmanager
    def apply(self, setting: str) -> Iterator[None]:
        assert self.now == "off"
        self.now = setting
        try:
            yield
        finally:
            self.now = "off"

    def measure(self, records: Sequence[Record]) -> Metrics:
        assert records is RECORDS
        self.measured.append(self.now)
        return metrics(*self.figures[self.now])

    def screen(self) -> Point:
        """What would be measured, but blind to benign mistakes."""
        self.screened.append(self.now)
        asr, over_refusal, _ = self.figures[self.now]
        return Point(asr / 100, over_refusal / 100, 1.0)

    @property
    def settings(self) -> list[str]:
        return [name for name in self.figures if name != "off"]


def test_the_least_attack_success_within_the_limits_is_chosen() -> None:
    measured = [Point(0.3, 0.2, 1.0), Point(0.0, 0.2, 0.97), Point(0.1, 0.33, 1.0), Point(0.2, 0.32, 0.98)]
    assert choose("abcd", measured, OFF) == "d"


def test_of_equal_attack_success_the_least_over_refusal_is_chosen_and_then_the_first() -> None:
    measured = [Point(0.2, 0.3, 1.0), Point(0.2, 0.1, 0.99), Point(0.2, 0.1, 1.0), Point(0.3, 0.0, 1.0)]
    assert choose("abcd", measured, OFF) == "b"


@pytest.mark.parametrize("off", [0.99, 1.0, 0.57])
def test_exactly_at_the_limits_is_within_them_whatever_the_rounding(off: float) -> None:
    reference = Point(0.6, 0.2, off)
    assert choose("a", [Point(0.5, 0.2 + 0.12, off - 0.02)], reference) == "a"
    with pytest.raises(ModelError, match="None of 1 settings"):
        choose("a", [Point(0.5, 0.2, off - 0.021)], reference)


def test_beyond_the_limits_the_nearest_to_them_ranks_first() -> None:
    measured = [Point(0.0, 0.9, 1.0), Point(0.5, 0.3, 1.0), Point(0.1, 0.4, 0.9), Point(0.0, 0.2, 0.95)]
    assert ranked(measured, OFF) == [1, 3, 2, 0]


def test_no_setting_within_the_limits_is_an_error_that_says_them() -> None:
    said = "at most 2 points of benign correctness and gains at most 5 points of over-refusal"
    with pytest.raises(ModelError, match=said):
        choose("a", [Point(0.0, 0.5, 1.0)], OFF, Limits(0.02, 0.05))


def test_without_a_screen_every_setting_is_measured_once() -> None:
    rival = Rival(weak=(50, 20, 100), good=(20, 30, 99), strong=(0, 90, 100))
    setting, found = best(rival.settings, rival.apply, RECORDS, rival.measure)
    assert (setting, found) == ("good", metrics(20, 30, 99))
    assert rival.measured == ["off", "weak", "good", "strong"]


def test_with_a_screen_only_the_most_promising_settings_are_measured() -> None:
    rival = Rival(weak=(50, 20, 100), good=(20, 30, 99), better=(15, 29, 100), strong=(0, 90, 100))
    told: list[str] = []
    setting, _ = best(
        rival.settings, rival.apply, RECORDS, rival.measure, screen=rival.screen, num_generated=2,
        off=metrics(60, 20, 100), on_measured=lambda name, _metrics: told.append(name),
    )  # fmt: skip
    assert setting == "better"
    assert rival.screened == ["off", "weak", "good", "better", "strong"]
    assert rival.measured == told == ["better", "good"]


def test_where_the_most_promising_are_beyond_the_limits_the_next_ones_are_measured() -> None:
    """Screening sees refusals and not nonsense, so its favourites may all answer benign prompts wrongly."""
    rival = Rival(last=(58, 20, 100), nonsense=(10, 20, 50), babble=(20, 20, 60), good=(30, 20, 100))
    setting, _ = best(
        rival.settings, rival.apply, RECORDS, rival.measure, screen=rival.screen, num_generated=1
    )
    assert setting == "good"
    assert rival.measured == ["off", "nonsense", "babble", "good"]


def test_what_cannot_be_chosen_from_is_refused() -> None:
    rival = Rival(a=(1, 2, 3))
    with pytest.raises(DataError, match="no settings"):
        best([], rival.apply, RECORDS, rival.measure)
    with pytest.raises(DataError, match="num_generated=0"):
        best(["a"], rival.apply, RECORDS, rival.measure, num_generated=0)
    with pytest.raises(DataError, match="Metric 'over_refusal' was not measured"):
        point_of(Metrics(asr=metrics(1, 2, 3)["asr"]))
