"""Steering vectors against plain passes of one prompt at a time, on every family."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation.attribution.base import AttributionData, Example
from modulation.errors import DataError, ModulationError
from modulation.rivals.steering import Steering, steered, steering_settings, steering_vectors
from modulation.sites import find_layers, find_sites
from tests.modulation.attributing import DATA, TOKENIZER, tokens_of
from tests.tiny_models import FAMILIES, LAYERS, VOCAB, tiny_model

LAYER, STRENGTH = 1, 0.7
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(7))
TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
PATHS = {"falcon": "transformer.h", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
PATHS["opt"] = "model.decoder.layers"


def layer_of(model: PreTrainedModel, family: str, layer: int) -> nn.Module:
    return model.get_submodule(f"{PATHS.get(family, 'model.layers')}.{layer}")


@contextmanager
def outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What `module` gives, each time it is called."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _arguments, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    yield seen
    handle.remove()


@torch.no_grad()
def rest_of(model: PreTrainedModel, family: str, stream: Tensor) -> Tensor:
    """The logits, with the layer's output replaced by `stream` from outside."""
    handle = layer_of(model, family, LAYER).register_forward_hook(
        lambda _module, _arguments, output: (stream, *output[1:]) if isinstance(output, tuple) else stream
    )
    try:
        return model(TOKENS).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_whose_children_are_the_sites(family: str) -> None:
    model = tiny_model(family)
    layers = find_layers(model)
    assert len(layers) == LAYERS == len(find_sites(model))
    for index, (layer, site) in enumerate(zip(layers, find_sites(model), strict=True)):
        assert layer is layer_of(model, family, index)
        assert any(module is site.module for module in layer.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_steered_stream_is_the_plain_one_plus_strength_times_the_vector(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad(), outputs(layer_of(model, family, LAYER)) as plain:
        bare = model(TOKENS).logits
    with torch.no_grad(), steered(model, VECTOR, LAYER, STRENGTH):
        with outputs(layer_of(model, family, LAYER)) as changed:
            logits = model(TOKENS).logits
    torch.testing.assert_close(changed[0], plain[0] + STRENGTH * VECTOR)
    torch.testing.assert_close(logits, rest_of(model, family, plain[0] + STRENGTH * VECTOR))
    assert not torch.allclose(logits, bare, atol=1e-3), "steering must matter for this test to"


def test_from_the_last_prompt_token_on_only_it_and_the_answer_are_steered() -> None:
    """Generation with a cache: the first pass holds the prompt, the following ones a token each."""
    model = tiny_model()
    layer = layer_of(model, "llama", LAYER)
    with steered(model, VECTOR, LAYER, STRENGTH, from_last_prompt_token=True), outputs(layer) as changed:
        answer = model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with torch.no_grad(), outputs(layer) as plain:
        model(answer)
    torch.testing.assert_close(changed[0][:, :-1], plain[0][:, :8])
    torch.testing.assert_close(changed[0][:, -1], plain[0][:, 8] + STRENGTH * VECTOR)
    # Below the steered layer nothing changed, so what the answer's tokens give there is the plain pass's.
    for step in (1, 2):
        torch.testing.assert_close(changed[step][:, 0], plain[0][:, 8 + step] + STRENGTH * VECTOR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_vector_is_the_difference_of_the_means_at_the_last_prompt_token(
    family: str, batch_size: int
) -> None:
    model = tiny_model(family, vocab_size=len(TOKENIZER))

    def mean(examples: tuple[Example, ...], layer: int) -> Tensor:
        found = []
        for example in examples:
            tokens, start = tokens_of(TOKENIZER, example, "")
            with torch.no_grad(), outputs(layer_of(model, family, layer)) as seen:
                model(torch.tensor([tokens]))
            found.append(seen[0].reshape(len(tokens), -1)[start - 1])
        return torch.stack(found).mean(dim=0)

    vectors = steering_vectors(model, TOKENIZER, DATA, batch_size)
    assert vectors.dtype == torch.float32
    expected = [mean(DATA.harmful, layer) - mean(DATA.benign, layer) for layer in range(LAYERS)]
    torch.testing.assert_close(vectors, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_the_hook_comes_off_when_the_block_raises() -> None:
    model = tiny_model()
    bare = model(TOKENS).logits
    with pytest.raises(RuntimeError, match="ours"), steered(model, VECTOR, LAYER, STRENGTH):
        raise RuntimeError("ours")
    assert torch.equal(model(TOKENS).logits, bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_vector_of_another_precision_leaves_the_streams_precision() -> None:
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad(), steered(model, VECTOR, LAYER, STRENGTH):
        assert model(TOKENS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vector", "layer", "strength", "said"),
    [
        (VECTOR, 3, 1.0, r"Layer 3 is out of range: this model has 3 layers \(0-2\)"),
        (VECTOR, -1, 1.0, "Layer -1 is out of range"),
        (VECTOR[:31], 0, 1.0, r"shape \(31,\) does not fit: this model's residual stream is \(32,\)"),
        (VECTOR[None], 0, 1.0, r"shape \(1, 32\) does not fit"),
        (VECTOR, 0, float("nan"), "Strength nan"),
        (VECTOR / 0, 0, 1.0, "not finite"),
    ],
)
def test_what_cannot_be_added_is_refused(vector: Tensor, layer: int, strength: float, said: str) -> None:
    with pytest.raises(ModulationError, match=said), steered(tiny_model(), vector, layer, strength):
        raise AssertionError("the block must not be entered")


def test_vectors_need_both_kinds_of_prompts_and_a_batch() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    without = AttributionData(harmful=DATA.harmful, attacked={}, benign=(), borderline=())
    with pytest.raises(DataError, match="no benign prompts"):
        steering_vectors(model, TOKENIZER, without)
    with pytest.raises(DataError, match="batch_size=0"):
        steering_vectors(model, TOKENIZER, DATA, 0)


def test_a_pass_that_goes_past_the_layer_is_an_error() -> None:
    model = tiny_model()
    layers = model.get_submodule("model.layers")
    with pytest.raises(ModulationError, match="did not go through 1 of 1 changed modules"):
        with steered(model, VECTOR, LAYER, STRENGTH):
            layers[LAYER].__class__ = _Bypassed
            model(TOKENS)


class _Bypassed(nn.Module):
    """A layer whose call runs no hooks, as one in a fused kernel would."""

    def __call__(self, stream: Tensor, **_: object) -> Tensor:
        return stream


def test_settings_are_every_layer_with_every_strength() -> None:
    found = steering_settings(2, (0.5, 1.0))
    assert found == [Steering(0, 0.5), Steering(0, 1.0), Steering(1, 0.5), Steering(1, 1.0)]
