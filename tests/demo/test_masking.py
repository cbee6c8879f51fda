"""The demo mask's recipe: what it may read, and the rule by which levels are chosen."""

import pytest

from modulation.demo.corpus import family_names, records
from modulation.demo.masking import Candidate, attribution_data, choose, validation_records
from modulation.errors import ModelError
from modulation.evaluation.metrics import Rate
from modulation.levels import Threshold


def rate(share: float) -> Rate:
    return Rate(rate=share, count=round(share * 100), total=100, low=0.0, high=1.0)


def point(size: int, asr: float, over: float, benign: float, factor: float = 2.0) -> Candidate:
    metrics = {"asr": rate(asr), "over_refusal": rate(over), "benign_correct": rate(benign)}
    return Candidate(Threshold(size, size), factor, metrics)  # type: ignore[arg-type]


OFF = point(0, asr=0.60, over=0.15, benign=1.0)


def test_the_levels_follow_the_written_rule() -> None:
    candidates = [
        point(4, asr=0.50, over=0.12, benign=1.0),
        point(8, asr=0.30, over=0.16, benign=1.0),
        point(16, asr=0.29, over=0.30, benign=1.0),
        point(32, asr=0.10, over=0.34, benign=0.99),
        point(64, asr=0.00, over=0.34, benign=0.90),  # loses too many benign answers
        point(128, asr=0.00, over=0.50, benign=1.0),  # refuses too much that is borderline
        point(4, asr=0.20, over=0.00, benign=1.0, factor=3.0),  # factors do not mix within a mask
    ]
    levels, factor = choose(OFF, candidates)
    assert factor == 2.0
    assert {name: each.threshold.num_safety for name, each in levels.items()} == {
        "security-critical": 32,
        "balanced": 8,
        "utility-priority": 4,
    }


def test_a_point_that_leaves_no_room_for_smaller_levels_is_passed_over() -> None:
    lone = point(4, asr=0.0, over=0.1, benign=1.0, factor=3.0)
    candidates = [lone, *(point(size, asr=1 / size, over=0.1, benign=1.0) for size in (2, 4, 8))]
    levels, factor = choose(OFF, candidates)
    assert factor == 2.0
    assert [each.threshold.num_safety for each in levels.values()] == [8, 4, 2]


def test_balanced_leaves_a_smaller_point_for_utility_priority() -> None:
    candidates = [point(2, 0.2, 0.1, 1.0), point(4, 0.3, 0.3, 1.0), point(8, 0.1, 0.4, 1.0)]
    levels, _ = choose(OFF, candidates)
    assert [each.threshold.num_safety for each in levels.values()] == [8, 4, 2]


@pytest.mark.parametrize(
    "candidates",
    [[point(size, asr=0.0, over=0.1, benign=0.5) for size in (2, 4, 8)], [point(4, 0.0, 0.1, 1.0)], []],
    ids=["all break the model", "one alone", "none"],
)
def test_three_harmless_points_are_needed(candidates: list[Candidate]) -> None:
    with pytest.raises(ModelError, match="three of one factor are needed"):
        choose(OFF, candidates)


def test_attribution_and_validation_see_only_the_tune_split_and_share_nothing() -> None:
    families = family_names("harmful", "tune")
    data = attribution_data(families[:-2], seed=0)
    validation = validation_records(families[-2:], seed=0)
    seen = {
        e.prompt
        for group in (data.harmful, *data.attacked.values(), data.benign, data.borderline)
        for e in group
    }
    held = {
        record.prompt
        for kind in ("harmful", "benign", "borderline")
        for family in (None, *family_names(kind, "heldout"))
        for record in records(kind, "heldout", family)
    }
    assert not set(families[-2:]) & set(data.attacked)
    assert {record.split for record in validation} == {"tune"}
    assert not seen & {record.prompt for record in validation}
    assert not (seen | {record.prompt for record in validation}) & held


def test_every_example_has_an_answer_about_its_own_prompt() -> None:
    data = attribution_data(family_names("harmful", "tune")[:-1], seed=0)
    for example in data.harmful + data.benign + data.borderline:
        asked = example.complying.removeprefix("Here is how to ").split(":")[0]
        assert asked in example.prompt, example
    assert all("[redacted" in example.complying for example in data.harmful)
    assert len({len(examples) for examples in data.attacked.values()}) == 1
