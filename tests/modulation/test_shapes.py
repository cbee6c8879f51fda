"""A model's shape and the fingerprint of its weights, without loading them."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.errors import MaskMismatchError, ModelError
from modulation.fingerprints import fingerprint
from modulation.masks import Mask
from modulation.shapes import read_shape
from modulation.sites import find_sites
from tests.tiny_models import FAMILIES, random_mask, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_fingerprint_of_its_loaded_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert shape.fingerprint == fingerprint(loaded)
    assert all(parameter.is_meta for parameter in shape.model.parameters())
    assert [site.width for site in find_sites(shape.model)] == [site.width for site in find_sites(loaded)]


def test_a_checkpoint_in_shards_reads_as_one_in_a_file(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_shape(str(tmp_path)).fingerprint == fingerprint(model)


def test_the_shipped_mask_fits_the_shape_of_its_model_and_no_other(tmp_path: Path) -> None:
    shape = read_shape(str(MODEL_DIR))
    Mask.load(MASK_FILE).verify(shape.model, shape.fingerprint)
    tiny_model(seed=1).save_pretrained(tmp_path)
    other = read_shape(str(tmp_path))
    with pytest.raises(MaskMismatchError):
        random_mask(tiny_model(seed=2)).verify(other.model, other.fingerprint)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_shape(str(tmp_path))
