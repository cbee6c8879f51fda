"""The scores file: what is written comes back, and nothing else is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from modulation.attribution.scores import SCORES, ScoresFile, ScoresMetadata
from modulation.errors import MaskFormatError, ScoresError
from modulation.fingerprints import fingerprint
from modulation.masks import Mask
from tests.tiny_models import LAYERS, WIDTH, random_mask, save_mask, tiny_model


def made(**changes: Any) -> ScoresFile:
    values = np.random.default_rng(0).normal(size=(2, LAYERS, WIDTH)).astype(np.float32)
    metadata = ScoresMetadata(
        method="contrast",
        options={"answer_tokens": 4},
        model_id="tiny",
        architecture="LlamaForCausalLM",
        model_fingerprint=fingerprint(tiny_model()),
        num_layers=LAYERS,
        neurons_per_layer=WIDTH,
        data_digest="0" * 16,
        seed=3,
        dtype="float32",
        batch_size=16,
    )
    return ScoresFile(values[0], values[1], metadata.model_copy(update=changes))


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path, scores = tmp_path / "scores.safetensors", made()
    scores.save(path)
    found = ScoresFile.load(path)
    assert found.metadata == scores.metadata
    assert np.array_equal(found.safety, scores.safety) and np.array_equal(found.utility, scores.utility)
    assert torch.equal(found.scores.safety, torch.from_numpy(scores.safety))
    assert found.to_bytes() == path.read_bytes() and list(tmp_path.iterdir()) == [path]
    found.verify(tiny_model())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "weights are not: use this model's own scores file, or make one"),
        ({"family": "gpt2"}, "The scores file was made for architecture LlamaForCausalLM"),
        ({"num_hidden_layers": 2}, "3 layers"),
        ({"intermediate_size": 40}, "48 neurons per layer"),
    ],
)
def test_scores_of_another_model_are_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ScoresError, match=words):
        made().verify(tiny_model(**other))


def test_files_that_are_no_scores_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ScoresError, match=r"scores\.safetensors cannot be read: No such file"):
        ScoresFile.load(path)
    torch.save({"safety": torch.zeros(2)}, path)
    with pytest.raises(ScoresError, match=r"scores\.safetensors: this is a pickle"):
        ScoresFile.load(path)
    path.write_bytes(made().to_bytes()[:-5])
    with pytest.raises(ScoresError, match="not a whole safetensors file"):
        ScoresFile.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(
        ScoresError, match="without the metadata entry 'neurontune_scores': not a scores file"
    ):
        ScoresFile.load(path)


def test_a_mask_is_no_scores_file_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match="without the metadata entry 'neurontune_scores'"):
        ScoresFile.load(save_mask(random_mask(tiny_model()), tmp_path))
    made().save(tmp_path / "scores.safetensors")
    with pytest.raises(MaskFormatError):
        Mask.load(tmp_path / "scores.safetensors")


def rewritten(path: Path, metadata: str, **tensors: np.ndarray) -> Path:
    save_file(tensors, path, metadata={SCORES.metadata_key: metadata})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2 is not supported; this program reads 1"),
        ({"seed": "3"}, "metadata field 'seed'"),
        ({"num_layers": 4}, r"shape \(3, 48\); expected float32 of \(4, 48\)"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    scores = made()
    text = json.dumps({**scores.metadata.model_dump(mode="json"), **changes})
    path = rewritten(tmp_path / "s", text, safety=scores.safety, utility=scores.utility)
    with pytest.raises(ScoresError, match=words):
        ScoresFile.load(path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scores = made()
    path = rewritten(tmp_path / "s", scores.metadata.model_dump_json(), safety=scores.safety)
    with pytest.raises(ScoresError, match="holds the tensors safety; a scores file holds safety and utility"):
        ScoresFile.load(path)
    with pytest.raises(ScoresError, match="'utility' is float64"):
        replace(scores, utility=scores.utility.astype(np.float64))
    broken = scores.safety.copy()
    broken[1, 5] = np.nan
    with pytest.raises(ScoresError, match="holds nan for neuron 5 of layer 1, 1 in all are not finite"):
        replace(scores, safety=broken)
