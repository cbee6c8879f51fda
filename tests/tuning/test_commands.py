"""`neurontune tune` and `neurontune levels`: the demo model from end to end, killed for real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from modulation.attribution.scores import ScoresFile
from modulation.attribution.selection import ranked_sets
from modulation.errors import DataError
from modulation.evaluation.data import Record
from modulation.masks import Mask
from modulation.tuning.curve import RULE
from modulation.tuning.settings import TuningSettings
from modulation.tuning.validation import split
from server.cli import app
from tests.tuning.commanding import QUICK, ROOT, invoke, lines_of, tune
from tests.tuning.test_curve import metrics


def test_it_writes_a_mask_and_says_what_it_learned_and_what_to_run_next(
    tuned: tuple[Path, str], scores: Path
) -> None:
    path, printed = tuned
    mask = Mask.load(path)
    assert list(path.parent.iterdir()) == [path], "nothing stays beside it"
    neurons = ranked_sets(ScoresFile.load(scores).scores, 3, 1)
    assert np.array_equal(mask.safety.neurons, neurons[0])
    assert np.array_equal(mask.utility.neurons, neurons[1])
    assert mask.metadata.model_id == "neurontune-demo"
    history = mask.metadata.method["tuning"]["history"]
    assert [each["step"] for each in history] == [2, 4]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    assert [row[0] for row in rows if row[0] in ("2", "4")] == ["2", "4"]
    factors = mask.safety.factors
    (safety,) = (row for row in rows if row[0] == "safety")
    assert safety[1] == "3" and int(safety[2]) == (factors > 1.01).sum()
    assert int(safety[3]) == (factors < 0.99).sum() and float(safety[7]) == pytest.approx(
        factors.max(), rel=0.01
    )
    assert "off (0, 0), security-critical (3, 1), balanced (2, 1), utility-priority (1, 1)" in printed
    assert f"neurontune levels --model demo --mask {path} --data VALIDATION.jsonl" in printed


def test_the_mask_says_which_attribution_chose_its_neurons(tuned: tuple[Path, str], scores: Path) -> None:
    metadata, attributed = Mask.load(tuned[0]).metadata, ScoresFile.load(scores).metadata
    digest = subprocess.run(["sha256sum", scores], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert metadata.method["attribution"] == {"method": "random", "options": {"seed": 0}, "scores": digest}
    assert metadata.data_digests["attribution"] == attributed.data_digest
    assert set(metadata.seeds) == {"attribution", "tuning"}


def test_without_validation_prompts_the_last_family_is_kept_aside_and_it_says_so(
    tuned: tuple[Path, str],
) -> None:
    path, printed = tuned
    record = Mask.load(path).metadata.method["tuning"]
    assert record["families"] == ["few_shot", "emotion"] and record["validation_families"] == ["grandmother"]
    assert "Learning from 22 prompts; 8 are kept aside for validation: attack family grandmother" in printed


def test_validation_prompts_come_from_a_file_or_from_families_that_are_named(
    data: Path, scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mask.safetensors"
    few = ["--share", "0.00106", "--option", "method=erm"]
    result = tune(
        data, scores, "--out", out, *few, "--validation-family", "few_shot", "--validation-family", "emotion"
    )
    assert result.exit_code == 0, result.output
    record = Mask.load(out).metadata.method["tuning"]
    assert record["families"] == ["grandmother"]
    assert record["validation_families"] == ["few_shot", "emotion"]
    assert len(Mask.load(out).safety) == len(Mask.load(out).utility) == 2
    result = tune(data, scores, "--out", out, *few, "--validation", data, "--seed", "5")
    assert result.exit_code == 0 and "Learning from 30 prompts of" in result.stdout
    assert Mask.load(out).metadata.seeds["tuning"] == 5
    assert f"--data {data} --out mask.safetensors" in result.stdout


PRUNE = ["--option", "prune_shares=0.1,0.05", "--option", "prune_steps=2"]


@pytest.mark.parametrize(
    ("options", "stages"), [([], [0]), (PRUNE, [0, 1, 2])], ids=["learning", "pruning and learning"]
)
def test_killed_and_started_again_it_writes_the_same_bytes(
    data: Path, scores: Path, tmp_path: Path, options: list[str], stages: list[int]
) -> None:
    """Killed in each of the stages, one after the other."""

    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "server", "tune", "--data", str(data), "--scores", str(scores),
            "--out", str(out), *QUICK, *options,
        ]  # fmt: skip

    def run(out: Path) -> None:
        subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True, timeout=300)

    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    run(whole)
    for stage in stages:
        process = subprocess.Popen(
            command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        deadline = time.monotonic() + 300
        while stage_in(checkpoint) < stage and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert stage_in(checkpoint) == stage and not out.exists(), "killed in the middle"
    run(out)
    assert out.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()


def stage_in(checkpoint: Path) -> int:
    """The stage that the run of a checkpoint is in, -1 where there is none."""
    if not checkpoint.exists():
        return -1
    with safe_open(checkpoint, "np") as file:
        found: int = json.loads(file.metadata()["neurontune_checkpoint"])["progress"]["stage"]
    return found


def test_levels_are_measured_chosen_and_written(tuned: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        "".join(lines_of(data, kind, None)[0] + "\n" for kind in ("harmful", "borderline", "benign"))
    )
    out, curve = tmp_path / "mask.safetensors", tmp_path / "curve.json"
    result = invoke(
        "levels", "--mask", tuned[0], "--data", few, "--attacks", "few_shot,emotion", "--seed", "2",
        "--out", out, "--json", curve, "--allow-less-safe",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = Mask.load(out).metadata
    written = json.loads(curve.read_text())
    assert written == made.evaluation and len(written["curve"]) == 7
    assert "few_shot,emotion with seed 2" in written["prompts"]
    assert written["levels"]["off"]["asr"]["total"] == 2
    assert RULE in result.stdout and made.method["rule"] == RULE and "tuning" in made.method
    for name, (num_safety, num_utility) in made.levels.items():
        assert re.search(rf"\| \({num_safety}, {num_utility}\) .*{name}", result.stdout)
    assert sorted(tmp_path.iterdir()) == [curve, few, out], "no checkpoint stays"


def test_a_less_safe_level_is_refused_and_the_curve_is_shown_and_kept(
    tuned: tuple[Path, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is not lost: with --allow-less-safe nothing is measured again."""
    measured: list[object] = []

    def metrics_at(
        _modulator: object, _tokenizer: object, _records: object, thresholds: Any, _told: object
    ) -> Any:
        measured.extend(thresholds)
        return [metrics(0.9 if each.num_safety else 0.5, 0.2) for each in thresholds]

    monkeypatch.setattr("modulation.tuning.leveling.metrics_at", metrics_at)
    out = tmp_path / "mask.safetensors"
    arguments = ["levels", "--mask", tuned[0], "--data", data, "--out", out]
    result = invoke(*arguments)
    assert result.exit_code == 1 and "would be less safe than 'off'" in result.stderr
    assert "| 90.0 %" in result.stdout and not out.exists()
    assert len(measured) == 7
    result = invoke(*arguments, "--allow-less-safe")
    assert result.exit_code == 0 and len(measured) == 7
    assert list(tmp_path.iterdir()) == [out]


