"""`neurontune export`: what it refuses, what it leaves, what its cards say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.masks import Mask
from tests.export.exporting import exported, refused, run, tiny_folder
from tests.tiny_models import save_mask


def mask_with(folder: Path, evaluation: dict[str, Any]) -> Path:
    """The demo model's mask with another evaluation."""
    mask = Mask.load(MASK_FILE)
    metadata = mask.metadata.model_copy(update={"evaluation": evaluation})
    return save_mask(replace(mask, metadata=metadata), folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora", "--level", "nope"], "'nope' is not known. Accepted: off, security-critical"),
        (["lora", "--level", "off"], "'off' is (0, 0): that is the model as it is"),
        (["lora", "--level", "0"], "there is nothing to export"),
        (["lora", "--level", "33000"], "more neurons than this mask can activate"),
        (["lora", "--level", "balanced", "--level", "balanced"], "asked for 2 times"),
        (["lora", "--threshold", "12"], "'12' cannot be read: write two whole numbers"),
        (["lora", "--threshold", "12,-3"], "cannot be read"),
        (["lora", "--threshold", "12,39"], "38 utility neurons"),
        (["lora", "--threshold", "0,0"], "nothing to export"),
        (["lora", "--name", "a/b"], "'a/b'"),
        (["lora", "--mask", "no-such-file"], "no-such-file"),
        (["lora", "--model", "./no-such-folder", "--mask", str(MASK_FILE)], "no-such-folder"),
        (["lora", "--model", "some/model"], "--mask is missing"),
        (["checkpoint"], "either --level or --threshold"),
        (["checkpoint", "--level", "balanced", "--threshold", "1,1"], "either --level or --threshold"),
        (["checkpoint", "--level", "off"], "nothing to export"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(*arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_mask_for_another_model_is_refused(tmp_path: Path) -> None:
    folder, _ = tiny_folder(tmp_path, "llama")
    said = refused("lora", "--model", folder, "--mask", MASK_FILE, "--out", tmp_path / "out")
    assert "The mask was made for 6 layers" in said and not (tmp_path / "out").exists()


def test_a_quantised_model_is_refused_by_name(tmp_path: Path) -> None:
    folder, mask = tiny_folder(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(
        "checkpoint", "--model", folder, "--mask", mask, "--level", "balanced", "--out", tmp_path / "o"
    )
    assert "is quantised (gptq)" in said


UNSAFE = {
    "levels": {"off": {"asr": {"rate": 0.5}}, "balanced": {"asr": {"rate": 0.6}}},
    "curve": [],
}
UNSAFE_POINT = {
    "levels": {"off": {"asr": {"rate": 0.5}}},
    "curve": [{"threshold": [0, 38], "metrics": {"asr": {"rate": 0.6}}}],
}


@pytest.mark.parametrize(
    ("evaluation", "asked"),
    [(UNSAFE, ["--level", "balanced"]), (UNSAFE_POINT, ["--threshold", "0,38"])],
    ids=["level", "point of the curve"],
)
@pytest.mark.parametrize("command", ["lora", "checkpoint"])
def test_a_level_that_is_recorded_as_less_safe_than_off_is_refused_unless_allowed(
    tmp_path: Path, command: str, evaluation: dict[str, Any], asked: list[str]
) -> None:
    mask, out = mask_with(tmp_path, evaluation), tmp_path / "out"
    arguments = [command, "--mask", mask, *asked, "--out", out]
    said = refused(*arguments)
    assert "less safe than 'off'" in said and "60.0%" in said and "allow" in said
    assert not out.exists()
    exported(*arguments, "--allow-less-safe-levels")
    assert out.exists()


def test_an_existing_folder_is_kept_unless_forced_and_only_an_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["lora", "--level", "balanced", "--level", "utility-priority", "--out", out]
    exported(*arguments)
    (out / "demo-balanced" / "mine").write_text("kept")
    assert "demo-balanced exists" in refused(*arguments)
    assert (out / "demo-balanced" / "mine").exists()
    exported(*arguments, "--force")
    assert sorted(each.name for each in out.rglob("*") if each.is_file()) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors"] * 2
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "README.md").write_text("---\ntitle: my notes\n---\n")
    checkpoint = ["checkpoint", "--level", "balanced", "--force"]
    assert "something else than an export" in refused(*checkpoint, "--out", tmp_path / "home")
    assert "is not a folder" in refused(*checkpoint, "--out", tmp_path / "home" / "README.md")
    assert "is not a folder" in refused(*checkpoint, "--out", tmp_path / "home" / "README.md" / "sub")


def test_a_failure_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported("checkpoint", "--level", "balanced", "--out", out)
    before = {each.name: each.read_bytes() for each in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modulation.export.checkpoint.save", full)
    said = run("checkpoint", "--level", "security-critical", "--out", out, "--force").stderr
    assert "neurontune: " in said and "No space left on device" in said
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["lora", "checkpoint"])
def test_the_card_says_what_it_is_and_what_was_measured(tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    exported(command, "--level", "security-critical", "--out", out)
    folder = out / "demo-security-critical" if command == "lora" else out
    text = (folder / "README.md").read_text()
    mask = Mask.load(MASK_FILE)
    num_safety, num_utility = mask.metadata.levels["security-critical"]
    told = yaml.safe_load(text.split("---\n")[1])
    assert told["neurontune"] == {
        "level": "security-critical",
        "num_safety": num_safety,
        "num_utility": num_utility,
        "mask": mask.digest,
        "base_model_fingerprint": mask.metadata.model_fingerprint,
    }
    recorded = mask.metadata.evaluation["levels"]
    for name in ("off", "security-critical"):
        assert f"{recorded[name]['asr']['rate']:.1%}" in text
    assert (
        f"{num_safety} of {len(mask.safety)} safety neurons" in text
        and "## Dual use" in text
        and "neurontune-demo" in text
    )
    assert str(tmp_path) not in text and str(MODEL_DIR) not in text


def test_a_level_that_was_not_measured_is_not_given_figures(tmp_path: Path) -> None:
    exported("lora", "--mask", mask_with(tmp_path, {}), "--level", "balanced", "--out", tmp_path / "out")
    assert (
        "records no evaluation of this level"
        in (tmp_path / "out" / "demo-balanced" / "README.md").read_text()
    )


def test_it_says_how_vllm_is_told_of_the_adapters(tmp_path: Path) -> None:
    printed = exported("lora", "--out", tmp_path)
    assert (
        f"vllm serve {MODEL_DIR} --served-model-name demo --enable-lora --max-lora-rank 32 --max-loras 4"
        in printed
    )
    assert f"demo-balanced={tmp_path}/demo-balanced" in printed
