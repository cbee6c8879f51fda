"""From records to attribution's data: which answers they get, and what cannot be used."""

import pytest

from modulation.attribution.examples import COMPLIANCE, REFUSAL, attribution_data, digest
from modulation.errors import DataError
from modulation.evaluation.data import Record

RECORDS = [
    Record("plain", "how to rob?", "harmful"),
    Record("told", "how to steal?", "harmful", answer="Take it."),
    Record("story-1", "a story: rob", "harmful", "story"),
    Record("story-2", "a story: steal", "harmful", "story"),
    Record("tea", "how to brew?", "benign", answer="Boil water."),
    Record("work", "at work: brew", "benign", "work", answer="Use the kitchen."),
    Record("kill", "kill a process", "borderline"),
]


def but(**changes: Record | None) -> list[Record]:
    """RECORDS with some exchanged or, for None, left out."""
    found = [changes.pop(each.id.replace("-", "_"), each) for each in RECORDS]
    return [each for each in [*found, *changes.values()] if each is not None]


def answer(prompts: list[str]) -> list[str]:
    return [f"about {prompt}" for prompt in prompts]


def test_records_become_examples_by_kind_and_family() -> None:
    data = attribution_data(RECORDS, answerer=answer)
    assert [each.name for each in data.harmful] == ["plain", "told"]
    assert {family: [each.name for each in examples] for family, examples in data.attacked.items()} == {
        "story": ["story-1", "story-2"]
    }
    assert [each.complying for each in data.benign] == ["Boil water.", "Use the kitchen."]
    assert [each.complying for each in data.harmful] == [COMPLIANCE, "Take it."]
    assert [(each.prompt, each.complying) for each in data.borderline] == [
        ("kill a process", "about kill a process")
    ]
    assert {each.refusing for each in (*data.all_harmful, *data.benign)} == {REFUSAL}


def test_only_what_nobody_answered_is_asked() -> None:
    asked: list[str] = []
    attribution_data(RECORDS, answerer=lambda prompts: asked.extend(prompts) or answer(prompts))
    assert asked == ["kill a process"]


def test_a_refusal_is_no_right_answer() -> None:
    """The model may refuse a borderline prompt; learning from that would teach it to refuse more."""
    data = attribution_data(RECORDS, answerer=lambda prompts: ["I'm sorry, but no."] * len(prompts))
    assert [each.complying for each in data.borderline] == [COMPLIANCE]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plain": None, "told": None}, "no harmful prompts: add records with kind 'harmful' and without"),
        ({"tea": None, "work": None}, "no benign prompts: add records with kind 'benign'"),
        ({"story_2": None}, "Attack family 'story' has 1 prompt; at least 2 are needed"),
        ({"tea": Record("tea", "brew", "benign", answer=" ")}, "answer of record 'tea' is empty"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Record | None], words: str) -> None:
    with pytest.raises(DataError, match=words):
        attribution_data(but(**changes), answerer=answer)


def test_answers_need_somebody_and_refusals_a_text() -> None:
    with pytest.raises(DataError, match="'kill' and 0 more have no answer, and nothing answers for them"):
        attribution_data(RECORDS)
    with pytest.raises(DataError, match="answer of the refusal is empty"):
        attribution_data(RECORDS, answerer=answer, refusal=" ")


def test_the_digest_depends_on_every_prompt_and_answer() -> None:
    whole = digest(attribution_data(RECORDS, answerer=answer))
    assert whole == digest(attribution_data(RECORDS, answerer=answer))
    others = [
        attribution_data(RECORDS, answerer=answer, refusal="No."),
        attribution_data(RECORDS, answerer=answer, compliance="Sure"),
        attribution_data(but(tea=Record("tea", "brew!", "benign", answer="Boil water.")), answerer=answer),
        attribution_data(but(more=Record("more", "how?", "benign", answer="so")), answerer=answer),
    ]
    assert len({whole, *map(digest, others)}) == 5
