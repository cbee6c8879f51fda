"""Prompts, random scores and a small tuned mask of the demo model, made once by the commands themselves."""

from pathlib import Path

import pytest

from tests.tuning.commanding import QUICK, invoke

GROUPS = [
    ("harmful", "none"), ("harmful", "few_shot"), ("harmful", "emotion"), ("harmful", "grandmother"),
    ("benign", "none"), ("borderline", "none"),
]  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of each group, as `neurontune demo data` prints them."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = ""
    for kind, family in GROUPS:
        arguments = ["--split", "tune", "--kind", kind, "--family", family, "--limit", "5", "--answers"]
        lines += invoke("demo", "data", *arguments).stdout
    path.write_text(lines)
    return path


@pytest.fixture(scope="session")
def scores(data: Path) -> Path:
    """Random ones: these tests ask for nothing that depends on good neurons."""
    path = data.parent / "scores.safetensors"
    assert invoke("attribute", "--data", data, "--method", "random", "--out", path).exit_code == 0
    return path


@pytest.fixture(scope="session")
def tuned(data: Path, scores: Path) -> tuple[Path, str]:
    """A mask of three safety neurons and a utility neuron, and what the command printed."""
    path = data.parent / "tuned" / "tuned.safetensors"
    path.parent.mkdir()
    counts = ["--num-safety", "3", "--num-utility", "1"]
    result = invoke("tune", "--data", data, "--scores", scores, "--out", path, *counts, *QUICK)
    assert result.exit_code == 0, result.output
    return path, result.stdout
