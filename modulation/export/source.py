"""The model that is exported from: as it is stored, whole, and the one that the mask was made for.

Knows models, masks and sites. Knows nothing of formats that are exported to.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from modulation.demo import DEMO, MODEL_DIR
from modulation.errors import ExportError, ModelError
from modulation.levels import Threshold
from modulation.loading import load_model, load_tokenizer
from modulation.masks import Mask
from modulation.sites import Site, find_sites, input_dimension

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model, its tokenizer, its sites, and the type that its weights are stored as."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sites: list[Site]
    dtype: str


@dataclass(frozen=True)
class Scaled:
    """A site's neurons that are active at a level: their indices, int64 (neurons,), and factors, float64."""

    site: Site
    columns: Tensor
    factors: Tensor


def open_source(name: str, mask: Mask) -> Source:
    """`demo`, a folder or a hub name; on the CPU, with the weights as they are stored.

    Raises:
        ModelError, ExportError: it cannot be loaded, or is quantised.
        MaskError: the mask was made for another model.
    """
    folder = str(MODEL_DIR) if name == DEMO else name
    tokenizer = load_tokenizer(folder)
    dtype = _stored_dtype(folder)
    model = load_model(folder, device="cpu", dtype=dtype)
    mask.verify(model)
    return Source(model, tokenizer, find_sites(model), dtype)


def _stored_dtype(folder: str) -> str:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"The configuration of model {folder!r} cannot be read: {error}") from error
    if (quantisation := getattr(config, "quantization_config", None)) is not None:
        told = quantisation if isinstance(quantisation, dict) else vars(quantisation)
        raise ExportError(
            f"Model {folder!r} is quantised ({told.get('quant_method', 'method not named')}): its columns "
            "cannot be scaled one by one. Export from the model that is not, and quantise what comes out."
        )
    kept = config.get_text_config().dtype
    return next((name for name, dtype in DTYPES.items() if dtype == kept), "float32")


def active_neurons(source: Source, mask: Mask, threshold: Threshold) -> list[Scaled]:
    """Every site with an active neuron, layer by layer; the neurons of one by index."""
    kinds = ((mask.safety, threshold.num_safety), (mask.utility, threshold.num_utility))
    by_layer: dict[int, dict[int, float]] = {}
    for neurons, number in kinds:
        for (layer, index), factor in zip(
            neurons.neurons[:number].tolist(), neurons.factors[:number].tolist(), strict=True
        ):
            by_layer.setdefault(layer, {})[index] = factor
    return [
        Scaled(
            site,
            torch.tensor(sorted(found), dtype=torch.int64),
            torch.tensor([found[index] for index in sorted(found)], dtype=torch.float64),
        )
        for site in source.sites
        if (found := by_layer.get(site.layer))
    ]


def columns_of(scaled: Scaled) -> Tensor:
    """The columns of a projection's weight that its active neurons go through: float64 (out, neurons)."""
    weight = scaled.site.module.weight
    assert isinstance(weight, Tensor)
    across = input_dimension(scaled.site.module)
    columns = weight.detach().index_select(across, scaled.columns).double()
    return columns.T if across == 0 else columns


def rounded(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`values` as `dtype`. Raises ExportError where they are too large for it."""
    found = values.to(dtype)
    if not bool(torch.isfinite(found).all()):
        name = str(dtype).removeprefix("torch.")
        raise ExportError(f"{what}: scaled weights are too large for {name}. Take --dtype float32.")
    return found
