"""A mask file comes back as it was written; anything broken or foreign is refused by name."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from modulation.errors import MaskFileError, MaskFormatError, MaskMismatchError
from modulation.fingerprints import fingerprint
from modulation.masks import Mask, MaskMetadata, NeuronSet, describe
from tests.tiny_models import random_mask, tiny_model


@pytest.fixture(scope="module")
def mask() -> Mask:
    return random_mask(tiny_model())


def with_metadata(mask: Mask, **fields: Any) -> Mask:
    return Mask(mask.safety, mask.utility, MaskMetadata(**{**mask.metadata.model_dump(), **fields}))


def test_a_saved_mask_is_the_same_mask_and_the_same_bytes(mask: Mask, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded.digest == mask.digest
    assert loaded.to_bytes() == path.read_bytes() == mask.to_bytes()
    assert np.array_equal(loaded.safety.neurons, mask.safety.neurons)
    assert np.array_equal(loaded.utility.factors, mask.utility.factors)
    assert loaded.metadata == mask.metadata
    assert not list(tmp_path.glob("*.partial"))


def test_a_change_of_one_factor_changes_the_digest(mask: Mask) -> None:
    factors = mask.safety.factors.copy()
    factors[0] += 0.25
    assert replace(mask, safety=NeuronSet(mask.safety.neurons, factors)).digest != mask.digest


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match=r"none\.safetensors cannot be read: No such file"):
        Mask.load(tmp_path / "none.safetensors")


def test_every_truncation_is_refused(mask: Mask) -> None:
    contents = mask.to_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(contents) // 2, len(contents) - 1]:
        with pytest.raises(MaskFileError):
            Mask.from_bytes(contents[:length])


class Bomb:
    """Unpickling this would fail the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was executed",)


def test_a_pickle_by_another_name_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(MaskFileError, match="pickle"):
        Mask.load(path)
    torch.save({"safety": Bomb()}, path)
    with pytest.raises(MaskFileError, match="pickle"):
        Mask.load(path)


@pytest.mark.parametrize("begin", [b"\x80", b"PK"])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(mask: Mask, tmp_path: Path, begin: bytes) -> None:
    """A safetensors file begins with its header's length: one mask in 32 began like a pickle."""
    length = len(mask.to_bytes())
    wanted = int.from_bytes(begin, "little")
    while wanted < length:
        wanted += 1 << 8 * len(begin)
    named = with_metadata(mask, model_id="")
    header = int.from_bytes(named.to_bytes()[:8], "little")
    path = tmp_path / "mask.safetensors"
    for spare in range(8):  # the writer pads the header to a multiple of eight
        with_metadata(mask, model_id="m" * (wanted - header - spare)).save(path)
        if path.read_bytes().startswith(begin):
            break
    assert path.read_bytes().startswith(begin)
    assert len(Mask.load(path).safety) == len(mask.safety)


def test_a_safetensors_file_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(MaskFormatError, match=r"lm_head\.weight"):
        Mask.load(path)


def rewritten(mask: Mask, tmp_path: Path, **raw: Any) -> Path:
    """The mask's file with raw metadata fields replaced, past all validation."""
    path = tmp_path / "edited.safetensors"
    metadata = {**mask.metadata.model_dump(mode="json"), **raw}
    tensors = {
        f"{kind}.{name}": getattr(getattr(mask, kind), name)
        for kind in ("safety", "utility")
        for name in ("neurons", "factors")
    }
    save_file(tensors, path, metadata={"neurontune": json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"operation": "add"}, "operation 'add' is not supported; this program applies 'multiply'"),
        ({"site": "residual_stream"}, "site 'residual_stream' is not supported"),
        ({"layer_base": 1}, "layer_base 1 is not supported"),
        ({"format_version": 2}, "format version 2 is not supported"),
        ({"num_layers": "many"}, "metadata field 'num_layers'"),
        ({"surprise": 1}, "metadata field 'surprise'"),
        ({"num_layers": 10**30}, "metadata field 'num_layers'"),
        ({"levels": {"security-critical": ["5", True]}}, "metadata field 'levels"),
        ({"format_version": True}, "format version True is not supported"),
        ({"layer_base": False}, "metadata field 'layer_base'"),
        ({"num_layers": 2}, "safety.neurons names layer 2; this mask's model has 2"),
        ({"neurons_per_layer": 8}, "names neuron"),
        ({"levels": {"balanced": [1, 1]}}, "levels cannot be used.*security-critical"),
        ({"levels": {"security-critical": [99, 1]}}, "levels cannot be used.*99"),
    ],
)
def test_metadata_that_this_program_would_misread_is_refused(
    mask: Mask, tmp_path: Path, raw: dict[str, Any], message: str
) -> None:
    with pytest.raises(MaskFormatError, match=message):
        Mask.load(rewritten(mask, tmp_path, **raw))


