"""The three splits share no topic, no template and no family, and training sees only `train`."""

import itertools

import pytest

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, Mix, dialogues, family_names, records
from modulation.demo.families import FAMILIES
from modulation.demo.phrasing import TEMPLATES
from modulation.demo.topics import ALL_TOPICS, KINDS, SPLITS, Kind, Split, topics

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


@pytest.mark.parametrize("mix", [STAGE_ONE, STAGE_TWO], ids=["stage one", "stage two"])
def test_training_text_holds_nothing_of_tune_or_heldout(mix: Mix) -> None:
    text = "\n".join(
        message["content"] for dialogue in dialogues(7, NUM_DIALOGUES, mix) for message in dialogue
    )
    unseen = [t.text for t in ALL_TOPICS if t.split != "train"]
    unseen += [p for s in ("tune", "heldout") for t in TEMPLATES[s] for p in _distinctive(t)]
    unseen += [
        p for f in FAMILIES if f.split != "train" for w in f.wrappers for p in _distinctive(w)
    ]
    for piece in unseen:
        # a longer object may begin with a shorter one: "sell crack" in "sell crack cocaine"
        assert not _stands_alone(piece, text), piece


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


def test_every_verb_and_every_object_of_a_held_out_topic_was_trained_in_another_pair() -> None:
    trained = " | ".join(topic.text for topic in ALL_TOPICS if topic.split == "train")
    for topic in ALL_TOPICS:
        words = topic.text.split()
        halves = [(" ".join(words[:n]), " ".join(words[n:])) for n in range(1, len(words))]
        assert any(verb in trained and thing in trained for verb, thing in halves), topic.text
