"""`make reproduce`, with a stand-in for `neurontune` that notes how it was called and writes its files."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from server.cli import app

ROOT = Path(__file__).parent.parent
STAND_IN = """#!/bin/sh
printf '%s ' "$@" >>"{log}"; echo >>"{log}"
test ! -e "{place}/fail-$2" || exit 1
verb=$2
made=
masks=
if [ $verb = train ]; then made=/config.json; fi
while [ $# -gt 1 ]; do
    case $1 in
    --out | --json | --plot) if [ $verb = train ]; then mkdir "$2"; fi; touch "$2$made" ;;
    --out-dir) for each in $masks; do touch "$2/$each"; done ;;
    */mask-*) masks="$masks $(basename "$1")" ;;
    esac
    shift
done
echo "| table |"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    command = tmp_path / "bin" / "neurontune"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(log=tmp_path / "log", place=tmp_path))
    command.chmod(0o755)
    (tmp_path / "installed").touch()
    return tmp_path


def reproduce(place: Path, seeds: str = "0 1") -> tuple[int, list[list[str]]]:
    """The exit code, and the calls of `neurontune` that were made."""
    (place / "log").write_text("")
    variables = {"BIN": "bin", "INSTALLED": "installed", "REPRODUCED": "made"}
    arguments = [f"{name}={place / value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "reproduce", f"SEEDS={seeds}", *arguments], cwd=ROOT, capture_output=True, timeout=60
    )
    return done.returncode, [shlex.split(line) for line in (place / "log").read_text().splitlines()]


def verbs(calls: list[list[str]]) -> list[str]:
    return sorted(call[1] for call in calls)


def test_every_command_of_it_exists_with_its_flags(place: Path) -> None:
    code, calls = reproduce(place)
    assert code == 0
    once = ["train", "evaluate", "share-levels", "compared"]
    assert verbs(calls) == sorted([*once, *2 * ["mask", "compare", "adapt"]])
    for call in calls:
        parse(typer.main.get_command(app), "neurontune", call)


def parse(command: Any, name: str, words: list[str], parent: Any = None) -> None:
    """As the program reads its command line, without doing what it says. Raises for what does not fit."""
    context = command.make_context(name, list(words), parent=parent)
    if hasattr(command, "resolve_command"):
        found, inner, rest = command.resolve_command(context, list(words))
        parse(inner, found, rest, context)


def test_a_flag_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--nope"):
        parse(typer.main.get_command(app), "neurontune", ["demo", "train", "--nope", "1"])


def test_what_is_there_is_not_made_again_and_what_hangs_on_a_new_mask_is(place: Path) -> None:
    assert reproduce(place)[0] == 0
    assert reproduce(place) == (0, [])
    (place / "made" / "alone" / "mask-1.safetensors").unlink()
    code, calls = reproduce(place)
    measured = ["adapt", "adapt", "compare", "compare", "compared"]
    assert code == 0 and verbs(calls) == [*measured, "mask", "share-levels"], "the levels hang on all masks"
    assert [call[call.index("--seed") + 1] for call in calls if call[1] == "mask"] == ["1"]
    code, calls = reproduce(place, "0 1 2")
    assert code == 0 and verbs(calls) == sorted(["adapt", "compare", *measured, "mask", "share-levels"])


def test_a_step_that_fails_leaves_nothing_that_looks_done(place: Path) -> None:
    for verb in ("train", "evaluate", "mask", "share-levels", "compare", "compared", "adapt"):
        (place / f"fail-{verb}").touch()
        code, calls = reproduce(place)
        assert code != 0 and verb in verbs(calls)
        (place / f"fail-{verb}").unlink()
    assert reproduce(place)[0] == 0
    assert (place / "made" / "comparison.md").read_text() == "| table |\n"


def test_rows_that_were_measured_are_kept_unless_the_mask_is_newer(place: Path) -> None:
    (place / "fail-compare").touch()
    assert reproduce(place, "0")[0] != 0
    rows = place / "made" / "comparison-0.json"
    rows.write_text("rows so far")
    for age, name in enumerate(("mask-0.safetensors", "alone/mask-0.safetensors", "model/config.json"), 1):
        os.utime(place / "made" / name, (rows.stat().st_mtime - 60 * age,) * 2)
    (place / "fail-compare").unlink()
    assert reproduce(place, "0")[0] == 0 and rows.read_text() == "rows so far"
    (place / "made" / "mask-0.safetensors").unlink()
    assert reproduce(place, "0")[0] == 0 and rows.read_text() == ""
