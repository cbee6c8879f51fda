"""`neurontune robustness`: the shipped demo model with its top safety neurons pruned."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modulation.demo.corpus import records
from modulation.evaluation.data import write_records
from server.cli import app


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        write_records([*records("harmful", "tune", "few_shot")[:3], *records("benign", "tune", None)[:2]])
    )
    return path


def robustness(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["robustness", *map(str, arguments)])


def test_it_writes_every_level_ranking_and_count_and_a_report(data: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    result = robustness("--data", data, "--counts", "0,100%", "--json", out, "--html", page)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [(p["level"], p["pruned"], p["num_pruned"]) for p in found["points"]] == [
        (level, kind, n)
        for level in ("off", "security-critical")
        for kind in ("safety", "random 0")
        for n in (0, found["points"][1]["num_pruned"])
    ]
    assert all(p["figures"]["asr"]["total"] == 3 for p in found["points"])
    assert all(p["figures"]["perplexity"]["num_answers"] == 2 for p in found["points"])
    assert "asr:" in result.output and "| `off`, safety |" in result.output
    assert found["run"]["model"] == "demo" and found["run"]["mask"] in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--counts", "0,half"], "Count 'half' of pruned neurons is not understood"),
        (["--counts", "200%"], "accepted: 0 to"),
        (["--levels", "off,off"], "names a level twice"),
        (["--model", "some/folder"], "--mask is missing"),
        (["--html", "/no/such/folder/out.html"], "--html /no/such/folder/out.html: the folder"),
        (["--json", "/tmp"], "--json /tmp is a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    data: Path, arguments: list[str], words: str
) -> None:
    result = robustness("--data", data, *arguments)
    assert result.exit_code == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
