"""`neurontune evaluate` as it is run: a process of its own, every kind of output, and twice the same."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from modulation.demo import MASK_FILE
from modulation.demo.corpus import records
from modulation.evaluation.answer_file import FIELDS
from modulation.evaluation.data import write_records
from tests.evaluation.test_html_report import Page

ROOT = Path(__file__).parent.parent.parent
LEVELS = ["off", "security-critical"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_run_writes_figures_page_and_answers_and_a_second_one_writes_the_same(tmp_path: Path) -> None:
    data, out, html, answers = (tmp_path / name for name in ("p.jsonl", "o.json", "o.html", "a.jsonl"))
    prompts = [
        record for kind in ("harmful", "benign", "borderline") for record in records(kind, "tune", None)[:2]
    ]
    data.write_text(write_records(prompts))
    flags = ["--data", data, "--levels", ",".join(LEVELS), "--attacks", "json", "--max-new-tokens", 24]
    flags += ["--json", out, "--html", html, "--answers-out", answers]
    result = run(*flags)
    assert result.returncode == 0, result.stderr

    written = json.loads(out.read_text())
    assert list(written["levels"]) == LEVELS
    for level, figures in written["levels"].items():
        assert figures["perplexity"]["num_answers"] == 2 and figures["length"]["num_answers"] == 8
        shown = result.stdout.split(f"\n{level} (")[1]
        assert f"| {figures['perplexity']['perplexity']:.4g} " in shown and "| looping " in shown
        assert f"| {figures['length']['mean_words']:.1f} " in shown
    off, critical = (written["levels"][level]["perplexity"]["perplexity"] for level in LEVELS)
    assert off != critical

    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 2 * 8 and all(tuple(line) == FIELDS for line in lines)

    page = Page(html.read_text())
    facts = dict(zip(page.text_of("dt"), page.text_of("dd"), strict=True))
    assert facts["mask"] == hashlib.sha256(MASK_FILE.read_bytes()).hexdigest()
    assert facts["data"] == f"p.jsonl, SHA-256 {hashlib.sha256(data.read_bytes()).hexdigest()}"
    assert facts["judge"] == "rule" and "2 more inside 1 attack family" in facts["prompts"]
    assert facts["command"].startswith("neurontune evaluate --data ") and "--attacks json" in facts["command"]
    assert "torch" in facts["versions"] and re.fullmatch(r"20\d\d-\d\d-\d\d", facts["date"])
    assert {**facts, "date": ""} == {**written["run"], "date": ""}
    assert page.text_of("h2")[0] == "Summary" and page.text_of("h2")[-2:] == [
        "Where the neurons are",
        "Example answers",
    ]
    assert len(page.text_of("h3")) == 8 and set(page.text_of("span")) == {line["answer"] for line in lines}

    once = [path.read_text() for path in (out, answers)], html.read_text().replace(facts["date"], "")
    assert run(*flags).returncode == 0
    again = [path.read_text() for path in (out, answers)], html.read_text()
    assert again[0] == once[0] and re.sub(r"20\d\d-\d\d-\d\d", "", again[1]) == once[1]
