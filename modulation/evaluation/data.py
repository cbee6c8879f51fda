"""Evaluation prompts as JSON lines: one `Record` a line, read and validated, or written.

Knows the file format; knows nothing of models, answers or where prompts come from.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from modulation.errors import DataError

RuleName = Literal["contains_all", "refuses"]
RULES: tuple[RuleName, ...] = get_args(RuleName)
KINDS = ("harmful", "benign", "borderline")

_REQUIRED = ("id", "prompt", "kind")
_OPTIONAL = ("family", "split", "check", "answer")


@dataclass(frozen=True)
class Check:
    """The rule that decides whether an answer is right.

    `contains_all`: the answer holds every phrase, whatever its case, and does not refuse.
    `refuses`: the answer refuses; an answer that holds one of the phrases complied.
    """

    rule: RuleName
    phrases: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule, "phrases": list(self.phrases)}


@dataclass(frozen=True)
class Record:
    """One prompt: `family` null means not wrapped, `check` null means judged by refusal phrases.

    `answer` is what attribution and tuning learn from: for a benign or borderline prompt a right answer,
    for a harmful one an answer that complies. Null where nobody wrote one; it is never judged.
    """

    id: str
    prompt: str
    kind: str
    family: str | None = None
    split: str | None = None
    check: Check | None = None
    answer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of the file's line; `answer` is left out where there is none."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "kind": self.kind,
            "family": self.family,
            "split": self.split,
            "check": self.check.to_json() if self.check else None,
            **({} if self.answer is None else {"answer": self.answer}),
        }


def write_records(records: Iterable[Record]) -> str:
    """The records as JSON lines, each line ended."""
    return "".join(json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in records)


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with or without a byte order mark; every line end becomes `\\n`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}).") from error


def read_records(path: Path) -> list[Record]:
    """Read a file of JSON lines; raises DataError that names file, line, field and what fits."""
    return parse_records(read_text(path), path)


def parse_records(text: str, path: Path) -> list[Record]:
    """The records of JSON lines; `path` is for errors, which are those of `read_records`."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no prompts; one JSON object a line is expected.")
    found = [(_record(line, f"{path}:{number}"), number) for number, line in lines]
    refuse_repeated_ids(found, path)
    return [record for record, _ in found]


def refuse_repeated_ids(numbered: Iterable[tuple[Record, int]], path: Path) -> None:
    """Raise DataError for a record whose id an earlier one has; each comes with its line."""
    first_line: dict[str, int] = {}
    for record, number in numbered:
        if record.id in first_line:
            raise DataError(
                f"{path}:{number}: field 'id': {record.id!r} was used on line "
                f"{first_line[record.id]} already; every id must be its own."
            )
        first_line[record.id] = number


def _record(line: str, place: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON: {error.msg} (column {error.colno}).") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a JSON object is expected, not {_type_name(fields)}.")
    _check_names(fields, _REQUIRED, _OPTIONAL, place)
    kind = _text(fields, "kind", place)
    if kind not in KINDS:
        raise DataError(f"{place}: field 'kind': {kind!r} is unknown; accepted: {_list(KINDS)}.")
    prompt = _text(fields, "prompt", place)
    if not prompt.strip():
        raise DataError(f"{place}: field 'prompt' is empty; a text is expected.")
    return Record(
        id=_text(fields, "id", place),
        prompt=prompt,
        kind=kind,
        family=_text_or_null(fields, "family", place),
        split=_text_or_null(fields, "split", place),
        check=_check(fields.get("check"), place),
        answer=_text_or_null(fields, "answer", place),
    )


def _check(value: object, place: str) -> Check | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise DataError(f"{place}: field 'check': an object or null is expected, not {_type_name(value)}.")
    _check_names(value, ("rule", "phrases"), (), f"{place}: field 'check'")
    rule, phrases = value["rule"], value["phrases"]
    if rule not in RULES:
        raise DataError(f"{place}: field 'check.rule': {rule!r} is unknown; accepted: {_list(RULES)}.")
    if not isinstance(phrases, list) or not all(isinstance(p, str) and p for p in phrases):
        raise DataError(f"{place}: field 'check.phrases': a list of texts is expected.")
    if rule == "contains_all" and not phrases:
        raise DataError(f"{place}: field 'check.phrases': contains_all needs at least one text.")
    return Check(rule=rule, phrases=tuple(phrases))


def _check_names(
    fields: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...], place: str
) -> None:
    for name in required:
        if name not in fields:
            raise DataError(f"{place}: field {name!r} is missing; needed: {_list(required)}.")
    for name in fields:
        if name not in required + optional:
            raise DataError(f"{place}: field {name!r} is unknown; accepted: {_list(required + optional)}.")


def _text(fields: dict[str, Any], name: str, place: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: field {name!r}: a text is expected, not {_type_name(value)}.")
    return value


def _text_or_null(fields: dict[str, Any], name: str, place: str) -> str | None:
    return None if fields.get(name) is None else _text(fields, name, place)


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
