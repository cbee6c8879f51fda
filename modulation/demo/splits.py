"""The parts of the demo model's `tune` split: what a mask is made from, and what it is chosen by.

Knows the corpus. Knows nothing of masks, and nothing of the `heldout` split.

A *fold* parts families, topics and templates in two: its validation families are never attributed or learned
from, and a quarter of the topics, drawn once, and every third template are asked only in its validation part.
No two folds share any of these, so all of them together choose by more than one can keep aside. Borderline
and benign topics of a validation part are, as in the `heldout` split, verbs and objects known from elsewhere,
put together otherwise: a word of the validation part alone would ask for more than `heldout` does. Most
harmful objects have one topic each, so they may be new.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from modulation.demo.corpus import family_names, records
from modulation.demo.phrasing import TEMPLATES
from modulation.demo.topics import KINDS, Kind, Topic, topics
from modulation.evaluation.data import Record


@dataclass(frozen=True)
class Fold:
    """What asks only in a validation part: attack families, a benign wrapper, and every third template from
    this one on."""

    families: tuple[str, ...]
    wrapper: str
    first_template: int


FOLDS: Final = (
    Fold(("emotion", "warning_label", "markup", "translation", "flattery"), "newsgroup", 2),
    Fold(("grandmother", "classroom", "spreadsheet", "verse", "threat"), "radio", 1),
)
_VALIDATION_SHARE: Final = 0.25
_TOPICS_SEED: Final = 0
_VALIDATION_TEMPLATE_EVERY: Final = 3
# Validation draws which template asks about which topic by seeds of its own.
_VALIDATION_SEEDS: Final = 1000


def learning_records(seed: int, per_topic: int = 1, fold: int = 0) -> list[Record]:
    """What is attributed and learned from while choices are made: most families, most topics."""
    kept = FOLDS[fold]
    families = [name for name in family_names("harmful", "tune") if name not in kept.families]
    wrappers = [name for name in family_names("benign", "tune") if name != kept.wrapper]
    return _records(families, wrappers, fold, (False,), _seeds(seed, per_topic))


def validation_records(seed: int, per_topic: int = 1, fold: int = 0) -> list[Record]:
    """What choices are made by: the other families, topics and templates, another benign wrapper."""
    seeds = _seeds(seed + _VALIDATION_SEEDS, per_topic)
    return _records(FOLDS[fold].families, (FOLDS[fold].wrapper,), fold, (True,), seeds)


def all_records(seed: int, per_topic: int = 1) -> list[Record]:
    """All of `tune`, for the mask that ships once every choice is made."""
    families, wrappers = family_names("harmful", "tune"), family_names("benign", "tune")
    return _records(families, wrappers, 0, (False, True), _seeds(seed, per_topic))


def _seeds(seed: int, per_topic: int) -> range:
    return range(seed * per_topic, (seed + 1) * per_topic)


def _records(
    families: Sequence[str], wrappers: Sequence[str], fold: int, parts: Sequence[bool], seeds: Sequence[int]
) -> list[Record]:
    """Of the parts of topics and templates that are named: validation (True), learning (False), or both."""
    wanted: list[tuple[Kind, str | None]] = [("harmful", None), *(("harmful", name) for name in families)]
    wanted += [("borderline", None), ("benign", None), *(("benign", name) for name in wrappers)]
    templates = [each for row, each in enumerate(TEMPLATES["tune"]) if _validates(row, fold) in parts]
    validating = _validation_topics()[fold]
    return [
        replace(record, id=f"{record.id}-{seed}")
        for seed in seeds
        for kind, family in wanted
        for topic, record in zip(
            topics(kind, "tune"), records(kind, "tune", family, seed, templates=templates), strict=True
        )
        if (topic in validating) in parts
    ]


def _validates(row: int, fold: int) -> bool:
    """Whether a template asks in the fold's validation part only."""
    return row % _VALIDATION_TEMPLATE_EVERY == FOLDS[fold].first_template


@cache
def _validation_topics() -> tuple[frozenset[Topic], ...]:
    """Those of each fold, drawn in random order; each if its words still have another topic to be learned
    from."""
    of_kind = {kind: topics(kind, "tune") for kind in KINDS}
    order = [topic for each in of_kind.values() for topic in each]
    random.Random(_TOPICS_SEED).shuffle(order)
    folds: list[frozenset[Topic]] = []
    for _ in FOLDS:
        missing = {kind: round(_VALIDATION_SHARE * len(each)) for kind, each in of_kind.items()}
        left = Counter(word for topic in order for word in _words(topic))
        drawn: list[Topic] = []
        for topic in order:
            free = not any(topic in fold for fold in folds)
            if free and missing[topic.kind] and all(left[word] > 1 for word in _words(topic)):
                drawn.append(topic)
                missing[topic.kind] -= 1
                left.subtract(_words(topic))
        assert not any(missing.values()), "too few topics are known from elsewhere"
        folds.append(frozenset(drawn))
    return tuple(folds)


def _words(topic: Topic) -> tuple[str, ...]:
    """What must be known from elsewhere: of topics that are asked for help with, the verb and the object."""
    return () if topic.kind == "harmful" else (topic.verb, topic.thing)
