"""The examples run as they stand: from a folder with a model to a mask that the server takes."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modulation.evaluation.attacks import ATTACKS
from modulation.evaluation.data import Record, read_records
from modulation.evaluation.parting import source_of
from modulation.masks import Mask
from modulation.sites import SUPPORTED_FAMILIES
from server.cli import build_engine
from server.settings import read_settings
from tests.tiny_models import tiny_chat_folder

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "real-model"
SCRIPT = FOLDER / "make_mask.sh"
FEW = {
    "NEURON_SHARE": "0.2",
    "TUNE_OPTIONS": "num_steps=2 batch_size=8 support_size=4 validation_size=2",
    "TUNING_ATTACKS": "override,persona",
    "VALIDATION_ATTACKS": "authority",
    "TEST_ATTACKS": "fiction,json",
    "LIMIT": "8",
    "LEVELS": "off,balanced",
    "MAX_NEW_TOKENS": "4",
    "ALLOW_LESS_SAFE": "yes",
    "DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny-model and the command; the name holds a space, as a user's may."""
    place = tmp_path_factory.mktemp("real model")
    tiny_chat_folder(place / "tiny-model")
    command = place / "bin" / "neurontune"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m server "$@"\n')
    command.chmod(0o755)
    return place


def make_mask(place: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "HOME": str(place),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["sh", str(SCRIPT)],
        cwd=place,
        env=environment | FEW | {"MODEL": "tiny-model", "OUT": "the mask"} | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_example_goes_from_a_model_and_prompts_to_a_mask_that_is_served(place: Path) -> None:
    done = make_mask(place)
    assert done.returncode == 0, done.stderr[-2000:]
    out = place / "the mask"
    parts = [read_records(out / f"{name}.jsonl") for name in ("tuning", "validation", "test")]
    assert all({each.kind for each in part} == {"harmful", "benign", "borderline"} for part in parts)
    for shared_by in (families_of, lambda part: {source_of(each) for each in part}):
        found = [shared_by(part) for part in parts]
        assert sum(map(len, found)) == len(set().union(*found)), "nothing is in two parts"
    assert (
        done.stdout.splitlines()[-1]
        == 'neurontune serve --model "tiny-model" --mask "the mask/mask.safetensors"'
    )
    assert "</html>" in (out / "report.html").read_text()
    mask = Mask.load(out / "mask.safetensors")
    assert mask.metadata.evaluation["curve"] and "rule" in mask.metadata.method
    assert levels_served(place / "tiny-model", out / "mask.safetensors") == [
        each.name for each in mask.levels
    ]

    made = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    again = make_mask(place)
    assert again.returncode == 0 and again.stdout.count("is there already.") == len(made) == 3
    other = make_mask(place, NEURON_SHARE="0.3")
    assert other.returncode == 1 and "tuned.safetensors was made with other settings" in other.stderr
    assert made == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def levels_served(model: Path, mask: Path) -> list[str]:
    engine = build_engine(read_settings({"model": str(model), "mask": str(mask), "device": "cpu"}))
    try:
        return [level.name for level in engine.describe().levels]
    finally:
        asyncio.run(engine.close())


def families_of(part: list[Record]) -> set[str]:
    return {each.family for each in part if each.family}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODEL": ""}, "MODEL is missing"),
        ({"HARMFUL": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"ALLOW_LESS_SAFE": "1"}, "ALLOW_LESS_SAFE=1 is neither yes nor no"),
        ({"TEST_ATTACKS": "json,override"}, "Attack families override are named twice"),
        ({"TEST_ATTACKS": "all"}, "leaves none for another purpose"),
        ({"PATH": "/usr/bin:/bin"}, "neurontune is not on PATH"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_before_anything_is_made(
    place: Path, settings: dict[str, str], words: str
) -> None:
    done = make_mask(place, OUT="refused", **settings)
    assert done.returncode == 1 and words in done.stderr and not (place / "refused").exists()


def test_every_setting_of_the_script_is_documented_with_its_default() -> None:
    defaults = dict(re.findall(r"^([A-Z_]+)=\$\{\1:-(.*)\}$", SCRIPT.read_text(), re.MULTILINE))
    readme = (FOLDER / "README.md").read_text()
    documented = {
        name: cells[1].strip(" `")
        for line in re.findall(r"^\| `[A-Z].*", readme, re.MULTILINE)
        for cells in [line.strip("|").split("|")]
        for name in re.findall(r"`([A-Z_]+)`", cells[0])
    }
    assert set(documented) == set(defaults)
    in_words = {"MODEL", "REFUSAL", "LEVELS", "JUDGE_URL", "JUDGE_MODEL"}
    for name, default in defaults.items():
        if not name.endswith(("_KIND", "_ATTACKS")) and name not in in_words:
            assert documented[name] == default.removeprefix("$here/"), name
    named = [name for key in defaults if key.endswith("_ATTACKS") for name in defaults[key].split(",")]
    assert sorted(named) == sorted(ATTACKS), "each family has one purpose"


def test_the_readme_names_the_supported_families() -> None:
    told = re.search(r"\*\*Families\.\*\* (.*?):", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert told and tuple(re.findall(r"`([a-z0-9_]+)`", told[1])) == SUPPORTED_FAMILIES


def test_every_setting_that_is_shown_exists() -> None:
    shown = set(re.findall(r"\b([A-Z_]{3,})=", (FOLDER / "README.md").read_text()))
    known = set(re.findall(r"^([A-Z_]+)=", SCRIPT.read_text(), re.MULTILINE))
    assert shown - {"PATH", "KEY"} <= known
