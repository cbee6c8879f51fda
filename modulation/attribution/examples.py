"""From records to what attribution reads: prompts by kind and family, each with two answers.

Knows records and what each method's data may lack. Knows no model: answers that nobody wrote are made by
the answerer that is passed in.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Final

from modulation.attribution.base import AttributionData, Example
from modulation.errors import DataError
from modulation.evaluation.answering import Answerer
from modulation.evaluation.data import Record
from modulation.evaluation.judges import refuses

REFUSAL: Final = "I'm sorry, but I can't help with that."
COMPLIANCE: Final = "Sure, here is"
SMALLEST_FAMILY: Final = 2


def attribution_data(
    records: Iterable[Record],
    *,
    answerer: Answerer | None = None,
    refusal: str = REFUSAL,
    compliance: str = COMPLIANCE,
) -> AttributionData:
    """Examples by kind and, for harmful prompts, by attack family; wrapped benign prompts are benign.

    Every refusing answer is `refusal`. The complying one is the record's own; where it has none,
    `compliance` for a harmful prompt, and what `answerer` answers for the others. Where that refuses,
    it is no right answer: there too `compliance` stands for one.

    Raises DataError: no plain harmful or no benign prompts, a family with a single prompt, an empty
    answer, or answers to be made and nobody to make them.
    """
    answered = _with_answers(list(records), answerer, compliance)
    for name, text in [("the refusal", refusal), *((f"record {r.id!r}", r.answer) for r in answered)]:
        if not (text or "").strip():
            raise DataError(f"The answer of {name} is empty: attribution needs a text.")
    groups: dict[str, list[Example]] = {"harmful": [], "benign": [], "borderline": []}
    attacked: dict[str, list[Example]] = {}
    for record in answered:
        is_attack = record.kind == "harmful" and record.family is not None
        group = attacked.setdefault(record.family or "", []) if is_attack else groups[record.kind]
        group.append(Example(record.prompt, refusal, record.answer or "", record.id))
    for family, examples in attacked.items():
        if len(examples) < SMALLEST_FAMILY:
            raise DataError(
                f"Attack family {family!r} has {len(examples)} prompt; at least {SMALLEST_FAMILY} are "
                "needed, since one says nothing of a family: add some or leave the family out."
            )
    data = AttributionData(
        attacked={name: tuple(each) for name, each in attacked.items()},
        **{name: tuple(each) for name, each in groups.items()},
    )
    data.require("harmful", "benign")
    return data


def digest(data: AttributionData) -> str:
    """16 hexadecimal digits of all prompts and answers."""
    return hashlib.sha256(json.dumps(asdict(data)).encode()).hexdigest()[:16]


def _with_answers(records: Sequence[Record], answerer: Answerer | None, compliance: str) -> list[Record]:
    missing = [each for each in records if each.answer is None and each.kind != "harmful"]
    if missing and answerer is None:
        raise DataError(
            f"Record {missing[0].id!r} and {len(missing) - 1} more have no answer, and nothing answers for "
            "them: add field 'answer', or let the model answer."
        )
    made = answerer([each.prompt for each in missing]) if missing and answerer else []
    by_id = dict(zip((each.id for each in missing), made, strict=True))
    return [_answered(each, by_id.get(each.id), compliance) for each in records]


def _answered(record: Record, made: str | None, compliance: str) -> Record:
    if record.answer is not None:
        return record
    usable = made is not None and made.strip() and not refuses(made)
    return replace(record, answer=made if usable else compliance)
