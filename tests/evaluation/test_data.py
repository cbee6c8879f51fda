"""Files of prompts are read as they were written, or refused with file, line and field."""

import json
from pathlib import Path

import pytest

from modulation.errors import DataError
from modulation.evaluation.data import Check, Record, read_records, write_records

GOOD = {"id": "1", "prompt": "How?", "kind": "benign"}
RECORDS = [
    Record("1", "Grüße\n{x} \u2028 end", "harmful", "json", "heldout", Check("refuses", ("[redacted",))),
    Record("2", "How?", "benign", None, "tune", Check("contains_all", ("a brush", "20 minutes"))),
    Record("3", "How?", "borderline"),
]


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_records(_file(tmp_path, write_records(RECORDS))) == RECORDS


def test_written_lines_have_exactly_the_documented_fields() -> None:
    for line in write_records(RECORDS).splitlines(keepends=False)[-1:]:
        assert list(json.loads(line)) == ["id", "prompt", "kind", "family", "split", "check"]


def test_blank_lines_and_left_out_optional_fields_are_fine(tmp_path: Path) -> None:
    found = read_records(_file(tmp_path, f"\n{json.dumps(GOOD)}\n\n"))
    assert found == [Record("1", "How?", "benign", None, None, None)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "field 'prompt': a text is expected, not null"),
        ({"prompt": "  "}, "field 'prompt' is empty"),
        ({"id": 7}, "field 'id': a text is expected, not a number"),
        ({"kind": "evil"}, "field 'kind': 'evil' is unknown; accepted: harmful, benign, borderline"),
        ({"family": 3}, "field 'family': a text is expected, not a number"),
        ({"famly": "x"}, "field 'famly' is unknown; accepted: id, prompt, kind, family, split, check"),
        ({"check": "x"}, "field 'check': an object or null is expected, not a text"),
        (
            {"check": {"rule": "x", "phrases": []}},
            "field 'check.rule': 'x' is unknown; accepted: contains_all",
        ),
        ({"check": {"rule": "refuses"}}, "field 'check': field 'phrases' is missing"),
        ({"check": {"rule": "refuses", "phrases": "x"}}, "field 'check.phrases': a list of texts"),
        ({"check": {"rule": "contains_all", "phrases": []}}, "contains_all needs at least one text"),
    ],
)
def test_a_wrong_field_is_named_with_file_line_and_what_fits(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    path = _file(tmp_path, json.dumps({**GOOD, "id": "0"}) + "\n" + json.dumps({**GOOD, **fields}) + "\n")
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["id", "prompt", "kind"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    line = json.dumps({key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(DataError, match=rf":1: field '{name}' is missing; needed: id, prompt, kind"):
        read_records(_file(tmp_path, line))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("\n \n", "holds no prompts"),
        ("{", ":1: is not JSON"),
        ("[1]", ":1: a JSON object is expected, not a list"),
        (2 * (json.dumps(GOOD) + "\n"), ":2: field 'id': '1' was used on line 1 already"),
    ],
)
def test_an_unusable_file_is_refused_with_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(_file(tmp_path, text))


def test_a_missing_file_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        read_records(tmp_path / "none.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_records(binary)
