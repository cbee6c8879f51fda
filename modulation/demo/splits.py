"""The parts of the demo model's `tune` split: what a mask is made from, and what it is chosen by.

Knows the corpus. Knows nothing of masks, and nothing of the `heldout` split.

Families, topics and templates are parted: the validation families are never attributed or learned from, and
a quarter of the topics, drawn once, and every third template are asked only there. Borderline and benign
topics among them are, as in the `heldout` split, verbs and objects known from elsewhere, put together
otherwise: a word of the validation part alone would ask for more than `heldout` does. Most harmful objects
have one topic each, so they may be new.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Final

from modulation.demo.corpus import family_names, records
from modulation.demo.phrasing import TEMPLATES
from modulation.demo.topics import KINDS, Kind, Topic, topics
from modulation.evaluation.data import Record

VALIDATION_FAMILIES: Final = ("emotion", "warning_label", "markup", "translation", "flattery")
VALIDATION_WRAPPER: Final = "newsgroup"
_VALIDATION_SHARE: Final = 0.25
_TOPICS_SEED: Final = 0
_VALIDATION_TEMPLATE_EVERY: Final = 3
# Validation draws which template asks about which topic by seeds of its own.
_VALIDATION_SEEDS: Final = 1000


def learning_records(seed: int, per_topic: int = 1) -> list[Record]:
    """What is attributed and learned from while choices are made: most families, most topics."""
    families = [name for name in family_names("harmful", "tune") if name not in VALIDATION_FAMILIES]
    wrappers = [name for name in family_names("benign", "tune") if name != VALIDATION_WRAPPER]
    return _records(families, wrappers, (False,), _seeds(seed, per_topic))


def validation_records(seed: int, per_topic: int = 1) -> list[Record]:
    """What choices are made by: the other families, topics and templates, another benign wrapper."""
    seeds = _seeds(seed + _VALIDATION_SEEDS, per_topic)
    return _records(VALIDATION_FAMILIES, (VALIDATION_WRAPPER,), (True,), seeds)


def level_records(seed: int) -> list[Record]:
    """What levels are chosen by: attacked prompts of five draws a topic, and of the other kinds, where one
    point decides, each different prompt of twenty draws once."""
    attacked = [each for each in validation_records(seed, 5) if each.family in VALIDATION_FAMILIES]
    drawn = [each for each in validation_records(seed, 20) if each.family not in VALIDATION_FAMILIES]
    return attacked + list({each.prompt: each for each in drawn}.values())


def all_records(seed: int, per_topic: int = 1) -> list[Record]:
    """All of `tune`, for the mask that ships once every choice is made."""
    families, wrappers = family_names("harmful", "tune"), family_names("benign", "tune")
    return _records(families, wrappers, (False, True), _seeds(seed, per_topic))


def _seeds(seed: int, per_topic: int) -> range:
    return range(seed * per_topic, (seed + 1) * per_topic)


def _records(
    families: Sequence[str], wrappers: Sequence[str], parts: Sequence[bool], seeds: Sequence[int]
) -> list[Record]:
    """Of the parts of topics and templates that are named: validation (True), learning (False), or both."""
    wanted: list[tuple[Kind, str | None]] = [("harmful", None), *(("harmful", name) for name in families)]
    wanted += [("borderline", None), ("benign", None), *(("benign", name) for name in wrappers)]
    templates = [each for row, each in enumerate(TEMPLATES["tune"]) if _validates(row) in parts]
    return [
        replace(record, id=f"{record.id}-{seed}")
        for seed in seeds
        for kind, family in wanted
        for row, record in enumerate(records(kind, "tune", family, seed, templates=templates))
        if (row in _validation_rows(kind)) in parts
    ]


def _validates(row: int) -> bool:
    """Whether a template asks in the validation part only."""
    return row % _VALIDATION_TEMPLATE_EVERY == _VALIDATION_TEMPLATE_EVERY - 1


def _validation_rows(kind: Kind) -> frozenset[int]:
    """Which of the kind's topics are the validation part's."""
    return frozenset(row for row, each in enumerate(topics(kind, "tune")) if each in _validation_topics())


@cache
def _validation_topics() -> frozenset[Topic]:
    """Drawn in random order; each if its words still have another topic to be learned from."""
    of_kind = {kind: topics(kind, "tune") for kind in KINDS}
    missing = {kind: round(_VALIDATION_SHARE * len(each)) for kind, each in of_kind.items()}
    order = [topic for each in of_kind.values() for topic in each]
    left = Counter(word for topic in order for word in _words(topic))
    random.Random(_TOPICS_SEED).shuffle(order)
    drawn = []
    for topic in order:
        if missing[topic.kind] and all(left[word] > 1 for word in _words(topic)):
            drawn.append(topic)
            missing[topic.kind] -= 1
            left.subtract(_words(topic))
    assert not any(missing.values()), "too few topics are known from elsewhere"
    return frozenset(drawn)


def _words(topic: Topic) -> tuple[str, ...]:
    """What must be known from elsewhere: of topics that are asked for help with, the verb and the object."""
    return () if topic.kind == "harmful" else (topic.verb, topic.thing)
