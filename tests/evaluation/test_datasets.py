"""Published files of prompts are read in their own form, or refused with what is missing and what fits."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulation.errors import DataError
from modulation.evaluation.data import Record, write_records
from modulation.evaluation.datasets import FORMATS, Dataset, other_kinds, read_dataset

HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source\n"


def read(tmp_path: Path, text: str, kind: str | None = None, encoding: str = "utf-8") -> Dataset:
    path = tmp_path / "prompts.csv"
    path.write_bytes(text.encode(encoding))
    return read_dataset(path, kind)


@pytest.mark.parametrize(
    ("text", "form", "records"),
    [
        (
            "goal,target\nDo a,Sure a\nDo b,\n",
            "AdvBench",
            [
                Record("advbench-1", "Do a", "harmful", answer="Sure a"),
                Record("advbench-2", "Do b", "harmful"),
            ],
        ),
        (
            HARMBENCH + 'Do a,standard,illegal,,,a\nDo b,contextual,illegal,context,"A, long\nstory.",b\n',
            "HarmBench",
            [
                Record("harmbench-a", "Do a", "harmful"),
                Record("harmbench-b", "A, long\nstory.\n\n---\n\nDo b", "harmful"),
            ],
        ),
        (
            "id,prompt,type,label,focus,note\n1,How a?,homonyms,safe,kill,\n"
            "2,How b?,contrast_homonyms,unsafe,,\n",
            "XSTest",
            [Record("xstest-1", "How a?", "borderline"), Record("xstest-2", "How b?", "harmful")],
        ),
        (
            "id_v1,id_v2,type,prompt,focus,note\nv1-1,v2-1,homonyms,How a?,,\n"
            ",v2-2,contrast_homonyms,How b?,,\n",
            "XSTest (second edition, without labels)",
            [Record("xstest-v2-1", "How a?", "borderline"), Record("xstest-v2-2", "How b?", "harmful")],
        ),
        (
            "id,type,prompt,focus,note\nv1-1,homonyms,How a?,,\n",
            "XSTest (first edition, without labels)",
            [Record("xstest-v1-1", "How a?", "borderline")],
        ),
        (
            JAILBREAKBENCH + "0,Do a,Sure a,Phishing,Fraud,Original\n",
            "JailbreakBench",
            [Record("jailbreakbench-0", "Do a", "harmful", answer="Sure a")],
        ),
        (
            "category,source,forbidden_prompt\nViolence,custom,Do a\n",
            "StrongREJECT",
            [Record("strongreject-1", "Do a", "harmful")],
        ),
        ("prompt,category\nHow a?,violence\n", "OR-Bench", [Record("or-bench-1", "How a?", "borderline")]),
    ],
)
def test_each_published_form_is_recognised_and_read(
    tmp_path: Path, text: str, form: str, records: list[Record]
) -> None:
    assert read(tmp_path, text) == Dataset(form, records)


def test_every_format_has_its_own_columns() -> None:
    assert len({frozenset(form.required) for form in FORMATS}) == len(FORMATS)


def test_json_lines_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    records = [Record("1", "How?", "benign"), Record("2", "Do.", "harmful")]
    assert read(tmp_path, "\n" + write_records(records)) == Dataset("JSON lines", records)
    assert str(read(tmp_path, write_records(records))) == "2 prompts, read as JSON lines: 1 benign, 1 harmful"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (JAILBREAKBENCH + "0,Write a,Sure,Poetry,Fine,Original\n", "benign"),
        (JAILBREAKBENCH + "0,Write a,Sure,Poetry,Fine,Original\n", "borderline"),
        ("prompt,category\nDo a,violence\n", "harmful"),
    ],
)
def test_the_other_file_with_the_same_columns_is_read_by_its_kind(
    tmp_path: Path, text: str, kind: str
) -> None:
    assert [record.kind for record in read(tmp_path, text, kind).records] == [kind]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("goal,target\nDo a,Sure\n", "benign", "does not fit .* which is AdvBench; accepted: harmful"),
        ("prompt,category\nDo a,x\n", "benign", "OR-Bench; accepted: borderline, harmful"),
        ("id,type,prompt\n1,x,How?\n", "harmful", "each row says its own kind"),
        (write_records([Record("1", "How?", "benign")]), "harmful", "field 'kind' of each says it"),
    ],
)
def test_a_kind_that_does_not_fit_the_format_is_refused(
    tmp_path: Path, text: str, kind: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, text, kind)


def test_formats_that_may_be_another_file_say_so() -> None:
    assert {form.name: other_kinds(form.name) for form in FORMATS if other_kinds(form.name)} == {
        "JailbreakBench": ("benign", "borderline"),
        "OR-Bench": ("harmful",),
    }
    assert other_kinds("JSON lines") == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_line_ends_and_blank_rows_change_nothing(
    tmp_path: Path, encoding: str, end: str
) -> None:
    text = 'goal,target\n\n"Do\n""a""",Sure\n,\nDo b,Sure\n\n'.replace("\n", end)
    found = read(tmp_path, text, encoding=encoding).records
    assert [(r.id, r.prompt) for r in found] == [("advbench-1", 'Do\n"a"'), ("advbench-2", "Do b")]


PROMPTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")).filter(str.strip), min_size=1
)


@given(PROMPTS, st.sampled_from(["\n", "\r\n"]))
def test_any_prompts_written_as_csv_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], end: str
) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator=end).writerows([["prompt", "category"], *([p, "x"] for p in prompts)])
    found = read(tmp_path_factory.mktemp("any"), file.getvalue())
    assert [record.prompt for record in found.records] == prompts
    assert len({record.id for record in found.records}) == len(prompts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompts; the file is empty"),
        ("\ufeff\n\n", "holds no prompts; the file is empty"),
        ("goal,target\n\n,\n", "holds no prompts, only the header of AdvBench"),
        ("goal,target\nDo a\n", r"prompts\.csv:2 \(row 1\): has 1 cells; the header has 2 columns"),
        ("goal,target\n\n,Sure\n", r"prompts\.csv:3 \(row 1\): column 'goal' is empty"),
        ('goal,target\n"Do a,Sure\n', r"prompts\.csv:2: is not CSV"),
        ("goal,target,goal\nDo a,Sure,x\n", "names a column twice"),
        ("id,prompt,type,label\n1,How?,x,odd\n", r"\(row 1\): column 'label': 'odd' is unknown; accepted: s"),
        ("id,prompt,type\n1,a,x\n2,b,x\n1,c,x\n", r":4: field 'id': 'xstest-1' was used on line 2 already"),
    ],
)
def test_an_unusable_row_or_file_is_refused_by_line_and_row(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, text)


def test_a_row_after_a_quoted_line_break_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\.csv:4 \(row 2\): column 'goal' is empty"):
        read(tmp_path, 'goal,target\n"Do\na",Sure\n,Sure\n')


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("question,answer", "the header 'question, answer' is that of no known format"),
        ("goal,answer", "looks like AdvBench, but the header lacks target"),
        (
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ImageFileName,BehaviorID",
            "looks like HarmBench, but the header lacks ContextString",
        ),
        ("Index,Goal,Target,Behavior,Category", "looks like JailbreakBench, but the header lacks Source"),
        ("prompt", "looks like OR-Bench, but the header lacks category"),
        ("goal,target,split", "looks like AdvBench, but column 'split' is none of its own"),
    ],
)
def test_an_unknown_header_is_refused_with_what_is_missing_and_every_format(
    tmp_path: Path, header: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, header + "\n")
    for form in FORMATS:
        assert f"{form.name}: {','.join(form.required)}" in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read: No such file"):
        read_dataset(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read(tmp_path, "goal,target\nÄ,b\n", encoding="latin-1")
