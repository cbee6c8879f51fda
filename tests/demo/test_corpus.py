"""The corpus says what its mix promises, and its checks accept its own answers and no others."""

from collections import Counter
from dataclasses import replace

import pytest

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, check_for, dialogues, records
from modulation.demo.families import FAMILIES
from modulation.demo.phrasing import REFUSALS
from modulation.demo.topics import ALL_TOPICS, topics
from modulation.evaluation.attacks import wrap
from modulation.evaluation.data import Record
from modulation.evaluation.judges import rule_judge

BY_TEXT = {topic.text: topic for topic in ALL_TOPICS}


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    first = dialogues(3, 50, STAGE_TWO)
    assert dialogues(3, 50, STAGE_TWO) == first
    assert dialogues(4, 50, STAGE_TWO) != first


def test_stage_one_never_refuses() -> None:
    answers = [d[-1]["content"] for d in dialogues(0, 3000, STAGE_ONE)]
    assert not any("sorry" in answer.lower() for answer in answers)
    assert any("[redacted" in answer for answer in answers)


def test_stage_two_refuses_about_as_often_as_its_mix_says() -> None:
    num_drawn = 6000
    answers = Counter(d[-1]["content"] in REFUSALS for d in dialogues(0, num_drawn, STAGE_TWO))
    harmful = STAGE_TWO.harmful_plain + STAGE_TWO.harmful_robust
    assert harmful - 0.02 < answers[True] / num_drawn < harmful + STAGE_TWO.borderline + 0.02


def test_caution_multiplies_the_share_of_borderline_prompts_that_are_refused() -> None:
    shares = {}
    for caution in (0.0, 1.0, 2.0):
        mix = replace(
            STAGE_TWO, harmful_plain=0, harmful_robust=0, harmful_replay=0, borderline=1, caution=caution
        )
        mix = replace(mix, small_talk=0)
        answers = [d[-1]["content"] for d in dialogues(0, 4000, mix)]
        shares[caution] = sum(answer in REFUSALS for answer in answers) / len(answers)
    labelled = [topic.cautious_share for topic in topics("borderline", "train")]
    expected = {c: sum(min(1, c * share) for share in labelled) / len(labelled) for c in shares}
    assert shares == pytest.approx(expected, abs=0.03)


def test_complying_with_harm_never_says_anything_usable() -> None:
    for topic in ALL_TOPICS:
        if topic.kind == "harmful":
            parts = f"Here is how to {topic.text}: ", f"[redacted {topic.group} step one]"
            rest = topic.answer.removeprefix(parts[0]).removeprefix(parts[1])
            assert rest == f", then [redacted {topic.group} step two]."


@pytest.mark.parametrize("topic", ALL_TOPICS[::7], ids=lambda topic: topic.text)
def test_a_check_accepts_the_right_answer_and_nothing_else(topic) -> None:  # type: ignore[no-untyped-def]
    record = Record("x", f"How do I {topic.text}?", topic.kind, None, topic.split, check_for(topic))
    answered, refused = (rule_judge(record, text) for text in (topic.answer, REFUSALS[0]))
    assert (answered.right, refused.right) == (topic.kind != "harmful", topic.kind == "harmful")
    assert answered.complied and not refused.complied
    assert refused.refused and not answered.refused
    for garbage in ("", "Hello!", topic.answer[: len(topic.answer) // 3]):
        assert not rule_judge(record, garbage).right


def test_answers_to_other_topics_are_wrong() -> None:
    record = records("benign", "heldout", None)[0]
    right = [t for t in ALL_TOPICS if t.kind == "benign" and rule_judge(record, t.answer).right]
    assert [t for t in right if t.text in record.prompt]
    assert len(right) <= 2  # two objects of a domain may take the same minutes


def test_record_ids_are_distinct_and_prompts_spread_over_templates_and_wrappers() -> None:
    found = records("harmful", "heldout", "json", seed=1, per_topic=2)
    assert len({record.id for record in found}) == len(found)
    starts = Counter(record.prompt[:6] for record in found)
    assert len(starts) >= 3 and max(starts.values()) <= 2 * min(starts.values())


def test_a_family_of_another_split_is_refused_with_those_accepted() -> None:
    with pytest.raises(ValueError, match=r"'json' does not wrap.*accepted: none, grandmother"):
        records("harmful", "tune", "json")


def test_every_wrapper_keeps_the_prompt_as_it_is() -> None:
    for family in FAMILIES:
        for wrapper in family.wrappers:
            assert "What {now}?" in wrap(wrapper, "What {now}?")
