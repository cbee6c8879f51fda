"""Levels with their safety neurons pruned; `neurontune robustness` does it to the shipped demo model."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modulation.demo.corpus import records
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record, write_records
from modulation.evaluation.levels import answering_in_process, perplexity_in_process
from modulation.evaluation.metrics import evaluate_answers
from modulation.evaluation.pruning import pruned
from modulation.evaluation.rankings import random_pruning, safety_pruning
from modulation.evaluation.robustness import num_passes, pruned_figures, pruning_table
from modulation.evaluation.run import Evaluation
from modulation.modulator import Modulator
from server.cli import app
from tests.tiny_models import byte_tokenizer, random_mask, tiny_model


def test_every_level_ranking_and_count_is_measured_with_its_neurons_pruned() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    mask = random_mask(model)
    prompts = [Record(str(n), f"prompt {n}", "harmful", "fiction") for n in range(3)]
    prompts += [Record("b", "hello", "benign", answer="hi")]
    levels = ["off", "security-critical"]
    attack = safety_pruning(mask, (0, 4, 12))
    prunings = [attack, random_pruning(mask, attack, 0)]
    answered: list[int] = []
    modulator = Modulator(model, mask)
    evaluation = Evaluation(
        prompts,
        answering_in_process(modulator, tokenizer, mask.levels, 4, 64),
        measures=[perplexity_in_process(modulator, tokenizer, mask.levels, 16)],
        on_done=answered.append,
    )
    points = pruned_figures(evaluation, levels, model, prunings)
    assert [(p["level"], p["pruned"], p["num_pruned"]) for p in points] == [
        (level, kind, count)
        for level in levels
        for kind, counts in (("safety", (0, 4, 12)), ("random 0", (0, 12)))
        for count in counts
    ]
    assert sum(answered) == num_passes(prunings) * len(levels) * len(prompts) == 4 * 2 * len(prompts)
    answer = transformers_answerer(model, tokenizer, max_new_tokens=4)
    rankings = {each.name: each.ranking for each in prunings}
    for point in points:
        threshold = mask.levels.parse(point["level"]).threshold
        with pruned(model, rankings[point["pruned"]][: point["num_pruned"]]), modulator.applied(threshold):
            expected = evaluate_answers(prompts, answer([each.prompt for each in prompts]))
        assert point["figures"]["asr"] == expected["asr"]
        assert point["figures"]["perplexity"]["num_tokens"] == 3
    perplexities = {point["figures"]["perplexity"]["perplexity"] for point in points}
    assert len(perplexities) == len(points) - 2  # nothing pruned is the same under both prunings
    table = pruning_table(points, "asr").splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        *("neurons pruned", "`off`, safety", "`off`, random 0"),
        *("`security-critical`, safety", "`security-critical`, random 0"),
    ]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["0", "4", "12"]
    assert [line.count("(3/3)") for line in table[2:]] == [4, 2, 4]


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
    assert found["run"]["command"].startswith("neurontune robustness --data ")
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
        (["--json", "."], "--json . is a folder"),
        (["--attacks", "jsom"], "Attack family 'jsom' is unknown"),
        (["--scores", "/no/such/scores"], "/no/such/scores"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    data: Path, arguments: list[str], words: str
) -> None:
    result = robustness("--data", data, *arguments)
    assert result.exit_code == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
