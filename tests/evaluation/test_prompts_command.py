"""`neurontune prompts`: files are converted, joined, wrapped and parted; what does not fit is refused."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from modulation.demo.corpus import records as demo_records
from modulation.errors import DataError
from modulation.evaluation.attacks import attacked
from modulation.evaluation.data import Record, read_records, write_records
from modulation.evaluation.parting import by_source, limited, parted, source_of
from modulation.evaluation.prompts_command import REST_SHARE, prompts
from server.cli import app

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "prompts.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight harmful prompts, half with a target, and four prompts each that are benign and borderline."""
    rows = [f'"Do {n}, now",{"Sure" if n % 2 else ""}' for n in range(8)]
    (tmp_path / "advbench.csv").write_text("\n".join(["goal,target", *rows]))
    benign = [Record(f"b-{n}", f"How {n}?", "benign", answer="So.") for n in range(4)]
    (tmp_path / "benign.jsonl").write_text(write_records(benign))
    rows = [f"Kill {n}?,x" for n in range(4)]
    (tmp_path / "or.csv").write_text("\n".join(["prompt,category", *rows]))
    return tmp_path


def run(folder: Path, *arguments: Any) -> Any:
    files = [folder / name for name in ("advbench.csv", "benign.jsonl", "or.csv")]
    return CliRunner().invoke(app, ["prompts", *map(str, [*files, *arguments])])


def test_files_of_all_forms_are_joined_as_json_lines_with_their_answers(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["kind"] for each in lines] == ["harmful"] * 8 + ["benign"] * 4 + ["borderline"] * 4
    assert lines[1]["id"] == "advbench-2" and lines[1]["answer"] == "Sure" and "answer" not in lines[0]
    assert "16 prompts: 8 plain harmful, 4 benign, 4 borderline" in result.stderr
    assert "If it is the other file with these columns: --kind harmful" in result.stderr


def test_what_it_writes_is_what_it_prints_and_can_be_read_again(folder: Path) -> None:
    out = folder / "out.jsonl"
    arguments = ["--attacks", "json,debate", "--seed", "3"]
    assert run(folder, *arguments, "--out", out).stdout == ""
    assert out.read_text() == run(folder, *arguments).stdout
    again = CliRunner().invoke(app, ["prompts", str(out)])
    assert again.stdout == out.read_text()
    families = [record.family for record in read_records(out)]
    assert families.count("json") == families.count("debate") == 8


def test_plain_harmful_prompts_can_be_left_out_once_they_are_wrapped(folder: Path) -> None:
    out = folder / "out.jsonl"
    assert run(folder, "--attacks", "json", "--no-keep-plain", "--out", out).exit_code == 0
    assert {(each.kind, each.family) for each in read_records(out)} == {
        *[("harmful", "json"), ("benign", None), ("borderline", None)]
    }  # fmt: skip


def test_two_parts_share_no_source_and_have_the_families_asked_for(folder: Path) -> None:
    out, rest = folder / "out.jsonl", folder / "rest.jsonl"
    given = ["--attacks", "json,debate", "--rest-attacks", "fiction", "--out", out, "--rest", rest]
    result = run(folder, *given)
    assert result.exit_code == 0, result.output
    tuning, validation = read_records(out), read_records(rest)
    assert {each.family for each in tuning} - {None} == {"json", "debate"}
    assert {each.family for each in validation} - {None} == {"fiction"}
    assert not set(map(source_of, tuning)) & set(map(source_of, validation))
    plain = [each for each in validation if each.family is None]
    assert [each.kind for each in plain] == ["harmful"] * 2 + ["benign", "borderline"]
    before = out.read_text(), rest.read_text()
    assert run(folder, *given).exit_code == 0 and before == (out.read_text(), rest.read_text())
    assert run(folder, *given, "--seed", "1").exit_code == 0 and before[1] != rest.read_text()


def test_without_families_of_its_own_the_rest_has_the_same(folder: Path) -> None:
    out, rest = folder / "out.jsonl", folder / "rest.jsonl"
    assert run(folder, "--attacks", "json", "--out", out, "--rest", rest).exit_code == 0
    assert {each.family for each in read_records(rest)} == {None, "json"}


RECORDS = [
    *(Record(f"h{n}", f"Do {n}", "harmful") for n in range(12)),
    *(Record(f"b{n}", f"How {n}?", "benign") for n in range(5)),
]


