"""What the tests of the commands share: small options, and files of prompts with something left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from server.cli import app

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ["num_steps=4", "validate_every=2", "batch_size=8", "support_size=4", "validation_size=2"]
QUICK = [word for option in OPTIONS for word in ("--option", option)]
ATTACKS = [("harmful", family) for family in ("few_shot", "emotion", "grandmother")]


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def tune(data: Path, scores: Path, *arguments: Any) -> Any:
    return invoke("tune", "--data", data, "--scores", scores, *QUICK, *arguments)


def lines_of(data: Path, kind: str, family: str | None) -> list[str]:
    records = [json.loads(line) for line in data.read_text().splitlines()]
    return [json.dumps(each) for each in records if (each["kind"], each["family"]) == (kind, family)]


def without(*groups: tuple[str, str | None]) -> Callable[[Path], str]:
    def make(data: Path) -> str:
        records = [json.loads(line) for line in data.read_text().splitlines()]
        return "\n".join(json.dumps(each) for each in records if (each["kind"], each["family"]) not in groups)

    return make
