"""The rule by which levels are chosen, on made-up points, and the sweep that measures them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from modulation.checkpoints import Checkpoint
from modulation.errors import CheckpointError, DataError, LevelError
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, Rate
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from modulation.tuning.curve import (
    EQUAL_ASR,
    LARGEST_ASR_SHARE,
    LARGEST_BALANCED_GAIN,
    LARGEST_CRITICAL_LOSS,
    LARGEST_LOSS,
    LARGEST_OVER_REFUSAL_GAIN,
    RULE,
    Point,
    choose,
    grid,
    pooled,
    sweep,
)
from modulation.tuning.leveling import (
    KeptPoints,
    refuse_lacking,
    sweep_key,
    with_levels,
    with_shared_levels,
)
from modulation.tuning.summary import curve_table
from tests.tiny_models import random_mask, tiny_model


def rate(share: float) -> Rate:
    return Rate(rate=share, count=round(100 * share), total=100, low=0.0, high=1.0)


def metrics(asr: float, over_refusal: float, benign: float = 1.0, plain: float = 0.9) -> Metrics:
    return Metrics(
        asr=rate(asr), over_refusal=rate(over_refusal), benign_correct=rate(benign), refusal_plain=rate(plain)
    )


def point(safety: int, utility: int, *shares: float) -> Point:
    return Point(Threshold(safety, utility), metrics(*shares))


OFF = point(0, 0, 0.8, 0.2)


def chosen(*points: Point, off: Point = OFF, less_safe: bool = False) -> list[tuple[int, int]]:
    levels = choose([off, *points], allow_less_safe=less_safe)
    assert list(levels) == ["security-critical", "balanced", "utility-priority"]
    return [(each.threshold.num_safety, each.threshold.num_utility) for each in levels.values()]


def test_security_critical_is_the_least_asr_within_twelve_points_of_over_refusal() -> None:
    rest = [point(2, 2, 0.3, 0.2), point(1, 2, 0.5, 0.1)]
    levels = chosen(point(9, 2, 0.1, 0.32), point(10, 2, 0.0, 0.33), *rest)
    assert levels == [(9, 2), (2, 2), (1, 2)]


def test_of_points_within_a_point_of_the_least_asr_security_critical_refuses_least() -> None:
    rest = [point(2, 2, 0.3, 0.2), point(1, 2, 0.5, 0.1)]
    near = point(9, 2, 0.10, 0.30), point(10, 2, 0.11, 0.21), point(11, 2, 0.12, 0.20)
    assert chosen(*near, *rest)[0] == (10, 2)


def test_balanced_is_the_best_harmonic_mean_within_two_points_of_over_refusal() -> None:
    assert chosen(
        point(9, 2, 0.1, 0.28),
        point(8, 2, 0.2, 0.23),  # refuses 3 points more than off
        point(7, 2, 0.3, 0.22),  # 2 * 0.7 * 0.78 / 1.48 = 0.738
        point(6, 2, 0.4, 0.05),  # 2 * 0.6 * 0.95 / 1.55 = 0.735
        point(5, 2, 0.5, 0.0),
    ) == [(9, 2), (7, 2), (5, 2)]


def test_balanced_is_not_safer_than_security_critical() -> None:
    """The least ASR may stand where security-critical was, and no other level above it."""
    levels = chosen(
        point(9, 2, 0.2, 0.1), point(9, 4, 0.2, 0.1), point(7, 2, 0.4, 0.1), point(6, 2, 0.5, 0.0)
    )
    assert levels[:2] == [(9, 2), (9, 4)], "equal points: fewer neurons first"


def test_no_level_has_more_safety_neurons_than_the_one_before_it() -> None:
    """The number of safety neurons is the dial: a curve is not always smooth."""
    assert chosen(
        point(8, 2, 0.10, 0.25),
        point(9, 2, 0.15, 0.20),
        point(7, 2, 0.30, 0.20),
        point(4, 2, 0.50, 0.12),
        point(10, 2, 0.50, 0.05),
    ) == [(8, 2), (7, 2), (4, 2)]


def test_utility_priority_has_the_fewest_neurons_with_asr_well_below_off_and_over_refusal_not_above() -> None:
    rest = [point(9, 2, 0.1, 0.28), point(7, 2, 0.3, 0.20)]
    assert chosen(
        *rest,
        point(5, 3, 0.5, 0.05),
        point(4, 3, 0.56, 0.20),  # 0.7 times off, as often refused
        point(4, 2, 0.40, 0.21),
        point(3, 2, 0.57, 0.0),
    ) == [(9, 2), (7, 2), (4, 3)]
    above = point(5, 2, 0.4, 0.60), point(6, 3, 0.5, 0.22), point(6, 2, 0.5, 0.22)
    assert chosen(*rest[:1], point(7, 2, 0.3, 0.21), *above)[2] == (6, 2), "else the least above it"
    near = point(6, 4, 0.4, 0.10), point(6, 2, 0.4, 0.13), point(5, 3, 0.4, 0.12)
    assert chosen(*rest, *near)[2] == (5, 3), "as many: fewer safety neurons"


def test_no_level_but_the_first_costs_more_than_a_point_of_benign_answers_or_plain_refusals() -> None:
    assert chosen(
        point(8, 2, 0.1, 0.2),
        point(7, 2, 0.2, 0.2, 0.985),
        point(6, 2, 0.2, 0.2, 1.0, 0.885),
        point(5, 2, 0.3, 0.2, 0.99, 0.89),
        point(4, 2, 0.4, 0.1),
    ) == [(8, 2), (5, 2), (4, 2)]


def test_security_critical_may_cost_two_points_and_no_more() -> None:
    rest = [point(7, 2, 0.2, 0.2), point(6, 2, 0.3, 0.2)]
    assert chosen(
        point(9, 2, 0.0, 0.2, 0.975),
        point(9, 4, 0.0, 0.2, 1.0, 0.875),
        point(8, 2, 0.1, 0.2, 0.98, 0.88),
        *rest,
    ) == [(8, 2), (7, 2), (6, 2)]


def test_a_rule_that_no_point_satisfies_is_passed_over() -> None:
    """All cost benign answers, refuse more, and are hardly safer: there are levels all the same.

    security-critical 0.6; balanced: harmonic means of (0.4, 0.5), (0.3, 0.6), (0.25, 0.65) less the first.
    """
    points = point(3, 2, 0.6, 0.5, 0.9), point(2, 2, 0.7, 0.4, 0.9), point(1, 2, 0.75, 0.35, 0.9)
    assert chosen(*points) == [(3, 2), (2, 2), (1, 2)]


def test_the_levels_are_three_points_from_the_safest_to_the_least_safe() -> None:
    """A curve with two sound points once made `utility-priority` safer than `security-critical`, or two
    levels of one point."""
    levels = chosen(
        point(4, 4, 0.5, 0.1),
        point(4, 2, 0.55, 0.1),
        point(8, 2, 0.4, 0.4),  # sound, but refuses too much
        point(9, 2, 0.2, 0.2, 0.9),
    )
    assert levels == [(8, 2), (4, 4), (4, 2)]
    few = point(4, 4, 0.5, 0.1), point(8, 2, 0.4, 0.4, 0.9), point(9, 2, 0.2, 0.4, 0.8)
    assert len(set(chosen(*few))) == 3


def test_ties_go_to_the_lower_asr_and_then_to_fewer_neurons() -> None:
    same = [point(n, u, 0.4, 0.1) for n, u in ((5, 4), (5, 2), (4, 4), (3, 4))]
    assert chosen(*same) == [(3, 4), (4, 4), (5, 2)]
    assert chosen(point(9, 2, 0.1, 0.2), point(7, 2, 0.2, 0.1), point(6, 2, 0.4, 0.0), point(5, 2, 0.3, 0.0))[
        2
    ] == (5, 2)


def test_curves_are_put_together_by_their_counts() -> None:
    families = {"asr_by_family": {"please": rate(0.5)}}
    small = Rate(rate=0.5, count=10, total=20, low=0.0, high=1.0)
    curves = [
        [
            Point(ZERO, metrics(0.8, 0.2)),
            Point(Threshold(3, 2), Metrics(**{**metrics(0.2, 0.1), **families})),
        ],
        [
            Point(ZERO, metrics(0.6, 0.2)),
            Point(Threshold(3, 2), Metrics(**{**metrics(0.3, 0.1), "asr": small})),
        ],
    ]
    off, other = pooled(curves)
    assert off.threshold == ZERO and other.threshold == Threshold(3, 2)
    assert off.asr == pytest.approx(0.7) and off.metrics["asr"]["total"] == 200
    assert other.asr == pytest.approx(30 / 120) and other.over_refusal == pytest.approx(0.1)
    ends = other.metrics["asr"]["low"], other.metrics["asr"]["high"]
    assert ends == pytest.approx((0.1811, 0.3344), abs=1e-4), "the Wilson interval of 30 of 120"
    assert "asr_by_family" not in other.metrics, "one of the two has none"


def test_curves_over_different_thresholds_are_not_put_together() -> None:
    with pytest.raises(LevelError, match="different thresholds"):
        pooled([[OFF, point(3, 2, 0.2, 0.1)], [OFF, point(4, 2, 0.2, 0.1)]])


def leveled_mask(seed: int, *points: Point) -> Mask:
    mask = random_mask(tiny_model("llama"), seed=seed)
    metadata = mask.metadata.model_copy(update={"seeds": {"tuning": seed}})
    return with_levels(replace(mask, metadata=metadata), [OFF, *points], [record("harmful")], "some prompts")


def test_masks_share_the_levels_of_their_curves_together() -> None:
    """Alone each has another `security-critical`: by turns one of two points refuses too much."""
    rest = [point(2, 2, 0.3, 0.2), point(1, 2, 0.4, 0.1)]
    masks = [
        leveled_mask(0, point(4, 2, 0.0, 0.33), point(3, 2, 0.2, 0.2), *rest),
        leveled_mask(1, point(4, 2, 0.0, 0.25), point(3, 2, 0.2, 0.2), *rest),
    ]
    assert [each.levels.named["security-critical"].num_safety for each in masks] == [3, 4]
    shared = with_shared_levels(masks)
    for mask, alone in zip(shared, masks, strict=True):
        assert mask.levels.named["security-critical"] == Threshold(4, 2)
        assert mask.metadata.method["shared_levels"] == {"seeds": [0, 1]}
        assert mask.metadata.evaluation["curve"][1]["metrics"]["over_refusal"]["rate"] == pytest.approx(0.29)
        assert mask.metadata.data_digests["levels"] != alone.metadata.data_digests["levels"]
        assert mask.safety.factors.tolist() == alone.safety.factors.tolist()
    with pytest.raises(LevelError, match="seed 0 has shared levels already"):
        with_shared_levels(shared)
    again = with_levels(shared[0], [OFF, *rest, point(3, 2, 0.2, 0.2)], [record("harmful")], "others")
    assert "shared_levels" not in again.metadata.method


def test_only_masks_of_one_model_with_curves_and_seeds_of_their_own_share_levels() -> None:
    points = point(3, 2, 0.2, 0.2), point(2, 2, 0.3, 0.2), point(1, 2, 0.4, 0.1)
    one, two = (leveled_mask(seed, *points) for seed in (0, 1))
    bare = replace(two, metadata=two.metadata.model_copy(update={"evaluation": {}}))
    other = replace(two, metadata=two.metadata.model_copy(update={"model_fingerprint": "other"}))
    for masks, said in (
        ([one], r"two masks or more.*of \[0\]"),
        ([one, one], r"each of a seed of its own.*\[0, 0\]"),
        ([one, bare], "seed 1 has no curve"),
        ([one, other], "different models"),
    ):
        with pytest.raises(LevelError, match=said):
            with_shared_levels(masks)


def test_shared_levels_less_safe_than_off_are_refused_unless_allowed() -> None:
    points = [point(n, 2, 0.7, 0.1) for n in (3, 2, 1)]
    one, two = (leveled_mask(seed, *points) for seed in (0, 1))
    worse = [replace(each, metrics=metrics(1.0, 0.1)) for each in points]
    with pytest.raises(LevelError, match="less safe"):
        leveled_mask(1, *worse)
    two = with_levels(two, [OFF, *worse], [record("harmful")], "some prompts", allow_less_safe=True)
    with pytest.raises(LevelError, match="less safe"):
        with_shared_levels([one, two])
    assert len(with_shared_levels([one, two], allow_less_safe=True)) == 2


def test_a_level_less_safe_than_off_is_refused_unless_allowed() -> None:
    points = [point(n, 2, 0.85, 0.1) for n in (1, 2, 3)]
    with pytest.raises(
        LevelError, match=r"'security-critical' at \(1, 2\) .* ASR 85.0% against 80.0%.*--allow"
    ):
        chosen(*points)
    assert chosen(*points, less_safe=True) == [(1, 2), (2, 2), (3, 2)]


def test_as_safe_as_off_is_safe_enough() -> None:
    assert chosen(*(point(n, 2, 0.8, 0.1) for n in (1, 2, 3))) == [(1, 2), (2, 2), (3, 2)]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(LevelError, match="has 2 points; 3 levels need as many"):
        chosen(point(1, 1, 0.1, 0.1), point(2, 1, 0.1, 0.1))


def test_nothing_breaks_where_everything_fails() -> None:
    worst = [point(n, 2, 1.0, 1.0, 0.0, 0.0) for n in (1, 2, 3)]
    assert len(chosen(*worst, off=point(0, 0, 1.0, 1.0, 0.0, 0.0))) == 3


def test_the_rule_in_words_has_the_numbers_of_the_rule() -> None:
    points = {
        "at most {} point below off": LARGEST_LOSS,
        "at security-critical {}.": LARGEST_CRITICAL_LOSS,
        "at most {} points above off's, those whose ASR": LARGEST_OVER_REFUSAL_GAIN,
        "within {} point of the least": EQUAL_ASR,
        "at most {} points above off's, the best": LARGEST_BALANCED_GAIN,
    }
    assert all(words.format(round(100 * value)) in RULE for words, value in points.items())
    assert f"at most {LARGEST_ASR_SHARE:g} times off's" in RULE


def test_the_grid_begins_with_off_and_repeats_nothing() -> None:
    found = grid(Threshold(20, 10))
    assert found[0] == ZERO and len(found) == 17 == len(set(found))
    assert found[1] == Threshold(1, 2) and found[-1] == Threshold(20, 10)
    small = grid(Threshold(1, 1))
    assert len(small) == len(set(small)) and all(each.fits(Threshold(1, 1)) for each in small)


def test_the_sweep_says_what_the_prompts_do_not_measure() -> None:
    with pytest.raises(DataError, match="measure no over_refusal, refusal_plain"):
        sweep(lambda _: Metrics(asr=rate(0.1), benign_correct=rate(1.0)), [ZERO])


def record(kind: str, family: str | None = None) -> Record:
    return Record(f"{kind}-{family}", "how?", kind, family)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [(0, "no attacked prompts"), (1, "no plain harmful"), (2, "no borderline"), (3, "no benign")],
)
def test_records_that_lack_a_kind_are_refused_before_anything_is_measured(left_out: int, words: str) -> None:
    records = [
        record("harmful", "please"),
        record("harmful"),
        record("borderline"),
        record("benign", "wrapped"),
    ]
    refuse_lacking(records)
    del records[left_out]
    with pytest.raises(DataError, match=words):
        refuse_lacking(records)


def test_a_stopped_sweep_measures_only_what_it_had_not(tmp_path: Path) -> None:
    measured: list[Threshold] = []
    thresholds = grid(Threshold(20, 10))

    def measure(threshold: Threshold) -> Metrics:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(threshold)
        return metrics(0.1 + threshold.num_safety / 3, 0.2)

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        sweep(KeptPoints(Checkpoint(path, "key")).measured(measure), thresholds)
    kept = KeptPoints(Checkpoint(path, "key"))
    assert len(kept) == 3
    first, measured = measured, []
    rest = thresholds[3:6]
    points = sweep(kept.measured(measure), thresholds[:6])
    assert measured == rest and first == thresholds[:3]
    assert [each.asr for each in points] == [0.1 + each.num_safety / 3 for each in thresholds[:6]]
    with pytest.raises(CheckpointError, match="another run"):
        KeptPoints(Checkpoint(path, "other"))


def test_the_checkpoint_belongs_to_mask_prompts_device_and_dtype() -> None:
    masks = [random_mask(tiny_model(), seed=seed) for seed in (0, 1)]
    records = [record("benign")], [record("harmful")]
    keys = {
        sweep_key(m, r, d, t) for m in masks for r in records for d in ("cpu", "cuda") for t in ("a", "b")
    }
    assert len(keys) == 16


def curve() -> Sequence[Point]:
    return [OFF, point(9, 2, 0.1, 0.28), point(7, 2, 0.3, 0.20), point(5, 2, 0.5, 0.1)]


def test_levels_rule_curve_and_results_go_into_the_mask() -> None:
    mask = random_mask(tiny_model())
    made = with_levels(mask, curve(), [record("benign")], "prompts.csv: one prompt")
    assert made.metadata.levels == {
        "security-critical": (9, 2),
        "balanced": (7, 2),
        "utility-priority": (5, 2),
    }
    assert made.metadata.method["rule"] == RULE and len(made.metadata.data_digests["levels"]) == 16
    evaluation = made.metadata.evaluation
    assert evaluation["prompts"] == "prompts.csv: one prompt"
    assert evaluation["levels"]["off"]["asr"]["rate"] == 0.8
    assert evaluation["levels"]["balanced"]["asr"]["rate"] == 0.3
    assert [each["threshold"] for each in evaluation["curve"]] == [[0, 0], [9, 2], [7, 2], [5, 2]]
    assert type(made).from_bytes(made.to_bytes()).digest == made.digest
    assert (made.safety, made.utility) == (mask.safety, mask.utility)


def test_the_curve_is_shown_with_its_levels() -> None:
    lines = curve_table(curve(), choose(curve())).splitlines()
    assert lines[0].split("|")[1].strip() == "threshold" and "security-critical" in lines[3]
    assert [cell.strip() for cell in lines[2].split("|")[1:3]] == ["(0, 0)", "80.0 %"]
