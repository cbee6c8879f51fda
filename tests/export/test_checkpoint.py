"""Baked checkpoints: plain transformers answers with them as the hooks make the model answer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.errors import ExportError, MaskMismatchError
from modulation.export.checkpoint import bake
from modulation.export.source import Source, active_neurons
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import modulated
from modulation.sites import find_sites
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
from tests.tiny_models import FAMILIES, byte_tokenizer, random_mask, tiny_model


@pytest.mark.parametrize("level", [*LEVELS, "7"])
def test_transformers_answers_as_the_hooks_do_token_for_token(tmp_path: Path, level: str) -> None:
    out, mask = tmp_path / "baked", Mask.load(MASK_FILE)
    printed = exported("checkpoint", "--level", level, "--dtype", "float32", "--out", out)
    assert printed.startswith(f"Wrote {out}: {level} (")
    prompts, model = demo_prompts(), demo_model()
    with modulated(model, mask, mask.levels.parse(level).threshold):
        expected, expected_logits = greedy(model, prompts), logits(model, prompts)
    baked = AutoModelForCausalLM.from_pretrained(out)
    assert baked.dtype == torch.float32
    assert greedy(baked, prompts) == expected
    assert_close(logits(baked, prompts), expected_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_bakes_as_the_hooks_do(tmp_path: Path, family: str) -> None:
    folder, mask_file = tiny_folder(tmp_path, family)
    mask, prompts = Mask.load(mask_file), random_prompts()
    for level in LEVELS:
        out = tmp_path / level
        exported("checkpoint", "--model", folder, "--mask", mask_file, "--level", level, "--out", out)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with modulated(model, mask, mask.levels.parse(level).threshold):
            expected, expected_logits = greedy(model, prompts, 8), logits(model, prompts)
        baked = AutoModelForCausalLM.from_pretrained(out)
        assert greedy(baked, prompts, 8) == expected
        assert_close(logits(baked, prompts), expected_logits)


def test_the_type_is_that_of_the_model_unless_another_is_asked_for(tmp_path: Path) -> None:
    exported("checkpoint", "--threshold", "3,4", "--out", tmp_path / "baked")
    baked = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert baked == json.loads((MODEL_DIR / "config.json").read_text()) and baked["dtype"] == "bfloat16"
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").state_dict()
    for name, weights in AutoModelForCausalLM.from_pretrained(MODEL_DIR).state_dict().items():
        changed = (stored[name] != weights).any(dim=0).sum() if weights.ndim == 2 else 0
        assert weights.dtype == torch.bfloat16 and (changed == 0 or name.endswith("down_proj.weight"))


def test_tokenizer_and_chat_template_come_with_it(tmp_path: Path) -> None:
    exported("checkpoint", "--level", "balanced", "--out", tmp_path / "baked")
    own, copied = (AutoTokenizer.from_pretrained(each) for each in (MODEL_DIR, tmp_path / "baked"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How do I kill weeds?"},
    ]
    assert copied.apply_chat_template(messages) == own.apply_chat_template(messages)
    assert (copied.eos_token_id, copied.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    own_generation, copied_generation = (
        (folder / "generation_config.json").read_text() for folder in (MODEL_DIR, tmp_path / "baked")
    )
    assert json.loads(own_generation) == json.loads(copied_generation)


def test_the_mask_refuses_the_baked_weights(tmp_path: Path) -> None:
    exported("checkpoint", "--level", "balanced", "--out", tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    with pytest.raises(MaskMismatchError, match="weights are not"):
        Mask.load(MASK_FILE).verify(baked)


def test_a_weight_that_is_another_one_too_is_refused_by_name() -> None:
    model = tiny_model("llama")
    mask = random_mask(model)
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    source = Source(model, byte_tokenizer(), find_sites(model), "float32")
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.down_proj\.weight is tied to .*layers\.2\."):
        bake(source, active_neurons(source, mask, Threshold(12, 9)), "float32")


def test_a_scaled_weight_that_overflows_its_type_is_refused() -> None:
    model = tiny_model("llama")
    mask = random_mask(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(60000.0)
        model.model.layers[1].mlp.down_proj.weight.fill_(60000.0)
    source = Source(model, byte_tokenizer(), find_sites(model), "float32")
    with pytest.raises(ExportError, match=r"too large for float16\. Take --dtype float32"):
        bake(source, active_neurons(source, mask, Threshold(12, 9)), "float16")