@given(st.floats(0.01, 0.99), st.integers(0, 99), st.integers(1, 12))
def test_wrapped_prompts_stay_with_their_source_whatever_is_drawn(share: float, seed: int, num: int) -> None:
    records = RECORDS + attacked(RECORDS, ["json", "fiction"])
    kept, rest = parted(limited(records, num, seed) if num > 1 else records, share, seed)
    assert kept and rest and not {*map(source_of, kept)} & {*map(source_of, rest)}
    assert all({"harmful", "benign"} == {each.kind for each in part} for part in (kept, rest))
    assert all(sum(each.family == "json" for each in part) * 3 == num_harmful(part) for part in (kept, rest))


def num_harmful(records: list[Record]) -> int:
    return sum(each.kind == "harmful" for each in records)


def test_a_limit_counts_sources_of_each_kind() -> None:
    found = limited(RECORDS + attacked(RECORDS, ["json"]), 3, 0)
    assert num_harmful(found) == 6 and len(found) == 9
    assert [each for each in RECORDS if each in found] == [each for each in found if each.family is None]


def test_the_same_prompt_under_two_ids_has_one_source() -> None:
    """Published sets borrow from each other: JailbreakBench holds prompts of AdvBench."""
    records = [
        Record("a", "Do this", "harmful"),
        Record("b", "Do that", "harmful"),
        Record("c", " do  THIS", "harmful"),
    ]
    assert [[each.id for each in group] for group in by_source(records)] == [["a", "c"], ["b"]]
    wrapped = attacked(records, ["json"])
    assert [len(group) for group in by_source(records + wrapped)] == [4, 2]


def test_prompts_of_the_demo_model_have_one_source_for_each_topic() -> None:
    plain, inside = (list(demo_records("harmful", "tune", family)) for family in (None, "emotion"))
    assert list(map(source_of, plain)) == list(map(source_of, inside))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rest-share", "0.5"], "--rest-share 0.5 needs --rest"),
        (["--rest-attacks", "json"], "--rest-attacks json needs --rest"),
        (["--rest", "{}/r.jsonl", "--rest-share", "1"], "above 0 and below 1"),
        (["--no-keep-plain"], "name families by --attacks"),
        (["--attacks", "nope"], "'nope' is unknown; accepted: all, none"),
        (["{}/or.csv"], "'or-bench-1' of .*or.csv is one of .*or.csv already.*--prefix"),
        (["--kind", "benign"], "--kind 'benign' does not fit .*advbench.csv"),
        (["--out", "{}/benign.jsonl"], "--out .*benign.jsonl is the file of FILE 2 too"),
        (["--out", "{}/x", "--rest", "{}/x"], "--rest .* is the file of --out too"),
        (["--limit", "1", "--rest", "{}/r.jsonl"], "There is 1 harmful prompt: parting needs at least 2"),
        (["{}/none.csv"], "none.csv: cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder: Path, arguments: list[str], words: str) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = run(folder, *(each.format(folder) for each in arguments))
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert re.search(words, result.stderr), result.stderr
    assert before == {path: path.read_bytes() for path in folder.iterdir()}, "nothing is written"


def test_attacks_need_a_harmful_prompt_to_wrap(folder: Path) -> None:
    arguments = ["prompts", str(folder / "benign.jsonl"), "--attacks", "json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "--attacks json: there is no plain harmful prompt" in result.stderr


def test_a_prefix_makes_files_of_the_same_ids_fit(folder: Path) -> None:
    other = folder / "other.jsonl"
    arguments = ["prompts", str(folder / "or.csv"), "--prefix", "second-", "--out", str(other)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert run(folder, other).exit_code == 0


def test_parting_tells_of_a_kind_with_one_prompt() -> None:
    with pytest.raises(DataError, match=r"1 benign prompt: .* leave --rest out"):
        parted([*RECORDS[:3], RECORDS[-1]], 0.5, 0)


def test_it_needs_no_torch(folder: Path) -> None:
    script = (
        "import sys; from server.cli import app; "
        f"app(['prompts', {str(folder / 'or.csv')!r}], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_every_flag_is_documented_with_its_default() -> None:
    rows = [
        line.strip("|\n ").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `-")
    ]
    documented = {re.findall(r"`(--[a-z-]+)`", row[0])[0]: row[1].strip(" `") for row in rows}
    shown = CliRunner().invoke(app, ["prompts", "--help"], terminal_width=200).output
    options = re.findall(r"^ +(--[a-z-]+)", shown, re.MULTILINE)
    assert set(documented) == set(options) - {"--help"}
    for name, parameter in inspect.signature(prompts).parameters.items():
        if parameter.default not in (None, "", True, inspect.Parameter.empty):
            assert documented[f"--{name.replace('_', '-')}"] == str(parameter.default)
    assert documented["--rest-share"] == str(REST_SHARE)
