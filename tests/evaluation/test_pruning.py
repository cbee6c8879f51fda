"""Pruning against weights whose columns are set to zero by hand, and that it always ends."""

import copy

import numpy as np
import pytest
import torch

from modulation.errors import ModulationError
from modulation.evaluation.pruning import pruned
from modulation.levels import Threshold
from modulation.modulator import Modulator
from modulation.sites import find_sites, input_dimension
from tests.tiny_models import VOCAB, WIDTH, random_mask, tiny_model

TOKENS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
NEURONS = np.array([[0, 3], [2, 47], [2, 0], [0, 3]], np.int32)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_pruning_is_a_column_of_zeros_in_the_output_projection(family: str) -> None:
    model = tiny_model(family)
    bare = model(TOKENS).logits
    cut = copy.deepcopy(model)
    for layer, index in NEURONS.tolist():
        module = find_sites(cut)[layer].module
        module.weight.select(input_dimension(module), index).zero_()  # type: ignore[operator, union-attr]
    with pruned(model, NEURONS):
        found = model(TOKENS).logits
    torch.testing.assert_close(found, cut(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, bare)
    assert torch.equal(model(TOKENS).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("pruned_first", [True, False])
def test_no_level_brings_a_pruned_neuron_back(pruned_first: bool) -> None:
    """Zero times any factor is zero, whichever of the two hooks comes first; the others keep theirs."""
    model = tiny_model()
    mask = random_mask(model)
    modulator, top = Modulator(model, mask), mask.safety.neurons[:5]
    cut = copy.deepcopy(model)
    for layer, index in top.tolist():
        find_sites(cut)[layer].module.weight[:, index] = 0.0
    for layer, index, factor in [
        *(pair for pair in zip(*mask.safety.neurons.T, mask.safety.factors, strict=True)),
        *(pair for pair in zip(*mask.utility.neurons[:4].T, mask.utility.factors[:4], strict=True)),
    ]:
        find_sites(cut)[layer].module.weight[:, index] *= float(factor)
    blocks = [pruned(model, top), modulator.applied(Threshold(12, 4))]
    first, second = blocks if pruned_first else reversed(blocks)
    with first, second:
        found = model(TOKENS).logits
    torch.testing.assert_close(found, cut(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_neuron_that_is_not_a_number_is_still_zero() -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    module = find_sites(model)[0].module
    with pruned(model, NEURONS):
        module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
        activations = torch.full((1, 2, WIDTH), torch.nan)
        module(activations)
    assert (seen[0][..., 3] == 0).all() and seen[0].isnan().sum() == 2 * (WIDTH - 1)


@torch.no_grad()
def test_hooks_come_off_however_the_block_ends() -> None:
    model = tiny_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(RuntimeError, match="boom"), pruned(model, NEURONS):
        raise RuntimeError("boom")
    with pytest.raises(ModulationError, match=r"layer 3.*layers 0-2 of neurons 0-47"):
        pruned(model, np.array([[3, 0]], np.int32)).__enter__()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@torch.no_grad()
def test_a_forward_pass_that_goes_past_a_site_is_noticed() -> None:
    model = tiny_model()
    with pytest.raises(ModulationError, match=r"model\.layers\.2.*cannot be pruned"), pruned(model, NEURONS):
        find_sites(model)[2].module._forward_pre_hooks.clear()
        model(TOKENS)
