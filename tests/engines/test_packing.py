"""Linear layers whose weights are laid out anew give what they gave, and large ones take no more memory."""

from dataclasses import replace

import psutil
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaMLP

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.errors import MaskMismatchError, ModelError
from modulation.levels import Threshold
from modulation.loading import load_model
from modulation.masks import Mask
from modulation.modulator import Modulator
from server.engines.base import GenerateRequest
from server.engines.packing import pack_weights, padded_rows
from server.engines.transformers import TransformersEngine
from tests.engines.contract import GREEDY, collect, tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")

LARGE, MEDIUM, SMALL = (512, 1024), (640, 192), (192, 192)  # (in, out)


def is_packed(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [LARGE, MEDIUM])
@pytest.mark.parametrize("rows", [(1,), (2,), (1, 1), (1, 5), (2, 3, 7), (1, 600), (0,)])
def test_results_are_the_same_up_to_rounding(
    shape: tuple[int, int], rows: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=bias).to(dtype)
    given = torch.randn(*rows, shape[0], dtype=dtype)
    weight, offset = layer.weight.detach().double(), layer.bias.detach().double() if bias else 0
    expected = torch.einsum("...i,oi->...o", given.double(), weight) + offset
    with torch.no_grad():
        pack_weights(layer)
        found = layer(given)
    assert is_packed(layer)
    assert found.dtype == dtype and found.shape == expected.shape
    near = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=near)


def test_few_numbers_of_rows_are_computed_and_none_with_many_more_than_are_there() -> None:
    computed = {number: padded_rows(number) for number in range(513)}
    assert all(number <= found for number, found in computed.items())
    assert all(found <= 1.25 * number for number, found in computed.items() if number > 16)
    assert all(found - number <= 3 for number, found in computed.items() if number <= 16)
    assert len(set(computed.values())) < 32
    assert (computed[1], computed[512]) == (1, 512)


def test_programs_for_many_numbers_of_rows_do_not_fill_the_memory() -> None:
    """Made for each of 512 numbers they took 400 MB for each shape of a weight."""
    layer = nn.Linear(*LARGE)
    pack_weights(layer)
    process = psutil.Process()
    with torch.no_grad():
        layer(torch.randn(512, LARGE[0]))
        before = process.memory_info().rss
        for number in range(1, 513):
            layer(torch.randn(number, LARGE[0]))
    assert process.memory_info().rss - before < 60 * 2**20


def test_hooks_see_what_they_saw() -> None:
    layer = nn.Linear(*LARGE, bias=False)
    pack_weights(layer)
    given = torch.randn(3, LARGE[0])
    with torch.no_grad():
        twice = layer(2 * given)
        layer.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0],))
        torch.testing.assert_close(layer(given), twice)


def test_what_is_not_contiguous_is_read_as_it_is() -> None:
    layer = nn.Linear(*LARGE)
    given = torch.randn(LARGE[0], 6).T[::2]
    with torch.no_grad():
        expected = layer(given)
        pack_weights(layer)
        torch.testing.assert_close(layer(given), expected)


def test_a_large_weight_is_given_up_and_what_reads_it_learns_nothing() -> None:
    layer = nn.Linear(*LARGE)
    pack_weights(layer)
    weight = layer.weight
    assert weight.shape == LARGE[::-1] and weight.dtype == torch.float32
    assert weight.untyped_storage().nbytes() == 4
    assert weight.isnan().all()


def test_a_weight_that_another_module_uses_stays() -> None:
    words = nn.Embedding(LARGE[1], LARGE[0])
    head = nn.Linear(*LARGE, bias=False)
    head.weight = words.weight
    before = words.weight.detach().clone()
    pack_weights(nn.ModuleList([words, head]))
    assert is_packed(head) and head.weight is words.weight
    assert torch.equal(words.weight, before)


def test_what_it_would_not_make_faster_is_left_alone() -> None:
    class Other(nn.Linear):
        """Which may compute something else."""

    layers = [nn.Linear(*SMALL), Other(*LARGE), nn.Linear(*LARGE).half(), nn.Linear(*LARGE, device="meta")]
    pack_weights(nn.ModuleList(layers))
    assert not any(map(is_packed, layers))
    assert not layers[2].weight.isnan().any()


def test_without_onednn_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(*LARGE)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    pack_weights(layer)
    assert not is_packed(layer)


@pytest.mark.anyio
async def test_the_engine_serves_with_packed_weights_and_knows_whose_masks_fit() -> None:
    mask = Mask.load(MASK_FILE)
    level = Threshold(19, 38)
    engine = TransformersEngine(
        str(MODEL_DIR), MASK_FILE, served_model_name="demo", device="cpu", dtype="float32"
    )
    try:
        layers = engine._model.model.layers
        assert all(is_packed(each.mlp.down_proj) and is_packed(each.mlp.up_proj) for each in layers)
        model = load_model(str(MODEL_DIR), device="cpu", dtype="float32")
        prompt = torch.arange(20, 50)
        with Modulator(model, mask).applied(level):
            expected = model.generate(prompt[None], max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        request = GenerateRequest(tuple(prompt.tolist()), level, GREEDY, 24)
        assert tokens(await collect(engine.generate(request))) == tuple(expected.tolist())
        metadata = mask.metadata.model_copy(update={"model_fingerprint": "0" * 16})
        with pytest.raises(MaskMismatchError, match="0000000000000000"):
            await engine.use_mask(replace(mask, metadata=metadata))
        assert (await engine.use_mask(mask)).mask_digest == mask.digest
    finally:
        await engine.close()


def test_a_model_whose_code_takes_the_weight_itself_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads NaN, so the probes at the start fail."""

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(linear(x, self.gate_proj.weight)) * self.up_proj(x))

    monkeypatch.setattr("server.engines.packing._FEWEST_FOR_ONE_ROW", 1)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ModelError, match="NaN or infinity"):
        TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo", device="cpu", dtype="float32")
