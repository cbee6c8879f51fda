"""The arithmetic of modulation, against a NumPy oracle that shares no code with it."""

import gc

import numpy as np
import pytest
import torch

from modulation.errors import MaskMismatchError, ModulationError
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator, modulated
from modulation.sites import find_sites
from tests.tiny_models import VOCAB, random_mask, tiny_model

TOKENS = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.usefixtures("both_ways")


def oracle(activations: np.ndarray, layer: int, mask: Mask, thresholds: list[Threshold]) -> np.ndarray:
    """a'[t, i] = a[t, i] * (g_i if r_i < n_t else 1), written out. activations: (rows, tokens, width)."""
    result = activations.copy()
    for row, threshold in enumerate(thresholds):
        for neurons, limit in ((mask.safety, threshold.num_safety), (mask.utility, threshold.num_utility)):
            for rank in range(limit):
                if neurons.neurons[rank][0] == layer:
                    index = neurons.neurons[rank][1]
                    result[row, :, index] = activations[row, :, index] * neurons.factors[rank]
    return result


def site_inputs(model: torch.nn.Module, tokens: torch.Tensor, *, before_hooks: bool) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    handles = [
        site.module.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].detach().numpy().copy()), prepend=before_hooks
        )
        for site in find_sites(model)  # type: ignore[arg-type]
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_row_is_modulated_at_its_own_threshold(family: str) -> None:
    model = tiny_model(family)
    mask = random_mask(model)
    thresholds = [Threshold(0, 0), Threshold(12, 9), Threshold(5, 1), Threshold(0, 4)]
    with Modulator(model, mask).applied(thresholds):
        before = site_inputs(model, TOKENS, before_hooks=True)
        after = site_inputs(model, TOKENS, before_hooks=False)
    assert len(before) == len(after) == 3
    for layer, (bare, changed) in enumerate(zip(before, after, strict=True)):
        shape = (4, 9, bare.shape[-1])
        expected = oracle(bare.reshape(shape), layer, mask, thresholds)
        np.testing.assert_array_equal(changed.reshape(shape), expected)
        assert not np.array_equal(changed, bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_off_is_bit_identical_to_the_bare_model(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    mask = random_mask(model)
    with torch.no_grad():
        bare = model(TOKENS).logits
        with modulated(model, mask, Threshold(0, 0)):
            off = model(TOKENS).logits
    assert torch.equal(bare, off)


def test_an_off_row_beside_modulated_rows_is_what_it_is_among_off_rows() -> None:
    model = tiny_model()
    modulator = Modulator(model, random_mask(model))
    with torch.no_grad():
        bare = model(TOKENS).logits
        with modulator.applied([Threshold(0, 0), Threshold(12, 9), Threshold(12, 9), Threshold(3, 3)]):
            mixed = model(TOKENS).logits
    assert torch.equal(bare[0], mixed[0])
    assert not torch.allclose(bare[1], mixed[1])


def test_infinities_and_nan_of_untouched_neurons_pass_unchanged() -> None:
    model = tiny_model()
    mask = random_mask(model)
    site = find_sites(model)[0]
    activations = torch.randn(1, 2, site.width)
    activations[0, 0, ::7] = torch.inf
    activations[0, 1, ::5] = torch.nan
    seen = []
    modulator = Modulator(model, mask)
    with modulator:
        modulator.set_thresholds(torch.tensor([[0, 0]]))
        site.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        site.module(activations)
    torch.testing.assert_close(seen[0], activations, rtol=0, atol=0, equal_nan=True)


def test_generation_is_modulated_at_every_token() -> None:
    model = tiny_model()
    mask = random_mask(model)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with modulated(model, mask, Threshold(12, 9)):
        cached = model.generate(TOKENS[:1], **settings)
        uncached = model.generate(TOKENS[:1], use_cache=False, **settings)
    bare = model.generate(TOKENS[:1], **settings)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, bare)


def test_hooks_come_off_however_the_block_ends() -> None:
    model = tiny_model()
    with torch.no_grad():
        bare = model(TOKENS).logits
        with (
            pytest.raises(RuntimeError, match="boom"),
            modulated(model, random_mask(model), Threshold(12, 9)),
        ):
            raise RuntimeError("boom")
        assert torch.equal(model(TOKENS).logits, bare)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_without_thresholds_is_refused() -> None:
    model = tiny_model()
    with Modulator(model, random_mask(model)), pytest.raises(ModulationError, match="refusing"):
        model(TOKENS)


def test_a_forward_pass_that_goes_past_a_site_is_noticed() -> None:
    model = tiny_model()
    modulator = Modulator(model, random_mask(model))
    site = find_sites(model)[1].module
    with (
        pytest.raises(ModulationError, match=r"model\.layers\.1.*bypasses the hooks"),
        modulator.applied(Threshold(1, 1)),
    ):
        site._forward_pre_hooks.clear()
        model(TOKENS)


def test_thresholds_for_another_number_of_rows_are_refused() -> None:
    model = tiny_model()
    modulator = Modulator(model, random_mask(model))
    with (
        modulator.applied([Threshold(1, 1)] * 3),
        pytest.raises(ModulationError, match=r"3 thresholds.*4 rows"),
    ):
        model(TOKENS)
    with modulator:
        modulator.set_thresholds(torch.zeros(5, 2, dtype=torch.int32))
        with pytest.raises(ModulationError, match=r"5 tokens.*36"):
            model(TOKENS)


def test_a_mask_for_other_weights_never_gets_hooks() -> None:
    model = tiny_model(seed=1)
    with pytest.raises(MaskMismatchError):
        Modulator(model, random_mask(tiny_model(seed=0)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_a_pass_holds_does_not_grow_with_the_number_of_levels() -> None:
    """Neither with levels that have a name, nor with different thresholds in a batch."""
    model = tiny_model()
    mask = random_mask(model)
    many = {f"level-{number}": (1 + number % 12, number % 9) for number in range(100)}
    named = Mask(
        mask.safety,
        mask.utility,
        mask.metadata.model_copy(update={"levels": {**mask.metadata.levels, **many}}),
    )

    def tensors() -> dict[int, torch.Tensor]:
        gc.collect()
        return {id(each): each for each in gc.get_objects() if type(each) is torch.Tensor}

    def held(mask: Mask, thresholds: torch.Tensor) -> int:
        """Bytes."""
        before = tensors()
        modulator = Modulator(model, mask)
        with modulator, torch.no_grad():
            modulator.set_thresholds(thresholds)
            made = [each.untyped_storage() for name, each in tensors().items() if name not in before]
            return sum({each.data_ptr(): each.nbytes() for each in made}.values())

    alike = torch.tensor([[12, 9]] * 100, dtype=torch.int32)
    different = torch.tensor([[number % 13, number % 10] for number in range(100)], dtype=torch.int32)
    assert held(mask, alike) == held(mask, different) == held(named, different) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_multiply_all_activations_and_many_take_neurons_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: a multiplication by float32 factors in place converts other types, which takes longer."""
    taken: list[str] = []
    for name in ("_widened", "_gathered"):
        whole = getattr(Modulator, name)
        monkeypatch.setattr(
            Modulator, name, lambda *given, name=name, whole=whole: taken.append(name) or whole(*given)
        )
    model = tiny_model().to(dtype)
    width = find_sites(model)[0].width
    monkeypatch.setattr("modulation.modulator._MOST_WIDENED", 10 * width)
    for num_tokens in (1, 10, 11):
        with torch.no_grad():
            Modulator(model, random_mask(model)).set_thresholds(torch.zeros(num_tokens, 2, dtype=torch.int32))
    Modulator(model, random_mask(model)).set_thresholds(torch.zeros(1, 2, dtype=torch.int32))
    few = "_widened" if dtype == torch.float32 else "_gathered"
    assert taken == [few, few, "_gathered", "_gathered"]


def test_gradients_flow_also_where_thresholds_were_set_without_any() -> None:
    found = []
    for with_gradients in (True, False):
        model = tiny_model()
        modulator = Modulator(model, random_mask(model))
        with modulator:
            with torch.set_grad_enabled(with_gradients):
                modulator.set_thresholds(torch.tensor([[12, 9]], dtype=torch.int32))
            model(TOKENS).logits.square().sum().backward()
        found.append(model.get_input_embeddings().weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1])
