"""Every family of the table keeps its neurons where the table says."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modulation.errors import UnsupportedModelError
from modulation.levels import Threshold
from modulation.masks import Mask, MaskMetadata, NeuronSet
from modulation.modulator import modulated
from modulation.sites import SUPPORTED_FAMILIES, find_sites, input_dimension
from tests.tiny_models import FAMILIES, LAYERS, VOCAB, WIDTH, random_mask, tiny_model


def test_every_family_of_the_table_is_tested() -> None:
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_tensor_has_the_width_of_the_config(family: str) -> None:
    model = tiny_model(family)
    seen: list[int] = []
    for site in find_sites(model):
        site.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[-1]))
    model(torch.arange(3, 13)[None])
    assert seen == [WIDTH] * LAYERS == [site.width for site in find_sites(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_modulating_one_neuron_equals_scaling_its_column_of_the_projection(family: str) -> None:
    layer, index, factor = 1, 17, 3.5
    tokens = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    model = tiny_model(family)
    mask = _one_neuron_mask(random_mask(model), layer, index, factor)
    with torch.no_grad():
        bare = model(tokens).logits
        with modulated(model, mask, Threshold(1, 0)):
            modulated_logits = model(tokens).logits

        scaled = tiny_model(family)
        projection = find_sites(scaled)[layer].module
        projection.weight.select(input_dimension(projection), index).mul_(factor)
        expected = scaled(tokens).logits
    assert not torch.allclose(bare, expected, atol=1e-4), "the neuron must matter for this test to"
    torch.testing.assert_close(modulated_logits, expected, atol=2e-5, rtol=1e-5)


def _one_neuron_mask(like: Mask, layer: int, index: int, factor: float) -> Mask:
    import numpy as np

    fields = like.metadata.model_dump()
    fields["levels"] = {"security-critical": (1, 0)}
    return Mask(
        safety=NeuronSet(np.array([[layer, index]], np.int32), np.array([factor], np.float32)),
        utility=NeuronSet(np.zeros((0, 2), np.int32), np.zeros(0, np.float32)),
        metadata=MaskMetadata(**fields),
    )


def test_an_unknown_family_is_refused_with_the_list_of_supported_ones() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"'bloom'.*falcon.*llama.*stablelm"):
        find_sites(model)


def test_a_mixture_of_experts_is_refused_with_its_number_of_experts() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"mixture of experts .*=4.*llama"):
        find_sites(model)
