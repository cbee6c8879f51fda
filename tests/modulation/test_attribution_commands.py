"""`neurontune attribute`: the demo model from end to end, killed for real, and what it refuses."""

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
from typer.testing import CliRunner

from modulation.attribution.methods import DEFAULT_METHOD, METHODS, default_options, parse_options
from modulation.attribution.scores import ScoresFile, ScoresMetadata
from modulation.attribution.selection import ranked_sets
from modulation.checkpoints import Checkpoint
from modulation.errors import DataError
from server.cli import app
from tests.tiny_models import tiny_chat_folder

ROOT = Path(__file__).parent.parent.parent
GROUPS = [
    ("harmful", "none"), ("harmful", "few_shot"), ("harmful", "emotion"),
    ("benign", "none"), ("borderline", "none"),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of each group, as `neurontune demo data` prints them."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = ""
    for kind, family in GROUPS:
        arguments = ["--split", "tune", "--kind", kind, "--family", family, "--limit", "6", "--answers"]
        lines += CliRunner().invoke(app, ["demo", "data", *arguments]).stdout
    path.write_text(lines)
    return path


def attribute(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["attribute", *map(str, arguments)])


def test_it_writes_scores_and_prints_the_top_neurons(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    result = attribute("--data", data, "--out", out, "--option", "benign_weight=0.5")
    assert result.exit_code == 0, result.output
    made = ScoresFile.load(out)
    assert made.metadata.method == "attack_aware" and made.metadata.model_id == "neurontune-demo"
    assert made.metadata.options == {**parse_options("attack_aware", []), "benign_weight": 0.5}
    safety, utility = ranked_sets(made.scores, 38, 38)
    first = next(line for line in result.stdout.splitlines() if line.startswith("0 ")).split()
    assert first[:3] == ["0", *map(str, safety[0])] and first[4:6] == [*map(str, utility[0])]
    counts = [line.split() for line in result.stdout.split("layer  safety")[1].splitlines()[1:7]]
    assert [int(each[1]) for each in counts] == np.bincount(safety[:, 0], minlength=6).tolist()
    assert [int(each[2]) for each in counts] == np.bincount(utility[:, 0], minlength=6).tolist()
    assert list(tmp_path.iterdir()) == [out], "nothing stays beside it"


def test_killed_and_started_again_it_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        small = ["--batch-size", "1"]
        return [sys.executable, "-m", "server", "attribute", "--data", str(data), "--out", str(out), *small]

    def run(out: Path) -> None:
        subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True, timeout=300)

    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    run(whole)
    process = subprocess.Popen(
        command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert checkpoint.exists() and not out.exists(), "killed in the middle"
    run(out)
    assert out.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()


def test_a_checkpoint_of_other_options_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    assert attribute("--data", data, "--out", out, "--method", "random").exit_code == 0
    checkpoint = tmp_path / "scores.safetensors.checkpoint"
    Checkpoint(checkpoint, "other").save({"x": np.zeros(1, np.float32)}, {})
    result = attribute("--data", data, "--out", out, "--method", "contrast")
    assert result.exit_code == 1
    assert "belongs to another run" in result.stderr and "delete the file to begin anew" in result.stderr


def test_a_folder_is_named_after_itself_and_answers_what_has_no_answer(data: Path, tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "my-model", "qwen2")
    records = [json.loads(line) for line in data.read_text().splitlines()]
    for record in records:
        del record["answer"]
    few = [each for each in records if each["kind"] != "borderline"][::3]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(map(json.dumps, few)))
    out = tmp_path / "scores.safetensors"
    options = ["--method", "set_difference", "--option", "score=wanda", "--dtype", "bfloat16"]
    result = attribute("--model", folder, "--data", bare, "--out", out, "--refusal", "No.", *options)
    assert result.exit_code == 0, result.output
    made = ScoresFile.load(out)
    assert made.metadata.model_id == "my-model" and made.metadata.dtype == "bfloat16"


def test_the_command_names_every_method() -> None:
    help_text = CliRunner().invoke(app, ["attribute", "--help"], terminal_width=300).output
    assert all(name in help_text for name in METHODS)
    assert f"[default: {DEFAULT_METHOD}]" in help_text


def test_the_documentation_names_every_method_option_flag_and_field() -> None:
    page = (ROOT / "docs" / "attribution.md").read_text()
    help_text = CliRunner().invoke(app, ["attribute", "--help"], terminal_width=300).output
    names = {*METHODS, *re.findall(r"--(?!help)[a-z-]+", help_text), *ScoresMetadata.model_fields}
    names |= {option for method in METHODS for option in default_options(method) if option != "seed"}
    assert not [name for name in sorted(names) if f"`{name}`" not in page]


def lines_of(data: Path, kind: str, family: str | None) -> list[str]:
    records = [json.loads(line) for line in data.read_text().splitlines()]
    return [json.dumps(each) for each in records if (each["kind"], each["family"]) == (kind, family)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: "", "holds no prompts"),
        (lambda _: '{"id": "a", "kind": "benign"}', "field 'prompt' is missing"),
        (
            lambda data: "\n".join(
                [*data.read_text().splitlines()[:6], lines_of(data, "harmful", "emotion")[0]]
            ),
            "Attack family 'emotion' has 1 prompt",
        ),
        (lambda data: "\n".join(lines_of(data, "benign", None)), "no harmful prompts"),
        (lambda data: "\n".join(lines_of(data, "harmful", None)), "no benign prompts"),
        (
            lambda data: "\n".join([*lines_of(data, "harmful", None), *lines_of(data, "benign", None)]),
            "no attacked prompts",
        ),
    ],
    ids=["empty", "a missing field", "a family with one prompt", "no harmful", "no benign", "no attacks"],
)
def test_data_that_cannot_be_used_are_refused_in_one_sentence(
    data: Path, make: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(make(data))
    result = attribute("--data", path, "--out", tmp_path / "scores.safetensors")
    assert result.exit_code == 1 and words in result.stderr
    assert sum(line.startswith("neurontune: ") for line in result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "guess"], "Method 'guess' is unknown; accepted: attack_aware, contrast"),
        (["--option", "steps"], "'steps' has no '='"),
        (["--option", "step=1"], "'step' is unknown to method 'attack_aware'; accepted: utility"),
        (["--out", "/no/such/folder/x"], "the folder /no/such/folder does not exist"),
        (["--out", "."], "is a folder; a file is needed"),
        (["--model", "/no/such/model"], "Model folder '/no/such/model' does not exist"),
    ],
)
def test_what_cannot_be_attributed_is_refused_in_one_sentence(
    data: Path, arguments: list[str], words: str
) -> None:
    result = attribute("--data", data, *arguments)
    assert result.exit_code == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_model_without_a_chat_template_is_refused(data: Path, tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    result = attribute("--data", data, "--model", folder, "--out", tmp_path / "scores.safetensors")
    assert result.exit_code == 1 and "has no chat template" in result.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["benign_weight=much"], "benign_weight='much': a number is expected"),
        (["benign_weight=nan"], "a number is expected"),
        (["steps=1.5"], "steps='1.5': a whole number is expected"),
        (["include_plain=yes"], "include_plain='yes': true or false is expected"),
        (["steps=1", "steps=2"], "'steps' is given twice"),
    ],
)
def test_an_option_that_cannot_be_read_is_refused(given: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_options("attack_aware", given)


def test_options_are_read_by_their_defaults_type_and_the_seed_goes_where_it_is_drawn() -> None:
    options = parse_options(
        "attack_aware", ["include_plain=false", "steps=3", "cost=positive", "benign_weight=1"], 5
    )
    assert (options["include_plain"], options["steps"], options["cost"]) == (False, 3, "positive")
    assert options["benign_weight"] == 1.0 and "seed" not in options
    assert parse_options("random", [], 5) == {"seed": 5}
    with pytest.raises(DataError, match="'seed' is unknown to method 'random'; accepted: none"):
        parse_options("random", ["seed=1"])
