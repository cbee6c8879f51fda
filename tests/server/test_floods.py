"""Of many records of a kind one a second is written, and the others are counted."""

from typing import Any

from server.floods import Thinned


class Clock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_of_a_second_and_the_last_with_what_came_between() -> None:
    written: list[dict[str, Any]] = []
    clock = Clock()
    thinned = Thinned(lambda record: written.append(dict(record)), clock)
    for number in range(5):
        thinned.write("ann", {"number": number, "num_left_out": 0})
    thinned.write("ben", {"number": 10, "num_left_out": 0})
    assert [each["number"] for each in written] == [0, 10]
    clock.now += 1
    thinned.write("ben", {"number": 11, "num_left_out": 0})
    told = [(each["number"], each["num_left_out"]) for each in written]
    assert told == [(0, 0), (10, 0), (4, 3), (11, 0)]
    thinned.write("ben", {"number": 12, "num_left_out": 0})
    thinned.close()
    assert [(each["number"], each["num_left_out"]) for each in written[4:]] == [(12, 0)]


def test_what_is_kept_is_of_one_second() -> None:
    clock = Clock()
    thinned = Thinned(lambda _: None, clock)
    for number in range(1000):
        clock.now += 0.01
        thinned.write(number, {})
    assert len(thinned._kinds) <= 101
