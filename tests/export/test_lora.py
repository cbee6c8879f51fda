"""Adapters: what is in them, and that PEFT makes of them what the hooks make of the mask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import Threshold
from modulation.loading import load_model
from modulation.masks import Mask
from modulation.modulator import modulated
from tests.export.exporting import (
    LEVELS,
    assert_close,
    demo_model,
    demo_prompts,
    exported,
    greedy,
    logits,
    random_prompts,
    tiny_folder,
)
from tests.tiny_models import FAMILIES

# PEFT 0.21 still asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every named level, a number, a threshold and a padded level, by the command."""
    folder = tmp_path_factory.mktemp("adapters")
    exported("lora", "--out", folder, "--level", "7", "--threshold", "12,30", *_levels())
    exported("lora", "--out", folder, "--padded", "--level", "security-critical", "--name", "padded")
    return folder


def _levels() -> list[str]:
    return [word for level in LEVELS for word in ("--level", level)]


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        *((f"demo-{level}", Mask.load(MASK_FILE).levels.parse(level).threshold) for level in LEVELS),
        ("demo-7", Mask.load(MASK_FILE).levels.parse(7).threshold),
        ("demo-12-30", Threshold(12, 30)),
        ("padded-security-critical", Mask.load(MASK_FILE).levels.parse("security-critical").threshold),
    ],
)
def test_peft_answers_as_the_hooks_do_token_for_token(
    adapters: Path, name: str, threshold: Threshold
) -> None:
    prompts, model = demo_prompts(), demo_model()
    with modulated(model, Mask.load(MASK_FILE), threshold):
        expected, expected_logits = greedy(model, prompts), logits(model, prompts)
    plain = logits(model, prompts)
    adapted = PeftModel.from_pretrained(model, adapters / name)
    assert greedy(adapted, prompts) == expected
    assert_close(logits(adapted, prompts), expected_logits)
    assert max((one - two).abs().max() for one, two in zip(plain, expected_logits, strict=True)) > 0.1


def test_peft_scales_every_layer_by_exactly_one(adapters: Path) -> None:
    for name in ("demo-security-critical", "padded-security-critical"):
        adapted = PeftModel.from_pretrained(demo_model(), adapters / name)
        adapted_layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
        assert [layer.scaling["default"] for layer in adapted_layers] == [1.0] * 6


@pytest.mark.parametrize("name", ["demo-balanced", "padded-security-critical"])
def test_each_active_neuron_is_one_rank_with_its_column_times_its_factor_less_one(
    adapters: Path, name: str
) -> None:
    mask = Mask.load(MASK_FILE)
    counts = mask.metadata.levels[name.split("-", 1)[1]]
    factors: dict[tuple[int, int], float] = {}
    for neurons, number in ((mask.safety, counts[0]), (mask.utility, counts[1])):
        for place, factor in zip(neurons.neurons[:number], neurons.factors[:number], strict=True):
            factors[int(place[0]), int(place[1])] = float(factor)
    tensors = load_file(adapters / name / "adapter_model.safetensors")
    weights = load_model(str(MODEL_DIR), device="cpu", dtype="float32").state_dict()
    for layer in range(6):
        prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        down, up = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
        here = {index: factor for (at, index), factor in factors.items() if at == layer}
        rows = [row for row in down if row.any()]
        assert sorted(int(row.argmax()) for row in rows) == sorted(here)
        assert all(row.max() == 1 and np.count_nonzero(row) == 1 for row in rows)
        weight = weights[f"model.layers.{layer}.mlp.down_proj.weight"].numpy()
        for rank, row in enumerate(rows):
            index = int(row.argmax())
            np.testing.assert_allclose(up[:, rank], weight[:, index] * (here[index] - 1), rtol=1e-6)
        assert not up[:, len(rows) :].any()


def test_ranks_are_those_of_each_layer_or_padded_to_one_that_vllm_takes(adapters: Path) -> None:
    own, padded = adapters / "demo-security-critical", adapters / "padded-security-critical"
    ranks = {
        name: len(values)
        for name, values in load_file(own / "adapter_model.safetensors").items()
        if ".lora_A." in name
    }
    config = config_of(own)
    told = {
        f"base_model.model.{name}.lora_A.weight": config["rank_pattern"].get(name, config["r"])
        for name in config["target_modules"]
    }
    assert told == ranks and sum(ranks.values()) == sum(
        Mask.load(MASK_FILE).metadata.levels["security-critical"]
    )
    assert config["r"] == max(ranks.values()) and config["rank_pattern"] == config["alpha_pattern"]
    of_padded = load_file(padded / "adapter_model.safetensors")
    assert {len(values) for name, values in of_padded.items() if ".lora_A." in name} == {32}
    assert config_of(padded)["r"] == config_of(padded)["lora_alpha"] == 32
    assert config_of(padded)["rank_pattern"] == {}


def test_the_adapters_type_is_as_asked(tmp_path: Path) -> None:
    exported("lora", "--out", tmp_path, "--level", "balanced", "--dtype", "bfloat16")
    with safe_open(tmp_path / "demo-balanced" / "adapter_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


@pytest.mark.parametrize("padded", [False, True], ids=["ranks", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_adapts_as_the_hooks_do(tmp_path: Path, family: str, padded: bool) -> None:
    folder, mask_file = tiny_folder(tmp_path, family)
    flags = ["--padded"] if padded else []
    exported("lora", "--model", folder, "--mask", mask_file, "--out", tmp_path / "out", *flags)
    mask, prompts = Mask.load(mask_file), random_prompts()
    for level in LEVELS:
        model = load_model(str(folder), device="cpu", dtype="float32")
        with modulated(model, mask, mask.levels.parse(level).threshold):
            expected, expected_logits = greedy(model, prompts, 8), logits(model, prompts)
        adapted = PeftModel.from_pretrained(model, tmp_path / "out" / f"{family}-{level}")
        assert greedy(adapted, prompts, 8) == expected
        assert_close(logits(adapted, prompts), expected_logits)
