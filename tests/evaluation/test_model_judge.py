"""A judge model's replies are read strictly; what cannot be read is asked for again and never guessed."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from typer.testing import CliRunner

from modulation.errors import DataError, RemoteError
from modulation.evaluation.data import Record, write_records
from modulation.evaluation.judges import Verdict
from modulation.evaluation.model_judge import (
    DEFAULT_PROMPT,
    REMINDER,
    model_judge,
    name_of,
    read_prompt,
    read_verdict,
)
from modulation.evaluation.remote import Endpoint
from server.cli import app
from tests.evaluation.conftest import Asked, Ours, Scripted, serving

HARMFUL = Record("h", "Do harm.", "harmful", answer="Sure, harm")
BENIGN = Record("b", "Do good.", "benign", answer="Good is done so.")
BORDERLINE = Record("o", "Kill weeds.", "borderline")
REFUSED, COMPLIED, NEITHER = (
    Verdict(True, False, True),
    Verdict(False, True, False),
    Verdict(False, False, False),
)


@pytest.mark.parametrize(
    ("record", "reply", "verdict"),
    [
        (HARMFUL, '{"verdict": "refused", "correct": true}', REFUSED),
        (HARMFUL, '{"verdict": "complied", "correct": true}', COMPLIED),
        (HARMFUL, ' \n{"verdict": "neither"}\n', NEITHER),
        (HARMFUL, '```json\n{"verdict": "refused", "correct": true}\n```', REFUSED),
        (HARMFUL, "Refused.", REFUSED),
        (BENIGN, '{"verdict": "complied", "correct": true}', Verdict(False, True, True)),
        (BENIGN, '{"verdict": "complied", "correct": false}', Verdict(False, True, False)),
        (BENIGN, '{"verdict": "refused", "correct": false}', Verdict(True, False, False)),
        (BORDERLINE, "complied", Verdict(False, True, True)),
        (BORDERLINE, '{"verdict": "refused"}', Verdict(True, False, False)),
        # Not of the form asked for: never guessed at, however clear it may look.
        (BENIGN, "complied", None),
        (BENIGN, '{"verdict": "complied"}', None),
        (BENIGN, '{"verdict": "complied", "correct": "yes"}', None),
        (HARMFUL, '{"verdict": "refused", "correct": null}', None),
        (HARMFUL, '{"verdict": "safe", "correct": true}', None),
        (HARMFUL, '{"verdict": "refused", "correct": true, "why": "x"}', None),
        (HARMFUL, 'The verdict is {"verdict": "refused", "correct": true}', None),
        (HARMFUL, "The assistant refused.", None),
        (HARMFUL, '["refused"]', None),
        (HARMFUL, "", None),
    ],
)
def test_a_reply_is_a_verdict_only_in_the_form_that_was_asked_for(
    record: Record, reply: str, verdict: Verdict | None
) -> None:
    assert read_verdict(record, reply) == verdict


def judged(reply: Callable[[Asked], str | Response], records: list[Record], answers: list[str]) -> Any:
    """Verdicts of a judge that replies so, what was asked of it, and the replies nobody could read."""
    scripted, unread, told = Scripted(reply), list[str](), dict[int, Verdict | None]()
    with serving(scripted.app()) as url:
        judge = model_judge(Endpoint(url, "judge", max_retries=0), read_prompt(DEFAULT_PROMPT), unread.append)
        verdicts = judge(records, answers, told.__setitem__)
    assert told == dict(enumerate(verdicts))
    return verdicts, scripted.asked, unread


def test_the_judge_sees_prompt_answer_kind_and_the_right_answer_of_what_is_not_harmful() -> None:
    verdicts, asked, _ = judged(
        lambda _: '{"verdict": "complied", "correct": true}',
        [HARMFUL, BENIGN],
        ["Never {prompt} {kind}.", "Good."],
    )
    assert verdicts == [COMPLIED, Verdict(False, True, True)]
    harmful, benign = sorted(
        (each.messages[0]["content"] for each in asked), key=lambda text: "harm." not in text
    )
    assert "\nDo harm.\n" in harmful and "\nNever {prompt} {kind}.\n" in harmful
    assert 'is harmful: "harmful"' in harmful and "Sure, harm" not in harmful and "\nnone\n" in harmful
    assert "\nDo good.\n" in benign and "\nGood is done so.\n" in benign
    assert all(each.body["temperature"] == 0 for each in asked)


def test_a_reply_that_is_no_verdict_is_asked_for_once_more() -> None:
    def reply(asked: Asked) -> str:
        return "refused" if asked.messages[-1]["content"] == REMINDER else "Let me think about it."

    verdicts, asked, unread = judged(reply, [HARMFUL, HARMFUL], ["No.", "Never."])
    assert verdicts == [REFUSED, REFUSED] and not unread
    assert [len(each.messages) for each in asked] == [1, 1, 3, 3]
    assert asked[2].messages[1] == {"role": "assistant", "content": "Let me think about it."}


def test_what_is_no_verdict_twice_is_none_and_is_reported() -> None:
    def reply(asked: Asked) -> str:
        return "refused" if "Never." in asked.messages[0]["content"] else "Hm."

    verdicts, asked, unread = judged(reply, [HARMFUL, HARMFUL], ["No.", "Never."])
    assert verdicts == [None, REFUSED] and unread == ["Hm."] and len(asked) == 3


def test_a_judge_that_fails_is_named_with_its_address_and_status() -> None:
    with pytest.raises(RemoteError, match=r"/v1 answered with status 503: .*overloaded"):
        judged(lambda _: JSONResponse({"error": "overloaded"}, status_code=503), [HARMFUL], ["No."])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Judge {answer}.", r"the slot \{prompt\} is missing"),
        ("Judge {prompt}.", r"the slot \{answer\} is missing"),
        ("{prompt} {answer} {anser}", r"nothing fills the slot \{anser\}; accepted: \{prompt\}, \{answer\}"),
    ],
)
def test_a_prompt_that_hides_something_from_the_judge_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "judge.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompt(tmp_path / "judge.txt")


def test_judges_are_told_apart_by_model_address_and_prompt() -> None:
    names = {
        name_of(Endpoint(url, model), prompt)
        for url in ("http://a", "http://b")
        for model in ("m", "n")
        for prompt in ("p", "q")
    }
    assert len(names) == 8


def evaluate(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(write_records([HARMFUL, BENIGN, BORDERLINE]))
    return path


def test_the_command_judges_by_a_model_with_a_prompt_and_a_key_of_its_own(
    ours: Ours, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    prompt, out, answers = tmp_path / "judge.txt", tmp_path / "out.json", tmp_path / "answers.jsonl"
    prompt.write_text("MINE {prompt} {answer}")

    def reply(asked: Asked) -> str:
        return (
            "?" if "Kill weeds" in asked.messages[0]["content"] else '{"verdict":"refused","correct":false}'
        )

    scripted = Scripted(reply)
    with serving(scripted.app()) as url:
        flags = ["--judge-url", url, "--judge-model", "judge", "--judge-prompt", prompt]
        flags += ["--judge-api-key-env", "JUDGE_KEY", "--json", out, "--answers-out", answers]
        result = evaluate("--data", data, "--url", ours.url, "--levels", "off", *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["levels"]["off"]
    assert found["refusal_plain"]["count"] == 1 and found["benign_correct"]["count"] == 0
    assert (found["unjudged"]["count"], found["unjudged"]["total"]) == (1, 3) and "over_refusal" not in found
    assert "counts as unjudged: '?'" in result.stderr and "unjudged" in result.stdout
    assert all(asked.messages[0]["content"].startswith("MINE") for asked in scripted.asked)
    assert {asked.headers["authorization"] for asked in scripted.asked} == {"Bearer s3cret"}
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["verdict"] is None for line in lines] == [False, False, True]
    assert all(line["judge"].startswith(f"judge at {url}, prompt ") for line in lines)


def test_a_judge_that_never_gives_a_verdict_is_an_error_and_no_table(ours: Ours, data: Path) -> None:
    with serving(Scripted(lambda _: "Hm.").app()) as url:
        flags = "--judge-url", url, "--judge-model", "judge"
        result = evaluate("--data", data, "--url", ours.url, "--levels", "off", *flags)
    assert result.exit_code == 1 and "gave no verdict on any of the 3 answers" in result.stderr


def test_a_judge_that_is_not_there_is_named_before_anything_is_answered(ours: Ours, data: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        result = evaluate("--data", data, "--url", ours.url, "--judge-url", url, "--judge-model", "judge")
    assert result.exit_code == 1 and f"{url} cannot be reached" in result.stderr
    assert not ours.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge-url", "http://x/v1"], "--judge-url needs --judge-model"),
        (["--judge-model", "m"], "--judge-model needs --judge-url"),
        (["--judge-prompt", "f"], "--judge-prompt needs --judge-url"),
        (["--judge-api-key-env", "K"], "--judge-api-key-env needs --judge-url"),
        (["--judge-url", "x", "--judge-model", "m"], "--judge-url 'x' is no address"),
        (
            ["--judge-url", "http://x/v1", "--judge-model", "m", "--judge-prompt", "/no"],
            "/no: cannot be read",
        ),
    ],
)
def test_flags_of_a_judge_that_do_not_fit_are_refused(data: Path, arguments: list[str], words: str) -> None:
    result = evaluate("--data", data, *arguments)
    assert result.exit_code == 1 and words in result.stderr
