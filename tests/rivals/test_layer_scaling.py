"""Scaled layers against a model whose projection weights were scaled, on every family."""

import pytest
import torch

from modulation.errors import ModulationError
from modulation.rivals.layer_scaling import LayerScaling, layers_scaled, scaling_settings
from modulation.sites import find_sites
from tests.tiny_models import FAMILIES, VOCAB, tiny_model

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
NORMALISED = ("gemma2", "gemma3_text", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_layers_equals_scaling_all_columns_of_their_projections(family: str) -> None:
    factors = {0: -2.0, 2: 0.3}
    model, expected = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for layer, factor in factors.items():
            find_sites(expected)[layer].module.weight.mul_(factor)
        bare = model(TOKENS).logits
        with layers_scaled(model, factors):
            logits = model(TOKENS).logits
        torch.testing.assert_close(logits, expected(TOKENS).logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits, bare, atol=1e-3), "scaling must matter for this test to"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_normalises_what_the_mlp_gives_undoes_a_positive_factor(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        bare = model(TOKENS).logits
        with layers_scaled(model, {1: 3.0}):
            logits = model(TOKENS).logits
    assert torch.allclose(logits, bare, atol=1e-3) == (family in NORMALISED)


def test_the_hooks_come_off_when_the_block_raises() -> None:
    model = tiny_model()
    bare = model(TOKENS).logits
    with pytest.raises(RuntimeError, match="ours"), layers_scaled(model, {0: 2.0, 1: 3.0}):
        raise RuntimeError("ours")
    assert torch.equal(model(TOKENS).logits, bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({0: 2.0, 3: 2.0}, r"Layer 3 is out of range: this model has 3 layers \(0-2\)"),
        ({1: float("inf")}, "Factor inf of layer 1: a finite number is needed"),
    ],
)
def test_what_cannot_be_scaled_is_refused(factors: dict[int, float], said: str) -> None:
    with pytest.raises(ModulationError, match=said), layers_scaled(tiny_model(), factors):
        raise AssertionError("the block must not be entered")


def test_settings_are_every_layer_with_every_factor() -> None:
    found = scaling_settings(2, (0.5, 2.0))
    assert found == [LayerScaling(0, 0.5), LayerScaling(0, 2.0), LayerScaling(1, 0.5), LayerScaling(1, 2.0)]
