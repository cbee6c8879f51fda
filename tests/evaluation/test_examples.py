"""Which prompts a report shows."""

from modulation.evaluation.data import Record
from modulation.evaluation.examples import example_records


def named(kind: str, number: int, family: str | None = None) -> list[Record]:
    return [Record(f"{kind}{family or ''}{n}", "?", kind, family) for n in range(number)]


def test_every_kind_is_shown_from_all_over_its_part_of_the_file() -> None:
    records = (
        named("harmful", 10) + named("benign", 10) + named("harmful", 10, "json") + named("borderline", 10)
    )
    shown = [record.id for record in example_records(records)]
    assert shown == [
        *("harmfuljson0", "harmful0", "borderline0", "benign0"),
        *("harmfuljson5", "harmful5", "borderline5", "benign5"),
    ]


def test_a_kind_of_which_there_is_little_leaves_its_place_to_the_others() -> None:
    shown = [record.id for record in example_records([*named("harmful", 1), *named("benign", 20)])]
    assert len(shown) == len(set(shown)) == 8 and "harmful0" in shown
    assert [record.id for record in example_records(named("benign", 3))] == ["benign0", "benign1", "benign2"]
    assert example_records([]) == []
