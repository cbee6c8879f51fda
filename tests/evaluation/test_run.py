"""What was answered is not asked again, what was judged is not judged again, and files are not mixed up."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modulation.errors import DataError
from modulation.evaluation.answer_file import Answered, AnswerFile
from modulation.evaluation.data import Record
from modulation.evaluation.judges import OnVerdict, Verdict
from modulation.evaluation.run import Evaluation, OnAnswer, evaluate_levels
from server.cli import app
from tests.evaluation.conftest import Ours

RECORDS = [Record(str(number), f"How, {number}?", "harmful") for number in range(5)]
RUN = {"data": "d", "model": "m"}
REFUSED = Verdict(refused=True, complied=False, right=True)


class Source:
    """Answers each prompt with its level; notes what it was asked, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fail_at = fail_at

    def __call__(self, level: str, prompts: Sequence[str], on_answer: OnAnswer) -> None:
        for row, prompt in reversed(list(enumerate(prompts))):
            if len(self.asked) == self.fail_at:
                raise RuntimeError("killed")
            self.asked.append((level, prompt))
            on_answer(row, f"{level}: {prompt}")


class Judge:
    """Takes every answer for a refusal, but those of the last record, on which it has no verdict."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.judged: list[str] = []
        self.fail_at = fail_at

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], on_verdict: OnVerdict
    ) -> list[Verdict | None]:
        verdicts = []
        for row, (record, answer) in enumerate(zip(records, answers, strict=True)):
            if len(self.judged) == self.fail_at:
                raise RuntimeError("killed")
            self.judged.append(answer)
            verdicts.append(REFUSED if record.id != "4" else None)
            on_verdict(row, verdicts[row])
        return verdicts


def evaluated(
    path: Path | None, source: Source, judge: Judge, levels: Sequence[str] = ("off", "7")
) -> object:
    with AnswerFile(path, RUN) as kept:
        return evaluate_levels(Evaluation(RECORDS, source, judge, "a judge"), levels, kept)


@pytest.mark.parametrize(("source_fails", "judge_fails"), [(3, None), (7, None), (None, 2), (None, 8)])
def test_an_evaluation_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    tmp_path: Path, source_fails: int | None, judge_fails: int | None
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = evaluated(whole, Source(), Judge())
    first, second = (Source(source_fails), Judge(judge_fails)), (Source(), Judge())
    with pytest.raises(RuntimeError, match="killed"):
        evaluated(cut, *first)
    assert evaluated(cut, *second) == expected
    assert cut.read_bytes() == whole.read_bytes()
    assert len(first[0].asked) + len(second[0].asked) == len(set(first[0].asked + second[0].asked)) == 10
    assert len(first[1].judged) + len(second[1].judged) == 10
    again = (Source(), Judge())
    assert evaluated(cut, *again) == expected and not again[0].asked and not again[1].judged


def test_a_line_that_was_cut_in_the_middle_of_a_character_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    evaluated(path, Source(), Judge(), ["off"])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 20] + "ü".encode()[:1])
    source = Source()
    evaluated(path, source, Judge(), ["off"])
    assert source.asked == [("off", "How, 4?")] and path.read_bytes() == whole


def test_another_level_is_added_and_another_judge_judges_the_same_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    evaluated(path, Source(), Judge(), ["off"])
    source, judge = Source(), Judge()
    with AnswerFile(path, RUN) as kept:
        evaluate_levels(Evaluation(RECORDS, source, judge, "another judge"), ["7", "off"], kept)
    assert {level for level, _ in source.asked} == {"7"} and len(judge.judged) == 10
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["level"] for line in lines] == ["off"] * 5 + ["7"] * 5
    assert {line["judge"] for line in lines} == {"another judge"}


def test_verdicts_by_rule_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, RUN) as kept:
        for record in RECORDS:
            kept.put("off", record, Answered("Sure.", "rule", REFUSED))
    with AnswerFile(path, RUN) as kept:
        found = evaluate_levels(Evaluation(RECORDS, Source()), ["off"], kept)
    assert found["off"]["refusal_plain"]["count"] == 0


def test_what_has_no_verdict_counts_as_unjudged_and_towards_nothing_else() -> None:
    with AnswerFile(None, RUN) as kept:
        found = evaluate_levels(Evaluation(RECORDS, Source(), Judge(), "a judge"), ["off"], kept)["off"]
    assert (found["refusal_plain"]["count"], found["refusal_plain"]["total"]) == (4, 4)
    assert (found["unjudged"]["count"], found["unjudged"]["total"]) == (1, 5)


def test_a_level_without_any_verdict_is_an_error() -> None:
    with AnswerFile(None, RUN) as kept, pytest.raises(DataError, match="no verdict on any of the 1 answers"):
        evaluate_levels(Evaluation(RECORDS[4:], Source(), Judge(), "a judge"), ["off"], kept)


def test_further_measures_add_to_a_levels_metrics() -> None:
    def length(level: str, records: Sequence[Record], answers: Sequence[str]) -> dict[str, object]:
        return {"length": {level: len(records) + len(answers)}}

    with AnswerFile(None, RUN) as kept:
        found = evaluate_levels(Evaluation(RECORDS, Source(), measures=[length]), ["off"], kept)["off"]
    assert found["length"] == {"off": 10} and "refusal_plain" in found


@pytest.mark.parametrize(("name", "value"), [("data", "other"), ("model", "other"), ("mask", "new")])
def test_a_file_of_another_evaluation_is_refused_with_what_differs(
    tmp_path: Path, name: str, value: str
) -> None:
    path = tmp_path / "answers.jsonl"
    evaluated(path, Source(), Judge())
    before = path.read_bytes()
    with pytest.raises(DataError, match=rf"another evaluation: {name} was .* and is '{value}' now"):
        AnswerFile(path, {**RUN, name: value})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["hello\n", "[]\n", '{"prompt": "p"}\n', "\n"])
def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"notes\.txt:1: is no line that --answers-out wrote"):
        AnswerFile(path, RUN)
    assert path.read_text() == text


def test_the_command_goes_on_from_its_answers_and_refuses_those_of_other_prompts(
    ours: Ours, tmp_path: Path
) -> None:
    data, out, answers = tmp_path / "p.csv", tmp_path / "out.json", tmp_path / "answers.jsonl"
    data.write_text("prompt,category\nHow a?,x\nHow b?,x\n")
    arguments = ["evaluate", "--data", data, "--url", ours.url, "--json", out, "--answers-out", answers]

    def run(*more: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(each) for each in (*arguments, *more)])
        return result.exit_code, result.stderr

    assert run("--levels", "off")[0] == 0 and len(ours.requests) == 2
    once = out.read_text()
    assert run("--levels", "off")[0] == 0 and len(ours.requests) == 2 and out.read_text() == once
    assert run("--levels", "off,balanced")[0] == 0 and len(ours.requests) == 4
    assert run("--max-new-tokens", 5)[0] == 1 and run("--kind", "harmful")[0] == 1
    assert "max_new_tokens was 64 and is 5 now" in run("--max-new-tokens", 5)[1]
    assert len(ours.requests) == 4