def test_a_mask_is_adapted_to_a_new_family(tuned: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    few, out = tmp_path / "few.jsonl", tmp_path / "adapted.safetensors"
    groups = [("harmful", None), ("harmful", "emotion"), ("benign", None), ("borderline", None)]
    few.write_text("\n".join(line for kind, family in groups for line in lines_of(data, kind, family)[:2]))
    result = invoke(
        "tune", "--adapt", "--mask", tuned[0], "--data", few, "--out", out, "--steps", 2, "--rate", "0.5"
    )
    assert result.exit_code == 0, result.output
    before, after = Mask.load(tuned[0]), Mask.load(out)
    moved = np.abs(np.log(after.safety.factors) - np.log(before.safety.factors))
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("| safety"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert float(cells[2]) == pytest.approx(np.exp(moved.mean()), abs=2e-4)
    assert float(cells[3]) == pytest.approx(np.exp(moved.max()), abs=2e-4)
    record = after.metadata.method["adaptation"]
    assert f"Took {record['num_steps']} of 2 steps." in result.stdout and record["most_steps"] == 2
    assert after.metadata.method["adaptation"]["settings"]["batch_size"] == 8, "as the mask was tuned"
    assert "Its levels are those of" in result.stdout


def test_options_that_adaptation_does_not_go_by_are_refused(
    tuned: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    arguments = ("tune", "--adapt", "--mask", tuned[0], "--data", data, "--out", tmp_path / "out.safetensors")
    for option in ("borderline_weight=30", "rate=0.2", "num_steps=4", "attacked_weight_low=1"):
        result = invoke(*arguments, "--option", option)
        assert result.exit_code != 0
        assert f"Option '{option}' does not go with --adapt" in f"{result.output} {result.exception}"
    assert not list(tmp_path.iterdir())


def records(kind: str, number: int, family: str | None = None) -> list[Record]:
    return [Record(f"{kind}-{family}-{n}", "how?", kind, family) for n in range(number)]


def test_the_validation_split_is_every_fourth_prompt_and_at_least_one() -> None:
    harmful, borderline, benign = records("harmful", 9), records("borderline", 3), records("benign", 2)
    wrapped = records("benign", 2, "wrapped")
    first, last = records("harmful", 3, "first"), records("harmful", 3, "last")
    everything = [*first, *harmful, *last, *borderline, *benign, *wrapped]
    found = split(everything)
    assert found.validation == [harmful[3], harmful[7], *last, borderline[2], wrapped[1]]
    assert sorted(found.training + found.validation, key=everything.index) == everything
    assert split(everything) == found and found.families == ("last",)
    assert split(everything, ["first"]).families == ("first",)
    with pytest.raises(DataError, match="The data have 1 borderline prompts: at least 2"):
        split([*first, *last, *harmful, *borderline[:1], *benign])


def test_the_documentation_names_every_option_with_its_default_and_every_flag() -> None:
    page = (ROOT / "docs" / "tuning.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.MULTILINE))
    defaults = {name: str(field.default) for name, field in TuningSettings.model_fields.items()}
    assert rows == {
        name: text.lower() if text in ("True", "False") else text for name, text in defaults.items()
    }
    for command in ("tune", "levels"):
        help_text = (
            invoke(command, "--help").output
            + CliRunner().invoke(app, [command, "--help"], terminal_width=300).output
        )
        for flag in set(re.findall(r"--(?!help)[a-z-]+[a-z]", help_text)):
            assert f"`{flag}`" in page, flag
    assert RULE.replace("\n", " ") in page.replace("\n", " ")
