"""docs/evaluation.md says what the code does: flags, formats, attacks, metrics."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from modulation.evaluation.answer_file import FIELDS
from modulation.evaluation.attacks import ATTACKS
from modulation.evaluation.commands import evaluate
from modulation.evaluation.datasets import FORMATS
from modulation.evaluation.flags import KEY_VARIABLE
from modulation.evaluation.judges import REFUSAL_WINDOW
from modulation.evaluation.model_judge import SLOTS, VERDICTS, read_verdict
from modulation.evaluation.quality import Figures
from modulation.evaluation.remote import Endpoint
from server.cli import app
from tests.evaluation.test_model_judge import BENIGN

PAGE = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\|.*\n", section(title), re.MULTILINE)[2:]:
        yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_every_flag_is_there_with_its_default() -> None:
    shown = CliRunner().invoke(app, ["evaluate", "--help"], terminal_width=200).output
    documented = {names(flag)[0]: names(default) for flag, default, _ in rows("Flags")}
    assert set(documented) == set(re.findall(r"(--[a-z-]+)", shown)) - {"--help"}
    endpoint = Endpoint("", "")
    for flag, value in {
        "--concurrency": endpoint.concurrency,
        "--timeout": endpoint.timeout_seconds,
        "--retries": endpoint.max_retries,
        "--api-key-env": endpoint.key_variable,
        "--judge-api-key-env": KEY_VARIABLE,
    }.items():
        assert documented[flag] == (f"{value:g}" if isinstance(value, float) else str(value),)
    for name, parameter in inspect.signature(evaluate).parameters.items():
        flag = {"json_out": "--json", "html_out": "--html"}.get(name, f"--{name.replace('_', '-')}")
        if parameter.default not in (None, "", inspect.Parameter.empty):
            assert documented[flag] == (str(parameter.default),)


def test_every_format_is_there_with_its_columns() -> None:
    documented = [(name, names(required), names(allowed)) for name, required, allowed, _ in rows("Formats")]
    assert documented == [(form.name, form.required, form.unused) for form in FORMATS]
    for (*_, kind), form in zip(rows("Formats"), FORMATS, strict=True):
        assert all(each in kind for each in form.kinds)


def test_every_attack_family_is_there() -> None:
    assert [names(name)[0] for name, _ in rows("Attacks")] == list(ATTACKS)


def test_every_metric_is_there() -> None:
    assert {names(name)[0] for name, _ in rows("Metrics")} == set(Figures.__annotations__)


def test_judges_and_the_answers_file_are_as_described() -> None:
    judges = section("Judges")
    assert f"first {REFUSAL_WINDOW} characters" in judges
    assert all(f"`{{{slot}}}`" in judges for slot in SLOTS) and all(
        f"`{each}`" in judges for each in VERDICTS
    )
    (example,) = re.findall(r"```json\n(.*?)\n```", judges)
    assert read_verdict(BENIGN, example) is not None
    assert all(f"`{field}`" in section("Looking at answers, and going on") for field in FIELDS)


def test_the_json_example_has_the_shape_that_is_written() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", section("Metrics"), re.DOTALL)
    (metrics,) = json.loads(example)["levels"].values()
    assert set(metrics["asr"]) == set(metrics["asr_by_family"]["json"]) == {
        *("rate", "count", "total", "low", "high")
    }  # fmt: skip


def test_every_flag_of_robustness_is_there() -> None:
    shown = CliRunner().invoke(app, ["robustness", "--help"], terminal_width=200).output
    table = (Path(__file__).parent.parent.parent / "docs" / "report.md").read_text()
    documented = {flag for line in table.splitlines() if line.startswith("| `--") for flag in names(line)}
    flags = set(re.findall(r"(--[a-z-]+)", shown)) - {"--help"}
    assert flags == {each for each in documented if each.startswith("--")}
