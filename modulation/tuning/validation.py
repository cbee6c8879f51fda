"""Which prompts of one file are kept aside for validation, where no file of their own is given.

Knows records and the rule. Knows nothing of models or of how validation is used.

The rule: of the attack families that are named, or else of the last one in the file, every prompt; of
plain harmful, borderline and benign prompts every fourth (the 4th, 8th, ... of its kind in the file), and
of a kind with fewer than four prompts the last one. Nothing is drawn at random, so the same file is
always split alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from modulation.errors import DataError
from modulation.evaluation.data import KINDS, Record

EVERY: Final = 4
_FEWEST: Final = 2


@dataclass(frozen=True)
class Split:
    """Records to learn from and records to validate on; `families` are the validation's."""

    training: list[Record]
    validation: list[Record]
    families: tuple[str, ...]

    def __str__(self) -> str:
        kept = f"attack {'family' if len(self.families) == 1 else 'families'} {', '.join(self.families)}"
        return (
            f"Learning from {len(self.training)} prompts; {len(self.validation)} are kept aside for "
            f"validation: {kept}, and every fourth prompt of the other kinds."
        )


def split(records: Sequence[Record], families: Sequence[str] = ()) -> Split:
    """Split by the rule; `families` are the attack families to keep aside, none: the last of the file.

    Raises DataError for a family that is not there, and where a part would have none of some kind.
    """
    known = list(dict.fromkeys(family for each in records if (family := _family(each))))
    kept = tuple(dict.fromkeys(families)) or tuple(known[-1:])
    for name in kept:
        if name not in known:
            raise DataError(
                f"--validation-family {name!r}: no harmful prompt has this family; there are "
                f"{', '.join(known) or 'none'}."
            )
    if not known:
        raise DataError("There are no attacked prompts: add records with kind 'harmful' and a family.")
    if not set(known) - set(kept):
        raise DataError(
            f"Attack families {', '.join(kept)} are kept aside for validation, and none is "
            "left to learn from: add families to the data, or give validation prompts of their own with "
            "--validation FILE."
        )
    aside = {each.id for each in records if _family(each) in kept}
    for kind in KINDS:
        aside |= _aside(kind, [each for each in records if each.kind == kind and not _family(each)])
    return Split(
        training=[each for each in records if each.id not in aside],
        validation=[each for each in records if each.id in aside],
        families=kept,
    )


def _family(record: Record) -> str | None:
    """The attack family; a wrapped prompt that is not harmful is in none."""
    return record.family if record.kind == "harmful" else None


def _aside(kind: str, records: Sequence[Record]) -> set[str]:
    if len(records) < _FEWEST:
        plain = "plain harmful" if kind == "harmful" else kind
        raise DataError(
            f"The data have {len(records)} {plain} prompts: at least {_FEWEST} are needed, one to learn "
            "from and one to validate on. Add some, or give validation prompts of their own with "
            "--validation FILE."
        )
    return {each.id for each in records[EVERY - 1 :: EVERY] or records[-1:]}
