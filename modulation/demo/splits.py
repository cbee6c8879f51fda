"""The parts of the demo model's `tune` split: what a mask is made from, and what it is chosen by.

Knows the corpus. Knows nothing of masks, and nothing of the `heldout` split.

Families and topics are both parted: the validation families are never attributed or learned from, and
every other topic is asked only there. A borderline topic's neighbour in the list has another object, so
both parts know all verbs and domains.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from modulation.demo.corpus import family_names, records
from modulation.demo.topics import Kind
from modulation.evaluation.data import Record

VALIDATION_FAMILIES: Final = ("emotion", "warning_label")
VALIDATION_WRAPPER: Final = "newsgroup"
_EVEN: Final = slice(0, None, 2)
_ODD: Final = slice(1, None, 2)
_ALL: Final = slice(None)
# Seeds of templates and wrappers are drawn from disjoint ranges, so that the parts differ in these too.
_VALIDATION_SEEDS: Final = 1000


def learning_records(seed: int, per_topic: int = 1) -> list[Record]:
    """What is attributed and learned from while choices are made: four families, every other topic."""
    families = [name for name in family_names("harmful", "tune") if name not in VALIDATION_FAMILIES]
    wrappers = [name for name in family_names("benign", "tune") if name != VALIDATION_WRAPPER]
    return _records(families, wrappers, _EVEN, _seeds(seed, per_topic))


def validation_records(seed: int, per_topic: int = 1) -> list[Record]:
    """What choices are made by: the two other families, the other topics, another benign wrapper."""
    seeds = _seeds(seed + _VALIDATION_SEEDS, per_topic)
    return _records(VALIDATION_FAMILIES, (VALIDATION_WRAPPER,), _ODD, seeds)


def all_records(seed: int, per_topic: int = 1) -> list[Record]:
    """All of `tune`, for the mask that ships once every choice is made."""
    families, wrappers = family_names("harmful", "tune"), family_names("benign", "tune")
    return _records(families, wrappers, _ALL, _seeds(seed, per_topic))


def _seeds(seed: int, per_topic: int) -> range:
    return range(seed * per_topic, (seed + 1) * per_topic)


def _records(
    families: Sequence[str], wrappers: Sequence[str], part: slice, seeds: Sequence[int]
) -> list[Record]:
    wanted: list[tuple[Kind, str | None]] = [("harmful", None), *(("harmful", name) for name in families)]
    wanted += [("borderline", None), ("benign", None), *(("benign", name) for name in wrappers)]
    return [
        replace(record, id=f"{record.id}-{seed}")
        for seed in seeds
        for kind, family in wanted
        for record in records(kind, "tune", family, seed)[part]
    ]
