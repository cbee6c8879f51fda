"""What README and docs show is what the program does: commands, answers, links, tests that are named."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere_and_every_named_test_exists(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
        if text.startswith("`test_"):
            source = (page.parent / target).read_text()
            assert f"def {text.strip('`')}(" in source, f"{page.name} names {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_exists_with_its_flags(page: Path) -> None:
    for line in re.findall(r"neurontune ((?:[a-z]+ ?)+(?:[^`\n|]*))", "\n".join(code_of(page))):
        words = line.split()
        command = words[: 2 if words[0] in ("demo", "export", "keys") and len(words) > 1 else 1]
        shown = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
        assert shown.exit_code == 0, line
        for flag in re.findall(r"(?<!\S)(--[a-z-]+)", line):
            assert flag in shown.output, f"{page.name}: {flag} of {line!r}"


def code_of(page: Path) -> list[str]:
    text = page.read_text()
    return blocks(page, "sh") + re.findall(r"`(neurontune [^`]+)`", text)


def test_make_has_every_verb_that_is_shown() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= verbs, page.name


def test_the_answers_of_the_readme_are_those_of_the_command_that_it_names() -> None:
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^neurontune (demo answers .*)$", text, re.MULTILINE)
    result = CliRunner().invoke(app, ["demo", "answers", *re.findall(r'"([^"]*)"', command)])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 4 and "\n".join(rows) in text