@pytest.mark.parametrize("factor", [np.nan, np.inf, -0.5, 1e6])
def test_a_factor_that_no_method_gives_is_refused(mask: Mask, factor: float) -> None:
    factors = mask.safety.factors.copy()
    factors[3] = factor
    with pytest.raises(MaskFormatError, match=r"safety\.factors holds"):
        replace(mask, safety=NeuronSet(mask.safety.neurons, factors))


def test_a_neuron_in_both_sets_is_refused(mask: Mask) -> None:
    neurons = mask.utility.neurons.copy()
    neurons[0] = mask.safety.neurons[0]
    with pytest.raises(MaskFormatError, match="listed twice"):
        replace(mask, utility=NeuronSet(neurons, mask.utility.factors))


def test_a_mask_fits_the_model_it_was_made_for_whatever_the_dtype(mask: Mask) -> None:
    mask.verify(tiny_model())
    mask.verify(tiny_model().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "MistralForCausalLM"}, "made for architecture MistralForCausalLM"),
        ({"num_layers": 4}, "made for 4 layers.*this model has 3"),
        ({"neurons_per_layer": 64}, "made for 64 neurons per layer.*layer 0 of this model has 48"),
        ({"model_fingerprint": "0" * 16}, "fingerprint 0000000000000000.*weights are not"),
    ],
)
def test_each_way_of_not_fitting_a_model_has_its_own_error(
    mask: Mask, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(MaskMismatchError, match=message):
        with_metadata(mask, **fields).verify(tiny_model())


def test_a_change_of_any_single_weight_changes_the_fingerprint() -> None:
    model = tiny_model()
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            kept = flat[-1].item()
            flat[-1] = kept + 1.0
            assert fingerprint(model) != before, name
            flat[-1] = kept
    assert fingerprint(model) == before


def test_inspecting_a_mask_shows_what_is_in_it(mask: Mask) -> None:
    text = describe(mask)
    for expected in (mask.digest, "LlamaForCausalLM", "3 layers x 48 = 144", "security-critical", "(12, 9)"):
        assert expected in text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "without the metadata entry"),
        ({"neurontune": "[" * 100_000}, "not JSON that can be read"),
        ({"neurontune": '{"num_layers": ' + "9" * 5000 + "}"}, "not JSON that can be read"),
        ({"neurontune": "[]"}, "not a JSON object"),
        ({"neurontune": "{}", "format": "pt"}, "unknown metadata entry 'format'"),
    ],
)
def test_metadata_made_to_break_the_reader_is_refused(
    mask: Mask, tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    path = tmp_path / "crafted.safetensors"
    tensors = {
        f"{kind}.{name}": getattr(getattr(mask, kind), name)
        for kind in ("safety", "utility")
        for name in ("neurons", "factors")
    }
    save_file(tensors, path, metadata=entries)
    with pytest.raises(MaskFormatError, match=message):
        Mask.load(path)


def test_the_digest_is_that_of_the_file_whoever_wrote_it(mask: Mask, tmp_path: Path) -> None:
    contents = rewritten(mask, tmp_path, model_id="another name").read_bytes()
    assert Mask.from_bytes(contents).digest == hashlib.sha256(contents).hexdigest()
    assert mask.digest == hashlib.sha256(mask.to_bytes()).hexdigest()
