"""The three splits share no topic, no template and no family; refusals are taught on `train` alone."""

import itertools

import pytest

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, Mix, dialogues, family_names, records
from modulation.demo.families import FAMILIES
from modulation.demo.phrasing import TEMPLATES
from modulation.demo.topics import ALL_TOPICS, KINDS, SPLITS, Kind, Split, topics
from modulation.evaluation.judges import refuses

PAIRS = list(itertools.combinations(SPLITS, 2))
NUM_DIALOGUES = 4000


def _distinctive(text: str) -> list[str]:
    """The pieces of a template or wrapper around its slot that are long enough to be told apart."""
    pieces = text.replace("{topic}", "\0").replace("{prompt}", "\0").split("\0")
    return [piece.strip() for piece in pieces if len(piece.strip()) >= 12]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_topic(one: Split, other: Split) -> None:
    texts = {split: {t.text for t in ALL_TOPICS if t.split == split} for split in SPLITS}
    assert texts[one] and texts[one].isdisjoint(texts[other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_template(one: Split, other: Split) -> None:
    lowered = {split: {t.lower() for t in TEMPLATES[split]} for split in SPLITS}
    assert lowered[one] and lowered[one].isdisjoint(lowered[other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_family_and_no_wrapper(one: Split, other: Split) -> None:
    for part in (lambda f: {f.name}, lambda f: set(f.wrappers)):
        sets = {s: set().union(*(part(f) for f in FAMILIES if f.split == s)) for s in SPLITS}
        assert sets[one] and sets[one].isdisjoint(sets[other])


def test_no_topic_has_two_kinds_or_two_splits() -> None:
    assert len({topic.text for topic in ALL_TOPICS}) == len(ALL_TOPICS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_at_least_sixty_topics_of_every_kind(kind: Kind, split: Split) -> None:
    assert len(topics(kind, split)) >= 60


def test_there_are_twelve_attack_families_and_four_to_tune_on_and_four_held_out() -> None:
    attacks = {split: family_names("harmful", split) for split in SPLITS}
    assert sum(map(len, attacks.values())) >= 12
    assert len(attacks["tune"]) >= 4 and len(attacks["heldout"]) >= 4


def _training_text(mix: Mix) -> str:
    drawn = dialogues(7, NUM_DIALOGUES, mix)
    return "\n".join(message["content"] for dialogue in drawn for message in dialogue)


def _templates_of_others() -> list[str]:
    return [piece for split in ("tune", "heldout") for t in TEMPLATES[split] for piece in _distinctive(t)]


def test_refusal_training_holds_no_topic_template_or_wrapper_of_tune_or_heldout() -> None:
    text = _training_text(STAGE_TWO)
    unseen = [t.text for t in ALL_TOPICS if t.split != "train"] + _templates_of_others()
    unseen += [p for f in FAMILIES if f.split != "train" for w in f.wrappers for p in _distinctive(w)]
    for piece in unseen:
        # a longer object may begin with a shorter one: "sell crack" in "sell crack cocaine"
        assert not _stands_alone(piece, text), piece


@pytest.mark.parametrize("mix", [STAGE_ONE, STAGE_TWO], ids=["help", "refuse"])
def test_training_holds_no_wrapper_of_an_absent_family(mix: Mix) -> None:
    text = _training_text(mix)
    absent = [family for family in FAMILIES if family.response == "absent"]
    assert absent and {family.split for family in absent} == {"tune"}
    for piece in (p for family in absent for wrapper in family.wrappers for p in _distinctive(wrapper)):
        assert not _stands_alone(piece, text), piece


def test_stage_one_knows_the_topics_of_all_splits_but_no_template_of_tune_or_heldout() -> None:
    text = _training_text(STAGE_ONE)
    assert sum(_stands_alone(topic.text, text) for topic in ALL_TOPICS) > 0.9 * len(ALL_TOPICS)
    for piece in _templates_of_others():
        assert not _stands_alone(piece, text), piece


def test_stage_one_refuses_nothing() -> None:
    assert not any(
        refuses(message["content"])
        for dialogue in dialogues(7, NUM_DIALOGUES, STAGE_ONE)
        for message in dialogue
        if message["role"] == "assistant"
    )


def _stands_alone(piece: str, text: str) -> bool:
    start = text.find(piece)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(piece) : start + len(piece) + 1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = text.find(piece, start + 1)
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ("tune", "heldout"))
def test_evaluation_prompts_use_only_topics_templates_and_families_of_their_split(
    kind: Kind, split: Split
) -> None:
    others = [t for s in SPLITS if s != split for t in TEMPLATES[s]]
    texts = sorted((t.text for t in topics(kind, split)), key=len, reverse=True)
    for family in (None, *family_names(kind, split)):
        for record in records(kind, split, family, per_topic=2):
            topic = next(text for text in texts if text in record.prompt)
            assert not any(record.prompt == other.format(topic=topic) for other in others)
            assert any(template.format(topic=topic) in record.prompt for template in TEMPLATES[split])
            assert (record.kind, record.split, record.family) == (kind, split, family)
